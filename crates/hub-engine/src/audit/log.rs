//! The log itself: what is left over is written, what was written is signed, and who may read it reads.

use super::{Action, Entry, now};
use crate::access::authorize_own;
use crate::error::Result;
use crate::ports::{self, Keyring, StoreError, Stored, Window, Witness};
use crate::records::AuditFilter;
use mesh_core::audit::{Checkpoint, Head, Outcome, Row, Signed};
use mesh_core::permission::{Caller, Permission};
use mesh_core::seal::{key_id, payload_type};
use mesh_core::{AuditId, ChainId, HubId, UserId, sha256};
use mesh_process::{SharedClock, Tasks};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A checkpoint is signed after so many rows, or so long after the first that was not.
pub const CHECKPOINT_ROWS: u64 = 1000;
pub const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);

/// Entries of calls that changed nothing are bounded, so that calls which are refused cannot fill the disk:
/// so many a minute for each user and outcome, all strangers together, and for refused reads. The rest is
/// counted, and the count is an entry.
const LEFT_A_MINUTE: u32 = 60;
const STRANGERS_A_MINUTE: u32 = 120;
const READS_A_MINUTE: u32 = 1;

/// What a call of [`Log::read`] asks for.
pub struct Reading {
    pub filter: AuditFilter,
    pub window: Window<AuditId>,
}

pub struct Log {
    pub store: Arc<dyn ports::Audit>,
    pub witness: Arc<dyn Witness>,
    pub keyring: Arc<dyn Keyring>,
    pub hub: HubId,
    pub clock: SharedClock,
    /// What is left by a caller who has gone is written here.
    pub work: Tasks,
    pub bounds: Bounds,
}

#[derive(Default)]
pub struct Bounds {
    minute: Mutex<(u64, Counts)>,
    signed: AtomicU64,
    pub(super) one: tokio::sync::Mutex<()>,
}

/// How many were written, and how many were not.
type Counts = BTreeMap<Whose, (u32, u64)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Whose {
    Stranger,
    User(UserId, Outcome),
    Reads(UserId),
}

impl Bounds {
    /// May this one be written? Gives what was held back in the minutes before.
    fn admit(&self, entry: Option<&Entry>, minute: u64) -> (bool, Vec<(Whose, u64)>) {
        let mut kept = self.minute.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held_back = vec![];
        if kept.0 != minute {
            let past = std::mem::replace(&mut *kept, (minute, BTreeMap::new())).1;
            held_back = past.into_iter().filter(|(_, (_, n))| *n > 0).map(|(whose, (_, n))| (whose, n)).collect();
        }
        let Some(entry) = entry else { return (false, held_back) };
        let (whose, most) = match entry.user {
            None => (Whose::Stranger, STRANGERS_A_MINUTE),
            Some(user) if entry.action == Action::Read => (Whose::Reads(user), READS_A_MINUTE),
            Some(user) => (Whose::User(user, entry.outcome), LEFT_A_MINUTE),
        };
        let (written, suppressed) = kept.1.entry(whose).or_default();
        let admitted = *written < most;
        if admitted {
            *written += 1
        } else {
            *suppressed += 1
        }
        (admitted, held_back)
    }
}

impl Log {
    /// The chain of a hub process: its own, and another one after each restore, since what came after the
    /// backup was written once already.
    pub fn chain_of(identity: &[u8; 16], incarnation: u32) -> ChainId {
        let mut text = b"cortex-mesh audit chain 1".to_vec();
        text.extend_from_slice(identity);
        text.extend_from_slice(&incarnation.to_be_bytes());
        let mut id: [u8; 16] = sha256(&text)[..16].try_into().expect("a digest has 32 bytes");
        // As a UUID of version 8, whose bits mean what its maker likes.
        (id[6], id[8]) = (id[6] & 0x0f | 0x80, id[8] & 0x3f | 0x80);
        ChainId::from_bytes(id)
    }

    /// Goes on with this process's chain, or begins it. After a restore its first entry says where the
    /// others ended. An error in what was there is told by the log, and stays to be found by a verification.
    pub async fn start(&self, identity: &[u8; 16], incarnation: u32, restored: bool) -> Result<()> {
        let chain = Self::chain_of(identity, incarnation);
        let action = if restored { Action::HubRestore } else { Action::AuditBegin };
        let mut first = Entry::of_hub(action, self.clock.now_ms()).with("incarnation", incarnation);
        first.resource = chain.into();
        for head in self.store.heads().await?.into_iter().filter(|head| head.chain != chain) {
            first.detail.insert(head.chain.to_string(), head.seq.to_string());
        }
        self.store.begin(chain, &first).await?;
        if let Some(last) = self.witnessed(chain).await? {
            let at = last.checkpoint.heads.iter().find(|h| h.chain == chain).copied().unwrap_or(Head::none(chain));
            let row = self.store.rows(chain, at.seq.saturating_sub(1), at.seq, 1).await?.pop();
            if row.is_none_or(|row| row.hash != at.hash) {
                tracing::error!(%chain, seq = at.seq, "the audit log is not the one that was signed: rows were cut off or changed");
            }
        }
        Ok(())
    }

    /// The newest checkpoint outside the database.
    async fn witnessed(&self, chain: ChainId) -> Stored<Option<Signed>> {
        let witness = self.witness.clone();
        let last = tokio::task::spawn_blocking(move || witness.read(chain).and_then(|all| all.last().transpose())).await;
        last.map_err(|e| StoreError::new("audit.witness", e))?.map_err(|e| StoreError::new("audit.witness", e))
    }

    /// Writes what no change took along, within bounds. The call is over: an error is for the log.
    pub(super) async fn leave(&self, entry: Entry) {
        let (admitted, held_back) = self.bounds.admit(Some(&entry), self.clock.steady().as_secs() / 60);
        self.tell(held_back).await;
        if admitted {
            self.append(&entry).await;
        } else {
            metrics::counter!("cortex_audit_suppressed_total").increment(1);
        }
    }
    pub(super) fn leave_later(self: &Arc<Self>, entry: Entry) {
        let own = self.clone();
        self.work.spawn("audit entry", async move { own.leave(entry).await });
    }
    async fn append(&self, entry: &Entry) {
        if let Err(error) = self.store.add_entry(entry).await {
            metrics::counter!("cortex_audit_lost_total").increment(1);
            tracing::error!(%error, action = entry.action.as_str(), "an audit entry could not be written");
        }
    }
    async fn tell(&self, held_back: Vec<(Whose, u64)>) {
        for (whose, n) in held_back {
            let mut entry = Entry::of_hub(Action::AuditSuppress, self.clock.now_ms()).with("entries", n);
            match whose {
                Whose::Stranger => entry = entry.with("of", "callers without credentials"),
                Whose::User(user, outcome) => {
                    entry.resource = user.into();
                    entry = entry.with("outcome", outcome.as_str());
                }
                Whose::Reads(user) => {
                    entry.resource = user.into();
                    entry = entry.with("of", "reads that were denied");
                }
            }
            self.append(&entry).await;
        }
    }

    /// Signs while the process runs. Runs until dropped.
    pub async fn run(&self) {
        let mut head = self.store.head();
        loop {
            let due = self.bounds.signed.load(Ordering::SeqCst) + CHECKPOINT_ROWS;
            tokio::select! {
                found = head.wait_for(|h| h.seq >= due) => if found.is_err() { return },
                () = tokio::time::sleep(CHECKPOINT_EVERY) => {}
            }
            self.round().await;
        }
    }

    /// What each minute brings: a word on what was held back, and a checkpoint if there is anything new.
    pub async fn round(&self) {
        let (_, held_back) = self.bounds.admit(None, self.clock.steady().as_secs() / 60);
        self.tell(held_back).await;
        if let Err(error) = self.checkpoint().await {
            tracing::error!(%error, "a checkpoint of the audit log could not be kept; it is tried again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Signs where the chain stands, outside the database first.
    pub async fn checkpoint(&self) -> Result<()> {
        let head = *self.store.head().borrow();
        if head.seq == 0 || head.seq == self.bounds.signed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let signed = self.sign(vec![head]);
        let (witness, copy) = (self.witness.clone(), signed.clone());
        let noted = tokio::task::spawn_blocking(move || witness.note(&copy)).await.map_err(|e| StoreError::new("audit.witness", e))?;
        noted.map_err(|e| StoreError::new("audit.witness", e))?;
        self.store.add_checkpoint(&signed).await?;
        self.bounds.signed.store(head.seq, Ordering::SeqCst);
        Ok(())
    }

    pub(super) fn sign(&self, heads: Vec<Head>) -> Signed {
        let checkpoint = Checkpoint { hub: self.hub, at: self.clock.now_ms(), heads };
        let (by, signature) = self.keyring.sign(payload_type::AUDIT, &checkpoint.encode());
        let key = self.keyring.signers().into_iter().find(|k| key_id(k) == by).unwrap_or_default();
        Signed { checkpoint, key, signature: signature.to_vec() }
    }

    /// Entries, newest first. That they were read is written before they are shown.
    pub async fn read(&self, caller: &Caller, reading: &Reading) -> Result<Vec<Row>> {
        super::doing(caller, Action::AuditRead);
        authorize_own(caller, Permission::SystemAudit)?;
        if let Some(user) = reading.filter.user {
            super::about(user);
        }
        if let Some(session) = reading.filter.session {
            super::about(session);
        }
        now().await?;
        Ok(self.store.entries(&reading.filter, reading.window).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_bounded_counted_and_nobody_elses_trouble() {
        let bounds = Bounds::default();
        let (ada, eve) = (UserId::from_bytes([1; 16]), UserId::from_bytes([2; 16]));
        let entry = |user, outcome, action| Entry { user, outcome, ..Entry::of_hub(action, 0) };
        let refused = entry(Some(eve), Outcome::Denied, Action::TaskCancel);
        let admitted = |e: &Entry, n: u32| (0..n).filter(|_| bounds.admit(Some(e), 7).0).count();
        assert_eq!(admitted(&refused, 10_000), 60);
        assert_eq!(admitted(&entry(None, Outcome::Denied, Action::Login), 10_000), 120);
        assert_eq!(admitted(&entry(Some(eve), Outcome::Denied, Action::Read), 50), 1);
        assert_eq!(admitted(&entry(Some(ada), Outcome::Denied, Action::TaskCancel), 1), 1, "another's flood is not hers");
        assert_eq!(admitted(&entry(Some(eve), Outcome::Ok, Action::TaskInput), 1), 1, "nor does one outcome hide another");
        let (_, held_back) = bounds.admit(None, 8);
        assert_eq!(held_back, [(Whose::Stranger, 9880), (Whose::User(eve, Outcome::Denied), 9940), (Whose::Reads(eve), 49)]);
        assert_eq!(bounds.admit(Some(&refused), 8), (true, vec![]), "told once");
    }

    #[test]
    fn a_chain_is_of_one_process_and_one_incarnation() {
        let all = [Log::chain_of(&[1; 16], 1), Log::chain_of(&[1; 16], 2), Log::chain_of(&[2; 16], 1)];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
        assert_eq!(Log::chain_of(&[1; 16], 1), all[0]);
        assert!(all[0].to_string().parse::<ChainId>().is_ok());
    }
}
