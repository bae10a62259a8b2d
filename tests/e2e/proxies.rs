//! Nodes and the command line behind a proxy that only lets CONNECT through: what works, and which hop the
//! doctors name when the proxy is in the way.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_process::SystemClock;
use mesh_tests::proxy::{Mood, Proxy};
use mesh_tests::{Hub, Node, PASSWORD, folder, shown, text, until};
use node::enrolment::validity;
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpSocket;

const NAMES: [&str; 8] = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"];

/// The command with these proxies and no others.
fn behind<'c>(command: &'c mut Command, env: &[(&str, &str)]) -> &'c mut Command {
    for name in NAMES {
        command.env_remove(name);
    }
    command.envs(env.iter().copied())
}

/// `host:port` of a name that only the proxy knows.
fn far(address: impl ToString) -> String {
    format!("hub.test:{}", address.to_string().rsplit_once(':').unwrap().1)
}

/// A hub in this process, since no setting makes certificates that end within seconds.
async fn short_hub(dir: &std::path::Path) -> hub::serve::Hub {
    let flags = hub::config::Flags { data_dir: Some(dir.join("hub")), ..Default::default() };
    let mut config = hub::config::Config::load(&flags).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    (config.http_addr, config.node_addr, config.metrics_addr) = (any, any, any);
    config.admin_password = Some(PASSWORD.into());
    config.certificate = Duration::from_secs(15);
    hub::serve::Hub::start(config, SystemClock::shared()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_enrols_links_and_recovers_through_a_proxy() {
    mesh_process::install_tls_provider();
    let dir = folder();
    let hub = short_hub(dir.path()).await;
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{}/api/v1", hub.http);
    let login = web.post(format!("{url}/auth/login")).json(&json!({"username": "admin", "password": PASSWORD}));
    let token = text(&login.send().await.unwrap().json().await.unwrap(), "access_token");
    let post = async |path: &str, body: Value| -> Value {
        web.post(format!("{url}{path}")).bearer_auth(&token).json(&body).send().await.unwrap().json().await.unwrap()
    };
    let is = async |status: &str| {
        until(&format!("the node {status}"), async || {
            let nodes: Value = web.get(format!("{url}/nodes")).bearer_auth(&token).send().await.unwrap().json().await.unwrap();
            (nodes["items"][0]["status"] == status).then_some(())
        })
        .await
    };

    // me:p@ss
    let proxy = Proxy::start(Mood::Wants("Basic bWU6cEBzcw==")).await;
    let at = far(hub.node);
    let by = format!("http://me:p%40ss@{}", proxy.address);
    let invite = post("/nodes/invites", json!({"name": "n"})).await;
    let mut node = Node::prepare("n", &text(&invite, "config_yaml"));
    let command = |node: &Node, args: &[&str], env: &[(&str, &str)]| {
        let mut c = node.command(args);
        behind(&mut c, env).env("CORTEX_NODE_HUB_GRPC", &at);
        c
    };
    let join = ["join", "invite.yaml", "--enroll-only"];
    // Without the proxy, past it, or without its password there is no way; what is wrong is said.
    for (env, word) in [
        (&[][..], "hub.test"),
        (&[("HTTPS_PROXY", by.as_str()), ("NO_PROXY", ".test")], "hub.test"),
        (&[("https_proxy", proxy.address.as_str())], "wants a user and a password"),
        (&[("https_proxy", &by.replace("p%40ss", "geheim"))], "does not take the user and password"),
        (&[("HTTPS_PROXY", "socks5://me:geheim@x")], "HTTPS_PROXY: "),
    ] {
        let out = command(&node, &join, env).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(word) && !said.contains("geheim"), "{env:?}: {}", shown(&out));
    }
    let out = command(&node, &join, &[("HTTPS_PROXY", &by)]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let log = node.dir.path().join("node.log");
    let mut run = command(&node, &["run"], &[("https_proxy", &by)]);
    node.process = Some(mesh_tests::Process::start(&mut run, log.clone()));
    is("online").await;
    let t = post("/dispatch", json!({"shell": {"argv": ["echo", "hi"]}, "wait_secs": 20})).await;
    assert_eq!((t["state"].as_str(), t["stdout"].as_str()), (Some("succeeded"), Some("hi\n")), "{t}");
    assert!(proxy.led_to(&at), "{:?}", proxy.asked());

    // Asleep over its certificate's end.
    node.daemon().kill9();
    is("offline").await;
    until("the certificate to end", async || {
        let der = std::fs::read(node.data().join("certificate.der")).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
        (validity(&der).unwrap().not_after_ms < now).then_some(())
    })
    .await;
    node.process = Some(mesh_tests::Process::start(&mut run, log));
    is("online").await;
    let log = node.daemon().log();
    assert!(log.contains("its hub is asked for a new one") && !log.contains("p@ss") && !log.contains("p%40ss"), "{log}");
    node.daemon().terminate().await;
    hub.stop().await;
}

/// What a doctor found: the first hop that fails, what it says of it, and all.
fn found(command: &mut Command) -> (Value, String, Value) {
    let out = command.args(["--output", "json"]).output().expect("a doctor runs");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", shown(&out)));
    let line = report["checks"].as_array().unwrap().iter().find(|c| c["hop"] == report["failed"]);
    let said = line.map(|c| format!("{} → {}", c["detail"], c["advice"])).unwrap_or_default();
    (report["failed"].clone(), said, report)
}

fn verdict(report: &Value, hop: &str) -> Value {
    report["checks"].as_array().unwrap().iter().find(|c| c["hop"] == hop).map_or(Value::Null, |c| c["verdict"].clone())
}

/// A port that nobody answers at, as long as it is held.
fn closed_port() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    (socket, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctors_name_a_proxy_that_is_in_the_way() {
    let dir = folder();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["hub.test".to_owned(), "127.0.0.1".into()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(path("hub.pem"), own.pem()).unwrap();
    std::fs::write(path("hub.key"), key.serialize_pem()).unwrap();
    let hub = Hub::start_with(&[("CORTEX_HTTP_TLS_CERT", &path("hub.pem")), ("CORTEX_HTTP_TLS_KEY", &path("hub.key"))], &[]).await;
    let mut node = Node::join(&hub, "n").await;
    node.daemon().terminate().await;
    let (at, url) = (far(&hub.node), format!("https://{}", far(hub.address())));
    let node_doctor = |proxy: &str| {
        let mut c = node.command(&["doctor"]);
        behind(&mut c, &[("HTTPS_PROXY", proxy)]).env("CORTEX_NODE_HUB_GRPC", &at);
        found(&mut c)
    };
    let cli = |proxy: &str, args: &[&str]| {
        let mut c = hub.cli();
        behind(&mut c, &[("HTTPS_PROXY", proxy)]).env("CORTEX_URL", &url).env("SSL_CERT_FILE", path("hub.pem")).args(args);
        c
    };

    // All is well behind one that connects: the node's doctor misses nothing but its daemon.
    let good = Proxy::start(Mood::Connects).await;
    let (failed, _, report) = node_doctor(&good.address);
    assert_eq!((failed, verdict(&report, "proxy"), verdict(&report, "tls")), (json!("daemon"), json!("ok"), json!("ok")), "{report:#}");
    assert_eq!((verdict(&report, "resolve"), verdict(&report, "tcp")), (json!("skipped"), json!("skipped")), "{report:#}");
    std::fs::write(path("password"), PASSWORD).unwrap();
    let mut login = cli(&good.address, &["login", "--username", "admin", "--password-stdin"]);
    let out = login.stdin(std::fs::File::open(path("password")).unwrap()).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let (failed, _, report) = found(&mut cli(&good.address, &["doctor"]));
    assert_eq!(
        (failed, verdict(&report, "proxy"), verdict(&report, "resolve")),
        (Value::Null, json!("ok"), json!("skipped")),
        "{report:#}"
    );
    assert!(good.led_to(&at) && good.led_to(&far(hub.address())), "{:?}", good.asked());

    let (_held, closed) = closed_port();
    let given = |userinfo: &str, proxy: &Proxy| format!("http://{userinfo}{}", proxy.address);
    let wants = Proxy::start(Mood::Wants("Basic bWU6cEBzcw==")).await;
    let (refuses, rubbish, hangs) = (Proxy::start(Mood::Refuses).await, Proxy::start(Mood::Rubbish).await, Proxy::start(Mood::Hangs).await);
    for (proxy, word) in [
        (closed, "cannot be reached"),
        ("http://no-such-proxy.invalid:3128".into(), "no-such-proxy.invalid"),
        (given("", &wants), "HTTPS_PROXY=http://user:password@"),
        (given("me:geheim@", &wants), "does not take the user and password"),
        (given("", &refuses), "403 Not this one"),
        (given("", &rubbish), "no HTTP proxy"),
        (given("", &hangs), "does not answer"),
    ] {
        for (whose, (failed, said, report)) in [("node", node_doctor(&proxy)), ("cli", found(&mut cli(&proxy, &["doctor"])))] {
            assert_eq!(failed, "proxy", "{whose} {word}: {report:#}");
            assert!(said.contains(word) && said.contains("→ \"") && !said.contains("geheim"), "{whose} {word}: {said}");
        }
    }
    // One that connects, and a hub that is not there.
    let (_held, closed) = closed_port();
    let mut c = node.command(&["doctor"]);
    let (failed, said, _) = found(behind(&mut c, &[("HTTPS_PROXY", &good.address)]).env("CORTEX_NODE_HUB_GRPC", far(closed)));
    assert!(failed == "proxy" && said.contains("502"), "{said}");
}
