//! Sessions, the nodes attached to them, and what happened in them.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id, all, blob, session, session_columns};
use crate::sql::{Rows, Sql, sql, values};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{ACTIVITY_KEPT, ACTIVITY_OVER, Sessions, Stored, Window};
use hub_engine::records::{Activity, Happened, Place, Session, SessionAct, SessionChange, Within};
use mesh_core::task::{ReasonCode, TaskState};
use mesh_core::{EntryId, NodeId, SessionId, TaskId, UnixMs, UserId};
use mesh_process::entropy;

/// Lines that one trim takes away; more than come between two.
const TRIMMED_AT_ONCE: u32 = 4 * ACTIVITY_OVER;
const ACTIVE: &str = "closed_at IS NULL AND expired_at IS NULL";

/// Slides the end of an active session and keeps other hubs from it until the commit; false when there
/// is none.
pub(crate) async fn touch(conn: &mut Conn, id: SessionId, now: UnixMs) -> Result<bool, Failed> {
    let q = sql(format!("UPDATE sessions SET expires_at = $1 + ttl_ms WHERE id = $2 AND {ACTIVE}"));
    Ok(conn.execute(&q.bind(now).bind(id.blob())).await? == 1)
}

/// An id above `newest`, so that what came later stands later whatever the clock says.
pub(crate) fn above(newest: Option<[u8; 16]>, fresh: [u8; 16]) -> [u8; 16] {
    match newest {
        Some(newest) if newest >= fresh => u128::from_be_bytes(newest).wrapping_add(1).to_be_bytes(),
        _ => fresh,
    }
}

/// A line of activity, in the commit of what it tells.
pub(crate) async fn note(
    conn: &mut Conn,
    id: SessionId,
    (act, subject): (SessionAct, &str),
    by: Option<UserId>,
    at: UnixMs,
) -> Result<(), Failed> {
    let newest_line = sql("SELECT id, no FROM session_events WHERE session = $1 ORDER BY id DESC LIMIT 1").bind(id.blob());
    let line = |row: &Row| {
        let c = &mut Columns::of(row);
        Ok((c.bytes()?, c.get::<i64>()?))
    };
    let newest = conn.row(&newest_line, line).await?;
    let no = 1 + newest.map_or(0, |(_, no)| no);
    let place = above(newest.map(|(place, _)| place), *EntryId::from_parts(at, entropy::bytes()).as_bytes());
    let row = values![place.to_vec(), id.blob(), at, act.as_str(), subject, blob(by), no];
    conn.insert("session_events", "id, session, at, kind, subject, actor, no", &Rows::of([row]), "").await?;
    if no % i64::from(ACTIVITY_OVER) == 0 { trim(conn, id).await } else { Ok(()) }
}

/// Takes the oldest lines away, some at a time: a version before may have left very many.
async fn trim(conn: &mut Conn, id: SessionId) -> Result<(), Failed> {
    let oldest_kept = "SELECT id FROM session_events WHERE session = $1 ORDER BY id DESC LIMIT 1 OFFSET $2";
    let q = sql(format!(
        "DELETE FROM session_events WHERE id IN \
         (SELECT id FROM session_events WHERE session = $1 AND id < ({oldest_kept}) ORDER BY id LIMIT $3)"
    ));
    conn.execute(&q.bind(id.blob()).bind(ACTIVITY_KEPT - 1).bind(TRIMMED_AT_ONCE)).await.map(drop)
}

fn attach(id: SessionId, node: NodeId, now: UnixMs) -> Sql {
    sql("INSERT INTO session_nodes (session, node, position, attached_at) \
         SELECT $1, $2, 1 + COALESCE(MAX(position), 0), $3 FROM session_nodes WHERE session = $1 ON CONFLICT DO NOTHING")
    .bind(id.blob())
    .bind(node.blob())
    .bind(now)
}

pub(crate) async fn insert(conn: &mut Conn, s: &Session) -> Result<(), Failed> {
    let row = values![s.id.blob(), s.owner.blob(), s.name.as_str(), s.created_at, s.expires_at, s.ttl_ms, s.closed_at, blob(s.device)];
    let columns = "id, owner, name, created_at, expires_at, ttl_ms, closed_at, device";
    conn.insert("sessions", columns, &Rows::of([row]), "").await?;
    note(conn, s.id, (SessionAct::Created, &s.name), Some(s.owner), s.created_at).await?;
    for node in &s.nodes {
        conn.execute(&attach(s.id, *node, s.created_at)).await?;
    }
    Ok(())
}

#[async_trait]
impl Sessions for Store {
    async fn add_session(&self, session: &Session) -> Stored<()> {
        self.write("sessions.add_session", session.clone(), |conn, s| Box::pin(insert(conn, s))).await
    }

    async fn session(&self, id: SessionId) -> Stored<Option<Session>> {
        let columns = session_columns(self.read.dialect());
        self.one("sessions.session", sql(format!("SELECT {columns} FROM sessions s WHERE id = $1")).bind(id.blob()), session).await
    }

    async fn sessions(&self, within: Option<&Within>, window: Window<SessionId>) -> Stored<Vec<Session>> {
        let columns = session_columns(self.read.dialect());
        let narrow = |q: Sql| match within {
            Some(w) => q.and_any(self.read.dialect(), [("owner", all(&w.owner)), ("id", all(&w.sessions))]),
            None => q,
        };
        self.page("sessions.sessions", (&columns, "sessions s"), narrow, window, session).await
    }

    async fn close_session(&self, id: SessionId, by: Option<UserId>, now: UnixMs) -> Stored<bool> {
        self.write("sessions.close_session", (id, by, now), |conn, (id, by, now)| {
            Box::pin(async move {
                let q = sql("UPDATE sessions SET closed_at = $1 WHERE id = $2 AND closed_at IS NULL AND purged_at IS NULL");
                let closed = conn.execute(&q.bind(*now).bind(id.blob())).await? == 1;
                if closed {
                    note(conn, *id, (SessionAct::Closed, ""), *by, *now).await?;
                }
                Ok(closed)
            })
        })
        .await
    }

    async fn attach(&self, id: SessionId, node: NodeId, by: Option<UserId>, now: UnixMs) -> Stored<()> {
        self.write("sessions.attach", (id, node, by, now), |conn, (id, node, by, now)| {
            Box::pin(async move {
                touch(conn, *id, *now).await?;
                if conn.execute(&attach(*id, *node, *now)).await? == 1 {
                    note(conn, *id, (SessionAct::Attached, &node.to_string()), *by, *now).await?;
                }
                Ok(())
            })
        })
        .await
    }

    async fn detach(&self, id: SessionId, node: NodeId, by: Option<UserId>, now: UnixMs) -> Stored<bool> {
        self.write("sessions.detach", (id, node, by, now), |conn, (id, node, by, now)| {
            Box::pin(async move {
                let q = sql("DELETE FROM session_nodes WHERE session = $1 AND node = $2");
                let detached = conn.execute(&q.bind(id.blob()).bind(node.blob())).await? == 1;
                if detached {
                    touch(conn, *id, *now).await?;
                    note(conn, *id, (SessionAct::Detached, &node.to_string()), *by, *now).await?;
                }
                Ok(detached)
            })
        })
        .await
    }

    async fn touch_session(&self, id: SessionId, now: UnixMs) -> Stored<bool> {
        self.write("sessions.touch_session", (id, now), |conn, (id, now)| Box::pin(touch(conn, *id, *now))).await
    }

    async fn change_session(&self, id: SessionId, change: &SessionChange, by: Option<UserId>, now: UnixMs) -> Stored<bool> {
        self.write("sessions.change_session", (id, change.clone(), by, now), |conn, (id, change, by, now)| {
            Box::pin(change_one(conn, *id, change, *by, *now))
        })
        .await
    }

    async fn expire_sessions(&self, now: UnixMs, limit: u32) -> Stored<Vec<(SessionId, UserId)>> {
        // Most of the time there is nothing to do, and reading tells.
        if self.next_end().await?.is_none_or(|end| end > now) {
            return Ok(vec![]);
        }
        self.write("sessions.expire_sessions", (now, limit), |conn, (now, limit)| Box::pin(expire(conn, *now, *limit))).await
    }

    async fn next_end(&self) -> Stored<Option<UnixMs>> {
        let q = sql(format!("SELECT MIN(expires_at) FROM sessions WHERE {ACTIVE}"));
        Ok(self.one("sessions.next_end", q, |row| Columns::of(row).get::<Option<i64>>()).await?.flatten())
    }

    async fn activity(&self, id: SessionId, before: Option<Place>, limit: u32) -> Stored<Vec<Activity>> {
        let mut lines = vec![];
        for (columns, of) in [(OWN, Place::OWN), (ACCEPTED, Place::ACCEPTED), (ENDED, Place::ENDED)] {
            let q = lines_before(id, columns, of, before).and(" LIMIT ", limit);
            lines.extend(
                match of {
                    Place::OWN => self.all("sessions.activity", q, own_line),
                    Place::ACCEPTED => self.all("sessions.activity", q, accepted_line),
                    _ => self.all("sessions.activity", q, ended_line),
                }
                .await?,
            );
        }
        lines.sort_unstable_by_key(|a| std::cmp::Reverse(a.place));
        lines.truncate(limit as usize);
        Ok(lines)
    }
}

async fn change_one(conn: &mut Conn, id: SessionId, change: &SessionChange, by: Option<UserId>, now: UnixMs) -> Result<bool, Failed> {
    if !touch(conn, id, now).await? {
        return Ok(false);
    }
    if let Some(ttl) = change.ttl_ms {
        let q = sql("UPDATE sessions SET ttl_ms = $1, expires_at = $2 WHERE id = $3");
        conn.execute(&q.bind(ttl).bind(now.saturating_add(ttl)).bind(id.blob())).await?;
    }
    if let Some(name) = &change.name {
        let q = sql("UPDATE sessions SET name = $1 WHERE id = $2 AND name <> $1");
        if conn.execute(&q.bind(name.as_str()).bind(id.blob())).await? == 1 {
            note(conn, id, (SessionAct::Renamed, name), by, now).await?;
        }
    }
    Ok(true)
}

async fn expire(conn: &mut Conn, now: UnixMs, limit: u32) -> Result<Vec<(SessionId, UserId)>, Failed> {
    let q = sql(format!("SELECT id FROM sessions WHERE {ACTIVE} AND expires_at <= $1 ORDER BY expires_at LIMIT $2"));
    let mut due = conn.rows(&q.bind(now).bind(limit), |row| Columns::of(row).id::<SessionId>()).await?;
    due.sort_unstable();
    conn.lock("sessions", due.iter().map(Id::blob).collect()).await?;
    // Another hub, or a use, may have come first: each statement looks again.
    let due_still = format!("{ACTIVE} AND expires_at <= $1");
    // Work is under way from the first attempt on, also between one that failed and the next.
    let works = sql(format!(
        "UPDATE sessions SET expires_at = $1 + ttl_ms WHERE id = $2 AND {due_still} AND EXISTS \
         (SELECT 1 FROM tasks WHERE session = $2 AND finished_at IS NULL AND attempt IS NOT NULL)"
    ));
    let last = "ttl_ms + (SELECT MAX(finished_at) FROM tasks WHERE session = $2)";
    let worked = sql(format!("UPDATE sessions SET expires_at = {last} WHERE id = $2 AND {due_still} AND {last} > $1"));
    let ends = sql(format!("UPDATE sessions SET expired_at = $1 WHERE id = $2 AND {due_still} RETURNING owner"));
    let mut ended = vec![];
    for id in due {
        if conn.execute(&works.clone().bind(now).bind(id.blob())).await? > 0
            || conn.execute(&worked.clone().bind(now).bind(id.blob())).await? > 0
        {
            continue;
        }
        if let Some(owner) = conn.row(&ends.clone().bind(now).bind(id.blob()), |row| Columns::of(row).id()).await? {
            note(conn, id, (SessionAct::Expired, ""), None, now).await?;
            ended.push((id, owner));
        }
    }
    Ok(ended)
}

const OWN: &str = "SELECT id, at, kind, subject, actor FROM session_events WHERE session = $1";
const ACCEPTED: &str = "SELECT id, created_at, skill, \"user\" FROM tasks WHERE session = $1";
const ENDED: &str = "SELECT id, finished_at, skill, \"user\", state, reason_code FROM tasks WHERE session = $1 AND finished_at IS NOT NULL";

/// The newest lines of one kind that stand before `before`.
fn lines_before(id: SessionId, columns: &'static str, of: u8, before: Option<Place>) -> Sql {
    let mut q = sql(columns).bind(id.blob());
    if let Some(Place(place, number)) = before {
        // A line with the same id, of a kind that counts as older.
        let or_equal = if of < number { "=" } else { "" };
        if of == Place::ENDED {
            let bytes = place.as_bytes();
            let at = bytes[..6].iter().fold(0i64, |ms, b| (ms << 8) | i64::from(*b));
            // The first condition is what the index takes, the second is exact.
            q = q.and(" AND finished_at <= ", at).and(" AND (finished_at < ", at);
            q = q.and(&format!(" OR substr(id, 7) <{or_equal} "), bytes[6..].to_vec());
            q.text.to_mut().push(')');
        } else {
            q = q.and(&format!(" AND id <{or_equal} "), place.blob());
        }
    }
    q.text.to_mut().push_str(if of == Place::ENDED { " ORDER BY finished_at DESC, substr(id, 7) DESC" } else { " ORDER BY id DESC" });
    q
}

fn own_line(row: &Row) -> Result<Activity, Failed> {
    let c = &mut Columns::of(row);
    let (place, at) = (Place(c.id()?, Place::OWN), c.get()?);
    let what = Happened::Session { act: c.word(SessionAct::parse)?, subject: c.get()? };
    Ok(Activity { place, at, actor: c.id_or_null()?, what })
}

fn accepted_line(row: &Row) -> Result<Activity, Failed> {
    let c = &mut Columns::of(row);
    let (task, at, skill) = (c.id::<TaskId>()?, c.get()?, c.get()?);
    let what = Happened::TaskAccepted { task, skill };
    Ok(Activity { place: Place::of_acceptance(task), at, actor: c.id_or_null()?, what })
}

fn ended_line(row: &Row) -> Result<Activity, Failed> {
    let c = &mut Columns::of(row);
    let (task, at, skill, actor) = (c.id::<TaskId>()?, c.get()?, c.get()?, c.id_or_null()?);
    let what = Happened::TaskEnded { task, skill, state: c.word(TaskState::parse)?, reason: c.word_or_null(ReasonCode::parse)? };
    Ok(Activity { place: Place::of_end(task, at), at, actor, what })
}
