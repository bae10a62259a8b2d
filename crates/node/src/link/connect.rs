//! One try to bring a link up: TLS, registration, hello, welcome, the second stream.

use super::time::NodeTime;
use crate::config::Resolved;
use crate::enrolment::words;
use crate::state::{DataDir, Identity, StateError};
use crate::tls::{self, ClientCertificate, TlsError};
use mesh_core::HubId;
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{
    Capabilities, Hello, HubFrame, NodeData, NodeFrame, RegistrationRequest, SandboxPolicy, Welcome, hub_frame, node_frame,
};
use mesh_wire::{convert, limits};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Control frames given to the transport ahead of what it has sent.
const TASK_FRAMES: usize = 32;
/// Output frames given to the transport ahead: beyond it HTTP/2's flow control rules.
const DATA_FRAMES: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the connection to the hub: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("{what}: {}", words(.status))]
    Answer {
        what: &'static str,
        #[source]
        status: Box<Status>,
    },
    #[error("{0}: no answer in time")]
    Timeout(&'static str),
    #[error("the hub at this address is {0}, not ours")]
    OtherHub(String),
    #[error("the hub closed the stream before its welcome")]
    NoWelcome,
    #[error("the hub said goodbye before its welcome: {code} {detail}")]
    Goodbye { code: String, detail: String },
    #[error("the hub has retired the root of this node's certificate")]
    RootRetired,
    #[error("a certificate request cannot be made: {0}")]
    Csr(#[from] rcgen::Error),
    #[error("the hub's welcome: {0}")]
    Welcome(#[from] convert::BadMessage),
}

/// An answer by which a hub says that this node is no longer one of its own.
pub fn says_revoked(s: &Status) -> bool {
    matches!(s.code(), Code::Unauthenticated | Code::PermissionDenied) && s.message().to_lowercase().contains("revoked")
}

/// The hub's words when another machine uses this identity.
pub fn says_superseded(s: &Status) -> Option<&str> {
    if s.code() == Code::FailedPrecondition { s.message().strip_prefix("superseded: ") } else { None }
}

impl DialError {
    /// The hub, or its TLS, says that this certificate counts no more: it has ended, or its root was retired.
    pub fn certificate_ended(&self) -> bool {
        if matches!(self, Self::RootRetired) {
            return true;
        }
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(e) = source {
            text.push_str(&e.to_string());
            source = e.source();
        }
        text.retain(char::is_alphabetic);
        let text = text.to_lowercase();
        text.contains("certificateexpired") || text.contains("unknownca")
    }
    /// The certificate ended so long ago that its key does not count any more.
    pub fn too_late(&self) -> bool {
        matches!(self, Self::Answer { status, .. }
            if status.code() == Code::FailedPrecondition && status.message().starts_with("recover_too_late"))
    }
    pub fn superseded(&self) -> Option<&str> {
        match self {
            Self::Answer { status, .. } => says_superseded(status),
            _ => None,
        }
    }
    pub fn revoked(&self) -> bool {
        match self {
            Self::Answer { status, .. } => says_revoked(status),
            Self::Goodbye { code, .. } => code == super::GOODBYE_REVOKED,
            _ => false,
        }
    }
}

/// What a try needs to know, copied so that it borrows nothing.
#[derive(Clone)]
pub struct Dial {
    pub settings: Resolved,
    pub dir: DataDir,
    pub time: NodeTime,
    pub capabilities: Capabilities,
    pub hello: Hello,
}

/// A link that stands; its streams are not read yet.
pub struct Dialed {
    pub client: NodeLinkClient<Channel>,
    pub policy: SandboxPolicy,
    pub welcome: Welcome,
    pub link_session: [u8; 16],
    pub from_hub: Streaming<HubFrame>,
    pub task_frames: mpsc::Sender<NodeFrame>,
    pub data_frames: mpsc::Sender<NodeData>,
    /// To be given to the second stream's call.
    pub data_source: mpsc::Receiver<NodeData>,
}

pub(super) async fn in_time<T>(what: &'static str, limit: Duration, work: impl Future<Output = Result<T, Status>>) -> Result<T, DialError> {
    match tokio::time::timeout(limit, work).await {
        Err(_) => Err(DialError::Timeout(what)),
        Ok(Err(status)) => Err(DialError::Answer { what, status: Box::new(status) }),
        Ok(Ok(v)) => Ok(v),
    }
}

impl Dial {
    pub async fn run(self) -> Result<Dialed, DialError> {
        let identity: Identity = self.dir.identity()?;
        let (certificate, root) = self.dir.certificates()?;
        let own_root = tls::spki_sha256(&root);
        let own = ClientCertificate { certificate, root, key: identity.private() };
        let config = tls::client_config(&self.settings.trust, Some(own), self.time.clone())?;
        let stream = self.settings.way.connect(&self.settings.server_name, config).await?;
        // A hub shows each root that it takes certificates of. Its refusal could be lost with the connection.
        let shown: Vec<_> = stream.get_ref().1.peer_certificates().unwrap_or_default().iter().map(|c| tls::spki_sha256(c)).collect();
        if !shown.contains(&own_root) && self.settings.trust.pins.iter().any(|pin| shown.contains(&Some(*pin))) {
            return Err(DialError::RootRetired);
        }
        let channel = tls::channel(stream).await?;
        let registration = RegistrationRequest {
            version: env!("CARGO_PKG_VERSION").into(),
            capabilities: Some(self.capabilities),
            suggested_name: self.settings.node_name.clone(),
        };
        let dialed = Dialed::greet(channel, self.settings.hub, registration, self.hello).await?;
        self.time.welcome(dialed.welcome.hub_time_ms);
        Ok(dialed)
    }
}

impl Dialed {
    /// Registers over a connection that stands, and says hello.
    pub async fn greet(channel: Channel, hub: HubId, registration: RegistrationRequest, hello: Hello) -> Result<Self, DialError> {
        let mut client = NodeLinkClient::new(channel)
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
        let policy = in_time("registering", ANSWER_TIMEOUT, client.sync_configuration(registration)).await?.into_inner();

        let (task_frames, outgoing) = mpsc::channel(TASK_FRAMES);
        // The queue is new and empty: this cannot fail.
        let _ = task_frames.try_send(NodeFrame { kind: Some(node_frame::Kind::Hello(hello)) });
        let greeting = async {
            let mut from_hub = client.task_stream(ReceiverStream::new(outgoing)).await?.into_inner();
            let first = from_hub.message().await?;
            Ok((from_hub, first))
        };
        let (from_hub, first) = in_time("the hello", ANSWER_TIMEOUT, greeting).await?;
        let welcome = match first.and_then(|f| f.kind) {
            Some(hub_frame::Kind::Welcome(w)) => w,
            Some(hub_frame::Kind::Goodbye(g)) => return Err(DialError::Goodbye { code: g.code, detail: g.detail }),
            _ => return Err(DialError::NoWelcome),
        };
        if welcome.hub_id != hub.to_string() {
            return Err(DialError::OtherHub(welcome.hub_id));
        }
        let link_session = convert::fixed("link_session", &welcome.link_session)?;
        let (data_frames, data_source) = mpsc::channel(DATA_FRAMES);
        Ok(Self { client, policy, welcome, link_session, from_hub, task_frames, data_frames, data_source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revocation_is_told_from_other_refusals() {
        assert!(says_revoked(&Status::permission_denied("this node was revoked")));
        assert!(says_revoked(&Status::unauthenticated("Revoked")));
        assert!(!says_revoked(&Status::unavailable("revoked")));
        assert!(!says_revoked(&Status::unauthenticated("no client certificate")));
        assert!(DialError::Goodbye { code: "revoked".into(), detail: String::new() }.revoked());
        assert!(!DialError::NoWelcome.revoked());
    }

    #[test]
    fn an_ended_certificate_is_told_from_other_refusals() {
        let answer = |s: Status| DialError::Answer { what: "registering", status: Box::new(s) };
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
        let broken = std::io::Error::new(std::io::ErrorKind::InvalidData, alert);
        assert!(DialError::Tls(TlsError::Handshake { address: "a".into(), source: broken }).certificate_ended());
        let alert = rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA);
        let broken = std::io::Error::new(std::io::ErrorKind::InvalidData, alert);
        assert!(DialError::Tls(TlsError::Handshake { address: "a".into(), source: broken }).certificate_ended(), "a retired root");
        assert!(answer(Status::unauthenticated("certificate_expired")).certificate_ended());
        assert!(!answer(Status::unauthenticated("the certificate is not for this node's key")).certificate_ended());
        let late = Status::failed_precondition("recover_too_late: the certificate ended");
        assert!(answer(late.clone()).too_late() && !answer(late).certificate_ended());
        assert!(!answer(Status::unavailable("recover_too_late")).too_late());
    }
    #[test]
    fn another_machine_is_told_from_other_refusals() {
        assert_eq!(says_superseded(&Status::failed_precondition("superseded: two machines")), Some("two machines"));
        assert_eq!(says_superseded(&Status::failed_precondition("open the task stream first")), None);
        assert_eq!(says_superseded(&Status::unavailable("superseded: x")), None);
    }
}
