//! What a node makes of the trust bundles that it is told.

use super::support::{self, Hub, Link};
use super::{Node, script, task};
use ed25519_dalek::SigningKey;
use mesh_core::bundle::Bundle;
use mesh_core::seal::{self, key_id, payload_type};
use mesh_wire::node::{KeySignature, RenewNow, SignedBundle, hub_frame, node_frame};

fn id(key: &SigningKey) -> String {
    key_id(&key.verifying_key().to_bytes())
}
fn signed(kind: &str, body: Vec<u8>, by: &[&SigningKey]) -> SignedBundle {
    let signatures = by.iter().map(|k| KeySignature { key_id: id(k), signature: seal::sign(k, kind, &body).to_vec() }).collect();
    SignedBundle { body, signatures }
}
fn body(hub: &Hub, seq: u64, keys: &[&SigningKey]) -> Vec<u8> {
    let task_keys = keys.iter().map(|k| k.verifying_key().to_bytes()).collect();
    Bundle { hub: hub.inner.hub, seq, made_at: 1, roots: vec![hub.inner.root.to_vec()], task_keys }.encode()
}
async fn told(link: &mut Link, bundle: SignedBundle) -> Result<u64, String> {
    link.send(hub_frame::Kind::Bundle(bundle)).await;
    loop {
        match link.frame().await {
            node_frame::Kind::Bundle(ack) => return Ok(ack.seq),
            node_frame::Kind::Rejected(r) => return Err(format!("{} {}", r.code, r.detail)),
            // What a killed daemon had not told its warden to forget.
            node_frame::Kind::Started(_) | node_frame::Kind::Result(_) => {}
            other => panic!("{other:?}"),
        }
    }
}
async fn runs_by(hub: &Hub, link: &mut Link, key: &SigningKey) {
    let order = hub.order(task(), &script("exit 0"), None);
    let wanted = order.task_id.clone();
    link.orders_by(key, vec![order]).await;
    let result = link.result().await;
    assert_eq!(result.task_id, wanted);
    link.acknowledge(&result).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_believes_its_newest_bundle_and_no_other() {
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up(&mut hub).await;
    let (old, new) = (hub.inner.task_key.clone(), SigningKey::from_bytes(&[9; 32]));
    assert_eq!((link.hello.bundle_seq, &link.hello.task_keys), (0, &vec![id(&old)]));
    let (first, both, last) = (body(&hub, 1, &[&old]), body(&hub, 2, &[&old, &new]), body(&hub, 3, &[&new]));
    let good = || signed(payload_type::BUNDLE, both.clone(), &[&old, &new]);

    let refused =
        |r: Result<u64, String>, why: &str| assert!(r.as_ref().is_err_and(|e| e.starts_with("bad_bundle") && e.contains(why)), "{r:?}");
    refused(told(&mut link, signed(payload_type::BUNDLE, both.clone(), &[&new])).await, "no key that this node believes");
    refused(told(&mut link, signed(payload_type::ORDERS, both.clone(), &[&old])).await, "no key that this node believes");
    assert_eq!(told(&mut link, good()).await, Ok(2));
    assert_eq!(told(&mut link, good()).await, Ok(2), "the same again");
    runs_by(&hub, &mut link, &new).await;
    runs_by(&hub, &mut link, &old).await;
    refused(told(&mut link, signed(payload_type::BUNDLE, first, &[&old])).await, "it is an old one");
    refused(told(&mut link, signed(payload_type::BUNDLE, body(&hub, 2, &[&old]), &[&old])).await, "another one");

    // Killed behind its acknowledgement: what it said that it believes, it believes.
    node.signal(rustix::process::Signal::KILL);
    node.wait();
    node.start(&["run"]);
    let mut link = hub.link().await;
    assert_eq!((link.hello.bundle_seq, &link.hello.task_keys), (2, &vec![id(&old), id(&new)]));
    assert_eq!(told(&mut link, signed(payload_type::BUNDLE, last, &[&new])).await, Ok(3));
    refused(told(&mut link, good()).await, "it is an old one");
    let order = hub.order(task(), &script("exit 0"), None);
    link.orders_by(&old, vec![order]).await;
    match link.frame().await {
        node_frame::Kind::Rejected(r) => assert_eq!(r.code, "unknown_key"),
        other => panic!("a retired key was believed: {other:?}"),
    }
    runs_by(&hub, &mut link, &new).await;

    // It renews when it is asked to, long before its certificate's end.
    assert_eq!(hub.knobs().renewals, Vec::<u64>::new());
    link.send(hub_frame::Kind::Renew(RenewNow {})).await;
    let link = hub.link().await;
    assert_eq!((link.hello.bundle_seq, hub.knobs().renewals.len()), (3, 1));
}
