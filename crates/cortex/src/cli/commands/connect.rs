//! `connect`: a key for an agent's program, and the program's own configuration with it.

use super::Context;
use crate::cli::args::{ConnectArgs, Format, Program};
use crate::cli::{Fail, output};
use crate::rest::ApiKeyRequest;
use mesh_process::files;
use mesh_wire::convert::rfc3339;
use serde_json::{Map, Value, json};
use std::io;
use std::path::{Path, PathBuf};

/// What an agent needs to run things and to see what it ran.
const SCOPES: [&str; 6] = ["tasks:dispatch", "tasks:read", "nodes:read", "sessions:read", "sessions:write", "sessions:attach"];
/// What the hub is called in the program.
const ENTRY: &str = "cortex";
const DAY_MS: i64 = 86_400_000;

pub(super) async fn perform(args: ConnectArgs, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let program = args.program;
    let url = format!("{}/mcp", context.client.url());
    let file = match (args.write, args.file) {
        (false, _) => None,
        (true, Some(file)) => Some(file),
        (true, None) => Some(program.file(context.settings.home.as_deref())?),
    };
    // What cannot be written is found out before there is a key.
    if let Some(file) = &file {
        merged(program, file, &url, "")?;
    }
    let scopes = if args.scopes.is_empty() { SCOPES.map(str::to_owned).to_vec() } else { args.scopes };
    let expires_at = Some(rfc3339(context.now_ms + i64::from(args.expires) * DAY_MS));
    let name = args.name.unwrap_or_else(|| program.name().to_owned());
    let key = context.client.create_api_key(&ApiKeyRequest { name, scopes, expires_at }).await?;
    let Some(secret) = key.secret.as_deref() else {
        return Err(Fail::Failed(format!("the hub made the key {} and did not give its secret; delete it", key.id)));
    };
    if let Some(file) = &file {
        let written = merged(program, file, &url, secret).and_then(|text| write(file, &text));
        if let Err(fail) = written {
            // A key that nobody has is no key.
            let left = context.client.delete_api_key(&key.id).await.err();
            if left.is_some() {
                context.io.note(&format!("the key {} was made and could not be deleted; do: cortex key rm {}", key.id, key.id));
            }
            return Err(fail);
        }
    }
    let text = program.text(&url, secret);
    if context.format() == Format::Json {
        let config = file.is_none().then_some(text);
        let said = json!({"program": program.name(), "url": url, "key_id": key.id, "scopes": key.scopes, "expires_at": key.expires_at, "file": file, "config": config});
        return output::json(context.io, &said);
    }
    match &file {
        Some(file) => context.tell(&format!("added {ENTRY} to {}, with a key in it: only you may read it", file.display())),
        None => {
            context.tell(program.place());
            writeln!(context.io.out, "{text}")?;
            context.io.out.flush()?;
        }
    }
    let (id, until) = (output::cell(&key.id), key.expires_at.as_deref().map_or_else(String::new, output::cell));
    context.tell(&format!("the key {id} may {} until {until}; end it with: cortex key rm {id}", key.scopes.join(", ")));
    Ok(())
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Claude => "claude",
            Self::Codex => "codex",
            Self::Cursor => "cursor",
            Self::Vscode => "vscode",
            Self::Gemini => "gemini",
        }
    }

    fn file(self, home: Option<&Path>) -> Result<PathBuf, Fail> {
        let home = home.ok_or_else(|| Fail::Failed("HOME is not set; name the program's file with --file".into()))?;
        Ok(home.join(match self {
            Self::Claude => ".claude.json",
            Self::Codex => ".codex/config.toml",
            Self::Cursor => ".cursor/mcp.json",
            Self::Vscode if cfg!(target_os = "macos") => "Library/Application Support/Code/User/mcp.json",
            Self::Vscode => ".config/Code/User/mcp.json",
            Self::Gemini => ".gemini/settings.json",
        }))
    }

    /// What to do with what is printed.
    fn place(self) -> &'static str {
        match self {
            Self::Claude => "run this once; the key is seen in its arguments while it runs, which --write avoids:",
            Self::Codex => "add this to ~/.codex/config.toml, which only you should be able to read:",
            Self::Cursor => "add this to ~/.cursor/mcp.json, which only you should be able to read:",
            Self::Vscode => "add this to the file that the command \"MCP: Open User Configuration\" opens:",
            Self::Gemini => "add this to ~/.gemini/settings.json, which only you should be able to read:",
        }
    }

    /// The table that holds servers, where the file is JSON.
    fn table(self) -> &'static str {
        if self == Self::Vscode { "servers" } else { "mcpServers" }
    }

    fn entry(self, url: &str, secret: &str) -> Value {
        let headers = json!({"Authorization": format!("Bearer {secret}")});
        match self {
            Self::Claude | Self::Vscode => json!({"type": "http", "url": url, "headers": headers}),
            Self::Gemini => json!({"httpUrl": url, "headers": headers}),
            Self::Codex | Self::Cursor => json!({"url": url, "headers": headers}),
        }
    }

    fn text(self, url: &str, secret: &str) -> String {
        match self {
            // A key is letters, digits and _; a URL may have a quote.
            Self::Claude => format!(
                "claude mcp add --scope user --transport http {ENTRY} '{}' --header 'Authorization: Bearer {secret}'",
                url.replace('\'', "%27")
            ),
            Self::Codex => section(url, secret),
            _ => pretty(&json!({self.table(): {ENTRY: self.entry(url, secret)}})),
        }
    }
}

fn section(url: &str, secret: &str) -> String {
    let text = |t: String| toml::Value::String(t).to_string();
    format!(
        "[mcp_servers.{ENTRY}]\nurl = {}\nhttp_headers = {{ Authorization = {} }}",
        text(url.to_owned()),
        text(format!("Bearer {secret}"))
    )
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// The file with the entry in it; all else stays.
fn merged(program: Program, file: &Path, url: &str, secret: &str) -> Result<String, Fail> {
    let refuse =
        |why: String| Fail::Failed(format!("{}: {why}; nothing was changed. Without --write the entry is printed", file.display()));
    let old = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(refuse(format!("cannot be read: {e}"))),
    };
    let other = || refuse(format!("it has an entry {ENTRY} already; take that out first"));
    if program == Program::Codex {
        let before: toml::Table = toml::from_str(&old).map_err(|e| refuse(format!("it is no TOML: {}", e.message())))?;
        if before.get("mcp_servers").and_then(|t| t.get(ENTRY)).is_some() {
            return Err(other());
        }
        let gap = if old.is_empty() || old.ends_with('\n') { "" } else { "\n" };
        let text = format!("{old}{gap}\n{}\n", section(url, secret));
        // Where servers are written in another way, a section does not fit behind them.
        let mut after: toml::Table =
            toml::from_str(&text).map_err(|e| refuse(format!("a section cannot be added to it: {}", e.message())))?;
        if let Some(servers) = after.get_mut("mcp_servers").and_then(toml::Value::as_table_mut) {
            servers.remove(ENTRY);
            if servers.is_empty() && !before.contains_key("mcp_servers") {
                after.remove("mcp_servers");
            }
        }
        return if after == before { Ok(text) } else { Err(refuse("a section cannot be added to it".into())) };
    }
    let mut root: Map<String, Value> = match old.trim() {
        "" => Map::new(),
        text => serde_json::from_str(text).map_err(|e| refuse(format!("it is no plain JSON object: {e}")))?,
    };
    let table = root.entry(program.table()).or_insert_with(|| json!({}));
    let Some(servers) = table.as_object_mut() else { return Err(refuse(format!("{} in it is no object", program.table()))) };
    let entry = program.entry(url, secret);
    // The one before, for the same hub, is what a new key replaces.
    let same = |there: &Value| ["url", "httpUrl"].iter().any(|k| there[k] == url);
    if servers.get(ENTRY).is_some_and(|there| !same(there)) {
        return Err(other());
    }
    servers.insert(ENTRY.to_owned(), entry);
    Ok(pretty(&Value::Object(root)) + "\n")
}

fn write(file: &Path, text: &str) -> Result<(), Fail> {
    // A link stays one.
    let file = std::fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).map_or(Ok(()), files::private_dir);
    folder
        .and_then(|()| files::write_private(&file, text.as_bytes()))
        .map_err(|e| Fail::Failed(format!("{}: cannot be written: {e}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    const URL: &str = "https://hub.example/mcp";

    fn said(fail: Fail) -> String {
        match fail {
            Fail::Failed(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("settings.json");
        std::fs::write(&file, r#"{"theme": "dark", "n": 1.5, "mcpServers": {"other": {"command": "x", "env": {"A": "b"}}}}"#).unwrap();
        for program in [Program::Claude, Program::Cursor, Program::Gemini] {
            let text = merged(program, &file, URL, "cmk_1").unwrap();
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(
                (&value["theme"], &value["n"], &value["mcpServers"]["other"]["env"]["A"]),
                (&json!("dark"), &json!(1.5), &json!("b"))
            );
            assert_eq!(value["mcpServers"][ENTRY], program.entry(URL, "cmk_1"));
        }
        // Again, with the next key; never over another server's entry.
        write(&file, &merged(Program::Cursor, &file, URL, "cmk_1").unwrap()).unwrap();
        assert!(merged(Program::Cursor, &file, URL, "cmk_2").unwrap().contains("Bearer cmk_2"));
        let e = said(merged(Program::Cursor, &file, "https://elsewhere/mcp", "cmk_2").unwrap_err());
        assert!(e.contains("an entry cortex already") && e.contains("nothing was changed") && !e.contains("cmk_2"), "{e}");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        // VS Code has a table of another name, and files with comments are not read.
        assert_eq!(
            serde_json::from_str::<Value>(&merged(Program::Vscode, &file, URL, "k").unwrap()).unwrap()["servers"][ENTRY]["type"],
            "http"
        );
        for (bad, says) in [("// mine\n{}", "no plain JSON"), ("[]", "no plain JSON"), (r#"{"mcpServers": []}"#, "no object")] {
            std::fs::write(&file, bad).unwrap();
            let e = said(merged(Program::Claude, &file, URL, "k").unwrap_err());
            assert!(e.contains(says), "{bad}: {e}");
        }
    }

    #[test]
    fn toml_keeps_its_comments() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let old = "# mine\nmodel = \"x\"\n\n[mcp_servers.other]\ncommand = \"y\" # why";
        std::fs::write(&file, old).unwrap();
        let text = merged(Program::Codex, &file, URL, "cmk_1").unwrap();
        assert!(text.starts_with(old), "{text}");
        let value: toml::Table = toml::from_str(&text).unwrap();
        assert_eq!(value["mcp_servers"][ENTRY]["http_headers"]["Authorization"].as_str(), Some("Bearer cmk_1"));
        assert_eq!(value["mcp_servers"]["other"]["command"].as_str(), Some("y"));
        for (bad, says) in [
            ("model = ", "no TOML"),
            ("mcp_servers = { a = { command = \"x\" } }", "cannot be added"),
            ("[mcp_servers.cortex]\nurl = \"x\"", "an entry cortex already"),
        ] {
            std::fs::write(&file, bad).unwrap();
            let e = said(merged(Program::Codex, &file, URL, "k").unwrap_err());
            assert!(e.contains(says), "{bad}: {e}");
        }
        // A file that is not there is made.
        let new = dir.path().join("new/config.toml");
        write(&new, &merged(Program::Codex, &new, URL, "cmk_1").unwrap()).unwrap();
        assert!(merged(Program::Codex, &new, URL, "k").is_err());
    }

    #[test]
    fn a_link_stays_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real.json"), dir.path().join("link.json"));
        std::fs::write(&real, "{}").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, "{\"a\": 1}\n").unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read_to_string(&real).unwrap(), "{\"a\": 1}\n");
    }

    #[test]
    fn each_program_has_a_file_and_a_text() {
        for program in Program::value_variants() {
            assert!(program.file(Some(Path::new("/home/x"))).unwrap().starts_with("/home/x"));
            let text = program.text(URL, "cmk_1");
            assert!(text.contains(URL) && text.contains("Bearer cmk_1"), "{text}");
        }
    }
}
