//! The way back. Walked for a crash at any point: the data folder is untouched until the restored one
//! lies whole and synced beside it; then a marker keeps any hub from starting until all is in place, and
//! the same command begins again. Nothing is deleted: what was there lies aside.

use super::archive::{self, Archive, Manifest};
use super::{ON_POSTGRES, contents, opened_keys, vault};
use crate::config::Config;
use crate::control;
use crate::keys;
use anyhow::{Context, Result, bail, ensure};
use hub_engine::ports::Meta;
use hub_store::{Database, Store, backup as copies};
use mesh_core::{HubId, UnixMs};
use mesh_process::{Tasks, files};
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::RestoredView;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// In the data folder while a restore moves things: the id of the hub whose they are.
const RESTORING: &str = "restoring";
/// Where the restored folder is made.
const STAGING: &str = ".restoring";
/// What was there before, with the time.
const ASIDE: &str = "before-restore-";
/// What the restore may have undone, for `--go`.
const REPORT: &str = "restored.txt";
const LOCK: &str = "hub.lock";
const DATABASE_FILES: [&str; 3] = ["hub.db", "hub.db-wal", "hub.db-shm"];

/// Incarnations after a restore count seconds from here (2023-11-14), so that the same backup restored
/// twice does not begin the same numbers twice, whatever is left of the first time.
const INCARNATION_EPOCH_SECS: i64 = 1_700_000_000;
/// For the store to finish its writes.
const GRACE: Duration = Duration::from_secs(20);
/// How long a running hub may take to go on.
const GO_WITHIN: Duration = Duration::from_secs(60);

/// Reads a backup to its end and says what is in it. Touches nothing.
pub fn check(config: &Config, file: &Path, passphrase_file: Option<&Path>) -> Result<Vec<String>> {
    let mut archive = Archive::open(file)?;
    let mut lines = contents(&archive.manifest);
    let mut own = None;
    if let Some(path) = passphrase_file {
        own = Some(opened_keys(&mut archive, &vault::passphrase(Some(path), false)?)?);
        lines.push("the passphrase opens the keys".into());
    } else if let Ok(found) = keys::files(&config.data_dir)
        && keys::hub_of(&found).is_some_and(|hub| hub.to_string() == archive.manifest.hub_id)
    {
        own = Some(found);
    }
    match own.as_ref().and_then(keys::backup_key) {
        Some(key) if archive.is_sealed_by(&key) => lines.push("the seal is this hub's".into()),
        Some(_) => bail!("{} is not sealed by this hub: somebody else wrote it, or its keys are other ones", file.display()),
        None => lines.push("the seal was not checked: that takes the hub's keys (--data-dir, or --passphrase-file for those in it)".into()),
    }
    lines.push("whole: every byte is as it was written".into());
    Ok(lines)
}

/// Puts a backup in the place of the data folder's content and marks it as restored.
pub async fn restore(config: &Config, file: &Path, passphrase_file: Option<&Path>, now: UnixMs) -> Result<Vec<String>> {
    ensure!(matches!(config.database, Database::Sqlite), ON_POSTGRES);
    let dir = &config.data_dir;
    files::private_dir(dir).with_context(|| dir.display().to_string())?;
    let lock = files::Lock::try_take(&dir.join(LOCK)).with_context(|| dir.display().to_string())?;
    let _lock = lock.with_context(|| format!("a hub runs on {}; stop it first", dir.display()))?;
    let mut archive = Archive::open(file)?;
    let hub: HubId = archive.manifest.hub_id.parse().context("the backup's hub id")?;
    let from_file = match archive.manifest.has_keys() {
        true => Some(opened_keys(&mut archive, &vault::passphrase(passphrase_file, false)?)?),
        false => None,
    };
    let in_use = match &from_file {
        Some(found) => found.clone(),
        None => keys::files(dir).unwrap_or_default(),
    };
    let missing = keys::missing(&in_use);
    ensure!(
        missing.is_empty(),
        "the keys are not in the backup, and {} lacks {}; put the hub's keys folder there first",
        dir.join("keys").display(),
        missing.join(", ")
    );
    ensure!(keys::hub_of(&in_use) == Some(hub), "the keys in {} are not those of {hub}", dir.join("keys").display());
    let seal_key = keys::backup_key(&in_use).context("the keys cannot be read")?;
    ensure!(archive.is_sealed_by(&seal_key), "{} is not sealed by this hub: somebody else wrote it", file.display());
    let before = content(dir)?;
    owned(dir, &before, hub)?;

    let staging = dir.join(STAGING);
    let report = stage(&mut archive, &staging, dir, from_file.as_ref(), now).await;
    let report = report.inspect_err(|_| drop(std::fs::remove_dir_all(&staging)))?;

    // From here on a hub does not start until all is in place.
    files::write_private(&dir.join(RESTORING), hub.to_string().as_bytes())?;
    let aside = dir.join(format!("{ASIDE}{}", rfc3339(now).replace(':', "")));
    let kept = |name: &str| from_file.is_none() && ["keys", crate::serve::MADE_PASSWORD].contains(&name);
    let moving: Vec<&String> = before.iter().filter(|name| !kept(name)).collect();
    if !moving.is_empty() {
        DirBuilder::new().mode(0o700).create(&aside).with_context(|| aside.display().to_string())?;
        for name in &moving {
            std::fs::rename(dir.join(name), aside.join(name)).with_context(|| format!("moving {name} aside"))?;
        }
        sync_dir(&aside)?;
    }
    sync_dir(dir)?;
    for entry in std::fs::read_dir(&staging)? {
        let name = entry?.file_name();
        std::fs::rename(staging.join(&name), dir.join(&name)).with_context(|| format!("putting {} in place", name.display()))?;
    }
    sync_dir(dir)?;
    std::fs::remove_dir(&staging)?;
    std::fs::remove_file(dir.join(RESTORING))?;
    sync_dir(dir)?;

    let mut lines = vec![format!("restored {} into {}", file.display(), dir.display())];
    if !moving.is_empty() {
        lines.push(format!("what was there lies in {}", aside.display()));
    }
    lines.extend(report);
    lines.push("start the hub: it accepts its machines and holds back. Look, then run: cortex-hub restore --go".into());
    Ok(lines)
}

/// Marks a database that was put back by other means, such as PostgreSQL's own.
pub async fn mark(config: &Config, now: UnixMs) -> Result<Vec<String>> {
    let dir = &config.data_dir;
    let lock = files::Lock::try_take(&dir.join(LOCK)).with_context(|| dir.display().to_string())?;
    let _lock = lock.with_context(|| format!("a hub runs on {}; stop it first", dir.display()))?;
    let tasks = Tasks::new();
    let marked = {
        let store = Store::open(dir, &config.database, &tasks).await.context("opening the store")?;
        // When its backup was made is known to whoever put it back.
        let marked = store.mark_restored(now, now, by_time(now)).await;
        tasks.end(GRACE).await;
        marked?
    };
    let _ = std::fs::remove_file(dir.join(REPORT));
    Ok(vec![
        format!("the database of {} is marked as restored, with incarnation {}", marked.id, marked.incarnation),
        "start the hub: it accepts its machines and holds back. Look, then run: cortex-hub restore --go".into(),
    ])
}

fn by_time(now: UnixMs) -> u32 {
    u32::try_from(now / 1000 - INCARNATION_EPOCH_SECS).unwrap_or(1)
}

/// What lies in the data folder, apart from what restores make.
fn content(dir: &Path) -> Result<Vec<String>> {
    let mut names = vec![];
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if ![LOCK, RESTORING, STAGING].contains(&&*name) && !name.starts_with(ASIDE) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Nobody else's things are moved.
fn owned(dir: &Path, content: &[String], hub: HubId) -> Result<()> {
    if content.is_empty() {
        return Ok(());
    }
    let marker = std::fs::read_to_string(dir.join(RESTORING)).ok().and_then(|text| text.trim().parse().ok());
    let by_keys = || keys::files(dir).ok().and_then(|found| keys::hub_of(&found));
    let by_database = || {
        let path = dir.join(copies::FILE);
        path.is_file().then(|| copies::about(&path).ok()).flatten().map(|about| about.hub)
    };
    match marker.or_else(by_keys).or_else(by_database) {
        Some(own) if own == hub => Ok(()),
        Some(other) => bail!("{} holds hub {other}, and the backup is of {hub}; choose another --data-dir", dir.display()),
        None => bail!("{} is not empty, and what is in it is not known to be this hub's; choose another --data-dir", dir.display()),
    }
}

/// Makes the restored folder, whole and synced, beside the one that is there. Gives what it may undo.
async fn stage(archive: &mut Archive, staging: &Path, dir: &Path, keys: Option<&vault::Files>, now: UnixMs) -> Result<Vec<String>> {
    match std::fs::remove_dir_all(staging) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).context(staging.display().to_string()),
        _ => files::private_dir(staging)?,
    }
    archive.members(|name, _, from| {
        if name == archive::DATABASE || name.starts_with(archive::OUTPUT) {
            let to = staging.join(name);
            files::private_dir(to.parent().unwrap_or(staging))?;
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to)?;
            io::copy(from, &mut file)?;
            file.sync_all()?;
        }
        Ok(())
    })?;
    if let Some(found) = keys {
        keys::write(staging, found)?;
    }
    let m = archive.manifest.clone();
    let database = staging.join(copies::FILE);
    let gone: Vec<String> = m.erased.iter().chain(&m.missing).cloned().collect();
    copies::forget_output(&database, &gone)?;
    // The old one's number too, if it can be read: a clock may be wrong.
    let old = dir.join(copies::FILE);
    let old = old.is_file().then_some(old);
    let known = old.as_ref().and_then(|old| copies::about(old).ok()).map_or(0, |about| about.incarnation);
    let tasks = Tasks::new();
    {
        let store = Store::open(staging, &Database::Sqlite, &tasks).await.context("the database in the backup")?;
        store.mark_restored(now, m.created_at_ms, by_time(now).max(known.saturating_add(1))).await?;
        tasks.end(GRACE).await;
    }
    let lines = report(&m, &database, old.as_deref(), now);
    files::write_private(&staging.join(REPORT), (lines.join("\n") + "\n").as_bytes())?;
    sync_tree(staging)?;
    Ok(lines)
}

/// What the restore may have undone. What cannot be known is said to be unknown.
fn report(m: &Manifest, restored: &Path, old: Option<&Path>, now: UnixMs) -> Vec<String> {
    let (made, now) = (rfc3339(m.created_at_ms), rfc3339(now));
    let mut lines = vec![format!("the backup is of {made}, restored at {now}: what happened between is undone")];
    let compared = old.map(|old| copies::undone(restored, old));
    match compared {
        Some(Ok(undone)) => {
            lines.push("compared with the database that was here:".into());
            if undone.0.is_empty() {
                lines.push("  it knows of nothing that was undone".into());
            }
            for (what, things) in undone.0 {
                lines.push(format!("  {}: {what}", things.len()));
                lines.extend(things.into_iter().map(|thing| format!("    {thing}")));
            }
        }
        other => {
            if let Some(Err(error)) = other {
                lines.push(format!("the database that was here cannot be compared ({error})"));
            }
            lines.push(
                "no other database tells what it was. Think of: revoked and removed machines (they count as good again), machines that \
                 joined, used and revoked invites, removed API keys, users, passwords and roles that were changed, ended log-ins, \
                 closed and erased sessions, tasks that were accepted and results"
                    .into(),
            );
        }
    }
    lines.push("never known: requests that come again with an Idempotency-Key used since then make their thing a second time".into());
    lines.push(
        "at --go: tasks that waited in the backup end as lost (maybe_ran), since they may have run; what was given to a machine goes on \
         if that machine still has it, and else ends as lost; what only machines know ends there"
            .into(),
    );
    lines
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).with_context(|| path.display().to_string())
}

fn sync_tree(path: &Path) -> Result<()> {
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else if DATABASE_FILES.iter().any(|name| entry.file_name() == *name) {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(path)
}

/// Says what the restore may have undone and lets the hub go on, now or when it starts. `say` prints.
pub async fn go(config: &Config, mut say: impl FnMut(&str)) -> Result<()> {
    let dir = &config.data_dir;
    let mark = copies::mark(dir, &config.database).await?;
    let Some(mark) = mark else { bail!("the hub in {} does not hold back after a restore", dir.display()) };
    match std::fs::read_to_string(dir.join(REPORT)) {
        Ok(text) => say(text.trim_end()),
        Err(_) => say(&format!("the backup is of {}, restored at {}", rfc3339(mark.backup_at), rfc3339(mark.at))),
    }
    let running = control::ask(dir, "GET", "/system/restored", None).await;
    let running = running.and_then(|body| Ok(serde_json::from_slice::<RestoredView>(&body)?));
    match &running {
        Ok(view) => live(view, &mut say),
        Err(_) => say("the hub does not run, so nobody can say which machines hold what; it goes on when it starts"),
    }
    copies::ask_go(dir, &config.database).await?;
    if running.is_err() {
        return Ok(());
    }
    let gone_on = async {
        while copies::mark(dir, &config.database).await?.is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(GO_WITHIN, gone_on).await.context("the hub was told, and has not gone on yet; look into its log")??;
    say("the hub goes on");
    Ok(())
}

fn live(view: &RestoredView, say: &mut impl FnMut(&str)) {
    say(&format!("machines that are here: {}", view.nodes.len()));
    for node in &view.nodes {
        let (known, strange): (Vec<_>, Vec<_>) = node.attempts.iter().partition(|a| a.known);
        say(&format!("  {} {}: {} attempts that the backup knows, {} that it does not", node.name, node.id, known.len(), strange.len()));
        for a in strange {
            say(&format!("    {} attempt {}: it is ended there", a.task_id, a.attempt));
        }
    }
}

/// A restore that did not finish must not be started from.
pub fn unfinished(data_dir: &Path) -> Option<PathBuf> {
    Some(data_dir.join(RESTORING)).filter(|marker| marker.exists())
}
