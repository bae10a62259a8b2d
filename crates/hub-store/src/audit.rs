//! The audit log. The writer adds the entries of a commit behind its jobs, by one statement, and holds the
//! end of the chain; nobody else adds to it. The database itself refuses changes of what was written.

use crate::dialect::{Conn, Row};
use crate::idempotency::Made;
use crate::rows::{Columns, Id, blob};
use crate::sql::{Rows, Value, sql, values};
use crate::store::{Failed, Store, failed};
use async_trait::async_trait;
use hub_engine::audit::{Entry, Ticket};
use hub_engine::ports::{Applied, Audit, StoreError, Stored, Window};
use hub_engine::records::*;
use mesh_core::audit::{Checkpoint, Head, Kind, Outcome, Row as Kept, Signed};
use mesh_core::{AuditId, ChainId, HubId, SessionId, UserId};
use std::collections::HashMap;
use tokio::sync::watch;

/// What the end of a write says of the audit entry that it would take along.
pub(crate) trait Effect {
    /// None when nothing was changed: the entry is left to the end of its call.
    fn outcome(&self) -> Option<Outcome>;
}

macro_rules! effect {
    ($($of:ty: $outcome:expr;)*) => {$(
        impl Effect for $of {
            fn outcome(&self) -> Option<Outcome> {
                let changed: fn(&Self) -> bool = $outcome;
                changed(self).then_some(Outcome::Ok)
            }
        }
    )*};
}
effect! {
    (): |()| true;
    bool: |done| *done;
    u64: |rows| *rows > 0;
    HubMeta: |_| true;
    Option<u64>: Option::is_some;
    Option<Node>: Option::is_some;
    Option<Message>: Option::is_some;
    Claim: |c| matches!(c, Claim::Claimed);
    PurgeStart: |p| matches!(p, PurgeStart::Begun);
    Written: |w| matches!(w, Written::Done);
    StateWritten: |w| matches!(w, StateWritten::Done);
    Applied: |a| matches!(a, Applied::Done(..));
    Spawned: |s| matches!(s, Spawned::Done);
    AgentApplied: |a| matches!(a, AgentApplied::Done(..));
    UserChanged: |c| matches!(c, UserChanged::Done { .. });
    Removal: |r| matches!(r, Removal::Done);
    Option<UserEntry>: Option::is_some;
    Made: |made| made.0.is_none();
    // Of the hub's own accord; no call waits for them.
    OutputTotals: |_| false;
    crate::agents::Taken: |_| false;
    (PurgeStep, crate::purges::Gone): |_| false;
    (u32, crate::purges::Gone): |_| false;
    (u32, u64, crate::purges::Gone): |_| false;
    Vec<(SessionId, UserId)>: |_| false;
}

impl Effect for Rotation {
    fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Rotated { .. } => Some(Outcome::Ok),
            Self::Reused { .. } => Some(Outcome::Denied),
            Self::Unknown => None,
        }
    }
}

/// An entry on its way into the log.
pub(crate) struct Due {
    pub entry: Entry,
    /// Whose it is, to be told.
    pub ticket: Option<Ticket>,
}

/// Names of users that the writer remembers.
const NAMES: usize = 1024;

/// The end of this process's chain, held by the writer.
pub(crate) struct Chain {
    pub id: Option<ChainId>,
    /// None until it is read, and after a commit of which nobody knows whether it succeeded.
    head: Option<Head>,
    /// What stands at the end of the transaction that is under way.
    next: Option<Head>,
    tickets: Vec<Ticket>,
    names: HashMap<UserId, String>,
    told: watch::Sender<Head>,
}

impl Chain {
    pub(crate) fn new(told: watch::Sender<Head>) -> Self {
        Self { id: None, head: None, next: None, tickets: vec![], names: HashMap::new(), told }
    }

    /// Adds the entries of a transaction, before its commit.
    pub(crate) async fn append(&mut self, conn: &mut Conn, due: Vec<Due>) -> Result<(), Failed> {
        (self.next, self.tickets) = (None, vec![]);
        let mut entries: Vec<Entry> = vec![];
        for Due { entry, ticket } in due {
            if let Some(ticket) = ticket {
                if self.tickets.iter().any(|t| t.is(&ticket)) {
                    continue;
                }
                self.tickets.push(ticket);
            }
            entries.push(entry);
        }
        if entries.is_empty() {
            return Ok(());
        }
        let chain = self.id.ok_or("the audit log was not begun")?;
        let mut head = match self.head {
            Some(head) => head,
            None => read_head(conn, chain).await?,
        };
        self.learn_names(conn, &entries).await?;
        let rows: Vec<Kept> = entries
            .iter()
            .map(|entry| {
                let name = entry.user.and_then(|user| self.names.get(&user)).map_or("", String::as_str);
                let row = entry.row(chain, head.seq + 1, head.hash, name);
                head = row.head();
                row
            })
            .collect();
        conn.insert("audit", COLUMNS, &Rows::of(rows.iter().map(row_values)), "").await?;
        self.next = Some(head);
        Ok(())
    }

    async fn learn_names(&mut self, conn: &mut Conn, entries: &[Entry]) -> Result<(), Failed> {
        if self.names.len() > NAMES || entries.iter().any(|e| e.kind == Kind::UserChanged) {
            self.names.clear();
        }
        let mut unknown: Vec<_> = entries.iter().filter_map(|e| e.user).filter(|u| !self.names.contains_key(u)).map(|u| u.blob()).collect();
        unknown.sort_unstable();
        unknown.dedup();
        if !unknown.is_empty() {
            let found = conn.each(("SELECT id, username FROM users", "id"), unknown, |row| {
                let c = &mut Columns::of(row);
                Ok((c.id::<UserId>()?, c.get::<String>()?))
            });
            self.names.extend(found.await?);
        }
        Ok(())
    }

    /// The transaction has been committed.
    pub(crate) fn committed(&mut self) {
        if let Some(head) = self.next.take() {
            self.head = Some(head);
            self.told.send_replace(head);
        }
        for ticket in self.tickets.drain(..) {
            ticket.written();
        }
    }
    /// It has not, or nobody knows.
    pub(crate) fn lost(&mut self) {
        (self.head, self.next) = (None, None);
        self.tickets.clear();
    }
}

async fn read_head(conn: &mut Conn, chain: ChainId) -> Result<Head, Failed> {
    let q = sql("SELECT chain, seq, hash FROM audit WHERE chain = $1 ORDER BY seq DESC LIMIT 1").bind(chain.blob());
    Ok(conn.row(&q, head).await?.unwrap_or(Head::none(chain)))
}

fn head(row: &Row) -> Result<Head, Failed> {
    let c = &mut Columns::of(row);
    Ok(Head { chain: c.id()?, seq: c.unsigned()?, hash: c.bytes()? })
}

const COLUMNS: &str = "chain, seq, id, at, kind, action, \"user\", key, agent, door, resource_kind, resource_id, outcome, session, \
    person_digest, detail_digest, prev, hash, person, detail";

fn row_values(r: &Kept) -> [Value<'_>; 20] {
    values![
        r.chain.blob(),
        r.seq,
        r.id.blob(),
        r.at,
        r.kind.as_str(),
        r.action.as_str(),
        blob(r.user),
        blob(r.key),
        r.agent.as_deref(),
        r.door.as_str(),
        r.resource_kind.as_str(),
        r.resource_id.as_str(),
        r.outcome.as_str(),
        blob(r.session),
        &r.person_digest,
        &r.detail_digest,
        &r.prev,
        &r.hash,
        r.person.as_deref(),
        r.detail.as_deref(),
    ]
}

fn kept(row: &Row) -> Result<Kept, Failed> {
    let c = &mut Columns::of(row);
    Ok(Kept {
        chain: c.id()?,
        seq: c.unsigned()?,
        id: c.id()?,
        at: c.get()?,
        kind: c.get()?,
        action: c.get()?,
        user: c.id_or_null()?,
        key: c.id_or_null()?,
        agent: c.get()?,
        door: c.get()?,
        resource_kind: c.get()?,
        resource_id: c.get()?,
        outcome: c.get()?,
        session: c.id_or_null()?,
        person_digest: c.bytes()?,
        detail_digest: c.bytes()?,
        prev: c.bytes()?,
        hash: c.bytes()?,
        person: c.get()?,
        detail: c.get()?,
    })
}

/// A row that nobody wrote so is still one: what cannot be read of it does not verify.
fn kept_or_not(row: &Row) -> Result<Kept, Failed> {
    kept(row).or_else(|_| {
        let c = &mut Columns::of(row);
        let (chain, seq) = (c.id()?, c.unsigned()?);
        Ok(Kept {
            chain,
            seq,
            id: AuditId::from_bytes([0; 16]),
            at: 0,
            kind: String::new(),
            action: "unreadable".into(),
            user: None,
            key: None,
            agent: None,
            door: String::new(),
            resource_kind: String::new(),
            resource_id: String::new(),
            outcome: String::new(),
            session: None,
            person_digest: [0; 32],
            detail_digest: [0; 32],
            prev: [0; 32],
            hash: [0; 32],
            person: None,
            detail: None,
        })
    })
}

fn signed(row: &Row) -> Result<Signed, Failed> {
    let c = &mut Columns::of(row);
    let (chain, seq, hub, at) = (c.id::<ChainId>()?, c.unsigned()?, c.id::<HubId>()?, c.get()?);
    // What does not have its length was signed by nobody.
    let mut fixed = || Ok::<[u8; 32], Failed>(c.get::<&[u8]>()?.try_into().unwrap_or_default());
    let checkpoint = Checkpoint { hub, at, heads: vec![Head { chain, seq, hash: fixed()? }] };
    Ok(Signed { checkpoint, key: fixed()?, signature: c.get()? })
}

/// Erases what is known of a session's entries beyond ids; gives how many had something.
pub(crate) async fn erase_session(conn: &mut Conn, session: SessionId, limit: u32) -> Result<u64, Failed> {
    let q = sql("UPDATE audit SET detail = NULL WHERE id IN \
         (SELECT id FROM audit WHERE session = $1 AND detail IS NOT NULL ORDER BY id LIMIT $2)");
    conn.execute(&q.bind(session.blob()).bind(limit)).await
}

#[async_trait]
impl Audit for Store {
    async fn begin(&self, chain: ChainId, first: &Entry) -> Stored<()> {
        const OPERATION: &str = "audit.begin";
        self.writer.chain(chain).map_err(failed(OPERATION))?;
        let q = sql("SELECT 1 FROM audit WHERE chain = $1 LIMIT 1").bind(chain.blob());
        match self.one(OPERATION, q, |_| Ok(())).await? {
            Some(()) => {
                // So that whoever signs knows where the chain stands before anything is added.
                let end = self.one(
                    OPERATION,
                    sql("SELECT chain, seq, hash FROM audit WHERE chain = $1 ORDER BY seq DESC LIMIT 1").bind(chain.blob()),
                    head,
                );
                self.writer.tell_head(end.await?.unwrap_or(Head::none(chain)));
                Ok(())
            }
            None => self.add_entry(first).await,
        }
    }

    async fn add_entry(&self, entry: &Entry) -> Stored<()> {
        self.writer.append(entry.clone()).await
    }

    fn head(&self) -> watch::Receiver<Head> {
        self.writer.head()
    }

    async fn heads(&self) -> Stored<Vec<Head>> {
        const OPERATION: &str = "audit.heads";
        let mut heads = vec![];
        let mut after = vec![];
        // From chain to chain by the key: there are few of them, of many rows each.
        loop {
            let q = sql("SELECT chain FROM audit WHERE chain > $1 ORDER BY chain LIMIT 1").bind(after);
            let Some(chain) = self.one(OPERATION, q, |row| Columns::of(row).id::<ChainId>()).await? else { return Ok(heads) };
            let q = sql("SELECT chain, seq, hash FROM audit WHERE chain = $1 ORDER BY seq DESC LIMIT 1").bind(chain.blob());
            let end = self.one(OPERATION, q, |row| {
                let c = &mut Columns::of(row);
                Ok(Head { chain: c.id()?, seq: c.unsigned()?, hash: c.get::<&[u8]>()?.try_into().unwrap_or_default() })
            });
            heads.extend(end.await?);
            after = chain.blob().to_vec();
        }
    }

    async fn rows(&self, chain: ChainId, after: u64, to: u64, limit: u32) -> Stored<Vec<Kept>> {
        let q = sql(format!("SELECT {COLUMNS} FROM audit WHERE chain = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4"));
        self.all("audit.rows", q.bind(chain.blob()).bind(after).bind(to).bind(limit), kept_or_not).await
    }

    async fn entries(&self, f: &AuditFilter, window: Window<AuditId>) -> Stored<Vec<Kept>> {
        let narrow = |mut q: crate::sql::Sql| {
            if let Some(kind) = f.kind {
                q = q.and(" AND kind = ", kind.as_str());
                if kind != Kind::TaskLifecycle {
                    // The words of an index that the many do not burden.
                    q.text.to_mut().push_str(" AND kind <> 'task_lifecycle'");
                }
            }
            if let Some(outcome) = f.outcome {
                q = q.and(" AND outcome = ", outcome.as_str());
                if outcome != Outcome::Ok {
                    q.text.to_mut().push_str(" AND outcome <> 'ok'");
                }
            }
            for (text, id) in [(" AND \"user\" = ", f.user.map(|id| id.blob())), (" AND session = ", f.session.map(|id| id.blob()))] {
                if let Some(id) = id {
                    q = q.and(text, id);
                }
            }
            for (text, word) in [(" AND resource_id = ", &f.resource), (" AND door = ", &f.door)] {
                if let Some(word) = word {
                    q = q.and(text, word.as_str());
                }
            }
            if let Some(since) = f.since {
                q = q.and(" AND at >= ", since);
            }
            match f.until {
                Some(until) => q.and(" AND at < ", until),
                None => q,
            }
        };
        self.page("audit.entries", (COLUMNS, "audit"), narrow, window, kept_or_not).await
    }

    async fn add_checkpoint(&self, signed: &Signed) -> Stored<()> {
        let [head] = signed.checkpoint.heads.as_slice() else {
            return Err(StoreError::new("audit.add_checkpoint", "a checkpoint that is kept is of one chain"));
        };
        let c = &signed.checkpoint;
        let row = values![head.chain.blob(), head.seq, c.hub.blob(), c.at, &head.hash, &signed.key, &signed.signature[..]];
        self.write("audit.add_checkpoint", Rows::of([row]).into_owned(), |conn, rows| {
            Box::pin(conn.insert("audit_checkpoints", CHECKPOINT_COLUMNS, rows, " ON CONFLICT DO NOTHING"))
        })
        .await
    }

    async fn checkpoints(&self, chain: ChainId, after: u64, limit: u32) -> Stored<Vec<Signed>> {
        let q = sql(format!("SELECT {CHECKPOINT_COLUMNS} FROM audit_checkpoints WHERE chain = $1 AND seq > $2 ORDER BY seq LIMIT $3"));
        self.all("audit.checkpoints", q.bind(chain.blob()).bind(after).bind(limit), signed).await
    }

    async fn newest_checkpoints(&self) -> Stored<Vec<(ChainId, u64)>> {
        let q = sql("SELECT chain, MAX(seq) FROM audit_checkpoints GROUP BY chain");
        let of = |row: &Row| {
            let c = &mut Columns::of(row);
            Ok((c.id()?, c.unsigned()?))
        };
        self.all("audit.newest_checkpoints", q, of).await
    }

    async fn erase_person(&self, user: UserId, limit: u32) -> Stored<u64> {
        let q = sql("UPDATE audit SET person = NULL, detail = NULL WHERE id IN \
             (SELECT id FROM audit WHERE (\"user\" = $1 OR (\"user\" IS NULL AND resource_kind = 'user' AND resource_id = $3)) \
              AND (person IS NOT NULL OR detail IS NOT NULL) ORDER BY id LIMIT $2)");
        // Who tried to log in as them is known by that alone.
        self.execute("audit.erase_person", q.bind(user.blob()).bind(limit).bind(user.to_string())).await
    }
}

const CHECKPOINT_COLUMNS: &str = "chain, seq, hub, at, hash, key, signature";
