//! Where a node keeps its things, and the invite that a person brings: file, environment, checks.

use crate::trust::Trust;
use crate::way::Way;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use mesh_core::{Digest, HubId, InviteId, NodeId, enrol, name};
use mesh_process::config::{BadSetting, env};
use mesh_process::proxy::Proxies;
use mesh_wire::invite::InviteFile;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// More would only be a typing error.
const MOST_TASKS: u32 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    TextList,
    TextMap,
}

struct Key {
    section: &'static str,
    name: &'static str,
    env: &'static str,
    kind: Kind,
    required: bool,
}

const fn key(section: &'static str, name: &'static str, env: &'static str, kind: Kind, required: bool) -> Key {
    Key { section, name, env, kind, required }
}

/// Every key of the invite, the variable that overrides it, and what it must be.
const KEYS: [Key; 13] = [
    key("hub", "id", "CORTEX_NODE_HUB_ID", Kind::Text, true),
    key("hub", "grpc", "CORTEX_NODE_HUB_GRPC", Kind::Text, true),
    key("hub", "also", "CORTEX_NODE_HUB_ALSO", Kind::TextList, false),
    key("hub", "url", "CORTEX_NODE_HUB_URL", Kind::Text, true),
    key("hub", "server_name", "CORTEX_NODE_HUB_SERVER_NAME", Kind::Text, true),
    key("", "ca_pin", "CORTEX_NODE_CA_PIN", Kind::Text, true),
    key("", "task_keys", "CORTEX_NODE_TASK_KEYS", Kind::TextList, true),
    key("invite", "id", "CORTEX_NODE_INVITE_ID", Kind::Text, true),
    key("invite", "secret", "CORTEX_NODE_INVITE_SECRET", Kind::Text, false),
    key("node", "name", "CORTEX_NODE_NAME", Kind::Text, false),
    key("node", "labels", "CORTEX_NODE_LABELS", Kind::TextMap, false),
    key("node", "workspace_root", "CORTEX_NODE_WORKSPACE_ROOT", Kind::Text, false),
    key("node", "max_tasks", "CORTEX_NODE_MAX_TASKS", Kind::Number, false),
];

impl Key {
    fn path(&self) -> String {
        if self.section.is_empty() { self.name.to_owned() } else { format!("{}.{}", self.section, self.name) }
    }
    fn holder<'a>(&self, doc: &'a Map<String, Value>) -> Option<&'a Map<String, Value>> {
        if self.section.is_empty() { Some(doc) } else { doc.get(self.section)?.as_object() }
    }
}

/// The invite after every check, its texts parsed.
#[derive(Clone)]
pub struct Invite {
    pub file: InviteFile,
    pub hub: HubId,
    pub invite: InviteId,
    /// Seed of the invite's Ed25519 key.
    pub seed: [u8; 32],
    pub ca_pin: Digest,
    pub task_keys: Vec<[u8; 32]>,
    pub way: Way,
}

/// What a node knows of its hub and itself after a join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub hub_id: String,
    pub grpc: String,
    #[serde(default)]
    pub also: Vec<String>,
    pub url: String,
    pub server_name: String,
    pub ca_pin: String,
    pub task_keys: Vec<String>,
    pub node_id: String,
    pub node_name: String,
    pub labels: BTreeMap<String, String>,
    pub workspace_root: String,
    pub max_tasks: u32,
}

/// [`Settings`] with every text parsed, and what the environment overrides.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub hub: HubId,
    pub node: NodeId,
    pub node_name: String,
    pub way: Way,
    pub server_name: String,
    /// That of the invite, until a bundle takes its place.
    pub trust: Trust,
    pub workspace_root: String,
    pub max_tasks: u32,
}

impl Settings {
    /// Parses the stored texts; the proxies come from the environment, and `HUB_GRPC`, `WORKSPACE_ROOT` and `MAX_TASKS` may.
    pub fn resolve(&self, lookup: &dyn Fn(&str) -> Result<Option<String>, BadSetting>) -> Result<Resolved, BadSetting> {
        const PLACE: &str = "the node's state";
        let bad = |key: &str, e: &dyn std::fmt::Display| BadSetting::new(PLACE, key, e);
        let given = lookup("CORTEX_NODE_HUB_GRPC")?;
        // Whoever names one address means that one.
        let (grpc, also) = given.as_deref().map_or((self.grpc.as_str(), self.also.as_slice()), |one| (one, &[]));
        check_address(grpc).map_err(|e| bad("hub.grpc", &e))?;
        let max_tasks = match lookup("CORTEX_NODE_MAX_TASKS")? {
            Some(t) => t.parse().map_err(|e| BadSetting::new("environment", "CORTEX_NODE_MAX_TASKS", format!("{t:?}: {e}")))?,
            None => self.max_tasks,
        };
        check_tasks(max_tasks).map_err(|e| bad("node.max_tasks", &e))?;
        Ok(Resolved {
            hub: self.hub_id.parse().map_err(|e| bad("hub.id", &e))?,
            node: self.node_id.parse().map_err(|e| bad("node.id", &e))?,
            node_name: self.node_name.clone(),
            way: Way::new(grpc, also, Proxies::read(lookup)?),
            server_name: self.server_name.clone(),
            trust: Trust::of_invite(
                parse_pin(&self.ca_pin).map_err(|e| bad("ca_pin", &e))?,
                parse_task_keys(&self.task_keys).map_err(|e| bad("task_keys", &e))?,
            ),
            workspace_root: lookup("CORTEX_NODE_WORKSPACE_ROOT")?.unwrap_or_else(|| self.workspace_root.clone()),
            max_tasks,
        })
    }
}

/// The data folder: command line, else `CORTEX_NODE_DATA_DIR` (clap reads both), else below the home folder.
pub fn data_dir(given: Option<PathBuf>) -> Result<PathBuf, BadSetting> {
    let dir = match given {
        Some(d) => d,
        None => home()?.join(".local/share/cortex-node"),
    };
    std::path::absolute(&dir).map_err(|e| BadSetting::new("command line", "--data-dir", e))
}

pub fn home() -> Result<PathBuf, BadSetting> {
    match env("HOME")? {
        Some(h) => Ok(PathBuf::from(h)),
        None => Err(BadSetting::new("environment", "HOME", "is not set; give --data-dir")),
    }
}

/// The machine's own environment.
pub fn environment(name: &str) -> Result<Option<String>, BadSetting> {
    env(name)
}

/// Reads an invite. `place` names the source in errors; `lookup` gives the variables.
pub fn read_invite(place: &str, text: &str, lookup: &dyn Fn(&str) -> Result<Option<String>, BadSetting>) -> Result<Invite, BadSetting> {
    let mut file = invite_file(place, text, lookup)?;
    if lookup("CORTEX_NODE_HUB_GRPC")?.is_some() && lookup("CORTEX_NODE_HUB_ALSO")?.is_none() {
        // Whoever names one address means that one.
        file.hub.also.clear();
    }
    let bad = |key: &str, e: &dyn std::fmt::Display| BadSetting::new(place, key, e);
    let hub: HubId = file.hub.id.parse().map_err(|e| bad("hub.id", &e))?;
    check_address(&file.hub.grpc).map_err(|e| bad("hub.grpc", &e))?;
    for address in &file.hub.also {
        check_address(address).map_err(|e| bad("hub.also", &e))?;
    }
    if file.hub.server_name != enrol::server_name(hub) {
        return Err(bad("hub.server_name", &format!("{:?} is not {:?}", file.hub.server_name, enrol::server_name(hub))));
    }
    if let Some(n) = &file.node.name {
        name::check(n).map_err(|e| bad("node.name", &e))?;
    }
    if let Some(n) = file.node.max_tasks {
        check_tasks(n).map_err(|e| bad("node.max_tasks", &e))?;
    }
    if file.node.workspace_root.is_empty() {
        return Err(bad("node.workspace_root", &"is empty"));
    }
    let secret = file
        .invite
        .secret
        .as_deref()
        .ok_or_else(|| bad("invite.secret", &"is missing: this invite was used already; make a new one on the hub"))?;
    let seed = URL_SAFE_NO_PAD
        .decode(secret)
        .ok()
        .and_then(|b| <[u8; 32]>::try_from(b).ok())
        .ok_or_else(|| bad("invite.secret", &"is not base64url of 32 bytes; copy the invite again"))?;
    Ok(Invite {
        invite: file.invite.id.parse().map_err(|e| bad("invite.id", &e))?,
        ca_pin: parse_pin(&file.ca_pin).map_err(|e| bad("ca_pin", &e))?,
        task_keys: parse_task_keys(&file.task_keys).map_err(|e| bad("task_keys", &e))?,
        way: Way::new(&file.hub.grpc, &file.hub.also, Proxies::read(lookup)?),
        hub,
        seed,
        file,
    })
}

/// Shape first: each key is there, of its kind, and known, so that every error can name it.
fn invite_file(place: &str, text: &str, lookup: &dyn Fn(&str) -> Result<Option<String>, BadSetting>) -> Result<InviteFile, BadSetting> {
    let parsed: Value = serde_saphyr::from_str(text).map_err(|e| {
        let line = e.location().map_or(0, |l| l.line());
        let reason = e.to_string();
        BadSetting::new(format!("{place}:{line}"), "(yaml)", reason.lines().next().unwrap_or("unreadable"))
    })?;
    let Value::Object(mut doc) = parsed else {
        return Err(BadSetting::new(place, "(yaml)", "an invite is a mapping with the keys hub, ca_pin, task_keys, invite, node"));
    };
    doc.entry("node").or_insert_with(|| Value::Object(Map::new()));
    for (name, value) in &doc {
        let keys: Vec<&Key> = KEYS.iter().filter(|k| k.section == name).collect();
        if keys.is_empty() {
            if !KEYS.iter().any(|k| k.section.is_empty() && k.name == name) {
                return Err(BadSetting::new(place, name.clone(), "unknown key"));
            }
            continue;
        }
        let Value::Object(section) = value else { return Err(BadSetting::new(place, name.clone(), "a mapping is expected")) };
        if let Some(k) = section.keys().find(|k| !keys.iter().any(|known| known.name == *k)) {
            return Err(BadSetting::new(place, format!("{name}.{k}"), "unknown key"));
        }
    }
    for k in &KEYS {
        if let Some(text) = lookup(k.env)? {
            let value = from_env(k, &text)?;
            let holder = if k.section.is_empty() {
                &mut doc
            } else {
                let Value::Object(section) = doc.entry(k.section).or_insert_with(|| Value::Object(Map::new())) else { continue };
                section
            };
            holder.insert(k.name.to_owned(), value);
        }
        match k.holder(&doc).and_then(|h| h.get(k.name)) {
            None | Some(Value::Null) if k.required => return Err(BadSetting::new(place, k.path(), "is missing")),
            None | Some(Value::Null) => {}
            Some(v) => check_kind(k.kind, v).map_err(|e| BadSetting::new(place, k.path(), e))?,
        }
    }
    serde_json::from_value(Value::Object(doc)).map_err(|e| BadSetting::new(place, "(invite)", e))
}

fn from_env(k: &Key, text: &str) -> Result<Value, BadSetting> {
    let bad = |reason: String| BadSetting::new("environment", k.env, reason);
    Ok(match k.kind {
        Kind::Text => Value::from(text),
        Kind::Number => Value::from(text.parse::<u32>().map_err(|e| bad(format!("{text:?}: {e}")))?),
        Kind::TextList => Value::from(text.split(',').map(|s| s.trim().to_owned()).collect::<Vec<_>>()),
        Kind::TextMap => {
            let mut map = Map::new();
            for pair in text.split(',').filter(|p| !p.trim().is_empty()) {
                let (k, v) = pair.split_once('=').ok_or_else(|| bad(format!("{pair:?} is not key=value")))?;
                map.insert(k.trim().to_owned(), Value::from(v.trim()));
            }
            Value::Object(map)
        }
    })
}

fn check_kind(kind: Kind, v: &Value) -> Result<(), &'static str> {
    match (kind, v) {
        (Kind::Text, Value::String(_)) => Ok(()),
        (Kind::Text, _) => Err("a text is expected"),
        (Kind::Number, Value::Number(n)) if n.as_u64().is_some_and(|n| u32::try_from(n).is_ok()) => Ok(()),
        (Kind::Number, _) => Err("a whole number is expected"),
        (Kind::TextList, Value::Array(a)) if a.iter().all(Value::is_string) => Ok(()),
        (Kind::TextList, _) => Err("a list of texts is expected"),
        (Kind::TextMap, Value::Object(m)) if m.values().all(Value::is_string) => Ok(()),
        (Kind::TextMap, _) => Err("a mapping of texts is expected"),
    }
}

fn check_tasks(n: u32) -> Result<(), String> {
    if (1..=MOST_TASKS).contains(&n) { Ok(()) } else { Err(format!("{n} is not between 1 and {MOST_TASKS}")) }
}

/// `host:port`, with brackets around an IPv6 address.
pub fn check_address(text: &str) -> Result<(), String> {
    let bad = || format!("{text:?} is not host:port");
    let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
    let literal = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host_ok = match literal {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && !host.contains(['/', ' ', '@', ':', ',', '[', ']']),
    };
    if host_ok && port.parse::<u16>().is_ok_and(|p| p != 0) { Ok(()) } else { Err(bad()) }
}

pub fn parse_pin(text: &str) -> Result<Digest, String> {
    let bad = || format!("{text:?} is not sha256: and 64 hex digits");
    let hex = text.strip_prefix("sha256:").ok_or_else(bad)?;
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad());
    }
    let mut pin = [0; 32];
    for (i, b) in pin.iter_mut().enumerate() {
        *b = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
    }
    Ok(pin)
}

pub fn parse_task_keys(texts: &[String]) -> Result<Vec<[u8; 32]>, String> {
    if texts.is_empty() {
        return Err("at least one key is needed, else no order could ever be checked".into());
    }
    texts
        .iter()
        .map(|t| {
            let bad = || format!("{t:?} is not ed25519: and base64 of 32 bytes");
            let raw = t.strip_prefix("ed25519:").ok_or_else(bad)?;
            let bytes = STANDARD.decode(raw).or_else(|_| URL_SAFE_NO_PAD.decode(raw)).map_err(|_| bad())?;
            bytes.try_into().map_err(|_| bad())
        })
        .collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Takes the secret out of the file it was read from; comments at the head stay.
pub fn strike_secret(path: &Path, file: &InviteFile) -> std::io::Result<()> {
    let mut file = file.clone();
    file.invite.secret = None;
    let body = serde_saphyr::to_string(&file).map_err(std::io::Error::other)?;
    let text = format!("# cortex-node invite · used; the secret was struck out\n{body}");
    mesh_process::files::write_private(path, text.as_bytes())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const HUB: &str = "hub_01980000-0000-7000-8000-000000000001";

    pub(crate) fn yaml() -> String {
        format!(
            r#"# an invite
hub: {{ id: "{HUB}", grpc: "127.0.0.1:7443", url: "https://h", server_name: "{HUB}.hub.cortex" }}
ca_pin: "sha256:{pin}"
task_keys: ["ed25519:{key}"]
invite: {{ id: "inv_01980000-0000-7000-8000-000000000002", secret: "{secret}" }}
node: {{ name: "my-laptop", labels: {{ os: linux }}, workspace_root: "~/cortex", max_tasks: 4 }}
"#,
            pin = "ab".repeat(32),
            key = STANDARD.encode([7; 32]),
            secret = URL_SAFE_NO_PAD.encode([9; 32]),
        )
    }
    fn none(_: &str) -> Result<Option<String>, BadSetting> {
        Ok(None)
    }
    fn error(from: &str, to: &str) -> String {
        let text = yaml();
        assert!(text.contains(from), "{from}");
        read_invite("a.yaml", &text.replace(from, to), &none).err().expect("must be refused").to_string()
    }

    #[test]
    fn a_good_invite() {
        let i = read_invite("a.yaml", &yaml(), &none).unwrap();
        assert_eq!((i.seed, i.ca_pin, i.task_keys), ([9; 32], [0xab; 32], vec![[7; 32]]));
        assert_eq!(i.file.node.labels["os"], "linux");
        assert_eq!(i.file.node.max_tasks, Some(4));
    }

    #[test]
    fn errors_name_file_key_and_reason() {
        assert_eq!(error("grpc: \"127.0.0.1:7443\", ", ""), "a.yaml: hub.grpc: is missing");
        assert_eq!(error("grpc:", "grcp:"), "a.yaml: hub.grcp: unknown key");
        assert_eq!(error("127.0.0.1:7443", "127.0.0.1"), "a.yaml: hub.grpc: \"127.0.0.1\" is not host:port");
        assert_eq!(error("max_tasks: 4", "max_tasks: many"), "a.yaml: node.max_tasks: a whole number is expected");
        assert_eq!(error("max_tasks: 4", "max_tasks: 0"), "a.yaml: node.max_tasks: 0 is not between 1 and 4096");
        assert_eq!(error("ca_pin:", "ca_pins:"), "a.yaml: ca_pins: unknown key");
        assert!(error("sha256:ab", "sha256:zz").starts_with("a.yaml: ca_pin: "));
        assert!(error("ed25519:", "rsa:").starts_with("a.yaml: task_keys: "));
        assert!(error("my-laptop", " x").starts_with("a.yaml: node.name: "));
        assert!(error(".hub.cortex", ".example.org").starts_with("a.yaml: hub.server_name: "));
        assert!(error("secret: \"", "secret: \"AA").starts_with("a.yaml: invite.secret: "));
        assert!(error("id: \"inv_", "id: \"node_").starts_with("a.yaml: invite.id: "));
        assert!(error("hub: {", "hub: [").starts_with("a.yaml:"));
        assert_eq!(read_invite("-", "just text", &none).err().unwrap().key, "(yaml)");
    }

    #[test]
    fn the_environment_overrides_every_key() {
        let lookup = |n: &str| {
            Ok(match n {
                "CORTEX_NODE_HUB_GRPC" => Some("[::1]:9000".to_owned()),
                "CORTEX_NODE_NAME" => Some("other".to_owned()),
                "CORTEX_NODE_LABELS" => Some("a=b, c=d".to_owned()),
                "CORTEX_NODE_MAX_TASKS" => Some("9".to_owned()),
                _ => None,
            })
        };
        let i = read_invite("a.yaml", &yaml(), &lookup).unwrap();
        assert_eq!((i.file.hub.grpc.as_str(), i.way.to_string().as_str()), ("[::1]:9000", "[::1]:9000"));
        assert_eq!(i.file.node.name.as_deref(), Some("other"));
        assert_eq!(i.file.node.labels["c"], "d");
        assert_eq!(i.file.node.max_tasks, Some(9));
        let bad = |n: &str| Ok((n == "CORTEX_NODE_MAX_TASKS").then(|| "x".to_owned()));
        let e = read_invite("a.yaml", &yaml(), &bad).err().unwrap();
        assert_eq!((e.place.as_str(), e.key.as_str()), ("environment", "CORTEX_NODE_MAX_TASKS"));
    }

    #[test]
    fn a_hub_may_have_several_addresses() {
        let with = |also: &str| yaml().replace("url: ", &format!("also: {also}, url: "));
        let i = read_invite("a.yaml", &with("[\"hub.lan:7443\", \"[fd00::1]:7443\"]"), &none).unwrap();
        assert_eq!(i.way.to_string(), "127.0.0.1:7443,hub.lan:7443,[fd00::1]:7443");
        let one = |n: &str| Ok((n == "CORTEX_NODE_HUB_GRPC").then(|| "hub:1".to_owned()));
        assert_eq!(read_invite("a.yaml", &with("[\"hub.lan:7443\"]"), &one).unwrap().way.to_string(), "hub:1");
        for bad in ["fd00::1", "[hub]:1", "[fd00::1]", "a:1,b:2", "[fd00::1]:0"] {
            let e = read_invite("a.yaml", &with(&format!("[\"{bad}\"]")), &none).err().unwrap();
            assert_eq!((e.key.as_str(), e.reason), ("hub.also", format!("{bad:?} is not host:port")));
        }
        let proxy = |n: &str| Ok((n == "HTTPS_PROXY").then(|| "socks5://x".to_owned()));
        assert_eq!(read_invite("a.yaml", &yaml(), &proxy).err().unwrap().key, "HTTPS_PROXY");
    }

    #[test]
    fn the_secret_is_struck() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("a.yaml");
        let i = read_invite("a.yaml", &yaml(), &none).unwrap();
        strike_secret(&p, &i.file).unwrap();
        let text = std::fs::read_to_string(&p).unwrap();
        assert!(!text.contains(&URL_SAFE_NO_PAD.encode([9; 32])) && !text.contains("secret:"), "{text}");
        let e = read_invite("a.yaml", &text, &none).err().unwrap();
        assert_eq!(e.key, "invite.secret");
        assert!(e.reason.contains("used already"));
    }
}
