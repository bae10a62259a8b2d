//! The link's life: dialling, welcome, loss, goodbye, renewal.

use super::{CALL_TIMEOUT, EXPIRED_WAIT, Ending, Engine, GOOD_LINK, LAST_WORD, News, RENEW_RETRY, REPEAT, SUPERSEDED_WAIT, Up, key, tell};
use crate::enrolment::{self, words};
use crate::link::ahead;
use crate::link::connect::{Dial, DialError, Dialed, says_revoked, says_superseded};
use crate::link::orders::{Checker, Key, Rejected, RejectionWindow};
use crate::link::recover::Recover;
use crate::link::{GOODBYE_CERTIFICATE_EXPIRED, GOODBYE_REVOKED, GOODBYE_SUPERSEDED};
use crate::trust::Told;
use mesh_core::ceiling::Closed;
use mesh_process::{Tasks, entropy};
use mesh_wire::convert;
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{self as wire, CertificateReply, Goodbye, HubFrame, NodeData, RecoverReply, hub_data, hub_frame, node_frame};
use node_warden::SPOOL_NODE_BYTES as SPOOL_LIMIT;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status as Refusal, Streaming};

impl Engine {
    pub(super) fn dial(&mut self) {
        let Some(spool) = self.spool else { return };
        if self.dialling.is_some() || !matches!(self.ending, Ending::No) {
            return;
        }
        let no = self.next_no;
        self.next_no += 1;
        self.dialling = Some(no);
        if self.up.is_none() {
            self.link_state("connecting", "");
        }
        let counts = self.p.time.for_tls() < self.p.certificate.not_after_ms && self.root_is_believed();
        if self.up.is_none() && (self.certificate_ended || !counts) {
            return self.recover(no);
        }
        self.hello_told = self.standing();
        let dial = Dial {
            settings: self.p.settings.clone(),
            dir: self.p.dir.clone(),
            time: self.p.time.clone(),
            capabilities: self.p.capabilities.clone(),
            hello: wire::Hello {
                spool_id: spool.to_string(),
                attempts: self.attempts.known(),
                max_tasks: self.hello_told.0,
                keeps: ahead::MOST as u32,
                last_link_session: self.link_session.clone(),
                closed: self.hello_told.1.map_or("", Closed::as_str).to_owned(),
                bundle_seq: self.p.settings.trust.seq,
                task_keys: self.p.settings.trust.said_keys(),
            },
        };
        let news = self.news.clone();
        self.p.tasks.spawn_until_cancelled("dial", async move {
            let result = dial.run().await;
            let _ = news.send((no, News::Dialed(Box::new(result)))).await;
        });
    }

    /// Asks for a new certificate, to link with it then.
    fn recover(&mut self, no: u64) {
        let counter = match self.p.state.counter() {
            Ok(c) => c + 1,
            Err(e) => {
                self.dialling = None;
                return self.lost(&e.to_string(), true);
            }
        };
        let (settings, dir, time) = (self.p.settings.clone(), self.p.dir.clone(), self.p.time.clone());
        let recover = Recover { settings, dir, time, counter };
        let news = self.news.clone();
        self.p.tasks.spawn_until_cancelled("recover", async move {
            let result = recover.run().await;
            let _ = news.send((no, News::Recovered(Box::new(result)))).await;
        });
    }

    fn on_recovered(&mut self, result: Result<RecoverReply, DialError>) {
        // A certificate that seems good again is tried first.
        self.certificate_ended = false;
        let reply = match result {
            Ok(r) => r,
            Err(e) if e.revoked() => return self.revoked(&e.to_string()),
            Err(e) if e.too_late() => return self.expired(),
            Err(e) => return self.lost(&format!("the certificate of this node has ended; {e}"), true),
        };
        let kept = reply.certificate.as_ref().is_some_and(|c| self.keep_certificate(c));
        if !kept {
            return self.lost("the hub's answer to a recovery cannot be used", true);
        }
        if self.p.time.for_tls() >= self.p.certificate.not_after_ms {
            // The answer to a request of long ago: the next one brings a fresh certificate.
            return self.lost("the certificate that the hub has kept for this node has ended too", true);
        }
        self.dial();
    }

    fn expired(&mut self) {
        let folder = self.p.dir.path().display();
        let text = format!(
            "the certificate ended more than 30 days ago: `cortex-node stop`, take {folder} away and join anew with a fresh invite; running tasks go on until then"
        );
        tracing::error!("{text}");
        self.link_state("expired", &text);
        self.dial_later(EXPIRED_WAIT);
    }

    pub(super) fn dial_later(&mut self, wait: Duration) {
        self.dial_due = Some(self.now() + wait);
    }

    /// The link is gone or was not made: say why, and when the next try comes.
    pub(super) fn lost(&mut self, why: &str, wait_by_backoff: bool) {
        if let Some(up) = &self.up
            && self.now().saturating_sub(up.since) >= GOOD_LINK
        {
            self.backoff.reset();
        }
        self.drop_link();
        if self.dialling.is_some() {
            // The successor is on its way already.
            return;
        }
        let wait = if wait_by_backoff { self.backoff.next(self.now(), u64::from_be_bytes(entropy::bytes())) } else { Duration::ZERO };
        tracing::warn!(reason = why, wait_ms = wait.as_millis() as u64, "link down");
        self.link_state("waiting", why);
        self.dial_later(wait);
    }

    pub(super) fn drop_link(&mut self) {
        if let Some(up) = self.up.take() {
            up.readers.token().cancel();
            // Calls of this link ended with it.
            self.renewing = false;
            self.pulls.clear();
            self.ahead.clear();
            self.store_time();
        }
    }

    pub(super) fn on_news(&mut self, no: u64, news: News) {
        match news {
            News::Dialed(_) | News::Recovered(_) if self.dialling != Some(no) => return,
            News::Dialed(result) => {
                self.dialling = None;
                return self.on_dialed(no, *result);
            }
            News::Recovered(result) => {
                self.dialling = None;
                return self.on_recovered(*result);
            }
            _ => {}
        }
        let now = self.now();
        // What an older link still says is of no interest.
        let Some(up) = self.up.as_mut().filter(|u| u.no == no) else { return };
        match news {
            News::Dialed(_) | News::Recovered(_) => {}
            News::Frame(frame) => {
                up.heard = now;
                match frame.kind {
                    Some(hub_frame::Kind::Heartbeat(h)) => up.hub_sent = (h.sent_ms, now),
                    Some(hub_frame::Kind::Envelope(e)) => self.on_envelope(&e),
                    Some(hub_frame::Kind::ResultAck(a)) => self.on_result_ack(&a),
                    Some(hub_frame::Kind::Bundle(b)) => self.on_bundle(&b),
                    // At once, also when the last try went down with its link.
                    Some(hub_frame::Kind::Renew(_)) => (self.renew_asked, self.renew_retry) = (true, Duration::ZERO),
                    Some(hub_frame::Kind::Goodbye(g)) => self.on_goodbye(g),
                    Some(hub_frame::Kind::Welcome(_)) | None => {}
                }
            }
            News::Data(data) => match data.kind {
                Some(hub_data::Kind::Output(a)) => {
                    if let Some(key) = key(&a.task_id, a.attempt) {
                        self.outflow.acked(key, a.durable_seq);
                        self.free();
                        self.tell(&key);
                    }
                }
                Some(hub_data::Kind::Payload(c)) => self.on_payload(c),
                None => {}
            },
            News::Closed(refusal) => match refusal {
                Some(r) if says_revoked(&r) => self.revoked(&words(&r)),
                Some(r) => match says_superseded(&r) {
                    // The second stream may hear it before the first one's goodbye comes.
                    Some(why) => self.on_goodbye(Goodbye { code: GOODBYE_SUPERSEDED.into(), detail: why.into() }),
                    None => self.lost(&format!("the stream broke: {}", words(&r)), true),
                },
                None => self.lost("the hub closed the stream", true),
            },
            News::Renewed(result) => self.on_renewed(result),
            News::Health(ack, report) => {
                self.status_stale = true;
                // Its owner's word was first, and the hub may not have heard it yet.
                self.status.unschedulable = self.owner.closed().map_or(ack.unschedulable, |c| c.as_str().into());
                (self.status.spool_bytes, self.status.spool_limit) = (report.spool_bytes, report.spool_limit);
                // To the second, so that a clock that is right does not change the file.
                let skew = self.p.time.now().map(|hub| (self.p.clock.now_ms() - hub) / 1000);
                self.status.clock_skew_secs = skew.unwrap_or(0);
            }
        }
    }

    fn on_dialed(&mut self, no: u64, result: Result<Dialed, DialError>) {
        let swap = std::mem::take(&mut self.swapping);
        let d = match result {
            Ok(d) => d,
            Err(e) if e.revoked() => return self.revoked(&e.to_string()),
            // The old link is still there: let it be, and try the swap with the next loss.
            Err(e) if self.up.is_some() => return tracing::warn!(error = %e, "the link under the new certificate was not made"),
            Err(DialError::Goodbye { code, detail }) => return self.on_goodbye(Goodbye { code, detail }),
            Err(e) => {
                self.certificate_ended = e.certificate_ended();
                return match e.superseded() {
                    Some(words) => self.superseded(words),
                    None => self.lost(&e.to_string(), true),
                };
            }
        };
        if !matches!(self.ending, Ending::No) {
            return;
        }
        self.drop_link();
        let now = self.now();
        let readers = self.p.tasks.child();
        self.spawn_readers(no, &readers, d.client.clone(), d.from_hub, d.data_source);
        let s = &self.p.settings;
        self.link_session = d.link_session.to_vec();
        let checker = Checker::new(s.hub, s.node, self.p.identity.spki_sha256(), s.trust.task_keys.clone(), d.link_session);
        let policy_problem = (d.policy.mode != "permissive" || d.policy.network != "full")
            .then(|| format!("sandbox {:?} with network {:?} is not built on this node", d.policy.mode, d.policy.network));
        self.up = Some(Up {
            no,
            readers,
            client: d.client,
            task_frames: d.task_frames,
            data_frames: d.data_frames,
            checker,
            rejections: RejectionWindow::default(),
            policy_problem,
            told: self.hello_told,
            heartbeat: None,
            control: VecDeque::new(),
            requests: VecDeque::new(),
            since: now,
            heard: now,
            heartbeat_due: now,
            heartbeat_seq: 0,
            hub_sent: (0, now),
            health_due: now,
            repeat_due: now + REPEAT,
        });
        // Before anything else of this link is read: its first order may be by a new key.
        if let Some(bundle) = &d.welcome.bundle {
            self.on_bundle(bundle);
        }
        let marks = d.welcome.marks.iter().filter_map(|m| Some((key(&m.task_id, m.attempt)?, m.durable_seq)));
        let marks: BTreeMap<Key, u64> = marks.collect();
        self.outflow.relink(&marks);
        self.attempts.relink();
        self.tell_all();
        self.dial_due = None;
        self.link_state("up", "");
        self.store_welcome();
        tracing::info!(generation = d.welcome.generation, renewed = swap, "link up");
        if !swap {
            let s = &self.p.settings;
            tell(&format!("link up: node {} ({}) on hub {}", s.node_name, s.node, s.hub));
        }
    }

    fn spawn_readers(
        &self,
        no: u64,
        readers: &Tasks,
        mut client: NodeLinkClient<Channel>,
        mut from_hub: Streaming<HubFrame>,
        data_source: mpsc::Receiver<NodeData>,
    ) {
        let news = self.news.clone();
        readers.spawn_until_cancelled("task stream", async move {
            let end = loop {
                match from_hub.message().await {
                    Ok(Some(f)) => {
                        if news.send((no, News::Frame(f))).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break None,
                    Err(e) => break Some(e),
                }
            };
            let _ = news.send((no, News::Closed(end))).await;
        });
        let news = self.news.clone();
        readers.spawn_until_cancelled("data stream", async move {
            let read = async {
                let mut from_hub = client.data_stream(ReceiverStream::new(data_source)).await?.into_inner();
                while let Some(d) = from_hub.message().await? {
                    if news.send((no, News::Data(d))).await.is_err() {
                        break;
                    }
                }
                Ok(())
            };
            let end: Result<(), Refusal> = read.await;
            if end.is_ok() {
                // The link's end, and why, is told on the other stream.
                tokio::time::sleep(LAST_WORD).await;
            }
            let _ = news.send((no, News::Closed(end.err()))).await;
        });
    }

    /// Stored before it is believed, and believed before it is acknowledged.
    fn on_bundle(&mut self, told: &wire::SignedBundle) {
        let trust = match self.p.settings.trust.judge(self.p.settings.hub, told) {
            Ok(Told::Newer(trust)) => trust,
            Ok(Told::Known) => return self.acknowledge_bundle(),
            Err(problem) => {
                let detail = problem.to_string();
                return self.reject(Rejected { seq: 0, code: "bad_bundle", detail });
            }
        };
        if let Err(error) = self.p.state.set_trust(&trust) {
            // Not acknowledged: the next link brings it again.
            return tracing::error!(%error, "the hub's trust bundle cannot be stored");
        }
        tracing::info!(seq = trust.seq, roots = trust.pins.len(), keys = trust.task_keys.len(), "a new trust bundle");
        if let Some(up) = &mut self.up {
            up.checker.pinned.clone_from(&trust.task_keys);
        }
        self.p.settings.trust = trust;
        self.acknowledge_bundle();
    }

    fn acknowledge_bundle(&mut self) {
        let seq = self.p.settings.trust.seq;
        if let Some(up) = &mut self.up {
            up.control.push_back(node_frame::Kind::Bundle(wire::BundleAck { seq }));
        }
    }

    /// A certificate by a root that was retired is none any more.
    fn root_is_believed(&self) -> bool {
        // What cannot be read is told when it is needed.
        self.p.dir.certificates().map_or(true, |(_, root)| self.p.settings.trust.believes(&root))
    }

    pub(super) fn on_goodbye(&mut self, g: Goodbye) {
        match g.code.as_str() {
            GOODBYE_REVOKED => self.revoked(if g.detail.is_empty() { "revoked" } else { &g.detail }),
            // Our own newer link took the place of this one.
            GOODBYE_SUPERSEDED if self.swapping => self.drop_link(),
            GOODBYE_SUPERSEDED => self.superseded(&g.detail),
            GOODBYE_CERTIFICATE_EXPIRED => {
                self.certificate_ended = true;
                self.lost("the certificate of this link has ended", false);
            }
            code => self.lost(&format!("the hub said goodbye: {code} {}", g.detail), true),
        }
    }

    /// Another machine linked with this node's identity.
    fn superseded(&mut self, words: &str) {
        self.drop_link();
        tracing::warn!(wait_s = SUPERSEDED_WAIT.as_secs(), words, "superseded: another machine uses this node's identity; waiting");
        let detail = "another machine uses this node's identity; the next try comes in 5 minutes";
        self.link_state("superseded", &if words.is_empty() { detail.to_owned() } else { format!("{detail} ({words})") });
        self.dial_later(SUPERSEDED_WAIT);
    }

    pub(super) fn report_health(&mut self) {
        let running = self.attempts.running().count() as u32;
        let report = self.health.sample(running);
        let Some(up) = &self.up else { return };
        let (no, mut client, news) = (up.no, up.client.clone(), self.news.clone());
        let dir = self.p.dir.path().to_owned();
        up.readers.spawn_until_cancelled("health", async move {
            let spool_bytes = tokio::task::spawn_blocking(move || node_warden::spool::used(&dir)).await.unwrap_or(0);
            let report = wire::HealthReport { spool_bytes, spool_limit: SPOOL_LIMIT, ..report };
            match tokio::time::timeout(CALL_TIMEOUT, client.report_health(report)).await {
                Ok(Ok(ack)) => drop(news.send((no, News::Health(ack.into_inner(), report))).await),
                Ok(Err(e)) => tracing::debug!(error = %words(&e), "health was not taken"),
                Err(_) => {}
            }
        });
    }

    pub(super) fn renew(&mut self, now: Duration) {
        let Some(node_now) = self.p.time.now() else { return };
        if self.renewing || now < self.renew_retry || (!self.renew_asked && node_now < self.p.certificate.renew_at_ms()) {
            return;
        }
        self.renew_retry = now + RENEW_RETRY;
        let request = match (self.p.identity.csr(), self.p.state.counter()) {
            (Ok(csr_der), Ok(counter)) => wire::RenewRequest { csr_der, counter: counter + 1, roots: self.p.settings.trust.said_roots() },
            (Err(e), _) => return tracing::error!(error = %e, "no certificate request"),
            (_, Err(e)) => return tracing::error!(error = %e, "no renewal counter"),
        };
        let Some(up) = &self.up else { return };
        self.renewing = true;
        let (no, mut client, news) = (up.no, up.client.clone(), self.news.clone());
        up.readers.spawn_until_cancelled("renew", async move {
            let result = match tokio::time::timeout(CALL_TIMEOUT, client.renew(request)).await {
                Ok(r) => r.map(tonic::Response::into_inner),
                Err(_) => Err(Refusal::deadline_exceeded("no answer in time")),
            };
            let _ = news.send((no, News::Renewed(result))).await;
        });
    }

    fn on_renewed(&mut self, result: Result<CertificateReply, Refusal>) {
        self.renewing = false;
        let reply = match result {
            Ok(r) => r,
            Err(e) if says_revoked(&e) => return self.revoked(&words(&e)),
            Err(e) => return tracing::warn!(error = %words(&e), "the certificate was not renewed; trying again in a minute"),
        };
        if self.keep_certificate(&reply) {
            // The new link stands before the old one goes; the hub then supersedes the old one.
            self.swapping = true;
            self.dial();
        }
    }

    /// Takes a fresh certificate into use, if it is one.
    fn keep_certificate(&mut self, reply: &CertificateReply) -> bool {
        let s = &self.p.settings;
        let validity = match enrolment::check_certificate(reply, s.hub, s.node, &self.p.identity, &s.trust) {
            Ok(v) => v,
            Err(e) => {
                tracing::error!(error = %e, "the new certificate cannot be used");
                return false;
            }
        };
        // The file first: were the counter first, a crash between them would skip a renewal.
        let stored = self.p.dir.store_certificate(&reply.certificate_der, &reply.root_der);
        if let Err(e) = stored.and_then(|()| self.p.state.set_counter(reply.counter)) {
            tracing::error!(error = %e, "the new certificate cannot be stored");
            return false;
        }
        self.p.certificate = validity;
        self.renew_asked = false;
        self.renew_retry = Duration::ZERO;
        self.status.certificate_not_after = convert::rfc3339(validity.not_after_ms);
        self.status_stale = true;
        tracing::info!(counter = reply.counter, not_after = %self.status.certificate_not_after, "a new certificate");
        true
    }
}
