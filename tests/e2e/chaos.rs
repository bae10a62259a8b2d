//! Everything is killed at random while a thousand tasks pass: hub, daemons, wardens, and the hub's
//! connections to its database. What was accepted ends once, runs at most once, and loses no output.
//!
//! The seed is printed, and `CORTEX_CHAOS_SEED` gives it again; the moments stay those of the machine.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use hub_testkit::postgres::Server;
use mesh_tests::{Hub, Node, alive, text, until};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const TASKS: usize = 1_000;
const KILLS: usize = 100;
const HITS: usize = 300;
const NODES: usize = 3;
const SLOTS: usize = 8;
/// Callers that each have one task under way: more than there are slots, so that some always wait.
const CALLERS: usize = 36;
/// A healthy run needs a fraction; past this something does not come back.
const WHOLE_RUN: Duration = Duration::from_secs(900);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What one task does, by its number: it notes its run in a file of its own, says its lines over 0.05 to
/// 5 s, notes its end.
struct Plan {
    file: PathBuf,
    lines: usize,
    width: usize,
    pause_ms: u64,
    code: i64,
}

impl Plan {
    fn of(seed: u64, runs: &Path, i: usize) -> Self {
        let mut r = Random(seed ^ (i as u64).wrapping_mul(0x1234_5678_9abc_def1));
        let lines = 1 + r.below(10) as usize;
        // Short ones are many: 0.05 s times 100 to a power between 0 and 1.
        let total_ms = 50.0 * 100f64.powf(r.below(1_000) as f64 / 1_000.0);
        Self {
            file: runs.join(format!("{i}.")),
            lines,
            // Some outgrow what the hub keeps in a row.
            width: if r.below(5) == 0 { 3_000 } else { 20 },
            pause_ms: (total_ms / lines as f64) as u64,
            code: if r.below(10) == 0 { 7 } else { 0 },
        }
    }
    fn prepare(&self) {
        std::fs::write(&self.file, "").unwrap();
        // A second run would be of another user: it must be able to tell on itself.
        std::fs::set_permissions(&self.file, PermissionsExt::from_mode(0o666)).unwrap();
    }
    fn body(&self) -> Value {
        let script = format!(
            "echo run >> {file}; i=0; while [ $i -lt {lines} ]; do i=$((i+1)); printf '%0{width}d\\n' $i; sleep {pause}; done; \
             echo end >> {file}; exit {code}",
            file = self.file.display(),
            lines = self.lines,
            width = self.width,
            pause = self.pause_ms as f64 / 1_000.0,
            code = self.code,
        );
        json!({"shell": {"argv": ["sh", "-c", script]}, "wait_secs": 10})
    }
    fn output(&self) -> String {
        (1..=self.lines).map(|i| format!("{i:0width$}\n", width = self.width)).collect()
    }
}

/// What the callers share.
struct Callers {
    web: reqwest::Client,
    http: String,
    key: String,
    seed: u64,
    runs: PathBuf,
    next: AtomicUsize,
    ended: AtomicUsize,
    enough: AtomicBool,
}

impl Callers {
    /// Asks under one key until the task is there and has ended. Whatever answers are lost, it is one task.
    async fn one(&self, i: usize) -> (usize, String) {
        let plan = Plan::of(self.seed, &self.runs, i);
        plan.prepare();
        let mut known: Option<String> = None;
        loop {
            let call = self.web.post(format!("{}/api/v1/dispatch", self.http)).bearer_auth(&self.key);
            let call = call.header("Idempotency-Key", format!("chaos-{i}")).json(&plan.body());
            let answer = match call.send().await {
                Ok(answer) => (answer.status().as_u16(), answer.json::<Value>().await.ok()),
                Err(_) => (0, None),
            };
            match answer {
                (200 | 202, Some(t)) => {
                    let id = text(&t, "id");
                    assert!(known.as_ref().is_none_or(|k| *k == id), "task {i} was {known:?} and is {id}");
                    if t["finished_at"].is_string() {
                        self.ended.fetch_add(1, Ordering::AcqRel);
                        return (i, id);
                    }
                    known = Some(id);
                }
                // The hub or its database is away, or its answer was cut off.
                (0 | 200 | 202 | 503, _) => tokio::time::sleep(Duration::from_millis(100)).await,
                (status, problem) => panic!("task {i}: {status} {problem:?}"),
            }
        }
    }
    async fn all(self: Arc<Self>) -> Vec<(usize, String)> {
        let mut done = vec![];
        loop {
            let i = self.next.fetch_add(1, Ordering::AcqRel);
            if i >= TASKS && self.enough.load(Ordering::Acquire) {
                return done;
            }
            done.push(self.one(i).await);
        }
    }
}

struct Kill {
    at: SystemTime,
    /// When it had happened.
    done: SystemTime,
    what: &'static str,
    /// Whose tasks it hits; none: everybody's.
    node: Option<String>,
}

/// A port that no outgoing connection is given while the hub is away: below those that the kernel picks.
fn port(random: &mut Random) -> String {
    loop {
        let address = format!("127.0.0.1:{}", 12_000 + random.below(18_000));
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}

/// A node with as many slots as a machine of some cores has.
async fn join(hub: &Hub, name: &str) -> Node {
    let (_, yaml) = hub.invite(json!({"name": name})).await;
    let mut node = Node::prepare(name, &yaml);
    let mut join = node.command(&["join", "invite.yaml", "--enroll-only"]);
    let out = join.env("CORTEX_NODE_MAX_TASKS", SLOTS.to_string()).output().unwrap();
    assert!(out.status.success(), "{}", mesh_tests::shown(&out));
    node.run();
    node.online(hub).await;
    node
}

/// Open descriptors; the hub keeps a bounded number of its output files open, which do not count.
fn descriptors(pid: u32, but_of: Option<&Path>) -> usize {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let counts = |file: PathBuf| but_of.is_none_or(|folder| !file.starts_with(folder));
    all.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(counts)).count()
}

async fn tasks(hub: &Hub, state: &str) -> Vec<Value> {
    hub.get(&format!("/api/v1/tasks?state={state}&limit=500")).await["items"].as_array().unwrap().clone()
}

/// Kills until there were enough of each; gives what was killed.
async fn kill(hub: &mut Hub, nodes: &mut [Node], server: &Arc<Server>, random: &mut Random, callers: &Callers) -> Vec<Kill> {
    let begin = Instant::now();
    let mut kills: Vec<Kill> = vec![];
    let mut hit: BTreeSet<String> = BTreeSet::new();
    while kills.len() < KILLS || hit.len() < HITS {
        assert!(begin.elapsed() < WHOLE_RUN, "{} kills, {} hits, {} tasks", kills.len(), hit.len(), callers.ended.load(Ordering::Acquire));
        tokio::time::sleep(Duration::from_millis(random.below(900))).await;
        // Spread over all the tasks, and never so thick that nothing comes through.
        let due = kills.len() * TASKS / KILLS;
        let patience = Instant::now() + Duration::from_millis(1_500);
        while callers.ended.load(Ordering::Acquire) < due && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let n = random.below(nodes.len() as u64) as usize;
        let what = ["hub", "hub", "database", "database", "daemon", "daemon", "daemon", "warden"][random.below(8) as usize];
        let node = ["daemon", "warden"].contains(&what).then(|| nodes[n].id.clone());
        // Best while there is something to lose; after a while whatever there is.
        let patience = Instant::now() + Duration::from_secs(5);
        let mut at_stake = vec![];
        while at_stake.is_empty() && Instant::now() < patience {
            tokio::time::sleep(Duration::from_millis(50)).await;
            for state in ["assigned", "running"] {
                at_stake.extend(tasks(hub, state).await.into_iter().filter(|t| node.as_ref().is_none_or(|n| t["node_id"] == n.as_str())));
            }
        }
        hit.extend(at_stake.iter().map(|t| text(t, "id")));
        let at = SystemTime::now();
        match what {
            "hub" => hub.crash_and_restart().await,
            "database" => {
                let server = server.clone();
                tokio::task::spawn_blocking(move || server.cut()).await.unwrap();
            }
            "daemon" => {
                nodes[n].daemon().kill9();
                // Mostly at once, as a service manager would.
                tokio::time::sleep(Duration::from_millis([0, 0, 0, 700][random.below(4) as usize])).await;
                nodes[n].run();
            }
            _ => {
                if let Some(pid) = nodes[n].warden() {
                    mesh_tests::signal(pid, rustix::process::Signal::KILL);
                }
            }
        }
        kills.push(Kill { at, done: SystemTime::now(), what, node });
    }
    kills
}

fn rfc3339(at: &Value) -> SystemTime {
    let t = time::OffsetDateTime::parse(at.as_str().unwrap(), &time::format_description::well_known::Rfc3339).unwrap();
    UNIX_EPOCH + Duration::from_nanos(t.unix_timestamp_nanos() as u64)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_tasks_through_a_hundred_kills() {
    let begin = Instant::now();
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = std::env::var("CORTEX_CHAOS_SEED").ok().map_or(nanos, |s| s.parse().expect("CORTEX_CHAOS_SEED is a number"));
    println!("CORTEX_CHAOS_SEED={seed}");
    let mut random = Random(seed);
    let server = Arc::new(tokio::task::spawn_blocking(Server::start).await.unwrap());
    let (http, node, url) = (port(&mut random), port(&mut random), server.database());
    let env = [("CORTEX_DATABASE_URL", &*url), ("CORTEX_HTTP_ADDR", &http), ("CORTEX_NODE_ADDR", &node)];
    let mut hub = Hub::start_with(&env, &[]).await;
    let mut nodes = vec![];
    for i in 0..NODES {
        nodes.push(join(&hub, &format!("n{i}")).await);
    }
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "chaos", "scopes": ["tasks:dispatch"]}))).await;
    let dir = mesh_tests::folder();
    let runs = dir.path().join("runs");
    std::fs::create_dir(&runs).unwrap();
    std::fs::set_permissions(&runs, PermissionsExt::from_mode(0o777)).unwrap();
    let callers = Arc::new(Callers {
        web: reqwest::Client::builder().no_proxy().build().unwrap(),
        http: hub.http.clone(),
        key: text(&key, "secret"),
        seed,
        runs: runs.clone(),
        next: AtomicUsize::new(0),
        ended: AtomicUsize::new(0),
        enough: AtomicBool::new(false),
    });
    let before: Vec<_> =
        nodes.iter().map(|n| descriptors(n.process.as_ref().unwrap().id(), None) + descriptors(n.warden().unwrap(), None)).collect();
    let before_hub = descriptors(hub.process.id(), Some(&hub.data()));

    let work: Vec<_> = (0..CALLERS).map(|_| tokio::spawn(callers.clone().all())).collect();
    let kills = kill(&mut hub, &mut nodes, &server, &mut random, &callers).await;
    callers.enough.store(true, Ordering::Release);
    let mut ids = BTreeMap::new();
    for done in work {
        let left = WHOLE_RUN.saturating_sub(begin.elapsed());
        let done = tokio::time::timeout(left, done).await.expect("every task ends once nothing is killed any more");
        ids.extend(done.expect("no caller fails"));
    }
    let killing = begin.elapsed();
    assert_eq!(ids.values().collect::<BTreeSet<_>>().len(), ids.len(), "a key made two tasks");
    check(&hub, &kills, &ids, seed, &runs).await;

    // Nothing is left behind.
    let mark = runs.display().to_string();
    until("no process of a task to be left", async || alive(&mark).is_empty().then_some(())).await;
    for (node, before) in nodes.iter_mut().zip(before) {
        node.online(&hub).await;
        let out = node.data().join("spool/out");
        until("the spool to be empty", async || (std::fs::read_dir(&out).unwrap().count() == 0).then_some(())).await;
        let own = async || Some(descriptors(node.process.as_ref()?.id(), None) + descriptors(node.warden()?, None));
        until("no descriptor to be leaked by a node", async || (own().await? <= before + 8).then_some(())).await;
        let path = format!("/api/v1/nodes/{}", node.id);
        until("no slot to be taken", async || (hub.get(&path).await["running"] == 0).then_some(())).await;
    }
    // Connections of the database's pool come and go; those of the callers end with them.
    drop(callers);
    until("no descriptor to be leaked by the hub", async || {
        (descriptors(hub.process.id(), Some(&hub.data())) <= before_hub + 40).then_some(())
    })
    .await;
    // Every slot takes a task.
    let mut held = vec![];
    for node in &nodes {
        for _ in 0..SLOTS {
            let body = json!({"node": node.id, "shell": {"argv": ["sleep", "600"]}});
            held.push(text(&hub.dispatch(body).await, "id"));
        }
    }
    until("all slots to be at work", async || (tasks(&hub, "running").await.len() == NODES * SLOTS).then_some(())).await;
    for id in &held {
        hub.call("POST", &format!("/api/v1/tasks/{id}/cancel"), None).await;
    }
    for id in &held {
        assert_eq!(hub.finished(id).await["state"], "cancelled");
    }
    println!("{killing:?} of killing, {:?} in all", begin.elapsed());
}

/// Each task by its record, its output, and its own file.
async fn check(hub: &Hub, kills: &[Kill], ids: &BTreeMap<usize, String>, seed: u64, runs: &Path) {
    let (mut hits, mut ends) = (0, BTreeMap::<String, u32>::new());
    for (i, id) in ids {
        let plan = Plan::of(seed, runs, *i);
        // A thousand answers are not held to the API's description one by one: other tests do that.
        let bytes = async |path: String| hub.request("GET", &path).send().await.unwrap().bytes().await.unwrap();
        let history: Value = serde_json::from_slice(&bytes(format!("/api/v1/tasks/{id}/events")).await).unwrap();
        let history = history["items"].as_array().unwrap().clone();
        let t: Value = serde_json::from_slice(&bytes(format!("/api/v1/tasks/{id}")).await).unwrap();
        let is_final = |e: &&Value| ["succeeded", "failed", "cancelled"].contains(&e["state"].as_str().unwrap_or_default());
        assert_eq!(history.iter().filter(is_final).count(), 1, "one final state: {history:?}");
        let assigned = history.iter().find(|e| e["type"] == "assigned").unwrap();
        let (from, to) = (rfc3339(&assigned["at"]), rfc3339(&t["finished_at"]));
        let hit = kills.iter().any(|k| from < k.at && k.at < to && k.node.as_ref().is_none_or(|n| t["node_id"] == n.as_str()));
        hits += usize::from(hit);

        let file = std::fs::read_to_string(&plan.file).unwrap();
        let out = String::from_utf8(bytes(format!("/api/v1/tasks/{id}/output?stream=stdout")).await.to_vec()).unwrap();
        let code = t["reason"]["code"].as_str().unwrap_or("none");
        *ends.entry(code.to_owned()).or_default() += 1;
        match code {
            "none" | "exit" => {
                assert_eq!((t["state"] == "succeeded", t["exit_code"].as_i64()), (plan.code == 0, Some(plan.code)), "{t}");
                assert_eq!(file, "run\nend\n", "{i}: it ran once, to its end");
                assert!(out == plan.output(), "{i}: the output is whole, and there once: {} of {} bytes", out.len(), plan.output().len());
            }
            "lost" => {
                assert!(["", "run\n", "run\nend\n"].contains(&&*file), "{i}: {file:?}");
                assert!(plan.output().starts_with(&out), "{i}: what there is of the output is its beginning: {out:?}");
                let mine = |k: &&Kill| k.what == "warden" && from < k.done && k.node.as_ref().is_some_and(|n| t["node_id"] == n.as_str());
                assert!(kills.iter().any(|k| mine(&k)), "{i}: lost, and its warden was never killed: {t}");
            }
            _ => panic!("{i}: {t}"),
        }
    }
    let mut killed = BTreeMap::<_, u32>::new();
    kills.iter().for_each(|k| *killed.entry(k.what).or_default() += 1);
    println!("{} tasks, ended by {ends:?}; {} kills {killed:?}; {hits} tasks hit while assigned or running", ids.len(), kills.len());
    assert!(kills.len() >= KILLS && ids.len() >= TASKS && hits >= HITS);
}
