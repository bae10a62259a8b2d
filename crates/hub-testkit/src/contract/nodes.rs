use super::sample::{invite, invite_id, node, node_id, session, session_id, user_id};
use super::{T0, all, window};
use futures::future::join_all;
use hub_engine::ports::NodeDirectory;
use hub_engine::records::{Claim, Invite, InviteUse, Node, NodeCertificate, NodeChange, NodeCounts, RegistryChanges, Within};
use mesh_core::capability::Capabilities;
use std::sync::Arc;

const AGAIN_MS: i64 = 600;

pub async fn nodes(make: impl AsyncFn() -> Arc<dyn NodeDirectory>) {
    invites(&*make().await).await;
    claims(&*make().await).await;
    racing_claims(&*make().await).await;
    lists(&*make().await).await;
    registration(&*make().await).await;
    changes(&*make().await).await;
    revocation(&*make().await).await;
    removal(&*make().await).await;
    racing_ends(&*make().await).await;
    counts(&*make().await).await;
    notices(&*make().await).await;
    bundles(&*make().await).await;
}

async fn bundles(store: &dyn NodeDirectory) {
    store.note_bundle(node_id(1), 7).await.unwrap();
    store.add_invite(&invite(1)).await.unwrap();
    assert_eq!(store.claim_invite(invite_id(1), &node(1, 1), T0, AGAIN_MS).await.unwrap(), Claim::Claimed);
    let now = async || store.node(node_id(1)).await.unwrap().unwrap();
    assert_eq!(now().await, node(1, 1), "what was said before it was there is not kept");
    for (said, known) in [(3, 3), (2, 3), (3, 3), (i64::MAX as u64, i64::MAX as u64)] {
        store.note_bundle(node_id(1), said).await.unwrap();
        assert_eq!(now().await, Node { bundle_seq: known, ..node(1, 1) }, "{said}: the highest, and nothing else changes");
    }
    let next = NodeCertificate { counter: 1, ..node(1, 1).certificate };
    assert!(store.renew(node_id(1), &next).await.unwrap());
    assert_eq!(now().await.bundle_seq, i64::MAX as u64);
}

async fn notices(store: &dyn NodeDirectory) {
    store.add_notice(node_id(1), "nobody", T0).await.unwrap();
    store.add_invite(&invite(1)).await.unwrap();
    let added = Node { notices: vec![], ..node(1, 1) };
    assert_eq!(store.claim_invite(invite_id(1), &added, T0, AGAIN_MS).await.unwrap(), Claim::Claimed);
    let now = async || store.node(node_id(1)).await.unwrap().unwrap();
    join_all(["one", "two"].map(|words| store.add_notice(node_id(1), words, T0))).await.into_iter().for_each(|r| r.unwrap());
    let lines = now().await.notices;
    assert!(lines.len() == 2 && ["one at ", "two at "].iter().all(|w| lines.iter().any(|l| l.starts_with(w))), "{lines:?}");
    assert_eq!(Node { notices: vec![], ..now().await }, added, "nothing else of it changes");
    for _ in 0..200 {
        store.add_notice(node_id(1), "again", T0).await.unwrap();
    }
    assert!(now().await.notices.len() < 50, "a node cannot fill the store");
}

async fn counts(store: &dyn NodeDirectory) {
    assert_eq!(store.count_nodes().await.unwrap(), NodeCounts::default());
    for n in 1..=3 {
        store.add_invite(&invite(n)).await.unwrap();
        let node = Node { revoked_at: (n == 3).then_some(T0), ..node(n, n as u8) };
        assert_eq!(store.claim_invite(invite_id(n), &node, T0, AGAIN_MS).await.unwrap(), Claim::Claimed);
    }
    assert_eq!(store.count_nodes().await.unwrap(), NodeCounts { known: 3, revoked: 1 });
}

async fn invites(store: &dyn NodeDirectory) {
    for n in 1..=4 {
        let i = Invite { owner: user_id(1 + n % 2), ..invite(n) };
        store.add_invite(&i).await.unwrap();
        assert_eq!(store.invite(i.id).await.unwrap(), Some(i));
    }
    assert!(store.add_invite(&invite(1)).await.is_err(), "an id is used once");
    assert_eq!(store.invite(invite_id(9)).await.unwrap(), None);
    let ids = async |within: Option<Within>, w| store.invites(within.as_ref(), w).await.unwrap().iter().map(|i| i.id).collect::<Vec<_>>();
    let id = invite_id;
    assert_eq!(ids(None, all()).await, [id(4), id(3), id(2), id(1)], "newest first");
    assert_eq!(ids(None, window(Some(id(4)), 2)).await, [id(3), id(2)]);
    assert_eq!(ids(Some(Within::owned_by(user_id(2))), all()).await, [id(3), id(1)]);
    assert_eq!(ids(Some(Within::default()), all()).await, vec![], "within nothing");

    assert!(store.revoke_invite(id(1), T0 + 1).await.unwrap());
    assert_eq!(store.invite(id(1)).await.unwrap().unwrap().revoked_at, Some(T0 + 1));
    assert!(!store.revoke_invite(id(9), T0).await.unwrap(), "unknown");
    assert_eq!(store.claim_invite(id(2), &node(1, 1), T0, AGAIN_MS).await.unwrap(), Claim::Claimed);
    assert!(!store.revoke_invite(id(2), T0).await.unwrap(), "used");
}

async fn claims(store: &dyn NodeDirectory) {
    for n in 1..=3 {
        store.add_invite(&invite(n)).await.unwrap();
    }
    let claim = async |n: u16, node: &Node, now| store.claim_invite(invite_id(n), node, now, AGAIN_MS).await.unwrap();
    let nodes = async || store.nodes(None, all()).await.unwrap();
    let notices = async || store.invite(invite_id(3)).await.unwrap().unwrap().notices;

    assert_eq!(claim(9, &node(1, 1), T0).await, Claim::Unknown);
    assert_eq!(claim(1, &node(1, 1), T0 + 1000).await, Claim::Expired, "it ends at this moment");
    store.revoke_invite(invite_id(2), T0).await.unwrap();
    assert_eq!(claim(2, &node(1, 1), T0).await, Claim::Revoked);
    assert_eq!(nodes().await, vec![], "who is refused is not added");

    let used = T0 + 999;
    assert_eq!(claim(3, &node(1, 7), used).await, Claim::Claimed);
    assert_eq!(nodes().await, vec![node(1, 7)]);
    let by = InviteUse { at: used, spki: [7; 32], node: node_id(1) };
    assert_eq!(store.invite(invite_id(3)).await.unwrap().unwrap().used, Some(by.clone()));

    // The same key, with the node that it proposes now: it gets the first one's.
    assert_eq!(claim(3, &node(2, 7), used + AGAIN_MS - 1).await, Claim::Again { node: Box::new(node(1, 7)) });
    assert_eq!(notices().await, Vec::<String>::new());
    assert_eq!(claim(3, &node(2, 8), used + 1).await, Claim::Used, "another key");
    assert_eq!(notices().await.len(), 1);
    assert!(notices().await[0].contains("another key"));
    assert_eq!(claim(3, &node(2, 7), used + AGAIN_MS + 1).await, Claim::Used, "the same key, too late");
    assert_eq!(notices().await.len(), 2);
    assert_eq!(nodes().await, vec![node(1, 7)]);
    assert_eq!(store.invite(invite_id(3)).await.unwrap().unwrap().used, Some(by), "the first use stands");

    // A claim whose node cannot be added leaves the invite as it was.
    store.add_invite(&invite(4)).await.unwrap();
    assert!(store.claim_invite(invite_id(4), &node(1, 9), T0, AGAIN_MS).await.is_err());
    assert_eq!(store.invite(invite_id(4)).await.unwrap(), Some(invite(4)));
    assert_eq!(claim(4, &node(4, 9), T0).await, Claim::Claimed);

    for _ in 0..200 {
        assert_eq!(claim(3, &node(5, 8), used + 1).await, Claim::Used);
    }
    assert!(notices().await.len() < 50, "a stranger cannot fill the store");
}

async fn racing_claims(store: &dyn NodeDirectory) {
    store.add_invite(&invite(1)).await.unwrap();
    let candidates: Vec<Node> = (1..=20).map(|n| node(n, n as u8)).collect();
    let outcomes = join_all(candidates.iter().map(|n| store.claim_invite(invite_id(1), n, T0, AGAIN_MS))).await;
    let outcomes: Vec<Claim> = outcomes.into_iter().map(Result::unwrap).collect();
    assert_eq!(outcomes.iter().filter(|c| **c == Claim::Claimed).count(), 1, "exactly one wins");
    assert_eq!(outcomes.iter().filter(|c| **c == Claim::Used).count(), 19);
    let winner = outcomes.iter().position(|c| *c == Claim::Claimed).unwrap();
    assert_eq!(store.nodes(None, all()).await.unwrap(), vec![candidates[winner].clone()]);
    assert_eq!(store.invite(invite_id(1)).await.unwrap().unwrap().used.unwrap().node, candidates[winner].id);
}

async fn add(store: &dyn NodeDirectory, node: &Node, n: u16) {
    store.add_invite(&invite(n)).await.unwrap();
    assert_eq!(store.claim_invite(invite_id(n), node, T0, AGAIN_MS).await.unwrap(), Claim::Claimed);
}

async fn lists(store: &dyn NodeDirectory) {
    let ids = |nodes: Vec<Node>| nodes.iter().map(|n| n.id).collect::<Vec<_>>();
    for n in 1..=4 {
        let name = if n == 2 { "other" } else { "build" };
        let one = Node { owner: user_id(1 + n % 2), name: name.into(), ..node(n, n as u8) };
        add(store, &one, n).await;
        assert_eq!(store.node(one.id).await.unwrap(), Some(one), "as it was given");
    }
    assert_eq!(store.node(node_id(9)).await.unwrap(), None);
    assert_eq!(ids(store.nodes(None, all()).await.unwrap()), [4, 3, 2, 1].map(node_id), "newest first");
    assert_eq!(ids(store.nodes(None, window(Some(node_id(3)), 1)).await.unwrap()), [node_id(2)]);
    let within = async |w: Within| ids(store.nodes(Some(&w), all()).await.unwrap());
    assert_eq!(within(Within::owned_by(user_id(2))).await, [3, 1].map(node_id));
    let granted = vec![node_id(4), node_id(3), node_id(9)];
    assert_eq!(within(Within { nodes: granted.clone(), ..Within::owned_by(user_id(2)) }).await, [4, 3, 1].map(node_id), "each once");
    assert_eq!(within(Within { nodes: granted.clone(), ..Default::default() }).await, [4, 3].map(node_id));
    // As many as a grant by labels may reach.
    let many: Vec<_> = (100..40_100).map(node_id).collect();
    let many = Within { nodes: [many, granted].concat(), ..Within::owned_by(user_id(2)) };
    assert_eq!(within(many).await, [4, 3, 1].map(node_id));
    assert_eq!(within(Within::default()).await, vec![], "within nothing");
    assert_eq!(ids(store.nodes_named("build").await.unwrap()), [4, 3, 1].map(node_id), "names are shared");
    assert_eq!(ids(store.nodes_named("Build").await.unwrap()), vec![]);
}

async fn registration(store: &dyn NodeDirectory) {
    add(store, &node(1, 1), 1).await;
    add(store, &node(2, 2), 2).await;
    let one = async || store.node(node_id(1)).await.unwrap().unwrap();

    let caps = Capabilities { hostname: "h".into(), skills: [("shell".to_owned(), "1".to_owned())].into(), ..Default::default() };
    store.register(node_id(1), "0.2.0", &caps).await.unwrap();
    store.register(node_id(9), "0.2.0", &caps).await.unwrap();
    assert_eq!((one().await.version, one().await.capabilities), ("0.2.0".to_owned(), caps));

    assert_eq!(store.raise_generation(node_id(1), T0 + 5).await.unwrap(), Some(1));
    assert_eq!(one().await.last_seen_at, Some(T0 + 5));
    let mut raised = join_all((0..20).map(|_| store.raise_generation(node_id(1), T0 + 6))).await;
    let mut raised: Vec<u64> = raised.drain(..).map(|g| g.unwrap().unwrap()).collect();
    raised.sort_unstable();
    assert_eq!(raised, (2..=21).collect::<Vec<_>>(), "no generation is given twice");
    assert_eq!(one().await.generation, 21);
    assert_eq!(store.raise_generation(node_id(9), T0).await.unwrap(), None, "unknown");

    store.seen(&[node_id(1), node_id(9)], T0 + 8).await.unwrap();
    store.seen(&[], T0 + 9).await.unwrap();
    assert_eq!(one().await.last_seen_at, Some(T0 + 8));
    assert_eq!(store.node(node_id(2)).await.unwrap().unwrap().last_seen_at, None);

    let certificate = |counter, spki| NodeCertificate { spki: [spki; 32], der: vec![spki], not_after: T0 + 1, counter };
    for wrong in [0, 2, u64::MAX] {
        assert!(!store.renew(node_id(1), &certificate(wrong, 5)).await.unwrap(), "{wrong} does not follow 0");
    }
    assert!(!store.renew(node_id(9), &certificate(1, 5)).await.unwrap());
    assert_eq!(one().await.certificate, node(1, 1).certificate);
    assert!(store.renew(node_id(1), &certificate(1, 5)).await.unwrap());
    assert!(!store.renew(node_id(1), &certificate(1, 6)).await.unwrap(), "each counter once");
    assert_eq!(one().await.certificate, certificate(1, 5));
}

async fn changes(store: &dyn NodeDirectory) {
    let other = Node { slots: Some([("gpu".to_owned(), 2)].into()), task_limit: Some(3), draining: true, ..node(2, 2) };
    add(store, &node(1, 1), 1).await;
    add(store, &other, 2).await;
    assert_eq!(store.node(node_id(2)).await.unwrap(), Some(other.clone()), "as it was given");
    assert_eq!(store.registry_epoch().await.unwrap(), 0);
    assert_eq!(store.changed_since(0).await.unwrap(), RegistryChanges::default());
    let change = async |c: NodeChange| store.change_node(node_id(1), &c).await.unwrap().unwrap();

    let named = change(NodeChange { name: Some("büro".into()), ..Default::default() }).await;
    assert_eq!(named, Node { name: "büro".into(), epoch: 1, ..node(1, 1) }, "the rest stays as it is");
    let labels = [("zone".to_owned(), "b".to_owned())];
    let slots = [("gpu".to_owned(), 2), ("seat".to_owned(), 0)];
    let all = NodeChange {
        name: Some("n".into()),
        labels: Some(labels.clone().into()),
        slots: Some(Some(slots.clone().into())),
        task_limit: Some(Some(7)),
        draining: Some(true),
    };
    let expect = Node {
        name: "n".into(),
        labels: labels.into(),
        slots: Some(slots.into()),
        task_limit: Some(7),
        draining: true,
        epoch: 2,
        ..node(1, 1)
    };
    assert_eq!(change(all).await, expect);
    assert_eq!(store.node(node_id(1)).await.unwrap(), Some(expect.clone()), "and so it is kept");
    let none = change(NodeChange { slots: Some(Some([].into())), labels: Some([].into()), ..Default::default() }).await;
    assert_eq!((none.slots, none.labels.len()), (Some([].into()), 0), "no slots is not the same as never set");
    let back = NodeChange { slots: Some(None), task_limit: Some(None), draining: Some(false), ..Default::default() };
    let back = change(back).await;
    assert_eq!((back.slots, back.task_limit, back.draining, back.epoch), (None, None, false, 4));
    assert_eq!(store.change_node(node_id(9), &NodeChange::default()).await.unwrap(), None, "unknown");

    // Told from where one stands; a node once, as it is now.
    let ids = |c: RegistryChanges| c.nodes.iter().map(|n| n.id).collect::<Vec<_>>();
    assert_eq!(ids(store.changed_since(0).await.unwrap()), [node_id(1)]);
    assert_eq!(ids(store.changed_since(4).await.unwrap()), []);
    store.change_node(node_id(2), &NodeChange { draining: Some(false), ..Default::default() }).await.unwrap();
    let news = store.changed_since(4).await.unwrap();
    assert_eq!(news.epoch, store.registry_epoch().await.unwrap());
    let fresh = store.node(node_id(2)).await.unwrap().unwrap();
    assert_eq!(news.nodes, [fresh]);
    assert_eq!(ids(store.changed_since(news.epoch).await.unwrap()), []);

    // What the machine does is no change of people's.
    store.raise_generation(node_id(1), T0).await.unwrap();
    store.register(node_id(1), "9", &Capabilities::default()).await.unwrap();
    assert_eq!(store.registry_epoch().await.unwrap(), news.epoch);
}

async fn revocation(store: &dyn NodeDirectory) {
    add(store, &node(1, 1), 1).await;
    let revoked = store.revoke_node(node_id(1), T0 + 5).await.unwrap().unwrap();
    assert_eq!((revoked.revoked_at, revoked.epoch), (Some(T0 + 5), 1));
    let again = store.revoke_node(node_id(1), T0 + 9).await.unwrap().unwrap();
    assert_eq!(again.revoked_at, Some(T0 + 5), "the first revocation counts");
    assert_eq!(store.revoke_node(node_id(9), T0).await.unwrap(), None);

    assert_eq!(store.raise_generation(node_id(1), T0).await.unwrap(), None, "it links no more");
    let certificate = NodeCertificate { spki: [1; 32], der: vec![5], not_after: T0, counter: 1 };
    assert!(!store.renew(node_id(1), &certificate).await.unwrap(), "its certificate is not renewed");
    let change = NodeChange { name: Some("back".into()), ..Default::default() };
    assert_eq!(store.change_node(node_id(1), &change).await.unwrap(), None, "and it is not changed");
    let kept = store.node(node_id(1)).await.unwrap().unwrap();
    assert_eq!((kept.name.as_str(), kept.generation, kept.certificate.counter), ("build", 0, 0));
    assert_eq!(store.claim_invite(invite_id(1), &node(2, 1), T0 + 1, AGAIN_MS).await.unwrap(), Claim::Again { node: Box::new(kept) });
    assert!(!store.was_removed(node_id(1)).await.unwrap());
}

async fn removal(store: &dyn NodeDirectory) {
    add(store, &node(1, 1), 1).await;
    add(store, &node(2, 2), 2).await;
    assert!(!store.was_removed(node_id(1)).await.unwrap());
    assert!(store.remove_node(node_id(1), T0).await.unwrap());
    assert!(!store.remove_node(node_id(1), T0).await.unwrap(), "it is gone");
    assert!(!store.remove_node(node_id(9), T0).await.unwrap(), "it never was");
    assert_eq!(store.node(node_id(1)).await.unwrap(), None);
    assert_eq!(store.nodes(None, all()).await.unwrap().len(), 1);
    assert!(store.was_removed(node_id(1)).await.unwrap() && !store.was_removed(node_id(9)).await.unwrap());
    assert_eq!(store.raise_generation(node_id(1), T0).await.unwrap(), None);
    assert_eq!(store.revoke_node(node_id(1), T0).await.unwrap(), None);
    assert_eq!(store.claim_invite(invite_id(1), &node(3, 1), T0 + 1, AGAIN_MS).await.unwrap(), Claim::Removed, "the same key, at once");
    let news = store.changed_since(0).await.unwrap();
    assert_eq!((news.nodes.len(), &news.removed[..]), (0, &[node_id(1)][..]));
    assert_eq!(store.changed_since(news.epoch).await.unwrap().removed, []);

    store.revoke_node(node_id(2), T0).await.unwrap();
    add(store, &node(4, 4), 4).await;
    assert_eq!(store.living(&[node_id(1), node_id(2), node_id(4), node_id(9)]).await.unwrap(), [node_id(4)]);
    assert_eq!(store.living(&[]).await.unwrap(), []);
}

/// A hello, a change and an end at the same moment: whoever is first, the end stands.
async fn racing_ends(store: &dyn NodeDirectory) {
    for n in 1..=10 {
        add(store, &node(n, n as u8), n).await;
        let id = node_id(n);
        let change = NodeChange { draining: Some(true), ..Default::default() };
        let (hello, changed, end) =
            futures::join!(store.raise_generation(id, T0), store.change_node(id, &change), store.revoke_node(id, T0 + 1));
        hello.unwrap();
        changed.unwrap();
        assert_eq!(end.unwrap().unwrap().revoked_at, Some(T0 + 1));
        assert_eq!(store.raise_generation(id, T0 + 2).await.unwrap(), None);
        let (one, two) = futures::join!(store.remove_node(id, T0), store.remove_node(id, T0));
        assert!(one.unwrap() != two.unwrap(), "it is removed once");
    }
    assert_eq!(store.changed_since(0).await.unwrap().removed.len(), 10);
}

/// A node that goes takes its attachments with it.
pub async fn nodes_and_sessions<S: NodeDirectory + hub_engine::ports::Sessions>(make: impl AsyncFn() -> Arc<S>) {
    let store = make().await;
    for n in 1..=2 {
        add(&*store, &node(n, n as u8), n).await;
    }
    for n in 1..=2 {
        store.add_session(&session(n, 1)).await.unwrap();
        for k in [2, 1] {
            store.attach(session_id(n), node_id(k), None, T0).await.unwrap();
        }
    }
    store.revoke_node(node_id(2), T0).await.unwrap();
    assert!(store.remove_node(node_id(1), T0).await.unwrap());
    for n in 1..=2 {
        assert_eq!(store.session(session_id(n)).await.unwrap().unwrap().nodes, [node_id(2)], "a revoked one stays, to be seen");
    }
}
