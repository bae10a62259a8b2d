//! `cortex-hub backup` and `restore`: one file with all that a hub keeps, and the way back.

mod archive;
mod restore;
mod vault;

pub use restore::{check, go, mark, restore, unfinished};

use crate::config::Config;
use crate::keys;
use anyhow::{Context, Result, bail, ensure};
use archive::{Manifest, Writer};
use hub_store::{Database, backup as copies};
use mesh_core::UnixMs;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use vault::Files;

/// What PostgreSQL's own tools do better.
const ON_POSTGRES: &str = "the database is PostgreSQL, which its own tools back up and restore: first pg_dump, then a copy of the \
     folders keys and output of the data folder; docs/how-to/back-up-and-restore.md says how, and what to run after a restore";

pub struct Plan {
    pub to: PathBuf,
    /// With the keys, under a passphrase from here or from the terminal.
    pub with_keys: bool,
    pub passphrase_file: Option<PathBuf>,
}

/// Writes a backup beside the hub, whether that runs or not. Blocks. Gives lines for people.
pub fn backup(config: &Config, plan: &Plan, now: UnixMs) -> Result<Vec<String>> {
    ensure!(matches!(config.database, Database::Sqlite), ON_POSTGRES);
    ensure!(plan.with_keys || plan.passphrase_file.is_none(), "a passphrase is for keys: add --with-keys");
    let dir = &config.data_dir;
    let found = keys::files(dir).with_context(|| format!("the keys in {}", dir.display()))?;
    let missing = keys::missing(&found);
    ensure!(missing.is_empty(), "there is no hub in {}: its keys folder lacks {}", dir.display(), missing.join(", "));
    let seal_key = keys::backup_key(&found).context("the keys cannot be read")?;
    let passphrase = match plan.with_keys {
        true => Some(vault::passphrase(plan.passphrase_file.as_deref(), true)?),
        false => None,
    };
    let mut writer = Writer::begin(&plan.to, Manifest::new(String::new(), now, 0, 0))?;
    let copy = Scratch::new(archive::beside(&plan.to, "database")?)?;
    copies::copy(dir, &copy.0)?;
    let about = copies::about(&copy.0)?;
    let hub = about.hub.to_string();
    ensure!(
        keys::hub_of(&found).is_some_and(|own| own == about.hub),
        "the database in {} and the keys beside it are of two hubs",
        dir.display()
    );
    *writer.manifest() = Manifest::new(hub.clone(), now, about.incarnation, about.schema);
    let bytes = std::fs::metadata(&copy.0)?.len();
    writer.add(archive::DATABASE, bytes, File::open(&copy.0)?)?;
    if let Some(passphrase) = passphrase {
        let sealed = vault::seal(&found, &passphrase, &hub)?;
        writer.add(archive::KEYS, sealed.len() as u64, &sealed[..])?;
    }
    add_output(&mut writer, dir, &copy.0)?;
    drop(copy);
    let manifest = writer.finish(&seal_key)?;
    let mut lines = vec![format!("wrote {}", plan.to.display())];
    lines.extend(contents(&manifest));
    if !manifest.has_keys() {
        lines.push(format!(
            "the keys are not in it: a restore needs those in {} (or a backup made --with-keys)",
            dir.join("keys").display()
        ));
    }
    Ok(lines)
}

/// Adds what the copied rows count on. What was erased meanwhile is said, as is what is not there.
fn add_output(writer: &mut Writer, dir: &Path, copy: &Path) -> Result<()> {
    for s in copies::segments(copy)? {
        let path = dir.join(copies::OUTPUT).join(&s.name);
        let file = match File::open(&path) {
            Ok(file) if file.metadata()?.len() >= s.bytes => Some(file),
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).with_context(|| path.display().to_string()),
            _ => None,
        };
        match file {
            // What counts of it never changes, and an open file stays whole when it is erased.
            Some(file) => writer.add(&format!("{}{}", archive::OUTPUT, s.name), s.bytes, file)?,
            None if copies::still_counts(dir, &s)? => writer.manifest().missing.push(s.name),
            None => writer.manifest().erased.push(s.name),
        }
    }
    Ok(())
}

/// A file that is gone when this is.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: PathBuf) -> Result<Self> {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| path.display().to_string()),
            // Left by one that was killed; who has the lock on the backup is alone here.
            _ => Ok(Self(path)),
        }
    }
}
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        let journal = format!("{}-journal", self.0.display());
        let _ = std::fs::remove_file(journal);
    }
}

/// What is in a backup, for people.
fn contents(m: &Manifest) -> Vec<String> {
    let output = m.members.keys().filter(|name| name.starts_with(archive::OUTPUT)).count();
    let mut lines = vec![
        format!("hub       {}", m.hub_id),
        format!("made      {} by version {}", mesh_wire::convert::rfc3339(m.created_at_ms), m.version),
        format!("database  schema {}, incarnation {}", m.schema, m.incarnation),
        format!("output    {output} files"),
        format!("keys      {}", if m.has_keys() { "yes, under a passphrase" } else { "no" }),
        format!("size      {} bytes", m.bytes()),
    ];
    if !m.erased.is_empty() {
        lines.push(format!("output of {} attempts was erased while the backup was made, and is not in it", m.erased.len()));
    }
    if !m.missing.is_empty() {
        lines.push(format!("output files that the database counts on were not there: {}", m.missing.join(", ")));
    }
    lines
}

/// The keys in a backup, opened.
fn opened_keys(archive: &mut archive::Archive, passphrase: &str) -> Result<Files> {
    let mut sealed = None;
    archive.members(|name, _, from| {
        if name == archive::KEYS {
            let mut all = vec![];
            from.read_to_end(&mut all)?;
            sealed = Some(all);
        }
        Ok(())
    })?;
    let Some(sealed) = sealed else { bail!("there are no keys in this backup") };
    vault::open(&sealed, passphrase, &archive.manifest.hub_id)
}
