//! The world fails around a hub: it says so, keeps what it has acknowledged, and goes on by itself.

#![expect(clippy::disallowed_methods, reason = "a file system of its own is mounted and unmounted")]

use hub_testkit::postgres::Server;
use mesh_tests::{Hub, Node, program, text, until};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

async fn echo(hub: &Hub, payload: &str) -> (u16, Value) {
    hub.call("POST", "/api/v1/dispatch", Some(json!({"echo": {"payload": payload}, "queue_secs": 0}))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_told_and_waited_for() {
    let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
    let url = server.database();
    let mut hub = Hub::start_with(&[("CORTEX_DATABASE_URL", &url)], &[]).await;
    let mut acknowledged = vec![];
    for n in 0..20 {
        let (status, t) = echo(&hub, &n.to_string()).await;
        assert_eq!(status, 202, "{t}");
        acknowledged.push(text(&t, "id"));
    }
    let server = tokio::task::spawn_blocking(move || {
        server.stop();
        server
    });
    let server = server.await.unwrap();
    let body = json!({"echo": {"payload": "lost"}});
    let answer = hub.request("POST", "/api/v1/dispatch").json(&body).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    let problem: Value = answer.json().await.unwrap();
    assert_eq!(problem["code"], "store_unavailable", "{problem}");
    let (status, problem) = hub.call("GET", "/readyz", None).await;
    assert_eq!((status, problem["code"].as_str()), (503, Some("not_ready")), "{problem}");
    assert_eq!(hub.call("GET", "/healthz", None).await.0, 200, "it lives, and should not be restarted for this");
    assert!(metric(&hub, "cortex_store_up").await < 1.0);
    // A hub that has lost its database for a while has not lost itself.
    let server = tokio::task::spawn_blocking(move || {
        server.again();
        server
    });
    let _server = server.await.unwrap();
    until("the hub to be ready again", async || (hub.call("GET", "/readyz", None).await.0 == 200).then_some(())).await;
    until("writes to go on", async || {
        let (status, t) = echo(&hub, "back").await;
        (status == 202).then(|| acknowledged.push(text(&t, "id")))
    })
    .await;
    for id in &acknowledged {
        hub.task(id).await;
    }
    let kept = hub.get("/api/v1/tasks?limit=200").await["items"].as_array().unwrap().len();
    assert_eq!(kept, acknowledged.len(), "what was refused was not taken");
    // The metrics ask it themselves, and do not wait long for its answer.
    until("the store to be seen up", async || (metric(&hub, "cortex_store_up").await == 1.0).then_some(())).await;
    assert_eq!(hub.process.terminate().await.code(), Some(0));
}

/// A server that is there and says nothing: worse than one that is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_does_not_hang_the_hub() {
    let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
    let url = server.database();
    let mut hub = Hub::start_with(&[("CORTEX_DATABASE_URL", &url)], &[]).await;
    let (status, t) = echo(&hub, "kept").await;
    assert_eq!(status, 202, "{t}");
    // From here on alone: on a slow machine a log-in may take as long.
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    hub.set("CORTEX_LIMITS_REQUEST_SECS", "3");
    hub.restart().await;
    let held = Stopped::all(&url);
    let (status, problem) = echo(&hub, "lost or not").await;
    assert_eq!(status, 503, "{problem}");
    assert!(["timed_out", "store_unavailable"].contains(&problem["code"].as_str().unwrap()), "{problem}");
    assert_eq!(hub.call("GET", "/healthz", None).await.0, 200);
    assert!(metric(&hub, "cortex_store_up").await < 1.0, "metrics are answered all the same");
    assert_eq!(hub.call("GET", "/readyz", None).await.0, 503);
    drop(held);
    until("the hub to go on", async || (echo(&hub, "back").await.0 == 202).then_some(())).await;
    let kept = format!("/api/v1/tasks/{}", text(&t, "id"));
    until("what it has kept", async || (hub.call("GET", &kept, None).await.0 == 200).then_some(())).await;
    assert_eq!(hub.process.terminate().await.code(), Some(0));
}

/// All processes of one server, stopped by their ids until this is dropped.
struct Stopped(Vec<rustix::process::Pid>);

impl Stopped {
    fn all(url: &str) -> Self {
        // postgres://postgres@%2Ftmp%2Fcortex-postgres.XXXXXX/name
        let folder = url.split('@').nth(1).unwrap().split('/').next().unwrap().replace("%2F", "/");
        let first = std::fs::read_to_string(format!("{folder}/data/postmaster.pid")).unwrap();
        let first: i32 = first.lines().next().unwrap().parse().unwrap();
        let stop = |pid: i32| {
            let pid = rustix::process::Pid::from_raw(pid)?;
            // One of the children may have ended since.
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).ok().map(|()| pid)
        };
        // The first before its children are counted, so that it makes no more of them.
        let mut all: Vec<_> = stop(first).into_iter().collect();
        let stands = || std::fs::read_to_string(format!("/proc/{first}/stat")).unwrap().rsplit_once(") ").unwrap().1.starts_with('T');
        while !stands() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let children = std::fs::read_to_string(format!("/proc/{first}/task/{first}/children")).unwrap();
        all.extend(children.split_whitespace().filter_map(|p| stop(p.parse().unwrap())));
        Self(all)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = rustix::process::kill_process(*pid, rustix::process::Signal::CONT);
        }
    }
}

async fn metric(hub: &Hub, name: &str) -> f64 {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let m = web.get(format!("http://{}/metrics", text(&facts, "metrics"))).send().await.unwrap().text().await.unwrap();
    let line = m.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')).unwrap_or_else(|| panic!("{name} is not there"));
    line.parse().unwrap()
}

/// A disk of a few megabytes, mounted while it lives.
struct Disk(PathBuf);

const DISK: u64 = 24 << 20;

impl Disk {
    fn mount(at: PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let out = Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={DISK},mode=711"), "tmpfs"]).arg(&at).output().unwrap();
        assert!(out.status.success(), "this test needs leave to mount (root, or unshare -rm): {}", mesh_tests::shown(&out));
        Self(at)
    }
    /// Takes all the room there is.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("ballast")).unwrap();
        for part in [1 << 20, 4096, 1] {
            let bytes = vec![1; part];
            while std::io::Write::write_all(&mut file, &bytes).is_ok() {}
        }
    }
    fn clear(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: the hub in it may still be ending.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_nothing_acknowledged_is_lost() {
    let dir = mesh_tests::folder();
    let disk = Disk::mount(dir.path().join("disk"));
    let mut hub = Hub::start_in(disk.0.join("hub"), &[], &[]).await;
    let mut node = Node::join(&hub, "n").await;
    let before = text(&hub.sh("echo before").await, "id");
    // It runs on while the disk is full, and goes on writing.
    let gate = node.dir.path().join("gate");
    let script = format!("i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; sleep 0.05; done; echo $i >&2", gate.display());
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await, "id");
    let lines = async || hub.output(&id, "").await.iter().filter(|b| **b == b'\n').count();
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    until("some output", async || (lines().await > 3).then_some(())).await;

    disk.fill();
    let answer = until("the hub to have no room", async || {
        let body = json!({"echo": {"payload": "x".repeat(100_000)}});
        let answer = hub.request("POST", "/api/v1/dispatch").json(&body).send().await.unwrap();
        (!answer.status().is_success()).then_some(answer)
    })
    .await;
    assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (507, "10"));
    assert_eq!(answer.json::<Value>().await.unwrap()["code"], "storage_full");
    let (status, problem) = hub.call("GET", "/readyz", None).await;
    assert!(status == 503 && problem["detail"].as_str().unwrap().contains("full"), "{problem}");
    assert_eq!(hub.task(&before).await["state"], "succeeded", "what is there can be read");
    // The task ends while nothing can be stored: its node keeps what it said.
    std::fs::write(&gate, "").unwrap();
    until("the task to have ended at its node", async || mesh_tests::alive(&gate.display().to_string()).is_empty().then_some(())).await;
    assert_eq!(hub.task(&id).await["state"], "running", "an end that is not stored is no end");

    disk.clear();
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
    let out = String::from_utf8(hub.output(&id, "?stream=stdout").await).unwrap();
    assert!(out.lines().enumerate().all(|(i, l)| l == format!("line {}", i + 1)), "whole, once, in order");
    let count: usize = String::from_utf8(hub.output(&id, "?stream=stderr").await).unwrap().trim().parse().unwrap();
    assert_eq!(out.lines().count(), count);
    until("the hub to be ready", async || (hub.call("GET", "/readyz", None).await.0 == 200).then_some(())).await;
    assert_eq!(hub.sh("echo after").await["stdout"], "after\n");
    // And it is on the disk, not only in the process.
    hub.crash_and_restart().await;
    node.online(&hub).await;
    assert_eq!(hub.output(&id, "?stream=stdout").await, out.as_bytes());
    assert_eq!(hub.task(&before).await["state"], "succeeded");
    assert_eq!(hub.process.terminate().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_has_one_hub() {
    let hub = Hub::start().await;
    let second = |folder: &Path| {
        let mut c = Command::new(program("cortex-hub"));
        c.arg("serve").arg("--data-dir").arg(folder);
        c.envs(["HTTP", "NODE", "METRICS"].map(|p| (format!("CORTEX_{p}_ADDR"), "127.0.0.1:0"))).output().unwrap()
    };
    let out = second(&hub.data());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains("in use by another hub"), "{said}");
    assert!(said.contains(&hub.data().display().to_string()), "{said}");
    // The first one has not noticed, and its files are its own.
    hub.get("/readyz").await;
    assert!(hub.data().join("hub.json").exists() && hub.data().join("hub.sock").exists());
}
