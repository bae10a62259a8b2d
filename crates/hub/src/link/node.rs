//! The calls of an enrolled node.

use super::LinkContext;
use super::wire::{HubDatas, HubFrames, capabilities, certificate, csr_key, roots, status};
use hub_engine::links::Health;
use mesh_core::permission::Caller;
use mesh_wire::node as wire;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

pub struct LinkService(pub Arc<LinkContext>);

#[tonic::async_trait]
impl wire::node_link_server::NodeLink for LinkService {
    type TaskStreamStream = HubFrames;
    type DataStreamStream = HubDatas;

    async fn sync_configuration(&self, request: Request<wire::RegistrationRequest>) -> Result<Response<wire::SandboxPolicy>, Status> {
        let (peer, node) = self.0.authenticate(&request).await?;
        let r = request.into_inner();
        let caller = Caller::Node { node: peer.node, generation: node.generation };
        let capabilities = capabilities(r.capabilities.unwrap_or_default());
        let node = self.0.nodes.register(&caller, &r.version, capabilities).await.map_err(|e| status(&e))?;
        Ok(Response::new(wire::SandboxPolicy {
            mode: "permissive".into(),
            network: "full".into(),
            max_tasks: node.max_tasks,
            digest: self.0.delivery.pool.policy.to_vec(),
        }))
    }

    async fn task_stream(&self, request: Request<Streaming<wire::NodeFrame>>) -> Result<Response<HubFrames>, Status> {
        let (peer, node) = self.0.authenticate(&request).await?;
        super::tasks::open(self.0.clone(), peer, node, request.into_inner()).await.map(Response::new)
    }

    async fn data_stream(&self, request: Request<Streaming<wire::NodeData>>) -> Result<Response<HubDatas>, Status> {
        let (peer, _) = self.0.authenticate(&request).await?;
        // Bulk belongs to the link that the task stream opened.
        let link = self.0.delivery.links.get(peer.node).ok_or_else(|| Status::failed_precondition("open the task stream first"))?;
        let caller = Caller::Node { node: peer.node, generation: link.generation };
        Ok(Response::new(super::data::open(self.0.clone(), caller, link.cut, request.into_inner())))
    }

    async fn report_health(&self, request: Request<wire::HealthReport>) -> Result<Response<wire::HealthAck>, Status> {
        let (peer, node) = self.0.authenticate(&request).await?;
        let r = request.into_inner();
        let finite = |x: f64| if x.is_finite() { x.clamp(0.0, 1e6) } else { 0.0 };
        let health = Health {
            cpu_percent: finite(r.cpu_percent),
            memory_used: r.memory_used,
            memory_total: r.memory_total,
            disk_used: r.disk_used,
            disk_total: r.disk_total,
            load_1m: finite(r.load_1m),
            running: r.running,
            spool_bytes: r.spool_bytes,
            spool_limit: r.spool_limit,
        };
        let caller = Caller::Node { node: peer.node, generation: node.generation };
        if !r.ask_only {
            self.0.nodes.report_health(&caller, health).map_err(|e| status(&e))?;
        }
        let unschedulable = self.0.nodes.standing(&node).unschedulable.unwrap_or_default().to_owned();
        Ok(Response::new(wire::HealthAck { hub_time_ms: self.0.clock.now_ms(), unschedulable }))
    }

    async fn renew(&self, request: Request<wire::RenewRequest>) -> Result<Response<wire::CertificateReply>, Status> {
        let (peer, node) = self.0.authenticate(&request).await?;
        let connection = request.extensions().get::<super::tls::Connection>().cloned().ok_or_else(|| Status::internal("no connection"))?;
        let r = request.into_inner();
        let key = csr_key(&r.csr_der)?;
        let caller = Caller::Node { node: peer.node, generation: node.generation };
        let fresh =
            self.0.audited(&connection, self.0.nodes.renew(&caller, &key, r.counter, &roots(&r.roots))).await.map_err(|e| status(&e))?;
        tracing::info!(node = %peer.node, counter = fresh.counter, "node certificate renewed");
        Ok(Response::new(certificate(&self.0.keys, fresh)))
    }
}
