//! Settings: a TOML file, the environment and flags, in that order of rising weight; all of it is
//! checked before a port is bound.

use crate::doors::forwarded::Networks;
use crate::doors::hosts::plain;
use crate::doors::https::{Given, Tls};
use hub_engine::retention::Limits;
use mesh_process::config::{BadSetting, env, read_toml};
use mesh_process::telemetry;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// As written in a file. Unknown keys are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawFile {
    data_dir: Option<PathBuf>,
    http: RawSection,
    node: RawSection,
    metrics: RawSection,
    database: RawSection,
    redis: RawSection,
    auth: RawSection,
    limits: RawSection,
    retention: RawSection,
    log: RawSection,
}
type RawSection = std::collections::BTreeMap<String, toml::Value>;

/// What flags may set.
#[derive(Debug, Default, Clone)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub data_dir: Option<PathBuf>,
    pub log_level: Option<String>,
    pub insecure_http: bool,
    /// All addresses, and HTTPS for the doors.
    pub lan: bool,
}

#[derive(Debug, Clone)]
pub struct Config {
    pub data_dir: PathBuf,
    pub database: hub_store::Database,
    /// Without it, events stay in this process.
    pub redis: Option<hub_store::RedisUrl>,
    pub http_addr: SocketAddr,
    pub public_url: Option<String>,
    pub tls: Tls,
    pub trusted_proxies: Networks,
    /// Names, besides its own, by which the hub may be asked for.
    pub allowed_hosts: Vec<String>,
    pub node_addr: SocketAddr,
    pub node_public_addr: Option<String>,
    pub metrics_addr: SocketAddr,
    pub admin_password: Option<String>,
    pub log_level: String,
    pub log_json: bool,
    pub otlp_endpoint: Option<String>,
    pub body_bytes: u64,
    pub output_bytes: u64,
    pub request_secs: u64,
    pub connections: u64,
    /// 0: no limit.
    pub connections_per_address: u64,
    pub events_replay_secs: u64,
    /// 0: no limit.
    pub api_per_second: u64,
    pub api_burst: u64,
    pub login_per_minute_address: u64,
    pub login_per_minute_account: u64,
    pub access_secs: u64,
    pub refresh_days: u64,
    pub session_hours: u64,
    pub certificate: Duration,
    pub invite_secs: u64,
    pub retention: Limits,
}

/// Every setting there is: its section and key, and whether it is built. What is named by the
/// contract and not built yet is refused rather than ignored.
const SETTINGS: &[(&str, &str, bool)] = &[
    ("http", "addr", true),
    ("http", "public_url", true),
    ("http", "tls_cert", true),
    ("http", "tls_key", true),
    ("http", "trusted_proxies", true),
    ("http", "allowed_hosts", true),
    ("node", "addr", true),
    ("node", "public_addr", true),
    ("metrics", "addr", true),
    ("database", "url", true),
    ("redis", "url", true),
    ("auth", "access_secs", true),
    ("auth", "refresh_days", true),
    ("auth", "session_hours", true),
    ("auth", "approval_secs", false),
    ("auth", "certificate_hours", true),
    ("auth", "invite_secs", true),
    ("limits", "body_bytes", true),
    ("limits", "output_bytes", true),
    ("limits", "request_secs", true),
    ("limits", "upload_bytes", false),
    ("limits", "connections", true),
    ("limits", "connections_per_address", true),
    ("limits", "api_per_second", true),
    ("limits", "api_burst", true),
    ("limits", "login_per_minute_address", true),
    ("limits", "login_per_minute_account", true),
    ("limits", "spool_attempt_bytes", false),
    ("limits", "spool_node_bytes", false),
    ("limits", "events_replay_secs", true),
    ("retention", "journal_days", true),
    ("retention", "output_days", true),
    ("retention", "versions_days", false),
    ("retention", "journal_bytes", true),
    ("retention", "output_bytes", true),
    ("retention", "versions_bytes", false),
    ("retention", "workspace_days", false),
    ("log", "level", true),
    ("log", "format", true),
    ("log", "otlp_endpoint", true),
];

/// Section and key of every setting that can be used.
pub fn built() -> impl Iterator<Item = (&'static str, &'static str)> {
    SETTINGS.iter().filter(|(.., built)| *built).map(|(section, key, _)| (*section, *key))
}

/// One setting as found: its text and the place it came from.
struct Found {
    text: String,
    place: String,
}

struct Layers {
    file: Option<(String, RawFile)>,
}

impl Layers {
    fn get(&self, section: &str, key: &str) -> Result<Option<Found>, BadSetting> {
        let name = if (section, key) == ("http", "public_url") {
            "CORTEX_PUBLIC_URL".to_owned()
        } else {
            format!("CORTEX_{}_{}", section.to_uppercase(), key.to_uppercase())
        };
        if let Some(text) = env(&name)? {
            return Ok(Some(Found { text, place: format!("environment {name}") }));
        }
        let Some((place, file)) = &self.file else { return Ok(None) };
        Ok(section_of(file, section).get(key).map(|v| Found {
            text: match v {
                toml::Value::String(s) => s.clone(),
                // As the environment writes a list.
                toml::Value::Array(items) if items.iter().all(|i| i.is_str()) => {
                    items.iter().filter_map(|i| i.as_str()).collect::<Vec<_>>().join(",")
                }
                other => other.to_string(),
            },
            place: place.clone(),
        }))
    }
    fn parse<T: std::str::FromStr>(&self, section: &str, key: &str, default: T) -> Result<T, BadSetting>
    where
        T::Err: std::fmt::Display,
    {
        match self.get(section, key)? {
            None => Ok(default),
            Some(f) => f.text.parse().map_err(|e| BadSetting::new(f.place, format!("{section}.{key}"), format!("{:?}: {e}", f.text))),
        }
    }
    fn number(&self, section: &str, key: &str, default: u64, least: u64, most: u64) -> Result<u64, BadSetting> {
        let n = self.parse(section, key, default)?;
        if (least..=most).contains(&n) {
            Ok(n)
        } else {
            let place = self.get(section, key)?.map_or_else(String::new, |f| f.place);
            Err(BadSetting::new(place, format!("{section}.{key}"), format!("{n} is not between {least} and {most}")))
        }
    }
}

/// The parts of a list, which are separated by commas.
fn parts(f: &Found) -> impl Iterator<Item = &str> {
    f.text.split(',').map(str::trim).filter(|t| !t.is_empty())
}

fn section_of<'a>(file: &'a RawFile, section: &str) -> &'a RawSection {
    match section {
        "http" => &file.http,
        "node" => &file.node,
        "metrics" => &file.metrics,
        "database" => &file.database,
        "redis" => &file.redis,
        "auth" => &file.auth,
        "limits" => &file.limits,
        "retention" => &file.retention,
        _ => &file.log,
    }
}

impl Config {
    pub fn load(flags: &Flags) -> Result<Self, BadSetting> {
        let file = match &flags.config {
            None => None,
            Some(path) => Some((path.display().to_string(), read_file(path)?)),
        };
        let data_dir = match (&flags.data_dir, env("CORTEX_DATA_DIR")?) {
            (Some(d), _) => d.clone(),
            (None, Some(d)) => d.into(),
            (None, None) => file.as_ref().and_then(|(_, f)| f.data_dir.clone()).unwrap_or_else(|| "cortex-data".into()),
        };
        let l = Layers { file };
        for (section, key, built) in SETTINGS {
            if let (false, Some(f)) = (built, l.get(section, key)?) {
                return Err(BadSetting::new(f.place, format!("{section}.{key}"), "this setting is not built yet; take it out"));
            }
        }
        let public_url = l.get("http", "public_url")?.map(|f| check_url(&f, "http.public_url")).transpose()?;
        let trusted_proxies = match l.get("http", "trusted_proxies")? {
            Some(f) => Networks::parse(parts(&f)).map_err(|reason| BadSetting::new(&f.place, "http.trusted_proxies", reason))?,
            None => Networks::default(),
        };
        let tls = check_tls(flags, &l, public_url.as_deref().filter(|_| trusted_proxies.is_empty()))?;
        let all = |a: SocketAddr| if flags.lan { SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), a.port()) } else { a };
        let config = Self {
            data_dir,
            database: l.get("database", "url")?.map(|f| check_database(&f)).transpose()?.unwrap_or_default(),
            redis: l.get("redis", "url")?.map(|f| check_redis(&f)).transpose()?,
            http_addr: all(l.parse("http", "addr", SocketAddr::from(([127, 0, 0, 1], 8080)))?),
            public_url,
            tls,
            trusted_proxies,
            allowed_hosts: l.get("http", "allowed_hosts")?.map(|f| check_hosts(&f)).transpose()?.unwrap_or_default(),
            node_addr: all(l.parse("node", "addr", SocketAddr::from(([127, 0, 0, 1], 7443)))?),
            node_public_addr: l.get("node", "public_addr")?.map(|f| check_host_port(&f)).transpose()?,
            metrics_addr: l.parse("metrics", "addr", SocketAddr::from(([127, 0, 0, 1], 9090)))?,
            admin_password: env("CORTEX_ADMIN_PASSWORD")?,
            log_level: log_level(flags, &l)?,
            log_json: match l.parse("log", "format", "text".to_owned())?.as_str() {
                "text" => false,
                "json" => true,
                other => {
                    let place = l.get("log", "format")?.map_or_else(String::new, |f| f.place);
                    return Err(BadSetting::new(place, "log.format", format!("{other:?} is neither text nor json")));
                }
            },
            otlp_endpoint: l.get("log", "otlp_endpoint")?.map(|f| check_url(&f, "log.otlp_endpoint")).transpose()?,
            body_bytes: l.number("limits", "body_bytes", 8 << 20, 1024, 64 << 20)?,
            output_bytes: l.number("limits", "output_bytes", 64 << 20, 1024, 1 << 40)?,
            request_secs: l.number("limits", "request_secs", 30, 1, 3600)?,
            connections: l.number("limits", "connections", 10_000, 1, 1_000_000)?,
            connections_per_address: l.number("limits", "connections_per_address", 2_000, 0, 1_000_000)?,
            events_replay_secs: l.number("limits", "events_replay_secs", 600, 1, 86_400)?,
            api_per_second: l.number("limits", "api_per_second", 100, 0, 1_000_000)?,
            api_burst: l.number("limits", "api_burst", 200, 1, 1_000_000)?,
            login_per_minute_address: l.number("limits", "login_per_minute_address", 10, 1, 1_000_000)?,
            login_per_minute_account: l.number("limits", "login_per_minute_account", 5, 1, 1_000_000)?,
            access_secs: l.number("auth", "access_secs", 600, 10, 86_400)?,
            refresh_days: l.number("auth", "refresh_days", 30, 1, 365)?,
            session_hours: l.number("auth", "session_hours", 24, 1, 720)?,
            certificate: Duration::from_secs(3600 * l.number("auth", "certificate_hours", 24, 1, 720)?),
            invite_secs: l.number("auth", "invite_secs", 3600, 1, 86_400)?,
            retention: Limits {
                journal_days: l.number("retention", "journal_days", 30, 0, 36_500)?,
                journal_bytes: l.number("retention", "journal_bytes", 20 << 30, 0, 1 << 50)?,
                output_days: l.number("retention", "output_days", 30, 0, 36_500)?,
                output_bytes: l.number("retention", "output_bytes", 20 << 30, 0, 1 << 50)?,
            },
        };
        if let Some(p) = &config.admin_password {
            let n = p.chars().count();
            if !(12..=256).contains(&n) {
                return Err(BadSetting::new(
                    "environment",
                    "CORTEX_ADMIN_PASSWORD",
                    format!("a password has 12 to 256 characters, not {n}"),
                ));
            }
        }
        let place = |key: &str| l.get(key, "addr").map(|f| f.map_or_else(String::new, |f| f.place));
        if config.tls == Tls::None && !config.http_addr.ip().to_canonical().is_loopback() && !flags.insecure_http {
            let reason = format!(
                "{} is not a loopback address, and plain HTTP shows every password on the way: give a certificate (http.tls_cert, \
                 http.tls_key), start with --lan for HTTPS by the hub's own authority, or add --insecure-http if a proxy or a private \
                 network protects it",
                config.http_addr
            );
            return Err(BadSetting::new(place("http")?, "http.addr", reason));
        }
        if config.tls == Tls::None && config.one_port() {
            let reason = "is http.addr too: one port for doors and nodes needs HTTPS (http.tls_cert and http.tls_key, or --lan)";
            return Err(BadSetting::new(place("node")?, "node.addr", reason));
        }
        Ok(config)
    }

    /// Do doors and nodes share one port?
    pub fn one_port(&self) -> bool {
        self.http_addr == self.node_addr && self.http_addr.port() != 0
    }

    /// Looks into the files that settings name, as a start does.
    pub fn check_files(&self, now: mesh_core::UnixMs) -> Result<(), BadSetting> {
        match &self.tls {
            Tls::Given(given) => given.load(now).map(drop),
            Tls::None | Tls::Own => Ok(()),
        }
    }
}

/// `public_url` is what clients call the hub, where no proxy stands before it.
fn check_tls(flags: &Flags, l: &Layers, public_url: Option<&str>) -> Result<Tls, BadSetting> {
    let file = |f: &Found, key: &str| {
        let path = PathBuf::from(&f.text);
        if path.is_file() { Ok(path) } else { Err(BadSetting::new(&f.place, key, format!("there is no file {:?}", f.text))) }
    };
    match (l.get("http", "tls_cert")?, l.get("http", "tls_key")?) {
        (None, None) if flags.lan => Ok(Tls::Own),
        (None, None) => Ok(Tls::None),
        (Some(c), None) => Err(BadSetting::new(c.place, "http.tls_cert", "needs its private key: set http.tls_key too")),
        (None, Some(k)) => Err(BadSetting::new(k.place, "http.tls_key", "needs its certificate: set http.tls_cert too")),
        (Some(c), Some(k)) => Ok(Tls::Given(Given {
            certificate: file(&c, "http.tls_cert")?,
            key: file(&k, "http.tls_key")?,
            host: public_url.filter(|u| u.starts_with("https://")).and_then(host_of).map(str::to_owned),
            place: c.place,
        })),
    }
}

fn check_hosts(f: &Found) -> Result<Vec<String>, BadSetting> {
    let good = |host: &str| {
        let name = plain(host).filter(|n| n == &host.to_ascii_lowercase() || host.starts_with('['));
        let wild = |n: &str| n.contains('*') && (!n.starts_with("*.") || n[1..].contains('*') || n.len() < 4);
        name.filter(|n| !wild(n)).ok_or_else(|| {
            let reason = format!("{host:?} is not the name of a host, such as hub.example.org or *.example.org, without a port");
            BadSetting::new(&f.place, "http.allowed_hosts", reason)
        })
    };
    parts(f).map(good).collect()
}

fn read_file(path: &Path) -> Result<RawFile, BadSetting> {
    let file: RawFile = read_toml(path)?;
    let place = path.display().to_string();
    for section in ["http", "node", "metrics", "database", "redis", "auth", "limits", "retention", "log"] {
        for key in section_of(&file, section).keys() {
            if !SETTINGS.iter().any(|(s, k, _)| *s == section && k == key) {
                let known: Vec<_> = SETTINGS.iter().filter(|(s, ..)| *s == section).map(|(_, k, _)| *k).collect();
                return Err(BadSetting::new(&place, format!("{section}.{key}"), format!("unknown key; there is {}", known.join(", "))));
            }
        }
    }
    Ok(file)
}

fn check_url(f: &Found, key: &str) -> Result<String, BadSetting> {
    let ok = f.text.starts_with("http://") || f.text.starts_with("https://");
    if ok && host_of(&f.text).is_some() {
        return Ok(f.text.clone());
    }
    Err(BadSetting::new(&f.place, key, format!("{:?} is not an address such as https://hub.example.org", f.text)))
}

fn log_level(flags: &Flags, l: &Layers) -> Result<String, BadSetting> {
    let found = match &flags.log_level {
        Some(level) => Some(Found { text: level.clone(), place: "command line".into() }),
        None => l.get("log", "level")?,
    };
    let Some(found) = found else { return Ok("info".into()) };
    match telemetry::check(&found.text) {
        Ok(_) => Ok(found.text),
        Err(reason) => Err(BadSetting::new(found.place, "log.level", reason)),
    }
}

/// Its text may hold a password, so no error repeats it.
fn check_database(f: &Found) -> Result<hub_store::Database, BadSetting> {
    hub_store::Database::parse(&f.text).map_err(|reason| BadSetting::new(&f.place, "database.url", reason))
}

/// Nor does any of these.
fn check_redis(f: &Found) -> Result<hub_store::RedisUrl, BadSetting> {
    hub_store::RedisUrl::parse(&f.text).map_err(|reason| BadSetting::new(&f.place, "redis.url", reason))
}

fn check_host_port(f: &Found) -> Result<String, BadSetting> {
    let good = |(host, port): (&str, &str)| {
        let literal = host.starts_with('[') && host.ends_with(']');
        let whole = plain(host).is_some_and(|name| literal || !name.contains(':'));
        whole && port.parse::<u16>().is_ok_and(|p| p != 0)
    };
    if f.text.rsplit_once(':').is_some_and(good) {
        return Ok(f.text.clone());
    }
    let reason = format!("{:?} is not host:port, with brackets around an address of IPv6", f.text);
    Err(BadSetting::new(&f.place, "node.public_addr", reason))
}

/// The host of a URL, with brackets if it is an IPv6 literal.
pub fn host_of(url: &str) -> Option<&str> {
    let rest = url.split_once("://")?.1;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = if authority.starts_with('[') { &authority[..=authority.find(']')?] } else { authority.split(':').next()? };
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, BadSetting> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&Flags { config: Some(path), ..Default::default() })
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let c = load("").unwrap();
        assert_eq!(c.http_addr.to_string(), "127.0.0.1:8080");
        assert_eq!((c.body_bytes, c.output_bytes, c.certificate.as_secs()), (8 << 20, 64 << 20, 86_400));
        let r = c.retention;
        assert_eq!((r.journal_days, r.output_days, r.journal_bytes, r.output_bytes), (30, 30, 20 << 30, 20 << 30));
        assert!(matches!(c.database, hub_store::Database::Sqlite));
    }

    #[test]
    fn addresses_are_kept_without_showing_their_passwords() {
        let c = load("[redis]\nurl = \"rediss://hub:geheim@redis.example\"\n").unwrap();
        let shown = format!("{c:?}");
        assert!(shown.contains("rediss://hub@redis.example:6379/0") && !shown.contains("geheim"), "{shown}");
        let c = load("[database]\nurl = \"postgres://hub:geheim@db.example/cortex\"\n").unwrap();
        let shown = format!("{c:?}");
        assert!(shown.contains("postgres://hub@db.example:5432/cortex") && !shown.contains("geheim"), "{shown}");
    }

    #[test]
    fn errors_name_file_key_and_reason() {
        for (text, key, reason) in [
            ("[http]\nadr = 1\n", "http.adr", "unknown key"),
            ("[htp]\naddr = 1\n", "htp", "unknown field"),
            ("[http]\naddr = \"127.0.0.1:99999\"\n", "http.addr", "invalid"),
            ("[http]\naddr = \"0.0.0.0:80\"\n", "http.addr", "loopback"),
            ("[limits]\nbody_bytes = 1\n", "limits.body_bytes", "between"),
            ("[database]\nurl = \"mysql://u:geheim@x/d\"\n", "database.url", "only PostgreSQL"),
            ("[database]\nurl = \"postgres://u:geheim@x\"\n", "database.url", "names no database"),
            ("[redis]\nurl = \"http://u:geheim@x\"\n", "redis.url", "only Redis"),
            ("[redis]\nurl = \"redis://u:geheim@x/y\"\n", "redis.url", "not a number"),
            ("[http]\ntls_cert = \"x\"\n", "http.tls_cert", "set http.tls_key too"),
            ("[http]\ntls_key = \"x\"\n", "http.tls_key", "set http.tls_cert too"),
            ("[http]\ntls_cert = \"x\"\ntls_key = \"y\"\n", "http.tls_cert", "no file"),
            ("[http]\ntrusted_proxies = [\"10.0.0.0/8\", \"proxy.example\"]\n", "http.trusted_proxies", "proxy.example"),
            ("[http]\ntrusted_proxies = [1]\n", "http.trusted_proxies", "neither"),
            ("[http]\nallowed_hosts = [\"hub.example\", \"hub.example:80\"]\n", "http.allowed_hosts", "without a port"),
            ("[http]\nallowed_hosts = \"*\"\n", "http.allowed_hosts", "without a port"),
            ("[http]\nallowed_hosts = \"https://x\"\n", "http.allowed_hosts", "without a port"),
            ("[http]\naddr = \"[::1]:80\"\n[node]\naddr = \"[::1]:80\"\n", "node.addr", "needs HTTPS"),
            ("[http]\naddr = \"::1:80\"\n", "http.addr", "invalid"),
            ("[node]\npublic_addr = \"fd00::1:443\"\n", "node.public_addr", "brackets"),
            ("[node]\npublic_addr = \"hub.example:0\"\n", "node.public_addr", "host:port"),
            ("[log]\nformat = \"xml\"\n", "log.format", "neither"),
        ] {
            let e = load(text).unwrap_err();
            assert_eq!(e.key, key, "{e}");
            assert!(e.reason.contains(reason), "{e}");
            assert!(!e.place.is_empty());
            assert!(!format!("{e} {e:?}").contains("geheim"), "{e}");
        }
    }

    #[test]
    fn lists_are_lists_or_texts_with_commas() {
        let listed =
            load("[http]\ntrusted_proxies = [\"10.0.0.0/8\", \"::1\"]\nallowed_hosts = [\"A.example\", \"*.b.example\"]\n").unwrap();
        let text = load("[http]\ntrusted_proxies = \"10.0.0.0/8, ::1\"\nallowed_hosts = \"a.example,*.b.example\"\n").unwrap();
        assert_eq!((&listed.trusted_proxies, &listed.allowed_hosts), (&text.trusted_proxies, &text.allowed_hosts));
        assert_eq!(listed.allowed_hosts, ["a.example", "*.b.example"]);
        for good in ["hub.example:443", "[fd00::1]:443", "10.0.0.1:7443"] {
            assert_eq!(load(&format!("[node]\npublic_addr = \"{good}\"\n")).unwrap().node_public_addr.as_deref(), Some(good));
        }
    }

    #[test]
    fn every_setting_says_what_is_wrong_with_it() {
        for (section, key, built) in SETTINGS {
            let e = load(&format!("[{section}]\n{key} = \"?=?\"\n")).unwrap_err();
            assert_eq!(e.key, format!("{section}.{key}"), "{e}");
            assert!(e.place.ends_with("hub.toml"), "{e}");
            assert!(!e.reason.is_empty() && e.reason.contains("not built yet") != *built, "{e}");
        }
        let e = load("data_dir = 5\n").unwrap_err();
        assert_eq!(e.key, "data_dir", "{e}");
    }

    #[test]
    fn hosts() {
        assert_eq!(host_of("https://hub.example.org:8443/x"), Some("hub.example.org"));
        assert_eq!(host_of("http://[::1]:80"), Some("[::1]"));
        assert_eq!(host_of("nonsense"), None);
    }
}
