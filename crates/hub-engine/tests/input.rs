//! A caller's input and its node's word: who may, who hears what, and what ends a wait.
//! In memory, with a link that the test holds.

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hub_engine::Error;
use hub_engine::delivery::{Delivery, Hello, Welcome};
use hub_engine::events::Events;
use hub_engine::input::{Answer, Input, Piece};
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::*;
use hub_engine::records::*;
use hub_engine::rights::Rights;
use hub_engine::sessions::Sessions;
use hub_engine::tasks::TaskService;
use hub_engine::watch::Watchers;
use hub_testkit::TestJournal;
use hub_testkit::contract::sample;
use hub_testkit::memory::MemoryStore;
use mesh_core::input::{Fate, MAX_PIECE_BYTES};
use mesh_core::permission::{Caller, Role};
use mesh_core::seal::Intent;
use mesh_core::spec::{INLINE_SPEC_BYTES, Program, Shell, Spec};
use mesh_core::task::{AttemptNo, Event, Outcome};
use mesh_core::*;
use mesh_process::{CancellationToken, Clock, Tasks};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;

fn admin() -> Caller {
    Caller::person(sample::user_id(1), Role::Admin)
}

const KEY: [u8; 32] = [7; 32];

struct Still;
impl Clock for Still {
    fn now_ms(&self) -> i64 {
        1_700_000_000_000
    }
    fn steady(&self) -> Duration {
        Duration::from_secs(1)
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
    tasks: Arc<TaskService>,
    delivery: Arc<Delivery>,
    node: Node,
    stop: CancellationToken,
    journal: Arc<TestJournal>,
}

impl World {
    async fn new() -> Self {
        let store = Arc::new(MemoryStore::peopled());
        let clock = Arc::new(Still);
        let node = sample::node(1, 1);
        let invite = sample::invite(1);
        store.add_invite(&invite).await.unwrap();
        assert_eq!(store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap(), Claim::Claimed);
        let journal = TestJournal::over(store.clone());
        let (links, watchers) = (Arc::new(Links::default()), Watchers::default());
        let events = Events::local(Duration::from_secs(60), clock.clone());
        let pool = Arc::new(Pool {
            journal: store.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(FakeKeys),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation: 1,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let delivery = Arc::new(Delivery {
            journal: store.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        });
        let nodes = Arc::new(Nodes {
            hub: sample::hub_id(1),
            store: store.clone(),
            keyring: Arc::new(FakeKeys),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1, invite_secs: 1 },
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events,
            clock: clock.clone(),
            session_hours: 1,
        });
        let stop = CancellationToken::new();
        let tasks = Arc::new(TaskService {
            journal: journal.clone(),
            output: store,
            keyring: Arc::new(FakeKeys),
            nodes,
            sessions,
            links,
            pool,
            watchers,
            clock,
            work: Tasks::new(),
            stop: stop.clone(),
        });
        Self { tasks, delivery, node, stop, journal }
    }

    async fn link(&self) -> (Welcome, mpsc::Receiver<LinkCommand>) {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello =
            Hello { spool: sample::spool_id(1), max_tasks: 4, keeps: 0, closed: None, attempts: self.delivery.links.held(self.node.id) };
        (self.delivery.open_link(&self.node, hello, commands).await.unwrap(), queue)
    }

    fn word(&self, w: &Welcome) -> Caller {
        Caller::Node { node: self.node.id, generation: w.generation }
    }

    /// A task on the node; `change` comes after its seal.
    async fn accept(&self, n: u16, open: bool, change: impl FnOnce(&mut Task)) -> (TaskId, AttemptNo) {
        let program = Program::Argv(vec!["cat".into()]);
        let spec = Spec::Shell(Shell { program, cwd: String::new(), env: Default::default(), stdin: vec![], stdin_open: open });
        let mut task = Task { named_node: Some(self.node.id), spec: spec.encode(), digest: spec.digest(), ..sample::task(n) };
        task.seal = FakeKeys.seal(&task.intent());
        change(&mut task);
        let task = self.tasks.pool.accept(task, &admin(), None).await.unwrap();
        (task.id, task.progress.attempt.map_or(AttemptNo(0), |a| a.no))
    }

    async fn running(&self, n: u16, link: &Welcome, open: bool) -> (TaskId, AttemptNo) {
        let (id, no) = self.accept(n, open, |_| {}).await;
        self.delivery.started(&self.word(link), id, no).await.unwrap();
        (id, no)
    }

    fn answer(&self, link: &Welcome, i: &Input, fate: Fate, taken: u64) {
        let a = Answer { task: i.task, attempt: i.attempt, request: i.request, fate, taken };
        self.delivery.input_answered(&self.word(link), a).unwrap();
    }
}

fn owner() -> Caller {
    Caller::person(sample::user_id(1), Role::Developer)
}
fn stranger() -> Caller {
    Caller::person(sample::user_id(2), Role::Developer)
}
fn piece(seq: u64) -> Piece {
    Piece { seq, data: b"in".to_vec(), eof: false }
}
async fn next(queue: &mut mpsc::Receiver<LinkCommand>) -> Box<Input> {
    loop {
        if let LinkCommand::Input(i) = queue.recv().await.expect("the link lives") {
            return i;
        }
    }
}
fn code<T: std::fmt::Debug>(r: Result<T, Error>) -> &'static str {
    match r.unwrap_err() {
        Error::Conflict { code, .. } | Error::Invalid { code, .. } | Error::Unavailable { code, .. } => code,
        Error::NotFound(_) => "not_found",
        Error::Forbidden(_) => "forbidden",
        e => panic!("{e}"),
    }
}

#[tokio::test]
async fn a_long_spec_is_read_for_the_first_piece_alone() {
    let (w, owner) = (World::new().await, owner());
    let (link, mut queue) = w.link().await;
    let long = |open| {
        move |t: &mut Task| {
            let program = Program::Argv(vec!["cat".into(), "x".repeat(INLINE_SPEC_BYTES)]);
            let spec = Spec::Shell(Shell { program, cwd: String::new(), env: Default::default(), stdin: vec![], stdin_open: open });
            (t.spec, t.digest) = (spec.encode(), spec.digest());
            t.seal = FakeKeys.seal(&t.intent());
        }
    };
    let (id, no) = w.accept(1, true, long(true)).await;
    w.delivery.started(&w.word(&link), id, no).await.unwrap();
    for n in 1..=3 {
        let node = async {
            let i = next(&mut queue).await;
            w.answer(&link, &i, Fate::Taken, n);
        };
        assert_eq!(tokio::join!(w.tasks.input(&owner, id, piece(n)), node).0.unwrap(), n);
    }
    assert_eq!(w.journal.whole_reads.load(Ordering::SeqCst), 1);
    assert_eq!(code(w.tasks.input(&stranger(), id, piece(4)).await), "not_found");
    let (closed, no) = w.accept(2, true, long(false)).await;
    w.delivery.started(&w.word(&link), closed, no).await.unwrap();
    assert_eq!(code(w.tasks.input(&owner, closed, piece(1)).await), "no_input");
    let (forged, no) = w
        .accept(3, true, |t| {
            long(true)(t);
            t.spec.push(0)
        })
        .await;
    w.delivery.started(&w.word(&link), forged, no).await.unwrap();
    for _ in 0..2 {
        assert!(w.tasks.input(&owner, forged, piece(1)).await.is_err(), "what does not fit is not remembered");
    }
    assert_eq!(w.journal.whole_reads.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_piece_goes_to_the_attempt_and_its_fate_comes_back() {
    let (w, owner) = (World::new().await, owner());
    let (link, mut queue) = w.link().await;
    let (id, no) = w.running(1, &link, true).await;
    for (fate, want) in [
        (Fate::Gap, "input_gap"),
        (Fate::Full, "input_full"),
        (Fate::Closed, "input_closed"),
        (Fate::NoInput, "no_input"),
        (Fate::NotRunning, "not_running"),
        (Fate::Ended, "task_ended"),
    ] {
        let node = async {
            let i = next(&mut queue).await;
            w.answer(&link, &i, fate, 0);
        };
        assert_eq!(code(tokio::join!(w.tasks.input(&owner, id, piece(1)), node).0), want);
    }
    let node = async {
        let i = next(&mut queue).await;
        assert_eq!((i.task, i.attempt, &i.piece), (id, no, &piece(5)));
        // Words that fit nobody's question are heard by nobody.
        let a = Answer { task: id, attempt: no, request: i.request, fate: Fate::Ended, taken: 0 };
        for wrong in [Answer { request: i.request ^ 1, ..a }, Answer { task: sample::task_id(9), ..a }, Answer { attempt: no.next(1), ..a }]
        {
            w.delivery.input_answered(&w.word(&link), wrong).unwrap();
        }
        let other = Caller::Node { node: sample::node_id(2), generation: link.generation };
        assert!(w.delivery.input_answered(&other, a).is_err());
        assert!(w.delivery.input_answered(&owner, a).is_err());
        w.answer(&link, &i, Fate::Taken, 7);
        w.answer(&link, &i, Fate::Ended, 0);
    };
    assert_eq!(tokio::join!(w.tasks.input(&owner, id, piece(5)), node).0.unwrap(), 7);
}

#[tokio::test]
async fn another_node_cannot_answer_for_the_one_that_was_asked() {
    let (w, owner) = (World::new().await, owner());
    let (link, mut queue) = w.link().await;
    let (id, _) = w.running(1, &link, true).await;
    // A second node, linked and honest about its own name.
    let (commands, _second_queue) = mpsc::channel(LINK_QUEUE);
    let second = hub_engine::links::Link { node: sample::node_id(2), commands, ..w.tasks.links.get(w.node.id).unwrap() };
    assert!(w.tasks.links.open(second.clone()));
    let node = async {
        let i = next(&mut queue).await;
        let a = Answer { task: i.task, attempt: i.attempt, request: i.request, fate: Fate::Taken, taken: 99 };
        let caller = Caller::Node { node: second.node, generation: second.generation };
        w.delivery.input_answered(&caller, a).unwrap();
        w.answer(&link, &i, Fate::Taken, 1);
    };
    assert_eq!(tokio::join!(w.tasks.input(&owner, id, piece(1)), node).0.unwrap(), 1);
}

#[tokio::test]
async fn only_who_may_act_on_a_running_task_with_an_open_input() {
    let w = World::new().await;
    let (link, mut queue) = w.link().await;
    let (id, _) = w.running(1, &link, true).await;
    let input = async |caller: &Caller, id, p| code(w.tasks.input(caller, id, p).await);
    assert_eq!(input(&stranger(), id, piece(1)).await, "not_found", "another's task looks absent");
    assert_eq!(input(&stranger(), id, piece(0)).await, "not_found", "whatever is asked");
    assert_eq!(input(&w.word(&link), id, piece(1)).await, "not_found");
    assert_eq!(input(&owner(), sample::task_id(77), piece(1)).await, "not_found");
    assert_eq!(input(&owner(), id, piece(0)).await, "bad_seq");
    assert_eq!(input(&owner(), id, Piece { data: vec![], ..piece(1) }).await, "empty_input");
    assert_eq!(input(&owner(), id, Piece { data: vec![0; MAX_PIECE_BYTES + 1], ..piece(1) }).await, "input_too_large");
    let (without, _) = w.running(2, &link, false).await;
    assert_eq!(input(&owner(), without, piece(1)).await, "no_input");
    let (assigned, _) = w.accept(3, true, |_| {}).await;
    assert_eq!(input(&owner(), assigned, piece(1)).await, "not_running");
    let (ended, no) = w.running(4, &link, true).await;
    w.tasks.pool.apply(ended, &Event::Ended { attempt: no, outcome: Outcome::Exited(0) }, Besides::default()).await.unwrap();
    assert_eq!(input(&owner(), ended, piece(1)).await, "task_ended");
    while let Ok(c) = queue.try_recv() {
        assert!(!matches!(c, LinkCommand::Input(_)), "{c:?}");
    }
}

#[tokio::test]
async fn a_row_that_was_made_somebody_elses_gets_no_input() {
    let w = World::new().await;
    let (link, mut queue) = w.link().await;
    // Whoever can write rows alone makes the task their own, and asks as its owner.
    let (id, no) = w.accept(1, true, |t| t.actor.user = sample::user_id(2)).await;
    w.tasks.pool.apply(id, &Event::Started { attempt: no }, Besides::default()).await.unwrap();
    assert_eq!(code(w.tasks.input(&stranger(), id, piece(1)).await), "bad_state");
    assert!(queue.try_recv().is_err());
    drop(link);
}

#[tokio::test]
async fn a_wait_ends_with_its_link_and_the_next_link_starts_anew() {
    let w = World::new().await;
    let (link, mut queue) = w.link().await;
    let (id, _) = w.running(1, &link, true).await;
    // The link goes …
    let gone = async {
        let i = next(&mut queue).await;
        drop(link.presence);
        i
    };
    let owner = owner();
    let (r, late) = tokio::join!(w.tasks.input(&owner, id, piece(1)), gone);
    assert_eq!(code(r), "node_offline");
    assert_eq!(code(w.tasks.input(&owner, id, piece(1)).await), "node_offline");
    // … or is replaced while the answer is awaited.
    let (first, mut queue) = w.link().await;
    let replaced = async {
        next(&mut queue).await;
        w.link().await
    };
    let (r, (second, mut queue)) = tokio::join!(w.tasks.input(&owner, id, piece(1)), replaced);
    assert_eq!(code(r), "node_offline");
    drop(first);
    // What comes late for the old question does not answer the new one.
    let node = async {
        let i = next(&mut queue).await;
        assert_ne!(i.request, late.request);
        w.answer(&second, &late, Fate::Closed, 0);
        w.answer(&second, &i, Fate::Taken, 1);
    };
    assert_eq!(tokio::join!(w.tasks.input(&owner, id, piece(1)), node).0.unwrap(), 1);
}

#[tokio::test]
async fn a_silent_node_and_a_stopping_hub_end_the_wait() {
    let w = World::new().await;
    let (link, mut queue) = w.link().await;
    let (id, _) = w.running(1, &link, true).await;
    let owner = owner();
    assert_eq!(code(w.tasks.input(&owner, id, piece(1)).await), "input_unanswered");
    next(&mut queue).await;
    let stop = async {
        next(&mut queue).await;
        w.stop.cancel();
    };
    assert_eq!(code(tokio::join!(w.tasks.input(&owner, id, piece(1)), stop).0), "stopping");
}

#[tokio::test]
async fn input_under_way_is_bounded_and_leaves_the_link_in_place() {
    let w = World::new().await;
    let (link, mut queue) = w.link().await;
    let (id, _) = w.running(1, &link, true).await;
    let owner = owner();
    // A caller that hangs up gives its place back.
    for _ in 0..100 {
        tokio::select! {
            biased;
            r = w.tasks.input(&owner, id, piece(1)) => panic!("{r:?}"),
            i = next(&mut queue) => drop(i),
        }
    }
    let mut many: FuturesUnordered<_> = (1..=200).map(|n| w.tasks.input(&owner, id, piece(n))).collect();
    for _ in 0..136 {
        assert_eq!(code(many.next().await.unwrap()), "input_full");
    }
    assert!(w.tasks.links.is_current(w.node.id, link.generation));
    drop(link);
    let rest: Vec<_> = many.map(code).collect().await;
    assert_eq!(rest, ["node_offline"; 64]);
}
