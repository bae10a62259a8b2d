//! Words of the engine into the link's messages and back.

use crate::keys::{Authority, Keys};
use futures::stream::BoxStream;
use hub_engine::records::NodeCertificate;
use mesh_core::Digest;
use mesh_core::bundle;
use mesh_core::capability::{Capabilities, Gpu};
use mesh_wire::node as wire;
use rcgen::{CertificateSigningRequestParams, PublicKeyData};
use tonic::Status;

pub type HubFrames = BoxStream<'static, Result<wire::HubFrame, Status>>;
pub type HubDatas = BoxStream<'static, Result<wire::HubData, Status>>;

/// Engine errors in gRPC's words.
pub fn status(error: &hub_engine::Error) -> Status {
    use hub_engine::Error as E;
    match error {
        E::Unauthenticated(m) => Status::unauthenticated(*m),
        E::Forbidden(m) => Status::permission_denied(m.clone()),
        E::NotFound(what) => Status::not_found(format!("no such {what}")),
        E::Conflict { code, detail } => Status::failed_precondition(format!("{code}: {detail}")),
        E::Invalid { detail, .. } => Status::invalid_argument(detail.clone()),
        E::NotYet(what) => Status::unimplemented(format!("{what} is not built yet")),
        e @ E::RateLimited { .. } => Status::resource_exhausted(e.to_string()),
        E::Unavailable { detail, .. } => Status::unavailable(detail.clone()),
        E::Store(e) => {
            tracing::error!(error = %e, source = ?e.source, "the store failed");
            Status::unavailable("the hub's store does not answer; try again")
        }
    }
}

pub fn bad_message(e: mesh_wire::convert::BadMessage) -> Status {
    Status::invalid_argument(e.to_string())
}

/// A CSR with one key and one URI takes a few hundred bytes.
const MAX_CSR_BYTES: usize = 8 << 10;

/// Takes the key out of a CSR whose own signature proves possession; all else in it is ignored.
pub fn csr_key(der: &[u8]) -> Result<Vec<u8>, Status> {
    if der.len() > MAX_CSR_BYTES {
        return Err(Status::invalid_argument("csr_der: too large"));
    }
    let csr = CertificateSigningRequestParams::from_der(&der.into())
        .map_err(|e| Status::invalid_argument(format!("csr_der: not a certificate request: {e}")))?;
    Ok(csr.public_key.subject_public_key_info())
}

pub fn certificate(keys: &Keys, c: NodeCertificate) -> wire::CertificateReply {
    let authority = keys.authority();
    let root_der = authority.issuer_of(&c.der).unwrap_or(authority.issuing()).root.clone();
    wire::CertificateReply { certificate_der: c.der, root_der, not_after_ms: c.not_after, counter: c.counter }
}

/// The bundle, signed by each key that the hub holds.
pub fn bundle(authority: &Authority) -> wire::SignedBundle {
    let (body, signatures) = authority.signed();
    let signatures = signatures.into_iter().map(|(key_id, signature)| wire::KeySignature { key_id, signature }).collect();
    wire::SignedBundle { body, signatures }
}

/// Roots that a node says it believes; what is no digest is none.
pub fn roots(said: &[Vec<u8>]) -> Vec<Digest> {
    said.iter().take(bundle::MOST).filter_map(|r| r.as_slice().try_into().ok()).collect()
}

pub fn capabilities(c: wire::Capabilities) -> Capabilities {
    Capabilities {
        os: c.os,
        arch: c.arch,
        kernel: c.kernel,
        hostname: c.hostname,
        cpu_model: c.cpu_model,
        cpu_cores: c.cpu_cores,
        memory_bytes: c.memory_bytes,
        disk_bytes: c.disk_bytes,
        runtimes: c.runtimes.into_iter().map(|r| (r.name, r.version)).collect(),
        skills: c.skills.into_iter().map(|s| (s.name, s.version)).collect(),
        gpus: c.gpus.into_iter().map(|g| Gpu { name: g.name, memory_bytes: g.memory_bytes }).collect(),
        sandbox: c.sandbox.into_iter().map(|s| (s.name, (s.works, s.detail))).collect(),
    }
}
