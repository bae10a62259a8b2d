//! The moments between two steps: what a hello, a late word or a failing store meets half-way.
//! In memory, with a clock and a journal that the test holds.

use hub_engine::Error;
use hub_engine::delivery::{DIGEST_MISMATCH, Delivery, Hello, Reported, Welcome};
use hub_engine::events::Events;
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::*;
use hub_engine::records::*;
use hub_engine::rights::Rights;
use hub_engine::watch::Watchers;
use hub_testkit::TestJournal;
use hub_testkit::contract::sample;
use hub_testkit::journal::Write;
use hub_testkit::memory::MemoryStore;
use mesh_core::output::Digests;
use mesh_core::permission::{Caller, Role};
use mesh_core::seal::Intent;
use mesh_core::task::{AttemptNo, Event, NeverStarted, Outcome, TaskState};
use mesh_core::*;
use mesh_process::Clock;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

fn admin() -> Caller {
    Caller::person(sample::user_id(1), Role::Admin)
}

const KEY: [u8; 32] = [7; 32];

struct Hands(AtomicI64);
impl Clock for Hands {
    fn now_ms(&self) -> i64 {
        1_700_000_000_000 + self.0.load(Ordering::SeqCst)
    }
    fn steady(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst) as u64)
    }
    fn anchored_ms(&self) -> i64 {
        self.now_ms()
    }
}

struct FakeKeys;
impl Keyring for FakeKeys {
    fn sign(&self, _: &str, _: &[u8]) -> (String, [u8; 64]) {
        ("key".into(), [0; 64])
    }
    fn key_id(&self) -> String {
        "key".into()
    }
    fn seal(&self, intent: &Intent) -> Digest {
        intent.seal(&KEY)
    }
    fn is_sealed(&self, intent: &Intent, seal: &Digest) -> bool {
        intent.is_sealed_by(&KEY, seal)
    }
    fn token_mac(&self, _: &str) -> Digest {
        [0; 32]
    }
    fn issue_access(&self, _: UserId, _: LoginId, _: UnixMs, _: UnixMs) -> String {
        String::new()
    }
    fn read_access(&self, _: &str, _: UnixMs) -> Option<(UserId, LoginId)> {
        None
    }
    fn issue_certificate(&self, _: NodeId, _: &[u8], _: UnixMs, _: UnixMs, _: &[Digest]) -> Stored<Vec<u8>> {
        Ok(vec![])
    }
}

struct World {
    store: Arc<MemoryStore>,
    journal: Arc<TestJournal>,
    clock: Arc<Hands>,
    links: Arc<Links>,
    pool: Arc<Pool>,
    delivery: Arc<Delivery>,
    node: Node,
}

impl World {
    async fn new() -> Self {
        Self::over(Arc::new(MemoryStore::peopled()), 1).await
    }

    /// Another process of the hub on this store, which has been restored since.
    async fn restored(self) -> Self {
        Self::over(self.store, 2).await
    }

    async fn over(store: Arc<MemoryStore>, incarnation: u32) -> Self {
        let clock = Arc::new(Hands(AtomicI64::new(1000)));
        let journal = TestJournal::over(store.clone());
        let node = sample::node(1, 1);
        let invite = sample::invite(1);
        if store.node(node.id).await.unwrap().is_none() {
            store.add_invite(&invite).await.unwrap();
            assert_eq!(store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap(), Claim::Claimed);
        }
        let links = Arc::new(Links::default());
        let pool = Arc::new(Pool {
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(FakeKeys),
            links: links.clone(),
            watchers: Watchers::default(),
            events: Events::local(Duration::from_secs(60), clock.clone()),
            clock: clock.clone(),
            incarnation,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let delivery = Arc::new(Delivery {
            journal: journal.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        });
        Self { store, journal, clock, links, pool, delivery, node }
    }

    fn task(&self, n: u16) -> Task {
        let mut task = Task { queue_secs: 0, session: None, named_node: Some(self.node.id), ..sample::task(n) };
        task.progress = mesh_core::task::Progress::new();
        task.actor.user = self.node.owner;
        task.digest = sha256(&task.spec);
        task.seal = FakeKeys.seal(&task.intent());
        task
    }

    async fn hello(&self, spool: u16) -> (Welcome, mpsc::Receiver<LinkCommand>) {
        self.hello_with(spool, vec![]).await
    }

    async fn hello_with(&self, spool: u16, attempts: Vec<(TaskId, AttemptNo)>) -> (Welcome, mpsc::Receiver<LinkCommand>) {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello = Hello { spool: sample::spool_id(spool), max_tasks: 4, keeps: 0, closed: None, attempts };
        (self.delivery.open_link(&self.node, hello, commands).await.unwrap(), queue)
    }

    fn caller(&self, welcome: &Welcome) -> Caller {
        Caller::Node { node: self.node.id, generation: welcome.generation }
    }

    async fn report(&self, welcome: &Welcome, task: TaskId, attempt: AttemptNo, outcome: Outcome) {
        let r = Reported { task, attempt, outcome, last_seq: 0, result: None, sandbox_applied: None, digests: None };
        self.delivery.result(&self.caller(welcome), r).await.unwrap();
    }

    async fn state(&self, id: TaskId) -> TaskState {
        self.store.task(id).await.unwrap().unwrap().progress.state
    }
}

fn orders(queue: &mut mpsc::Receiver<LinkCommand>) -> Vec<(TaskId, AttemptNo)> {
    let mut found = vec![];
    while let Ok(c) = queue.try_recv() {
        if let LinkCommand::Order(o) = c {
            found.push((o.task, o.attempt));
        }
    }
    found
}

#[tokio::test]
async fn a_hello_in_the_middle_of_a_commit_takes_no_slot_away() {
    let w = World::new().await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (first, _first_queue) = w.hello(1).await;
    // The pool has reserved a slot and is committing the attempt …
    w.journal.hold();
    let pool = w.pool.clone();
    let placing = async move { pool.round().await };
    let meanwhile = async {
        w.journal.begun().await;
        // … when the node links anew.
        let second = w.hello(1).await;
        w.journal.release();
        second
    };
    let (placed, (second, mut queue)) = futures::future::join(placing, meanwhile).await;
    placed.unwrap();
    drop(first);
    let sent = orders(&mut queue);
    assert_eq!(sent.len(), 1, "the order goes to the link that is here now");
    assert_eq!(w.links.running(w.node.id), 1);
    w.report(&second, task.id, sent[0].1, Outcome::Exited(0)).await;
    assert_eq!(w.state(task.id).await, TaskState::Succeeded, "and its result is recorded");
    assert_eq!(w.links.running(w.node.id), 0);
}

#[tokio::test]
async fn the_journal_and_not_memory_calls_a_word_late() {
    let w = World::new().await;
    let (welcome, mut queue) = w.hello(1).await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (id, attempt) = orders(&mut queue)[0];
    w.links.release(w.node.id, id);
    let frame = OutputFrame { seq: 1, t_ms: 1, stream: Stream::Stdout, data: "x".into() };
    assert_eq!(w.delivery.append(&w.caller(&welcome), id, attempt, vec![frame]).await.unwrap(), Some(1));
    assert_eq!(w.store.totals(id, attempt).await.unwrap().stdout_bytes, 1, "kept, not only acknowledged");
    w.report(&welcome, id, attempt, Outcome::Exited(3)).await;
    assert_eq!(w.state(id).await, TaskState::Failed);
    // Said again it changes nothing, and is acknowledged.
    w.report(&welcome, id, attempt, Outcome::Exited(0)).await;
    assert_eq!(w.state(id).await, TaskState::Failed);
    let acks = std::iter::from_fn(|| queue.try_recv().ok()).filter(|c| matches!(c, LinkCommand::ResultAck { .. })).count();
    assert_eq!(acks, 2);
}

#[tokio::test]
async fn a_result_that_does_not_fit_its_output_changes_nothing() {
    let w = World::new().await;
    let (welcome, mut queue) = w.hello(1).await;
    let caller = w.caller(&welcome);
    let of = |stdout: &str, stderr: &str| Some(Digests { stdout: sha256(stdout.as_bytes()), stderr: sha256(stderr.as_bytes()) });
    let mut n = 0;
    let mut granted = async |frames: &[(Stream, &str)]| {
        n += 1;
        w.pool.accept(w.task(n), &admin(), None).await.unwrap();
        let (id, attempt) = orders(&mut queue)[0];
        let frames: Vec<OutputFrame> = (1..)
            .zip(frames)
            .map(|(seq, (stream, data))| OutputFrame { seq, t_ms: 1, stream: *stream, data: data.to_string().into() })
            .collect();
        w.delivery.append(&caller, id, attempt, frames).await.unwrap();
        (id, attempt)
    };
    let report = async |(id, attempt), last_seq, digests| {
        let r = Reported { task: id, attempt, outcome: Outcome::Exited(0), last_seq, result: None, sandbox_applied: None, digests };
        w.delivery.result(&caller, r).await
    };
    let one = granted(&[(Stream::Stdout, "out"), (Stream::Stderr, "err")]).await;
    for wrong in [of("out", ""), of("err", "out"), of("out!", "err"), Some(Digests::of_nothing())] {
        let refused = report(one, 2, wrong).await.unwrap_err();
        assert!(matches!(refused, Error::Invalid { code: DIGEST_MISMATCH, .. }), "{refused}");
        assert_eq!(w.state(one.0).await, TaskState::Assigned);
    }
    report(one, 2, of("out", "err")).await.unwrap();
    let ended = w.store.task(one.0).await.unwrap().unwrap();
    assert_eq!((ended.progress.state, ended.digests), (TaskState::Succeeded, of("out", "err")));

    let silent = granted(&[]).await;
    assert!(report(silent, 0, of("x", "")).await.is_err(), "there is none");
    report(silent, 0, Some(Digests::of_nothing())).await.unwrap();
    // Of what was cut nobody here can say; an older node says nothing.
    let long = "x".repeat(1 << 20);
    let cut = granted(&[(Stream::Stdout, &long), (Stream::Stdout, "y")]).await;
    report(cut, 2, of("whatever", "it was")).await.unwrap();
    assert_eq!(w.store.task(cut.0).await.unwrap().unwrap().digests, of("whatever", "it was"));
    let old = granted(&[(Stream::Stdout, "out")]).await;
    report(old, 1, None).await.unwrap();
    let ended = w.store.task(old.0).await.unwrap().unwrap();
    assert_eq!((ended.progress.state, ended.digests), (TaskState::Succeeded, None));
}

#[tokio::test]
async fn words_of_an_older_link_are_refused() {
    let w = World::new().await;
    let (first, mut queue) = w.hello(1).await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (id, attempt) = orders(&mut queue)[0];
    let (second, mut newer) = w.hello(1).await;
    assert_eq!(orders(&mut newer), [(id, attempt)], "what the node does not know is sent again, as the same attempt");
    let r = Reported { task: id, attempt, outcome: Outcome::Exited(0), last_seq: 0, result: None, sandbox_applied: None, digests: None };
    assert!(w.delivery.result(&w.caller(&first), r).await.is_err());
    assert_eq!(w.state(id).await, TaskState::Assigned);
    drop(first);
    assert!(w.links.get(w.node.id).is_some(), "the end of the older link leaves the newer one in place");
    drop(second);
    assert!(w.links.get(w.node.id).is_none());
}

#[tokio::test]
async fn another_spool_cannot_answer_for_what_it_never_had() {
    let w = World::new().await;
    let (first, mut queue) = w.hello(1).await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    orders(&mut queue);
    drop(first);
    let (_second, mut queue) = w.hello(2).await;
    assert_eq!(orders(&mut queue), []);
    let ended = w.store.task(task.id).await.unwrap().unwrap().progress;
    assert_eq!((ended.state, ended.reason.unwrap().detail), (TaskState::Failed, "maybe_ran".into()));
}

#[tokio::test]
async fn a_grant_to_a_memory_that_is_gone_by_its_commit_is_lost_and_not_stuck() {
    let w = World::new().await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (first, _first_queue) = w.hello(1).await;
    w.journal.hold();
    let pool = w.pool.clone();
    let placing = async move { pool.round().await };
    // While the grant to the first memory is committed, the node comes with a second one.
    let meanwhile = async {
        w.journal.begun().await;
        let second = w.hello(2).await;
        w.journal.release();
        second
    };
    let (placed, (_second, mut queue)) = futures::future::join(placing, meanwhile).await;
    placed.unwrap();
    drop(first);
    assert_eq!(orders(&mut queue), [], "it was not granted to this memory");
    w.pool.round_of_changes().await.unwrap();
    let ended = w.store.task(task.id).await.unwrap().unwrap().progress;
    assert_eq!((ended.state, ended.reason.unwrap().detail), (TaskState::Failed, "maybe_ran".into()));
    assert_eq!(w.links.running(w.node.id), 0);
}

#[tokio::test]
async fn what_came_too_late_rests_before_it_is_placed_again() {
    let w = World::new().await;
    let (welcome, mut queue) = w.hello(1).await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (id, first) = orders(&mut queue)[0];
    w.report(&welcome, id, first, Outcome::NeverStarted(NeverStarted::Late)).await;
    w.pool.round().await.unwrap();
    assert_eq!(orders(&mut queue), [], "not at once: it may be too late again");
    w.clock.0.fetch_add(1001, Ordering::SeqCst);
    w.pool.round().await.unwrap();
    let again = orders(&mut queue);
    assert_eq!(again.iter().map(|o| o.1.ordinal()).collect::<Vec<_>>(), [2]);
    // The first attempt's late end cannot win.
    w.report(&welcome, id, first, Outcome::Exited(0)).await;
    assert_eq!(w.state(id).await, TaskState::Assigned);
}

#[tokio::test]
async fn a_store_that_fails_in_the_middle_of_a_round_leaks_no_slot() {
    let w = World::new().await;
    let stranger = NodeId::from_bytes([9; 16]);
    let mut expiring = Task { queue_secs: 1, named_node: Some(stranger), ..w.task(2) };
    expiring.seal = FakeKeys.seal(&expiring.intent());
    let good = w.task(1);
    for t in [&good, &expiring] {
        w.pool.accept(t.clone(), &admin(), None).await.unwrap();
    }
    let (_welcome, mut queue) = w.hello(1).await;
    w.clock.0.fetch_add(5000, Ordering::SeqCst);
    w.journal.fail(|write| matches!(write, Write::Apply(Event::Expired { .. })));
    assert!(w.pool.round().await.is_err());
    assert_eq!(orders(&mut queue).len(), 1, "what was placed before the failure is committed and sent");
    assert_eq!(w.links.running(w.node.id), 1);
    w.journal.work();
    w.pool.round().await.unwrap();
    assert_eq!(w.state(expiring.id).await, TaskState::Failed);
}

/// A node that has run, told and forgotten an attempt looks like one that never had it.
#[tokio::test]
async fn what_was_granted_before_a_restore_is_never_sent_again() {
    let w = World::new().await;
    let (_first, mut queue) = w.hello(1).await;
    let (gone, stays) = (w.task(1), w.task(2));
    for t in [&gone, &stays] {
        w.pool.accept(t.clone(), &admin(), None).await.unwrap();
    }
    let sent = orders(&mut queue);
    assert_eq!(sent.len(), 2);
    let w = w.restored().await;
    w.pool.recover().await.unwrap();
    let (second, mut queue) = w.hello_with(1, vec![sent[1]]).await;
    assert_eq!(orders(&mut queue), []);
    let ended = w.store.task(gone.id).await.unwrap().unwrap().progress;
    assert_eq!((ended.state, ended.reason.unwrap().detail), (TaskState::Failed, "maybe_ran".into()));
    // What the node still has goes on, and its output too, past what the hub of before had taken.
    let (id, attempt) = sent[1];
    let frame = |seq| vec![OutputFrame { seq, t_ms: 1, stream: Stream::Stdout, data: "x".into() }];
    assert_eq!(w.delivery.append(&w.caller(&second), id, attempt, frame(7)).await.unwrap(), Some(7));
    assert!(w.store.totals(id, attempt).await.unwrap().truncated, "and it is said that some is missing");
    let r = Reported { task: id, attempt, outcome: Outcome::Exited(0), last_seq: 9, result: None, sandbox_applied: None, digests: None };
    w.delivery.result(&w.caller(&second), r).await.unwrap();
    assert_eq!(w.state(id).await, TaskState::Succeeded);
    // A new attempt of this hub is sent again as ever, and a gap in its output is refused.
    let new = w.task(3);
    w.pool.accept(new.clone(), &admin(), None).await.unwrap();
    let (id, attempt) = orders(&mut queue)[0];
    assert_eq!(attempt.incarnation(), 2);
    assert_eq!(w.delivery.append(&w.caller(&second), id, attempt, frame(7)).await.unwrap(), None);
    let (_third, mut queue) = w.hello(1).await;
    assert_eq!(orders(&mut queue), [(id, attempt)]);
}

#[tokio::test]
async fn while_the_hub_holds_back_nothing_is_sent_ended_or_acknowledged() {
    let w = World::new().await;
    let (_first, mut queue) = w.hello(1).await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let known = orders(&mut queue)[0];
    let strange = (sample::task_id(99), known.1);
    let w = w.restored().await;
    w.links.hold_back();
    let (held, mut queue) = w.hello_with(1, vec![known, strange]).await;
    let node = w.node.id;
    let told: Vec<_> = w.links.told().unwrap()[&node].iter().map(|t| (t.task, t.known)).collect();
    assert_eq!(told, [(known.0, true), (strange.0, false)]);
    for (id, attempt) in [known, strange] {
        let frame = OutputFrame { seq: 1, t_ms: 1, stream: Stream::Stdout, data: "x".into() };
        assert_eq!(w.delivery.append(&w.caller(&held), id, attempt, vec![frame]).await.unwrap(), Some(0), "nothing may be forgotten");
        w.delivery.started(&w.caller(&held), id, attempt).await.unwrap();
        w.report(&held, id, attempt, Outcome::Exited(0)).await;
    }
    assert!(queue.try_recv().is_err(), "no order, no cancel, no acknowledgement");
    assert_eq!(w.state(known.0).await, TaskState::Assigned);

    w.links.go();
    assert!(matches!(queue.try_recv(), Ok(LinkCommand::Close { code: "restored", .. })), "each node links anew");
    w.pool.recover().await.unwrap();
    let (again, mut queue) = w.hello_with(1, vec![known, strange]).await;
    let cancels: Vec<_> = std::iter::from_fn(|| queue.try_recv().ok()).collect();
    assert_eq!(cancels, [LinkCommand::Cancel { task: strange.0, attempt: strange.1 }]);
    w.report(&again, known.0, known.1, Outcome::Exited(0)).await;
    assert_eq!(w.state(known.0).await, TaskState::Succeeded);
}

#[tokio::test]
async fn what_a_spool_has_started_and_does_not_know_is_not_sent_again() {
    let w = World::new().await;
    let (first, mut queue) = w.hello(1).await;
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (id, attempt) = orders(&mut queue)[0];
    w.delivery.started(&w.caller(&first), id, attempt).await.unwrap();
    drop(first);
    // The same spool, as it was before: a folder from a backup.
    let (_second, mut queue) = w.hello(1).await;
    assert_eq!(orders(&mut queue), []);
    let ended = w.store.task(id).await.unwrap().unwrap().progress;
    assert_eq!((ended.state, ended.reason.unwrap().detail), (TaskState::Failed, "maybe_ran".into()));
}

/// A machine changes links while it works: what came by the old link after its new hello was made is not
/// in that hello.
#[tokio::test]
async fn a_hello_may_be_older_than_what_its_machine_has_begun() {
    let w = World::new().await;
    let (first, mut queue) = w.hello(1).await;
    w.links.copies().linked(w.node.id, b"", b"a");
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (id, attempt) = orders(&mut queue)[0];
    w.delivery.started(&w.caller(&first), id, attempt).await.unwrap();
    w.delivery.tell_copies_apart(&w.node, b"a").await.unwrap();
    let (second, mut queue) = w.hello(1).await;
    assert_eq!(orders(&mut queue), [(id, attempt)], "it knows it, and says so");
    assert_eq!(w.state(id).await, TaskState::Running);
    w.report(&second, id, attempt, Outcome::Exited(0)).await;
    assert_eq!(w.state(id).await, TaskState::Succeeded);
}

#[tokio::test]
async fn a_copy_of_a_node_is_sent_nothing_of_its_twins_and_both_are_held() {
    let w = World::new().await;
    let (first, mut queue) = w.hello(1).await;
    w.links.copies().linked(w.node.id, b"", b"a");
    let task = w.task(1);
    w.pool.accept(task.clone(), &admin(), None).await.unwrap();
    let (id, _) = orders(&mut queue)[0];
    w.delivery.tell_copies_apart(&w.node, b"b").await.unwrap();
    let (_second, mut copys) = w.hello(1).await;
    w.links.copies().linked(w.node.id, b"b", b"b2");
    assert_eq!(orders(&mut copys), [], "the first may have started it");
    assert_eq!(w.state(id).await, TaskState::Assigned, "and may still say so");
    drop(first);
    let refused = w.delivery.tell_copies_apart(&w.node, b"a").await.unwrap_err();
    assert!(matches!(refused, hub_engine::Error::Conflict { code: "superseded", .. }), "{refused}");
    assert!(std::iter::from_fn(|| copys.try_recv().ok()).any(|c| matches!(c, LinkCommand::Close { code: "superseded", .. })));
    assert!(w.links.copies().holds(w.node.id));
    let notices = w.store.node(w.node.id).await.unwrap().unwrap().notices;
    assert!(notices.last().is_some_and(|n| n.contains("two machines")), "{notices:?}");
}
