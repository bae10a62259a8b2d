//! Truth on show: the doctors name the hop that fails, each of them broken once; the machine's owner sees
//! what ran; what is kept has its bounds.

#![expect(clippy::disallowed_methods, reason = "the real programs are started")]

use mesh_tests::{Hub, Node, alive, shown, text, until};
use rustix::process::Signal;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};

/// What a doctor found: its first failure, and that line with its advice.
fn found(command: &mut Command) -> (Option<String>, String, Value) {
    let out = command.args(["--output", "json"]).output().expect("a doctor runs");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", shown(&out)));
    assert_eq!(out.status.code(), Some(i32::from(report["ok"] != true)), "{}", shown(&out));
    let failed = report["failed"].as_str().map(str::to_owned);
    let checks = report["checks"].as_array().unwrap();
    let line = checks.iter().find(|c| c["hop"].as_str() == failed.as_deref());
    let said = line.map(|c| format!("{} {}", c["detail"], c["advice"])).unwrap_or_default();
    assert!(failed.is_none() || line.is_some_and(|c| c["advice"].as_str().is_some_and(|a| !a.is_empty())), "what to do is said: {report}");
    (failed, said, report)
}

fn node_doctor(node: &Node, grpc: Option<&str>) -> (Option<String>, String, Value) {
    let mut c = node.command(&["doctor"]);
    if let Some(address) = grpc {
        c.env("CORTEX_NODE_HUB_GRPC", address);
    }
    found(&mut c)
}

#[track_caller]
fn fails((failed, said, report): (Option<String>, String, Value), hop: &str, word: &str) {
    assert_eq!(failed.as_deref(), Some(hop), "{report:#}");
    assert!(said.contains(word), "{word:?} in {said}");
}

async fn ends(node: &mut Node, signal: Signal) {
    node.daemon().signal(signal);
    node.daemon().ended().await;
}

/// A port that nobody answers at, as long as it is held.
fn closed_port() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    (socket, address)
}

/// Answers each connection by `serve`, while the test lasts.
async fn listen<F>(serve: impl Fn(tokio::net::TcpStream) -> F + Send + 'static) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::runtime::Handle::current().spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            tokio::runtime::Handle::current().spawn(serve(io));
        }
    });
    address
}

/// TLS by a certificate of its own, as a proxy that looks into it has.
async fn tls_proxy() -> String {
    mesh_process::install_tls_provider();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["proxy.example".into()]).unwrap().self_signed(&key).unwrap();
    let (certificate, key) = (CertificateDer::from(certificate), PrivateKeyDer::try_from(key.serialize_der()).unwrap());
    let mut config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    listen(move |io| {
        let acceptor = acceptor.clone();
        async move {
            let _ = acceptor.accept(io).await;
        }
    })
    .await
}

/// An HTTP server that knows some paths.
async fn web(pages: &[(&str, u16, Value)]) -> String {
    let pages: BTreeMap<String, (u16, String)> = pages.iter().map(|(p, s, v)| ((*p).to_owned(), (*s, v.to_string()))).collect();
    let address = listen(move |mut io| {
        let pages = pages.clone();
        async move {
            let (mut head, mut part) = (vec![], [0; 1024]);
            while !head.windows(4).any(|w| w == b"\r\n\r\n") {
                match io.read(&mut part).await {
                    Ok(n) if n > 0 => head.extend_from_slice(&part[..n]),
                    _ => return,
                }
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            let (status, body) = pages.get(head.split(' ').nth(1).unwrap_or("")).cloned().unwrap_or((404, "no".into()));
            let kind = if status < 400 { "application/json" } else { "application/problem+json" };
            let answer =
                format!("HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
            let _ = io.write_all(answer.as_bytes()).await;
        }
    })
    .await;
    format!("http://{address}")
}

/// A certificate for the node's own key, with other dates.
fn dated(node: &Node, from_days: i64, days: i64) -> Vec<u8> {
    let pem = std::fs::read_to_string(node.data().join("identity.key")).unwrap();
    let key = rcgen::KeyPair::from_pem(&pem).unwrap();
    let mut p = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    p.not_before = time::OffsetDateTime::now_utc() + time::Duration::days(from_days);
    p.not_after = p.not_before + time::Duration::days(days);
    p.self_signed(&key).unwrap().der().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_doctor_names_what_is_wrong_with_this_machine() {
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    // The hub shows it online a moment before it knows that itself.
    let up = || std::fs::read_to_string(node.data().join("status.json")).is_ok_and(|s| s.contains("\"up\""));
    until("the daemon to say that its link is up", async || up().then_some(())).await;
    let (failed, _, report) = node_doctor(&node, None);
    assert_eq!(failed, None, "{report:#}");
    let hops: Vec<_> = report["checks"].as_array().unwrap().iter().map(|c| c["hop"].as_str().unwrap()).collect();
    let all = [
        "data_folder",
        "identity",
        "ceiling",
        "resolve",
        "tcp",
        "tls",
        "hub",
        "clock",
        "daemon",
        "warden",
        "workspace",
        "spool",
        "sandbox",
    ];
    assert_eq!(hops, all);
    let out = node.command(&["doctor"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && said.contains("all is well") && !said.contains("FAILED"), "{}", shown(&out));

    // It asks beside the daemon, and disturbs nothing: the link is the same, and work goes on.
    let before = hub.get(&format!("/api/v1/nodes/{}", node.id)).await;
    assert_eq!(hub.sh("echo hi").await["stdout"], "hi\n");
    assert_eq!(before["status"], "online");

    let workspaces = node.dir.path().join("workspaces");
    std::fs::rename(&workspaces, node.dir.path().join("away")).unwrap();
    fails(node_doctor(&node, None), "workspace", "is not there");
    std::fs::rename(node.dir.path().join("away"), &workspaces).unwrap();

    // A warden that is gone, and a daemon that cannot mend it now.
    node.daemon().signal(Signal::STOP);
    let mark = format!("warden\0--data-dir\0{}", node.data().display());
    mesh_tests::signal(node.warden().unwrap(), Signal::KILL);
    until("the warden to be gone", async || alive(&mark).is_empty().then_some(())).await;
    let report = node_doctor(&node, None);
    node.daemon().signal(Signal::CONT);
    fails(report, "warden", "warden.log");

    ends(&mut node, Signal::INT).await;
    fails(node_doctor(&node, None), "daemon", "cortex-node run");

    let data = node.data();
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o755)).unwrap();
    fails(node_doctor(&node, None), "data_folder", "chmod 700");
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
    let nowhere = Node::prepare("nowhere", "");
    fails(node_doctor(&nowhere, None), "data_folder", "cortex-node join");

    let certificate = std::fs::read(data.join("certificate.der")).unwrap();
    for (from, days, word) in [(-3, 2, "ended"), (1, 2, "clock")] {
        std::fs::write(data.join("certificate.der"), dated(&node, from, days)).unwrap();
        fails(node_doctor(&node, None), "identity", word);
    }
    std::fs::remove_file(data.join("certificate.der")).unwrap();
    fails(node_doctor(&node, None), "identity", "missing");
    std::fs::write(data.join("certificate.der"), certificate).unwrap();
    let key = std::fs::read(data.join("identity.key")).unwrap();
    std::fs::write(data.join("identity.key"), rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem()).unwrap();
    fails(node_doctor(&node, None), "identity", "another key");
    std::fs::write(data.join("identity.key"), key).unwrap();
    std::fs::set_permissions(data.join("identity.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    fails(node_doctor(&node, None), "identity", "chmod 600");
    std::fs::set_permissions(data.join("identity.key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    fails(node_doctor(&node, None), "daemon", "cortex-node run");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_doctor_names_the_hop_to_the_hub() {
    let (mut hub, other) = (Hub::start().await, Hub::start().await);
    let mut node = Node::join(&hub, "n").await;
    ends(&mut node, Signal::INT).await;

    fails(node_doctor(&node, Some("no-such-host.invalid:7443")), "resolve", "no-such-host.invalid");
    let (_held, closed) = closed_port();
    fails(node_doctor(&node, Some(&closed)), "tcp", "does the hub run there");
    fails(node_doctor(&node, Some(&tls_proxy().await)), "tls", "a proxy that ends TLS");
    let plain = listen(async |mut io| {
        let _ = io.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    })
    .await;
    fails(node_doctor(&node, Some(&plain)), "tls", "a proxy that ends TLS");
    fails(node_doctor(&node, Some(&other.node)), "tls", "passed through");

    let path = format!("/api/v1/nodes/{}", node.id);
    assert_eq!(hub.call("POST", &format!("{path}/revoke"), None).await.0, 200);
    assert_eq!(hub.get(&path).await["schedulable"], json!({"ok": false, "reason": "revoked"}));
    fails(node_doctor(&node, None), "hub", "revoked");
    assert_eq!(hub.call("DELETE", &path, None).await.0, 204);
    fails(node_doctor(&node, None), "hub", "join anew");
    // The node hears it at its next start, and knows it from then on without the hub.
    node.run();
    assert_eq!(node.daemon().ended().await.code(), Some(3));
    hub.process.kill9();
    fails(node_doctor(&node, None), "identity", "revoked");

    // A node of good standing whose hub has gone.
    let mut left = Node::join(&other, "left").await;
    let mut other = other;
    other.process.kill9();
    fails(node_doctor(&left, None), "tcp", "does the hub run there");
    ends(&mut left, Signal::INT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_lines_doctor_names_the_hop() {
    let hub = Hub::start().await;
    let doctor = |url: Option<&str>| {
        let mut c = hub.cli();
        c.arg("doctor").env_remove("CORTEX_API_KEY");
        for proxy in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            c.env_remove(proxy);
        }
        if let Some(url) = url {
            c.env("CORTEX_URL", url);
        }
        c
    };
    fails(found(&mut doctor(None)), "credentials", "cortex login");
    hub.cli_login();
    let verdict = |report: &Value, hop: &str| {
        report["checks"].as_array().unwrap().iter().find(|c| c["hop"] == hop).unwrap_or_else(|| panic!("{hop}: {report:#}"))["verdict"]
            .clone()
    };
    let (failed, _, report) = found(&mut doctor(None));
    assert_eq!((failed, verdict(&report, "nodes")), (None, json!("warning")), "{report:#}");
    let node = Node::join(&hub, "n").await;
    let (_, _, report) = found(&mut doctor(None));
    let hops: Vec<_> = report["checks"].as_array().unwrap().iter().map(|c| c["hop"].as_str().unwrap()).collect();
    assert_eq!(hops, ["config", "resolve", "tcp", "http", "ready", "version", "credentials", "nodes"]);
    assert_eq!((verdict(&report, "version"), verdict(&report, "nodes")), (json!("ok"), json!("ok")), "{report:#}");
    let out = doctor(None).output().unwrap();
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("1 of 1 online"), "{}", shown(&out));
    drop(node);

    fails(found(doctor(None).env("CORTEX_API_KEY", "cmk_wrong")), "credentials", "cortex key new");
    fails(found(&mut doctor(Some("htp://x"))), "config", "http");
    fails(found(&mut doctor(Some("http://no-such-host.invalid:1"))), "resolve", "DNS");
    let (_held, closed) = closed_port();
    fails(found(&mut doctor(Some(&format!("http://{closed}")))), "tcp", "is the hub running there");
    fails(found(&mut doctor(Some(&format!("https://{}", tls_proxy().await)))), "tls", "not trusted");
    fails(found(&mut doctor(Some(&format!("http://{}", hub.node)))), "http", "node port");
    fails(found(&mut doctor(Some(&web(&[]).await))), "http", "no hub answers");
    let healthy = ("/healthz", 200, json!({"status": "ok"}));
    let problem = json!({"type": "about:blank", "title": "x", "status": 503, "detail": "the store does not answer", "code": "not_ready",
        "request_id": "r1"});
    fails(found(&mut doctor(Some(&web(&[healthy.clone(), ("/readyz", 503, problem)]).await))), "ready", "the store does not answer");
    let ready = ("/readyz", 200, json!({"status": "ready", "uptime_secs": 1, "warnings": ["disk"]}));
    let newer = json!({"name": "cortex-hub", "version": "9.9.9", "hub_id": "hub_1", "api": "/api/v1", "methods": []});
    let (_, _, report) = found(&mut doctor(Some(&web(&[healthy, ready, ("/", 200, newer)]).await)));
    assert_eq!((verdict(&report, "ready"), verdict(&report, "version")), (json!("warning"), json!("warning")), "{report:#}");

    std::fs::write(hub.dir.path().join("cli/login.json"), "{").unwrap();
    fails(found(&mut doctor(None)), "config", "login.json");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owner_sees_what_ran_and_how_the_node_stands() {
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let log = |node: &Node, args: &[&str]| {
        let out = node.command(&[&["log"], args].concat()).output().unwrap();
        assert!(out.status.success(), "{}", shown(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(log(&node, &[]), "");
    let session = text(&hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await.1, "id");
    assert_eq!(hub.call("PUT", &format!("/api/v1/sessions/{session}/nodes/{}", node.id), None).await.0, 200);
    let first = hub.dispatch(json!({"shell": {"argv": ["sh", "-c", "exit 7", "\u{1b}[2Jx\ny"]}, "wait_secs": 30})).await;
    let body = json!({"echo": {"payload": "x"}, "wait_secs": 30});
    let (_, echo) = hub.call("POST", &format!("/api/v1/sessions/{session}/dispatch"), Some(body)).await;
    let said = log(&node, &[]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    for word in [&text(&first, "id"), "user_", "exit 7", "sh -c", "\\u{1b}[2J"] {
        assert!(lines[0].contains(word), "{word}: {said}");
    }
    assert!(!said.contains('\u{1b}'), "{said:?}");
    assert!(
        lines[1].contains(&text(&echo, "id")) && lines[1].contains(&session) && lines[1].contains("done") && lines[1].ends_with("echo"),
        "{said}"
    );

    // It runs when its daemon is killed, and ends while there is none.
    let go = node.dir.path().join("go");
    let script = format!("while ! test -e {}; do sleep 0.05; done", go.display());
    let running = text(&hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await, "id");
    hub.task_when(&running, "to run", |t| t["state"] == "running").await;
    let json_of = |node: &Node| -> Value { serde_json::from_str(log(node, &["-n", "1", "--output", "json"]).trim()).unwrap() };
    assert_eq!((json_of(&node)["task"].as_str(), &json_of(&node)["end"]), (Some(running.as_str()), &Value::Null));
    let mut follow = node.command(&["log", "-f", "-n", "0"]);
    let mut follow = mesh_tests::Process::start(&mut follow, node.dir.path().join("follow.log"));
    let opened = |entry: std::fs::DirEntry| std::fs::read_link(entry.path()).is_ok_and(|f| f.ends_with("log.jsonl"));
    let fds = format!("/proc/{}/fd", follow.id());
    until("it to have opened the record", async || std::fs::read_dir(&fds).ok()?.flatten().any(opened).then_some(())).await;
    node.daemon().kill9();
    let status = |node: &Node| -> Value {
        let out = node.command(&["status", "--output", "json"]).output().unwrap();
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", shown(&out)))
    };
    let s = status(&node);
    assert_eq!((s["running"].as_array().unwrap().len(), s["unschedulable"].as_str()), (1, Some("offline")), "{s}");
    std::fs::write(&go, "").unwrap();
    until("the task to end without a daemon", async || status(&node)["running"].as_array()?.is_empty().then_some(())).await;
    assert_eq!(json_of(&node)["end"], Value::Null, "who writes the record is not here");
    node.run();
    hub.finished(&running).await;
    until("its end to be recorded", async || (json_of(&node)["end"] == "exit 0").then_some(())).await;
    until("its end to be shown", async || follow.log().contains(&running).then_some(())).await;
    assert!(!follow.log().contains(&text(&first, "id")), "only what is new");
    follow.kill9();
    assert_eq!(log(&node, &[]).lines().count(), 3);

    until("the hub's word on it", async || {
        let s = status(&node);
        (s["unschedulable"] == "" && s["spool_limit"] == 2_u64 << 30 && s["link"] == "up").then_some(())
    })
    .await;
    assert_eq!(hub.call("POST", &format!("/api/v1/nodes/{}/drain", node.id), None).await.0, 200);
    until("it to say why it gets no work", async || (status(&node)["unschedulable"] == "draining").then_some(())).await;
    let out = node.command(&["status"]).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("takes work   no: draining"), "{}", shown(&out));
    ends(&mut node, Signal::INT).await;
    node.offline(&hub).await;
    assert_eq!(hub.get(&format!("/api/v1/nodes/{}", node.id)).await["schedulable"], json!({"ok": false, "reason": "offline"}));
}

fn files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
}

async fn metric(hub: &Hub, line: &str) -> f64 {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let all = web.get(format!("http://{}/metrics", text(&facts, "metrics"))).send().await.unwrap().text().await.unwrap();
    all.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok()).unwrap_or_else(|| panic!("{line} in {all}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_has_its_bounds() {
    const BOUND: u64 = 400_000;
    let env = [("CORTEX_RETENTION_OUTPUT_BYTES", "400000"), ("CORTEX_RETENTION_JOURNAL_DAYS", "30")];
    let mut hub = Hub::start_with(&env, &[]).await;
    let node = Node::join(&hub, "n").await;
    let mut ids = vec![];
    for _ in 0..4 {
        let t = hub.sh("head -c 150000 /dev/zero | tr '\\0' x").await;
        assert_eq!((&t["state"], &t["stdout_bytes"]), (&json!("succeeded"), &json!(150_000)), "{t}");
        ids.push(text(&t, "id"));
    }
    let stats = until("the oldest output to be erased", async || {
        let s = hub.get("/api/v1/system/stats").await["storage"].clone();
        (s["output_bytes"].as_u64()? <= BOUND).then_some(s)
    })
    .await;
    assert_eq!((&stats["output_limit_bytes"], &stats["journal_limit_bytes"]), (&json!(BOUND), &json!(20_u64 << 30)), "{stats}");
    assert!(stats["journal_bytes"].as_u64().unwrap() > 0 && stats["disk_bytes"].as_u64().unwrap() > 0, "{stats}");
    for (n, id) in ids.iter().enumerate() {
        let (t, output) = (hub.task(id).await, hub.output(id, "").await);
        if n < 2 {
            assert_eq!((output.len(), &t["truncated"], &t["stdout_bytes"]), (0, &json!(true), &json!(150_000)), "{t}");
        } else {
            assert_eq!((output.len(), &t["truncated"]), (150_000, &json!(false)), "{t}");
        }
    }
    until("both to be counted", async || (metric(&hub, "cortex_retention_erased_total{what=\"output\"}").await == 2.0).then_some(())).await;
    until("the files to be gone", async || (files(&hub.data().join("output")) == 2).then_some(())).await;

    // At 80 % it is said, everywhere, and the hub goes on: 300 kB and 30 kB are more than that.
    hub.sh("head -c 30000 /dev/zero").await;
    until("the warning", async || {
        let (status, ready) = hub.call("GET", "/readyz", None).await;
        assert_eq!(status, 200, "{ready}");
        ready["warnings"].as_array()?.contains(&json!("output")).then_some(())
    })
    .await;
    let stats = hub.get("/api/v1/system/stats").await;
    assert!(stats["storage"]["warnings"].as_array().unwrap().contains(&json!("output")), "{stats}");
    until("it to be measured", async || (metric(&hub, "cortex_storage_warnings{what=\"output\"}").await == 1.0).then_some(())).await;
    until("it to be logged", async || hub.process.log().contains("what=\"output\"").then_some(())).await;

    // A month later: the tasks go, and what is asked about them is answered as about any that never were.
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    let script = "import sqlite3,sys; c=sqlite3.connect(sys.argv[1]); \
        n=c.execute('UPDATE tasks SET finished_at = finished_at - 31*86400000 WHERE finished_at IS NOT NULL').rowcount; c.commit(); print(n)";
    let out = Command::new("python3").args(["-c", script]).arg(hub.data().join("hub.db")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "5", "{}", shown(&out));
    hub.restart().await;
    until("the tasks to be gone", async || hub.get("/api/v1/tasks").await["items"].as_array()?.is_empty().then_some(())).await;
    assert_eq!(hub.call("GET", &format!("/api/v1/tasks/{}", ids[3]), None).await.0, 404);
    assert_eq!(hub.call("GET", &format!("/api/v1/tasks/{}/events", ids[3]), None).await.0, 404);
    until("the last file to be gone", async || (files(&hub.data().join("output")) == 0).then_some(())).await;
    until("the node to be back", async || (hub.sh("echo on").await["stdout"] == "on\n").then_some(())).await;
    drop(node);
}
