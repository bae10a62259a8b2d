//! Keys that seal truly and sign nothing.

use hub_engine::ports::{Keyring, Stored};
use mesh_core::seal::Intent;
use mesh_core::{Digest, LoginId, NodeId, UnixMs, UserId};

const KEY: [u8; 32] = [7; 32];

#[derive(Debug, Default)]
pub struct TestKeys;

impl Keyring for TestKeys {
    fn sign(&self, _: &str, _: &[u8]) -> (String, [u8; 64]) {
        ("key".into(), [0; 64])
    }
    fn key_id(&self) -> String {
        "key".into()
    }
    fn seal(&self, intent: &Intent) -> Digest {
        intent.seal(&KEY)
    }
    fn is_sealed(&self, intent: &Intent, seal: &Digest) -> bool {
        intent.is_sealed_by(&KEY, seal)
    }
    fn token_mac(&self, token: &str) -> Digest {
        mesh_core::sha256(token.as_bytes())
    }
    fn issue_access(&self, _: UserId, _: LoginId, _: UnixMs, _: UnixMs) -> String {
        String::new()
    }
    fn read_access(&self, _: &str, _: UnixMs) -> Option<(UserId, LoginId)> {
        None
    }
    fn issue_certificate(&self, _: NodeId, _: &[u8], _: UnixMs, _: UnixMs, _: &[Digest]) -> Stored<Vec<u8>> {
        Ok(vec![])
    }
}
