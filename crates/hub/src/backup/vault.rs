//! Keys under a passphrase: argon2id, then AES-256-GCM over all of them at once.

use anyhow::{Context, Result, anyhow, bail, ensure};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use mesh_process::entropy;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Shorter ones are found by trying.
const MIN_CHARS: usize = 12;
/// 64 MiB and three passes: RFC 9106, second choice.
const MEMORY_KIB: u32 = 64 << 10;
const PASSES: u32 = 3;
/// A file may ask for so much and no more.
const MAX_MEMORY_KIB: u32 = 1 << 20;
const MAX_PASSES: u32 = 20;

/// Files by name.
pub type Files = BTreeMap<String, Vec<u8>>;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vault {
    /// argon2id: KiB, passes, salt.
    memory_kib: u32,
    passes: u32,
    salt: String,
    nonce: String,
    sealed: String,
}

fn key(passphrase: &str, salt: &[u8], memory_kib: u32, passes: u32) -> Result<LessSafeKey> {
    let params = Params::new(memory_kib, passes, 1, Some(32)).map_err(|e| anyhow!("argon2id: {e}"))?;
    let mut memory = vec![Block::default(); params.block_count()];
    let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let mut out = [0; 32];
    argon.hash_password_into_with_memory(passphrase.as_bytes(), salt, &mut out, &mut memory[..]).map_err(|e| anyhow!("argon2id: {e}"))?;
    Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &out)?))
}

/// So that the keys of one hub cannot be put into the backup of another.
fn bound_to(hub: &str) -> Vec<u8> {
    format!("cortex-mesh backup keys 1 {hub}").into_bytes()
}

pub fn seal(files: &Files, passphrase: &str, hub: &str) -> Result<Vec<u8>> {
    let (salt, nonce) = (entropy::bytes::<16>(), entropy::bytes::<NONCE_LEN>());
    let texts: BTreeMap<&String, String> = files.iter().map(|(name, bytes)| (name, B64.encode(bytes))).collect();
    let mut bytes = serde_json::to_vec(&texts)?;
    let key = key(passphrase, &salt, MEMORY_KIB, PASSES)?;
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(bound_to(hub)), &mut bytes)?;
    let vault =
        Vault { memory_kib: MEMORY_KIB, passes: PASSES, salt: hex::encode(salt), nonce: hex::encode(nonce), sealed: B64.encode(bytes) };
    Ok(serde_json::to_vec(&vault)?)
}

pub fn open(sealed: &[u8], passphrase: &str, hub: &str) -> Result<Files> {
    let vault: Vault = serde_json::from_slice(sealed).context("the sealed keys cannot be read")?;
    ensure!(vault.memory_kib <= MAX_MEMORY_KIB && vault.passes <= MAX_PASSES, "the sealed keys ask for more memory or time than is sane");
    let mut nonce = [0; NONCE_LEN];
    hex::decode_to_slice(&vault.nonce, &mut nonce).context("the sealed keys cannot be read")?;
    let (salt, mut bytes) = (hex::decode(&vault.salt)?, B64.decode(&vault.sealed)?);
    let key = key(passphrase, &salt, vault.memory_kib, vault.passes)?;
    let opened = key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(bound_to(hub)), &mut bytes);
    let Ok(opened) = opened else { bail!("the passphrase is not the one that the keys were sealed under") };
    let texts: BTreeMap<String, String> = serde_json::from_slice(opened)?;
    texts.into_iter().map(|(name, text)| Ok((name, B64.decode(text)?))).collect()
}

/// The passphrase: the first line of a file (`-` is standard input), else asked for at the terminal.
/// Never an argument, which other users of the machine can read.
pub fn passphrase(file: Option<&Path>, new: bool) -> Result<String> {
    let text = match file {
        Some(path) => {
            let mut text = String::new();
            let read = match path.to_str() {
                Some("-") => std::io::stdin().take(4096).read_to_string(&mut text),
                _ => std::fs::File::open(path).and_then(|f| f.take(4096).read_to_string(&mut text)),
            };
            read.with_context(|| format!("the passphrase file {}", path.display()))?;
            text.lines().next().unwrap_or_default().to_owned()
        }
        None => {
            let ask = |prompt: &str| {
                rpassword::prompt_password(prompt).context("asking for the passphrase; without a terminal use --passphrase-file")
            };
            let text = ask("Passphrase for the keys in the backup: ")?;
            ensure!(!new || ask("The same again: ")? == text, "the two are not the same");
            text
        }
    };
    ensure!(!new || text.chars().count() >= MIN_CHARS, "a passphrase has at least {MIN_CHARS} characters");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_passphrase_opens_it() {
        let files: Files = [("root.key".to_owned(), vec![0, 255, 3]), ("hub-id".to_owned(), b"hub_x".to_vec())].into();
        let sealed = seal(&files, "correct horse battery", "hub_x").unwrap();
        assert_eq!(open(&sealed, "correct horse battery", "hub_x").unwrap(), files);
        assert!(open(&sealed, "correct horse batterz", "hub_x").unwrap_err().to_string().contains("passphrase"));
        assert!(open(&sealed, "correct horse battery", "hub_y").is_err(), "of another hub");
        assert_ne!(seal(&files, "correct horse battery", "hub_x").unwrap(), sealed, "salt and nonce are fresh");
        let greedy = String::from_utf8(sealed).unwrap().replace("\"memory_kib\":65536", "\"memory_kib\":4000000");
        assert!(open(greedy.as_bytes(), "x", "hub_x").unwrap_err().to_string().contains("sane"));
    }
}
