//! A copy of the database beside the hub that writes it, and what is done to a copy before a hub may
//! start from it. SQLite alone: a server has its own tools.
//!
//! Output files only grow, and a row counts on no byte that was not synced before it. So what the rows
//! of a copy count on can be read from the files at any time after, unless it was erased meanwhile.

use crate::dialect::{Database, postgres, sqlite};
use crate::meta::ASK_GO;
use crate::output::output_name;
use crate::rows::Id;
use crate::store::Failed;
use hub_engine::records::Restored;
use mesh_core::task::AttemptNo;
use mesh_core::{HubId, TaskId};
use rusqlite::{Connection, OptionalExtension, Row};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The database in a data folder.
pub const FILE: &str = "hub.db";
/// The folder of output files beside it.
pub const OUTPUT: &str = "output";

#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct CopyError {
    what: String,
    #[source]
    why: Failed,
}

fn failed<E: Into<Failed>>(what: impl Into<String>) -> impl FnOnce(E) -> CopyError {
    let what = what.into();
    move |why| CopyError { what, why: why.into() }
}

/// Output that a copy of the database counts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub task: TaskId,
    pub attempt: AttemptNo,
    /// Of its file, below [`OUTPUT`].
    pub name: String,
    /// So much of the file counts.
    pub bytes: u64,
}

/// What a database says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct About {
    pub hub: HubId,
    pub incarnation: u32,
    pub schema: i64,
}

/// Copies the database of `data_dir` as it is at one moment to the new file `to`, whether a hub writes
/// it or not. Blocks.
pub fn copy(data_dir: &Path, to: &Path) -> Result<(), CopyError> {
    let from = data_dir.join(FILE);
    let wrong = |why: Failed| CopyError { what: format!("copying {}", from.display()), why };
    let copy = || -> Result<(), Failed> {
        if !from.is_file() {
            return Err("there is no database here; is this the hub's data folder?".into());
        }
        let conn = sqlite::common(&from)?;
        // SQLite gives a file that it makes other rights.
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
        conn.execute("VACUUM INTO ?1", [to.to_str().ok_or("the name of the backup is not UTF-8")?])?;
        let copied = Connection::open(to)?;
        let found: String = copied.query_row("PRAGMA quick_check(1)", [], |r| r.get(0))?;
        if found == "ok" { Ok(()) } else { Err(format!("the database is damaged: {found}").into()) }
    };
    copy().map_err(wrong)
}

/// What the database at `path` says of itself; nothing of it is changed. Blocks.
pub fn about(path: &Path) -> Result<About, CopyError> {
    let read = || -> Result<About, Failed> {
        let conn = sqlite::common(path)?;
        let schema = conn.query_row("SELECT max(version) FROM _sqlx_migrations WHERE success", [], |r| r.get(0))?;
        let (id, incarnation) = conn.query_row("SELECT id, incarnation FROM hub", [], |r| Ok((r.get::<_, [u8; 16]>(0)?, r.get(1)?)))?;
        Ok(About { hub: HubId::from_blob(id), incarnation, schema })
    };
    read().map_err(failed(path.display().to_string()))
}

/// The output that the copy at `path` counts on. Blocks.
pub fn segments(path: &Path) -> Result<Vec<Segment>, CopyError> {
    let read = || -> Result<Vec<Segment>, Failed> {
        let conn = sqlite::common(path)?;
        let mut rows = conn.prepare("SELECT task, attempt, kept_len FROM outputs WHERE kept_len > 0 ORDER BY task, attempt")?;
        let segment = |r: &Row| {
            let (task, attempt) = (TaskId::from_blob(r.get(0)?), AttemptNo(r.get::<_, i64>(1)? as u64));
            Ok(Segment { task, attempt, name: output_name(task, attempt), bytes: r.get::<_, i64>(2)? as u64 })
        };
        Ok(rows.query_map([], segment)?.collect::<Result<_, _>>()?)
    };
    read().map_err(failed(path.display().to_string()))
}

/// Does the hub's database still count on this output? Blocks.
pub fn still_counts(data_dir: &Path, s: &Segment) -> Result<bool, CopyError> {
    let path = data_dir.join(FILE);
    let ask = || -> Result<bool, Failed> {
        let found = sqlite::common(&path)?
            .query_row(
                "SELECT 1 FROM outputs WHERE task = ?1 AND attempt = ?2 AND kept_len >= ?3",
                (s.task.blob(), s.attempt.0 as i64, s.bytes as i64),
                |_| Ok(()),
            )
            .optional()?;
        Ok(found.is_some())
    };
    ask().map_err(failed(path.display().to_string()))
}

/// Lets a copy count no more on output that it came without: its bytes are gone, its totals stay. Blocks.
pub fn forget_output(path: &Path, names: &[String]) -> Result<(), CopyError> {
    let gone: Vec<Segment> = segments(path)?.into_iter().filter(|s| names.contains(&s.name)).collect();
    let write = || -> Result<(), Failed> {
        let mut conn = sqlite::writing(path)?;
        let all = conn.transaction()?;
        for s in gone {
            all.execute(
                "UPDATE outputs SET kept_seq = 0, kept_len = 0, held = x'', truncated = 1 WHERE task = ?1 AND attempt = ?2",
                (s.task.blob(), s.attempt.0 as i64),
            )?;
        }
        Ok(all.commit()?)
    };
    write().map_err(failed(path.display().to_string()))
}

/// What a restore takes back, as far as the database that it replaces can tell.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Undone(pub Vec<(&'static str, Vec<String>)>);

/// Each: what it is; a query for `old`, the database that is replaced, and `main`, the restored one.
const UNDONE: &[(&str, &str)] = &[
    (
        "machines that were revoked or removed and count as good again; revoke them anew",
        "SELECT n.name, n.id FROM main.nodes n WHERE n.revoked_at IS NULL AND (EXISTS \
         (SELECT 1 FROM old.nodes o WHERE o.id = n.id AND o.revoked_at IS NOT NULL) OR EXISTS (SELECT 1 FROM old.removed_nodes r WHERE r.id = n.id))",
    ),
    (
        "machines that had joined and are not known any more; they must join again",
        "SELECT o.name, o.id FROM old.nodes o WHERE o.revoked_at IS NULL AND NOT EXISTS (SELECT 1 FROM main.nodes n WHERE n.id = o.id)",
    ),
    (
        "invites that were used or revoked and can be used again; revoke them anew",
        "SELECT COALESCE(n.name, 'without a name'), n.id FROM main.invites n JOIN old.invites o ON o.id = n.id \
         WHERE n.used_at IS NULL AND n.revoked_at IS NULL AND (o.used_at IS NOT NULL OR o.revoked_at IS NOT NULL)",
    ),
    (
        "API keys that were removed and work again; remove them anew",
        "SELECT n.name || ' (' || n.prefix || '…)', n.id FROM main.api_keys n WHERE NOT EXISTS (SELECT 1 FROM old.api_keys o WHERE o.id = n.id)",
    ),
    (
        "API keys that were made and do not work any more",
        "SELECT o.name || ' (' || o.prefix || '…)', o.id FROM old.api_keys o WHERE NOT EXISTS (SELECT 1 FROM main.api_keys n WHERE n.id = o.id)",
    ),
    (
        "users that were added and are gone",
        "SELECT o.username, o.id FROM old.users o WHERE NOT EXISTS (SELECT 1 FROM main.users n WHERE n.id = o.id)",
    ),
    (
        "users that were removed and are back",
        "SELECT n.username, n.id FROM main.users n WHERE NOT EXISTS (SELECT 1 FROM old.users o WHERE o.id = n.id)",
    ),
    (
        "users whose password or role was changed and is the old one again",
        "SELECT n.username, n.id FROM main.users n JOIN old.users o ON o.id = n.id \
         WHERE n.password_hash <> o.password_hash OR n.role <> o.role",
    ),
    (
        "log-ins that had ended and live again",
        "SELECT 'of ' || COALESCE((SELECT username FROM main.users u WHERE u.id = n.user), 'somebody'), n.login FROM main.refresh_tokens n \
         JOIN old.refresh_tokens o ON o.mac = n.mac WHERE n.ended = 0 AND o.ended <> 0 GROUP BY n.login",
    ),
    (
        "sessions that were closed or erased and are as before",
        "SELECT n.name, n.id FROM main.sessions n JOIN old.sessions o ON o.id = n.id \
         WHERE (n.closed_at IS NULL AND o.closed_at IS NOT NULL) OR (n.purged_at IS NULL AND o.purged_at IS NOT NULL)",
    ),
    (
        "sessions that were made and are gone",
        "SELECT o.name, o.id FROM old.sessions o WHERE NOT EXISTS (SELECT 1 FROM main.sessions n WHERE n.id = o.id)",
    ),
    (
        "tasks that were accepted and are not known any more",
        "SELECT 'task', o.id FROM old.tasks o WHERE NOT EXISTS (SELECT 1 FROM main.tasks n WHERE n.id = o.id)",
    ),
    (
        "tasks whose end is forgotten; they count as lost, or as what their machine still knows",
        "SELECT o.state, o.id FROM old.tasks o JOIN main.tasks n ON n.id = o.id WHERE o.finished_at IS NOT NULL AND n.finished_at IS NULL",
    ),
];

/// Compares the restored copy with the database that it replaces. What an older schema cannot answer is
/// left out. Blocks.
pub fn undone(restored: &Path, old: &Path) -> Result<Undone, CopyError> {
    let compare = || -> Result<Undone, Failed> {
        let conn = sqlite::common(restored)?;
        conn.execute("ATTACH DATABASE ?1 AS old", [old.to_str().ok_or("the name of the data folder is not UTF-8")?])?;
        let mut all = vec![];
        for (what, query) in UNDONE {
            let mut rows = conn.prepare(query)?;
            let line = |r: &Row| Ok(format!("{} {}", r.get::<_, String>(0)?, uuid_text(r.get(1)?)));
            let found: Vec<String> = rows.query_map([], line)?.collect::<Result<_, _>>()?;
            if !found.is_empty() {
                all.push((*what, found));
            }
        }
        Ok(Undone(all))
    };
    compare().map_err(failed(format!("comparing with {}", old.display())))
}

fn uuid_text(id: [u8; 16]) -> String {
    let text = TaskId::from_bytes(id).to_string();
    text.strip_prefix(TaskId::PREFIX).unwrap_or(&text).trim_start_matches('_').to_owned()
}

/// The mark of a restore, whether a hub has the store open or not.
pub async fn mark(data_dir: &Path, database: &Database) -> Result<Option<Restored>, CopyError> {
    const MARK: &str = "SELECT restored_at, backup_at, go FROM hub WHERE restored_at IS NOT NULL";
    let of = |(at, backup_at, go)| Restored { at, backup_at, go };
    match database {
        Database::Sqlite => {
            let path = data_dir.join(FILE);
            let read = |path: &Path| -> Result<Option<Restored>, Failed> {
                if !path.is_file() {
                    return Err("there is no database here".into());
                }
                let row = |r: &Row| Ok(of((r.get(0)?, r.get(1)?, r.get(2)?)));
                Ok(sqlite::common(path)?.query_row(MARK, [], row).optional()?)
            };
            read(&path).map_err(failed(path.display().to_string()))
        }
        Database::Postgres(url) => postgres::mark(url, MARK).await.map(|m| m.map(of)).map_err(failed(url.to_string())),
    }
}

/// Gives the word to go; the hub that has the store open finds it, or the next that starts.
pub async fn ask_go(data_dir: &Path, database: &Database) -> Result<(), CopyError> {
    match database {
        Database::Sqlite => {
            let path: PathBuf = data_dir.join(FILE);
            let write = |path: &Path| -> Result<(), Failed> { Ok(sqlite::common(path)?.execute(ASK_GO, []).map(drop)?) };
            write(&path).map_err(failed(path.display().to_string()))
        }
        Database::Postgres(url) => postgres::once(url, ASK_GO).await.map_err(failed(url.to_string())),
    }
}
