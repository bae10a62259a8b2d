//! Joining: a one-time invite becomes a certificate for a key that never leaves this machine.
//!
//! The secret itself is not sent: its signature binds hub, invite, this TLS channel (exporter), this
//! key and a nonce. A join that lost its answer is simply repeated; the key is the same, so the hub
//! gives the same certificate again.

use crate::config::{Invite, Settings};
use crate::link::time::NodeTime;
use crate::state::{DataDir, Identity, State, StateError};
use crate::tls::{self, TlsError};
use crate::trust::Trust;
use ed25519_dalek::{Signer, SigningKey};
use mesh_core::enrol::{EXPORTER_LABEL, parse_node_uri, proof_bytes};
use mesh_core::{HubId, NodeId};
use mesh_process::{SharedClock, entropy};
use mesh_wire::node::enrolment_client::EnrolmentClient;
use mesh_wire::node::{Capabilities, CertificateReply, EnrolRequest, RegistrationRequest};
use std::time::Duration;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(
        "this data folder ({folder}) is enrolled already, as node {node} of {hub}; run it with `cortex-node run`, or give another --data-dir to join a second time"
    )]
    Enrolled { folder: String, node: String, hub: String },
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the connection to the hub: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("a certificate request cannot be made: {0}")]
    Csr(#[from] rcgen::Error),
    /// The hub's own words.
    #[error("the hub refused: {0}")]
    Refused(String),
    #[error("the hub's answer cannot be used: {0}")]
    Answer(String),
}

/// What a certificate says, as far as a node must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before_ms: i64,
    pub not_after_ms: i64,
}

impl Validity {
    /// When to ask for the next one: two thirds of the life are over.
    pub fn renew_at_ms(&self) -> i64 {
        self.not_before_ms + (self.not_after_ms - self.not_before_ms) / 3 * 2
    }
}

/// Reads when a certificate begins and ends.
pub fn validity(certificate: &[u8]) -> Option<Validity> {
    let (_, c) = X509Certificate::from_der(certificate).ok()?;
    let v = c.validity();
    Some(Validity { not_before_ms: v.not_before.timestamp() * 1000, not_after_ms: v.not_after.timestamp() * 1000 })
}

/// Checks that a reply is a certificate for our key and name, by a root that is believed.
pub fn check_certificate(
    reply: &CertificateReply,
    hub: HubId,
    node: NodeId,
    identity: &Identity,
    trust: &Trust,
) -> Result<Validity, String> {
    let (_, c) = X509Certificate::from_der(&reply.certificate_der).map_err(|e| format!("no certificate: {e}"))?;
    if c.public_key().raw != identity.spki() {
        return Err("the certificate is for another key".into());
    }
    let names = c.subject_alternative_name().map_err(|e| e.to_string())?.ok_or("the certificate names nobody")?;
    let uris: Vec<&str> =
        names.value.general_names.iter().filter_map(|n| if let GeneralName::URI(u) = n { Some(*u) } else { None }).collect();
    if !matches!(uris.as_slice(), [u] if parse_node_uri(hub, u) == Some(node)) {
        return Err(format!("the certificate names {uris:?} and not node {node}"));
    }
    if !trust.believes(&reply.root_der) {
        return Err("the root in the answer is none that this node believes".into());
    }
    let (_, root) = X509Certificate::from_der(&reply.root_der).map_err(|e| format!("no root: {e}"))?;
    c.verify_signature(Some(root.public_key())).map_err(|_| "the certificate is not signed by the pinned root")?;
    validity(&reply.certificate_der).ok_or_else(|| "the certificate has no dates".into())
}

/// Joins and keeps what came back. The caller strikes the secret afterwards.
pub async fn join(
    dir: &DataDir,
    state: &State,
    invite: &Invite,
    capabilities: Capabilities,
    clock: SharedClock,
) -> Result<Settings, EnrolError> {
    // As many tasks at once as there are cores, when neither the invite nor the owner says a number.
    let cores = capabilities.cpu_cores.max(1);
    if let Some(s) = state.settings()? {
        return Err(EnrolError::Enrolled { folder: dir.path().display().to_string(), node: s.node_id, hub: s.hub_id });
    }
    let identity = dir.identity()?;
    let time = NodeTime::new(state.hub_time_ms()?, clock);
    let trust = Trust::of_invite(invite.ca_pin, invite.task_keys.clone());
    let config = tls::client_config(&trust, None, time)?;
    let stream = invite.way.connect(&invite.file.hub.server_name, config).await?;
    let exporter = stream.get_ref().1.export_keying_material([0u8; 32], EXPORTER_LABEL, None).map_err(TlsError::Config)?;
    let nonce = entropy::bytes::<32>();
    let message = proof_bytes(invite.hub, invite.invite, &exporter, &identity.spki_sha256(), &nonce);
    let request = EnrolRequest {
        invite_id: invite.invite.to_string(),
        csr_der: identity.csr()?,
        nonce: nonce.to_vec(),
        proof: SigningKey::from_bytes(&invite.seed).sign(&message).to_bytes().to_vec(),
        registration: Some(RegistrationRequest {
            version: env!("CARGO_PKG_VERSION").into(),
            capabilities: Some(capabilities),
            suggested_name: invite.file.node.name.clone().unwrap_or_default(),
        }),
        roots: trust.said_roots(),
    };
    let channel = tls::channel(stream).await?;
    let mut client = EnrolmentClient::new(channel).max_decoding_message_size(mesh_wire::limits::MAX_MESSAGE_BYTES);
    let reply = tokio::time::timeout(ANSWER_TIMEOUT, client.enrol(request))
        .await
        .map_err(|_| EnrolError::Refused("no answer in time; join again with the same file".into()))?
        .map_err(|s| EnrolError::Refused(words(&s)))?
        .into_inner();
    let certificate = reply.certificate.ok_or_else(|| EnrolError::Answer("it holds no certificate".into()))?;
    let node: NodeId = reply.node_id.parse().map_err(|e| EnrolError::Answer(format!("{e}")))?;
    check_certificate(&certificate, invite.hub, node, &identity, &trust).map_err(EnrolError::Answer)?;
    let file = &invite.file;
    let settings = Settings {
        hub_id: file.hub.id.clone(),
        grpc: file.hub.grpc.clone(),
        also: file.hub.also.clone(),
        url: file.hub.url.clone(),
        server_name: file.hub.server_name.clone(),
        ca_pin: file.ca_pin.clone(),
        task_keys: file.task_keys.clone(),
        node_id: reply.node_id,
        node_name: reply.node_name,
        labels: file.node.labels.clone(),
        workspace_root: file.node.workspace_root.clone(),
        max_tasks: file.node.max_tasks.unwrap_or(cores),
    };
    dir.store_certificate(&certificate.certificate_der, &certificate.root_der)?;
    state.enrolled(&settings, reply.hub_time_ms, certificate.counter)?;
    Ok(settings)
}

/// A status as a person should read it: the hub's sentence, else the code and what lies beneath it.
pub fn words(s: &tonic::Status) -> String {
    let mut text = if s.message().is_empty() { s.code().to_string() } else { s.message().to_owned() };
    let mut source = std::error::Error::source(s);
    while let Some(e) = source {
        let more = e.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = e.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_at_two_thirds() {
        let v = Validity { not_before_ms: 1_000, not_after_ms: 31_000 };
        assert_eq!(v.renew_at_ms(), 21_000);
    }
}
