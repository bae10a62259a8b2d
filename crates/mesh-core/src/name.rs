//! Names that people give to nodes, sessions, keys and labels.

use unicode_normalization::is_nfc;

/// Longest name, in characters.
pub const MAX_CHARS: usize = 63;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    #[error("a name has 1 to {MAX_CHARS} characters")]
    Length,
    #[error("a name holds no control or text-direction characters")]
    Character,
    #[error("a name is written in Unicode normal form C")]
    NotNormal,
    #[error("a name does not begin or end with a space")]
    Space,
}

/// True for characters that can make a text look like another one on a screen.
pub fn is_deceptive(c: char) -> bool {
    c.is_control() || matches!(c, '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Checks a name: 1–63 characters, NFC, no control or bidirectional characters.
pub fn check(name: &str) -> Result<(), BadName> {
    let chars = name.chars().count();
    if chars == 0 || chars > MAX_CHARS {
        return Err(BadName::Length);
    }
    if name.chars().any(is_deceptive) {
        return Err(BadName::Character);
    }
    if name.trim() != name {
        return Err(BadName::Space);
    }
    if is_nfc(name) { Ok(()) } else { Err(BadName::NotNormal) }
}

/// Longest key of an entry in a session's memory or in an agent's state, in characters.
pub const MAX_KEY_CHARS: usize = 255;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    #[error("a key has 1 to {MAX_KEY_CHARS} characters")]
    Length,
    #[error("a key holds no control or text-direction characters")]
    Character,
    #[error("a key is written in Unicode normal form C")]
    NotNormal,
}

/// Checks the key of an entry: 1–255 characters, NFC, no control or bidirectional characters.
pub fn check_key(key: &str) -> Result<(), BadKey> {
    if key.is_empty() || key.chars().count() > MAX_KEY_CHARS {
        return Err(BadKey::Length);
    }
    if key.chars().any(is_deceptive) {
        return Err(BadKey::Character);
    }
    if is_nfc(key) { Ok(()) } else { Err(BadKey::NotNormal) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["laptop", "Jürgen's büro", "机器-7", &"x".repeat(63)] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        assert_eq!(check(""), Err(BadName::Length));
        assert_eq!(check(&"x".repeat(64)), Err(BadName::Length));
        assert_eq!(check("a\u{202e}b"), Err(BadName::Character));
        assert_eq!(check("a\nb"), Err(BadName::Character));
        assert_eq!(check("u\u{308}"), Err(BadName::NotNormal));
        assert_eq!(check(" a"), Err(BadName::Space));
    }

    #[test]
    fn keys() {
        for good in ["a", " a b ", "a/b?c=%", "ключ", &"ü".repeat(255)] {
            assert_eq!(check_key(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("", BadKey::Length),
            (&*"x".repeat(256), BadKey::Length),
            ("a\0", BadKey::Character),
            ("a\u{202e}", BadKey::Character),
            ("u\u{308}", BadKey::NotNormal),
        ] {
            assert_eq!(check_key(bad), Err(why), "{bad:?}");
        }
    }
}
