//! What can be said of an attempt's output as a whole: a digest of each stream.

use crate::Digest;
use sha2::{Digest as _, Sha256};

/// SHA-256 of everything that a program wrote, by stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digests {
    pub stdout: Digest,
    pub stderr: Digest,
}

impl Digests {
    /// Of a program that wrote nothing.
    pub fn of_nothing() -> Self {
        Hashing::default().digests()
    }
}

/// Both digests on their way: bytes are taken as they come.
#[derive(Debug, Clone, Default)]
pub struct Hashing {
    stdout: Sha256,
    stderr: Sha256,
}

impl Hashing {
    pub fn stdout(&mut self, bytes: &[u8]) {
        self.stdout.update(bytes);
    }
    pub fn stderr(&mut self, bytes: &[u8]) {
        self.stderr.update(bytes);
    }
    /// Of what was taken so far.
    pub fn digests(&self) -> Digests {
        Digests { stdout: self.stdout.clone().finalize().into(), stderr: self.stderr.clone().finalize().into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sha256;

    #[test]
    fn pieces_make_the_digest_of_the_whole() {
        let mut h = Hashing::default();
        assert_eq!(h.digests(), Digests::of_nothing());
        assert_eq!(hex::encode(h.digests().stdout), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        for piece in ["a", "", "bc"] {
            h.stdout(piece.as_bytes());
            h.stderr(b"x");
        }
        assert_eq!(h.digests(), Digests { stdout: sha256(b"abc"), stderr: sha256(b"xxx") });
    }
}
