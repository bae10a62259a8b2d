//! Between rows and records: how each kind of value lies in a column.

use crate::dialect::{Dialect, Get, Row};
use crate::sql::{IdBytes, Value};
use crate::store::Failed;
use hub_engine::records::*;
use mesh_core::capability::Capabilities;
use mesh_core::fan::ChildEnd;
use mesh_core::output::Digests;
use mesh_core::permission::{Role, Scope};
use mesh_core::select::Selector;
use mesh_core::task::{Attempt, AttemptNo, Cancel, OnLost, Progress, Reason, ReasonCode, TaskState, Terms};
use mesh_core::*;
use std::collections::BTreeMap;

/// An id, as the 16 bytes of its UUID.
pub(crate) trait Id: Copy {
    fn from_blob(bytes: [u8; 16]) -> Self;
    fn blob(&self) -> IdBytes;
}

macro_rules! id {
    ($($name:ident),*) => {$(
        impl Id for $name {
            fn from_blob(bytes: [u8; 16]) -> Self {
                Self::from_bytes(bytes)
            }
            fn blob(&self) -> IdBytes {
                *self.as_bytes()
            }
        }
    )*};
}
id!(
    AgentId, ApiKeyId, AuditId, ChainId, DeviceId, EntryId, GrantId, HubId, InviteId, LoginId, MessageId, NodeId, SessionId, SpoolId,
    TaskId, UserId
);

/// Ids as values of a list.
pub(crate) fn all<'i, I: Id + 'i>(ids: impl IntoIterator<Item = &'i I>) -> Vec<Value<'static>> {
    ids.into_iter().map(|id| id.blob().into()).collect()
}

pub(crate) fn blob<I: Id>(id: Option<I>) -> Option<IdBytes> {
    id.map(|i| i.blob())
}

/// Reads a row's columns from left to right, in the order of the SELECT.
pub(crate) struct Columns<'a, 'r> {
    row: &'a Row<'r>,
    next: usize,
}

impl<'a, 'r> Columns<'a, 'r> {
    pub(crate) fn of(row: &'a Row<'r>) -> Self {
        Self { row, next: 0 }
    }
    pub(crate) fn get<T: Get<'r>>(&mut self) -> Result<T, Failed> {
        self.next += 1;
        self.row.get(self.next - 1)
    }
    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Failed> {
        fixed(self.get()?)
    }
    fn bytes_or_null<const N: usize>(&mut self) -> Result<Option<[u8; N]>, Failed> {
        self.get::<Option<&[u8]>>()?.map(fixed).transpose()
    }
    pub(crate) fn id<I: Id>(&mut self) -> Result<I, Failed> {
        Ok(I::from_blob(self.bytes()?))
    }
    pub(crate) fn id_or_null<I: Id>(&mut self) -> Result<Option<I>, Failed> {
        Ok(self.bytes_or_null()?.map(I::from_blob))
    }
    pub(crate) fn unsigned(&mut self) -> Result<u64, Failed> {
        Ok(self.get::<i64>()? as u64)
    }
    /// 0 for what is not there.
    pub(crate) fn length(&mut self) -> Result<usize, Failed> {
        Ok(usize::try_from(self.get::<Option<i64>>()?.unwrap_or(0))?)
    }
    pub(crate) fn small(&mut self) -> Result<u32, Failed> {
        Ok(u32::try_from(self.get::<i64>()?)?)
    }
    fn small_or_null(&mut self) -> Result<Option<i32>, Failed> {
        Ok(self.get::<Option<i64>>()?.map(i32::try_from).transpose()?)
    }
    pub(crate) fn word<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Result<T, Failed> {
        let text: &str = self.get()?;
        parse(text).ok_or_else(|| format!("{text:?} is not a word of this version").into())
    }
    pub(crate) fn word_or_null<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Result<Option<T>, Failed> {
        let Some(text) = self.get::<Option<&str>>()? else { return Ok(None) };
        parse(text).map(Some).ok_or_else(|| format!("{text:?} is not a word of this version").into())
    }
    pub(crate) fn json<T: Json>(&mut self) -> Result<T, Failed> {
        T::read(self.get()?)
    }
    pub(crate) fn json_or_null<T: Json>(&mut self) -> Result<Option<T>, Failed> {
        self.get::<Option<&str>>()?.map(T::read).transpose()
    }
}

fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Failed> {
    bytes.try_into().map_err(|_| format!("a value of {} bytes where {N} belong", bytes.len()).into())
}

/// The shapes of JSON that columns hold.
pub(crate) trait Json: Sized {
    fn read(text: &str) -> Result<Self, Failed>;
}
impl Json for BTreeMap<String, String> {
    fn read(text: &str) -> Result<Self, Failed> {
        Ok(serde_json::from_str(text)?)
    }
}
impl Json for BTreeMap<String, u32> {
    fn read(text: &str) -> Result<Self, Failed> {
        Ok(serde_json::from_str(text)?)
    }
}
impl Json for Vec<String> {
    fn read(text: &str) -> Result<Self, Failed> {
        Ok(serde_json::from_str(text)?)
    }
}

pub(crate) fn map_text<V: Clone + Into<serde_json::Value>>(map: &BTreeMap<String, V>) -> String {
    // Keys come in order and the writer adds no blanks: equal maps give equal text.
    let map: BTreeMap<&str, serde_json::Value> = map.iter().map(|(k, v)| (k.as_str(), v.clone().into())).collect();
    serde_json::json!(map).to_string()
}
pub(crate) fn list_text<T: ToString>(list: &[T]) -> String {
    serde_json::json!(list.iter().map(T::to_string).collect::<Vec<_>>()).to_string()
}

/// What [`task`] reads.
pub(crate) const TASK_COLUMNS: &str = "t.events, t.id, t.session, t.named_node, t.\"user\", t.key, t.agent, t.door, t.skill, t.digest, t.seal, \
    t.timeout_secs, t.queue_secs, t.selector, t.priority, t.not_before, t.deadline, t.retries, t.backoff_ms, t.on_lost, t.lost_after, t.created_at, t.state, t.attempt, t.attempt_node, t.granted, t.cancel_at, t.cancel_reason, \
    t.reason_code, t.reason_detail, t.exit_code, t.signal, t.assigned_at, t.started_at, t.finished_at, t.retried, t.retry_at, t.sandbox_applied, \
    t.signed_key, t.signed_digest, t.spec, t.result, t.parent, t.children, \
    CASE WHEN t.children IS NOT NULL THEN (SELECT string_agg(k.state || ' ' || k.n, ',') \
    FROM (SELECT state, COUNT(*) AS n FROM tasks WHERE parent = t.id GROUP BY state) k) END, \
    o.durable_seq, o.stdout_bytes, o.stderr_bytes, o.kept_seq, o.truncated, \
    o.stdout_sha256, o.stderr_sha256";
/// Behind `tasks t`.
pub(crate) const TASK_OUTPUT: &str = "LEFT JOIN outputs o ON o.task = t.id AND o.attempt = t.attempt";

/// A task, and how many lines of history it has.
pub(crate) fn task(row: &Row) -> Result<(Task, u64), Failed> {
    let c = &mut Columns::of(row);
    let events = c.unsigned()?;
    let (id, session, named_node) = (c.id()?, c.id_or_null()?, c.id_or_null()?);
    let actor = Actor { user: c.id()?, key: c.id_or_null()?, agent: c.id_or_null()?, door: c.get()? };
    let (skill, digest, seal) = (c.get()?, c.bytes()?, c.bytes()?);
    let (timeout_secs, queue_secs, terms, created_at) = (c.unsigned()?, c.unsigned()?, terms(c)?, c.get()?);
    let progress = progress(c)?;
    let sandbox_applied = c.get()?;
    let signed = c.get::<Option<String>>()?.zip(c.bytes_or_null()?);
    let (spec, result) = (c.get()?, c.get()?);
    let (parent, children) = (c.id_or_null()?, children(c)?);
    let (output, digests) = match c.get::<Option<i64>>()? {
        None => (OutputTotals::default(), None),
        Some(seq) => (
            OutputTotals {
                durable_seq: seq as u64,
                stdout_bytes: c.unsigned()?,
                stderr_bytes: c.unsigned()?,
                kept_seq: c.unsigned()?,
                // Closed by an erasure before anything came: nothing is missing.
                truncated: c.get::<bool>()? && seq > 0,
            },
            digests(c)?,
        ),
    };
    let task = Task {
        id,
        session,
        named_node,
        actor,
        skill,
        spec,
        digest,
        seal,
        timeout_secs,
        queue_secs,
        terms,
        created_at,
        progress,
        output,
        digests,
        result,
        sandbox_applied,
        signed,
        parent,
        children,
    };
    Ok((task, events))
}

fn digests(c: &mut Columns) -> Result<Option<Digests>, Failed> {
    Ok(c.bytes_or_null()?.zip(c.bytes_or_null()?).map(|(stdout, stderr)| Digests { stdout, stderr }))
}

/// How many there are, and how many in each state: `failed 1,running 2`.
fn children(c: &mut Columns) -> Result<Option<Children>, Failed> {
    let total = c.get::<Option<i64>>()?.map(u32::try_from).transpose()?;
    let states = c.get::<Option<&str>>()?.unwrap_or_default();
    let Some(total) = total else { return Ok(None) };
    let mut by_state = BTreeMap::new();
    for (word, n) in states.split(',').filter_map(|s| s.split_once(' ')) {
        by_state.insert(TaskState::parse(word).ok_or_else(|| format!("{word:?} is not a state of this version"))?, n.parse()?);
    }
    Ok(Some(Children { total, by_state }))
}

pub(crate) fn child_end(row: &Row) -> Result<ChildEnd, Failed> {
    let c = &mut Columns::of(row);
    let (id, at, state) = (c.id()?, c.get()?, c.word(TaskState::parse)?);
    let code = c.word_or_null(ReasonCode::parse)?;
    let reason = code.zip(c.get::<Option<String>>()?).map(|(code, detail)| Reason { code, detail });
    Ok(ChildEnd { id, at, state, reason, exit_code: c.small_or_null()?, signal: c.small_or_null()? })
}

fn terms(c: &mut Columns) -> Result<Terms, Failed> {
    let select = c.get::<Option<&[u8]>>()?.map(Selector::decode).transpose()?;
    Ok(Terms {
        select,
        priority: i32::try_from(c.get::<i64>()?)?,
        not_before: c.get()?,
        deadline: c.get()?,
        retries: c.small()?,
        backoff_ms: c.unsigned()?,
        on_lost: c.word(OnLost::parse)?,
        lost_after: c.get::<Option<i64>>()?.map(|secs| secs as u64),
    })
}

fn progress(c: &mut Columns) -> Result<Progress, Failed> {
    let state = c.word(TaskState::parse)?;
    let (no, node, granted) = (c.get::<Option<i64>>()?, c.id_or_null()?, c.id_or_null()?);
    let attempt = no.zip(node).map(|(no, node)| Attempt { no: AttemptNo(no as u64), node, granted });
    let cancel = c.get()?;
    let cancel = c.word_or_null(ReasonCode::parse)?.zip(cancel).map(|(reason, at)| Cancel { at, reason });
    let code = c.word_or_null(ReasonCode::parse)?;
    let reason = code.zip(c.get::<Option<String>>()?).map(|(code, detail)| Reason { code, detail });
    Ok(Progress {
        state,
        attempt,
        cancel,
        reason,
        exit_code: c.small_or_null()?,
        signal: c.small_or_null()?,
        assigned_at: c.get()?,
        started_at: c.get()?,
        finished_at: c.get()?,
        retried: c.small()?,
        retry_at: c.get()?,
    })
}

pub(crate) const EVENT_COLUMNS: &str = "seq, at, kind, attempt, state, node, detail";

pub(crate) fn event(row: &Row) -> Result<TaskEvent, Failed> {
    let c = &mut Columns::of(row);
    Ok(TaskEvent {
        seq: c.unsigned()?,
        at: c.get()?,
        kind: c.get()?,
        attempt: c.get::<Option<i64>>()?.map(|no| AttemptNo(no as u64)),
        state: c.word(TaskState::parse)?,
        node: c.id_or_null()?,
        detail: c.get()?,
    })
}

pub(crate) const INVITE_COLUMNS: &str =
    "id, owner, public_key, name, labels, created_at, expires_at, revoked_at, used_at, used_spki, used_node, notices";

pub(crate) fn invite(row: &Row) -> Result<Invite, Failed> {
    let c = &mut Columns::of(row);
    let (id, owner, public_key, name, labels) = (c.id()?, c.id()?, c.bytes()?, c.get()?, c.json()?);
    let (created_at, expires_at, revoked_at) = (c.get()?, c.get()?, c.get()?);
    let (at, spki, node) = (c.get::<Option<i64>>()?, c.bytes_or_null()?, c.id_or_null()?);
    let used = at.zip(spki).zip(node).map(|((at, spki), node)| InviteUse { at, spki, node });
    Ok(Invite { id, owner, public_key, name, labels, created_at, expires_at, revoked_at, used, notices: c.json()? })
}

pub(crate) const NODE_COLUMNS: &str = "id, name, owner, labels, max_tasks, version, capabilities, created_at, last_seen_at, \
    generation, cert_spki, cert_der, cert_not_after, cert_counter, revoked_at, notices, slots, task_limit, draining, epoch, bundle_seq";

pub(crate) fn node(row: &Row) -> Result<Node, Failed> {
    let c = &mut Columns::of(row);
    let node = Node {
        id: c.id()?,
        name: c.get()?,
        owner: c.id()?,
        labels: c.json()?,
        slots: None,
        max_tasks: c.get::<i64>()? as u32,
        task_limit: None,
        draining: false,
        epoch: 0,
        version: c.get()?,
        capabilities: Capabilities::decode(c.get()?).map_err(|e| e.to_string())?,
        created_at: c.get()?,
        last_seen_at: c.get()?,
        generation: c.unsigned()?,
        certificate: NodeCertificate { spki: c.bytes()?, der: c.get()?, not_after: c.get()?, counter: c.unsigned()? },
        revoked_at: c.get()?,
        notices: c.json()?,
        bundle_seq: 0,
    };
    let slots = c.get::<Option<&str>>()?.map(Json::read).transpose()?;
    let task_limit = c.get::<Option<i64>>()?.map(u32::try_from).transpose()?;
    Ok(Node { slots, task_limit, draining: c.get()?, epoch: c.unsigned()?, bundle_seq: c.unsigned()?, ..node })
}

pub(crate) const USER_COLUMNS: &str = "id, username, role, password_hash, created_at";

pub(crate) fn user(row: &Row) -> Result<User, Failed> {
    let c = &mut Columns::of(row);
    Ok(User { id: c.id()?, username: c.get()?, role: c.word(Role::parse)?, password_hash: c.get()?, created_at: c.get()? })
}

pub(crate) const KEY_COLUMNS: &str = "id, \"user\", name, prefix, mac, scopes, created_at, expires_at, last_used_at";

pub(crate) fn key(row: &Row) -> Result<ApiKey, Failed> {
    let c = &mut Columns::of(row);
    Ok(ApiKey {
        id: c.id()?,
        user: c.id()?,
        name: c.get()?,
        prefix: c.get()?,
        mac: c.bytes()?,
        scopes: c.json::<Vec<String>>()?.iter().map(|s| Scope::parse(s)).collect::<Result<_, _>>()?,
        created_at: c.get()?,
        expires_at: c.get()?,
        last_used_at: c.get()?,
    })
}

/// The nodes come as hex, separated by commas, in the order of their attachment.
pub(crate) fn session_columns(dialect: Dialect) -> String {
    format!(
        "id, owner, name, created_at, expires_at, ttl_ms, closed_at, expired_at, purged_at, device, \
         (SELECT string_agg({}, ',' ORDER BY position, node) FROM session_nodes WHERE session = s.id)",
        dialect.hex("node")
    )
}

pub(crate) fn session(row: &Row) -> Result<Session, Failed> {
    let c = &mut Columns::of(row);
    Ok(Session {
        id: c.id()?,
        owner: c.id()?,
        name: c.get()?,
        created_at: c.get()?,
        expires_at: c.get()?,
        ttl_ms: c.get()?,
        closed_at: c.get()?,
        expired_at: c.get()?,
        purged_at: c.get()?,
        device: c.id_or_null()?,
        nodes: match c.get::<Option<&str>>()? {
            None => vec![],
            Some(list) => list.split(',').map(node_of_hex).collect::<Result<_, _>>()?,
        },
    })
}

fn node_of_hex(text: &str) -> Result<NodeId, Failed> {
    Ok(NodeId::from_bytes(u128::from_str_radix(text, 16)?.to_be_bytes()))
}
