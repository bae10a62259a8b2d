//! The audit log in memory. A write of another port takes no entry along: it is left to the end of its call.

use super::MemoryStore;
use async_trait::async_trait;
use hub_engine::audit::Entry;
use hub_engine::ports::{Audit, StoreError, Stored, Window};
use hub_engine::records::AuditFilter;
use mesh_core::audit::{Head, Row, Signed};
use mesh_core::{AuditId, ChainId, SessionId, UserId};
use std::collections::BTreeMap;
use tokio::sync::watch;

#[derive(Debug, Clone)]
pub(super) struct Rows {
    chain: Option<ChainId>,
    rows: BTreeMap<(ChainId, u64), Row>,
    checkpoints: BTreeMap<(ChainId, u64), Signed>,
    head: watch::Sender<Head>,
}

impl Default for Rows {
    fn default() -> Self {
        let head = watch::Sender::new(Head::none(ChainId::from_bytes([0; 16])));
        Self { chain: None, rows: BTreeMap::new(), checkpoints: BTreeMap::new(), head }
    }
}

impl Rows {
    fn end(&self, chain: ChainId) -> Head {
        self.rows.range((chain, 0)..=(chain, u64::MAX)).next_back().map_or(Head::none(chain), |(_, row)| row.head())
    }
    /// Erases the details of up to `limit` entries of a session.
    pub(super) fn erase_session(&mut self, session: SessionId, limit: u32) -> u64 {
        let of = self.rows.values_mut().filter(|r| r.session == Some(session) && r.detail.is_some());
        of.take(limit as usize).map(|r| r.detail = None).count() as u64
    }
}

fn shown(f: &AuditFilter, r: &Row) -> bool {
    f.kind.is_none_or(|k| k.as_str() == r.kind)
        && f.user.is_none_or(|u| r.user == Some(u))
        && f.session.is_none_or(|s| r.session == Some(s))
        && f.resource.as_ref().is_none_or(|id| *id == r.resource_id)
        && f.outcome.is_none_or(|o| o.as_str() == r.outcome)
        && f.door.as_ref().is_none_or(|d| *d == r.door)
        && f.since.is_none_or(|t| r.at >= t)
        && f.until.is_none_or(|t| r.at < t)
}

#[async_trait]
impl Audit for MemoryStore {
    async fn begin(&self, chain: ChainId, first: &Entry) -> Stored<()> {
        let new = {
            let audit = &mut self.state().audit;
            if *audit.chain.get_or_insert(chain) != chain {
                return Err(StoreError::new("audit.begin", "another chain was begun"));
            }
            let end = audit.end(chain);
            audit.head.send_replace(end);
            end.seq == 0
        };
        if new { self.add_entry(first).await } else { Ok(()) }
    }

    async fn add_entry(&self, entry: &Entry) -> Stored<()> {
        let state = &mut *self.state();
        let chain = state.audit.chain.ok_or_else(|| StoreError::new("audit.append", "the audit log was not begun"))?;
        let head = state.audit.end(chain);
        let name = entry.user.and_then(|id| state.users.get(&id)).map_or("", |u| u.username.as_str());
        let row = entry.row(chain, head.seq + 1, head.hash, name);
        state.audit.head.send_replace(row.head());
        state.audit.rows.insert((chain, row.seq), row);
        Ok(())
    }

    fn head(&self) -> watch::Receiver<Head> {
        self.state().audit.head.subscribe()
    }

    async fn heads(&self) -> Stored<Vec<Head>> {
        let audit = &self.state().audit;
        let ends: BTreeMap<ChainId, Head> = audit.rows.values().map(|r| (r.chain, r.head())).collect();
        Ok(ends.into_values().collect())
    }

    async fn rows(&self, chain: ChainId, after: u64, to: u64, limit: u32) -> Stored<Vec<Row>> {
        let audit = &self.state().audit;
        let rows = audit.rows.values().filter(|r| r.chain == chain && r.seq > after && r.seq <= to);
        Ok(rows.take(limit as usize).cloned().collect())
    }

    async fn entries(&self, filter: &AuditFilter, window: Window<AuditId>) -> Stored<Vec<Row>> {
        let audit = &self.state().audit;
        let by_id: BTreeMap<AuditId, Row> = audit.rows.values().map(|r| (r.id, r.clone())).collect();
        Ok(super::page(&by_id, window, |r| shown(filter, r)))
    }

    async fn add_checkpoint(&self, signed: &Signed) -> Stored<()> {
        let [head] = signed.checkpoint.heads.as_slice() else {
            return Err(StoreError::new("audit.add_checkpoint", "a checkpoint that is kept is of one chain"));
        };
        self.state().audit.checkpoints.entry((head.chain, head.seq)).or_insert_with(|| signed.clone());
        Ok(())
    }

    async fn checkpoints(&self, chain: ChainId, after: u64, limit: u32) -> Stored<Vec<Signed>> {
        let audit = &self.state().audit;
        let beyond = audit.checkpoints.iter().filter(|((c, seq), _)| *c == chain && *seq > after);
        Ok(beyond.take(limit as usize).map(|(_, signed)| signed.clone()).collect())
    }

    async fn newest_checkpoints(&self) -> Stored<Vec<(ChainId, u64)>> {
        let newest: BTreeMap<ChainId, u64> = self.state().audit.checkpoints.keys().copied().collect();
        Ok(newest.into_iter().collect())
    }

    async fn erase_person(&self, user: UserId, limit: u32) -> Stored<u64> {
        let audit = &mut self.state().audit;
        let tried = user.to_string();
        let theirs = |r: &Row| r.user == Some(user) || (r.user.is_none() && r.resource_kind == "user" && r.resource_id == tried);
        let of = audit.rows.values_mut().filter(|r| theirs(r) && (r.person.is_some() || r.detail.is_some()));
        Ok(of.take(limit as usize).map(|r| (r.person, r.detail) = (None, None)).count() as u64)
    }
}
