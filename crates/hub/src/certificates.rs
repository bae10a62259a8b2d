//! The certificates that the hub gives itself, and what follows when its authority changes.

use crate::doors::https::DoorTls;
use crate::keys::Keys;
use crate::link::tls::ServerTls;
use async_trait::async_trait;
use hub_engine::ports::{Authority, StoreError, Stored};
use hub_engine::rotation::{Phase, Step};
use mesh_core::UnixMs;
use mesh_process::SharedClock;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

/// How often the hub looks at its own certificate.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// How soon again after a failure.
const AGAIN: Duration = Duration::from_secs(10);
/// At this much left of 30 days, the hub's certificate is renewed.
const LEFT_MS: i64 = 10 * 86_400_000;

/// What the doors' certificate by the hub's own authority is made of.
pub struct Own {
    pub key: String,
    pub names: Vec<String>,
}

/// Those of the node port and of the doors; they end together.
struct Given {
    keys: Arc<Keys>,
    link: Arc<ServerTls>,
    doors: Option<(Arc<DoorTls>, Own)>,
    /// 0: they are of an authority that has changed.
    end: AtomicI64,
}

pub struct Certificates {
    given: Arc<Given>,
    clock: SharedClock,
}

impl Certificates {
    pub fn new(keys: Arc<Keys>, link: Arc<ServerTls>, doors: Option<(Arc<DoorTls>, Own)>, end: UnixMs, clock: SharedClock) -> Self {
        Self { given: Arc::new(Given { keys, link, doors, end: AtomicI64::new(end) }), clock }
    }

    /// Renews them in time. Runs until dropped.
    pub async fn keep(&self) {
        let (mut look, mut changes) = (LOOK_EVERY, self.given.keys.changes());
        loop {
            tokio::select! {
                () = tokio::time::sleep(look) => {}
                // It has followed already, unless it could not.
                Ok(()) = changes.changed() => {}
            }
            let now = self.clock.now_ms();
            look = match self.given.end.load(Ordering::SeqCst) - now {
                left if left > LEFT_MS => LOOK_EVERY,
                _ if self.given.renewed(now) => LOOK_EVERY,
                _ => AGAIN,
            };
        }
    }
}

impl Given {
    /// An error is for the log: it is tried again.
    fn renewed(&self, now: UnixMs) -> bool {
        self.renew(now)
            .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "the hub's certificate could not be renewed"))
            .is_ok()
    }
    fn renew(&self, now: UnixMs) -> anyhow::Result<()> {
        let until = self.link.renew(&self.keys, now)?;
        if let Some((doors, own)) = &self.doors {
            doors.renew(&self.keys, &own.key, &own.names, now)?;
        }
        self.end.store(until, Ordering::SeqCst);
        Ok(())
    }
}

#[async_trait]
impl Authority for Certificates {
    fn stands(&self) -> (Phase, u64) {
        let authority = self.given.keys.authority();
        (authority.phase, authority.seq)
    }
    fn issues(&self, certificate: &[u8]) -> bool {
        self.given.keys.authority().issuing().issued(certificate)
    }
    async fn step(&self, step: Step, now: UnixMs) -> Stored<()> {
        let given = self.given.clone();
        // To its end, whether or not anybody waits for it: the disk, the certificates, then the nodes.
        let done = tokio::task::spawn_blocking(move || {
            given.keys.step(step, now)?;
            given.end.store(0, Ordering::SeqCst);
            given.renewed(now);
            given.keys.tell();
            Ok::<_, crate::keys::KeyError>(())
        });
        done.await.map_err(|e| StoreError::new("authority.step", e))?.map_err(|e| StoreError::new("authority.step", e))
    }
}
