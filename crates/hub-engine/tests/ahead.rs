//! Orders ahead: nodes without a place are told of who waits, the hub decides who gets a place when there
//! is one, and what is not granted is moved at any time. In memory, with a clock that the test holds.

use hub_engine::delivery::{Delivery, Hello, Reported, Welcome};
use hub_engine::events::Events;
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{Accounts, Besides, Journal, Keyring, NodeDirectory};
use hub_engine::records::{Node, NodeChange, Task, User};
use hub_engine::rights::Rights;
use hub_engine::watch::Watchers;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::{MemoryStore, TestKeys};
use mesh_core::ceiling::Closed;
use mesh_core::permission::{Caller, Role};
use mesh_core::placement::Waiting;
use mesh_core::select::Selector;
use mesh_core::task::{AttemptNo, Event, NeverStarted, Outcome, Progress, ReasonCode, TaskState, Terms};
use mesh_core::{TaskId, sha256};
use mesh_process::Clock;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

struct Hub {
    store: Arc<MemoryStore>,
    clock: Arc<HandClock>,
    links: Arc<Links>,
    pool: Arc<Pool>,
    delivery: Delivery,
}

struct Machine {
    node: Node,
    welcome: Welcome,
    queue: mpsc::Receiver<LinkCommand>,
}

/// What a node was sent, in a few words: `Order(task, granted)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Order(TaskId, bool),
    Cancel(TaskId),
}
use Sent::{Cancel, Order};

fn admin() -> Caller {
    Caller::person(sample::user_id(1), Role::Admin)
}

impl Machine {
    fn sent(&mut self) -> Vec<Sent> {
        let all = std::iter::from_fn(|| self.queue.try_recv().ok());
        all.filter_map(|c| match c {
            LinkCommand::Order(o) => Some(Order(o.task, o.granted)),
            LinkCommand::Cancel { task, .. } => Some(Cancel(task)),
            _ => None,
        })
        .collect()
    }
    fn caller(&self) -> Caller {
        Caller::Node { node: self.node.id, generation: self.welcome.generation }
    }
}

impl Hub {
    async fn new() -> Self {
        let hub = Self::on(Arc::new(MemoryStore::new()), Arc::new(HandClock::default()));
        for n in 1..=2 {
            hub.store.add_user(&User { role: Role::Admin, ..sample::user(n, &format!("u{n}")) }).await.unwrap();
        }
        hub
    }
    fn on(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let links = Arc::new(Links::default());
        let pool = Arc::new(Pool {
            journal: store.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            watchers: Watchers::default(),
            events: Events::local(Duration::from_secs(60), clock.clone()),
            clock: clock.clone(),
            incarnation: 1,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let delivery = Delivery {
            journal: store.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        };
        Self { store, clock, links, pool, delivery }
    }
    async fn machine(&self, n: u16, max_tasks: u32) -> Machine {
        let node = Node { owner: sample::user_id(1), ..sample::node(n, n as u8) };
        let invite = sample::invite(n);
        self.store.add_invite(&invite).await.unwrap();
        self.store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap();
        self.link(node, max_tasks, 64, vec![]).await
    }
    async fn link(&self, node: Node, max_tasks: u32, keeps: u32, attempts: Vec<(TaskId, AttemptNo)>) -> Machine {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello = Hello { spool: sample::spool_id(1), max_tasks, keeps, closed: None, attempts };
        let welcome = self.delivery.open_link(&node, hello, commands).await.unwrap();
        Machine { node, welcome, queue }
    }
    async fn ask_by(&self, n: u16, user: u16, terms: Terms) -> TaskId {
        let mut task = Task { queue_secs: 0, terms, created_at: self.clock.now_ms(), ..sample::task(n) };
        task.progress = Progress::new();
        task.actor.user = sample::user_id(user);
        task.digest = sha256(&task.spec);
        task.seal = TestKeys.seal(&task.intent());
        self.pool.accept(task, &admin(), None).await.unwrap().id
    }
    async fn ask(&self, n: u16) -> TaskId {
        self.ask_by(n, 1, Terms::default()).await
    }
    async fn progress(&self, id: TaskId) -> Progress {
        self.store.task(id).await.unwrap().unwrap().progress
    }
    async fn no(&self, id: TaskId) -> AttemptNo {
        self.progress(id).await.attempt.unwrap().no
    }
    /// State, the number of its attempt, and whether that is granted.
    async fn stands(&self, id: TaskId) -> (TaskState, u32, bool) {
        let p = self.progress(id).await;
        let a = p.attempt.unwrap();
        (p.state, a.no.ordinal(), a.granted.is_some())
    }
    async fn round(&self) {
        self.pool.round().await.unwrap();
    }
    async fn changes(&self) {
        self.pool.round_of_changes().await.unwrap();
    }
    async fn end(&self, m: &Machine, task: TaskId, outcome: Outcome) {
        let attempt = self.no(task).await;
        let r = Reported { task, attempt, outcome, last_seq: 0, result: None, sandbox_applied: None, digests: None };
        self.delivery.result(&m.caller(), r).await.unwrap();
        self.changes().await;
    }
    async fn ready(&self, m: &Machine, task: TaskId, attempt: AttemptNo, ended: &[TaskId]) {
        let mut over = vec![];
        for id in ended {
            over.push((*id, self.no(*id).await));
        }
        self.delivery.ready(&m.caller(), task, attempt, &over).await.unwrap();
        self.changes().await;
    }
    async fn kept(&self, m: &Machine, task: TaskId) {
        self.delivery.kept(&m.caller(), task, self.no(task).await).unwrap();
    }
}

const AHEAD: (TaskState, u32, bool) = (TaskState::Assigned, 1, false);
const GRANTED: (TaskState, u32, bool) = (TaskState::Assigned, 1, true);

#[tokio::test]
async fn a_full_node_is_told_of_as_many_as_it_has_places_and_counts_those_that_may_run() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 2).await;
    let (a, b, c, d, e) = (hub.ask(1).await, hub.ask(2).await, hub.ask(3).await, hub.ask(4).await, hub.ask(5).await);
    assert_eq!(m.sent(), [Order(a, true), Order(b, true)]);
    hub.round().await;
    assert_eq!(m.sent(), [Order(c, false), Order(d, false)]);
    assert_eq!((hub.stands(c).await, hub.progress(e).await.state), (AHEAD, TaskState::Pending));
    assert_eq!((hub.links.running(m.node.id), hub.links.share(sample::user_id(1)).attempts, hub.pool.standing().waiting), (2, 2, 3));
    let stored = hub.store.task(c).await.unwrap().unwrap();
    assert_eq!(hub.pool.why_waiting(&stored), Some(Waiting::NoSlot), "it waits all the same");
    hub.round().await;
    assert_eq!(m.sent(), [], "once");
    // A place is free: the grant is on disk, and then the same attempt may start.
    hub.end(&m, a, Outcome::Exited(0)).await;
    assert_eq!(m.sent(), [Order(c, true), Order(e, false)]);
    assert_eq!((hub.stands(c).await, hub.links.running(m.node.id)), (GRANTED, 2));
    let kinds: Vec<String> = hub.store.history(c).await.unwrap().into_iter().map(|l| l.kind).collect();
    assert_eq!(kinds, ["accepted", "assigned", "granted"]);
}

#[tokio::test]
async fn an_older_node_gets_only_what_it_may_start() {
    let hub = Hub::new().await;
    let m = hub.machine(1, 1).await;
    let mut m = hub.link(m.node, 1, 0, vec![]).await;
    let (a, b) = (hub.ask(1).await, hub.ask(2).await);
    hub.round().await;
    assert_eq!(m.sent(), [Order(a, true)]);
    hub.end(&m, a, Outcome::Exited(0)).await;
    assert_eq!((m.sent(), hub.stands(b).await), (vec![Order(b, true)], GRANTED));
}

#[tokio::test]
async fn who_asks_for_slots_is_not_told_ahead() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    hub.store
        .change_node(m.node.id, &NodeChange { slots: Some(Some([("gpu".to_owned(), 1)].into())), ..Default::default() })
        .await
        .unwrap();
    let row = NodeDirectory::node(&*hub.store, m.node.id).await.unwrap().unwrap();
    hub.links.set(&row);
    let a = hub.ask(1).await;
    let mut gpu = Selector::default();
    gpu.slots.insert("gpu".into(), 1);
    let b = hub.ask_by(2, 1, Terms { select: Some(gpu), ..Terms::default() }).await;
    hub.round().await;
    assert_eq!((m.sent(), hub.progress(b).await.state), (vec![Order(a, true)], TaskState::Pending));
    hub.end(&m, a, Outcome::Exited(0)).await;
    assert_eq!(m.sent(), [Order(b, true)]);
}

#[tokio::test]
async fn an_idle_node_takes_what_a_busy_one_was_told() {
    let hub = Hub::new().await;
    let mut busy = hub.machine(1, 1).await;
    let (a, b) = (hub.ask(1).await, hub.ask(2).await);
    hub.round().await;
    assert_eq!(busy.sent(), [Order(a, true), Order(b, false)]);
    hub.kept(&busy, b).await;
    let first = hub.no(b).await;
    let mut idle = hub.machine(2, 1).await;
    hub.changes().await;
    assert_eq!((idle.sent(), busy.sent()), (vec![Order(b, true)], vec![Cancel(b)]));
    assert_eq!(hub.stands(b).await, (TaskState::Assigned, 2, true));
    // Whatever the first one still says of it changes nothing, and it is told to forget.
    hub.ready(&busy, b, first, &[]).await;
    hub.delivery.kept(&busy.caller(), b, first).unwrap();
    assert_eq!(busy.sent(), [Cancel(b), Cancel(b)]);
    let forged =
        Reported { task: b, attempt: first, outcome: Outcome::Exited(9), last_seq: 0, result: None, sandbox_applied: None, digests: None };
    hub.delivery.result(&busy.caller(), forged).await.unwrap();
    hub.delivery.started(&busy.caller(), b, first).await.unwrap();
    assert_eq!(hub.stands(b).await, (TaskState::Assigned, 2, true));
    hub.end(&idle, b, Outcome::Exited(0)).await;
    assert_eq!(hub.progress(b).await.state, TaskState::Succeeded);
}

#[tokio::test]
async fn a_node_whose_task_has_ended_gets_the_next_before_the_result_is_here() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    let (a, b, c) = (hub.ask(1).await, hub.ask(2).await, hub.ask(3).await);
    hub.round().await;
    assert_eq!(m.sent(), [Order(a, true), Order(b, false)]);
    // That there is a place is not believed without what made it.
    hub.ready(&m, b, hub.no(b).await, &[]).await;
    assert_eq!((m.sent(), hub.stands(b).await), (vec![], AHEAD));
    hub.ready(&m, b, hub.no(b).await, &[a]).await;
    assert_eq!(m.sent(), [Order(b, true), Order(c, false)]);
    assert_eq!(hub.links.running(m.node.id), 1);
    // Said again, since the answer crossed with it: the same answer, and no second place.
    hub.ready(&m, b, hub.no(b).await, &[a]).await;
    assert_eq!((m.sent(), hub.stands(c).await), (vec![Order(b, true)], AHEAD));
    // The result comes at last: its place was given already.
    hub.end(&m, a, Outcome::Exited(0)).await;
    assert_eq!((m.sent(), hub.links.running(m.node.id)), (vec![], 1));
    hub.end(&m, b, Outcome::Exited(0)).await;
    assert_eq!((m.sent(), hub.links.running(m.node.id)), (vec![Order(c, true)], 1));
    hub.end(&m, c, Outcome::Exited(0)).await;
    assert_eq!((hub.links.running(m.node.id), hub.links.share(sample::user_id(1)).attempts), (0, 0));
}

#[tokio::test]
async fn a_place_goes_to_who_is_first_then_and_not_to_who_was_told_first() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    let (a, low) = (hub.ask(1).await, hub.ask(2).await);
    hub.round().await;
    assert_eq!(m.sent(), [Order(a, true), Order(low, false)]);
    let high = hub.ask_by(3, 2, Terms { priority: 5, ..Terms::default() }).await;
    hub.ready(&m, low, hub.no(low).await, &[a]).await;
    assert_eq!(m.sent(), [Order(high, true)], "though it was never told ahead");
    assert_eq!(hub.stands(low).await, AHEAD);
    hub.end(&m, high, Outcome::Exited(0)).await;
    assert_eq!(m.sent(), [Order(low, true)]);
}

#[tokio::test]
async fn what_is_not_acknowledged_is_taken_back_and_its_link_gets_no_more() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    let (a, b) = (hub.ask(1).await, hub.ask(2).await);
    hub.round().await;
    assert_eq!(m.sent(), [Order(a, true), Order(b, false)]);
    hub.clock.advance(Duration::from_millis(4999));
    hub.round().await;
    assert_eq!(hub.stands(b).await, AHEAD);
    hub.clock.advance(Duration::from_millis(1));
    hub.round().await;
    assert_eq!((m.sent(), hub.progress(b).await.state), (vec![Cancel(b)], TaskState::Pending));
    hub.end(&m, a, Outcome::Exited(0)).await;
    assert_eq!((m.sent(), hub.stands(b).await), (vec![Order(b, true)], (TaskState::Assigned, 2, true)));
    // One that was acknowledged stays for as long as it takes.
    let c = hub.ask(3).await;
    let mut m = hub.link(m.node, 1, 64, vec![(b, hub.no(b).await)]).await;
    hub.round().await;
    assert_eq!(m.sent(), [Order(c, false)]);
    hub.kept(&m, c).await;
    hub.clock.advance(Duration::from_secs(3600));
    hub.round().await;
    assert_eq!((m.sent(), hub.stands(c).await), (vec![], AHEAD));
}

#[tokio::test]
async fn a_node_that_goes_drains_or_links_anew_keeps_nothing() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    let (a, b) = (hub.ask(1).await, hub.ask(2).await);
    hub.round().await;
    hub.kept(&m, b).await;
    m.sent();
    // Drained: what runs goes on, what was told is taken back.
    let drain = |draining| NodeChange { draining: Some(draining), ..Default::default() };
    hub.links.set(&hub.store.change_node(m.node.id, &drain(true)).await.unwrap().unwrap());
    hub.round().await;
    assert_eq!((m.sent(), hub.progress(b).await.state), (vec![Cancel(b)], TaskState::Pending));
    hub.links.set(&hub.store.change_node(m.node.id, &drain(false)).await.unwrap().unwrap());
    hub.round().await;
    assert_eq!((m.sent(), hub.stands(b).await), (vec![Order(b, false)], (TaskState::Assigned, 2, false)));
    // A new link has forgotten it, and is told anew.
    let mut m = hub.link(m.node, 1, 64, vec![(a, hub.no(a).await)]).await;
    hub.round().await;
    assert_eq!((m.sent(), hub.stands(b).await), (vec![Order(b, false)], (TaskState::Assigned, 3, false)));
    // Gone: it may run elsewhere; the granted one is in doubt and stays.
    let node = m.node.clone();
    drop(m);
    hub.round().await;
    assert_eq!((hub.progress(b).await.state, hub.stands(a).await), (TaskState::Pending, GRANTED));
    // A grant that was on its way when the link broke: it is sent again, for the same attempt.
    let mut m = hub.link(node, 1, 64, vec![(a, hub.no(a).await)]).await;
    hub.round().await;
    hub.ready(&m, b, hub.no(b).await, &[a]).await;
    assert_eq!(m.sent(), [Order(b, false), Order(b, true)]);
    let granted = hub.no(b).await;
    let mut m = hub.link(m.node, 1, 64, vec![(a, hub.no(a).await)]).await;
    assert_eq!((m.sent(), hub.no(b).await), (vec![Order(b, true)], granted));
}

#[tokio::test]
async fn a_node_that_its_owner_closes_is_given_nothing_and_keeps_nothing() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    let (a, b) = (hub.ask(1).await, hub.ask(2).await);
    hub.round().await;
    assert_eq!(m.sent(), [Order(a, true), Order(b, false)]);
    hub.kept(&m, b).await;
    let closed = Some(Closed::Disabled);
    hub.delivery.standing(&m.caller(), 1, closed).unwrap();
    hub.round().await;
    assert_eq!((m.sent(), hub.progress(b).await.state), (vec![Cancel(b)], TaskState::Pending));
    assert_eq!(hub.links.look(m.node.id).0.unwrap().refuses(0), Some("disabled"));
    // What it runs goes on, and its place is given to nobody.
    hub.end(&m, a, Outcome::Exited(0)).await;
    hub.round().await;
    assert_eq!((m.sent(), hub.progress(b).await.state), (vec![], TaskState::Pending));
    let row = NodeDirectory::node(&*hub.store, m.node.id).await.unwrap().unwrap();
    hub.links.set(&row);
    assert!(hub.links.look(m.node.id).0.unwrap().closed.is_some(), "no change of the registry opens it");
    hub.delivery.standing(&m.caller(), 1, None).unwrap();
    hub.changes().await;
    assert_eq!(m.sent(), [Order(b, true)]);

    // How many it takes is its owner's word, within the hub's bound; an older link has none.
    let old = m.caller();
    let mut m = hub.link(m.node, 1, 0, hub.links.held(row.id)).await;
    assert!(hub.delivery.standing(&old, 9, closed).is_err());
    hub.delivery.standing(&m.caller(), 3, None).unwrap();
    hub.links.set(&Node { task_limit: Some(2), epoch: row.epoch + 1, ..row.clone() });
    hub.delivery.standing(&m.caller(), 5, None).unwrap();
    assert_eq!(hub.links.get(row.id).unwrap().max_tasks, 2);
    hub.delivery.standing(&m.caller(), 0, None).unwrap();
    assert_eq!(hub.links.get(row.id).unwrap().max_tasks, 1, "none at all is said in another way");
    assert_eq!(m.sent(), []);
}

#[tokio::test]
async fn the_end_of_what_is_not_granted_is_at_once() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 4).await;
    for n in 1..=4 {
        hub.ask(n).await;
    }
    let deadline = Some(hub.clock.now_ms() + 1000);
    let cancelled = hub.ask(5).await;
    let overdue = hub.ask_by(6, 1, Terms { deadline, ..Terms::default() }).await;
    let refused = hub.ask(7).await;
    let late = hub.ask(8).await;
    hub.round().await;
    assert_eq!(m.sent().len(), 8);
    let stop = Event::CancelRequested { reason: ReasonCode::CancelledByUser };
    let hub_engine::ports::Applied::Done(task, actions) = hub.pool.apply(cancelled, &stop, Besides::default()).await.unwrap() else {
        panic!()
    };
    hub.pool.perform(&task, &actions);
    assert_eq!((hub.progress(cancelled).await.state, m.sent()), (TaskState::Cancelled, vec![Cancel(cancelled)]));
    hub.clock.advance(Duration::from_secs(1));
    hub.changes().await;
    assert_eq!((hub.progress(overdue).await.state, m.sent()), (TaskState::Failed, vec![Cancel(overdue)]));
    // The node's own word: it will never run this, or not now.
    let denied = NeverStarted::Refused(mesh_core::task::Reason::new(ReasonCode::PolicyDenied, "no"));
    hub.end(&m, refused, Outcome::NeverStarted(denied)).await;
    assert_eq!(hub.progress(refused).await.reason.unwrap().code, ReasonCode::PolicyDenied);
    hub.end(&m, late, Outcome::NeverStarted(NeverStarted::Late)).await;
    assert_eq!(hub.progress(late).await.state, TaskState::Pending);
    assert_eq!((m.sent(), hub.links.running(m.node.id)), (vec![], 4));
    hub.clock.advance(Duration::from_secs(1));
    hub.round().await;
    assert_eq!(m.sent(), [Order(late, false)], "after a rest");
}

#[tokio::test]
async fn a_hub_that_starts_takes_back_what_another_process_told() {
    let hub = Hub::new().await;
    let mut m = hub.machine(1, 1).await;
    let (a, b, _last) = (hub.ask(1).await, hub.ask(2).await, hub.ask(3).await);
    hub.round().await;
    assert_eq!(m.sent(), [Order(a, true), Order(b, false)]);
    let hub = Hub::on(hub.store, hub.clock);
    hub.pool.recover().await.unwrap();
    assert_eq!((hub.progress(b).await.state, hub.stands(a).await), (TaskState::Pending, GRANTED));
    let mut m = hub.link(m.node, 1, 64, vec![(a, hub.no(a).await)]).await;
    hub.round().await;
    assert_eq!((m.sent(), hub.stands(b).await), (vec![Order(b, false)], (TaskState::Assigned, 2, false)));
    assert_eq!(hub.links.running(m.node.id), 1);
}
