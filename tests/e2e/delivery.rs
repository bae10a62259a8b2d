//! What survives: streams, crashes, repeated words, large and odd output.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use mesh_core::output::Hashing;
use mesh_tests::{Hub, Node, alive, text, until};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Server-sent events of a finished stream, as (event, id, data).
fn events(body: &[u8]) -> Vec<(String, Option<u64>, Value)> {
    let text = String::from_utf8_lossy(body);
    let field = |block: &str, name: &str| block.lines().find_map(|l| l.strip_prefix(name).map(|v| v.trim().to_owned()));
    text.split("\n\n")
        .filter_map(|block| {
            let data = serde_json::from_str(&field(block, "data:")?).ok()?;
            Some((field(block, "event:")?, field(block, "id:").and_then(|i| i.parse().ok()), data))
        })
        .collect()
}

fn hex(digest: mesh_core::Digest) -> Option<String> {
    Some(digest.iter().map(|b| format!("{b:02x}")).collect())
}
fn sum(bytes: &[u8]) -> Option<String> {
    hex(mesh_core::sha256(bytes))
}
/// Of stdout and stderr, as the task says them.
fn digests(task: &Value) -> [Option<String>; 2] {
    ["stdout_sha256", "stderr_sha256"].map(|key| {
        assert!(task.get(key).is_some(), "{key} is missing in {task}");
        task[key].as_str().map(str::to_owned)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_byte_for_byte_and_replayable() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    // NUL, invalid UTF-8, no newline at the end, both streams
    let t = hub.sh(r"printf 'a\000b\377\376'; printf 'e\200' >&2").await;
    let id = text(&t, "id");
    assert_eq!(hub.output(&id, "?stream=stdout").await, b"a\0b\xff\xfe");
    assert_eq!(hub.output(&id, "?stream=stderr").await, b"e\x80");
    assert_eq!(hub.output(&id, "?stream=stdout&from_byte=2").await, b"b\xff\xfe");
    assert_eq!((t["stdout_lossy"].as_bool(), t["stderr_lossy"].as_bool()), (Some(true), Some(true)));
    assert_eq!((t["stdout_bytes"].as_u64(), t["stderr_bytes"].as_u64()), (Some(5), Some(2)));
    assert_eq!(digests(&t), [sum(b"a\0b\xff\xfe"), sum(b"e\x80")]);
    let silent = hub.sh("exit 3").await;
    assert_eq!(digests(&silent), [sum(b""), sum(b"")]);
    let missing = hub.dispatch(json!({"shell": {"argv": ["/no/such/program"]}})).await;
    assert_eq!(digests(&hub.finished(&text(&missing, "id")).await), [None, None], "what never ran has none");

    // Larger than a frame, so that it is several however it is read.
    let t = hub.sh("seq 1 40000").await;
    let path = format!("/api/v1/tasks/{}/output", text(&t, "id"));
    let sse = async |path: &str, last: Option<&str>| {
        let mut r = hub.request("GET", path).header("accept", "text/event-stream");
        if let Some(l) = last {
            r = r.header("last-event-id", l);
        }
        events(&r.send().await.unwrap().bytes().await.unwrap())
    };
    let all = sse(&path, None).await;
    assert_eq!(all.last().unwrap().0, "end");
    assert_eq!(all.last().unwrap().2["task"]["state"], "succeeded");
    let joined: Vec<u8> = all.iter().filter(|e| e.0 == "output").flat_map(|e| B64.decode(text(&e.2, "data_base64")).unwrap()).collect();
    assert!(joined == (1..=40_000).map(|n| format!("{n}\n")).collect::<String>().as_bytes(), "{} bytes", joined.len());
    let seqs: Vec<u64> = all.iter().filter_map(|e| e.1).collect();
    assert!(seqs.windows(2).all(|w| w[0] < w[1]) && seqs.len() >= 2, "{seqs:?}");
    let resumed = sse(&path, Some(&seqs[0].to_string())).await;
    assert_eq!(resumed.iter().filter_map(|e| e.1).collect::<Vec<_>>(), seqs[1..]);
    let inclusive = sse(&format!("{path}?from_seq={}", seqs[1]), None).await;
    assert_eq!(inclusive.iter().filter_map(|e| e.1).collect::<Vec<_>>(), seqs[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_mebibytes_are_cut_and_said_so() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let t = hub.dispatch(json!({"shell": {"argv": ["sh", "-c", "head -c 104857600 /dev/zero; echo done >&2"]}})).await;
    let id = text(&t, "id");
    let t = hub.finished(&id).await;
    assert_eq!(t["state"], "succeeded", "the program goes on behind the cut: {}", t["reason"]);
    assert_eq!(t["stdout_bytes"].as_u64(), Some(104_857_600));
    assert_eq!(t["truncated"], true);
    let mut whole = Hashing::default();
    (0..100).for_each(|_| whole.stdout(&[0; 1 << 20]));
    whole.stderr(b"done\n");
    let whole = whole.digests();
    assert_eq!(digests(&t), [hex(whole.stdout), hex(whole.stderr)], "of all that was written, kept or not");
    let kept = hub.output(&id, "?stream=stdout").await;
    assert!(kept.len() <= 64 << 20 && kept.len() > 60 << 20, "{}", kept.len());
    let sse = hub.request("GET", &format!("/api/v1/tasks/{id}/output?from_seq=100000000")).header("accept", "text/event-stream");
    let tail = events(&sse.send().await.unwrap().bytes().await.unwrap());
    assert_eq!(tail.iter().map(|e| e.0.as_str()).collect::<Vec<_>>(), ["gap", "end"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_and_timeout_end_the_whole_tree() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    // A grandchild that left the session and the process group, and one that ignores TERM.
    let mark = format!("77{:07}", std::process::id());
    let script = format!(
        "setsid sh -c 'trap \"\" TERM; setsid sleep {mark}.1 & echo deaf; sleep {mark}.2' & \
         echo parent; sleep {mark}.3"
    );
    let run = async |timeout: u64| {
        let mut body = json!({"shell": {"argv": ["sh", "-c", script]}});
        if timeout > 0 {
            body["timeout_secs"] = json!(timeout);
        }
        text(&hub.dispatch(body).await, "id")
    };
    let gone = || assert_eq!(alive(&mark), Vec::<u32>::new(), "nothing of the tree is left once the task has ended");
    let id = run(0).await;
    until("the whole tree to be there", async || (alive(&format!("sleep\0{mark}")).len() == 3).then_some(())).await;
    let (status, t) = hub.call("POST", &format!("/api/v1/tasks/{id}/cancel"), None).await;
    assert_eq!((status, t["cancel_requested_at"].is_string()), (202, true));
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str().unwrap(), t["reason"]["code"].as_str().unwrap()), ("cancelled", "cancelled_by_user"));
    gone();
    // A machine that is too slow to make the whole tree within the time gets more of it.
    let mut timeout = 1;
    loop {
        let t = hub.finished(&run(timeout).await).await;
        assert_eq!((t["state"].as_str().unwrap(), t["reason"]["code"].as_str().unwrap()), ("failed", "timeout"));
        gone();
        let said = text(&t, "stdout");
        if said.contains("deaf") && said.contains("parent") {
            break;
        }
        timeout *= 2;
        assert!(timeout < 100, "the tree was never there: {said}");
    }
    // A task that waits ends at once.
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sleep", "1"]}, "queue_secs": 0})).await, "id");
    hub.finished(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_lives_through_kills_of_daemon_and_hub() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let mark = node.dir.path().join("gate");
    // It counts its own runs, and ends when the test says so.
    let runs = node.dir.path().join("runs");
    std::fs::write(&runs, "").unwrap();
    std::fs::set_permissions(&runs, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let script = format!(
        "echo run >> {runs}; i=0; while [ ! -e {gate} ]; do i=$((i+1)); echo $i; echo e$i >&2; sleep 0.05; done; echo last $i",
        runs = runs.display(),
        gate = mark.display()
    );
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await, "id");
    let lines = async |hub: &Hub| String::from_utf8(hub.output(&id, "?stream=stdout").await).unwrap().lines().count();
    // Its output comes by another stream than the word that it runs.
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    until("some output", async || (lines(&hub).await > 3).then_some(())).await;

    node.daemon().kill9();
    node.offline(&hub).await;
    let t = hub.task(&id).await;
    assert_eq!((t["state"].as_str(), t["waiting"]["code"].as_str()), (Some("running"), Some("in_doubt")));
    assert_eq!(digests(&t), [None, None], "not before the end");
    node.run();
    node.online(&hub).await;
    let before = lines(&hub).await;
    until("output after the daemon's crash", async || (lines(&hub).await > before + 3).then_some(())).await;

    hub.crash_and_restart().await;
    node.online(&hub).await;
    let before = lines(&hub).await;
    until("output after the hub's crash", async || (lines(&hub).await > before + 3).then_some(())).await;

    std::fs::write(&mark, "").unwrap();
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)));
    let out = String::from_utf8(hub.output(&id, "?stream=stdout").await).unwrap();
    let numbers: Vec<&str> = out.lines().collect();
    let last = numbers.len() - 1;
    assert_eq!(numbers[last], format!("last {last}"));
    assert!(numbers[..last].iter().enumerate().all(|(i, n)| *n == (i + 1).to_string()), "whole, once, in order");
    let errors = hub.output(&id, "?stream=stderr").await;
    assert_eq!(errors.iter().filter(|b| **b == b'\n').count(), last);
    assert_eq!(digests(&t), [sum(out.as_bytes()), sum(&errors)], "over all of it, whoever was there to carry it");
    assert_eq!(std::fs::read_to_string(&runs).unwrap(), "run\n", "it ran once");
}

#[tokio::test(flavor = "multi_thread")]
async fn accepted_work_waits_for_its_node_and_runs_once() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    node.daemon().terminate().await;
    node.offline(&hub).await;
    let mut ids = BTreeSet::new();
    for i in 0..20 {
        let t = hub.dispatch(json!({"node": "n", "shell": {"argv": ["echo", i.to_string()]}})).await;
        assert_eq!((t["state"].as_str(), t["waiting"]["code"].as_str()), (Some("pending"), Some("node_offline")), "{t}");
        ids.insert(text(&t, "id"));
    }
    let short = text(&hub.dispatch(json!({"node": "n", "queue_secs": 1, "shell": {"argv": ["true"]}})).await, "id");
    let t = hub.finished(&short).await;
    assert_eq!((t["reason"]["code"].as_str(), t["reason"]["detail"].as_str()), (Some("no_node"), Some("node_offline")));
    let waiting = text(&hub.dispatch(json!({"node": "n", "shell": {"argv": ["true"]}})).await, "id");
    let (_, t) = hub.call("POST", &format!("/api/v1/tasks/{waiting}/cancel"), None).await;
    assert_eq!(t["state"], "cancelled", "waiting work ends at once");

    hub.crash_and_restart().await;
    node.run();
    node.online(&hub).await;
    for id in &ids {
        let t = hub.finished(id).await;
        assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_each_end_once() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let hub = &hub;
    let ids = futures::future::join_all(
        (0..60).map(|i| async move { text(&hub.dispatch(json!({"shell": {"argv": ["echo", i.to_string()]}})).await, "id") }),
    )
    .await;
    for (i, id) in ids.iter().enumerate() {
        let t = hub.finished(id).await;
        assert_eq!((t["state"].as_str(), t["stdout"].as_str()), (Some("succeeded"), Some(format!("{i}\n").as_str())));
        let history = hub.get(&format!("/api/v1/tasks/{id}/events")).await;
        let ends = history["items"].as_array().unwrap().iter().filter(|e| e["type"] == "ended").count();
        assert_eq!(ends, 1);
    }
    // Pages: newest first, every task once.
    let mut seen = vec![];
    let mut cursor = String::new();
    loop {
        let page = hub.get(&format!("/api/v1/tasks?limit=7{cursor}")).await;
        seen.extend(page["items"].as_array().unwrap().iter().map(|t| text(t, "id")));
        match page["next_cursor"].as_str() {
            Some(c) => cursor = format!("&cursor={c}"),
            None => break,
        }
    }
    assert!(seen.windows(2).all(|w| w[0] > w[1]));
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), ids.into_iter().collect());
}

/// Only heartbeats make a node online: one that falls silent goes offline by itself, and comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_goes_offline_and_comes_back() {
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let begin = std::time::Instant::now();
    // Its last word is of after that; how much later than 15 s the hub sees to its silence is the machine's affair.
    let word = hub.dispatch(json!({"node": "n", "echo": {"payload": "x"}})).await;
    hub.finished(&text(&word, "id")).await;
    node.daemon().signal(rustix::process::Signal::STOP);
    node.offline(&hub).await;
    let silent = begin.elapsed().as_secs();
    assert!(silent >= 15, "offline after 15 s without a frame, not after {silent}");
    let waiting = text(&hub.dispatch(json!({"node": "n", "shell": {"argv": ["true"]}})).await, "id");
    node.daemon().signal(rustix::process::Signal::CONT);
    node.online(&hub).await;
    assert_eq!(hub.finished(&waiting).await["state"], "succeeded");
}

/// A machine that stands still as a whole has heard nothing meanwhile, which is no silence of the other side.
#[tokio::test(flavor = "multi_thread")]
async fn who_stands_still_together_keeps_the_link() {
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    node.daemon().signal(rustix::process::Signal::STOP);
    hub.process.signal(rustix::process::Signal::STOP);
    // Longer than silence may last, counted from the last word that either has heard.
    tokio::time::sleep(std::time::Duration::from_secs(18)).await;
    hub.process.signal(rustix::process::Signal::CONT);
    node.daemon().signal(rustix::process::Signal::CONT);
    let t = hub.finished(&text(&hub.dispatch(json!({"node": "n", "shell": {"argv": ["true"]}})).await, "id")).await;
    assert_eq!(t["state"], "succeeded");
    let ups = node.daemon().log().matches("link up generation=").count();
    assert_eq!(ups, 1, "{}", node.daemon().log());
}

/// A caller that hangs up cancels nothing, loses nothing and leaks nothing.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_hang_up_leave_no_trace() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let mut hung_up = 0u64;
    for i in 0..150u64 {
        let body = json!({"shell": {"argv": ["true"]}, "wait_secs": 20});
        let call = hub.request("POST", "/api/v1/dispatch").json(&body).send();
        // From before the commit to after it.
        if tokio::time::timeout(std::time::Duration::from_micros(300 + i * 40), call).await.is_err() {
            hung_up += 1;
        }
    }
    assert!(hung_up > 20, "the test hangs up for real: {hung_up}");
    until("every accepted task to end", async || {
        let open = hub.get("/api/v1/tasks?limit=500").await;
        let items = open["items"].as_array()?;
        items.iter().all(|t| t["state"] == "succeeded").then_some(())
    })
    .await;
    let running = hub.get(&format!("/api/v1/nodes/{}", node.id)).await;
    assert_eq!((running["running"].as_u64(), running["schedulable"]["ok"].as_bool()), (Some(0), Some(true)), "no slot is lost");

    // The same for a cancel: it arrives, whoever waits.
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sleep", "600"]}})).await, "id");
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    let call = hub.request("POST", &format!("/api/v1/tasks/{id}/cancel")).send();
    let _ = tokio::time::timeout(std::time::Duration::from_micros(900), call).await;
    let (status, _) = hub.call("POST", &format!("/api/v1/tasks/{id}/cancel"), None).await;
    assert_eq!(status, 202);
    assert_eq!(hub.finished(&id).await["state"], "cancelled");
}

/// A dispatch that races the end of its session never outlives it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_runs_on_in_a_closed_session() {
    let mut hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    for i in 0..8u64 {
        let (_, s) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
        let sid = text(&s, "id");
        hub.call("PUT", &format!("/api/v1/sessions/{sid}/nodes/{}", node.id), None).await;
        let path = format!("/api/v1/sessions/{sid}/dispatch");
        let body = || Some(json!({"shell": {"argv": ["sleep", "600"]}}));
        let close = async {
            tokio::time::sleep(std::time::Duration::from_micros(i * 300)).await;
            hub.call("DELETE", &format!("/api/v1/sessions/{sid}"), None).await
        };
        let (a, b, c) = futures::future::join3(hub.call("POST", &path, body()), hub.call("POST", &path, body()), close).await;
        assert_eq!(c.0, 204);
        for (status, t) in [a, b] {
            match status {
                202 => {
                    let t = hub.finished(&text(&t, "id")).await;
                    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("cancelled"), Some("session_closed")));
                }
                409 => assert_eq!(t["code"], "session_ended"),
                other => panic!("{other} {t}"),
            }
        }
    }
    // A stop does not wait for those who wait, and answers them.
    let busy = json!({"shell": {"argv": ["sleep", "600"]}, "wait_secs": 60});
    let waiting = hub.request("POST", "/api/v1/dispatch").json(&busy).send();
    let stop = async {
        until("the task", async || (hub.get("/api/v1/tasks?state=running").await["items"].as_array()?.len() == 1).then_some(())).await;
        hub.process.signal(rustix::process::Signal::TERM);
    };
    let (answer, ()) = futures::future::join(waiting, stop).await;
    assert_eq!(answer.unwrap().status().as_u16(), 202);
    assert_eq!(hub.process.ended().await.code(), Some(0));
}

/// `stop` ends the tasks even when the daemon is just leaving by itself.
#[tokio::test(flavor = "multi_thread")]
async fn stop_means_all_of_it() {
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let mark = format!("88{:07}", std::process::id());
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sleep", format!("{mark}.1")]}})).await, "id");
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    node.daemon().signal(rustix::process::Signal::TERM);
    let out = node.command(&["stop"]).output().unwrap();
    assert!(out.status.success(), "{}", mesh_tests::shown(&out));
    assert_eq!(alive(&mark), Vec::<u32>::new());
}
