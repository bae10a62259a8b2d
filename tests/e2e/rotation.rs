//! A new authority in the place of the old one, with real programs: no work is lost, no machine is left
//! behind unseen, and what was retired counts no more.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries")]

use mesh_process::SystemClock;
use mesh_tests::{Hub, Node, folder, program, shown, text, until};
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{HealthReport, RegistrationRequest};
use node::link::time::NodeTime;
use node::state::DataDir;
use node::tls::{self, ClientCertificate};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn ca(hub: &Hub, args: &[&str]) -> Output {
    let mut c = Command::new(program("cortex-hub"));
    c.arg("ca").args(args).arg("--data-dir").arg(hub.data()).stdin(Stdio::null()).output().expect("cortex-hub runs")
}
fn done(hub: &Hub, args: &[&str]) -> String {
    let out = ca(hub, args);
    assert!(out.status.success(), "{}", shown(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
fn refused(hub: &Hub, args: &[&str]) -> String {
    let out = ca(hub, args);
    assert_eq!(out.status.code(), Some(1), "{}", shown(&out));
    String::from_utf8_lossy(&out.stderr).into_owned()
}

async fn stands(hub: &Hub) -> Value {
    hub.get("/api/v1/system/ca").await
}
fn names(view: &Value, of: &str) -> Vec<String> {
    let mut names: Vec<String> = view[of].as_array().unwrap().iter().map(|s| text(s, "name")).collect();
    names.sort();
    names
}
/// Waits until exactly these are missing.
async fn behind(hub: &Hub, of: &str, expected: &[&str]) -> Value {
    until(&format!("{of}: {expected:?}"), async || Some(stands(hub).await).filter(|v| names(v, of) == expected)).await
}
async fn away(hub: &Hub, node: &mut Node) {
    node.daemon().terminate().await;
    node.offline(hub).await;
}
async fn runs_on(hub: &Hub, node: &Node) -> Value {
    let body = json!({"node": node.id, "shell": {"argv": ["echo", "here"]}, "wait_secs": 20});
    let t = hub.finished(&text(&hub.dispatch(body).await, "id")).await;
    assert_eq!((t["state"].as_str(), t["stdout"].as_str()), (Some("succeeded"), Some("here\n")), "{t}");
    t
}
async fn join(hub: &Hub, name: &str, yaml: &str) -> Node {
    let mut node = Node::prepare(name, yaml);
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    node.run();
    node.online(hub).await;
    node
}

/// Whom a node shows itself as, as its folder has it now.
fn shows(node: &Node) -> (Vec<u8>, Vec<u8>) {
    let (certificate, root) = DataDir::new(node.data()).certificates().unwrap();
    (certificate.to_vec(), root.to_vec())
}
type Client = NodeLinkClient<tonic::transport::Channel>;

/// A connection to the hub with that, by somebody who trusts the hub's root of now.
async fn connects(hub: &Hub, node: &Node, (certificate, root): (Vec<u8>, Vec<u8>)) -> Result<Client, String> {
    let shown = done(hub, &["show"]);
    let pin = shown.lines().find_map(|l| l.strip_prefix("pin   ")).expect("a pin");
    let pin = node::config::parse_pin(pin.trim()).unwrap();
    let identity = DataDir::new(node.data()).identity().unwrap();
    let own = ClientCertificate { certificate: certificate.into(), root: root.into(), key: identity.private() };
    let config = tls::client_config(pin, Some(own), NodeTime::new(0, SystemClock::shared())).unwrap();
    let hub_id = std::fs::read_to_string(hub.data().join("keys/hub-id")).unwrap().trim().parse().unwrap();
    let name = mesh_core::enrol::server_name(hub_id);
    let mut tries = 0;
    // Who stood still for the 3 s before its first word was hung up on, and dials again, as a node does.
    let stream = loop {
        tries += 1;
        let begun = std::time::Instant::now();
        match tls::connect(&hub.node, &name, config.clone()).await {
            Err(_) if tries < 10 && begun.elapsed() >= std::time::Duration::from_secs(3) => {}
            done => break done.map_err(|e| e.to_string())?,
        }
    };
    Ok(NodeLinkClient::new(tls::channel(stream).await.map_err(|e| e.to_string())?))
}
async fn asks(link: &mut Client) -> Result<(), String> {
    let report = HealthReport { ask_only: true, ..Default::default() };
    link.sync_configuration(RegistrationRequest { version: "t".into(), ..Default::default() }).await.map_err(|e| e.to_string())?;
    link.report_health(report).await.map_err(|e| e.to_string())?;
    Ok(())
}
async fn calls(hub: &Hub, node: &Node, who: (Vec<u8>, Vec<u8>)) -> Result<(), String> {
    asks(&mut connects(hub, node, who).await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_loses_no_work_and_leaves_nobody_behind_unseen() {
    mesh_process::install_tls_provider();
    let mut hub = Hub::start().await;
    let mut here = Node::join(&hub, "here").await;
    let mut absent = Node::join(&hub, "absent").await;
    let mut sleeper = Node::join(&hub, "sleeper").await;
    let mut gone = Node::join(&hub, "gone").await;
    // Every node has the bundle before anything begins.
    let before = behind(&hub, "stragglers", &[]).await;
    assert_eq!((before["phase"].as_str(), before["seq"].as_u64(), before["nodes"].as_u64()), (Some("steady"), Some(1), Some(4)));
    let old = shows(&here);
    let (_, old_invite) = hub.invite(json!({"name": "early"})).await;

    let gate = here.dir.path().join("gate");
    let script = format!("i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; sleep 0.1; done; echo $i >&2", gate.display());
    let body = json!({"node": here.id, "shell": {"argv": ["sh", "-c", script]}});
    let work = text(&hub.dispatch(body).await, "id");
    hub.task_when(&work, "to run", |t| t["state"] == "running").await;
    away(&hub, &mut absent).await;
    away(&hub, &mut gone).await;

    // Nothing but a beginning is possible, and no step is taken without a hub that runs.
    for step in ["--issue", "--retire", "--abort"] {
        assert!(refused(&hub, &["rotate", step]).contains("start one with --begin"), "{step}");
    }
    let told = done(&hub, &["rotate", "--begin"]);
    assert!(told.contains("phase both"), "{told}");
    let both = behind(&hub, "stragglers", &["absent", "gone"]).await;
    assert!(both["seq"].as_u64() > before["seq"].as_u64(), "{both}");
    let told = refused(&hub, &["rotate", "--issue"]);
    assert!(told.contains("2 nodes have not acknowledged") && told.contains("absent") && told.contains("gone"), "{told}");
    away(&hub, &mut sleeper).await;

    // Killed between two steps: it goes on where it was.
    hub.crash_and_restart().await;
    here.online(&hub).await;
    let again = behind(&hub, "stragglers", &["absent", "gone"]).await;
    assert_eq!((&again["phase"], &again["seq"]), (&both["phase"], &both["seq"]));
    done(&hub, &["rotate", "--issue", "--leave-behind"]);
    hub.crash_and_restart().await;
    here.online(&hub).await;
    // Who believes the new root is asked for a new certificate, long before the old one ends.
    let issuing = behind(&hub, "on_old_root", &["absent", "gone", "sleeper"]).await;
    assert_eq!((issuing["phase"].as_str(), &issuing["seq"]), (Some("issuing"), &both["seq"]));
    // The hub has given it; its way to the machine is another matter.
    let new = until("the new certificate", async || Some(shows(&here)).filter(|(certificate, _)| *certificate != old.0)).await;
    assert_eq!(calls(&hub, &here, new.clone()).await, Ok(()));
    assert_eq!(calls(&hub, &here, old.clone()).await, Ok(()), "the old root still counts");
    let told = refused(&hub, &["rotate", "--retire"]);
    assert!(["absent", "gone", "sleeper"].iter().all(|n| told.contains(n)), "{told}");
    assert!(refused(&hub, &["rotate", "--abort"]).contains("no way back"));
    let shown = done(&hub, &["show"]);
    assert!(shown.contains("the old root, which still counts") && shown.matches("BEGIN CERTIFICATE").count() == 2, "{shown}");

    // Who was away over both steps comes back by what it believed, and follows.
    absent.run();
    absent.online(&hub).await;
    behind(&hub, "on_old_root", &["gone", "sleeper"]).await;
    runs_on(&hub, &absent).await;
    // Invites of before and of now are both good.
    let early = join(&hub, "early", &old_invite).await;
    let (_, new_invite) = hub.invite(json!({"name": "late"})).await;
    assert_ne!(pin(&old_invite), pin(&new_invite));
    let late = join(&hub, "late", &new_invite).await;
    behind(&hub, "stragglers", &["gone"]).await;
    behind(&hub, "on_old_root", &["gone", "sleeper"]).await;
    for node in [&here, &early, &late] {
        runs_on(&hub, node).await;
    }
    assert_eq!(hub.task(&work).await["state"], "running");

    let mut stands_still = connects(&hub, &here, old.clone()).await.unwrap();
    assert_eq!(asks(&mut stands_still).await, Ok(()));
    done(&hub, &["rotate", "--retire", "--leave-behind"]);
    let said = asks(&mut stands_still).await.expect_err("its root is retired");
    assert!(said.contains("certificate_expired"), "{said}");
    hub.crash_and_restart().await;
    for node in [&mut here, &mut absent] {
        node.online(&hub).await;
    }
    let end = behind(&hub, "stragglers", &["gone", "sleeper"]).await;
    assert!(end["phase"] == "steady" && end["seq"].as_u64() > both["seq"].as_u64(), "{end}");
    assert_eq!(calls(&hub, &here, new).await, Ok(()));
    assert!(calls(&hub, &here, old).await.is_err(), "a certificate by a retired root");

    // It believes the new root, and its own certificate is worth nothing: its key brings another one.
    sleeper.run();
    sleeper.online(&hub).await;
    runs_on(&hub, &sleeper).await;
    behind(&hub, "stragglers", &["gone"]).await;
    // It has never heard of the new root. It says what to do, and the hub hears nothing of it.
    gone.run();
    let daemon = gone.daemon();
    until("the one that was left behind to say so", async || daemon.log().contains("join anew with a fresh invite").then_some(())).await;
    assert!(gone.daemon().is_running());
    gone.offline(&hub).await;

    std::fs::write(&gate, "").unwrap();
    let t = hub.finished(&work).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
    let out = String::from_utf8(hub.output(&work, "?stream=stdout").await).unwrap();
    let counted = String::from_utf8(hub.output(&work, "?stream=stderr").await).unwrap();
    assert!(out.lines().enumerate().all(|(i, l)| l == format!("line {}", i + 1)), "whole, once, in order");
    assert_eq!(out.lines().count().to_string(), counted.trim());

    // The log is signed by the old key and then by the new one, and holds each step.
    let log = hub.get("/api/v1/audit/verify").await;
    assert_eq!(log["ok"], true, "{log}");
    let entries = hub.get("/api/v1/audit?type=system_changed&limit=500").await;
    let steps = |outcome: &str| {
        let all = entries["items"].as_array().unwrap().iter().filter(|e| e["action"] == "ca.rotate" && e["outcome"] == outcome);
        let mut steps: Vec<String> = all.map(|e| text(&e["detail"], "step")).collect();
        steps.sort();
        steps
    };
    assert_eq!(steps("ok"), ["begin", "issue", "retire"], "{entries}");
    assert_eq!(steps("failed"), ["abort", "abort", "issue", "issue", "retire", "retire"]);
}

/// What stands in the keys: whose, in which step.
fn of_keys(shown: &str) -> Vec<&str> {
    let words = ["hub ", "pin ", "sign ", "phase ", "seq ", "other "];
    shown.lines().filter(|l| words.iter().any(|w| l.starts_with(w))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_keys_brings_a_rotation_back_where_it_was() {
    let mut hub = Hub::start().await;
    let run = |data: &Path, args: &[&str]| {
        let mut c = Command::new(program("cortex-hub"));
        let out = c.args(args).arg("--data-dir").arg(data).stdin(Stdio::null()).output().expect("cortex-hub runs");
        assert!(out.status.success(), "{}", shown(&out));
    };
    let (file, words) = (hub.dir.path().join("backup"), hub.dir.path().join("words"));
    std::fs::write(&words, "four words are enough").unwrap();
    let (file, words) = (file.to_str().unwrap(), words.to_str().unwrap());
    done(&hub, &["rotate", "--begin"]);
    run(&hub.data(), &["backup", file, "--with-keys", "--passphrase-file", words]);
    let then = done(&hub, &["show"]);
    assert_eq!(of_keys(&then).len(), 6, "{then}");
    done(&hub, &["rotate", "--issue"]);
    hub.process.terminate().await;
    assert!(refused(&hub, &["rotate", "--retire"]).contains("no hub runs on"));
    assert!(done(&hub, &["show"]).contains("phase issuing"), "the keys say so without a hub");

    let other = folder();
    let data = other.path().join("hub");
    run(&data, &["restore", file, "--passphrase-file", words]);
    let restored = Hub::start_in(data.clone(), &[], &[]).await;
    run(&data, &["restore", "--go"]);
    let now = done(&restored, &["show"]);
    assert_eq!(of_keys(&now), of_keys(&then));
    done(&restored, &["rotate", "--issue"]);
    let told = done(&restored, &["rotate", "--retire"]);
    assert!(told.contains("phase steady"), "{told}");
    assert_eq!(restored.get("/api/v1/audit/verify").await["ok"], true);
}

fn pin(yaml: &str) -> &str {
    yaml.lines().find(|l| l.starts_with("ca_pin:")).expect("a pin")
}
