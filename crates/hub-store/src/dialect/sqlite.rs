//! SQLite: a file in the data folder, with a write-ahead log that is checkpointed beside the writer.
//!
//! No statement crosses a thread: the writer has one for itself, a read by key happens where it is
//! asked, a longer one crosses once.

mod upgrade;

use super::{Conn, Connector, Lane, Readers, Row};
use crate::sql::{IdBytes, Rows, Sql, Value};
use crate::store::{Failed, OpenError, Opened};
use crate::writer::Writer;
use mesh_process::Tasks;
use rusqlite::types::{ToSqlOutput, Value as Owned, ValueRef};
use rusqlite::{CachedStatement, Connection, OpenFlags, ToSql};
use std::fs::OpenOptions;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Reads by key that happen at once; each holds a thread of the runtime for some microseconds.
const QUICK_READS: usize = 4;
/// Longer reads that happen at once, on threads that may block.
const LONG_READS: usize = 2;
/// Statements that a connection keeps prepared.
const PREPARED: usize = 128;
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);
/// A write-ahead log longer than this (in pages of 4 KiB) is caught up with between two commits, so
/// that the next one can begin it anew; a checkpoint beside steady writing never quite arrives.
const WAL_PAGES: i64 = 16_384;

/// Opens `{data_dir}/hub.db`, makes it when it is not there, and brings its schema up to date.
/// Gives the connection for [`checkpoints`] too.
pub(crate) async fn open(data_dir: &Path) -> Result<(Opened, Connection), OpenError> {
    let path = data_dir.join("hub.db");
    make_files(data_dir, &path).map_err(|why| OpenError::Folder { path: data_dir.to_owned(), why })?;
    upgrade::upgrade(&path).await?;
    let failed = |why: Failed| OpenError::Database { database: path.display().to_string(), why };
    let conn = Conn::Sqlite(writing(&path).map_err(failed)?);
    let read = Pool {
        idle: Mutex::new(vec![reading(&path).map_err(failed)?]),
        path: path.clone(),
        quick: Semaphore::new(QUICK_READS),
        long: Arc::new(Semaphore::new(LONG_READS)),
    };
    let beside = common(&path).map_err(failed)?;
    Ok((Opened { conn, connector: Connector::Sqlite(path), read: Readers::Sqlite(Arc::new(read)) }, beside))
}

fn make_files(dir: &Path, db: &Path) -> std::io::Result<()> {
    mesh_process::files::private_dir(dir)?;
    // SQLite gives the files beside the database the mode of the database.
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(db)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(())
}

pub(crate) fn common(path: &Path) -> Result<Connection, Failed> {
    let conn = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    conn.busy_timeout(BUSY_TIMEOUT)?;
    conn.set_prepared_statement_cache_capacity(PREPARED);
    // Whoever closes last need not wait for a checkpoint; those happen where they are asked for.
    conn.execute_batch("PRAGMA foreign_keys = ON; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0")?;
    Ok(conn)
}

pub(crate) fn writing(path: &Path) -> Result<Connection, Failed> {
    let conn = common(path)?;
    // A log that has grown is cut to the limit when it begins anew.
    conn.execute_batch("PRAGMA journal_mode = WAL; PRAGMA journal_size_limit = 67108864")?;
    Ok(conn)
}

fn reading(path: &Path) -> Result<Connection, Failed> {
    let conn = common(path)?;
    conn.execute_batch("PRAGMA query_only = ON")?;
    Ok(conn)
}

/// The connections that read.
#[derive(Debug)]
pub(crate) struct Pool {
    path: PathBuf,
    /// Those in nobody's hands. One that is missing is opened.
    idle: Mutex<Vec<Connection>>,
    quick: Semaphore,
    long: Arc<Semaphore>,
}

impl Pool {
    pub(super) async fn rows<T, F>(pool: &Arc<Self>, lane: Lane, sql: Sql, record: F) -> Result<Vec<T>, Failed>
    where
        T: Send + 'static,
        F: FnMut(&Row) -> Result<T, Failed> + Send + 'static,
    {
        match lane {
            Lane::Quick => {
                let _place = pool.quick.acquire().await?;
                pool.read(&sql, record)
            }
            Lane::Long => {
                let (pool, place) = (pool.clone(), pool.long.clone().acquire_owned().await?);
                let read = move || {
                    let _place = place;
                    pool.read(&sql, record)
                };
                tokio::task::spawn_blocking(read).await?
            }
        }
    }

    fn read<T>(&self, sql: &Sql, record: impl FnMut(&Row) -> Result<T, Failed>) -> Result<Vec<T>, Failed> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        let conn = match kept {
            Some(conn) => conn,
            None => reading(&self.path)?,
        };
        let read = rows(&conn, sql, record);
        idle().push(conn);
        read
    }
}

/// Moves committed pages from the log into the database, beside the writer, while there are any.
pub(crate) fn checkpoints(conn: Connection, writer: Writer, tasks: &Tasks) {
    let end = tasks.token();
    tasks.spawn("store checkpoints", async move {
        let (mut done, mut conn) = (0, conn);
        loop {
            let last = tokio::select! {
                biased;
                () = end.cancelled() => true,
                () = tokio::time::sleep(CHECKPOINT_EVERY) => false,
            };
            let commits = writer.commits();
            if commits != done {
                // It waits for the disk.
                let moving = tokio::task::spawn_blocking(move || {
                    let moved = checkpoint(&conn);
                    (conn, moved)
                });
                let Ok((back, moved)) = moving.await else { break };
                conn = back;
                match moved {
                    Ok((log, moved)) => {
                        if log > WAL_PAGES {
                            writer.catch_up();
                        }
                        if log == moved {
                            done = commits;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "checkpoint failed; the log grows until one succeeds"),
                }
            }
            if last {
                break;
            }
        }
    });
}

/// Gives the pages in the log, and how many of them are in the database now.
pub(super) fn checkpoint(conn: &Connection) -> Result<(i64, i64), Failed> {
    Ok(conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| Ok((row.get(1)?, row.get(2)?)))?)
}

impl ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Int(Some(v)) => ValueRef::Integer(*v),
            Self::Bool(Some(v)) => ValueRef::Integer((*v).into()),
            Self::Text(Some(v)) => ValueRef::Text(v.as_bytes()),
            Self::Blob(Some(v)) => ValueRef::Blob(v),
            Self::Id(Some(v)) => ValueRef::Blob(v),
            Self::List(ids) => return Ok(ToSqlOutput::Owned(Owned::Text(hex_list(ids)))),
            Self::Int(None) | Self::Bool(None) | Self::Text(None) | Self::Blob(None) | Self::Id(None) => ValueRef::Null,
        }))
    }
}

/// Blobs as a JSON list of hex, for `unhex(value)` over `json_each`.
fn hex_list(ids: &[IdBytes]) -> String {
    let hex = ids.iter().map(|b| b.iter().map(|b| format!("{b:02x}")).collect::<String>());
    serde_json::json!(hex.collect::<Vec<_>>()).to_string()
}

/// SQLite takes `$2` for a name, and gives names numbers in the order in which it meets them.
fn bind(statement: &mut CachedStatement, values: &[Value]) -> Result<(), Failed> {
    for at in 1..=statement.parameter_count() {
        let name = statement.parameter_name(at).unwrap_or_default();
        let n: usize = name.trim_start_matches('$').parse().map_err(|_| format!("{name:?} is not a placeholder"))?;
        let value = n.checked_sub(1).and_then(|i| values.get(i)).ok_or_else(|| format!("${n} has no value"))?;
        statement.raw_bind_parameter(at, value)?;
    }
    Ok(())
}

pub(super) fn execute(conn: &Connection, sql: &Sql) -> Result<u64, Failed> {
    let mut statement = conn.prepare_cached(&sql.text)?;
    bind(&mut statement, &sql.values)?;
    Ok(statement.raw_execute()? as u64)
}

pub(super) fn rows<T>(conn: &Connection, sql: &Sql, mut record: impl FnMut(&Row) -> Result<T, Failed>) -> Result<Vec<T>, Failed> {
    let mut statement = conn.prepare_cached(&sql.text)?;
    bind(&mut statement, &sql.values)?;
    let mut all = vec![];
    let mut found = statement.raw_query();
    while let Some(row) = found.next()? {
        all.push(record(&Row::Sqlite(row))?);
    }
    Ok(all)
}

/// One statement, once for each id: a lookup is dearer to describe as a list than to do.
pub(super) fn each<T>(
    conn: &Connection,
    text: &str,
    ids: &[IdBytes],
    mut record: impl FnMut(&Row) -> Result<T, Failed>,
) -> Result<Vec<T>, Failed> {
    let mut statement = conn.prepare_cached(text)?;
    let mut all = vec![];
    for id in ids {
        statement.raw_bind_parameter(1, &id[..])?;
        let mut found = statement.raw_query();
        while let Some(row) = found.next()? {
            all.push(record(&Row::Sqlite(row))?);
        }
    }
    Ok(all)
}

/// One prepared statement, run for each row.
pub(super) fn for_each(conn: &Connection, text: &str, rows: &Rows<'_>) -> Result<u64, Failed> {
    let mut statement = conn.prepare_cached(text)?;
    let mut changed = 0;
    for row in rows.values.chunks_exact(rows.width) {
        for (value, at) in row.iter().zip(1..) {
            statement.raw_bind_parameter(at, value)?;
        }
        changed += statement.raw_execute()? as u64;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::sql;

    #[test]
    fn lists_are_hex_in_json() {
        let mut id = [0; 16];
        id[15] = 255;
        assert_eq!(hex_list(&[id, [16; 16]]), format!(r#"["{}ff","{}"]"#, "00".repeat(15), "10".repeat(16)));
        assert_eq!(hex_list(&[]), "[]");
    }

    #[test]
    fn placeholders_are_numbers_whatever_their_order() {
        let conn = Connection::open_in_memory().unwrap();
        let q = sql("SELECT $2, $1, $2").bind("one").bind(2i64);
        let read = rows(&conn, &q, |r| Ok((r.get::<i64>(0)?, r.get::<String>(1)?, r.get::<i64>(2)?))).unwrap();
        assert_eq!(read, [(2, "one".to_owned(), 2)]);
        assert!(execute(&conn, &sql("SELECT $2").bind(1i64)).unwrap_err().to_string().contains("$2"));
    }
}
