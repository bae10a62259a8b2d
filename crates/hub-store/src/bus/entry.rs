//! What one entry of the stream says, sealed: a MAC of the hubs' key, then the body.
//!
//! The body is `version, life, number, sent, kind, payload`. The key covers a context and the
//! deployment's id as well. A kind that a later version added is passed over; a body of another version
//! too.

use hmac::{Hmac, KeyInit, Mac};
use hub_engine::events::{Data, Event, NodeNews, SessionNews, TaskKind, TaskNews, Whose};
use hub_engine::links::Health;
use hub_engine::records::MessageRole;
use mesh_core::canon::{Malformed, Reader, Writer};
use mesh_core::ceiling::Closed;
use mesh_core::permission::Role;
use mesh_core::task::{Reason, ReasonCode, TaskState};
use mesh_core::{ApiKeyId, HubId, LoginId, MessageId, NodeId, SessionId, TaskId, UnixMs, UserId, sha256};
use std::collections::BTreeMap;

const CONTEXT: &[u8] = b"cortex-mesh bus entry";
const VERSION: u8 = 1;
const MAC: usize = 32;
/// Far above any event; what is longer was not written by a hub.
const MAX_BYTES: usize = 64 << 10;

/// One run of one hub.
pub type Life = [u8; 16];
/// Tells entries apart that stand at the same place of different streams.
pub type Tag = [u8; 8];

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub life: Life,
    /// 1, 2, 3 … per life: a repeat and a hole show.
    pub number: u64,
    pub sent: UnixMs,
    pub word: Word,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Word {
    /// A stream begins. Its seal makes its places unlike those of the stream before.
    Birth,
    /// Its hub told things that never came to the stream: nobody can resume across this.
    Gap,
    Event(Event),
    /// Of a later version.
    Unknown,
}

/// Why bytes are no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    Forged,
    Malformed,
}

/// Seals and opens the entries of one deployment.
pub struct Sealer {
    keyed: Hmac<sha2::Sha256>,
}

impl Sealer {
    pub fn new(key: &[u8; 32], hub: HubId) -> Self {
        let mut keyed = Hmac::<sha2::Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        keyed.update(CONTEXT);
        keyed.update(hub.as_bytes());
        Self { keyed }
    }

    fn mac(&self, body: &[u8]) -> Hmac<sha2::Sha256> {
        let mut mac = self.keyed.clone();
        mac.update(body);
        mac
    }

    pub fn seal(&self, life: &Life, number: u64, sent: UnixMs, word: &Word) -> Vec<u8> {
        let mut w = Writer::plain(&[VERSION]);
        w.raw(life).u64(number).i64(sent);
        match word {
            Word::Birth => {
                w.u8(kind::BIRTH);
            }
            Word::Gap => {
                w.u8(kind::GAP);
            }
            Word::Event(event) => write(&mut w, event),
            Word::Unknown => {
                w.u8(kind::UNKNOWN);
            }
        }
        let body = w.finish();
        let mut sealed = self.mac(&body).finalize().into_bytes().to_vec();
        sealed.extend_from_slice(&body);
        sealed
    }

    /// None where its version is not known here.
    pub fn open(&self, sealed: &[u8]) -> Result<Option<Entry>, Bad> {
        let (mac, body) = sealed.split_at_checked(MAC).filter(|_| sealed.len() <= MAX_BYTES).ok_or(Bad::Malformed)?;
        self.mac(body).verify_slice(mac).map_err(|_| Bad::Forged)?;
        read(body).map_err(|_| Bad::Malformed)
    }
}

pub fn tag(sealed: &[u8]) -> Tag {
    sha256(sealed)[..8].try_into().expect("a digest has 32 bytes")
}

/// Never used again for anything else.
mod kind {
    pub const ENROLLED: u8 = 1;
    pub const REGISTERED: u8 = 2;
    pub const ONLINE: u8 = 3;
    pub const OFFLINE: u8 = 4;
    pub const RENEWED: u8 = 5;
    pub const HEALTH: u8 = 6;
    pub const RENAMED: u8 = 7;
    pub const CHANGED: u8 = 8;
    pub const DRAINING: u8 = 9;
    pub const RESUMED: u8 = 10;
    pub const REVOKED: u8 = 11;
    pub const REMOVED: u8 = 12;
    pub const RECOVERED: u8 = 13;
    pub const SUPERSEDED: u8 = 14;
    pub const TAKES: u8 = 15;
    pub const TASK: u8 = 16;
    pub const CREATED: u8 = 32;
    pub const CLOSED: u8 = 33;
    pub const ATTACHED: u8 = 34;
    pub const DETACHED: u8 = 35;
    pub const SESSION_RENAMED: u8 = 36;
    pub const EXPIRED: u8 = 37;
    pub const PURGED: u8 = 38;
    pub const MESSAGE: u8 = 39;
    pub const RIGHTS_USER: u8 = 48;
    pub const RIGHTS_KEY: u8 = 49;
    pub const RIGHTS_LOGIN: u8 = 50;
    pub const RIGHTS_ROLE: u8 = 51;
    pub const BIRTH: u8 = 240;
    pub const GAP: u8 = 241;
    pub const UNKNOWN: u8 = 255;
}

const TASK_KINDS: [TaskKind; 6] = {
    use TaskKind::*;
    [Accepted, Assigned, Requeued, Started, CancelRequested, Ended]
};

/// A kind that is new stops the compiler here, and belongs into [`TASK_KINDS`] too.
fn number(kind: TaskKind) -> u8 {
    match kind {
        TaskKind::Accepted => 1,
        TaskKind::Assigned => 2,
        TaskKind::Requeued => 3,
        TaskKind::Started => 4,
        TaskKind::CancelRequested => 5,
        TaskKind::Ended => 6,
    }
}

fn write(w: &mut Writer, event: &Event) {
    let head = |kind: u8| {
        w.u8(kind).i64(event.at).raw(event.owner.as_bytes());
        w
    };
    match &event.data {
        Data::Node(node, news) => {
            let of = |kind| head(kind).raw(node.as_bytes());
            match news {
                NodeNews::Enrolled { name } => of(kind::ENROLLED).str(name),
                NodeNews::Registered { version } => of(kind::REGISTERED).str(version),
                NodeNews::Online => of(kind::ONLINE),
                NodeNews::Offline => of(kind::OFFLINE),
                NodeNews::Renewed { not_after } => of(kind::RENEWED).i64(*not_after),
                NodeNews::Recovered { not_after } => of(kind::RECOVERED).i64(*not_after),
                NodeNews::Health(h) => of(kind::HEALTH)
                    .u64(h.cpu_percent.to_bits())
                    .u64(h.memory_used)
                    .u64(h.memory_total)
                    .u64(h.disk_used)
                    .u64(h.disk_total)
                    .u64(h.load_1m.to_bits())
                    .u32(h.running),
                NodeNews::Renamed { name } => of(kind::RENAMED).str(name),
                NodeNews::Changed { labels, slots, task_limit } => write_change(of(kind::CHANGED), labels, slots, *task_limit),
                NodeNews::Draining => of(kind::DRAINING),
                NodeNews::Resumed => of(kind::RESUMED),
                NodeNews::Revoked => of(kind::REVOKED),
                NodeNews::Removed => of(kind::REMOVED),
                NodeNews::Superseded => of(kind::SUPERSEDED),
                NodeNews::Takes { closed, max_tasks } => of(kind::TAKES).str(closed.map_or("", Closed::as_str)).u32(*max_tasks),
            }
        }
        Data::Task(news) => write_task(head(kind::TASK), news),
        Data::Session(session, news) => {
            let of = |kind| head(kind).raw(session.as_bytes());
            match news {
                SessionNews::Created { name } => of(kind::CREATED).str(name),
                SessionNews::Closed => of(kind::CLOSED),
                SessionNews::Attached(node) => of(kind::ATTACHED).raw(node.as_bytes()),
                SessionNews::Detached(node) => of(kind::DETACHED).raw(node.as_bytes()),
                SessionNews::Renamed { name } => of(kind::SESSION_RENAMED).str(name),
                SessionNews::Expired => of(kind::EXPIRED),
                SessionNews::Purged => of(kind::PURGED),
                SessionNews::Message { id, role } => of(kind::MESSAGE).raw(id.as_bytes()).str(role.as_str()),
            }
        }
        Data::Rights(Whose::User(id)) => head(kind::RIGHTS_USER).raw(id.as_bytes()),
        Data::Rights(Whose::Key(id)) => head(kind::RIGHTS_KEY).raw(id.as_bytes()),
        Data::Rights(Whose::Login(id)) => head(kind::RIGHTS_LOGIN).raw(id.as_bytes()),
        Data::Rights(Whose::Role(role)) => head(kind::RIGHTS_ROLE).str(role.as_str()),
    };
}

fn write_change<'w>(
    w: &'w mut Writer,
    labels: &BTreeMap<String, String>,
    slots: &BTreeMap<String, u32>,
    task_limit: Option<u32>,
) -> &'w mut Writer {
    w.u32(labels.len() as u32);
    for (key, value) in labels {
        w.str(key).str(value);
    }
    w.u32(slots.len() as u32);
    for (kind, count) in slots {
        w.str(kind).u32(*count);
    }
    w.option(task_limit, |w, n| _ = w.u32(n))
}

fn write_task<'w>(w: &'w mut Writer, news: &TaskNews) -> &'w mut Writer {
    w.u8(number(news.kind))
        .raw(news.task.as_bytes())
        .option(news.session, |w, id| _ = w.raw(id.as_bytes()))
        .option(news.node, |w, id| _ = w.raw(id.as_bytes()))
        .str(&news.skill)
        .str(news.state.as_str())
        .u32(news.attempt)
        .option(news.reason.as_ref(), |w, r| _ = w.str(r.code.as_str()).str(&r.detail))
        .option(news.exit_code, |w, v| _ = w.u32(v as u32))
        .option(news.signal, |w, v| _ = w.u32(v as u32))
}

fn read(body: &[u8]) -> Result<Option<Entry>, Malformed> {
    let mut r = Reader::plain(body);
    if r.u8()? != VERSION {
        return Ok(None);
    }
    let (life, number, sent, kind) = (r.array()?, r.u64()?, r.i64()?, r.u8()?);
    let word = match kind {
        kind::BIRTH => Some(Word::Birth),
        kind::GAP => Some(Word::Gap),
        _ => read_event(kind, &mut r)?,
    };
    let word = match word {
        Some(word) => {
            r.end()?;
            word
        }
        None => Word::Unknown,
    };
    Ok(Some(Entry { life, number, sent, word }))
}

/// None where a later version wrote it.
fn read_event(kind: u8, r: &mut Reader<'_>) -> Result<Option<Word>, Malformed> {
    if !(kind::ENROLLED..=kind::TAKES).contains(&kind)
        && kind != kind::TASK
        && !(kind::CREATED..=kind::MESSAGE).contains(&kind)
        && !(kind::RIGHTS_USER..=kind::RIGHTS_ROLE).contains(&kind)
    {
        return Ok(None);
    }
    let (at, owner) = (r.i64()?, UserId::from_bytes(r.array()?));
    let data = match kind {
        kind::TASK => match read_task(r)? {
            Some(news) => Data::Task(Box::new(news)),
            None => return Ok(None),
        },
        kind::ENROLLED..=kind::TAKES => Data::Node(NodeId::from_bytes(r.array()?), read_node(kind, r)?),
        kind::CREATED..=kind::MESSAGE => {
            let session = SessionId::from_bytes(r.array()?);
            match read_session(kind, r)? {
                Some(news) => Data::Session(session, news),
                None => return Ok(None),
            }
        }
        kind::RIGHTS_USER => Data::Rights(Whose::User(UserId::from_bytes(r.array()?))),
        kind::RIGHTS_KEY => Data::Rights(Whose::Key(ApiKeyId::from_bytes(r.array()?))),
        kind::RIGHTS_LOGIN => Data::Rights(Whose::Login(LoginId::from_bytes(r.array()?))),
        _ => match Role::parse(r.str()?) {
            Some(role) => Data::Rights(Whose::Role(role)),
            None => return Ok(None),
        },
    };
    Ok(Some(Word::Event(Event { at, owner, data })))
}

fn read_session(kind: u8, r: &mut Reader<'_>) -> Result<Option<SessionNews>, Malformed> {
    Ok(Some(match kind {
        kind::CREATED => SessionNews::Created { name: r.str()?.to_owned() },
        kind::CLOSED => SessionNews::Closed,
        kind::ATTACHED => SessionNews::Attached(NodeId::from_bytes(r.array()?)),
        kind::DETACHED => SessionNews::Detached(NodeId::from_bytes(r.array()?)),
        kind::SESSION_RENAMED => SessionNews::Renamed { name: r.str()?.to_owned() },
        kind::EXPIRED => SessionNews::Expired,
        kind::PURGED => SessionNews::Purged,
        _ => {
            let id = MessageId::from_bytes(r.array()?);
            let Some(role) = MessageRole::parse(r.str()?) else { return Ok(None) };
            SessionNews::Message { id, role }
        }
    }))
}

fn read_change(r: &mut Reader<'_>) -> Result<NodeNews, Malformed> {
    let (mut labels, mut slots) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..r.count()? {
        let key = r.str()?.to_owned();
        labels.insert(key, r.str()?.to_owned());
    }
    for _ in 0..r.count()? {
        let kind = r.str()?.to_owned();
        slots.insert(kind, r.u32()?);
    }
    Ok(NodeNews::Changed { labels, slots, task_limit: r.option(Reader::u32)? })
}

fn read_node(kind: u8, r: &mut Reader<'_>) -> Result<NodeNews, Malformed> {
    Ok(match kind {
        kind::ENROLLED => NodeNews::Enrolled { name: r.str()?.to_owned() },
        kind::REGISTERED => NodeNews::Registered { version: r.str()?.to_owned() },
        kind::ONLINE => NodeNews::Online,
        kind::OFFLINE => NodeNews::Offline,
        kind::RENEWED => NodeNews::Renewed { not_after: r.i64()? },
        kind::RECOVERED => NodeNews::Recovered { not_after: r.i64()? },
        kind::RENAMED => NodeNews::Renamed { name: r.str()?.to_owned() },
        kind::CHANGED => read_change(r)?,
        kind::DRAINING => NodeNews::Draining,
        kind::RESUMED => NodeNews::Resumed,
        kind::REVOKED => NodeNews::Revoked,
        kind::REMOVED => NodeNews::Removed,
        kind::SUPERSEDED => NodeNews::Superseded,
        kind::TAKES => NodeNews::Takes { closed: Closed::parse(r.str()?), max_tasks: r.u32()? },
        _ => NodeNews::Health(Health {
            cpu_percent: f64::from_bits(r.u64()?),
            memory_used: r.u64()?,
            memory_total: r.u64()?,
            disk_used: r.u64()?,
            disk_total: r.u64()?,
            load_1m: f64::from_bits(r.u64()?),
            running: r.u32()?,
            ..Health::default()
        }),
    })
}

fn read_task(r: &mut Reader<'_>) -> Result<Option<TaskNews>, Malformed> {
    let kind = r.u8()?;
    let task = TaskId::from_bytes(r.array()?);
    let session = r.option(|r| Ok(SessionId::from_bytes(r.array()?)))?;
    let node = r.option(|r| Ok(NodeId::from_bytes(r.array()?)))?;
    let (skill, state, attempt) = (r.str()?.to_owned(), r.str()?, r.u32()?);
    let reason = r.option(|r| Ok((r.str()?, r.str()?.to_owned())))?;
    let exit_code = r.option(|r| Ok(r.u32()? as i32))?;
    let signal = r.option(|r| Ok(r.u32()? as i32))?;
    let known = TASK_KINDS.into_iter().find(|k| number(*k) == kind).zip(TaskState::parse(state));
    let reason = reason.map(|(code, detail)| ReasonCode::parse(code).map(|code| Reason::new(code, detail)));
    let (Some((kind, state)), false) = (known, reason == Some(None)) else { return Ok(None) };
    Ok(Some(TaskNews { kind, task, session, node, skill, state, attempt, reason: reason.flatten(), exit_code, signal }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIFE: Life = [7; 16];

    fn sealer() -> Sealer {
        Sealer::new(&[1; 32], HubId::from_bytes([2; 16]))
    }
    fn event(data: Data) -> Word {
        Word::Event(Event { at: -5, owner: UserId::from_bytes([3; 16]), data })
    }
    fn task(kind: TaskKind, full: bool) -> Data {
        Data::Task(Box::new(TaskNews {
            kind,
            task: TaskId::from_bytes([4; 16]),
            session: full.then(|| SessionId::from_bytes([5; 16])),
            node: full.then(|| NodeId::from_bytes([6; 16])),
            skill: "shell".into(),
            state: TaskState::Failed,
            attempt: 3,
            reason: full.then(|| Reason::new(ReasonCode::Exit, "ä\0")),
            exit_code: full.then_some(-1),
            signal: full.then_some(9),
        }))
    }
    fn words() -> Vec<Word> {
        let (node, session) = (NodeId::from_bytes([6; 16]), SessionId::from_bytes([5; 16]));
        let health = Health {
            cpu_percent: 1.5,
            memory_used: 1,
            memory_total: 2,
            disk_used: 3,
            disk_total: 4,
            load_1m: 0.1,
            running: 5,
            ..Health::default()
        };
        let nodes = [
            NodeNews::Enrolled { name: "büro".into() },
            NodeNews::Registered { version: "1".into() },
            NodeNews::Online,
            NodeNews::Offline,
            NodeNews::Renewed { not_after: 12 },
            NodeNews::Recovered { not_after: 13 },
            NodeNews::Health(health),
            NodeNews::Renamed { name: "b".into() },
            NodeNews::Changed {
                labels: [("os".to_owned(), "linux".to_owned())].into(),
                slots: [("gpu".to_owned(), 2)].into(),
                task_limit: Some(3),
            },
            NodeNews::Draining,
            NodeNews::Resumed,
            NodeNews::Revoked,
            NodeNews::Removed,
            NodeNews::Superseded,
            NodeNews::Takes { closed: Some(Closed::Disabled), max_tasks: 4 },
            NodeNews::Takes { closed: None, max_tasks: 0 },
        ];
        let sessions = [
            SessionNews::Created { name: String::new() },
            SessionNews::Closed,
            SessionNews::Attached(node),
            SessionNews::Detached(node),
            SessionNews::Renamed { name: "c".into() },
            SessionNews::Expired,
            SessionNews::Purged,
            SessionNews::Message { id: MessageId::from_bytes([8; 16]), role: MessageRole::Tool },
        ];
        let rights = [
            Whose::User(UserId::from_bytes([1; 16])),
            Whose::Key(ApiKeyId::from_bytes([2; 16])),
            Whose::Login(LoginId::from_bytes([3; 16])),
            Whose::Role(Role::Guest),
        ];
        let mut all = vec![Word::Birth, Word::Gap];
        all.extend(nodes.map(|n| event(Data::Node(node, n))));
        all.extend(sessions.map(|s| event(Data::Session(session, s))));
        all.extend(rights.map(|w| event(Data::Rights(w))));
        all.extend(TASK_KINDS.into_iter().flat_map(|k| [event(task(k, true)), event(task(k, false))]));
        all
    }

    #[test]
    fn what_is_sealed_is_read_back() {
        for (i, word) in words().into_iter().enumerate() {
            let sealed = sealer().seal(&LIFE, i as u64, 99, &word);
            let entry = sealer().open(&sealed).unwrap().unwrap();
            assert_eq!(entry, Entry { life: LIFE, number: i as u64, sent: 99, word });
        }
    }

    /// A hub of another build reads these bytes: a change of layout is a new version.
    #[test]
    fn the_layout_is_kept() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let sealed = sealer().seal(&LIFE, 1, 2, &event(task(TaskKind::Ended, true)));
        let body = "0107070707070707070707070707070707000000000000000100000000000000021\
            0fffffffffffffffb030303030303030303030303030303030604040404040404040404040404040404\
            01050505050505050505050505050505050106060606060606060606060606060606000000057368656c6c\
            000000066661696c65640000000301000000046578697400000003c3a40001ffffffff0100000009";
        assert_eq!(hex(&sealed[MAC..]), body);
        let all: Vec<u8> = words().iter().flat_map(|w| sealer().seal(&LIFE, 1, 2, w)).collect();
        assert_eq!(hex(&sha256(&all)), "1ee3c76b59615255e95934358ede19528c73576a6caa1ca4713f42b21b3ab205");
    }

    #[test]
    fn who_lacks_the_key_changes_nothing() {
        let sealed = sealer().seal(&LIFE, 1, 2, &event(task(TaskKind::Ended, false)));
        for i in 0..sealed.len() {
            let mut other = sealed.clone();
            other[i] ^= 1;
            assert_eq!(sealer().open(&other), Err(Bad::Forged), "byte {i}");
        }
        for cut in [0, 1, MAC - 1] {
            assert_eq!(sealer().open(&sealed[..cut]), Err(Bad::Malformed));
        }
        assert_eq!(sealer().open(&sealed[..MAC]), Err(Bad::Forged));
        assert_eq!(Sealer::new(&[9; 32], HubId::from_bytes([2; 16])).open(&sealed), Err(Bad::Forged), "another key");
        assert_eq!(Sealer::new(&[1; 32], HubId::from_bytes([9; 16])).open(&sealed), Err(Bad::Forged), "another deployment");
        assert_eq!(sealer().open(&vec![0; MAX_BYTES + 1]), Err(Bad::Malformed));
    }

    fn sealed(body: &[u8]) -> Vec<u8> {
        let mut out = sealer().mac(body).finalize().into_bytes().to_vec();
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn what_a_later_version_says_is_passed_over() {
        let body = |edit: &dyn Fn(&mut Vec<u8>)| {
            let mut body = sealer().seal(&LIFE, 1, 2, &event(task(TaskKind::Ended, true))).split_off(MAC);
            edit(&mut body);
            sealer().open(&sealed(&body))
        };
        let kind_at = 1 + 16 + 8 + 8;
        assert_eq!(body(&|b| b[0] = 2), Ok(None));
        for kind in [0, 17, 31, 40, 52, 200, 255] {
            assert!(matches!(body(&|b| b[kind_at] = kind), Ok(Some(Entry { word: Word::Unknown, number: 1, .. }))), "{kind}");
        }
        let state = |b: &mut Vec<u8>| {
            let at = b.windows(6).position(|w| w == b"failed").unwrap();
            b[at] = b'x';
        };
        assert!(matches!(body(&state), Ok(Some(Entry { word: Word::Unknown, .. }))));
        assert!(matches!(body(&|b| b[kind_at + 1 + 8 + 16] = 77), Ok(Some(Entry { word: Word::Unknown, .. }))), "a kind of task event");
        assert_eq!(body(&|b| b.push(0)), Err(Bad::Malformed), "one value has one encoding");
        assert_eq!(body(&|b| b.truncate(40)), Err(Bad::Malformed));
    }

    proptest! {
        #[test]
        fn no_body_is_too_strange(body in proptest::collection::vec(any::<u8>(), 0..200), version in any::<bool>(), kind in any::<u8>()) {
            let mut body = body;
            if version && body.len() > 33 {
                body[0] = VERSION;
                body[33] = kind;
            }
            let _ = sealer().open(&sealed(&body));
        }
    }
}
