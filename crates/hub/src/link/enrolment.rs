//! The calls that answer without a certificate.

use super::wire::{bad_message, capabilities, certificate, csr_key, roots, status};
use super::{LinkContext, tls};
use hub_engine::Error;
use hub_engine::buckets::{Buckets, Rate};
use hub_engine::nodes::{Enrolment, Recovery};
use hub_engine::throttle::network;
use mesh_wire::convert::{fixed, id};
use mesh_wire::node as wire;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

/// Recoveries that are looked at together: after a long outage all nodes come, and strangers may too.
const RECOVERIES_AT_ONCE: usize = 16;

/// Refused enrolments and recoveries of one network: each costs signatures and looks at the store.
const REFUSED_A_MINUTE: u64 = 60;
/// More than a network can have under way, since each counts as refused until it has been looked at.
const REFUSED_AT_ONCE: u64 = 128;

pub struct EnrolService {
    context: Arc<LinkContext>,
    together: Semaphore,
    refused: Buckets<IpAddr>,
}

impl EnrolService {
    pub fn new(context: Arc<LinkContext>) -> Self {
        let refused = Buckets::new(Rate::new(Duration::from_secs(60), REFUSED_A_MINUTE, REFUSED_AT_ONCE));
        Self { context, together: Semaphore::new(RECOVERIES_AT_ONCE), refused }
    }

    /// Counts a try of its network; what comes of it says whether it stays counted.
    fn admit(&self, address: IpAddr) -> Result<IpAddr, Status> {
        let network = network(address);
        self.refused.take(network, self.context.clock.steady()).map(|()| network).map_err(|wait| {
            metrics::counter!("cortex_enrolments_throttled_total").increment(1);
            status(&Error::RateLimited { detail: "too many refused enrolments from this address", wait })
        })
    }
}

#[tonic::async_trait]
impl wire::enrolment_server::Enrolment for EnrolService {
    async fn enrol(&self, request: Request<wire::EnrolRequest>) -> Result<Response<wire::EnrolReply>, Status> {
        let context = &self.context;
        let connection = request.extensions().get::<tls::Connection>().cloned().ok_or_else(|| Status::internal("no connection"))?;
        let network = self.admit(connection.address.ip())?;
        let r = request.into_inner();
        let registration = r.registration.unwrap_or_default();
        let enrolment = Enrolment {
            invite: id("invite_id", &r.invite_id).map_err(bad_message)?,
            spki_der: csr_key(&r.csr_der)?,
            nonce: fixed("nonce", &r.nonce).map_err(bad_message)?,
            proof: r.proof,
            exporter: connection.exporter,
            version: registration.version,
            capabilities: capabilities(registration.capabilities.unwrap_or_default()),
            suggested_name: registration.suggested_name,
            roots: roots(&r.roots),
        };
        let invite = enrolment.invite;
        let node = context.audited(&connection, context.nodes.enrol(enrolment)).await.map_err(|e| {
            tracing::warn!(%invite, address = %connection.address, error = %e, "an enrolment was refused");
            status(&e)
        })?;
        self.refused.give_back(&network);
        Ok(Response::new(wire::EnrolReply {
            node_id: node.id.to_string(),
            node_name: node.name,
            certificate: Some(certificate(&context.keys, node.certificate)),
            hub_time_ms: context.clock.anchored_ms(),
        }))
    }

    async fn recover(&self, request: Request<wire::RecoverRequest>) -> Result<Response<wire::RecoverReply>, Status> {
        let context = &self.context;
        let connection = request.extensions().get::<tls::Connection>().cloned().ok_or_else(|| Status::internal("no connection"))?;
        let network = self.admit(connection.address.ip())?;
        let r = request.into_inner();
        let recovery = Recovery {
            node: id("node_id", &r.node_id).map_err(bad_message)?,
            spki_der: csr_key(&r.csr_der)?,
            counter: r.counter,
            nonce: fixed("nonce", &r.nonce).map_err(bad_message)?,
            proof: r.proof,
            exporter: connection.exporter,
            roots: roots(&r.roots),
        };
        // Who waits too long is cut with the connection.
        let _place = self.together.acquire().await.map_err(|_| Status::unavailable("the hub is stopping"))?;
        let node = recovery.node;
        let fresh = context.audited(&connection, context.nodes.recover(recovery)).await.map_err(|e| {
            metrics::counter!("cortex_auth_failures_total", "kind" => "node").increment(1);
            tracing::warn!(%node, address = %connection.address, error = %e, "a recovery was refused");
            status(&e)
        })?;
        self.refused.give_back(&network);
        Ok(Response::new(wire::RecoverReply {
            certificate: Some(certificate(&context.keys, fresh)),
            hub_time_ms: context.clock.anchored_ms(),
        }))
    }
}
