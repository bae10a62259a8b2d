//! A new certificate for one that has ended: this machine slept, or the hub was away, over its end. It is
//! asked for without a certificate; the identity key's signature, bound to this TLS channel, is the proof.

use super::connect::{DialError, in_time};
use super::time::NodeTime;
use crate::config::Resolved;
use crate::state::DataDir;
use crate::tls::{self, TlsError};
use mesh_core::enrol::{EXPORTER_LABEL, recover_bytes};
use mesh_process::entropy;
use mesh_wire::limits;
use mesh_wire::node::enrolment_client::EnrolmentClient;
use mesh_wire::node::{RecoverReply, RecoverRequest};
use std::time::Duration;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a try needs to know, copied so that it borrows nothing.
pub struct Recover {
    pub settings: Resolved,
    pub dir: DataDir,
    pub time: NodeTime,
    /// Of the certificate that is asked for. Asked again under the same one, the hub gives the same.
    pub counter: u64,
}

impl Recover {
    pub async fn run(self) -> Result<RecoverReply, DialError> {
        let identity = self.dir.identity()?;
        let s = &self.settings;
        let config = tls::client_config(&s.trust, None, self.time.clone())?;
        let stream = s.way.connect(&s.server_name, config).await?;
        let exporter = stream.get_ref().1.export_keying_material([0u8; 32], EXPORTER_LABEL, None).map_err(TlsError::Config)?;
        let nonce = entropy::bytes::<32>();
        let message = recover_bytes(s.hub, s.node, &exporter, &identity.spki_sha256(), self.counter, &nonce);
        let request = RecoverRequest {
            node_id: s.node.to_string(),
            csr_der: identity.csr()?,
            counter: self.counter,
            nonce: nonce.to_vec(),
            proof: identity.sign(&message)?,
            roots: s.trust.said_roots(),
        };
        let mut client = EnrolmentClient::new(tls::channel(stream).await?).max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
        let reply = in_time("recovering", ANSWER_TIMEOUT, client.recover(request)).await?.into_inner();
        // The hub is the pinned one: its time says whether what it gave is good now.
        self.time.welcome(reply.hub_time_ms);
        Ok(reply)
    }
}
