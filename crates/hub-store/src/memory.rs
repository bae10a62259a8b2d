//! What sessions remember.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id};
use crate::sessions::{note, touch};
use crate::sql::{Rows, sql, values};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Memory, Stored, Window};
use hub_engine::records::{MemoryEntry, MemoryKey, SessionAct, Written};
use mesh_core::{EntryId, SessionId, UnixMs, UserId};

const COLUMNS: &str = "id, session, key, value, updated_at";

#[async_trait]
impl Memory for Store {
    async fn put_memory(&self, entry: &MemoryEntry, by: Option<UserId>, most: u32) -> Stored<Written> {
        self.write("memory.put_memory", (entry.clone(), by, most), |conn, (entry, by, most)| Box::pin(put(conn, entry, *by, *most))).await
    }

    async fn memory(&self, session: SessionId, key: &str) -> Stored<Option<MemoryEntry>> {
        let q = sql(format!("SELECT {COLUMNS} FROM session_memory WHERE session = $1 AND key = $2"));
        self.one("memory.memory", q.bind(session.blob()).bind(key), entry).await
    }

    async fn memory_keys(&self, session: SessionId, window: Window<EntryId>) -> Stored<Vec<MemoryKey>> {
        let columns = ("id, key, CAST(length(value) AS BIGINT), updated_at", "session_memory");
        self.page("memory.memory_keys", columns, |q| q.and(" AND session = ", session.blob()), window, key).await
    }

    async fn remove_memory(&self, session: SessionId, key: &str, by: Option<UserId>, now: UnixMs) -> Stored<Written> {
        self.write("memory.remove_memory", (session, key.to_owned(), by, now), |conn, (session, key, by, now)| {
            Box::pin(async move {
                if !touch(conn, *session, *now).await? {
                    return Ok(Written::Ended);
                }
                let q = sql("DELETE FROM session_memory WHERE session = $1 AND key = $2");
                if conn.execute(&q.bind(session.blob()).bind(key.as_str())).await? == 0 {
                    return Ok(Written::Absent);
                }
                note(conn, *session, (SessionAct::MemoryRemoved, key), *by, *now).await?;
                Ok(Written::Done)
            })
        })
        .await
    }
}

async fn put(conn: &mut Conn, e: &MemoryEntry, by: Option<UserId>, most: u32) -> Result<Written, Failed> {
    // From here on other hubs wait to write into this session.
    if !touch(conn, e.session, e.updated_at).await? {
        return Ok(Written::Ended);
    }
    let q = sql("UPDATE session_memory SET value = $1, updated_at = $2 WHERE session = $3 AND key = $4");
    let q = q.bind(e.value.clone()).bind(e.updated_at).bind(e.session.blob()).bind(e.key.as_str());
    if conn.execute(&q).await? == 0 {
        let count = sql("SELECT COUNT(*) FROM session_memory WHERE session = $1").bind(e.session.blob());
        let count = conn.row(&count, |row| Columns::of(row).unsigned()).await?.unwrap_or(0);
        if count >= u64::from(most) {
            return Ok(Written::Full);
        }
        let row = values![e.id.blob(), e.session.blob(), e.key.as_str(), e.value.clone(), e.updated_at];
        conn.insert("session_memory", COLUMNS, &Rows::of([row]), "").await?;
    }
    note(conn, e.session, (SessionAct::MemorySet, &e.key), by, e.updated_at).await?;
    Ok(Written::Done)
}

fn entry(row: &Row) -> Result<MemoryEntry, Failed> {
    let c = &mut Columns::of(row);
    Ok(MemoryEntry { id: c.id()?, session: c.id()?, key: c.get()?, value: c.get()?, updated_at: c.get()? })
}

fn key(row: &Row) -> Result<MemoryKey, Failed> {
    let c = &mut Columns::of(row);
    Ok(MemoryKey { id: c.id()?, key: c.get()?, bytes: c.unsigned()?, updated_at: c.get()? })
}
