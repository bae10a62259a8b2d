//! What a node says about its attempts, and what a hub owes it: the far half of MESH's rules.
//!
//! Every entry takes the node's [`Caller`], fenced by the generation of its link. What comes late, or
//! for an attempt that another took over, changes nothing and is acknowledged all the same.

use crate::error::{Error, Result};
use crate::links::{Link, LinkCommand, Links, Told};
use crate::nodes;
use crate::pool::Pool;
use crate::ports::{Applied, Besides, Journal, NodeDirectory, Output};
use crate::records::{Node, OutputFrame, Task};
use crate::runs::RUN_OUTPUT_BYTES;
use mesh_core::ceiling::Closed;
use mesh_core::output::Digests;
use mesh_core::permission::Caller;
use mesh_core::task::{Action, AttemptNo, Event, MAYBE_RAN, Outcome, TaskState};
use mesh_core::{NodeId, SpoolId, TaskId};
use mesh_process::{CancellationToken, SharedClock};
use std::sync::Arc;
use tokio::sync::mpsc;

/// What a hello says.
#[derive(Debug)]
pub struct Hello {
    pub spool: SpoolId,
    pub max_tasks: u32,
    /// Orders that it keeps without leave to start them.
    pub keeps: u32,
    /// It takes no work.
    pub closed: Option<Closed>,
    pub attempts: Vec<(TaskId, AttemptNo)>,
}

/// What a welcome answers.
#[derive(Debug)]
pub struct Welcome {
    pub generation: u64,
    /// Keeps the link in place; dropped, the node is offline.
    pub presence: Presence,
    /// Cancelled when the node is no longer this hub's: its streams end at once.
    pub cut: CancellationToken,
    /// How far the output of each known attempt is durable here.
    pub marks: Vec<(TaskId, AttemptNo, u64)>,
}

/// A link in its place. However its conversation ends, dropping this takes the link away.
#[derive(Debug)]
pub struct Presence {
    links: Arc<Links>,
    node: NodeId,
    generation: u64,
}

impl Drop for Presence {
    fn drop(&mut self) {
        if self.links.close(self.node, self.generation) {
            tracing::info!(node = %self.node, generation = self.generation, "node offline");
        }
    }
}

/// A result as a node reports it.
#[derive(Debug)]
pub struct Reported {
    pub task: TaskId,
    pub attempt: AttemptNo,
    pub outcome: Outcome,
    pub last_seq: u64,
    pub result: Option<Vec<u8>>,
    pub sandbox_applied: Option<String>,
    /// None from an older node, and where nobody knows the whole output.
    pub digests: Option<Digests>,
}

/// The code of a result whose digests are not those of the output that came.
pub const DIGEST_MISMATCH: &str = "digest_mismatch";

/// Attempts that one hello may name; more than a node can hold.
const MAX_KNOWN: usize = 10_000;

pub struct Delivery {
    pub journal: Arc<dyn Journal>,
    pub output: Arc<dyn Output>,
    pub nodes: Arc<dyn NodeDirectory>,
    pub links: Arc<Links>,
    pub pool: Arc<Pool>,
    pub clock: SharedClock,
    pub output_bytes: u64,
}

/// Is this the newest attempt of an open task, and the node's?
/// A machine's own number of tasks at once, bounded to what the pool can count with.
fn own_tasks(told: u32) -> u32 {
    told.clamp(1, 1024)
}

fn is_ours(task: &Task, node: NodeId, attempt: AttemptNo) -> bool {
    let open = !task.progress.state.is_final() && task.progress.state != TaskState::Pending;
    open && task.progress.attempt.as_ref().is_some_and(|a| a.no == attempt && a.node == node)
}

impl Delivery {
    /// Accepts a link: raises the generation, puts it in place of an older one, and brings the node and
    /// the journal to the same view: what the node does not know is sent (again), what it should not
    /// run is cancelled, what another spool was granted is lost.
    pub async fn open_link(&self, node: &Node, hello: Hello, commands: mpsc::Sender<LinkCommand>) -> Result<Welcome> {
        if hello.attempts.len() > MAX_KNOWN {
            return Err(Error::invalid("too_many", "a hello names more attempts than a node can hold"));
        }
        let held_back = self.links.holds_back();
        let generation = self.nodes.raise_generation(node.id, self.clock.now_ms()).await?.ok_or_else(nodes::revoked)?;
        let mut marks = vec![];
        for (task, attempt) in &hello.attempts {
            marks.push((*task, *attempt, self.output.totals(*task, *attempt).await?.durable_seq));
        }
        // The queue is in place before the held attempts are looked at: what is granted from now on
        // goes to this link by itself, what was granted before is sent below.
        let cut = CancellationToken::new();
        let own_tasks = own_tasks(hello.max_tasks);
        let in_place = self.links.open(Link {
            node: node.id,
            owner: node.owner,
            generation,
            spool: hello.spool,
            own_tasks,
            task_limit: None,
            max_tasks: own_tasks,
            closed: hello.closed,
            keeps: hello.keeps,
            offers: Arc::new(node.offers()),
            // Until the registry was asked below: people may have changed the node since it was read.
            draining: true,
            epoch: 0,
            cut: cut.clone(),
            commands,
            health: None,
            rtt: None,
        });
        if !in_place {
            let retired = self.links.is_retired(node.id);
            return Err(if retired { nodes::revoked() } else { Error::conflict("superseded", "a newer link of this node was accepted") });
        }
        let presence = Presence { links: self.links.clone(), node: node.id, generation };
        let now = self.nodes.node(node.id).await?.filter(|n| n.revoked_at.is_none()).ok_or_else(nodes::revoked)?;
        self.links.set(&now);
        if held_back {
            let mut told = vec![];
            for (task, attempt) in hello.attempts {
                let known = self.journal.narrow(task).await?;
                told.push(Told { task, attempt, known: known.is_some_and(|t| is_ours(&t, node.id, attempt)) });
            }
            if !self.links.note_told(node.id, told) {
                return Err(Error::Unavailable { code: "restored", detail: "the hub goes on at this moment; connect again".into() });
            }
            tracing::info!(node = %node.id, "the hub was restored and holds back: the link is accepted and nothing is done with it");
            return Ok(Welcome { generation, presence, cut, marks });
        }
        for (id, attempt) in self.links.held(node.id) {
            let known = hello.attempts.contains(&(id, attempt));
            self.reconcile(node.id, id, attempt, hello.spool, known).await?;
        }
        for (task, attempt) in hello.attempts {
            if !self.holds(node.id, task, attempt).await? {
                // Ended, superseded or never ours: the node ends it and reports, and is acknowledged.
                self.links.send(node.id, LinkCommand::Cancel { task, attempt });
            }
        }
        self.pool.wake();
        Ok(Welcome { generation, presence, cut, marks })
    }

    async fn reconcile(&self, node: NodeId, id: TaskId, attempt: AttemptNo, spool: SpoolId, known: bool) -> Result<()> {
        let Some(task) = self.journal.task(id).await? else { return Ok(()) };
        let open = !task.progress.state.is_final();
        let newest = task.progress.attempt.as_ref();
        if open && newest.is_none_or(|a| a.no < attempt || (a.no == attempt && a.granted.is_none())) {
            // Its commit is under way; the order follows it to whichever link is here then.
            return Ok(());
        }
        let Some(a) = newest.filter(|a| open && task.progress.state != TaskState::Pending && a.no == attempt && a.node == node) else {
            self.links.release(node, id);
            return Ok(());
        };
        if a.granted != Some(spool) {
            // The memory that this attempt was granted to is gone: nobody can say that it never ran.
            let outcome = Outcome::Lost { detail: MAYBE_RAN.into() };
            return self.end(id, Event::Ended { attempt, outcome }, Besides::default()).await;
        }
        if !known && self.pool.is_of_before(attempt) {
            // Granted before a restore. The node may have run and forgotten it since: it is not sent again.
            let outcome = Outcome::Lost { detail: MAYBE_RAN.into() };
            return self.end(id, Event::Ended { attempt, outcome }, Besides::default()).await;
        }
        if !known && !self.links.copies().is_foreign(node) {
            let copies = self.links.copies();
            if copies.is_copied(node) || (task.progress.state == TaskState::Running && !copies.continues(node)) {
                // It was started there, and that memory has not been released from it: this is an older copy. Or
                // it went to the machine before this one.
                let outcome = Outcome::Lost { detail: MAYBE_RAN.into() };
                return self.end(id, Event::Ended { attempt, outcome }, Besides::default()).await;
            }
            self.pool.send_order(&task, node, attempt);
        }
        if task.progress.cancel.is_some() {
            // That of an agent may be ended by force.
            self.pool.watchers.runs.stepped(&task);
            self.links.send(node, LinkCommand::Cancel { task: id, attempt });
        }
        Ok(())
    }

    /// Is this the newest attempt, open, and of this node? What is not known here is asked of the
    /// journal, which alone may call a word of a node late.
    async fn holds(&self, node: NodeId, task: TaskId, attempt: AttemptNo) -> Result<bool> {
        if self.links.holds(node, task, attempt) {
            return Ok(true);
        }
        let Some(t) = self.journal.task(task).await? else {
            // A restored hub has forgotten what it gave out.
            if !self.pool.is_of_before(attempt) {
                self.links.refuse(node, "unknown", &format_args!("{task} is not known"));
            }
            return Ok(false);
        };
        let newest = t.progress.attempt.as_ref();
        if is_ours(&t, node, attempt) {
            if newest.is_some_and(|a| a.granted.is_some()) {
                self.links.hold(node, &t, attempt);
            }
            return Ok(true);
        }
        if !self.pool.is_of_before(attempt) && newest.is_none_or(|a| a.no < attempt || (a.no == attempt && a.node != node)) {
            // Anything else is a late word about what was once the node's.
            self.links.refuse(node, "foreign", &format_args!("{task} attempt {} was never this node's", attempt.0));
        }
        Ok(false)
    }

    /// The machine's owner changed what it takes: from now on nothing else is given to it.
    pub fn standing(&self, caller: &Caller, max_tasks: u32, closed: Option<Closed>) -> Result<()> {
        let node = self.fence(caller)?;
        let Caller::Node { generation, .. } = caller else { return Ok(()) };
        if self.links.set_standing(node, *generation, own_tasks(max_tasks), closed) {
            tracing::debug!(%node, max_tasks, closed = closed.map(Closed::as_str), "the owner of a node changed what it takes");
            self.pool.wake();
        }
        Ok(())
    }

    pub(crate) fn fence(&self, caller: &Caller) -> Result<NodeId> {
        match caller {
            Caller::Node { node, generation } if self.links.is_current(*node, *generation) => Ok(*node),
            Caller::Node { .. } => Err(Error::conflict("superseded", "a newer link of this node was accepted")),
            _ => Err(Error::Forbidden("only a node does this".into())),
        }
    }

    pub async fn started(&self, caller: &Caller, task: TaskId, attempt: AttemptNo) -> Result<()> {
        let node = self.fence(caller)?;
        // Said again on the next link.
        if !self.links.holds_back() && self.holds(node, task, attempt).await? {
            // A repeated start is refused by the transition, and changes nothing.
            self.pool.apply(task, &Event::Started { attempt }, Besides::default()).await?;
        }
        Ok(())
    }

    /// The node keeps an attempt that is not granted.
    pub fn kept(&self, caller: &Caller, task: TaskId, attempt: AttemptNo) -> Result<()> {
        let node = self.fence(caller)?;
        if self.links.holds_back() {
            return Ok(());
        }
        if !self.pool.kept(node, task, attempt) && !self.links.holds(node, task, attempt) {
            self.links.send(node, LinkCommand::Cancel { task, attempt });
        }
        Ok(())
    }

    /// The node has a place for an attempt that it keeps; `ended` are over there, though their results
    /// are not here yet. Whoever is next gets the place; it need not be this one.
    pub async fn ready(&self, caller: &Caller, task: TaskId, attempt: AttemptNo, ended: &[(TaskId, AttemptNo)]) -> Result<()> {
        let node = self.fence(caller)?;
        if self.links.holds_back() {
            return Ok(());
        }
        for (task, attempt) in ended {
            self.links.over(node, *task, *attempt);
        }
        if self.pool.kept(node, task, attempt) {
            self.pool.place_free(node);
        } else if self.links.holds(node, task, attempt) {
            // It may start, and the word of that crossed with this one.
            if let Some(t) = self.journal.task(task).await? {
                self.pool.send_order(&t, node, attempt);
            }
        } else {
            self.links.send(node, LinkCommand::Cancel { task, attempt });
            if !ended.is_empty() {
                self.pool.place_free(node);
            }
        }
        Ok(())
    }

    /// Makes frames durable; gives how far the node may forget. `None`: a frame between is missing.
    pub async fn append(&self, caller: &Caller, task: TaskId, attempt: AttemptNo, frames: Vec<OutputFrame>) -> Result<Option<u64>> {
        let node = self.fence(caller)?;
        let last = frames.last().map_or(0, |f| f.seq);
        if self.links.holds_back() {
            // Nothing may be forgotten by the node: another backup may know this attempt.
            return Ok(Some(0));
        }
        if !self.holds(node, task, attempt).await? {
            return Ok(Some(last));
        }
        if let Some(first) = frames.first().filter(|_| self.pool.is_of_before(attempt)) {
            // What a link of before the word left out is not gone: it comes again on the next.
            self.fence(caller)?;
            // What the hub had taken after the backup is gone on both sides.
            self.output.give_up(task, attempt, first.seq.saturating_sub(1)).await?;
        }
        let gap = || self.links.refuse(node, "gap", &format_args!("output of {task} has a gap before {last}"));
        // First: what is said to be durable is never asked for again.
        let keep = match self.pool.watchers.runs.wrote(task, attempt, &frames, self.pool.is_of_before(attempt)).await? {
            None => self.output_bytes,
            Some(Some(_)) => self.output_bytes.min(RUN_OUTPUT_BYTES),
            Some(None) => {
                gap();
                return Ok(None);
            }
        };
        let totals = self.output.append(task, attempt, frames, keep).await?;
        if totals.is_none() {
            gap();
        }
        self.pool.watchers.notify(task);
        Ok(totals.map(|t| t.durable_seq))
    }

    /// Records the end of an attempt and acknowledges it.
    pub async fn result(&self, caller: &Caller, r: Reported) -> Result<()> {
        let node = self.fence(caller)?;
        if self.links.holds_back() {
            // Not acknowledged, so that the node says it again when the hub goes on.
            return Ok(());
        }
        if self.holds(node, r.task, r.attempt).await? {
            if self.pool.is_of_before(r.attempt) {
                // A node gives its result when all of its output was taken: what is missing is gone.
                self.output.give_up(r.task, r.attempt, r.last_seq).await?;
            }
            let durable = if r.last_seq == 0 { 0 } else { self.output.totals(r.task, r.attempt).await?.durable_seq };
            if r.last_seq > durable {
                self.links.refuse(node, "output_missing", &format_args!("{} names output {} and {durable} is here", r.task, r.last_seq));
                return Err(Error::invalid("output_missing", format!("the result names output {} and {durable} is here", r.last_seq)));
            }
            if let Some(told) = &r.digests {
                self.compare(node, &r, told).await?;
            }
            let besides = Besides { result: r.result, sandbox_applied: r.sandbox_applied, digests: r.digests, signed: None };
            self.end(r.task, Event::Ended { attempt: r.attempt, outcome: r.outcome }, besides).await?;
        }
        self.links.send(node, LinkCommand::ResultAck { task: r.task, attempt: r.attempt });
        Ok(())
    }

    /// Is the output that came the one that was written? Of what is not kept nobody can say.
    async fn compare(&self, node: NodeId, r: &Reported, told: &Digests) -> Result<()> {
        let came = if r.last_seq == 0 { Some(Digests::of_nothing()) } else { self.output.digests(r.task, r.attempt).await? };
        if came.is_none_or(|came| came == *told) {
            return Ok(());
        }
        metrics::counter!("cortex_refused_reports_total", "what" => "digest").increment(1);
        tracing::error!(%node, task = %r.task, attempt = r.attempt.0, "a result was refused: its digests are not those of the output that came");
        Err(Error::invalid(DIGEST_MISMATCH, format!("the output of {} that came is not the one that its result speaks of", r.task)))
    }

    async fn end(&self, id: TaskId, event: Event, besides: Besides) -> Result<()> {
        match self.pool.apply(id, &event, besides).await? {
            Applied::Done(task, actions) => {
                debug_assert!(actions.iter().any(|a| matches!(a, Action::Release { .. })));
                self.pool.perform(&task, &actions);
            }
            Applied::Refused(refused) => tracing::debug!(task = %id, %refused, "a late word of a node changes nothing"),
            Applied::Unknown => tracing::debug!(task = %id, "a node speaks of an unknown task"),
        }
        Ok(())
    }

    /// The spec of an attempt that the node holds, for the second stream; checked by hash.
    pub async fn payload(&self, caller: &Caller, id: TaskId, attempt: AttemptNo, sha256: &[u8]) -> Result<Vec<u8>> {
        let node = self.fence(caller)?;
        if self.links.holds_back() || !self.holds(node, id, attempt).await? {
            return Err(Error::NotFound("attempt"));
        }
        let task = self.journal.task(id).await?.ok_or(Error::NotFound("task"))?;
        if task.digest != sha256 { Err(Error::NotFound("payload")) } else { Ok(task.spec) }
    }
}
