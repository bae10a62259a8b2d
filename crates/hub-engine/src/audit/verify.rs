//! Walking over the chains from their first row to their last: to say whether they are what was written,
//! and to give them out. Holds one page at a time.

use super::{Action, Log, now};
use crate::access::authorize_own;
use crate::error::{Error, Result};
use crate::ports::StoreError;
use mesh_core::ChainId;
use mesh_core::audit::{Detail, Flaw, Head, Row, Signed, follow};
use mesh_core::permission::{Caller, Permission};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Rows, and checkpoints, that one read brings.
const PAGE: u32 = 2000;
/// Checkpoints from outside the database that wait to be compared.
const WITNESSED: usize = 256;

/// What became of a verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub rows: u64,
    pub heads: Vec<HeadReport>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadReport {
    pub head: Head,
    /// The newest row that is signed; 0 for none.
    pub signed: u64,
    /// The first bad row, and what is wrong with it.
    pub flaw: Option<(u64, Flaw)>,
    /// A restore went back to where this chain ends.
    pub restored: bool,
}

impl HeadReport {
    pub fn is_good(&self) -> bool {
        self.flaw.is_none()
    }
}

impl Report {
    pub fn ok(&self) -> bool {
        self.heads.iter().all(HeadReport::is_good)
    }
    pub fn first_bad(&self) -> Option<u64> {
        self.heads.iter().filter_map(|h| h.flaw.map(|(seq, _)| seq)).min()
    }
}

/// One chain, as far as it was walked.
struct Walk {
    log: Arc<Log>,
    at: Head,
    end: Head,
    rows: u64,
    signed: u64,
    flaw: Option<(u64, Flaw)>,
    kept: Kept,
    /// Checkpoints from outside the database.
    witnessed: mpsc::Receiver<std::io::Result<Signed>>,
    waiting: Option<Head>,
    last_witnessed: u64,
}

/// Checkpoints in the database, up to the newest that there was before the walk began.
struct Kept {
    page: VecDeque<Signed>,
    after: u64,
    to: u64,
}

impl Walk {
    async fn begin(log: &Arc<Log>, end: Head, to: u64, bytes: u64) -> Self {
        let (tell, witnessed) = mpsc::channel(WITNESSED);
        let (witness, chain) = (log.witness.clone(), end.chain);
        // It blocks, and ends with whoever listens.
        tokio::task::spawn_blocking(move || match witness.read_to(chain, bytes) {
            Ok(all) => {
                for signed in all {
                    if tell.blocking_send(signed).is_err() {
                        return;
                    }
                }
            }
            Err(error) => drop(tell.blocking_send(Err(error))),
        });
        let kept = Kept { page: VecDeque::new(), after: 0, to };
        let (log, at) = (log.clone(), Head::none(end.chain));
        let mut walk = Self { log, at, end, rows: 0, signed: 0, flaw: None, kept, witnessed, waiting: None, last_witnessed: 0 };
        walk.next_witnessed().await;
        walk
    }

    fn bad(&mut self, seq: u64, flaw: Flaw) {
        self.flaw.get_or_insert((seq, flaw));
    }

    /// Looks for the next checkpoint outside the database.
    async fn next_witnessed(&mut self) {
        let chain = self.end.chain;
        self.waiting = match self.witnessed.recv().await {
            None => None,
            Some(Ok(signed)) if signed.is_by(&self.log.keyring.signers()) && signed.checkpoint.hub == self.log.hub => {
                signed.checkpoint.heads.iter().find(|h| h.chain == chain).copied()
            }
            Some(_) => {
                self.bad(self.at.seq, Flaw::Forged);
                None
            }
        };
        if let Some(head) = self.waiting {
            if head.seq < self.last_witnessed {
                // Somebody put an older database in place: what was signed after it was taken back.
                self.bad(head.seq, Flaw::Checkpoint);
            }
            self.last_witnessed = head.seq;
        }
    }

    async fn kept(&mut self) -> Result<Option<&Signed>> {
        if self.kept.page.is_empty() && self.kept.after < self.kept.to {
            let page = self.log.store.checkpoints(self.end.chain, self.kept.after, PAGE).await?;
            let last = page.last().and_then(|s| s.checkpoint.heads.first()).map(|h| h.seq);
            self.kept.after = last.unwrap_or(self.kept.to);
            let to = self.kept.to;
            self.kept.page.extend(page.into_iter().filter(|s| s.checkpoint.heads.first().is_some_and(|h| h.seq <= to)));
        }
        Ok(self.kept.page.front())
    }

    /// Compares where the walk stands with what was signed there.
    async fn compare(&mut self) -> Result<()> {
        let at = self.at;
        while let Some(head) = self.waiting.filter(|h| h.seq <= at.seq) {
            if head.seq == at.seq && head.hash != at.hash {
                self.bad(at.seq, Flaw::Checkpoint);
            }
            self.signed = self.signed.max(head.seq);
            self.next_witnessed().await;
        }
        let (keys, hub) = (self.log.keyring.signers(), self.log.hub);
        while let Some(signed) = self.kept().await? {
            let head = signed.checkpoint.heads.first().copied().unwrap_or(at);
            if head.seq > at.seq {
                break;
            }
            let genuine = signed.is_by(&keys) && signed.checkpoint.hub == hub && signed.checkpoint.heads.len() == 1;
            if !genuine {
                self.bad(head.seq, Flaw::Forged);
            } else if head.seq == at.seq && head.hash != at.hash {
                self.bad(at.seq, Flaw::Checkpoint);
            }
            self.signed = self.signed.max(head.seq);
            self.kept.page.pop_front();
        }
        Ok(())
    }

    /// The next good rows; none at the end, or where something is wrong.
    async fn next(&mut self) -> Result<Option<Vec<Row>>> {
        if self.flaw.is_some() {
            return Ok(None);
        }
        let mut page = match self.at.seq < self.end.seq {
            true => self.log.store.rows(self.end.chain, self.at.seq, self.end.seq, PAGE).await?,
            false => vec![],
        };
        if page.is_empty() {
            if self.at.seq < self.end.seq {
                self.bad(self.at.seq + 1, Flaw::Order);
            }
            // What was signed and is not here.
            let kept = self.kept().await?.map_or(0, |s| s.checkpoint.heads.first().map_or(0, |h| h.seq));
            if kept.max(self.waiting.map_or(0, |h| h.seq)) > self.at.seq {
                self.bad(self.at.seq + 1, Flaw::Cut);
            }
            return Ok(None);
        }
        let next_kept = self.kept().await?.map_or(u64::MAX, |s| s.checkpoint.heads.first().map_or(0, |h| h.seq));
        let mut next_signed = next_kept.min(self.waiting.map_or(u64::MAX, |h| h.seq));
        for n in 0..page.len() {
            match follow(&self.at, &page[n]) {
                Ok(head) => self.at = head,
                Err(flaw) => {
                    self.bad(self.at.seq + 1, flaw);
                    page.truncate(n);
                    break;
                }
            }
            if self.at.seq >= next_signed {
                self.compare().await?;
                if self.flaw.is_some() {
                    page.truncate(n + 1);
                    break;
                }
                let kept = self.kept().await?.map_or(u64::MAX, |s| s.checkpoint.heads.first().map_or(0, |h| h.seq));
                next_signed = kept.min(self.waiting.map_or(u64::MAX, |h| h.seq));
            }
        }
        self.rows += page.len() as u64;
        Ok(Some(page).filter(|p| !p.is_empty()))
    }

    fn report(&self) -> HeadReport {
        HeadReport { head: self.at, signed: self.signed, flaw: self.flaw, restored: false }
    }
}

/// The whole log, chain by chain, checked on the way.
pub struct Export {
    log: Arc<Log>,
    left: VecDeque<(Head, u64, u64)>,
    walk: Option<Walk>,
    done: Vec<HeadReport>,
    rows: u64,
    /// Where restores said that chains ended.
    ends: BTreeMap<ChainId, u64>,
}

impl Export {
    async fn begin(log: &Arc<Log>) -> Result<Self> {
        let unreadable = |e| Error::from(StoreError::new("audit.witness", e));
        // First what is signed, then what is there: a checkpoint that comes between signs more than is looked at.
        let witness = log.witness.clone();
        let sizes = tokio::task::spawn_blocking(move || witness.chains()).await.map_err(|e| unreadable(std::io::Error::other(e)))?;
        let mut sizes: BTreeMap<ChainId, u64> = sizes.map_err(unreadable)?.into_iter().collect();
        let newest: BTreeMap<ChainId, u64> = log.store.newest_checkpoints().await?.into_iter().collect();
        let mut heads: BTreeMap<ChainId, Head> = log.store.heads().await?.into_iter().map(|h| (h.chain, h)).collect();
        for chain in sizes.keys().chain(newest.keys()) {
            heads.entry(*chain).or_insert(Head::none(*chain));
        }
        let left = heads.into_values().map(|h| (h, newest.get(&h.chain).copied().unwrap_or(0), sizes.remove(&h.chain).unwrap_or(0)));
        Ok(Self { log: log.clone(), left: left.collect(), walk: None, done: vec![], rows: 0, ends: BTreeMap::new() })
    }

    /// The next rows; none when all chains are through. A chain that is not good ends where it is not.
    pub async fn next(&mut self) -> Result<Option<Vec<Row>>> {
        loop {
            let Some(walk) = &mut self.walk else {
                let Some((head, newest, bytes)) = self.left.pop_front() else { return Ok(None) };
                self.walk = Some(Walk::begin(&self.log, head, newest, bytes).await);
                continue;
            };
            if let Some(page) = walk.next().await? {
                for row in page.iter().filter(|r| r.seq == 1 && r.action == Action::HubRestore.as_str()) {
                    let detail = row.detail.as_deref().and_then(|d| Detail::decode(d).ok()).map_or(Detail::default(), |(d, _)| d);
                    self.ends.extend(
                        detail.0.iter().filter_map(|(chain, seq)| Some((chain.parse::<ChainId>().ok()?, seq.parse::<u64>().ok()?))),
                    );
                }
                return Ok(Some(page));
            }
            self.rows += walk.rows;
            self.done.push(walk.report());
            self.walk = None;
        }
    }

    /// Once all is through.
    pub fn report(&self) -> Report {
        let explained = |mut h: HeadReport| {
            h.restored = self.ends.get(&h.head.chain) == Some(&h.head.seq);
            // What was signed after the backup is in the one that was put aside.
            h.flaw = h.flaw.filter(|(_, flaw)| !(h.restored && *flaw == Flaw::Cut));
            h
        };
        Report { rows: self.rows, heads: self.done.iter().cloned().map(explained).collect() }
    }

    /// The signature over all of it; none when something is wrong with it.
    pub fn signed(&self) -> Option<Signed> {
        let report = self.report();
        report.ok().then(|| self.log.sign(report.heads.iter().map(|h| h.head).collect()))
    }
}

impl Log {
    pub async fn verify(self: &Arc<Self>, caller: &Caller) -> Result<Report> {
        super::doing(caller, Action::AuditVerify);
        authorize_own(caller, Permission::SystemAudit)?;
        now().await?;
        self.verified().await
    }

    /// The same for the hub itself.
    pub async fn verified(self: &Arc<Self>) -> Result<Report> {
        let busy = |_| Error::Unavailable { code: "busy", detail: "the audit log is being verified; try again when that is done".into() };
        let _one = self.bounds.one.try_lock().map_err(busy)?;
        let mut all = Export::begin(self).await?;
        while all.next().await?.is_some() {}
        Ok(all.report())
    }

    pub async fn export(self: &Arc<Self>, caller: &Caller) -> Result<Export> {
        super::doing(caller, Action::AuditExport);
        authorize_own(caller, Permission::SystemAudit)?;
        now().await?;
        Export::begin(self).await
    }
}
