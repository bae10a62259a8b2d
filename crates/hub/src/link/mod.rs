//! The node port: TLS 1.3 for enrolment and links. The doors' HTTPS port takes them as well.
//!
//! ```text
//! accept ─ TLS ─► Enrolment.Enrol, Recover (the only calls without a certificate)
//!             └─► NodeLink.SyncConfiguration, TaskStream, DataStream, ReportHealth, Renew
//! ```

pub(crate) mod crowd;
mod data;
mod enrolment;
pub mod envelope;
mod node;
mod tasks;
pub mod tls;
mod wire;

use crate::keys::Keys;
use futures::Stream;
use hub_engine::audit::{self, Ending, Log};
use hub_engine::delivery::Delivery;
use hub_engine::nodes::Nodes;
use hub_engine::ports::Keyring;
use mesh_core::permission::Via;
use mesh_core::{Digest, NodeId, UnixMs};
use mesh_process::{SharedClock, Tasks};
use mesh_wire::limits;
use mesh_wire::node::enrolment_server::EnrolmentServer;
use mesh_wire::node::node_link_server::NodeLinkServer;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::server::Connected;
use tonic::{Request, Status};

/// The first word is what a node goes by: it recovers with its key.
const ROOT_RETIRED: &str = "certificate_expired: the root of this certificate was retired";

const PING_EVERY: Duration = Duration::from_secs(20);

/// What every handler on the node port needs.
pub struct LinkContext {
    pub keys: Arc<Keys>,
    pub nodes: Arc<Nodes>,
    pub audit: Arc<Log>,
    pub delivery: Arc<Delivery>,
    pub clock: SharedClock,
    pub tasks: Tasks,
}

/// Who is at the other end, as TLS has verified it.
#[derive(Debug, Clone)]
pub struct Peer {
    pub node: NodeId,
    pub spki: Digest,
    pub not_after: UnixMs,
    /// In DER.
    pub certificate: Arc<[u8]>,
}

impl LinkContext {
    /// A call of a machine that leaves an entry in the audit log.
    async fn audited<T>(&self, connection: &tls::Connection, work: impl Future<Output = hub_engine::Result<T>>) -> hub_engine::Result<T> {
        let via = Via { door: "node", address: Some(connection.address.ip()), request_id: None, device: None };
        audit::scope(&self.audit, via, work, Ending::of).await
    }
    /// The node behind a request: its certificate is valid now, and the registry knows it.
    async fn authenticate<T>(&self, request: &Request<T>) -> Result<(Peer, hub_engine::records::Node), Status> {
        self.identify(request).await.inspect_err(|refused| {
            if matches!(refused.code(), tonic::Code::Unauthenticated | tonic::Code::PermissionDenied) {
                metrics::counter!("cortex_auth_failures_total", "kind" => "node").increment(1);
            }
        })
    }
    async fn identify<T>(&self, request: &Request<T>) -> Result<(Peer, hub_engine::records::Node), Status> {
        let connection = request.extensions().get::<tls::Connection>().ok_or_else(|| Status::internal("no connection"))?;
        let der = connection.certificate.as_deref().ok_or_else(|| Status::unauthenticated("this call needs a node certificate"))?;
        let peer =
            tls::read_node_certificate(self.keys.hub, der).ok_or_else(|| Status::unauthenticated("not a node certificate of this hub"))?;
        // TLS checked the dates when the connection began; it may have lived long since.
        if peer.not_after <= self.clock.now_ms() {
            return Err(Status::unauthenticated("certificate_expired"));
        }
        if !self.keys.counts(der) {
            return Err(Status::unauthenticated(ROOT_RETIRED));
        }
        let node = self.nodes.authenticate(peer.node, &peer.spki).await.map_err(|e| wire::status(&e))?;
        Ok((peer, node))
    }
}

/// Serves links and enrolments, on connections that say by [`tls::Connection`] who is at their other end,
/// until the group ends.
pub async fn serve<I>(context: Arc<LinkContext>, accepted: impl Stream<Item = std::io::Result<I>>) -> Result<(), tonic::transport::Error>
where
    I: AsyncRead + AsyncWrite + Connected<ConnectInfo = tls::Connection> + Unpin + Send + 'static,
{
    let token = context.tasks.token();
    let link = NodeLinkServer::new(node::LinkService(context.clone()))
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let enrol = EnrolmentServer::new(enrolment::EnrolService::new(context)).max_decoding_message_size(64 << 10);
    tonic::transport::Server::builder()
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(16)
        .http2_max_header_list_size(16 << 10)
        // Whoever answers none of these is gone, whatever TCP believes.
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_EVERY))
        .add_service(link)
        .add_service(enrol)
        .serve_with_incoming_shutdown(accepted, token.cancelled_owned())
        .await
}
