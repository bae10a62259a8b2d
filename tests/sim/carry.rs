//! The same links over what really carries them: gRPC on HTTP/2, on streams of bytes that are slow, cut, or
//! silent. The hub's half is the hub's own (`hub::link`), the node's greeting the node's own.

use crate::hub::Hub;
use crate::net::{Dialed, End, Hello, HubEnd, ToHub, ToNode, Wire};
use crate::node::Machine;
use crate::world::T0;
use bytes::{Bytes, BytesMut};
use hub::keys::Keys;
use hub::link::tls::Connection;
use hub::link::{self, LinkContext};
use hub_engine::audit::Log;
use hub_engine::ports::Keyring;
use hub_testkit::contract::sample;
use hub_testkit::{MemoryStore, Nowhere};
use mesh_core::task::AttemptNo;
use mesh_core::{Digest, sha256};
use mesh_process::{CancellationToken, Tasks};
use mesh_wire::node::{self as wire, hub_data, hub_frame, node_data};
use node::link::connect::{DialError, Dialed as Greeted, says_revoked};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Connections that wait to be served.
const ACCEPTED: usize = 64;
/// Bytes between a socket and its network.
const SOCKET_BYTES: usize = 64 << 10;
const SEGMENT_BYTES: usize = 16 << 10;
pub const MOST_NODES: usize = 3;

/// Keys of a hub, and the certificates of its nodes.
pub struct Carrier {
    pub keys: Arc<Keys>,
    /// SHA-256 of the key, and the certificate; of node 1, 2 …
    nodes: Vec<(Digest, Arc<[u8]>)>,
}

impl Carrier {
    /// One for all seeds: signatures differ from run to run, and nothing depends on them.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Carrier>> = OnceLock::new();
        SHARED
            .get_or_init(|| {
                let dir = tempfile::tempdir().expect("a folder");
                let keys = Keys::open(dir.path(), T0).expect("keys");
                let certified = |n| {
                    let spki = rcgen::PublicKeyData::subject_public_key_info(&rcgen::KeyPair::generate().expect("a key"));
                    let der = keys
                        .issue_certificate(sample::node_id(n), &spki, T0 - 86_400_000, T0 + 30 * 86_400_000, &[])
                        .expect("a certificate");
                    (sha256(&spki), der.into())
                };
                let nodes = (1..=MOST_NODES as u16).map(certified).collect();
                Arc::new(Self { keys: Arc::new(keys), nodes })
            })
            .clone()
    }
    pub fn node_key(&self, n: usize) -> Digest {
        self.nodes[n - 1].0
    }
}

/// The hub's side of a connection.
pub struct Socket {
    io: DuplexStream,
    connection: Connection,
}

impl Connected for Socket {
    type ConnectInfo = Connection;
    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}
impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}
impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Where a hub that serves takes connections from.
pub type Port = mpsc::Sender<std::io::Result<Socket>>;

/// Serves links as `cortex-hub` does, for as long as it lives.
pub async fn serve(hub: &Hub, keys: Arc<Keys>) -> Port {
    let (port, incoming) = mpsc::channel(ACCEPTED);
    let audit = Log {
        // Not a part of what is simulated.
        store: Arc::new(MemoryStore::new()),
        witness: Arc::new(Nowhere),
        keyring: keys.clone(),
        hub: keys.hub,
        clock: hub.clock.clone(),
        work: hub.life.tasks.clone(),
        bounds: Default::default(),
    };
    audit.start(&[1; 16], 1, false).await.expect("memory");
    let context = LinkContext {
        keys,
        audit: Arc::new(audit),
        nodes: hub.tasks.nodes.clone(),
        delivery: hub.delivery.clone(),
        clock: hub.clock.clone(),
        tasks: hub.life.tasks.clone(),
    };
    hub.life.tasks.spawn_until_cancelled("node port", async move {
        let _ = link::serve(Arc::new(context), ReceiverStream::new(incoming)).await;
    });
    port
}

/// What a network does between a socket and a wire, until one of them has ended.
async fn pump(end: End<Bytes, Bytes>, io: DuplexStream, reset: CancellationToken) {
    let End { send, mut receive, .. } = end;
    let (mut read, mut write) = tokio::io::split(io);
    let out = async move {
        loop {
            let mut segment = BytesMut::with_capacity(SEGMENT_BYTES);
            match read.read_buf(&mut segment).await {
                Ok(n) if n > 0 => drop(send.send(segment.freeze())),
                _ => return,
            }
        }
    };
    let into = async move {
        while let Some(bytes) = receive.receive().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    tokio::select! {
        biased;
        () = reset.cancelled() => {}
        _ = async { tokio::join!(out, into) } => {}
    }
}

/// Dials the hub and says hello; what follows is carried in a task of the daemon's.
pub async fn connect(m: &Arc<Machine>, hub: &Hub, no: u64, hello: Hello, tasks: &Tasks) -> Dialed {
    let (carrier, port) = m.world.carrier.clone().zip(hub.port()).ok_or("refused")?;
    let (near, far) = Wire::make(&m.world, m.n, no);
    m.note_wire(&near.wire);
    let (own, near_io) = tokio::io::duplex(SOCKET_BYTES);
    let (served, far_io) = tokio::io::duplex(SOCKET_BYTES);
    let (reset_node, reset_hub) = (near.wire.reset_node.clone(), near.wire.reset_hub.clone());
    m.world.tasks.spawn_until_cancelled("wire", pump(near, near_io, reset_node));
    // With the hub's process its sockets are gone.
    hub.life.tasks.spawn_until_cancelled("wire", pump(far, far_io, reset_hub));
    let connection = Connection {
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
        exporter: [0; 32],
        certificate: Some(carrier.nodes[m.n - 1].1.clone()),
    };
    port.try_send(Ok(Socket { io: served, connection })).map_err(|_| "refused")?;
    let channel = node::tls::channel(own).await.map_err(|_| "closed")?;
    let attempts = hello.attempts.iter().map(|(t, a)| wire::KnownAttempt { task_id: t.to_string(), attempt: a.0, ended: false }).collect();
    let hello = wire::Hello {
        spool_id: hello.spool.to_string(),
        attempts,
        max_tasks: hello.max_tasks,
        last_link_session: hello.last_session,
        keeps: 0,
        closed: hello.closed.map_or("", mesh_core::ceiling::Closed::as_str).to_owned(),
        ..Default::default()
    };
    let capabilities = wire::Capabilities { os: "linux".into(), cpu_cores: 8, ..Default::default() };
    let registration = wire::RegistrationRequest { version: "sim".into(), capabilities: Some(capabilities), ..Default::default() };
    let greeted = Greeted::greet(channel, carrier.keys.hub, registration, hello).await.map_err(|e| refusal(&e))?;
    let marks = greeted.welcome.marks.iter().filter_map(|m| Some(((m.task_id.parse().ok()?, AttemptNo(m.attempt)), m.durable_seq)));
    let (session, hub_time, marks) = (greeted.link_session, greeted.welcome.hub_time_ms, marks.collect());
    let (end, other) = Wire::direct(&m.world, m.n, no);
    tasks.spawn_until_cancelled("carrier", carry(greeted, other));
    Ok((end, session, hub_time, marks))
}

fn refusal(e: &DialError) -> &'static str {
    match e {
        DialError::Goodbye { code, .. } => goodbye(code),
        DialError::Answer { status, .. } if says_revoked(status) => "revoked",
        DialError::Answer { .. } => "unavailable",
        _ => "closed",
    }
}
fn goodbye(code: &str) -> &'static str {
    ["revoked", "superseded", "shutdown", "not_recorded", "silent"].into_iter().find(|c| *c == code).unwrap_or("ended")
}

/// Between the daemon and its two streams, until one of the three has ended.
async fn carry(greeted: Greeted, end: HubEnd) {
    let HubEnd { send, mut receive, .. } = end;
    let Greeted { mut client, mut from_hub, task_frames, data_frames, data_source, .. } = greeted;
    let Ok(data) = client.data_stream(ReceiverStream::new(data_source)).await else { return };
    let mut data = data.into_inner();
    let up = async {
        while let Some(message) = receive.receive().await {
            let data = match message {
                ToHub::Frame(kind) => {
                    if task_frames.send(wire::NodeFrame { kind: Some(kind) }).await.is_err() {
                        return;
                    }
                    continue;
                }
                ToHub::Output((task, attempt), f) => node_data::Kind::Output(wire::OutputFrame {
                    task_id: task.to_string(),
                    attempt: attempt.0,
                    seq: f.seq,
                    t_ms: f.t_ms,
                    stream: if f.stream == hub_engine::records::Stream::Stdout { 1 } else { 2 },
                    data: f.data,
                }),
                ToHub::Pull(p) => node_data::Kind::Payload(p),
            };
            if data_frames.send(wire::NodeData { kind: Some(data) }).await.is_err() {
                return;
            }
        }
    };
    let frames = async {
        while let Ok(Some(frame)) = from_hub.message().await {
            let word = match frame.kind {
                Some(hub_frame::Kind::Heartbeat(_)) => ToNode::Heartbeat,
                Some(hub_frame::Kind::Envelope(e)) => ToNode::Envelope(e),
                Some(hub_frame::Kind::ResultAck(a)) => ToNode::ResultAck(a),
                Some(hub_frame::Kind::Goodbye(g)) => ToNode::Goodbye(goodbye(&g.code)),
                // A rotation is no part of what is simulated.
                Some(hub_frame::Kind::Welcome(_) | hub_frame::Kind::Bundle(_) | hub_frame::Kind::Renew(_)) | None => continue,
            };
            send.send(word);
        }
    };
    let answers = async {
        while let Ok(Some(answer)) = data.message().await {
            let word = match answer.kind {
                Some(hub_data::Kind::Output(a)) => match a.task_id.parse() {
                    Ok(task) => ToNode::OutputAck((task, AttemptNo(a.attempt)), a.durable_seq),
                    Err(_) => continue,
                },
                Some(hub_data::Kind::Payload(c)) => ToNode::Payload(c),
                None => continue,
            };
            send.send(word);
        }
    };
    tokio::select! {
        biased;
        () = frames => {}
        () = answers => {}
        () = up => {}
    }
}
