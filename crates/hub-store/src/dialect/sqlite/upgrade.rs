//! Bringing the schema up to date, with a copy of what was there before.

use super::common;
use crate::store::{Failed, OpenError, migrated};
use rusqlite::Connection;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection as _};
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// Copies are named like the database, with this and the number of their schema.
const COPY: &str = ".schema-";

pub(super) async fn upgrade(path: &Path) -> Result<(), OpenError> {
    let database = path.display().to_string();
    let failed = |why: Failed| OpenError::Database { database: database.clone(), why };
    let from = path.to_owned();
    let copied = tokio::task::spawn_blocking(move || copy_before(&from)).await.map_err(|e| failed(e.into()))?;
    let copy = copied.map_err(|why| OpenError::Copy { database: database.clone(), why })?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .foreign_keys(true)
        .busy_timeout(super::BUSY_TIMEOUT)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .disable_statement_logging();
    let mut conn = options.connect().await.map_err(|e| failed(e.into()))?;
    let outcome = MIGRATIONS.run(&mut conn).await;
    let closed = conn.close().await;
    migrated(&MIGRATIONS, outcome, &database)?;
    closed.map_err(|e| failed(e.into()))?;
    if let Some(copy) = copy {
        forget_older(path, &copy);
    }
    Ok(())
}

/// Copies the database beside itself when a migration is about to change it. A copy is whole and
/// synced before it has its name.
fn copy_before(path: &Path) -> Result<Option<PathBuf>, Failed> {
    let conn = common(path)?;
    let applied = applied(&conn)?;
    let Some(schema) = applied.last().filter(|_| MIGRATIONS.iter().any(|m| !applied.contains(&m.version))) else { return Ok(None) };
    if MIGRATIONS.iter().all(|m| m.version < *schema) {
        // Of a later version: it is refused, and not changed.
        return Ok(None);
    }
    let copy = beside(path, &format!("{COPY}{schema}"));
    let unfinished = beside(path, ".schema-copy");
    tracing::info!(copy = %copy.display(), schema, "the schema of the database is about to change; it is copied first");
    match std::fs::remove_file(&unfinished) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let written = write_copy(&conn, &unfinished, &file).and_then(|()| Ok(std::fs::rename(&unfinished, &copy)?));
    if let Err(error) = written {
        // What is left of it fills a disk that may be full already.
        let _ = std::fs::remove_file(&unfinished);
        return Err(error);
    }
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(Some(copy))
}

fn write_copy(conn: &Connection, to: &Path, file: &File) -> Result<(), Failed> {
    let name = to.to_str().ok_or("the name of the data folder is not UTF-8")?;
    conn.execute("VACUUM INTO ?1", [name])?;
    Ok(file.sync_all()?)
}

/// The migrations that the database has; none in a new one.
fn applied(conn: &Connection) -> Result<BTreeSet<i64>, Failed> {
    let known = conn.query_row("SELECT count(*) FROM sqlite_schema WHERE name = '_sqlx_migrations'", [], |r| r.get::<_, i64>(0))?;
    if known == 0 {
        return Ok(BTreeSet::new());
    }
    let mut read = conn.prepare("SELECT version FROM _sqlx_migrations WHERE success")?;
    let versions = read.query_map([], |r| r.get(0))?;
    Ok(versions.collect::<Result<_, _>>()?)
}

/// The newest copy is kept; one that cannot be removed harms nobody.
fn forget_older(path: &Path, newest: &Path) {
    let prefix = beside(path, COPY);
    let Some(entries) = path.parent().and_then(|dir| std::fs::read_dir(dir).ok()) else { return };
    for entry in entries.flatten().map(|e| e.path()) {
        let name = entry.as_os_str().to_string_lossy();
        let number = name.strip_prefix(&*prefix.as_os_str().to_string_lossy()).map(str::to_owned);
        if entry != newest && number.is_some_and(|n| n.parse::<u32>().is_ok()) {
            match std::fs::remove_file(&entry) {
                Ok(()) => tracing::info!(copy = %entry.display(), "an older copy of the database was removed"),
                Err(error) => tracing::warn!(copy = %entry.display(), %error, "an older copy of the database stays"),
            }
        }
    }
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}
