//! Fan-outs: one commit, children on their nodes, one combined end, whatever dies between. In memory, with
//! a clock that the test holds.

use hub_engine::Error;
use hub_engine::bus::{Bus, LocalBus, Next};
use hub_engine::delivery::{Delivery, Hello, Reported, Welcome};
use hub_engine::events::{Data, Events, TaskKind};
use hub_engine::idempotency::Idempotency;
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::*;
use hub_engine::records::*;
use hub_engine::rights::Rights;
use hub_engine::sessions::Sessions;
use hub_engine::tasks::{Dispatch, TaskService};
use hub_engine::watch::Watchers;
use hub_testkit::TestJournal;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::journal::Write;
use hub_testkit::keys::TestKeys;
use hub_testkit::memory::MemoryStore;
use mesh_core::ceiling::Closed;
use mesh_core::permission::{Caller, Granted, Permission, Role};
use mesh_core::select::Selector;
use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::task::{Event, NeverStarted, Outcome, Reason, ReasonCode, TaskState, Terms};
use mesh_core::*;
use mesh_process::{Clock, Tasks};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

struct World {
    store: Arc<MemoryStore>,
    journal: Arc<TestJournal>,
    clock: Arc<HandClock>,
    links: Arc<Links>,
    pool: Arc<Pool>,
    delivery: Delivery,
    sessions: Arc<Sessions>,
    tasks: Arc<TaskService>,
    idempotency: Idempotency,
    bus: Arc<dyn Bus>,
}

struct Machine {
    node: Node,
    welcome: Welcome,
    queue: mpsc::Receiver<LinkCommand>,
}

impl Machine {
    fn commands(&mut self) -> Vec<LinkCommand> {
        std::iter::from_fn(|| self.queue.try_recv().ok()).collect()
    }
    fn orders(&mut self) -> usize {
        self.commands().iter().filter(|c| matches!(c, LinkCommand::Order(_))).count()
    }
}

fn user(n: u16) -> Caller {
    Caller::person(sample::user_id(n), Role::Developer)
}
fn granted_to(n: u16, granted: Granted) -> Caller {
    let Caller::Person(mut person) = user(n) else { panic!() };
    person.granted = Arc::new(granted);
    Caller::Person(person)
}
fn admin() -> Caller {
    Caller::person(sample::user_id(1), Role::Admin)
}

fn dispatch() -> Dispatch {
    let program = Program::Argv(vec!["uptime".into()]);
    Dispatch {
        session: None,
        node: None,
        all: true,
        spec: Spec::Shell(Shell { program, cwd: String::new(), env: BTreeMap::new(), stdin: vec![], stdin_open: false }),
        timeout_secs: 0,
        queue_secs: 0,
        wait_secs: 0,
        terms: Terms::default(),
        keyed: None,
    }
}

fn code<T: std::fmt::Debug>(r: hub_engine::Result<T>) -> &'static str {
    match r.unwrap_err() {
        Error::NotFound(_) => "not_found",
        Error::Forbidden(_) => "forbidden",
        Error::Store(_) => "store",
        Error::Conflict { code, .. } | Error::Invalid { code, .. } => code,
        other => panic!("{other:?}"),
    }
}

impl World {
    fn new() -> Self {
        Self::on(Arc::new(MemoryStore::peopled()), Arc::new(HandClock::default()))
    }
    fn on(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let journal = TestJournal::over(store.clone());
        let bus: Arc<dyn Bus> = Arc::new(LocalBus::new(1000, Duration::from_secs(9999), clock.clone()));
        let events = Events::new(bus.clone(), clock.clone());
        let (links, watchers, work) = (Arc::new(Links::default()), Watchers::default(), Tasks::new());
        let nodes = Arc::new(Nodes {
            hub: sample::hub_id(1),
            store: store.clone(),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1, invite_secs: 1 },
        });
        let pool = Arc::new(Pool {
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation: 1,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events: events.clone(),
            clock: clock.clone(),
            session_hours: 24,
        });
        let tasks = Arc::new(TaskService {
            journal: journal.clone(),
            output: store.clone(),
            keyring: Arc::new(TestKeys),
            nodes,
            sessions: sessions.clone(),
            links: links.clone(),
            pool: pool.clone(),
            watchers,
            clock: clock.clone(),
            work: work.clone(),
            stop: work.token(),
        });
        let delivery = Delivery {
            journal: journal.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        };
        let idempotency = Idempotency { store: store.clone(), clock: clock.clone() };
        Self { store, journal, clock, links, pool, delivery, sessions, tasks, idempotency, bus }
    }
    /// The process dies, and another one takes up what it left.
    async fn restarted(self) -> Self {
        let hub = Self::on(self.store, self.clock);
        hub.pool.recover().await.unwrap();
        hub
    }

    /// The `n`th machine, of the first user.
    async fn machine(&self, n: u16, max_tasks: u32) -> Machine {
        self.machine_of(n, 1, max_tasks).await
    }
    async fn machine_of(&self, n: u16, owner: u16, max_tasks: u32) -> Machine {
        let mut node = Node { owner: sample::user_id(owner), ..sample::node(n, 0) };
        node.certificate.spki[..2].copy_from_slice(&n.to_be_bytes());
        node.labels.insert("odd".into(), (n % 2).to_string());
        node.slots = Some([("gpu".to_owned(), 1)].into());
        let invite = sample::invite(n);
        self.store.add_invite(&invite).await.unwrap();
        self.store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap();
        self.link(node, max_tasks, None).await
    }
    async fn link(&self, node: Node, max_tasks: u32, closed: Option<Closed>) -> Machine {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello = Hello { spool: sample::spool_id(1), max_tasks, keeps: 0, closed, attempts: vec![] };
        let welcome = self.delivery.open_link(&node, hello, commands).await.unwrap();
        Machine { node, welcome, queue }
    }

    async fn all(&self, d: Dispatch) -> Task {
        self.tasks.dispatch(&admin(), d).await.unwrap()
    }
    async fn task(&self, id: TaskId) -> Task {
        self.store.task(id).await.unwrap().unwrap()
    }
    async fn children(&self, parent: TaskId) -> Vec<Task> {
        let filter = TaskFilter { parent: Some(parent), ..TaskFilter::default() };
        self.store.tasks(&filter, Window { before: None, limit: 1000 }).await.unwrap()
    }
    async fn child(&self, parent: TaskId, m: &Machine) -> Task {
        self.children(parent).await.into_iter().find(|t| t.named_node == Some(m.node.id)).expect("a child on this node")
    }
    async fn end(&self, m: &Machine, parent: TaskId, outcome: Outcome) {
        let task = self.child(parent, m).await;
        let attempt = task.progress.attempt.unwrap().no;
        let caller = Caller::Node { node: m.node.id, generation: m.welcome.generation };
        let r = Reported { task: task.id, attempt, outcome, last_seq: 0, result: None, sandbox_applied: None, digests: None };
        self.delivery.result(&caller, r).await.unwrap();
    }
    async fn round(&self) {
        self.pool.round_of_changes().await.unwrap();
    }
    async fn said(&self, id: TaskId) -> (TaskState, Option<ReasonCode>, Option<i32>) {
        let p = self.task(id).await.progress;
        (p.state, p.reason.map(|r| r.code), p.exit_code)
    }
    async fn standing(&self, id: TaskId) -> Vec<(TaskState, u32)> {
        self.task(id).await.children.unwrap().by_state.into_iter().collect()
    }
}

use TaskState::*;

const RUNNING: (TaskState, Option<ReasonCode>, Option<i32>) = (Running, None, None);

#[tokio::test]
async fn a_hundred_nodes_are_one_write() {
    let w = World::new();
    let mut machines = vec![];
    for n in 1..=100 {
        machines.push(w.machine(n, 1).await);
    }
    let one = w.tasks.dispatch(&admin(), Dispatch { all: false, node: Some(machines[9].node.id.to_string()), ..dispatch() }).await.unwrap();
    assert_eq!(machines[9].orders(), 1);
    let writes = Arc::new(AtomicUsize::new(0));
    let Spec::Shell(shell) = dispatch().spec else { panic!() };
    let large = Spec::Shell(Shell { stdin: vec![b'x'; 400_000], ..shell });
    assert_eq!(code(w.tasks.dispatch(&admin(), Dispatch { spec: large, ..dispatch() }).await), "too_large", "times a hundred");
    let counted = writes.clone();
    w.journal.fail(move |write| {
        assert!(matches!(write, Write::AcceptFan(_)), "nothing else is written");
        counted.fetch_add(1, Ordering::SeqCst);
        false
    });
    let parent = w.all(dispatch()).await;
    w.journal.work();
    assert_eq!(writes.load(Ordering::SeqCst), 1, "the parent, its children and their attempts");
    assert_eq!(parent, w.task(parent.id).await, "what it answers is what is held");
    assert_eq!((parent.progress.state, parent.children.as_ref().unwrap().total), (Running, 100));
    assert_eq!(w.standing(parent.id).await, [(Pending, 1), (Assigned, 99)], "who has no place free waits");
    let ordered: usize = machines.iter_mut().map(Machine::orders).sum();
    assert_eq!(ordered, 99);
    for child in w.children(parent.id).await {
        assert_eq!((child.parent, &child.spec, child.is_parent()), (Some(parent.id), &parent.spec, false));
        assert!(TestKeys.is_sealed(&child.intent(), &child.seal));
    }
    assert_eq!(w.pool.standing().waiting, 1, "a parent waits for nothing");

    // The one that waited has its turn, and the parent ends with the last of them and not before.
    let caller = Caller::Node { node: machines[9].node.id, generation: machines[9].welcome.generation };
    let attempt = one.progress.attempt.unwrap().no;
    let over =
        Reported { task: one.id, attempt, outcome: Outcome::Exited(0), last_seq: 0, result: None, sandbox_applied: None, digests: None };
    w.delivery.result(&caller, over).await.unwrap();
    w.round().await;
    assert_eq!(machines[9].orders(), 1);
    let finished = w.pool.standing().finished;
    for m in &machines[1..] {
        w.end(m, parent.id, Outcome::Exited(0)).await;
    }
    w.round().await;
    assert_eq!((w.said(parent.id).await, w.standing(parent.id).await), (RUNNING, vec![(Assigned, 1), (Succeeded, 99)]));
    w.end(&machines[0], parent.id, Outcome::Exited(0)).await;
    w.round().await;
    assert_eq!(w.said(parent.id).await, (Succeeded, None, Some(0)));
    assert_eq!(w.pool.standing().finished - finished, 100, "a parent is no work of its own");
    let kinds: Vec<String> = w.store.history(parent.id).await.unwrap().into_iter().map(|l| l.kind).collect();
    assert_eq!(kinds, ["accepted", "children_ended"]);
}

#[tokio::test]
async fn who_matches_and_who_does_not() {
    let w = World::new();
    let (one, two, _other) = (w.machine(1, 9).await, w.machine(2, 9).await, w.machine_of(3, 2, 9).await);
    let on = async |caller: &Caller, d: Dispatch| -> Vec<NodeId> {
        let parent = w.tasks.dispatch(caller, d).await.unwrap();
        let mut nodes: Vec<NodeId> = w.children(parent.id).await.iter().map(|t| t.named_node.unwrap()).collect();
        nodes.sort_unstable();
        nodes
    };
    let ids = |of: &[u16]| -> Vec<NodeId> { of.iter().map(|n| sample::node_id(*n)).collect() };
    assert_eq!(on(&admin(), dispatch()).await, ids(&[1, 2, 3]));
    assert_eq!(on(&user(1), dispatch()).await, ids(&[1, 2]), "their own");
    let granted = Granted { nodes: [(sample::node_id(1), [Permission::TasksDispatch].into_iter().collect())].into(), ..Granted::default() };
    let guest = granted_to(2, granted);
    assert_eq!(on(&guest, dispatch()).await, ids(&[1, 3]), "and what was granted");
    let select = |text: &str, gpus: u32| {
        let slots = if gpus > 0 { [("gpu".to_owned(), gpus)].into() } else { BTreeMap::new() };
        Terms { select: Some(Selector { slots, ..Selector::parse(text).unwrap() }), ..Terms::default() }
    };
    assert_eq!(on(&admin(), Dispatch { terms: select("odd=1", 0), ..dispatch() }).await, ids(&[1, 3]));
    for standing in [Assigned, Pending] {
        let parent = w.tasks.dispatch(&user(1), Dispatch { terms: select("", 1), ..dispatch() }).await.unwrap();
        assert_eq!(w.standing(parent.id).await, [(standing, 2)], "each child holds the slots that were asked for");
    }

    // In a session those that are attached.
    let session = w.sessions.create(&user(1), "s", None, None).await.unwrap();
    assert_eq!(code(w.tasks.dispatch(&user(1), Dispatch { session: Some(session.id), ..dispatch() }).await), "no_node");
    w.sessions.attach(&user(1), session.id, &two.node.id.to_string()).await.unwrap();
    assert_eq!(on(&user(1), Dispatch { session: Some(session.id), ..dispatch() }).await, ids(&[2]));

    // Who takes no work is not asked.
    w.links.set(&Node { draining: true, epoch: 9, ..two.node.clone() });
    assert_eq!(on(&user(1), dispatch()).await, ids(&[1]));
    let one = w.link(one.node, 4, Some(Closed::Disabled)).await;
    assert_eq!(code(w.tasks.dispatch(&user(1), dispatch()).await), "no_node");
    drop((one, two));

    let named = Dispatch { node: Some(sample::node_id(3).to_string()), ..dispatch() };
    assert_eq!(code(w.tasks.dispatch(&admin(), named).await), "bad_select");
    assert_eq!(code(w.tasks.dispatch(&Caller::person(sample::user_id(1), Role::Viewer), dispatch()).await), "forbidden");
}

#[tokio::test]
async fn what_ends_differently_comes_to_one_end() {
    let w = World::new();
    let machines = [w.machine(1, 4).await, w.machine(2, 4).await, w.machine(3, 4).await];
    let refused = || Outcome::NeverStarted(NeverStarted::Refused(Reason::new(ReasonCode::PolicyDenied, "no network")));
    for (ends, expect) in [
        ([Outcome::Exited(3), Outcome::Exited(5), Outcome::Exited(0)], (Failed, Some(ReasonCode::Exit), Some(5))),
        ([refused(), Outcome::Exited(0), Outcome::Exited(0)], (Failed, Some(ReasonCode::PolicyDenied), None)),
        ([refused(), Outcome::Exited(1), Outcome::TimedOut], (Failed, Some(ReasonCode::Exit), Some(1))),
        ([Outcome::Done, Outcome::Done, Outcome::Done], (Succeeded, None, None)),
    ] {
        let parent = w.all(dispatch()).await;
        for (m, end) in machines.iter().zip(ends) {
            w.end(m, parent.id, end).await;
        }
        w.round().await;
        assert_eq!(w.said(parent.id).await, expect);
    }
    // A child that is retried has not ended.
    let parent = w.all(Dispatch { terms: Terms { retries: 1, backoff_ms: 1000, ..Terms::default() }, ..dispatch() }).await;
    for m in &machines {
        w.end(m, parent.id, Outcome::Exited(i32::from(m.node.id == sample::node_id(1)))).await;
    }
    w.round().await;
    assert_eq!((w.said(parent.id).await, w.standing(parent.id).await), (RUNNING, vec![(Pending, 1), (Succeeded, 2)]));
    w.clock.advance(Duration::from_secs(2));
    w.round().await;
    w.end(&machines[0], parent.id, Outcome::Exited(0)).await;
    w.round().await;
    assert_eq!(w.said(parent.id).await, (Succeeded, None, Some(0)));
    // One that is lost, by its caller's terms.
    let terms = Terms { on_lost: mesh_core::task::OnLost::Fail, lost_after: Some(5), ..Terms::default() };
    let parent = w.all(Dispatch { terms, ..dispatch() }).await;
    let [one, two, three] = machines;
    w.end(&one, parent.id, Outcome::Exited(0)).await;
    w.end(&two, parent.id, Outcome::Exited(0)).await;
    drop(three);
    w.pool.round().await.unwrap();
    w.clock.advance(Duration::from_secs(6));
    w.pool.round().await.unwrap();
    w.round().await;
    assert_eq!(w.said(parent.id).await, (Failed, Some(ReasonCode::Lost), None));
}

#[tokio::test]
async fn who_waits_hears_the_end_once() {
    let w = World::new();
    let m = w.machine(1, 4).await;
    let parent = w.all(dispatch()).await;
    let mut watch = w.tasks.watchers.subscribe(parent.id);
    let mut reader = w.bus.subscribe(None);
    w.end(&m, parent.id, Outcome::Exited(4)).await;
    w.round().await;
    w.round().await;
    let ended = watch.ended().await;
    assert_eq!((ended.progress.exit_code, ended.children.as_ref().unwrap().total), (Some(4), 1));
    let mut told = vec![];
    while let Some(Next::Event(_, event)) = futures::FutureExt::now_or_never(reader.next()) {
        if let Data::Task(news) = &event.data
            && news.task == parent.id
        {
            told.push((news.kind, news.state, news.exit_code));
        }
    }
    assert_eq!(told, [(TaskKind::Ended, Failed, Some(4))]);
    drop(m);
}

#[tokio::test]
async fn a_hub_that_dies_between_goes_on() {
    let w = World::new();
    let m = w.machine(1, 4).await;
    let parent = w.all(dispatch()).await.id;
    // The child's end is written, and the hub is gone before it looked at the parent.
    w.end(&m, parent, Outcome::Exited(7)).await;
    assert_eq!(w.said(parent).await, RUNNING);
    let w = w.restarted().await;
    w.round().await;
    assert_eq!(w.said(parent).await, (Failed, Some(ReasonCode::Exit), Some(7)));

    // The parent's cancel is written, and its children's are not.
    let m = w.link(m.node, 1, None).await;
    let parent = w.all(dispatch()).await.id;
    let waiting = w.all(dispatch()).await.id;
    let asked = Event::CancelRequested { reason: ReasonCode::CancelledByUser };
    for id in [parent, waiting] {
        w.store.apply(id, &asked, Besides::default(), w.clock.now_ms()).await.unwrap();
    }
    let w = w.restarted().await;
    w.round().await;
    assert_eq!(w.said(waiting).await, (Cancelled, Some(ReasonCode::CancelledByUser), None), "what waited ends at once");
    assert!(w.child(parent, &m).await.progress.cancel.is_some());
    let mut m = w.link(m.node, 1, None).await;
    assert!(m.commands().iter().any(|c| matches!(c, LinkCommand::Cancel { .. })), "and its node hears of it");
    w.end(&m, parent, Outcome::Cancelled).await;
    w.round().await;
    assert_eq!(w.said(parent).await, (Cancelled, Some(ReasonCode::CancelledByUser), None));
}

#[tokio::test]
async fn a_store_that_fails_leaves_no_half() {
    let w = World::new();
    let mut machines = [w.machine(1, 1).await, w.machine(2, 1).await];
    w.journal.fail(|write| matches!(write, Write::AcceptFan(_)));
    assert_eq!(code(w.tasks.dispatch(&admin(), dispatch()).await), "store");
    w.journal.work();
    w.round().await;
    assert_eq!(w.store.open_tasks(None, None, 9).await.unwrap(), vec![]);
    assert!(machines.iter().all(|m| w.links.running(m.node.id) == 0), "what was reserved is given back");

    // It was written, and the answer was lost.
    w.journal.unanswered.store(true, Ordering::SeqCst);
    assert_eq!(code(w.tasks.dispatch(&admin(), dispatch()).await), "store");
    w.journal.unanswered.store(false, Ordering::SeqCst);
    w.round().await;
    let open = w.store.open_tasks(None, None, 9).await.unwrap();
    let parent = open.iter().find(|t| t.is_parent()).expect("the parent").id;
    assert_eq!(machines.iter_mut().map(Machine::orders).collect::<Vec<_>>(), [1, 1], "the orders follow");
    assert!(machines.iter().all(|m| w.links.running(m.node.id) == 1));

    // The parent's end fails, and is taken up again.
    for m in &machines {
        w.end(m, parent, Outcome::Exited(0)).await;
    }
    w.journal.fail(|write| matches!(write, Write::Apply(Event::ChildrenEnded { .. })));
    assert!(w.pool.round_of_changes().await.is_err());
    assert_eq!(w.said(parent).await, RUNNING);
    w.journal.work();
    w.round().await;
    assert_eq!(w.said(parent).await, (Succeeded, None, Some(0)));

    // The end of a child is written, and its answer was lost.
    let parent = w.all(dispatch()).await.id;
    w.end(&machines[0], parent, Outcome::Exited(0)).await;
    w.journal.unanswered.store(true, Ordering::SeqCst);
    let child = w.child(parent, &machines[1]).await;
    let attempt = child.progress.attempt.unwrap().no;
    let caller = Caller::Node { node: machines[1].node.id, generation: machines[1].welcome.generation };
    let r =
        Reported { task: child.id, attempt, outcome: Outcome::Exited(2), last_seq: 0, result: None, sandbox_applied: None, digests: None };
    assert_eq!(code(w.delivery.result(&caller, r).await), "store");
    w.journal.unanswered.store(false, Ordering::SeqCst);
    w.round().await;
    w.round().await;
    assert_eq!(w.said(parent).await, (Failed, Some(ReasonCode::Exit), Some(2)));
}

#[tokio::test]
async fn cancels_reach_every_child() {
    let w = World::new();
    let mut machines = [w.machine(1, 1).await, w.machine(2, 1).await];
    let first = w.all(dispatch()).await.id;
    let second = w.all(dispatch()).await.id;
    assert_eq!(w.standing(second).await, [(Pending, 2)]);
    let cancelled = w.tasks.cancel(&admin(), second).await.unwrap();
    assert_eq!(cancelled.children.unwrap().by_state.into_iter().collect::<Vec<_>>(), [(Cancelled, 2)]);
    w.round().await;
    assert_eq!(w.said(second).await, (Cancelled, Some(ReasonCode::CancelledByUser), None));
    assert_eq!(w.said(first).await, RUNNING, "the other is another");

    // One child alone; the other does well.
    let alone = w.child(first, &machines[0]).await.id;
    machines.iter_mut().for_each(|m| drop(m.commands()));
    w.tasks.cancel(&admin(), alone).await.unwrap();
    assert!(matches!(machines[0].commands()[..], [LinkCommand::Cancel { .. }]) && machines[1].commands().is_empty());
    w.end(&machines[1], first, Outcome::Exited(0)).await;
    w.end(&machines[0], first, Outcome::Cancelled).await;
    w.round().await;
    assert_eq!(w.said(first).await, (Cancelled, Some(ReasonCode::CancelledByUser), None));

    // A session that is closed ends all of it; and again changes nothing.
    let session = w.sessions.create(&admin(), "s", None, None).await.unwrap();
    for m in &machines {
        w.sessions.attach(&admin(), session.id, &m.node.id.to_string()).await.unwrap();
    }
    let third = w.all(Dispatch { session: Some(session.id), ..dispatch() }).await.id;
    w.tasks.close_session(&admin(), session.id).await.unwrap();
    w.tasks.cancel(&admin(), third).await.unwrap();
    assert_eq!(w.said(third).await, RUNNING, "its nodes have not answered");
    for m in &machines {
        w.end(m, third, Outcome::Cancelled).await;
    }
    w.round().await;
    assert_eq!(w.said(third).await, (Cancelled, Some(ReasonCode::SessionClosed), None));
    w.tasks.cancel(&admin(), third).await.unwrap();
}

#[tokio::test]
async fn a_key_makes_one() {
    let w = World::new();
    let m = w.machine(1, 4).await;
    let ask = async || {
        let keyed = Some(w.idempotency.keyed(&admin(), "POST /dispatch", "k", [1; 32]));
        w.tasks.dispatch(&admin(), Dispatch { keyed, ..dispatch() }).await.unwrap()
    };
    let first = ask().await;
    drop(m);
    let again = ask().await;
    assert_eq!((again.id, w.children(first.id).await.len()), (first.id, 1), "also when nobody is there any more");
    assert_eq!(w.store.open_tasks(None, None, 9).await.unwrap().len(), 2);
}

#[tokio::test]
async fn who_may_see_a_node_sees_its_child_alone() {
    let w = World::new();
    let machines = [w.machine(1, 4).await, w.machine(2, 4).await];
    let parent = w.all(dispatch()).await;
    let read = [Permission::TasksRead].into_iter().collect();
    let granted = Granted { nodes: [(sample::node_id(2), read)].into(), ..Granted::default() };
    let other = granted_to(2, granted);
    assert_eq!(code(w.tasks.get(&other, parent.id).await), "not_found");
    let filter = TaskFilter { parent: Some(parent.id), ..TaskFilter::default() };
    let (seen, _) = w.tasks.list(&other, filter, Window { before: None, limit: 9 }).await.unwrap();
    assert_eq!(seen.iter().map(|t| t.named_node).collect::<Vec<_>>(), [Some(sample::node_id(2))]);
    let piece = hub_engine::input::Piece { seq: 1, data: vec![1], eof: false };
    assert_eq!(code(w.tasks.input(&admin(), parent.id, piece).await), "no_input");
    assert_eq!(code(w.tasks.cancel(&other, parent.id).await), "not_found");
    drop(machines);
}
