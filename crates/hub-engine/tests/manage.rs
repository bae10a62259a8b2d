//! Draining, changing, revoking and removing a node, and the moments in which that meets a hello, a
//! commit or a failing store. In memory, with a journal that the test holds.

use hub_engine::Error;
use hub_engine::accounts::Authenticated;
use hub_engine::delivery::{Delivery, Hello, Reported, Welcome};
use hub_engine::events::{Data, Events, NodeNews, Told, Topic};
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::manage::Management;
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::*;
use hub_engine::records::*;
use hub_engine::rights::Rights;
use hub_engine::watch::Watchers;
use hub_testkit::TestJournal;
use hub_testkit::contract::sample;
use hub_testkit::memory::MemoryStore;
use mesh_core::capability::Capabilities;
use mesh_core::ceiling::Closed;
use mesh_core::permission::{Caller, Role};
use mesh_core::seal::Intent;
use mesh_core::select::Selector;
use mesh_core::task::{Attempt, AttemptNo, Outcome, Progress, ReasonCode, TaskState};
use mesh_core::*;
use mesh_process::{Clock, Tasks};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

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

/// One hub's process over a store that may be shared.
struct World {
    store: Arc<MemoryStore>,
    journal: Arc<TestJournal>,
    clock: Arc<Hands>,
    links: Arc<Links>,
    nodes: Arc<Nodes>,
    pool: Arc<Pool>,
    delivery: Arc<Delivery>,
    manage: Arc<Management>,
    node: Node,
}

impl World {
    async fn new() -> Self {
        let store = Arc::new(MemoryStore::peopled());
        for n in 1..=2 {
            add_node(&store, &sample::node(n, n as u8), n).await;
        }
        Self::over(store)
    }

    fn over(store: Arc<MemoryStore>) -> Self {
        let clock = Arc::new(Hands(AtomicI64::new(1000)));
        let journal = TestJournal::over(store.clone());
        let events = Events::local(Duration::from_secs(60), clock.clone());
        let links = Arc::new(Links::telling(events.clone()));
        let nodes = Arc::new(Nodes {
            hub: sample::hub_id(1),
            store: store.clone(),
            keyring: Arc::new(FakeKeys),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1000, invite_secs: 60 },
        });
        let pool = Arc::new(Pool {
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(FakeKeys),
            links: links.clone(),
            watchers: Watchers::default(),
            events,
            clock: clock.clone(),
            incarnation: 1,
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
        let manage = Arc::new(Management {
            nodes: nodes.clone(),
            journal: journal.clone(),
            pool: pool.clone(),
            work: Tasks::new(),
            seen: Default::default(),
        });
        Self { store, journal, clock, links, nodes, pool, delivery, manage, node: sample::node(1, 1) }
    }

    fn task(&self, n: u16, named: Option<NodeId>) -> Task {
        let mut task = Task { queue_secs: 0, session: None, named_node: named, ..sample::task(n) };
        task.progress = Progress::new();
        task.actor.user = self.node.owner;
        task.digest = sha256(&task.spec);
        task.seal = FakeKeys.seal(&task.intent());
        task
    }
    async fn accept(&self, n: u16, named: bool) -> Task {
        self.pool.accept(self.task(n, named.then_some(self.node.id)), &admin(), None).await.unwrap()
    }

    async fn try_hello(&self, node: &Node) -> Result<(Welcome, mpsc::Receiver<LinkCommand>), Error> {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello = Hello { spool: sample::spool_id(1), max_tasks: 4, keeps: 0, closed: None, attempts: vec![] };
        Ok((self.delivery.open_link(node, hello, commands).await?, queue))
    }
    async fn hello(&self) -> (Welcome, mpsc::Receiver<LinkCommand>) {
        self.try_hello(&self.node).await.unwrap()
    }

    async fn read(&self, id: TaskId) -> (TaskState, Option<(ReasonCode, String)>) {
        let p = self.store.task(id).await.unwrap().unwrap().progress;
        (p.state, p.reason.map(|r| (r.code, r.detail)))
    }
    fn standing(&self, node: &Node) -> (&'static str, Option<&'static str>) {
        let s = self.nodes.standing(node);
        (s.status, s.unschedulable)
    }
    async fn row(&self) -> Node {
        self.store.node(self.node.id).await.unwrap().unwrap()
    }
}

async fn add_node(store: &MemoryStore, node: &Node, n: u16) {
    let invite = sample::invite(n);
    store.add_invite(&invite).await.unwrap();
    assert_eq!(store.claim_invite(invite.id, node, invite.created_at + 1, 1000).await.unwrap(), Claim::Claimed);
}

fn admin() -> Caller {
    Caller::person(sample::user_id(9), Role::Admin)
}
fn revoked_end() -> (TaskState, Option<(ReasonCode, String)>) {
    (TaskState::Failed, Some((ReasonCode::NodeRevoked, String::new())))
}
fn code(e: &Error) -> &'static str {
    match e {
        Error::Forbidden(t) if t.starts_with("revoked") => "revoked",
        Error::Forbidden(_) => "forbidden",
        Error::NotFound(_) => "not_found",
        Error::Conflict { code, .. } | Error::Invalid { code, .. } => code,
        _ => "other",
    }
}
fn orders(queue: &mut mpsc::Receiver<LinkCommand>) -> usize {
    std::iter::from_fn(|| queue.try_recv().ok()).filter(|c| matches!(c, LinkCommand::Order(_))).count()
}

#[tokio::test]
async fn what_an_owner_lets_a_machine_take_is_told_when_it_changes() {
    let w = World::new().await;
    let (welcome, _queue) = w.hello().await;
    let who = Authenticated { caller: admin(), login: None };
    let mut feed = w.nodes.events.open(who, Some(vec![Topic::Nodes]), None).unwrap();
    let link = Caller::Node { node: w.node.id, generation: welcome.generation };
    for (max_tasks, closed) in
        [(4, Some(Closed::Disabled)), (4, Some(Closed::Disabled)), (4, None), (2, None), (2, Some(Closed::CeilingUnreadable)), (2, None)]
    {
        w.delivery.standing(&link, max_tasks, closed).unwrap();
    }
    let before = Caller::Node { node: w.node.id, generation: welcome.generation - 1 };
    w.delivery.standing(&before, 1, Some(Closed::Disabled)).expect_err("a link that is no more");
    w.nodes.events.node(&w.node, NodeNews::Draining);
    let mut told = vec![];
    while let Told::Event(_, event) = feed.next().await {
        if let Data::Node(id, NodeNews::Takes { closed, max_tasks }) = event.data {
            assert_eq!((id, event.owner), (w.node.id, w.node.owner));
            told.push((event.kind(), closed.map(Closed::as_str), max_tasks));
        }
        if event.kind() == "draining" {
            break;
        }
    }
    let all = [("closed", Some("disabled"), 4), ("opened", None, 4), ("opened", None, 2), ("closed", Some("ceiling_unreadable"), 2)];
    assert_eq!(told, [&all[..], &[("opened", None, 2)]].concat());
}

#[tokio::test]
async fn a_draining_node_finishes_and_takes_nothing_new() {
    let w = World::new().await;
    let (welcome, mut queue) = w.hello().await;
    let running = w.accept(1, true).await;
    assert_eq!(orders(&mut queue), 1);
    let drained = w.manage.drain(&admin(), w.node.id).await.unwrap();
    assert_eq!(w.standing(&drained), ("draining", Some("draining")));
    let named = w.accept(2, true).await;
    let any = w.accept(3, false).await;
    w.pool.round().await.unwrap();
    assert_eq!(orders(&mut queue), 0);
    for waiting in [&named, &any] {
        assert_eq!(w.pool.why_waiting(waiting).unwrap().as_str(), "no_candidate");
    }
    assert!(!welcome.cut.is_cancelled(), "what runs goes on");
    let caller = Caller::Node { node: w.node.id, generation: welcome.generation };
    let a = running.progress.attempt.unwrap();
    let r = Reported {
        task: running.id,
        attempt: a.no,
        outcome: Outcome::Exited(0),
        last_seq: 0,
        result: None,
        sandbox_applied: None,
        digests: None,
    };
    w.delivery.result(&caller, r).await.unwrap();
    assert_eq!(w.read(running.id).await.0, TaskState::Succeeded);

    // It is stored: a link and a process later it drains still.
    drop(welcome);
    let (again, mut queue) = w.hello().await;
    assert_eq!(w.standing(&w.row().await), ("draining", Some("draining")));
    w.pool.round().await.unwrap();
    assert_eq!(orders(&mut queue), 0);
    let epoch = w.store.registry_epoch().await.unwrap();
    assert!(w.manage.drain(&admin(), w.node.id).await.unwrap().draining);
    assert_eq!(w.store.registry_epoch().await.unwrap(), epoch, "again changes nothing");

    w.manage.resume(&admin(), w.node.id).await.unwrap();
    w.pool.round().await.unwrap();
    assert_eq!(orders(&mut queue), 2);
    drop(again);
    w.manage.drain(&admin(), w.node.id).await.unwrap();
    assert_eq!(w.standing(&w.row().await), ("offline", Some("offline")), "the first that applies");
}

#[tokio::test]
async fn what_is_shown_as_schedulable_is_what_dispatch_uses() {
    let w = World::new().await;
    let (_welcome, _queue) = w.hello().await;
    let id = w.node.id;
    let limit = async |n: Option<u32>| {
        let change = NodeChange { task_limit: Some(n), ..Default::default() };
        w.manage.change(&admin(), id, change).await.unwrap()
    };
    for n in 1..40 {
        match n % 4 {
            0 => drop(w.manage.drain(&admin(), id).await.unwrap()),
            1 => drop(w.manage.resume(&admin(), id).await.unwrap()),
            2 => drop(limit(Some(u32::from(n / 8 + 1))).await),
            _ => drop(limit(None).await),
        }
        let shown = w.standing(&w.row().await).1;
        let task = w.accept(n, true).await;
        let taken = task.progress.state == TaskState::Assigned;
        // Who waits for a slot goes first, whoever comes new.
        w.pool.forget(task.id);
        assert_eq!(shown.is_none(), taken, "round {n}: {shown:?}");
        if w.links.running(id) > 3 {
            w.links.held(id).iter().for_each(|(t, _)| w.links.release(id, *t));
        }
    }
}

#[tokio::test]
async fn changes_reach_the_live_link_at_once() {
    let w = World::new().await;
    let (_welcome, mut queue) = w.hello().await;
    let change = async |c: NodeChange| w.manage.change(&admin(), w.node.id, c).await;
    let labels = BTreeMap::from([("zone".to_owned(), "b".to_owned())]);
    let slots = BTreeMap::from([("gpu".to_owned(), 2)]);
    let c = NodeChange { labels: Some(labels.clone()), slots: Some(Some(slots.clone())), task_limit: Some(Some(1)), ..Default::default() };
    let node = change(c).await.unwrap();
    let link = w.links.get(w.node.id).unwrap();
    assert_eq!((link.offers.labels.get("zone"), &link.offers.slots, link.max_tasks), (labels.get("zone"), &slots, 1));
    assert_eq!(*link.offers, node.offers());
    w.accept(1, true).await;
    let second = w.accept(2, true).await;
    assert_eq!((orders(&mut queue), w.standing(&node)), (1, ("online", Some("busy"))));
    assert_eq!(w.pool.why_waiting(&second).unwrap().as_str(), "no_slot");
    // Raising it lets the waiting one go; the machine's own number is the end of it.
    change(NodeChange { task_limit: Some(Some(9)), ..Default::default() }).await.unwrap();
    w.pool.round().await.unwrap();
    assert_eq!((orders(&mut queue), w.links.get(w.node.id).unwrap().max_tasks), (1, 4));
    // An older row does not win over a newer one, whichever comes last.
    w.links.set(&node);
    assert_eq!(w.links.get(w.node.id).unwrap().max_tasks, 4);

    w.store
        .register(w.node.id, "1", &Capabilities { runtimes: [("python".to_owned(), "3".to_owned())].into(), ..Default::default() })
        .await
        .unwrap();
    let of = |k: &str, v: &str| NodeChange { labels: Some([(k.to_owned(), v.to_owned())].into()), ..Default::default() };
    let slot = |k: &str, n| NodeChange { slots: Some(Some([(k.to_owned(), n)].into())), ..Default::default() };
    for (bad, want) in [
        (NodeChange::default(), "nothing_to_change"),
        (NodeChange { name: Some("a\u{202e}".into()), ..Default::default() }, "bad_name"),
        (of("os", "plan9"), "bad_label"),
        (of("arch", "x"), "bad_label"),
        (of("hostname", "x"), "bad_label"),
        (of("python", "4"), "bad_label"),
        (of("a=b", "c"), "bad_label"),
        (of("a", ""), "bad_label"),
        (slot("gpu", 1025), "bad_slots"),
        (slot("", 1), "bad_slots"),
        (slot("a,b", 1), "bad_slots"),
        (NodeChange { task_limit: Some(Some(1025)), ..Default::default() }, "bad_max_tasks"),
    ] {
        let text = format!("{bad:?}");
        assert_eq!(code(&change(bad).await.unwrap_err()), want, "{text}");
    }
    assert_eq!(w.row().await.labels, labels, "what is refused changes nothing");
}

#[tokio::test]
async fn only_who_may_manage_does() {
    let w = World::new().await;
    let id = w.node.id;
    let by = |user: u16, role| Caller::person(sample::user_id(user), role);
    for (caller, want) in [
        (by(2, Role::Developer), "not_found"),
        (by(2, Role::Guest), "not_found"),
        (by(2, Role::Viewer), "forbidden"),
        (by(1, Role::Viewer), "forbidden"),
        (Caller::Node { node: id, generation: 1 }, "not_found"),
    ] {
        let change = NodeChange { name: Some("x".into()), ..Default::default() };
        let said = [
            w.manage.change(&caller, id, change).await.map(drop),
            w.manage.drain(&caller, id).await.map(drop),
            w.manage.resume(&caller, id).await.map(drop),
            w.manage.revoke(&caller, id).await.map(drop),
            w.manage.remove(&caller, id).await,
        ];
        assert!(said.iter().all(|s| code(s.as_ref().unwrap_err()) == want), "{caller:?}: {said:?}");
    }
    assert_eq!(w.row().await, w.node, "nothing was changed");
    w.manage.drain(&by(1, Role::Developer), id).await.unwrap();
    w.manage.remove(&by(1, Role::Developer), id).await.unwrap();
    assert_eq!(code(&w.manage.drain(&admin(), id).await.unwrap_err()), "not_found");
}

#[tokio::test]
async fn a_revoked_node_has_no_link_no_tasks_and_no_way_back() {
    for remove in [false, true] {
        let w = World::new().await;
        let (welcome, mut queue) = w.hello().await;
        let granted = w.accept(1, true).await;
        let pooled = w.accept(2, false).await;
        // One that is assigned and may not start yet, and one that waits for this very node.
        let mut ungranted = w.task(3, None);
        ungranted.progress.state = TaskState::Assigned;
        ungranted.progress.attempt = Some(Attempt { no: AttemptNo::first(1), node: w.node.id, granted: None });
        w.store.accept(&ungranted).await.unwrap();
        let limit = NodeChange { task_limit: Some(Some(1)), ..Default::default() };
        w.manage.change(&admin(), w.node.id, limit).await.unwrap();
        let waiting = w.accept(4, true).await;
        assert_eq!(orders(&mut queue), 2);
        if remove {
            w.manage.remove(&admin(), w.node.id).await.unwrap();
        } else {
            let node = w.manage.revoke(&admin(), w.node.id).await.unwrap();
            assert_eq!(w.standing(&node), ("revoked", Some("revoked")));
            let again = w.manage.revoke(&admin(), w.node.id).await.unwrap();
            assert_eq!(again.revoked_at, node.revoked_at, "again is the same");
            let change = NodeChange { name: Some("x".into()), ..Default::default() };
            assert_eq!(code(&w.manage.change(&admin(), w.node.id, change).await.unwrap_err()), "node_revoked");
            assert_eq!(code(&w.manage.resume(&admin(), w.node.id).await.unwrap_err()), "node_revoked");
        }
        assert!(welcome.cut.is_cancelled() && w.links.get(w.node.id).is_none(), "its streams end at once");
        assert_eq!(w.read(granted.id).await, revoked_end());
        assert_eq!(w.read(pooled.id).await, revoked_end());
        assert_eq!(w.read(ungranted.id).await, (TaskState::Pending, None), "it may run elsewhere");
        let (state, reason) = w.read(waiting.id).await;
        assert_eq!((state, reason), (TaskState::Failed, Some((ReasonCode::NoNode, "node_revoked".into()))));
        assert_eq!(w.links.running(w.node.id), 0);
        // Late words, a new link, another certificate: nothing of it counts.
        let caller = Caller::Node { node: w.node.id, generation: welcome.generation };
        let attempt = granted.progress.attempt.unwrap().no;
        let r = Reported {
            task: granted.id,
            attempt,
            outcome: Outcome::Exited(0),
            last_seq: 0,
            result: None,
            sandbox_applied: None,
            digests: None,
        };
        assert!(w.delivery.result(&caller, r).await.is_err());
        assert!(w.delivery.started(&caller, granted.id, attempt).await.is_err());
        let frame = OutputFrame { seq: 1, t_ms: 1, stream: Stream::Stdout, data: "x".into() };
        assert!(w.delivery.append(&caller, granted.id, attempt, vec![frame]).await.is_err());
        assert_eq!(w.read(granted.id).await, revoked_end());
        assert_eq!(code(&w.nodes.authenticate(w.node.id, &[1; 32]).await.unwrap_err()), "revoked");
        assert_eq!(code(&w.nodes.renew(&caller, b"key", 1, &[]).await.unwrap_err()), "revoked");
        assert_eq!(code(&w.try_hello(&w.node).await.unwrap_err()), "revoked");
        drop(welcome);
        // The other node takes what was moved.
        let (_other, mut queue) = w.try_hello(&sample::node(2, 2)).await.unwrap();
        w.clock.0.fetch_add(2000, Ordering::SeqCst);
        w.pool.round().await.unwrap();
        assert_eq!(orders(&mut queue), 1);
        assert_eq!(w.store.history(granted.id).await.unwrap().last().unwrap().kind, "node_revoked");
    }
}

#[tokio::test]
async fn revoked_while_it_is_away_is_the_same() {
    let w = World::new().await;
    let (welcome, _queue) = w.hello().await;
    let task = w.accept(1, true).await;
    drop(welcome);
    w.manage.revoke(&admin(), w.node.id).await.unwrap();
    assert_eq!(w.read(task.id).await, revoked_end());
    assert_eq!(code(&w.try_hello(&w.node).await.unwrap_err()), "revoked");
    // A node that this hub never knew is not told so: that word ends a node for good.
    assert!(matches!(w.nodes.authenticate(sample::node_id(77), &[1; 32]).await, Err(Error::Unauthenticated(_))));
}

#[tokio::test]
async fn a_dispatch_that_has_a_slot_in_hand_loses_it() {
    // First in the dispatch itself, then in a round of the pool.
    for waits in [false, true] {
        let w = World::new().await;
        let mut task = w.task(1, None);
        if waits {
            task = w.pool.accept(task, &admin(), None).await.unwrap();
        }
        let (_welcome, mut queue) = w.hello().await;
        w.journal.hold();
        let (id, pool) = (task.id, w.pool.clone());
        let dispatch = async move { if waits { pool.round().await } else { pool.accept(task, &admin(), None).await.map(drop) } };
        let meanwhile = async {
            // The slot is reserved and its commit under way …
            w.journal.begun().await;
            // … when the node is revoked, which finds nothing to end.
            w.manage.revoke(&admin(), w.node.id).await.unwrap();
            w.journal.release();
        };
        let (dispatched, ()) = futures::future::join(dispatch, meanwhile).await;
        dispatched.unwrap();
        assert_eq!(orders(&mut queue), 0, "nothing is sent");
        assert_eq!(w.read(id).await, revoked_end(), "waits: {waits}");
        assert_eq!(w.links.running(w.node.id), 0);
    }
}

#[tokio::test]
async fn a_task_that_is_accepted_for_a_node_that_goes_ends() {
    let w = World::new().await;
    w.journal.hold();
    let (task, pool) = (w.task(1, Some(w.node.id)), w.pool.clone());
    let id = task.id;
    let meanwhile = async {
        w.journal.begun().await;
        w.manage.remove(&admin(), w.node.id).await.unwrap();
        w.journal.release();
    };
    let (accepted, ()) = futures::future::join(pool.accept(task, &admin(), None), meanwhile).await;
    assert_eq!(accepted.unwrap().progress.state, TaskState::Failed, "and its caller hears so");
    assert_eq!(w.read(id).await.1.unwrap().0, ReasonCode::NoNode);
}

#[tokio::test]
async fn a_hello_in_the_middle_of_a_revocation_is_refused() {
    // The row is written before the link is put in place …
    let w = World::new().await;
    assert!(w.nodes.authenticate(w.node.id, &[1; 32]).await.is_ok());
    w.store.revoke_node(w.node.id, 5).await.unwrap();
    assert_eq!(code(&w.try_hello(&w.node).await.unwrap_err()), "revoked");
    assert!(w.links.get(w.node.id).is_none());
    // … or while what the node holds is looked at: the link is in place and is cut.
    let w = World::new().await;
    let (first, _queue) = w.hello().await;
    let task = w.accept(1, true).await;
    drop(first);
    w.journal.hold();
    let other = Hello { spool: sample::spool_id(2), max_tasks: 4, keeps: 0, closed: None, attempts: vec![] };
    let (commands, mut queue) = mpsc::channel(LINK_QUEUE);
    let delivery = w.delivery.clone();
    let node = w.node.clone();
    let hello = async move { delivery.open_link(&node, other, commands).await };
    let meanwhile = async {
        // Another spool: the hello is ending what the first was granted.
        w.journal.begun().await;
        let admin = admin();
        let revoke = w.manage.revoke(&admin, w.node.id);
        let release = async {
            w.journal.begun().await;
            w.journal.release();
        };
        futures::future::join(revoke, release).await.0.unwrap();
    };
    let (opened, ()) = futures::future::join(hello, meanwhile).await;
    assert!(opened.map_or(true, |welcome| welcome.cut.is_cancelled()));
    assert!(w.links.get(w.node.id).is_none());
    assert_eq!(orders(&mut queue), 0);
    assert!(w.read(task.id).await.0.is_final());
    // A link that was opened with what was read before a drain drains all the same.
    let w = World::new().await;
    w.store.change_node(w.node.id, &NodeChange { draining: Some(true), ..Default::default() }).await.unwrap();
    let (_welcome, _queue) = w.try_hello(&w.node).await.unwrap();
    assert!(w.links.get(w.node.id).unwrap().draining);
}

#[tokio::test]
async fn what_a_dying_process_left_is_ended_at_the_start() {
    for remove in [false, true] {
        let before = World::new().await;
        let (_welcome, _queue) = before.hello().await;
        let task = before.accept(1, true).await;
        let elsewhere = {
            let (_other, _queue) = before.try_hello(&sample::node(2, 2)).await.unwrap();
            before.pool.accept(before.task(2, Some(sample::node_id(2))), &admin(), None).await.unwrap()
        };
        // The row is written, and the process ends before it does anything more.
        if remove {
            assert!(before.store.remove_node(before.node.id, 5).await.unwrap());
        } else {
            before.store.revoke_node(before.node.id, 5).await.unwrap();
        }
        assert_eq!(before.read(task.id).await.0, TaskState::Assigned);
        let after = World::over(before.store.clone());
        after.pool.recover().await.unwrap();
        after.manage.recover().await.unwrap();
        assert_eq!(after.read(task.id).await, revoked_end(), "removed: {remove}");
        assert_eq!((after.links.running(after.node.id), after.links.unsettled()), (0, vec![]));
        assert_eq!(after.read(elsewhere.id).await.0, TaskState::Assigned, "another node's is left alone");
        assert_eq!(after.links.running(sample::node_id(2)), 1);
    }
}

#[tokio::test]
async fn a_store_that_fails_in_the_middle_is_asked_again() {
    let w = World::new().await;
    let (_welcome, _queue) = w.hello().await;
    let task = w.accept(1, true).await;
    w.journal.fail(|_| true);
    let node = w.manage.revoke(&admin(), w.node.id).await.unwrap();
    assert!(node.revoked_at.is_some() && w.links.get(w.node.id).is_none(), "the revocation itself stands");
    assert_eq!(w.read(task.id).await.0, TaskState::Assigned);
    w.manage.follow().await.unwrap();
    assert_eq!(w.links.unsettled(), [w.node.id]);
    w.journal.work();
    w.manage.follow().await.unwrap();
    assert_eq!(w.read(task.id).await, revoked_end());
    assert_eq!(w.links.unsettled(), []);
}

/// Another hub makes the change; this one has the link.
#[tokio::test]
async fn a_hub_follows_what_another_one_changed() {
    for remove in [false, true] {
        let here = World::new().await;
        let there = World::over(here.store.clone());
        here.manage.recover().await.unwrap();
        let (welcome, mut queue) = here.hello().await;
        there.manage.drain(&admin(), here.node.id).await.unwrap();
        here.manage.follow().await.unwrap();
        assert_eq!(here.standing(&here.row().await), ("draining", Some("draining")));
        there.manage.resume(&admin(), here.node.id).await.unwrap();
        here.manage.follow().await.unwrap();
        here.accept(1, true).await;
        assert_eq!(orders(&mut queue), 1);
        if remove {
            there.manage.remove(&admin(), here.node.id).await.unwrap();
        } else {
            there.manage.revoke(&admin(), here.node.id).await.unwrap();
        }
        // What this hub grants until it has heard of it ends as well.
        let late = here.accept(2, true).await;
        assert_eq!(late.progress.state, TaskState::Assigned);
        here.manage.follow().await.unwrap();
        assert!(welcome.cut.is_cancelled());
        assert_eq!(here.read(late.id).await, revoked_end());
        here.manage.follow().await.unwrap();
    }
}

#[tokio::test]
async fn a_page_by_labels_is_full_when_there_is_more() {
    let store = Arc::new(MemoryStore::peopled());
    // More than one read brings; of them every 200th fits.
    for n in 1..=1300u16 {
        let mut node = sample::node(n, 1);
        node.owner = sample::user_id(1 + n % 2);
        if n % 200 == 0 {
            node.labels.insert("gpu".into(), "a100".into());
        }
        add_node(&store, &node, n).await;
    }
    let w = World::over(store);
    let ids = |found: Vec<Node>| found.iter().map(|n| n.id).collect::<Vec<_>>();
    let gpu = Selector::parse("gpu,os=linux").unwrap();
    let page = async |before, limit| ids(w.nodes.list(&admin(), Some(&gpu), Window { before, limit }).await.unwrap());
    let all = [1200, 1000, 800, 600, 400, 200].map(sample::node_id);
    assert_eq!(page(None, 50).await, all);
    assert_eq!(page(None, 4).await, all[..4]);
    assert_eq!(page(Some(all[3]), 4).await, all[4..]);
    assert_eq!(page(Some(all[5]), 4).await, []);
    let own = Caller::person(sample::user_id(2), Role::Developer);
    assert_eq!(ids(w.nodes.list(&own, Some(&gpu), Window { before: None, limit: 9 }).await.unwrap()), [], "these are another's");
    let none = Selector::parse("gpu=h100").unwrap();
    assert_eq!(ids(w.nodes.list(&admin(), Some(&none), Window { before: None, limit: 9 }).await.unwrap()), []);
}

#[tokio::test]
async fn who_may_see_a_node_hears_what_becomes_of_it() {
    let w = World::new().await;
    let listen = |user: u16, role| {
        let who = Authenticated { caller: Caller::person(sample::user_id(user), role), login: None };
        w.nodes.events.open(who, Some(vec![Topic::Nodes]), None).unwrap()
    };
    let (mut owner, mut stranger) = (listen(1, Role::Developer), listen(2, Role::Developer));
    let id = w.node.id;
    let change = async |c: NodeChange| drop(w.manage.change(&admin(), id, c).await.unwrap());
    let rename = NodeChange { name: Some("attic".into()), ..Default::default() };
    change(rename.clone()).await;
    change(rename).await;
    change(NodeChange { task_limit: Some(Some(2)), ..Default::default() }).await;
    for _ in 0..2 {
        w.manage.drain(&admin(), id).await.unwrap();
    }
    w.manage.resume(&admin(), id).await.unwrap();
    for _ in 0..2 {
        w.manage.revoke(&admin(), id).await.unwrap();
    }
    w.manage.remove(&admin(), id).await.unwrap();
    let mut heard = vec![];
    while heard.last() != Some(&"removed") {
        let Told::Event(_, event) = owner.next().await else { panic!() };
        heard.push(event.kind());
    }
    assert_eq!(heard, ["renamed", "changed", "draining", "resumed", "revoked", "removed"], "each change once");
    assert!(futures::FutureExt::now_or_never(stranger.next()).is_none(), "another's node is nobody's business");
}
