//! What agents keep.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id, all};
use crate::sql::{Rows, Sql, sql, values};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{AgentState, Stored, Window};
use hub_engine::records::{Part, StateEntry, StateFilter, StateWritten};
use mesh_core::{EntryId, UserId};

const COLUMNS: &str = "id, agent, key, owner, value, updated_at";

#[async_trait]
impl AgentState for Store {
    async fn put_state(&self, entry: &StateEntry, most: u32) -> Stored<StateWritten> {
        self.write("state.put_state", (entry.clone(), most), |conn, (entry, most)| Box::pin(put(conn, entry, *most))).await
    }

    async fn state(&self, agent: &str, key: &str) -> Stored<Option<StateEntry>> {
        let q = sql(format!("SELECT {COLUMNS} FROM agent_state WHERE agent = $1 AND key = $2"));
        self.one("state.state", q.bind(agent).bind(key), entry).await
    }

    async fn state_owner(&self, agent: &str) -> Stored<Option<UserId>> {
        self.one("state.state_owner", owner(agent), |row| Columns::of(row).id()).await
    }

    async fn states(&self, filter: &StateFilter, window: Window<EntryId>, max_bytes: u64) -> Stored<Part<StateEntry>> {
        let narrow = || {
            let mut q = sql("WHERE TRUE");
            if let Some(w) = &filter.within {
                q = q.and_any(
                    self.read.dialect(),
                    [("owner", all(&w.owner)), ("agent", w.agents.iter().map(|a| a.clone().into()).collect())],
                );
            }
            if let Some(agent) = &filter.agent {
                q = q.and(" AND agent = ", agent.as_str());
            }
            if let Some(key) = &filter.key {
                q = q.and(" AND key = ", key.as_str());
            }
            q
        };
        self.part("state.states", (COLUMNS, "agent_state", "value"), narrow, window, max_bytes, entry).await
    }

    async fn remove_state(&self, agent: &str, key: &str, owner: UserId) -> Stored<bool> {
        self.write("state.remove_state", (agent.to_owned(), key.to_owned(), owner), |conn, (agent, key, owner)| {
            Box::pin(async move {
                alone(conn, agent).await?;
                let q = sql("DELETE FROM agent_state WHERE agent = $1 AND key = $2 AND owner = $3");
                if conn.execute(&q.bind(agent.as_str()).bind(key.as_str()).bind(owner.blob())).await? == 0 {
                    return Ok(false);
                }
                release(conn, agent).await?;
                Ok(true)
            })
        })
        .await
    }
}

/// Whose a name is: theirs who keep something under it, or have an agent of that name.
pub(crate) fn owner(agent: &str) -> Sql {
    sql("SELECT owner FROM agent_state WHERE agent = $1 UNION ALL SELECT owner FROM agents WHERE name = $1 LIMIT 1").bind(agent)
}

/// With the last of its keys and agents a name is nobody's: who has it next grants anew.
pub(crate) async fn release(conn: &mut Conn, agent: &str) -> Result<(), Failed> {
    let q = sql("DELETE FROM grants WHERE agent = $1 AND NOT EXISTS (SELECT 1 FROM agent_state WHERE agent = $1) \
         AND NOT EXISTS (SELECT 1 FROM agents WHERE name = $1)");
    conn.execute(&q.bind(agent)).await.map(drop)
}

/// Whose an agent is hangs on all of its rows.
pub(crate) async fn alone(conn: &mut Conn, agent: &str) -> Result<(), Failed> {
    conn.alone(sql("SELECT $1").bind(mesh_core::sha256(agent.as_bytes()))).await
}

async fn put(conn: &mut Conn, e: &StateEntry, most: u32) -> Result<StateWritten, Failed> {
    alone(conn, &e.agent).await?;
    if conn.row(&owner(&e.agent), |row| Columns::of(row).id::<UserId>()).await?.is_some_and(|owner| owner != e.owner) {
        return Ok(StateWritten::Foreign);
    }
    let q = sql("UPDATE agent_state SET value = $1, updated_at = $2 WHERE agent = $3 AND key = $4");
    let q = q.bind(e.value.clone()).bind(e.updated_at).bind(e.agent.as_str()).bind(e.key.as_str());
    if conn.execute(&q).await? == 0 {
        let count = sql("SELECT COUNT(*) FROM agent_state WHERE agent = $1").bind(e.agent.as_str());
        let count = conn.row(&count, |row| Columns::of(row).unsigned()).await?.unwrap_or(0);
        if count >= u64::from(most) {
            return Ok(StateWritten::Full);
        }
        let row = values![e.id.blob(), e.agent.as_str(), e.key.as_str(), e.owner.blob(), e.value.clone(), e.updated_at];
        conn.insert("agent_state", COLUMNS, &Rows::of([row]), "").await?;
    }
    Ok(StateWritten::Done)
}

fn entry(row: &Row) -> Result<StateEntry, Failed> {
    let c = &mut Columns::of(row);
    Ok(StateEntry { id: c.id()?, agent: c.get()?, key: c.get()?, owner: c.id()?, value: c.get()?, updated_at: c.get()? })
}
