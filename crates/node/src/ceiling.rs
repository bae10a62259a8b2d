//! What this machine's owner has said: `ceiling.yaml` and `disabled` in the data folder, read anew whenever
//! they have changed. What cannot be read or is not understood counts as *no*, never as *no bound*.

use crate::state::DataDir;
use mesh_core::UserId;
use mesh_core::ceiling::{Ceiling, Closed, Executable, Rule};
use mesh_core::policy::FIXED_PATH;
use mesh_process::config::BadSetting;
use mesh_process::files;
use rustix::fs::OFlags;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A longer file is not meant as a ceiling.
pub const MAX_BYTES: u64 = 64 << 10;

/// What a join writes, and what holds where there is no file.
pub const DEFAULT: &str = "\
# What no hub can exceed on this machine. A change counts from the next task on.
mode: permissive
# Tasks have the full network: the proxy that bounds it is not built yet.
network: full
scripts: true
# Bounds that you may add:
# max_tasks: 2
# users: [user_01980000-0000-7000-8000-000000000001]
# limits: { timeout_secs: 3600 }
# allow: [{ program: make }, { program: git, args_prefix: [status] }]
# deny: [{ program: rm, args_prefix: [-rf], match: [[rm, -rf, /]], not_match: [[rm, file]] }]
";

/// Of the policy, and not enforced by this version: a file that has one is refused as a whole.
const NOT_YET: [(&str, &str); 6] = [
    ("ask", "approvals"),
    ("hosts", "the egress proxy"),
    ("read", "the sandbox"),
    ("write", "the sandbox"),
    ("devices", "the sandbox"),
    ("env", "a bound on the environment"),
];
const LIMITS_NOT_YET: [&str; 4] = ["memory_bytes", "cpu_percent", "pids", "output_bytes"];

fn not_yet(what: &str) -> String {
    format!("not yet: {what} is not built in this version, so that it would bound nothing; take it out")
}

struct Reader<'a> {
    place: &'a str,
}

impl Reader<'_> {
    fn bad<T>(&self, key: &str, reason: impl ToString) -> Result<T, BadSetting> {
        Err(BadSetting::new(self.place, key, reason))
    }
    fn text(&self, key: &str, v: &Value) -> Result<String, BadSetting> {
        v.as_str().map_or_else(|| self.bad(key, "a text is expected"), |s| Ok(s.to_owned()))
    }
    fn list<'v>(&self, key: &str, v: &'v Value) -> Result<&'v Vec<Value>, BadSetting> {
        v.as_array().map_or_else(|| self.bad(key, "a list is expected"), Ok)
    }
    fn map<'v>(&self, key: &str, v: &'v Value) -> Result<&'v Map<String, Value>, BadSetting> {
        v.as_object().map_or_else(|| self.bad(key, "a mapping is expected"), Ok)
    }
    fn number(&self, key: &str, v: &Value) -> Result<u64, BadSetting> {
        v.as_u64().map_or_else(|| self.bad(key, "a whole number is expected"), Ok)
    }
    fn texts(&self, key: &str, v: &Value) -> Result<Vec<String>, BadSetting> {
        self.list(key, v)?.iter().map(|v| self.text(key, v)).collect()
    }
    fn only(&self, key: &str, v: &Value, built: &str, others: &[&str]) -> Result<(), BadSetting> {
        match self.text(key, v)?.as_str() {
            t if t == built => Ok(()),
            t if others.contains(&t) => self.bad(key, not_yet(t)),
            t => self.bad(key, format!("{t:?} is none of {built}, {}", others.join(", "))),
        }
    }
    fn user(&self, v: &Value) -> Result<UserId, BadSetting> {
        let text = self.text("users", v)?;
        text.parse().or_else(|_| self.bad("users", format!("{text:?} is not a user's id (user_…), as `cortex whoami` shows it")))
    }
    fn rules(&self, key: &str, v: &Value) -> Result<Vec<Rule>, BadSetting> {
        self.list(key, v)?.iter().enumerate().map(|(i, v)| self.rule(&format!("{key}[{i}]"), v)).collect()
    }
    fn rule(&self, at: &str, v: &Value) -> Result<Rule, BadSetting> {
        let (mut program, mut rule) = (None, Rule { program: String::new(), args_prefix: vec![], matches: vec![], not_matches: vec![] });
        for (name, v) in self.map(at, v)? {
            let key = format!("{at}.{name}");
            let argvs = || self.list(&key, v)?.iter().map(|v| self.texts(&key, v)).collect::<Result<Vec<_>, _>>();
            match name.as_str() {
                "program" => program = Some(self.text(&key, v)?),
                "args_prefix" => rule.args_prefix = self.texts(&key, v)?,
                "match" => rule.matches = argvs()?,
                "not_match" => rule.not_matches = argvs()?,
                _ => return self.bad(&key, "unknown key"),
            }
        }
        rule.program = program.map_or_else(|| self.bad(&format!("{at}.program"), "is missing"), Ok)?;
        Ok(rule)
    }
    fn ceiling(&self, doc: &Map<String, Value>) -> Result<Ceiling, BadSetting> {
        let mut c = Ceiling::OPEN;
        for (key, v) in doc {
            match key.as_str() {
                "mode" => self.only(key, v, "permissive", &["strict"])?,
                "network" => self.only(key, v, "full", &["proxy", "none"])?,
                "scripts" => c.scripts = v.as_bool().map_or_else(|| self.bad(key, "true or false is expected"), Ok)?,
                "max_tasks" => {
                    let n = self.number(key, v)?;
                    c.max_tasks = Some(u32::try_from(n).unwrap_or(u32::MAX));
                }
                "users" => c.users = Some(self.list(key, v)?.iter().map(|v| self.user(v)).collect::<Result<_, _>>()?),
                "allow" => c.allow = Some(self.rules(key, v)?),
                "deny" => c.deny = self.rules(key, v)?,
                "limits" => {
                    for (name, v) in self.map(key, v)? {
                        let key = format!("limits.{name}");
                        match name.as_str() {
                            "timeout_secs" => c.timeout_secs = Some(self.number(&key, v)?),
                            n if LIMITS_NOT_YET.contains(&n) => return self.bad(&key, not_yet(n)),
                            _ => return self.bad(&key, "unknown key"),
                        }
                    }
                }
                name => match NOT_YET.iter().find(|(k, _)| *k == name) {
                    Some((_, what)) => return self.bad(key, not_yet(what)),
                    None => return self.bad(key, "unknown key"),
                },
            }
        }
        Ok(c)
    }
}

/// Reads a ceiling and checks all of it; `place` names the source in errors.
pub fn parse(place: &str, text: &str) -> Result<Ceiling, BadSetting> {
    let parsed: Value = serde_saphyr::from_str(text).map_err(|e| {
        let line = e.location().map_or(0, |l| l.line());
        let reason = e.to_string();
        BadSetting::new(format!("{place}:{line}"), "(yaml)", reason.lines().next().unwrap_or("unreadable"))
    })?;
    let Value::Object(doc) = parsed else {
        return Err(BadSetting::new(place, "(yaml)", "a ceiling is a mapping with keys such as mode, allow, deny, users, max_tasks"));
    };
    let ceiling = Reader { place }.ceiling(&doc)?;
    ceiling.check(&|name| find(None, name)).map_err(|e| BadSetting::new(place, e.key, e.problem))?;
    Ok(ceiling)
}

/// Where a name leads on this machine, from `folder` when it is relative.
pub fn find(folder: Option<&Path>, name: &str) -> Option<Executable> {
    if name.starts_with('/') {
        executable(Path::new(name), false)
    } else if name.contains('/') {
        executable(&folder?.join(name), false)
    } else if name.is_empty() {
        None
    } else {
        // As execvp(3) searches: what may not be executed is passed over.
        FIXED_PATH.split(':').find_map(|dir| executable(&Path::new(dir).join(name), true))
    }
}

fn executable(path: &Path, by_search: bool) -> Option<Executable> {
    let meta = std::fs::metadata(path).ok().filter(|m| m.is_file() && (!by_search || m.mode() & 0o111 != 0))?;
    let called = path.parent()?.canonicalize().ok()?.join(path.file_name()?);
    Some(Executable { path: called.into_os_string().into_string().ok()?, file: (meta.dev(), meta.ino()) })
}

/// Tells one content of a path from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stamp {
    Absent,
    There { file: (u64, u64), size: u64, modified: (i64, i64), changed: (i64, i64) },
    Unknown,
}

fn stamp(path: &Path) -> Stamp {
    match std::fs::metadata(path) {
        Ok(m) => Stamp::There {
            file: (m.dev(), m.ino()),
            size: m.size(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        },
        // A link that leads nowhere is no missing file.
        Err(e) if e.kind() == ErrorKind::NotFound && !path.is_symlink() => Stamp::Absent,
        Err(_) => Stamp::Unknown,
    }
}

/// The text of the file; none when there is no file.
fn read(path: &Path) -> io::Result<Option<String>> {
    if stamp(path) == Stamp::Absent {
        return Ok(None);
    }
    // Not waited for: whoever puts a pipe there does not stop the daemon.
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    let file = File::from(file);
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() > MAX_BYTES {
        return Err(io::Error::other(format!("a file of at most {MAX_BYTES} bytes is expected")));
    }
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// Reads what the owner allows; the text is none where there is no file.
pub fn load(dir: &DataDir) -> Result<(Option<String>, Ceiling), BadSetting> {
    let path = dir.ceiling();
    let place = path.display().to_string();
    let text = read(&path).map_err(|e| BadSetting::new(&place, "(file)", e))?;
    let ceiling = parse(&place, text.as_deref().unwrap_or(DEFAULT))?;
    Ok((text, ceiling))
}

/// Puts a checked text in place of the file, whole or not at all.
pub fn store(dir: &DataDir, text: &str) -> io::Result<()> {
    files::write_private(&dir.ceiling(), text.as_bytes())
}

/// Makes the file of a new node, if its owner has not made one. True when it did.
pub fn make(dir: &DataDir) -> io::Result<bool> {
    let absent = stamp(&dir.ceiling()) == Stamp::Absent;
    if absent {
        store(dir, DEFAULT)?;
    }
    Ok(absent)
}

/// Has the owner disabled this node? Whatever is there and cannot be looked at says yes.
pub fn is_disabled(dir: &DataDir) -> bool {
    stamp(&dir.disabled()) != Stamp::Absent
}

/// Takes no more work from now on, also after a restart. False when it was so before.
pub fn disable(dir: &DataDir, at: &str) -> io::Result<bool> {
    let fresh = !is_disabled(dir);
    if fresh {
        files::write_private(&dir.disabled(), format!("{at}\n").as_bytes())?;
    }
    Ok(fresh)
}

/// Takes work again. False when it did before.
pub fn enable(dir: &DataDir) -> io::Result<bool> {
    match std::fs::remove_file(dir.disabled()) {
        Ok(()) => File::open(dir.path())?.sync_all().map(|()| true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// The daemon's eye on both files.
pub struct Owner {
    dir: DataDir,
    seen: (Stamp, Stamp),
    ceiling: Result<Ceiling, BadSetting>,
}

impl Owner {
    pub fn new(dir: DataDir) -> Self {
        let seen = (stamp(&dir.ceiling()), stamp(&dir.disabled()));
        Self { ceiling: load(&dir).map(|(_, c)| c), dir, seen }
    }
    /// Looks again; true when there is something new.
    pub fn look(&mut self) -> bool {
        // Stamped before it is read: what changes meanwhile is seen at the next look.
        let now = (stamp(&self.dir.ceiling()), stamp(&self.dir.disabled()));
        if now == self.seen && now.0 != Stamp::Unknown {
            return false;
        }
        let before = (self.closed(), std::mem::replace(&mut self.ceiling, load(&self.dir).map(|(_, c)| c)));
        self.seen = now;
        before != (self.closed(), self.ceiling.clone())
    }
    pub fn closed(&self) -> Option<Closed> {
        match &self.ceiling {
            _ if self.seen.1 != Stamp::Absent => Some(Closed::Disabled),
            Err(_) => Some(Closed::CeilingUnreadable),
            Ok(_) => None,
        }
    }
    /// Why the file does not count.
    pub fn problem(&self) -> Option<&BadSetting> {
        self.ceiling.as_ref().err()
    }
    /// None while it cannot be read.
    pub fn ceiling(&self) -> Option<&Ceiling> {
        self.ceiling.as_ref().ok()
    }
    /// Tasks at once, of which the machine's settings allow `own`.
    pub fn places(&self, own: u32) -> u32 {
        self.ceiling().and_then(|c| c.max_tasks).map_or(own, |most| own.min(most))
    }
}

#[cfg(test)]
mod tests;
