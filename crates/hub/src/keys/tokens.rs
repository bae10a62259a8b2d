//! Access tokens: JWT (RFC 7519) with EdDSA (RFC 8037), one pinned algorithm, one audience.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use mesh_core::{HubId, LoginId, UnixMs, UserId};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: String,
    sid: String,
    aud: String,
    iat: i64,
    exp: i64,
}

pub struct TokenKeys {
    encoding: EncodingKey,
    decoding: DecodingKey,
    audience: String,
}

impl TokenKeys {
    pub fn new(seed: &[u8; 32], hub: HubId) -> Self {
        use ed25519_dalek::pkcs8::EncodePrivateKey;
        let key = ed25519_dalek::SigningKey::from_bytes(seed);
        let der = key.to_pkcs8_der().expect("an Ed25519 key has a PKCS#8 form");
        Self {
            encoding: EncodingKey::from_ed_der(der.as_bytes()),
            decoding: DecodingKey::from_ed_der(key.verifying_key().as_bytes()),
            audience: hub.to_string(),
        }
    }

    pub fn issue(&self, user: UserId, login: LoginId, now: UnixMs, expires_at: UnixMs) -> String {
        let claims =
            Claims { sub: user.to_string(), sid: login.to_string(), aud: self.audience.clone(), iat: now / 1000, exp: expires_at / 1000 };
        encode(&Header::new(Algorithm::EdDSA), &claims, &self.encoding).expect("claims are plain JSON and the key fits the algorithm")
    }

    pub fn read(&self, token: &str, now: UnixMs) -> Option<(UserId, LoginId)> {
        let mut rules = Validation::new(Algorithm::EdDSA);
        rules.set_audience(&[&self.audience]);
        // Expiry is judged below by the clock that was given.
        rules.validate_exp = false;
        let claims = decode::<Claims>(token, &self.decoding, &rules).ok()?.claims;
        if claims.exp * 1000 <= now {
            return None;
        }
        Some((claims.sub.parse().ok()?, claims.sid.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;

    #[test]
    fn only_a_genuine_living_token_counts() {
        let hub = HubId::from_bytes([1; 16]);
        let keys = TokenKeys::new(&[7; 32], hub);
        let (user, login) = (UserId::from_bytes([2; 16]), LoginId::from_bytes([3; 16]));
        let token = keys.issue(user, login, 1_000_000, 2_000_000);
        assert_eq!(keys.read(&token, 1_500_000), Some((user, login)));
        assert_eq!(keys.read(&token, 2_000_000), None, "expired");
        assert_eq!(TokenKeys::new(&[8; 32], hub).read(&token, 0), None, "another key");
        assert_eq!(TokenKeys::new(&[7; 32], HubId::from_bytes([9; 16])).read(&token, 0), None, "another audience");
        let parts: Vec<&str> = token.split('.').collect();
        for alg in [r#"{"alg":"none"}"#, r#"{"alg":"HS256","typ":"JWT"}"#] {
            let forged = format!("{}.{}.{}", B64.encode(alg), parts[1], parts[2]);
            assert_eq!(keys.read(&forged, 0), None, "{alg}");
        }
        assert_eq!(keys.read(&format!("{}.{}.", parts[0], parts[1]), 0), None, "no signature");
    }
}
