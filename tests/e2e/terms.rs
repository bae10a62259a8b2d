//! When, where and how often a task runs, and what a repeated request makes: through the REST door.

use mesh_tests::{Hub, Node, Process, alive, shown, text, until};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A machine with so many places and these labels.
async fn machine(hub: &Hub, name: &str, places: u32, labels: Value) -> Node {
    let (_, yaml) = hub.invite(json!({"name": name, "labels": labels})).await;
    let mut node = Node::prepare(name, &yaml);
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let mut run = node.command(&["run"]);
    run.env("CORTEX_NODE_MAX_TASKS", places.to_string());
    node.process = Some(Process::start(&mut run, node.dir.path().join("node.log")));
    node.online(hub).await;
    node
}

/// A file that tasks may write to, whoever they run as.
fn shared(node: &Node, name: &str) -> PathBuf {
    let path = node.dir.path().join(name);
    std::fs::write(&path, "").unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    path
}
fn sh(script: &str) -> Value {
    json!({"argv": ["sh", "-c", script]})
}
fn in_ms(ms: i64) -> String {
    (OffsetDateTime::now_utc() + time::Duration::milliseconds(ms)).format(&Rfc3339).unwrap()
}
/// Dispatches with a deadline so many milliseconds from now; with a later one where the machine needed longer
/// than that to ask.
async fn dispatch_until(hub: &Hub, mut ms: i64, mut body: Value) -> String {
    loop {
        body["deadline"] = json!(in_ms(ms));
        let answer = hub.call("POST", "/api/v1/dispatch", Some(body.clone())).await;
        if answer.0 == 202 {
            return text(&answer.1, "id");
        }
        assert_eq!(code(&answer), (422, "bad_deadline"));
        ms *= 2;
    }
}
fn moment(v: &Value) -> OffsetDateTime {
    OffsetDateTime::parse(v.as_str().unwrap_or_else(|| panic!("{v} is no time")), &Rfc3339).unwrap()
}
fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["code"].as_str().unwrap_or_else(|| panic!("{} has no code", answer.1)))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_run_again_as_often_as_was_asked() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let count = shared(&node, "count");
    let script = format!("echo x >> {f}; n=$(wc -l < {f}); echo run $n; [ $n -ge 3 ]", f = count.display());
    let dispatched = hub.dispatch(json!({"shell": sh(&script), "retries": {"max": 4, "backoff_ms": 10}})).await;
    assert_eq!(dispatched["retries"], json!({"max": 4, "backoff_ms": 10}));
    let id = text(&dispatched, "id");
    // Who follows from the beginning on sees every attempt.
    let followed = hub.output(&id, "?follow=true").await;
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64(), t["exit_code"].as_i64()), (Some("succeeded"), Some(3), Some(0)), "{t}");
    assert_eq!(t["stdout"], "run 3\n", "the output is the newest attempt's");
    assert!(String::from_utf8(followed).unwrap().ends_with("run 3\n"));
    assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 3, "and no fourth");
    let history = hub.get(&format!("/api/v1/tasks/{id}/events")).await;
    let ends: Vec<&Value> = history["items"].as_array().unwrap().iter().filter(|e| e["type"] == "ended").collect();
    assert_eq!(ends.len(), 3);
    // Who was cut off in an earlier attempt hears that this is another one, and all of it.
    let resumed = async |after: &str| {
        let r = hub.request("GET", &format!("/api/v1/tasks/{id}/output")).header("accept", "text/event-stream");
        r.header("last-event-id", after).send().await.unwrap().text().await.unwrap()
    };
    for earlier in ["1", "2.1"] {
        let events = resumed(earlier).await;
        assert!(events.starts_with("id: 3.0\nevent: attempt\n") && events.contains("id: 3.1\nevent: output\n"), "{earlier}: {events}");
    }
    assert!(resumed("3.0").await.starts_with("id: 3.1\nevent: output\n"));
    assert!(resumed("3.1").await.starts_with("event: end\n"));
    assert!(resumed("3.x").await.contains("bad_event_id"));
    assert_eq!((ends[0]["state"].as_str(), ends[2]["state"].as_str()), (Some("pending"), Some("succeeded")));
    assert_eq!(ends[1]["detail"], "exit: exit code 1; retry 2 of 4 in 20 ms");

    // One that rests says until when, and can be cancelled.
    let id = text(&hub.dispatch(json!({"shell": sh("exit 5"), "retries": {"max": 1, "backoff_ms": 3_600_000}})).await, "id");
    let t = hub.task_when(&id, "to rest", |t| t["waiting"]["code"] == "backoff").await;
    assert_eq!((t["state"].as_str(), t["exit_code"].is_null(), t["reason"].is_null()), (Some("pending"), true, true));
    assert!(text(&t["waiting"], "detail").starts_with("attempt 1 failed; retry 1 of 1 rests until 20"), "{t}");
    hub.call("POST", &format!("/api/v1/tasks/{id}/cancel"), None).await;
    assert_eq!(hub.finished(&id).await["state"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn not_before_and_deadline() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let start = in_ms(2500);
    let id = text(&hub.dispatch(json!({"shell": sh("true"), "not_before": start})).await, "id");
    let t = hub.task(&id).await;
    if OffsetDateTime::now_utc() < moment(&json!(start)) {
        assert_eq!((t["state"].as_str(), t["waiting"]["code"].as_str()), (Some("pending"), Some("not_before")), "{t}");
        assert!(text(&t["waiting"], "detail").starts_with("it is not started before 20"), "{t}");
    }
    let t = hub.finished(&id).await;
    assert_eq!(t["state"], "succeeded");
    assert!(moment(&t["assigned_at"]) >= moment(&json!(start)), "{t}");

    // A deadline in the middle of a run ends the whole tree; one that waits ends as well.
    let mark = format!("78{}.5", std::process::id());
    let body = json!({"shell": sh(&format!("sleep {mark} & sleep {mark}")), "retries": {"max": 3}});
    let running = dispatch_until(&hub, 3000, body).await;
    let waiting = dispatch_until(&hub, 600, json!({"shell": sh("true"), "select": {"labels": {"zone": "mars"}}})).await;
    for id in [running, waiting] {
        let t = hub.finished(&id).await;
        assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("failed"), Some("deadline")), "{t}");
        assert!(moment(&t["finished_at"]) >= moment(&t["deadline"]) && t["cancel_requested_at"].is_null(), "{t}");
    }
    assert_eq!(alive(&mark), Vec::<u32>::new());

    // It comes while both the node and the hub are away, and counts when they are back.
    let mut ms = 12_000;
    let (id, deadline) = loop {
        let id = dispatch_until(&hub, ms, json!({"shell": sh(&format!("sleep {mark}"))})).await;
        hub.task_when(&id, "to run", |t| t["state"] != "pending" && t["state"] != "assigned").await;
        node.daemon().kill9();
        node.offline(&hub).await;
        let t = hub.task(&id).await;
        if t["state"] == "running" && t["cancel_requested_at"].is_null() && OffsetDateTime::now_utc() < moment(&t["deadline"]) {
            break (id, moment(&t["deadline"]));
        }
        // A machine that was too slow to lose both before it comes has more time.
        ms *= 2;
        node.run();
        node.online(&hub).await;
    };
    hub.process.kill9();
    until("the deadline to pass", async || (OffsetDateTime::now_utc() > deadline).then_some(())).await;
    hub.restart().await;
    assert_eq!(hub.task(&id).await["waiting"]["code"], "in_doubt", "its node alone knows");
    node.run();
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("failed"), Some("deadline")), "{t}");
    assert_eq!(alive(&mark), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_place_goes_by_priority_and_selectors_find_their_node() {
    let hub = Hub::start().await;
    let small = machine(&hub, "small", 1, json!({"zone": "a", "fast": "yes"})).await;
    let _other = machine(&hub, "other", 4, json!({"zone": "b"})).await;
    let (order, gate) = (shared(&small, "order"), small.dir.path().join("gate"));
    let select = json!({"labels": {"zone": "a", "os": std::env::consts::OS, "fast": null}, "skills": ["shell"]});
    let run = async |word: &str, priority: i64| {
        let script = format!("echo {word} >> {}; while [ ! -e {} ]; do sleep 0.05; done", order.display(), gate.display());
        text(&hub.dispatch(json!({"shell": sh(&script), "select": select, "priority": priority})).await, "id")
    };
    let first = run("first", 0).await;
    hub.task_when(&first, "to run", |t| t["state"] == "running").await;
    let mut ids = vec![run("low", -3).await, run("plain", 0).await, run("high", 100).await];
    let t = hub.task_when(&ids[2], "to wait", |t| t["waiting"]["code"] == "no_slot").await;
    assert_eq!((t["priority"].as_i64(), &t["select"]), (Some(100), &select));
    assert!(hub.task(&first).await["priority"].is_null(), "what was not asked for is not shown");
    std::fs::write(&gate, "").unwrap();
    ids.push(first);
    for id in &ids {
        let t = hub.finished(id).await;
        assert_eq!((t["state"].as_str(), t["node_id"].as_str()), (Some("succeeded"), Some(small.id.as_str())), "{t}");
    }
    assert_eq!(std::fs::read_to_string(&order).unwrap(), "first\nhigh\nplain\nlow\n");

    // Nobody can ever fit: it waits, says so, and is given up in the end.
    let id = text(&hub.dispatch(json!({"shell": sh("true"), "select": {"slots": {"gpu": 1000}}, "queue_secs": 1})).await, "id");
    let t = hub.finished(&id).await;
    assert_eq!((t["reason"]["code"].as_str(), t["reason"]["detail"].as_str()), (Some("no_node"), Some("no_candidate")), "{t}");
    // In a session: among its nodes alone.
    let (_, s) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    hub.call("PUT", &format!("/api/v1/sessions/{}/nodes/small", text(&s, "id")), None).await;
    let path = format!("/api/v1/sessions/{}/dispatch", text(&s, "id"));
    let in_session = async |zone: &str, queue_secs: u64| {
        let body = json!({"shell": sh("true"), "select": {"labels": {"zone": zone}}, "queue_secs": queue_secs});
        let (_, t) = hub.call("POST", &path, Some(body)).await;
        hub.finished(&text(&t, "id")).await
    };
    assert_eq!(in_session("a", 600).await["state"], "succeeded");
    assert_eq!(in_session("b", 1).await["reason"]["detail"], "no_candidate");
    // And by the command line.
    hub.cli_login();
    let out = hub.cli().args(["run", "--select", "zone=b", "--priority", "-1", "--", "echo", "there"]).output().unwrap();
    assert!(out.status.success() && out.stdout == b"there\n", "{}", shown(&out));
}

#[tokio::test(flavor = "multi_thread")]
async fn terms_that_make_no_sense() {
    let hub = Hub::start().await;
    for (field, value, want) in [
        ("priority", json!(101), (422, "bad_priority")),
        ("priority", json!(-9_000_000_000_i64), (422, "bad_priority")),
        ("priority", json!("high"), (400, "bad_field")),
        ("retries", json!({"max": 101}), (422, "bad_retries")),
        ("retries", json!({"max": 1, "backoff_ms": 3_600_001}), (422, "bad_retries")),
        ("retries", json!({"max": -1}), (400, "bad_field")),
        ("retries", json!(3), (400, "bad_field")),
        ("retries", json!({"max": 1, "often": true}), (400, "bad_field")),
        ("deadline", json!("2001-01-01T00:00:00Z"), (422, "bad_deadline")),
        ("deadline", json!("tomorrow"), (422, "bad_time")),
        ("not_before", json!(5), (400, "bad_field")),
        ("not_before", json!("2999-01-01"), (422, "bad_time")),
        ("select", json!({"labels": {"a\u{202e}": "b"}}), (422, "bad_select")),
        ("select", json!({"slots": {"gpu": 0}}), (422, "bad_select")),
        ("select", json!({"skills": ["shell", "shell"]}), (422, "bad_select")),
        ("select", json!({"os": "linux"}), (400, "bad_field")),
        ("select", json!("os=linux"), (400, "bad_field")),
    ] {
        let mut body = json!({"echo": {"payload": "x"}});
        body[field] = value.clone();
        let answer = hub.call("POST", "/api/v1/dispatch", Some(body)).await;
        assert_eq!(code(&answer), want, "{field} {value}: {}", answer.1);
    }
    let both = json!({"echo": {"payload": "x"}, "deadline": "2998-01-01T00:00:00Z", "not_before": "2999-01-01T00:00:00Z"});
    assert_eq!(code(&hub.call("POST", "/api/v1/dispatch", Some(both)).await), (422, "bad_deadline"));
    let both = json!({"echo": {"payload": "x"}, "node": "n", "select": {"labels": {"os": null}}});
    assert_eq!(code(&hub.call("POST", "/api/v1/dispatch", Some(both)).await), (422, "bad_select"));
    assert_eq!(hub.get("/api/v1/tasks").await["items"], json!([]), "nothing was made of any of them");
}

/// One call under a key; its status, its `Location` and its JSON.
async fn keyed(hub: &Hub, path: &str, key: &str, body: &str) -> (u16, Option<String>, Value) {
    let r = hub.request("POST", path).header("content-type", "application/json").header("idempotency-key", key);
    let answer = r.body(body.to_owned()).send().await.unwrap();
    let location = answer.headers().get("location").map(|v| v.to_str().unwrap().to_owned());
    (answer.status().as_u16(), location, answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_makes_one_thing() {
    let mut hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    const DISPATCH: &str = "/api/v1/dispatch";
    let body = r#"{"shell": {"argv": ["echo", "hi"]}, "wait_secs": 30, "deadline": "2999-01-01T00:00:00Z"}"#;
    let first = keyed(&hub, DISPATCH, "k1", body).await;
    assert_eq!((first.0, &first.2["state"]), (200, &json!("succeeded")), "{}", first.2);
    assert_eq!(first.1, Some(format!("/api/v1/tasks/{}", text(&first.2, "id"))));
    // The same meaning in other bytes, and after a crash.
    let other = r#"{"deadline":"2999-01-01T00:00:00Z","wait_secs":30,"shell":{"argv":["echo","hi"]}}"#;
    assert_eq!(keyed(&hub, DISPATCH, "k1", other).await, first);
    hub.crash_and_restart().await;
    assert_eq!(keyed(&hub, DISPATCH, "k1", body).await, first);
    // Another body, path, caller or key.
    let answer = keyed(&hub, DISPATCH, "k1", r#"{"shell": {"argv": ["echo", "ho"]}, "wait_secs": 30}"#).await;
    assert_eq!(code(&(answer.0, answer.2)), (422, "idempotency_mismatch"));
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["*"]}))).await;
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let by_key = web.post(format!("{}{DISPATCH}", hub.http)).bearer_auth(text(&key, "secret")).header("idempotency-key", "k1");
    let by_key: Value = by_key.header("content-type", "application/json").body(body).send().await.unwrap().json().await.unwrap();
    let (_, _, k2) = keyed(&hub, DISPATCH, "k2", body).await;
    let s = keyed(&hub, "/api/v1/sessions", "k1", r#"{"name": "s"}"#).await;
    assert_eq!(s.0, 201, "{}", s.2);
    assert_eq!(keyed(&hub, "/api/v1/sessions", "k1", r#"{"name": "s"}"#).await, s, "a session too");
    let ids = [&first.2, &by_key, &k2].map(|t| text(t, "id"));
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{ids:?}");
    // In a session; what was made stays what the key means when the session has ended.
    hub.call("PUT", &format!("/api/v1/sessions/{}/nodes/n", text(&s.2, "id")), None).await;
    let path = format!("/api/v1/sessions/{}/dispatch", text(&s.2, "id"));
    let t = keyed(&hub, &path, "k1", body).await;
    assert_eq!(t.0, 200, "{}", t.2);
    hub.call("DELETE", &format!("/api/v1/sessions/{}", text(&s.2, "id")), None).await;
    assert_eq!(keyed(&hub, &path, "k1", body).await, t);
    // What fails is not remembered.
    let answer = keyed(&hub, DISPATCH, "k3", r#"{"shell": {"argv": []}}"#).await;
    assert_eq!(code(&(answer.0, answer.2)), (422, "bad_spec"));
    assert_eq!(keyed(&hub, DISPATCH, "k3", body).await.0, 200);
    assert_eq!(hub.get("/api/v1/tasks").await["items"].as_array().unwrap().len(), 5);

    // A secret is told once, and the repeated request says so.
    for (path, body, list) in [
        ("/api/v1/nodes/invites", r#"{"name": "m"}"#, "/api/v1/nodes/invites"),
        ("/api/v1/api-keys", r#"{"name": "k", "scopes": ["nodes:read"]}"#, "/api/v1/api-keys"),
    ] {
        let before = hub.get(list).await["items"].as_array().unwrap().len();
        let made = keyed(&hub, path, "once", body).await;
        assert_eq!(made.0, 201, "{}", made.2);
        let again = keyed(&hub, path, "once", body).await;
        assert!(text(&again.2, "detail").contains(&text(&made.2, "id")), "{}", again.2);
        assert_eq!(code(&(again.0, again.2)), (409, "already_created"));
        assert_eq!(hub.get(list).await["items"].as_array().unwrap().len(), before + 1);
    }
    for bad in ["", " ", "a b", "\u{e4}", &"x".repeat(256)] {
        let answer = keyed(&hub, DISPATCH, bad, body).await;
        assert_eq!(code(&(answer.0, answer.2)), (400, "bad_idempotency_key"), "{bad:?}");
    }
    let twice = hub.request("POST", DISPATCH).header("idempotency-key", "a").header("idempotency-key", "b");
    let twice = twice.header("content-type", "application/json").body(body).send().await.unwrap();
    assert_eq!(twice.status().as_u16(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_once_and_callers_who_hang_up_make_one_task() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let gate = node.dir.path().join("gate");
    let script = format!("while [ ! -e {} ]; do sleep 0.05; done; echo done", gate.display());
    let body = json!({"shell": sh(&script), "wait_secs": 40}).to_string();
    let only = async || {
        let list = hub.get("/api/v1/tasks").await;
        let items = list["items"].as_array().unwrap().clone();
        assert!(items.len() < 2, "{list}");
        items.first().filter(|t| t["state"] == "running").map(|t| text(t, "id"))
    };
    // The first hangs up as soon as there is a task.
    let first = keyed(&hub, "/api/v1/dispatch", "k", &body);
    let id = tokio::select! {
        answer = first => panic!("{answer:?}"),
        id = until("the task to run", only) => id,
    };
    // Eight more come while it runs, and all wait for its answer.
    let waiting = futures::future::join_all((0..8).map(|_| keyed(&hub, "/api/v1/dispatch", "k", &body)));
    let open = async {
        // So that most of them wait; what comes later gets the same answer.
        tokio::time::sleep(Duration::from_millis(300)).await;
        std::fs::write(&gate, "").unwrap();
    };
    let (answers, ()) = futures::future::join(waiting, open).await;
    for (status, location, t) in answers {
        assert_eq!((status, text(&t, "id"), t["stdout"].as_str()), (200, id.clone(), Some("done\n")), "{t}");
        assert_eq!(location, Some(format!("/api/v1/tasks/{id}")));
    }
    // And all at once, with nobody first.
    let body = r#"{"echo": {"payload": "x"}, "wait_secs": 20}"#;
    let answers = futures::future::join_all((0..12).map(|_| keyed(&hub, "/api/v1/dispatch", "k2", body))).await;
    assert!(answers.iter().all(|a| *a == answers[0] && a.0 == 200), "{answers:?}");
    assert_eq!(hub.get("/api/v1/tasks").await["items"].as_array().unwrap().len(), 2);
}

/// A machine dies in the middle of its work, and comes back as it was.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_ends_as_its_caller_asked() {
    let hub = Hub::start().await;
    let mut old = machine(&hub, "old", 8, json!({})).await;
    let count = shared(&old, "count");
    let gate = old.dir.path().join("gate");
    let script = format!("echo x >> {}; while [ ! -e {} ]; do sleep 0.1; done; echo done", count.display(), gate.display());
    let ask = async |terms: Value| {
        let mut body = json!({"shell": sh(&script)});
        body.as_object_mut().unwrap().extend(terms.as_object().unwrap().clone());
        text(&hub.dispatch(body).await, "id")
    };
    let fails = ask(json!({"on_lost": "fail", "lost_after_secs": 1})).await;
    let again = ask(json!({"on_lost": "requeue", "lost_after_secs": 1, "retries": {"max": 0, "backoff_ms": 1}})).await;
    let waits = ask(json!({})).await;
    let t = hub.task(&again).await;
    assert_eq!((t["on_lost"].as_str(), t["lost_after_secs"].as_u64()), (Some("requeue"), Some(1)));
    assert_eq!(hub.task(&waits).await["on_lost"], Value::Null);
    let runs = || std::fs::read_to_string(&count).unwrap().lines().count();
    until("all three to run", async || (runs() == 3).then_some(())).await;
    for id in [&fails, &again, &waits] {
        hub.task_when(id, "to be known to run", |t| t["state"] == "running").await;
    }

    // The daemon is gone; its warden and the tasks go on, and nobody can know.
    old.daemon().kill9();
    let t = hub.finished(&fails).await;
    assert_eq!(
        (t["state"].as_str(), t["reason"]["code"].as_str(), t["reason"]["detail"].as_str()),
        (Some("failed"), Some("lost"), Some("maybe_ran"))
    );
    let _other = machine(&hub, "other", 1, json!({})).await;
    hub.task_when(&again, "to run elsewhere", |t| t["state"] == "running" && t["attempt"] == 2).await;
    until("the second run", async || (runs() == 4).then_some(())).await;
    let t = hub.task(&waits).await;
    assert_eq!((t["state"].as_str(), t["waiting"]["code"].as_str()), (Some("running"), Some("in_doubt")));

    // The first machine is back with all three: it ends what is no longer wanted of it.
    old.run();
    old.online(&hub).await;
    until("the old runs to end", async || (alive(&count.display().to_string()).len() == 2).then_some(())).await;
    assert_eq!(hub.task(&again).await["state"], "running");
    std::fs::write(&gate, "").unwrap();
    for (id, attempt) in [(&again, 2), (&waits, 1)] {
        let t = hub.finished(id).await;
        assert_eq!(
            (t["state"].as_str(), t["stdout"].as_str(), t["attempt"].as_u64()),
            (Some("succeeded"), Some("done\n"), Some(attempt)),
            "{t}"
        );
    }
    assert_eq!(hub.task(&fails).await["state"], "failed", "a late word changes nothing");
    assert_eq!(runs(), 4, "only what was asked to be run again ran twice");
}

/// The warden dies with its tasks, and its successor says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_warden_loses_its_tasks_and_says_so() {
    let hub = Hub::start().await;
    let node = machine(&hub, "n", 4, json!({})).await;
    let count = shared(&node, "count");
    let script = format!("echo x >> {f}; [ $(wc -l < {f}) -ge 3 ] || sleep 600", f = count.display());
    let once = text(&hub.dispatch(json!({"shell": sh(&script)})).await, "id");
    hub.task_when(&once, "to run", |t| t["state"] == "running").await;
    let again = text(&hub.dispatch(json!({"shell": sh(&script), "on_lost": "requeue"})).await, "id");
    until("both to run", async || (std::fs::read_to_string(&count).unwrap().lines().count() == 2).then_some(())).await;
    // The warden alone: what ends with it looks like it, and must not end before.
    mesh_tests::signal(node.warden().expect("it runs"), rustix::process::Signal::KILL);
    let t = hub.finished(&once).await;
    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("failed"), Some("lost")), "{t}");
    let t = hub.finished(&again).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(2)), "{t}");
    assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 3);
}
