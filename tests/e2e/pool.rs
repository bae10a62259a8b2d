//! Nodes without a place are told of who waits; an idle node takes it from them. Real programs, through the
//! REST door.

use mesh_tests::{Hub, Node, Process, shown, text};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A machine that runs one task at a time.
async fn machine(hub: &Hub, name: &str) -> Node {
    let (_, yaml) = hub.invite(json!({"name": name})).await;
    let mut node = Node::prepare(name, &yaml);
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    start(hub, &mut node).await;
    node
}
async fn start(hub: &Hub, node: &mut Node) {
    let mut run = node.command(&["run"]);
    run.env("CORTEX_NODE_MAX_TASKS", "1");
    node.process = Some(Process::start(&mut run, node.dir.path().join("node.log")));
    node.online(hub).await;
}

/// A folder that tasks may write to, whoever they run as.
struct Marks {
    dir: tempfile::TempDir,
    tasks: Vec<(String, PathBuf)>,
}

impl Marks {
    fn new() -> Self {
        let dir = mesh_tests::folder();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        Self { dir, tasks: vec![] }
    }
    fn gate(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// A task that leaves a line in a file of its own, and then waits for the gate.
    async fn dispatch(&mut self, hub: &Hub, gate: Option<&Path>) -> String {
        let file = self.dir.path().join(format!("task-{}", self.tasks.len()));
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
        let wait = gate.map_or(String::new(), |g| format!("; while [ ! -e {} ]; do sleep 0.05; done", g.display()));
        let script = format!("echo ran >> {}{wait}", file.display());
        let id = text(&hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await, "id");
        self.tasks.push((id.clone(), file));
        id
    }
    async fn each_ran_once(&self, hub: &Hub) {
        for (id, file) in &self.tasks {
            let t = hub.finished(id).await;
            assert_eq!(t["state"], "succeeded", "{t}");
            assert_eq!(std::fs::read_to_string(file).unwrap(), "ran\n", "{t}");
        }
    }
}

fn open(gate: &Path) {
    std::fs::write(gate, "").unwrap();
}
/// A node was told of it and may not start it yet.
fn is_ahead(t: &Value) -> bool {
    t["state"] == "assigned" && t["waiting"]["code"] == "no_slot"
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_node_takes_what_a_busy_one_was_told_and_all_runs_once() {
    let hub = Hub::start().await;
    let mut marks = Marks::new();
    let _busy = machine(&hub, "busy").await;
    let gate = marks.gate("gate");
    let long = marks.dispatch(&hub, Some(&gate)).await;
    hub.task_when(&long, "to run", |t| t["state"] == "running").await;
    let mut queued = vec![];
    for _ in 0..5 {
        queued.push(marks.dispatch(&hub, None).await);
    }
    let told = hub.task_when(&queued[0], "to be told ahead", is_ahead).await;
    let busy = text(&hub.get(&format!("/api/v1/tasks/{long}")).await, "node_id");
    assert_eq!(told["node_id"], busy, "{told}");
    let status = hub.get(&format!("/api/v1/nodes/{busy}/status")).await;
    assert_eq!(status["running"], 1, "what is only told takes no place: {status}");
    // An idle node comes: all of it runs there, while the first is busy still.
    let _idle = machine(&hub, "idle").await;
    for id in &queued {
        let t = hub.finished(id).await;
        assert_eq!(t["state"], "succeeded", "{t}");
        assert_ne!(t["node_id"], busy, "{t}");
    }
    assert_eq!(hub.get(&format!("/api/v1/tasks/{long}")).await["state"], "running");
    let history = hub.get(&format!("/api/v1/tasks/{}/events", queued[0])).await;
    let kinds: Vec<String> = history["items"].as_array().unwrap().iter().map(|e| text(e, "type")).collect();
    assert_eq!(kinds.iter().filter(|k| *k == "assigned").count(), 2, "moved by one step: {kinds:?}");
    open(&gate);
    // And with both free, many short ones.
    for _ in 0..20 {
        marks.dispatch(&hub, None).await;
    }
    marks.each_ran_once(&hub).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_ahead_survives_the_end_of_either_side() {
    let mut hub = Hub::start().await;
    let mut marks = Marks::new();
    let mut node = machine(&hub, "n").await;
    let gates = [marks.gate("first"), marks.gate("second")];
    let long = marks.dispatch(&hub, Some(&gates[0])).await;
    hub.task_when(&long, "to run", |t| t["state"] == "running").await;
    let next = marks.dispatch(&hub, Some(&gates[1])).await;
    let last = marks.dispatch(&hub, None).await;
    hub.task_when(&next, "to be told ahead", is_ahead).await;
    // The hub dies with an attempt on disk that was not granted, and tells of it again.
    hub.crash_and_restart().await;
    hub.task_when(&next, "to be told by the next process", is_ahead).await;
    open(&gates[0]);
    hub.task_when(&next, "to run", |t| t["state"] == "running").await;
    hub.task_when(&last, "to be told ahead", is_ahead).await;
    // The daemon dies with what it was told.
    node.daemon().kill9();
    start(&hub, &mut node).await;
    hub.task_when(&last, "to be told to the next daemon", is_ahead).await;
    open(&gates[1]);
    marks.each_ran_once(&hub).await;
}
