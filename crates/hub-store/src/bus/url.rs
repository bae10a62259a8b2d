//! The address of a Redis server.

use redis::{ConnectionInfo, IntoConnectionInfo};
use std::fmt;

/// The address of a Redis server. Its text never shows the password.
#[derive(Clone)]
pub struct RedisUrl {
    info: ConnectionInfo,
    shown: String,
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}
impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

const FORM: &str = "redis://user:password@host:port/number, or rediss:// with TLS";

impl RedisUrl {
    /// Reads a setting. A part that was not escaped may end up in any other, so errors repeat none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        if !["redis", "rediss"].contains(&scheme) {
            return Err(format!("only Redis is known here, as {FORM}"));
        }
        // The client would take what is behind them as settings, one of which trusts any certificate.
        if rest.contains(['?', '#']) {
            return Err("nothing may stand behind the database's number; ? and # in a password are written as %3F and %23".into());
        }
        let (credentials, place) = rest.rsplit_once('@').map_or((None, rest), |(c, p)| (Some(c), p));
        if credentials.is_some_and(|c| c.contains(['/', '@']) || c.matches(':').count() > 1) {
            return Err(format!("/ @ : in a part are written as %2F, %40, %3A; the form is {FORM}"));
        }
        let (host, number) = place.split_once('/').unwrap_or((place, ""));
        if host.is_empty() || host.starts_with(':') {
            return Err(format!("it names no host; the form is {FORM}"));
        }
        if !number.is_empty() && number.parse::<u16>().is_err() {
            return Err(format!("the database is not a number; the form is {FORM}"));
        }
        let info = text.into_connection_info().map_err(|_| format!("it is not of the form {FORM}"))?;
        let user = info.redis_settings().username().map(|u| format!("{u}@")).unwrap_or_default();
        let shown = format!("{scheme}://{user}{}/{}", info.addr(), info.redis_settings().db());
        Ok(Self { info, shown })
    }

    pub(super) fn client(&self) -> redis::RedisResult<redis::Client> {
        redis::Client::open(self.info.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_their_secrets() {
        for (text, shown) in [
            ("redis://db.example", "redis://db.example:6379/0"),
            ("redis://:geheim@db.example:6380/3", "redis://db.example:6380/3"),
            ("rediss://hub:ge%2Fhe%40im@10.0.0.1", "rediss://hub@10.0.0.1:6379/0"),
            ("redis://hub:geheim@[::1]:7000", "redis://hub@::1:7000/0"),
        ] {
            let url = RedisUrl::parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("geheim"));
        }
    }

    #[test]
    fn a_bad_address_is_refused_without_repeating_it() {
        for (text, reason) in [
            ("geheim", "only Redis"),
            ("http://hub:geheim@db", "only Redis"),
            ("unix:///geheim", "only Redis"),
            ("redis://", "no host"),
            ("redis://:geheim@:6379", "no host"),
            ("redis://hub:12/geheim@db", "%2F"),
            ("redis://hub:12@geheim@db", "%40"),
            ("redis://hub:12:geheim@db", "%3A"),
            ("redis://hub:12?geheim@db", "%3F"),
            ("rediss://hub:geheim@db#insecure", "%23"),
            ("redis://hub:geheim@db:port", "form"),
            ("redis://hub:geheim@db:99999", "form"),
            ("redis://hub:geheim@db/geheim", "not a number"),
        ] {
            let refused = RedisUrl::parse(text).unwrap_err();
            assert!(refused.contains(reason) && !refused.contains("geheim"), "{text}: {refused}");
        }
    }
}
