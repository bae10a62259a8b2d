//! Live input to a running task, through the real programs.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as B64;
use mesh_tests::{Hub, Node, text, until};
use serde_json::{Value, json};

/// Starts a task whose standard input stays open; gives its id once it runs.
async fn open(hub: &Hub, shell: Value) -> String {
    let t = hub.dispatch(json!({ "shell": shell })).await;
    let id = text(&t, "id");
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    id
}

async fn call(hub: &Hub, id: &str, body: Value) -> (u16, Value) {
    hub.call("POST", &format!("/api/v1/tasks/{id}/input"), Some(body)).await
}

async fn piece(hub: &Hub, id: &str, seq: u64, data: &str) -> (u16, Value) {
    call(hub, id, json!({"seq": seq, "data_base64": B64.encode(data)})).await
}

/// Sends a piece until it is answered: what a caller does whose link, node or hub was away.
async fn insist(hub: &Hub, id: &str, seq: u64, data: &str) -> Value {
    until("the piece to be taken", async || {
        let (status, v) = piece(hub, id, seq, data).await;
        assert!(status == 200 || status == 503, "{status} {v}");
        (status == 200).then_some(v)
    })
    .await
}

/// Cancels the task: a machine has few slots.
async fn end(hub: &Hub, id: &str) {
    assert_eq!(hub.call("POST", &format!("/api/v1/tasks/{id}/cancel"), None).await.0, 202);
    assert_eq!(hub.finished(id).await["state"], "cancelled");
}

async fn prints(hub: &Hub, id: &str, want: &str) {
    until(&format!("the output {want:?}"), async || {
        let now = hub.output(id, "").await;
        let now = String::from_utf8(now).expect("text");
        assert!(want.starts_with(&now), "{now:?} is not a part of {want:?}");
        (now == want).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cat_echoes_what_it_is_sent_while_it_runs() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let id = open(&hub, json!({"argv": ["cat"], "stdin": "given\n", "stdin_open": true})).await;
    assert_eq!(hub.task(&id).await["spec"]["shell"]["stdin_open"], true);
    prints(&hub, &id, "given\n").await;
    let (status, v) = piece(&hub, &id, 1, "one\n").await;
    assert_eq!((status, &v), (200, &json!({"seq": 1})));
    prints(&hub, &id, "given\none\n").await;

    // Said again, with whatever bytes: answered and not written. A gap is refused, and takes nothing.
    assert_eq!(piece(&hub, &id, 1, "one\n").await, (200, json!({"seq": 1})));
    assert_eq!(piece(&hub, &id, 1, "something else\n").await, (200, json!({"seq": 1})));
    let (status, v) = piece(&hub, &id, 3, "three\n").await;
    assert_eq!((status, v["code"].as_str()), (409, Some("input_gap")), "{v}");
    assert!(text(&v, "detail").contains("send 2 next"), "{v}");
    assert_eq!(piece(&hub, &id, 2, "two\n").await, (200, json!({"seq": 2})));

    // Two at once with one number: both are answered, one is written.
    let (a, b) = tokio::join!(piece(&hub, &id, 3, "three\n"), piece(&hub, &id, 3, "three\n"));
    assert_eq!((a, b), ((200, json!({"seq": 3})), (200, json!({"seq": 3}))));
    prints(&hub, &id, "given\none\ntwo\nthree\n").await;

    // The largest piece, byte by byte.
    let big: Vec<u8> = (0..16_384u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(call(&hub, &id, json!({"seq": 4, "data_base64": B64.encode(&big)})).await, (200, json!({"seq": 4})));
    assert_eq!(call(&hub, &id, json!({"seq": 5, "data_base64": B64.encode("end"), "eof": true})).await, (200, json!({"seq": 5})));
    let task = hub.finished(&id).await;
    assert_eq!((task["state"].as_str(), task["exit_code"].as_i64()), (Some("succeeded"), Some(0)), "{task}");
    let mut want = b"given\none\ntwo\nthree\n".to_vec();
    want.extend(&big);
    want.extend(b"end");
    assert!(hub.output(&id, "?stream=stdout").await == want, "nothing is lost, doubled or out of order");
    let (status, v) = piece(&hub, &id, 6, "late").await;
    assert_eq!((status, v["code"].as_str()), (409, Some("task_ended")), "{v}");
}

#[tokio::test(flavor = "multi_thread")]
async fn input_outlives_a_killed_daemon_and_a_killed_hub() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let id = open(&hub, json!({"argv": ["cat"], "stdin_open": true})).await;
    assert_eq!(piece(&hub, &id, 1, "one\n").await.0, 200);

    node.daemon().kill9();
    node.offline(&hub).await;
    let (status, v) = piece(&hub, &id, 2, "two\n").await;
    assert_eq!((status, v["code"].as_str()), (503, Some("node_offline")), "{v}");
    node.run();
    assert_eq!(insist(&hub, &id, 2, "two\n").await, json!({"seq": 2}));
    // The warden remembers what the daemon before has brought.
    assert_eq!(piece(&hub, &id, 1, "one\n").await, (200, json!({"seq": 2})));

    hub.crash_and_restart().await;
    assert_eq!(insist(&hub, &id, 2, "two\n").await, json!({"seq": 2}), "whoever is not sure says it again");
    assert_eq!(insist(&hub, &id, 3, "three\n").await, json!({"seq": 3}));
    assert_eq!(call(&hub, &id, json!({"seq": 4, "eof": true})).await, (200, json!({"seq": 4})));
    let task = hub.finished(&id).await;
    assert_eq!((task["state"].as_str(), task["stdout"].as_str()), (Some("succeeded"), Some("one\ntwo\nthree\n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_does_not_read_pushes_back() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let id = open(&hub, json!({"argv": ["sleep", "600"], "stdin_open": true})).await;
    let data = B64.encode(vec![b'x'; 16_384]);
    let mut taken = 0;
    let full = loop {
        let r = hub.request("POST", &format!("/api/v1/tasks/{id}/input")).json(&json!({"seq": taken + 1, "data_base64": data}));
        let r = r.send().await.expect("the hub answers");
        if r.status().as_u16() != 200 {
            break r;
        }
        taken += 1;
        assert!(taken < 64, "256 KiB and a pipe are all that may wait");
    };
    assert!(taken >= 16);
    assert_eq!((full.status().as_u16(), full.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    let v: Value = full.json().await.expect("a problem");
    assert_eq!((v["code"].as_str(), v["status"].as_u64()), (Some("input_full"), Some(429)));
    // Neither its end nor its cancel waits for room.
    assert_eq!(call(&hub, &id, json!({"seq": taken + 1, "eof": true})).await.0, 200);
    let (status, v) = piece(&hub, &id, taken + 2, "x").await;
    assert_eq!((status, v["code"].as_str()), (409, Some("input_closed")), "{v}");
    end(&hub, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_taken_is_refused_by_name() {
    let hub = Hub::start().await;
    let waiting = hub.dispatch(json!({"shell": {"argv": ["cat"], "stdin_open": true}})).await;
    let waiting = text(&waiting, "id");
    let refused = async |id: &str, body: Value, want: (u16, &str)| {
        let (status, v) = call(&hub, id, body.clone()).await;
        assert_eq!((status, v["code"].as_str().unwrap_or("")), want, "{body}: {v}");
    };
    let x = || json!({"seq": 1, "data_base64": "eA=="});
    refused(&waiting, x(), (409, "not_running")).await;
    let _node = Node::join(&hub, "n").await;
    hub.task_when(&waiting, "to run", |t| t["state"] == "running").await;
    for (body, want) in [
        (json!({"data_base64": "eA=="}), (400, "bad_field")),
        (json!({"seq": -1}), (400, "bad_field")),
        (json!({"seq": 1, "data": "x"}), (400, "bad_field")),
        (json!({"seq": 0, "eof": true}), (422, "bad_seq")),
        (json!({"seq": 1}), (422, "empty_input")),
        (json!({"seq": 1, "data_base64": ""}), (422, "empty_input")),
        (json!({"seq": 1, "data_base64": "??"}), (422, "bad_base64")),
        (json!({"seq": 1, "data_base64": B64.encode(vec![0; 16_385])}), (422, "input_too_large")),
        (json!({"seq": 1, "resize": {"rows": 24, "cols": 80}}), (422, "not_yet")),
        (json!({"seq": u64::MAX, "data_base64": "eA=="}), (409, "input_gap")),
    ] {
        refused(&waiting, body, want).await;
    }
    // A child that closed its standard input; and one that never had any, which is as it always was.
    let closed = open(&hub, json!({"argv": ["sh", "-c", "exec <&-; echo closed; exec sleep 600"], "stdin_open": true})).await;
    prints(&hub, &closed, "closed\n").await;
    refused(&closed, x(), (409, "input_closed")).await;
    end(&hub, &closed).await;
    let without = open(&hub, json!({"argv": ["sh", "-c", "readlink /proc/self/fd/0; exec sleep 600"]})).await;
    prints(&hub, &without, "/dev/null\n").await;
    refused(&without, x(), (409, "no_input")).await;
    end(&hub, &without).await;
    let echo = hub.dispatch(json!({"echo": {"payload": "x"}, "wait_secs": 20})).await;
    refused(&text(&echo, "id"), x(), (409, "no_input")).await;
    refused("task_00000000-0000-7000-8000-000000000000", x(), (404, "not_found")).await;
    refused("nonsense", x(), (404, "not_found")).await;
    // Reading is not acting.
    let key = json!({"name": "reader", "scopes": ["tasks:read"]});
    let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(key)).await;
    assert_eq!(status, 201, "{key}");
    let web = reqwest::Client::builder().no_proxy().build().expect("a client");
    let url = format!("{}/api/v1/tasks/{waiting}/input", hub.http);
    let r = web.post(&url).bearer_auth(text(&key, "secret")).json(&x()).send().await.expect("the hub answers");
    assert_eq!(r.status().as_u16(), 403);
    let r = web.post(&url).json(&x()).send().await.expect("the hub answers");
    assert_eq!(r.status().as_u16(), 401);
    // After all that, the first piece is still the first.
    assert_eq!(call(&hub, &waiting, json!({"seq": 1, "data_base64": B64.encode("whole"), "eof": true})).await.0, 200);
    assert_eq!(hub.finished(&waiting).await["stdout"], "whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn run_i_is_a_pipe_to_the_command() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::Stdio;
    let hub = Hub::start().await;
    hub.cli_login();
    let _node = Node::join(&hub, "n").await;
    let start = |args: &[&str]| {
        let mut c = hub.cli();
        c.args(["run", "-i", "--"]).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        c.spawn().expect("the CLI runs")
    };
    // A line comes back before the next is sent.
    let mut child = start(&["sh", "-c", "cat; exit 3"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    for line in ["one", "two", "three"] {
        writeln!(stdin, "{line}").expect("it takes a line");
        assert_eq!(lines.next().expect("a line").expect("text"), line);
    }
    drop(stdin);
    assert!(lines.next().is_none());
    assert_eq!(child.wait().expect("it ends").code(), Some(3));
    // It leaves with the command, although nobody has closed its own input.
    let mut child = start(&["sh", "-c", "read line; echo \"got $line\"; exit 4"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    writeln!(stdin, "something").expect("it takes a line");
    let out = child.wait_with_output().expect("it ends");
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(4), &b"got something\n"[..]), "{}", mesh_tests::shown(&out));
    drop(stdin);
    // More than one piece, byte by byte.
    let big: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
    let mut child = start(&["cat"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    let given = big.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&given).expect("it takes all"));
    let out = child.wait_with_output().expect("it ends");
    writer.join().expect("it was written");
    assert!(out.stdout == big, "{} bytes came back", out.stdout.len());
}
