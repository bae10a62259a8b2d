//! Records of the engine into the shapes of the contract.

use super::App;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use hub_engine::records::*;
use hub_engine::retention::Limits;
use hub_engine::stats::{Sample, Stats};
use hub_engine::tasks::TaskDetail;
use mesh_core::DeviceId;
use mesh_core::placement::Waiting;
use mesh_core::spec::{Program, Spec};
use mesh_core::task::{AttemptNo, OnLost, ReasonCode, TaskState, Terms};
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::*;
use serde_json::json;

pub fn api_key(k: ApiKey) -> ApiKeyView {
    ApiKeyView {
        id: k.id.to_string(),
        name: k.name,
        secret: None,
        prefix: k.prefix,
        scopes: k.scopes.iter().map(ToString::to_string).collect(),
        expires_at: k.expires_at.map(rfc3339),
        created_at: rfc3339(k.created_at),
        last_used_at: k.last_used_at.map(rfc3339),
    }
}

pub fn user(u: UserEntry, now: i64) -> UserView {
    UserView {
        id: u.id.to_string(),
        username: u.username,
        role: u.role.as_str().into(),
        status: u.standing.as_str(now).into(),
        created_at: rfc3339(u.created_at),
        invite_expires_at: match u.standing {
            Standing::Invited { until } => Some(rfc3339(until)),
            _ => None,
        },
        removed_at: match u.standing {
            Standing::Removed { at } => Some(rfc3339(at)),
            _ => None,
        },
        invite_url: None,
    }
}

/// `own` is the one that asks.
pub fn device(d: Device, own: Option<DeviceId>) -> DeviceView {
    DeviceView {
        id: d.id.to_string(),
        name: d.name,
        trusted: d.trusted == Some(true),
        new: d.trusted.is_none(),
        current: own == Some(d.id),
        first_seen_at: rfc3339(d.id.made_at()),
        last_seen_at: rfc3339(d.last_seen_at.max(d.id.made_at())),
        address: d.address.map(|a| a.to_string()),
        first_address: d.first_address.map(|a| a.to_string()),
        user_agent: d.user_agent,
    }
}

pub fn invite(i: Invite, now: i64) -> InviteView {
    let status = match (&i.used, i.revoked_at) {
        (Some(_), _) => "used",
        (None, Some(_)) => "revoked",
        (None, None) if i.expires_at <= now => "expired",
        (None, None) => "open",
    };
    InviteView {
        id: i.id.to_string(),
        name: i.name,
        labels: i.labels,
        owner_id: i.owner.to_string(),
        created_at: rfc3339(i.created_at),
        expires_at: rfc3339(i.expires_at),
        status: status.into(),
        node_id: i.used.map(|u| u.node.to_string()),
        notices: i.notices,
    }
}

pub fn schedulable(reason: Option<&'static str>) -> Schedulable {
    Schedulable { ok: reason.is_none(), reason: reason.map(str::to_owned) }
}

pub fn node(app: &App, n: Node) -> NodeView {
    let standing = app.nodes.standing(&n);
    let offers = n.offers();
    let c = n.capabilities;
    NodeView {
        id: n.id.to_string(),
        name: n.name,
        owner_id: n.owner.to_string(),
        labels: offers.labels,
        slots: offers.slots,
        settings: NodeSettings { labels: n.labels, slots: n.slots, max_tasks: n.task_limit },
        capabilities: CapabilitiesView {
            os: c.os,
            arch: c.arch,
            kernel: c.kernel,
            hostname: c.hostname,
            cpu_model: c.cpu_model,
            cpu_cores: c.cpu_cores,
            memory_bytes: c.memory_bytes,
            disk_bytes: c.disk_bytes,
            runtimes: c.runtimes,
            gpus: c.gpus.into_iter().map(|g| GpuView { name: g.name, memory_bytes: g.memory_bytes }).collect(),
            skills: c.skills,
            sandbox: c.sandbox.into_iter().map(|(k, (works, detail))| (k, SandboxFeatureView { works, detail })).collect(),
        },
        status: standing.status.into(),
        schedulable: schedulable(standing.unschedulable),
        last_seen_at: n.last_seen_at.map(rfc3339),
        running: standing.running,
        max_tasks: standing.max_tasks,
        version: n.version,
        created_at: rfc3339(n.created_at),
        certificate_not_after: Some(rfc3339(n.certificate.not_after)),
        draining: n.draining,
        revoked_at: n.revoked_at.map(rfc3339),
        notices: n.notices,
    }
}

pub fn session(s: Session) -> SessionView {
    let status = match (s.closed_at, s.expired_at) {
        (Some(_), _) => "closed",
        (None, Some(_)) => "expired",
        (None, None) => "active",
    };
    SessionView {
        id: s.id.to_string(),
        user_id: s.owner.to_string(),
        name: s.name,
        status: status.into(),
        attached_node_ids: s.nodes.iter().map(ToString::to_string).collect(),
        created_at: rfc3339(s.created_at),
        expires_at: rfc3339(s.expires_at),
        device_id: s.device.map(|d| d.to_string()),
        purged_at: s.purged_at.map(rfc3339),
    }
}

/// A value that was JSON when it was kept.
fn value(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap_or_default()
}

pub fn memory_entry(e: MemoryEntry) -> MemoryEntryView {
    MemoryEntryView { session_id: e.session.to_string(), key: e.key, value: value(&e.value), updated_at: rfc3339(e.updated_at) }
}

pub fn memory_key(k: MemoryKey) -> MemoryKeyView {
    MemoryKeyView { key: k.key, bytes: k.bytes, updated_at: rfc3339(k.updated_at) }
}

pub fn message(m: Message) -> MessageView {
    MessageView {
        id: m.id.to_string(),
        session_id: m.session.to_string(),
        role: m.role.as_str().into(),
        content: m.content,
        created_at: rfc3339(m.created_at),
    }
}

pub fn state_entry(e: StateEntry) -> StateEntryView {
    StateEntryView { agent_id: e.agent, key: e.key, value: value(&e.value), updated_at: rfc3339(e.updated_at) }
}

pub fn activity(a: Activity) -> ActivityView {
    let mut view = ActivityView {
        at: rfc3339(a.at),
        kind: String::new(),
        user_id: a.actor.map(|u| u.to_string()),
        name: None,
        node_id: None,
        message_id: None,
        key: None,
        task_id: None,
        skill: None,
        state: None,
        reason: None,
    };
    match a.what {
        Happened::Session { act, subject } => {
            view.kind = act.as_str().into();
            match act {
                SessionAct::Created | SessionAct::Renamed => view.name = Some(subject),
                SessionAct::Attached | SessionAct::Detached => view.node_id = Some(subject),
                SessionAct::Message => view.message_id = Some(subject),
                SessionAct::MemorySet | SessionAct::MemoryRemoved => view.key = Some(subject),
                SessionAct::Closed | SessionAct::Expired | SessionAct::Purged => {}
            }
        }
        Happened::TaskAccepted { task, skill } => {
            view.kind = "task_accepted".into();
            (view.task_id, view.skill) = (Some(task.to_string()), Some(skill));
        }
        Happened::TaskEnded { task, skill, state, reason } => {
            view.kind = "task_ended".into();
            (view.task_id, view.skill) = (Some(task.to_string()), Some(skill));
            (view.state, view.reason) = (Some(state.as_str().into()), reason.map(|r| r.as_str().into()));
        }
    }
    view
}

pub fn stats(s: Stats, limits: &Limits) -> StatsView {
    let used = &s.now.storage;
    let bound = |n: u64| (n > 0).then_some(n);
    let storage = StorageStats {
        database_bytes: used.database_bytes,
        output_bytes: used.output_bytes,
        limit_bytes: limits.total_bytes(),
        journal_bytes: used.journal_bytes,
        journal_limit_bytes: bound(limits.journal_bytes),
        output_limit_bytes: bound(limits.output_bytes),
        disk_bytes: bound(used.disk_bytes),
        disk_free_bytes: bound(used.disk_bytes).map(|_| used.disk_free_bytes),
        warnings: limits.warnings(used).into_iter().map(str::to_owned).collect(),
    };
    StatsView {
        tasks: TaskStats {
            by_state: TaskState::ALL.iter().map(|t| (t.as_str().to_owned(), s.tasks.get(t).copied().unwrap_or(0))).collect(),
        },
        pool: PoolStats { waiting: s.now.waiting, oldest_secs: s.now.oldest_secs, per_second: s.now.per_second },
        nodes: NodeStats {
            by_status: ["online", "draining", "offline", "revoked"]
                .iter()
                .map(|n| ((*n).to_owned(), s.nodes.get(n).copied().unwrap_or(0)))
                .collect(),
        },
        storage,
        history: s.history.into_iter().map(sample).collect(),
    }
}

fn sample(s: Sample) -> StatsSample {
    StatsSample {
        at: rfc3339(s.at),
        waiting: s.waiting,
        oldest_secs: s.oldest_secs,
        per_second: s.per_second,
        running: s.running,
        nodes_online: s.nodes_online,
        database_bytes: s.storage.database_bytes,
        output_bytes: s.storage.output_bytes,
    }
}

/// The spec as a caller would write it.
fn spec(bytes: &[u8]) -> serde_json::Value {
    match Spec::decode(bytes) {
        Err(e) => json!({ "unreadable": e.to_string() }),
        Ok(Spec::Echo { payload }) => json!({ "echo": { "payload": String::from_utf8_lossy(&payload) } }),
        Ok(Spec::Shell(s)) => {
            let mut shell = match s.program {
                Program::Argv(argv) => json!({ "argv": argv }),
                Program::Script(text) => json!({ "command": text }),
            };
            if !s.cwd.is_empty() {
                shell["cwd"] = json!(s.cwd);
            }
            if !s.env.is_empty() {
                shell["env"] = json!(s.env);
            }
            if s.stdin_open {
                shell["stdin_open"] = json!(true);
            }
            if !s.stdin.is_empty() {
                match String::from_utf8(s.stdin) {
                    Ok(text) => shell["stdin"] = json!(text),
                    Err(e) => shell["stdin_base64"] = json!(B64.encode(e.as_bytes())),
                }
            }
            json!({ "shell": shell })
        }
    }
}

/// A task as a list shows it: without output and result.
pub fn task(app: &App, t: Task) -> TaskView {
    let waiting = (!t.progress.state.is_final())
        .then(|| app.tasks.pool.why_waiting(&t))
        .flatten()
        .map(|w| ReasonView { code: w.as_str().into(), detail: waiting_sentence(w, &t) });
    let asked = terms(&t.terms);
    let p = t.progress;
    TaskView {
        id: t.id.to_string(),
        session_id: t.session.map(|s| s.to_string()),
        node_id: p.attempt.as_ref().map(|a| a.node).or(t.named_node).map(|n| n.to_string()),
        user_id: t.actor.user.to_string(),
        actor: ActorView {
            user_id: t.actor.user.to_string(),
            key_id: t.actor.key.map(|k| k.to_string()),
            agent: t.actor.agent.map(|a| a.to_string()),
            door: t.actor.door,
        },
        signed: t.signed.map(|(key_id, digest)| SignedView { key_id, policy_digest: format!("sha256:{}", hex::encode(digest)) }),
        parent_id: t.parent.map(|p| p.to_string()),
        skill: t.skill,
        spec: spec(&t.spec),
        state: p.state.as_str().into(),
        reason: p.reason.map(|r| ReasonView { code: r.code.as_str().into(), detail: r.detail }),
        exit_code: p.exit_code,
        signal: p.signal,
        attempt: p.attempt.map_or(0, |a| a.no.ordinal()),
        waiting,
        sandbox_applied: t.sandbox_applied,
        created_at: rfc3339(t.created_at),
        assigned_at: p.assigned_at.map(rfc3339),
        started_at: p.started_at.map(rfc3339),
        finished_at: p.finished_at.map(rfc3339),
        // Nobody asks for the end at a deadline; its reason says it.
        cancel_requested_at: p.cancel.filter(|c| c.reason != ReasonCode::Deadline).map(|c| rfc3339(c.at)),
        stdout: None,
        stderr: None,
        stdout_lossy: false,
        stderr_lossy: false,
        stdout_bytes: t.output.stdout_bytes,
        stderr_bytes: t.output.stderr_bytes,
        stdout_sha256: t.digests.map(|d| hex::encode(d.stdout)),
        stderr_sha256: t.digests.map(|d| hex::encode(d.stderr)),
        truncated: t.output.truncated,
        result: None,
        select: asked.select,
        priority: asked.priority,
        not_before: asked.not_before,
        deadline: asked.deadline,
        retries: asked.retries,
        on_lost: asked.on_lost,
        lost_after_secs: asked.lost_after_secs,
        children: t.children.map(|c| ChildrenView {
            total: c.total,
            by_state: c.by_state.into_iter().map(|(state, n)| (state.as_str().to_owned(), n)).collect(),
        }),
    }
}

/// Terms as they were asked for; what was left out stays out.
struct Asked {
    select: Option<SelectView>,
    priority: Option<i32>,
    not_before: Option<String>,
    deadline: Option<String>,
    retries: Option<RetriesView>,
    on_lost: Option<String>,
    lost_after_secs: Option<u64>,
}

fn terms(t: &Terms) -> Asked {
    Asked {
        select: t.select.as_ref().map(|s| SelectView {
            labels: s.labels.clone(),
            skills: s.skills.iter().cloned().collect(),
            slots: s.slots.clone(),
        }),
        priority: (t.priority != 0).then_some(t.priority),
        not_before: t.not_before.map(rfc3339),
        deadline: t.deadline.map(rfc3339),
        retries: (t.retries > 0).then_some(RetriesView { max: t.retries, backoff_ms: Some(t.backoff_ms) }),
        on_lost: (t.on_lost != OnLost::Wait).then(|| t.on_lost.as_str().to_owned()),
        lost_after_secs: t.lost_after,
    }
}

fn waiting_sentence(w: Waiting, t: &Task) -> String {
    use Waiting::*;
    let p = &t.progress;
    let until = |at: Option<i64>| at.map(|at| format!(" until {}", rfc3339(at))).unwrap_or_default();
    let selected = if t.terms.select.is_some() { " and fits its selector" } else { "" };
    match w {
        NodeOffline => "the named node is offline".into(),
        NoCandidate if t.named_node.is_some() => "the named node is draining: it takes no new work until it is resumed".into(),
        NoCandidate => format!("no node that may take this task{selected} is online"),
        NoSlot => format!("every node that may take this task{selected} is busy, or others go first"),
        NotBefore => format!("it is not started{}", until(t.terms.not_before).replace(" until", " before")),
        Backoff if p.retried == 0 => format!("what was lost is run again; it rests{}", until(p.retry_at)),
        Backoff => format!(
            "attempt {} failed; retry {} of {} rests{}",
            p.attempt.as_ref().map_or(0, |a| a.no.ordinal()),
            p.retried,
            t.terms.retries,
            until(p.retry_at)
        ),
        InDoubt => {
            let then = if t.terms.on_lost == OnLost::Requeue { "is run again" } else { "fails as lost" };
            let bound = t.terms.lost_after_secs().map(|secs| format!("; it {then} when the node is away for {secs} s"));
            format!("its node is away; the task goes on there, or its fate is told when the node is back{}", bound.unwrap_or_default())
        }
        HubStarting => "the hub has just started".into(),
    }
}

/// A whole task with the last part of its output.
pub fn detail(app: &App, d: TaskDetail) -> TaskView {
    let result = d.task.result.as_ref().map(|r| json!({ "payload": String::from_utf8_lossy(r) }));
    let mut view = task(app, d.task);
    let (stdout, stdout_lossy) = tail(&d.stdout);
    let (stderr, stderr_lossy) = tail(&d.stderr);
    (view.stdout, view.stdout_lossy) = (Some(stdout), stdout_lossy);
    (view.stderr, view.stderr_lossy) = (Some(stderr), stderr_lossy);
    view.result = result;
    view
}

/// Bytes as text: cut on a character at the front, and whether anything was replaced.
fn tail(bytes: &[u8]) -> (String, bool) {
    // A tail may begin inside a character: at most three continuation bytes belong to its front.
    let skip = bytes.iter().take(3).take_while(|b| **b & 0xc0 == 0x80).count();
    let skip = if bytes.len() >= hub_engine::tasks::TAIL_BYTES { skip } else { 0 };
    let text = String::from_utf8_lossy(&bytes[skip..]);
    let lossy = matches!(text, std::borrow::Cow::Owned(_));
    (text.into_owned(), lossy)
}

pub fn event(e: TaskEvent) -> TaskEventView {
    TaskEventView {
        seq: e.seq,
        at: rfc3339(e.at),
        kind: e.kind,
        attempt: e.attempt.map_or(0, AttemptNo::ordinal),
        state: Some(e.state.as_str().into()),
        node_id: e.node.map(|n| n.to_string()),
        detail: e.detail,
    }
}
