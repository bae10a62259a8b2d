//! Configuration files, the environment, and errors that name the place and the reason.

use serde::de::DeserializeOwned;
use std::path::Path;

/// A setting that cannot be used: where it stands, which one it is, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {key}: {reason}")]
pub struct BadSetting {
    /// A file, `environment` or `command line`.
    pub place: String,
    pub key: String,
    pub reason: String,
}

impl BadSetting {
    pub fn new(place: impl Into<String>, key: impl Into<String>, reason: impl ToString) -> Self {
        Self { place: place.into(), key: key.into(), reason: reason.to_string() }
    }
}

/// Reads a TOML file into a type that denies unknown fields.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, BadSetting> {
    let place = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| BadSetting::new(&place, "(file)", e))?;
    toml::from_str(&text).map_err(|e| {
        let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        let key = key_at(&text, line);
        BadSetting::new(format!("{place}:{line}"), key, e.message().trim())
    })
}

/// The key of a line, under its section.
fn key_at(text: &str, line: usize) -> String {
    let mut section = String::new();
    for (i, l) in text.lines().enumerate().take(line) {
        let l = l.trim();
        if let Some(s) = l.strip_prefix('[').and_then(|s| s.strip_suffix(']')) {
            section = s.trim().to_owned();
            if i + 1 == line {
                return section;
            }
        } else if i + 1 == line {
            let key = l.split('=').next().unwrap_or("").trim();
            return if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        }
    }
    "(file)".to_owned()
}

/// Reads an environment variable. An empty one counts as absent.
#[expect(clippy::disallowed_methods, reason = "the one home of env::var")]
pub fn env(name: &str) -> Result<Option<String>, BadSetting> {
    match std::env::var(name) {
        Ok(v) if v.is_empty() => Ok(None),
        Ok(v) => Ok(Some(v)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(e) => Err(BadSetting::new("environment", name, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct C {
        http: Http,
    }
    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Http {
        addr: String,
    }

    #[test]
    fn an_error_names_file_key_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("hub.toml");
        std::fs::write(&p, "[http]\naddr = \"x\"\nadr = \"y\"\n").unwrap();
        let e = read_toml::<C>(&p).unwrap_err();
        assert!(e.place.ends_with("hub.toml:3"), "{e}");
        assert_eq!(e.key, "http.adr");
        assert!(e.reason.contains("unknown field"), "{e}");
        std::fs::write(&p, "[http]\naddr = 5\n").unwrap();
        assert_eq!(read_toml::<C>(&p).unwrap_err().key, "http.addr");
    }
}
