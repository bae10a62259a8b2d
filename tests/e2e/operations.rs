//! What an operator relies on: bounds on connections, the table of metrics, the example of the settings.

#![expect(clippy::disallowed_methods, reason = "promtool and the real programs are started")]

use mesh_tests::{Hub, Node, PASSWORD, program, text, until};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

fn address(hub: &Hub) -> String {
    hub.http.trim_start_matches("http://").to_owned()
}

async fn connect(hub: &Hub) -> TcpStream {
    TcpStream::connect(address(hub)).await.expect("the hub takes the connection")
}

fn open_files(hub: &Hub) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", hub.process.id())).expect("the hub lives").count()
}

fn raise_own_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("a limit may be raised to the maximum");
}

async fn metrics(hub: &Hub) -> String {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    let url = format!("http://{}/metrics", text(&facts, "metrics"));
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    web.get(url).send().await.expect("metrics answer").text().await.unwrap()
}

/// The sum of a metric's values whose labels hold all of `labels`.
fn value(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let lines = metrics.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    lines.filter(|l| labels.iter().all(|label| l.contains(label))).map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// Says a byte now and then until the hub has had enough; gives what it answered.
async fn trickle(mut io: TcpStream, begin: &str) -> String {
    io.write_all(begin.as_bytes()).await.expect("the beginning is taken");
    let (mut seen, mut part) = (vec![], [0; 1024]);
    loop {
        match tokio::time::timeout(Duration::from_millis(300), io.read(&mut part)).await {
            Ok(Ok(n)) if n > 0 => seen.extend_from_slice(&part[..n]),
            Ok(_) => return String::from_utf8_lossy(&seen).into_owned(),
            // A write may fail when the answer is on its way already.
            Err(_) => drop(io.write_all(b"x").await),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_idle_and_a_hundred_slow_hurt_nobody() {
    raise_own_files();
    let hub = Hub::start_with(&[], &[]).await;
    // What the hub opens for its own needs is open before the count.
    futures::future::join_all((0..64).map(|_| hub.get("/api/v1/auth/me"))).await;
    metrics(&hub).await;
    let before = open_files(&hub);
    let mut idle = vec![];
    for _ in 0..1000 {
        idle.push(connect(&hub).await);
    }
    let mut slow = vec![];
    for _ in 0..100 {
        let io = connect(&hub).await;
        slow.push(tokio::runtime::Handle::current().spawn(trickle(io, "GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")));
    }
    let mut served = 0;
    until("the slow ones to be cut", async || {
        hub.get("/api/v1/auth/me").await;
        served += 1;
        slow.iter().all(|s| s.is_finished()).then_some(())
    })
    .await;
    assert!(served > 10, "{served}");
    for s in slow {
        assert_eq!(s.await.unwrap(), "", "a head that never ends has no answer");
    }
    let m = metrics(&hub).await;
    assert!(value(&m, "cortex_http_connections", &["\"http\""]) >= 1000.0, "the idle ones are within their time");
    assert_eq!(value(&m, "cortex_http_connections_cut_total", &["\"http\"", "slow_head"]), 100.0);
    drop(idle);
    until("the descriptors to be as before", async || (open_files(&hub) <= before + 2).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_have_their_time_and_waits_have_theirs() {
    let mut hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let (_, login) = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": "admin", "password": PASSWORD}))).await;
    let token = text(&login, "access_token");
    // From here on alone: on a slow machine a log-in may take as long.
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    hub.set("CORTEX_LIMITS_REQUEST_SECS", "2");
    hub.restart().await;
    let path = format!("/api/v1/nodes/{}", node.id);
    until("the node to be back", async || (hub.call("GET", &path, None).await.1["status"] == "online").then_some(())).await;
    // Not from the hub's patience, which is shorter, but from the wait that was asked for.
    let t = hub.dispatch(json!({"shell": {"argv": ["sleep", "5"]}, "wait_secs": 30})).await;
    assert_eq!(t["state"], "succeeded", "{t}");
    let begin = format!(
        "POST /api/v1/dispatch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {token}\r\nContent-Length: 1000\r\n\r\n{{"
    );
    // One that trickles has no more time than one that says nothing more.
    let told = trickle(connect(&hub).await, &begin).await;
    assert!(told.starts_with("HTTP/1.1 408 ") && told.contains("\"body_too_slow\"") && told.contains("connection: close"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_the_limit_is_refused_and_the_control_socket_still_answers() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_CONNECTIONS", "20")], &[]).await;
    let ask = async || {
        let mut io = connect(&hub).await;
        let _ = io.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
        let mut told = vec![];
        let _ = io.read_to_end(&mut told).await;
        String::from_utf8_lossy(&told).into_owned()
    };
    let mut held = vec![];
    // One of them is the harness's own.
    until("all places to be taken", async || {
        held.push(connect(&hub).await);
        ask().await.starts_with("HTTP/1.1 503 ").then_some(())
    })
    .await;
    assert!(held.len() <= 20, "{}", held.len());
    let mut socket = UnixStream::connect(hub.data().join("hub.sock")).await.unwrap();
    socket.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut told = String::new();
    socket.read_to_string(&mut told).await.unwrap();
    assert!(told.starts_with("HTTP/1.1 200 "), "{told}");
    assert!(value(&metrics(&hub).await, "cortex_http_connections_refused_total", &["\"http\""]) >= 1.0);
    held.pop();
    until("the free place to be used", async || ask().await.starts_with("HTTP/1.1 200 ").then_some(())).await;
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join(path)
}

/// Names and types of the table in docs/reference/metrics.md.
fn documented() -> BTreeMap<String, String> {
    let page = std::fs::read_to_string(repository("docs/reference/metrics.md")).unwrap();
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        Some((cells.next()?.trim_end_matches('`').to_owned(), cells.next()?.to_owned()))
    };
    page.lines().filter_map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_of_metrics_is_what_a_hub_tells() {
    let hub = Hub::start().await;
    let typed = |m: &str| -> BTreeMap<String, String> {
        let lines = m.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' '));
        lines.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
    };
    let fresh = metrics(&hub).await;
    assert_eq!(typed(&fresh), documented(), "every name is there from the start; left: the hub, right: docs/reference/metrics.md");

    let node = Node::join(&hub, "n").await;
    let t = hub.sh("echo out; exit 3").await;
    let (status, _) = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": "admin", "password": "wrong password 1"}))).await;
    assert_eq!(status, 401);
    let (status, _) = hub.call("BREW", &format!("/api/v1/tasks/{}", text(&t, "id")), None).await;
    assert_eq!(status, 405);
    hub.call("GET", "/nowhere/at/all", None).await;
    let m = metrics(&hub).await;
    assert_eq!(typed(&m), documented());
    for (name, labels, least) in [
        ("cortex_build_info", &["version="] as &[_], 1.0),
        ("cortex_http_requests_total", &["\"/api/v1/dispatch\"", "\"POST\"", "\"2xx\""], 1.0),
        ("cortex_http_requests_total", &["\"none\"", "\"4xx\""], 1.0),
        ("cortex_http_requests_total", &["\"other\"", "\"4xx\""], 1.0),
        ("cortex_http_request_duration_seconds_count", &["\"/api/v1/dispatch\""], 1.0),
        ("cortex_auth_failures_total", &["\"password\""], 1.0),
        ("cortex_tasks_accepted_total", &[], 1.0),
        ("cortex_tasks_finished_total", &["\"failed\"", "\"exit\""], 1.0),
        ("cortex_task_start_seconds_count", &[], 1.0),
        ("cortex_nodes", &["\"online\""], 1.0),
        ("cortex_link_connections", &[], 1.0),
        ("cortex_link_handshakes_total", &["\"done\""], 1.0),
        ("cortex_links_opened_total", &[], 1.0),
        ("cortex_output_received_bytes_total", &[], 4.0),
        ("cortex_store_up", &[], 1.0),
        ("cortex_store_commits_total", &[], 3.0),
        ("cortex_store_commit_jobs_count", &[], 3.0),
        ("cortex_data_folder_free_bytes", &[], 1.0),
        ("process_resident_memory_bytes", &[], 1e6),
        ("process_open_fds", &[], 5.0),
        ("process_start_time_seconds", &[], 1.7e9),
    ] {
        assert!(value(&m, name, labels) >= least, "{name} {labels:?} in\n{m}");
    }
    for never in [&node.id, &text(&t, "id"), "nowhere", "BREW"] {
        assert!(!m.contains(never), "{never} is a label in\n{m}");
    }
    promtool(&m);

    // Who goes is counted as well.
    let sse = hub.request("GET", "/api/v1/events").send().await.unwrap();
    let open = async |n: f64| {
        let m = metrics(&hub).await;
        (value(&m, "cortex_event_streams", &["\"sse\""]) == n).then_some(())
    };
    until("the stream to be counted", async || open(1.0).await).await;
    drop(sse);
    until("the stream to be gone", async || open(0.0).await).await;
    drop(node);
    until("the node to be counted as offline", async || {
        let m = metrics(&hub).await;
        (value(&m, "cortex_nodes", &["\"offline\""]) == 1.0 && value(&m, "cortex_links_closed_total", &[]) >= 1.0).then_some(())
    })
    .await;
}

fn promtool(metrics: &str) {
    let tool =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut tool = tool.unwrap_or_else(|e| panic!("promtool: {e}; this test needs it: scripts/setup test"));
    tool.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let out = tool.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && said.is_empty(), "{said}");
}

#[test]
fn the_example_of_the_settings_is_accepted_and_names_them_all() {
    let path = repository("deploy/examples/hub.toml");
    let check =
        |path: &Path| Command::new(program("cortex-hub")).args(["config", "check", "--config"]).arg(path).env_clear().output().unwrap();
    let out = check(&path);
    assert!(out.status.success(), "{}", mesh_tests::shown(&out));
    // Each line that is commented out is good as well, by itself.
    let example = std::fs::read_to_string(&path).unwrap();
    let mut section = String::new();
    let mut named = vec![];
    for line in example.lines() {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        }
        let Some((key, _)) = line.trim_start_matches("# ").split_once(" = ").filter(|(k, _)| !k.contains(' ')) else { continue };
        named.push(if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") });
        let dir = tempfile::tempdir().unwrap();
        let one = dir.path().join("hub.toml");
        let head = if section.is_empty() { String::new() } else { format!("[{section}]\n") };
        std::fs::write(&one, format!("{head}{}\n", line.trim_start_matches("# "))).unwrap();
        let out = check(&one);
        if key.starts_with("tls_") {
            // Each of the two needs the other.
            assert!(String::from_utf8_lossy(&out.stderr).contains("too"), "{line}: {}", mesh_tests::shown(&out));
            continue;
        }
        assert!(out.status.success(), "{line}: {}", mesh_tests::shown(&out));
    }
    let mut built: Vec<String> = hub::config::built().map(|(section, key)| format!("{section}.{key}")).collect();
    built.push("data_dir".into());
    for name in &built {
        assert!(named.contains(name), "{name} is not in deploy/examples/hub.toml");
    }
    assert_eq!(named.len(), built.len(), "{named:?}");
}

#[test]
fn flags_weigh_more_than_the_environment_and_that_more_than_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hub.toml");
    let run = |args: &[&str], env: &[(&str, &str)]| {
        let mut c = Command::new(program("cortex-hub"));
        c.args(args).arg("--config").arg(&file).env_clear().envs(env.iter().copied()).current_dir(dir.path());
        let out = c.output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let check = &["config", "check"];
    // A bad value of a layer is seen only when no layer above says something.
    std::fs::write(&file, "[log]\nlevel = \"of=the=file\"\n").unwrap();
    let (code, said) = run(check, &[]);
    assert!(code == Some(2) && said.contains("hub.toml: log.level: ") && said.contains("of=the=file"), "{said}");
    let of_env = ("CORTEX_LOG_LEVEL", "of=the=environment");
    let (code, said) = run(check, &[of_env]);
    assert!(code == Some(2) && said.contains("environment CORTEX_LOG_LEVEL: log.level: "), "{said}");
    let (code, said) = run(&["config", "check", "--log-level", "of=the=flag"], &[of_env]);
    assert!(code == Some(2) && said.contains("command line: log.level: "), "{said}");
    assert_eq!(run(&["config", "check", "--log-level", "debug"], &[of_env]).0, Some(0));
    assert_eq!(run(check, &[("CORTEX_LOG_LEVEL", "debug")]).0, Some(0));
    assert_eq!(run(check, &[("CORTEX_LOG_LEVEL", "")]).0, Some(2), "an empty variable is none");

    // The data folder, which any text can name.
    std::fs::write(&file, "data_dir = \"of-the-file\"\n").unwrap();
    let show = &["ca", "show"];
    let of_env = ("CORTEX_DATA_DIR", "of-the-environment");
    for (args, env, wins) in [
        (show as &[&str], &[] as &[_], "of-the-file"),
        (show, &[of_env], "of-the-environment"),
        (&["ca", "show", "--data-dir", "of-the-flag"], &[of_env], "of-the-flag"),
    ] {
        let (code, said) = run(args, env);
        assert!(code == Some(1) && said.contains(&format!("no keys in {wins}")), "{said}");
    }
}
