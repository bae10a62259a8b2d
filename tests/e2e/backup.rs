//! Back-up and restore with real programs: whole while the hub works, closed to others, and after the
//! restore of an older one nothing runs twice.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries")]

use mesh_tests::{Hub, Node, Process, alive, folder, program, shown, text, until};
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const PASSPHRASE: &str = "four words are enough";

/// Runs the hub's program on a data folder.
fn hub_program(data: &Path, args: &[&str]) -> Output {
    let mut c = Command::new(program("cortex-hub"));
    c.args(args).arg("--data-dir").arg(data).stdin(Stdio::null()).output().expect("cortex-hub runs")
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

/// As [`hub_program`], with a passphrase on standard input.
fn with_passphrase(data: &Path, args: &[&str], passphrase: &str) -> Output {
    let mut c = Command::new(program("cortex-hub"));
    c.args(args).args(["--passphrase-file", "-", "--data-dir"]).arg(data);
    let mut child = c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("cortex-hub runs");
    // One that refuses for another reason may have ended without reading it.
    let _ = writeln!(child.stdin.take().expect("a pipe"), "{passphrase}");
    child.wait_with_output().expect("cortex-hub ends")
}

fn ok(out: Output) -> String {
    assert!(out.status.success(), "{}", shown(&out));
    said(&out)
}
fn refused(out: Output) -> String {
    assert_eq!(out.status.code(), Some(1), "{}", shown(&out));
    said(&out)
}

/// A file that tasks may write to.
fn open_file(path: &Path) -> PathBuf {
    std::fs::write(path, "").unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o666)).unwrap();
    path.to_owned()
}

/// A machine that takes eight tasks at once, however few cores this one has.
async fn roomy(hub: &Hub, name: &str) -> Node {
    const TASKS: (&str, &str) = ("CORTEX_NODE_MAX_TASKS", "8");
    let (_, yaml) = hub.invite(json!({"name": name})).await;
    let mut node = Node::prepare(name, &yaml);
    let joined = node.command(&["join", "invite.yaml", "--enroll-only"]).env(TASKS.0, TASKS.1).output().unwrap();
    assert!(joined.status.success(), "{}", shown(&joined));
    let log = node.dir.path().join("node.log");
    node.process = Some(Process::start(node.command(&["run"]).env(TASKS.0, TASKS.1), log));
    node.online(hub).await;
    node
}

async fn status_and_code(hub: &Hub, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
    let (status, v) = hub.call(method, path, body).await;
    (status, v["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_hub_at_work_is_whole() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let to = hub.dir.path().join("backup");
    let file = to.to_str().unwrap();
    // Enough for files of their own, and some that stay in their rows.
    let script = |i: usize| format!("seq 1 {}", if i.is_multiple_of(3) { 9000 } else { 20 });
    let expected = |i: usize| (1..=if i.is_multiple_of(3) { 9000 } else { 20 }).map(|n| format!("{n}\n")).collect::<String>();
    let before = text(&hub.sh(&script(0)).await, "id");
    let data = hub.data();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (hub_ref, stop_ref) = (&hub, &stop);
    let load = async move {
        let mut ids = vec![];
        while !stop_ref.load(std::sync::atomic::Ordering::Acquire) || ids.len() <= 4 {
            let body = |i: usize| json!({"shell": {"argv": ["sh", "-c", script(i)]}, "wait_secs": 20});
            let some = ids.len()..ids.len() + 4;
            ids.extend(futures::future::join_all(some.map(|i| async move { text(&hub_ref.dispatch(body(i)).await, "id") })).await);
        }
        ids
    };
    let (plain, sealed) = (to.clone(), hub.dir.path().join("sealed"));
    let (plain_of, sealed_of, data_of) = (plain.clone(), sealed.clone(), data.clone());
    let backups = async {
        let made = tokio::task::spawn_blocking(move || {
            let first = ok(hub_program(&data_of, &["backup", plain_of.to_str().unwrap()]));
            let second = ok(with_passphrase(&data_of, &["backup", "--with-keys", sealed_of.to_str().unwrap()], PASSPHRASE));
            (first, second)
        });
        let made = made.await.unwrap();
        stop_ref.store(true, std::sync::atomic::Ordering::Release);
        made
    };
    let (ids, (first, second)) = futures::future::join(load, backups).await;
    assert!(first.contains("keys      no") && second.contains("keys      yes"), "{first}\n{second}");
    assert!(ids.len() > 4, "there was work meanwhile");

    for path in [&plain, &sealed] {
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let whole = ok(hub_program(&data, &["restore", "--check", path.to_str().unwrap()]));
        assert!(whole.contains("the seal is this hub's") && whole.contains("every byte"), "{whole}");
    }
    // No private key stands in either, as it lies in the folder.
    for name in ["root.key", "task.key", "intent.key", "token.key", "jwt.key"] {
        let key = std::fs::read(data.join("keys").join(name)).unwrap();
        let key = key.trim_ascii();
        for path in [&plain, &sealed] {
            let bytes = std::fs::read(path).unwrap();
            assert!(!bytes.windows(key.len()).any(|w| w == key), "{name} in {}", path.display());
        }
    }
    // Never over a file, and nothing half-made stays beside it.
    let kept = std::fs::read(&plain).unwrap();
    assert!(refused(hub_program(&data, &["backup", file])).contains("there already"));
    assert_eq!(std::fs::read(&plain).unwrap(), kept);
    let beside: Vec<_> = std::fs::read_dir(hub.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!beside.iter().any(|name| name.to_string_lossy().starts_with('.')), "{beside:?}");

    // What is not as it was written is found, whatever it is.
    let bad = hub.dir.path().join("bad");
    let check = |bytes: &[u8]| {
        std::fs::write(&bad, bytes).unwrap();
        refused(hub_program(&data, &["restore", "--check", bad.to_str().unwrap()]))
    };
    assert!(check(&kept[..kept.len() / 2]).contains("cut off"));
    assert!(check(&kept[..kept.len() - 512]).contains("cut off"));
    for at in [3, 2000, kept.len() / 2, kept.len() - 5000] {
        let mut flipped = kept.clone();
        flipped[at] ^= 4;
        assert!(check(&flipped).contains("damaged"), "byte {at}");
    }
    let check = |passphrase: &str| with_passphrase(&data, &["restore", "--check", sealed.to_str().unwrap()], passphrase);
    assert!(refused(check("four words are enougk")).contains("passphrase"));
    assert!(ok(check(PASSPHRASE)).contains("the passphrase opens the keys"));

    // Into another folder: not without keys, not with a wrong passphrase, not over somebody's things.
    let elsewhere = folder();
    let other = elsewhere.path().join("other");
    let other_of = other.to_str().unwrap();
    assert!(refused(hub_program(&other, &["restore", file])).contains("root.key"), "{other_of}");
    assert!(refused(with_passphrase(&other, &["restore", sealed.to_str().unwrap()], "four words are enougk")).contains("passphrase"));
    std::fs::write(other.join("thesis.txt"), "mine").unwrap();
    assert!(refused(with_passphrase(&other, &["restore", sealed.to_str().unwrap()], PASSPHRASE)).contains("not empty"));
    std::fs::remove_file(other.join("thesis.txt")).unwrap();
    assert!(refused(hub_program(&data, &["restore", file])).contains("stop it first"), "a hub runs there");
    ok(with_passphrase(&other, &["restore", sealed.to_str().unwrap()], PASSPHRASE));
    drop(hub);

    let hub = Hub::start_in(other, &[], &[]).await;
    assert_eq!(status_and_code(&hub, "GET", "/readyz", None).await, (503, "restored".into()));
    let page = hub.get("/api/v1/tasks?limit=500").await;
    let restored: Vec<&Value> = page["items"].as_array().unwrap().iter().collect();
    let mut whole = 0;
    for (i, id) in std::iter::once((0, &before)).chain(ids.iter().enumerate()) {
        if restored.iter().any(|t| t["id"] == id.as_str() && t["state"] == "succeeded") {
            assert_eq!(hub.output(id, "").await, expected(i).as_bytes(), "the output of {id}");
            whole += 1;
        }
    }
    assert!(whole >= 1 && restored.len() >= whole, "{whole} of {}", restored.len());
}

/// The drill: an older backup is restored while a machine holds work of before and after it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_runs_twice_after_the_restore_of_an_older_backup() {
    let mut hub = Hub::start().await;
    let node = roomy(&hub, "worker").await;
    let lost_node = Node::join(&hub, "stolen").await;
    let (_, other) = hub.call("PATCH", &format!("/api/v1/nodes/{}", node.id), Some(json!({"max_tasks": 2}))).await;
    assert_eq!(other["max_tasks"], 2);
    let dir = node.dir.path().to_owned();
    let runs = |name: &str| std::fs::read_to_string(dir.join(format!("{name}.runs"))).unwrap();
    // Counts its own runs, talks while it runs, ends when its gate opens.
    let dispatch = async |hub: &Hub, name: &str| {
        let (runs, ticks) = (open_file(&dir.join(format!("{name}.runs"))), open_file(&dir.join(format!("{name}.ticks"))));
        let (runs, ticks, gate) = (runs.display(), ticks.display(), dir.join(format!("{name}.gate")));
        let gate = gate.display();
        let script =
            format!("echo run >> {runs}; while [ ! -e {gate} ]; do echo {name} | tee -a {ticks}; sleep 0.1; done; echo end of {name}");
        let t = hub.dispatch(json!({"node": "worker", "shell": {"argv": ["sh", "-c", script]}})).await;
        text(&t, "id")
    };
    let open = |name: &str| std::fs::write(dir.join(format!("{name}.gate")), "").unwrap();
    let running = async |hub: &Hub, id: &str| drop(hub.task_when(id, "to run", |t| t["state"] == "running").await);
    let length = async |hub: &Hub, id: &str| hub.output(id, "?stream=stdout").await.len();

    // Before the backup: one that has ended, two that run, one that waits for a place.
    let ended = dispatch(&hub, "ended").await;
    open("ended");
    hub.finished(&ended).await;
    let (stays, ends) = (dispatch(&hub, "stays").await, dispatch(&hub, "ends").await);
    running(&hub, &stays).await;
    running(&hub, &ends).await;
    let waits = dispatch(&hub, "waits").await;
    // Told ahead or not: it has no place.
    assert_eq!(hub.task(&waits).await["waiting"]["code"], "no_slot");
    let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "leaked", "scopes": ["nodes:read"]}))).await;
    assert_eq!(status, 201, "{key}");
    until("some output", async || (length(&hub, &stays).await > 0).then_some(())).await;

    let backup = hub.dir.path().join("backup");
    ok(hub_program(&hub.data(), &["backup", backup.to_str().unwrap()]));

    // After it: the two others end, one is accepted and ends, two more run, a machine and a key go.
    let told = length(&hub, &stays).await;
    until("more output, taken by the hub", async || (length(&hub, &stays).await > told + 20).then_some(())).await;
    open("ends");
    hub.finished(&ends).await;
    running(&hub, &waits).await;
    open("waits");
    assert_eq!(hub.finished(&waits).await["state"], "succeeded");
    let after = dispatch(&hub, "after").await;
    open("after");
    hub.finished(&after).await;
    let (status, _) = hub.call("PATCH", &format!("/api/v1/nodes/{}", node.id), Some(json!({"max_tasks": 8}))).await;
    assert_eq!(status, 200);
    let (orphan, late) = (dispatch(&hub, "orphan").await, dispatch(&hub, "late").await);
    running(&hub, &orphan).await;
    running(&hub, &late).await;
    assert_eq!(hub.call("POST", &format!("/api/v1/nodes/{}/revoke", lost_node.id), None).await.0, 200);
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{}", text(&key, "id")), None).await.0, 204);

    hub.process.terminate().await;
    // Its machine ends one more, and cannot tell.
    open("late");
    until("the late one to end", async || alive(&dir.join("late.gate").display().to_string()).is_empty().then_some(())).await;
    let restored = ok(hub_program(&hub.data(), &["restore", backup.to_str().unwrap()]));
    for undone in [&lost_node.id, "leaked", &after, &orphan, &ends, &waits] {
        let bare = undone.rsplit_once('_').map_or(undone, |(_, uuid)| uuid);
        assert!(restored.contains(bare), "{undone} in {restored}");
    }
    assert!(!restored.contains(ended.rsplit_once('_').unwrap().1), "{restored}");

    hub.restart().await;
    assert_eq!(status_and_code(&hub, "GET", "/readyz", None).await, (503, "restored".into()));
    let found = until("the machine to be here, and to tell what it holds", async || {
        let v = hub.get("/api/v1/system/restored").await;
        v["nodes"].as_array()?.iter().find(|n| n["id"] == node.id.as_str()).cloned()
    })
    .await;
    let told = |id: &str| found["attempts"].as_array().unwrap().iter().find(|a| a["task_id"] == id).map(|a| a["known"] == true);
    assert_eq!((told(&stays), told(&orphan), told(&late)), (Some(true), Some(false), Some(false)), "{found}");
    assert_eq!((told(&ends), told(&after)), (None, None), "{found}");

    // Links without work: what runs goes on, and nothing is taken on, ended or acknowledged.
    let body = json!({"node": "worker", "shell": {"argv": ["true"]}});
    assert_eq!(status_and_code(&hub, "POST", "/api/v1/dispatch", Some(body.clone())).await, (503, "restored".into()));
    assert_eq!(status_and_code(&hub, "POST", &format!("/api/v1/tasks/{stays}/cancel"), None).await, (503, "restored".into()));
    let t = hub.task(&waits).await;
    assert!(["pending", "assigned"].contains(&t["state"].as_str().unwrap()), "reads work: {t}");
    let ticks = |name: &str| std::fs::metadata(dir.join(format!("{name}.ticks"))).unwrap().len();
    for name in ["stays", "orphan"] {
        let now = ticks(name);
        until("what runs to go on", async || (ticks(name) > now + 20).then_some(())).await;
    }
    // A restart does not release it.
    hub.crash_and_restart().await;
    assert_eq!(status_and_code(&hub, "GET", "/readyz", None).await, (503, "restored".into()));
    until("the machine to be here again", async || {
        let v = hub.get("/api/v1/system/restored").await;
        v["nodes"].as_array()?.iter().any(|n| n["id"] == node.id.as_str()).then_some(())
    })
    .await;

    let went = ok(hub_program(&hub.data(), &["restore", "--go"]));
    for listed in [&node.id, &orphan, &late, "leaked", "the hub goes on"] {
        assert!(went.contains(listed), "{listed} in {went}");
    }
    assert_eq!(status_and_code(&hub, "GET", "/readyz", None).await.0, 200);
    assert_eq!(hub.call("GET", "/api/v1/system/restored", None).await.0, 404);
    assert!(refused(hub_program(&hub.data(), &["restore", "--go"])).contains("does not hold back"));

    let lost = async |hub: &Hub, id: &str| {
        let t = hub.finished(id).await;
        assert_eq!((t["reason"]["code"].as_str(), t["reason"]["detail"].as_str()), (Some("lost"), Some("maybe_ran")), "{t}");
    };
    lost(&hub, &ends).await;
    lost(&hub, &waits).await;
    until("what only the machine knew to end", async || alive(&dir.join("orphan.gate").display().to_string()).is_empty().then_some(()))
        .await;
    for unknown in [&after, &orphan, &late] {
        assert_eq!(hub.call("GET", &format!("/api/v1/tasks/{unknown}"), None).await.0, 404);
    }
    // What both knew went on all the while; what the hub had taken after the backup is said to be missing.
    assert_eq!(hub.task(&stays).await["state"], "running");
    open("stays");
    let t = hub.finished(&stays).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64(), t["truncated"].as_bool()), (Some("succeeded"), Some(1), Some(true)), "{t}");
    // The machine has nothing left to tell, and takes new work.
    let t = hub.dispatch(body).await;
    assert_eq!(hub.finished(&text(&t, "id")).await["state"], "succeeded");
    until("a machine without attempts", async || {
        let v = hub.get(&format!("/api/v1/nodes/{}", node.id)).await;
        (v["running"] == 0).then_some(())
    })
    .await;
    hub.crash_and_restart().await;
    let t = hub.sh("true").await;
    assert_eq!(t["state"], "succeeded");
    for name in ["ended", "stays", "ends", "waits", "after", "orphan", "late"] {
        assert_eq!(runs(name), "run\n", "{name} ran once");
    }
}
