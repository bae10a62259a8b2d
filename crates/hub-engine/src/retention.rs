//! How long, and how much, is kept of tasks that have ended: output first, then the tasks themselves.
//!
//! A reconciler: each look asks the store what is due and erases it in short commits, so a hub that is
//! killed in the middle goes on where it was. A task that has not ended is never touched. What a node
//! still says of one that is gone is acknowledged like any late word.

use crate::error::Result;
use crate::ports::{Agents, Gauges, Purges, Retention as Port};
use crate::records::{Erased, StorageUse};
use mesh_core::UnixMs;
use mesh_process::SharedClock;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Between two looks when nothing was left to do.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Between two looks when there is more, so that others get their turns.
const LOOK_SOON: Duration = Duration::from_millis(50);
/// Tasks that one commit erases.
const ERASED_AT_ONCE: u32 = 100;
/// Commits of one look.
const STEPS: u32 = 20;
const DAY_MS: i64 = 86_400_000;
/// However little room there is, a task stays so long after its end: callers may ask again under their
/// key for a day, and its followers want its end.
const LEAST_MS: i64 = DAY_MS;
/// At this share of a bound there is a warning, in percent.
const WARN_PERCENT: u64 = 80;

/// What is kept. 0 keeps for ever, or without a bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub journal_days: u64,
    pub journal_bytes: u64,
    pub output_days: u64,
    pub output_bytes: u64,
}

impl Limits {
    /// What both bounds allow together; none unless both are bounded.
    pub fn total_bytes(&self) -> Option<u64> {
        let [journal, output] = [self.journal_bytes, self.output_bytes].map(|n| (n > 0).then_some(n));
        Some(journal?.saturating_add(output?))
    }

    /// What is near its bound, or beyond it: `journal`, `output` or `disk`.
    pub fn warnings(&self, used: &StorageUse) -> BTreeSet<&'static str> {
        let disk_used = used.disk_bytes.saturating_sub(used.disk_free_bytes);
        let near =
            |(_, used, bound): &(_, u64, u64)| *bound > 0 && u128::from(*used) * 100 >= u128::from(*bound) * u128::from(WARN_PERCENT);
        [
            ("journal", used.journal_bytes, self.journal_bytes),
            ("output", used.output_bytes, self.output_bytes),
            ("disk", disk_used, used.disk_bytes),
        ]
        .iter()
        .filter(|b| near(b))
        .map(|b| b.0)
        .collect()
    }
}

pub struct Retention {
    pub store: Arc<dyn Port>,
    pub agents: Arc<dyn Agents>,
    pub purges: Arc<dyn Purges>,
    pub gauges: Arc<dyn Gauges>,
    pub clock: SharedClock,
    pub limits: Limits,
    pub warned: Warned,
}

/// The warnings of the last look.
#[derive(Debug, Default)]
pub struct Warned(Mutex<BTreeSet<&'static str>>);

impl Warned {
    pub fn now(&self) -> BTreeSet<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn set(&self, now: BTreeSet<&'static str>) -> BTreeSet<&'static str> {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), now)
    }
}

/// What a look has left undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    Nothing,
    More,
}

impl Retention {
    /// The reconciler. Runs until dropped.
    pub async fn run(&self) {
        loop {
            let pause = match self.round().await {
                Ok(Left::More) => LOOK_SOON,
                Ok(Left::Nothing) => LOOK_AGAIN,
                Err(error) => {
                    tracing::warn!(%error, "erasing what was kept long enough failed; it is tried again");
                    LOOK_AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Erases what is due, as far as one look goes. Idempotent.
    pub async fn round(&self) -> Result<Left> {
        let now = self.clock.now_ms();
        let ended = |days: u64| (days > 0).then(|| now.saturating_sub(i64::try_from(days).unwrap_or(i64::MAX).saturating_mul(DAY_MS)));
        let before = self.gauges.storage().await?;
        self.warn(&before);
        let mut steps = STEPS;
        let mut left = Left::Nothing;

        if let Some(before) = ended(self.limits.journal_days) {
            left = left.and(self.tasks(before, u64::MAX, &mut steps).await?);
            left = left.and(self.agents(before, &mut steps).await?);
        }
        let excess = excess(before.journal_bytes, self.limits.journal_bytes);
        if excess > 0 {
            left = left.and(self.tasks(now.saturating_sub(LEAST_MS), excess, &mut steps).await?);
        }
        if let Some(before) = ended(self.limits.output_days) {
            left = left.and(self.output(before, &mut steps).await?);
        }
        if excess_of_output(&before, &self.limits) > 0 {
            left = left.and(self.files(&mut steps).await?);
        }
        if steps < STEPS {
            while self.purges.sweep(ERASED_AT_ONCE).await? > 0 {}
            self.warn(&self.gauges.storage().await?);
        }
        Ok(left)
    }

    async fn tasks(&self, before: UnixMs, mut enough: u64, steps: &mut u32) -> Result<Left> {
        while enough > 0 {
            if *steps == 0 {
                return Ok(Left::More);
            }
            let erased = self.store.erase_tasks(before, enough, ERASED_AT_ONCE).await?;
            if erased.tasks == 0 {
                break;
            }
            *steps -= 1;
            self.note("tasks", erased);
            enough = enough.saturating_sub(erased.bytes);
        }
        Ok(Left::Nothing)
    }

    /// With their logs.
    async fn agents(&self, before: UnixMs, steps: &mut u32) -> Result<Left> {
        loop {
            if *steps == 0 {
                return Ok(Left::More);
            }
            let erased = self.agents.erase_agents(before, ERASED_AT_ONCE).await?;
            if erased == 0 {
                return Ok(Left::Nothing);
            }
            *steps -= 1;
            tracing::info!(agents = erased, "erased what was kept long enough");
            metrics::counter!("cortex_retention_erased_total", "what" => "agents").increment(erased);
        }
    }

    async fn output(&self, before: UnixMs, steps: &mut u32) -> Result<Left> {
        loop {
            if *steps == 0 {
                return Ok(Left::More);
            }
            let erased = self.store.erase_output(before, ERASED_AT_ONCE).await?;
            if erased.tasks == 0 {
                return Ok(Left::Nothing);
            }
            *steps -= 1;
            self.note("output", erased);
        }
    }

    async fn files(&self, steps: &mut u32) -> Result<Left> {
        loop {
            // Asked anew: what was erased for its age counts, and what came meanwhile.
            let enough = excess_of_output(&self.gauges.storage().await?, &self.limits);
            if enough == 0 {
                return Ok(Left::Nothing);
            }
            if *steps == 0 {
                return Ok(Left::More);
            }
            let erased = self.store.erase_files(enough, ERASED_AT_ONCE).await?;
            if erased.tasks == 0 {
                // All that is left is of tasks that have not ended.
                return Ok(Left::Nothing);
            }
            *steps -= 1;
            self.note("output", erased);
        }
    }

    fn note(&self, what: &'static str, erased: Erased) {
        tracing::info!(what, tasks = erased.tasks, bytes = erased.bytes, "erased what was kept long enough");
        metrics::counter!("cortex_retention_erased_total", "what" => what).increment(erased.tasks.into());
    }

    /// Says once what has come near its bound, and once that it is away from it again.
    fn warn(&self, used: &StorageUse) {
        let now = self.limits.warnings(used);
        let before = self.warned.set(now.clone());
        for what in now.difference(&before) {
            tracing::warn!(what, ?used, limits = ?self.limits, "storage is used to {WARN_PERCENT} % of its bound");
        }
        for what in before.difference(&now) {
            tracing::info!(what, "storage is below {WARN_PERCENT} % of its bound again");
        }
    }
}

impl Left {
    fn and(self, other: Self) -> Self {
        if other == Self::More { other } else { self }
    }
}

fn excess(used: u64, bound: u64) -> u64 {
    if bound == 0 { 0 } else { used.saturating_sub(bound) }
}

fn excess_of_output(used: &StorageUse, limits: &Limits) -> u64 {
    excess(used.output_bytes, limits.output_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_comes_at_eighty_percent() {
        let limits = Limits { journal_bytes: 1000, output_bytes: 0, ..Limits::default() };
        let used = |journal_bytes, disk_free_bytes| StorageUse {
            journal_bytes,
            output_bytes: u64::MAX,
            disk_bytes: 100,
            disk_free_bytes,
            ..StorageUse::default()
        };
        assert_eq!(limits.warnings(&used(799, 21)), [].into());
        assert_eq!(limits.warnings(&used(800, 21)), ["journal"].into());
        assert_eq!(limits.warnings(&used(0, 20)), ["disk"].into());
        assert_eq!(limits.warnings(&StorageUse::default()), [].into(), "nothing is known of the disk");
        let huge = Limits { output_bytes: u64::MAX, ..limits };
        assert_eq!(huge.warnings(&used(u64::MAX, 100)), ["journal", "output"].into());
        assert_eq!((limits.total_bytes(), huge.total_bytes()), (None, Some(u64::MAX)));
    }
}
