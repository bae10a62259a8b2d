//! The work behind the bus: connects, reads and writes, and connects again, for ever.

use super::entry::{Sealer, Word};
use super::ring::ADRIFT;
use super::state::{Come, Mode, Read};
use super::stream::{Stream, Trouble};
use super::{RedisPlan, Shared};
use mesh_process::{CancellationToken, entropy};
use std::sync::Arc;
use std::time::Duration;

/// Entries of one write.
const WRITE_AT_ONCE: usize = 256;
/// How often old entries are let go.
const TRIM_EVERY: Duration = Duration::from_secs(10);
/// At a stop, for what is still to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// A connection that lasted so long is replaced at once when it breaks; readers notice nothing.
const CALM: Duration = Duration::from_secs(10);

/// Holds the connections: one reads, one writes.
pub struct Carrier {
    shared: Arc<Shared>,
    sealer: Sealer,
    plan: RedisPlan,
    stop: CancellationToken,
}

impl Carrier {
    pub fn new(shared: Arc<Shared>, plan: RedisPlan, stop: CancellationToken) -> Self {
        Self { shared, sealer: Sealer::new(&plan.key, plan.hub), plan, stop }
    }

    pub async fn run(self) {
        let mut failures = 0;
        let mut told = None;
        loop {
            metrics::gauge!("cortex_bus_connected").set(0.0);
            self.shared.connected.send_replace(false);
            let connected = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                connected = self.connect() => connected,
            };
            let trouble = match connected {
                Ok((mut reader, mut writer)) => {
                    if told.replace(true) != Some(true) {
                        tracing::info!(redis = %self.plan.url, "events are carried by Redis");
                    }
                    let since = self.shared.clock.steady();
                    let trouble = tokio::select! {
                        biased;
                        () = self.stop.cancelled() => return self.last_words(&mut writer).await,
                        trouble = self.read(&mut reader) => trouble,
                        trouble = self.write(&mut writer) => trouble,
                    };
                    if self.shared.clock.steady().saturating_sub(since) >= CALM {
                        failures = 0;
                    }
                    trouble
                }
                Err(trouble) => trouble,
            };
            failures += 1;
            // The first time at once: a connection that was cut is not a Redis that is away.
            if failures == 1 {
                tracing::debug!(redis = %self.plan.url, %trouble, "the connection to Redis is made anew");
                continue;
            }
            if told.replace(false) != Some(false) {
                tracing::warn!(redis = %self.plan.url, %trouble, "Redis is away: events reach only readers of this hub until it is back");
            }
            self.shared.go_adrift();
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(backoff(failures - 1)) => {}
            }
        }
    }

    /// Two connections, and a ring that holds what the stream does.
    async fn connect(&self) -> Result<(Stream, Stream), Trouble> {
        let client = self.plan.url.client()?;
        let connect = || Stream::connect(&client, self.plan.hub, self.plan.keep);
        let (mut reader, mut writer) = (connect().await?, connect().await?);
        while !self.join(&mut reader, &mut writer).await? {}
        self.shared.news.send_replace(());
        metrics::gauge!("cortex_bus_connected").set(1.0);
        self.shared.connected.send_replace(true);
        Ok((reader, writer))
    }

    /// Takes up the stream where it was left, or from its beginning. False: once more, since readers of
    /// this hub were told something meanwhile.
    async fn join(&self, reader: &mut Stream, writer: &mut Stream) -> Result<bool, Trouble> {
        let (life, unheard, read) = {
            let state = self.shared.state();
            (state.life, state.unheard, state.read.clone())
        };
        let wall = || self.plan.clock.now_ms();
        // In a life of its own: where the stream was there already, no number of this one is missing.
        writer.be_born(&self.sealer.seal(&entropy::bytes(), 1, wall(), &Word::Birth)).await?;
        if unheard > 0 {
            let number = self.shared.state().take_number();
            writer.add(&[self.sealer.seal(&life, number, wall(), &Word::Gap)]).await?;
        }
        let same = match read {
            Some(read) if unheard == 0 => reader.still_has(&read).await?,
            _ => false,
        };
        let all = if same { vec![] } else { reader.newest().await? };
        if !same && all.is_empty() {
            return Err(Trouble::StreamGone);
        }
        let all = self.opened(all);
        let now = self.shared.now();
        let mut state = self.shared.state();
        if same && state.unheard > 0 {
            return Ok(false);
        }
        if !same {
            state.load(all, now);
            // Told since the word of a gap went out: one more follows.
            if state.unheard > unheard {
                state.tell_gap();
            }
        }
        state.unheard = 0;
        state.mode = Mode::Carried;
        state.write_anew();
        Ok(true)
    }

    fn opened(&self, all: Vec<Read>) -> Vec<Come> {
        all.into_iter().map(|read| Come::of(read, &self.sealer)).collect()
    }

    async fn read(&self, reader: &mut Stream) -> Trouble {
        let mut trimmed = self.shared.clock.steady();
        loop {
            let (last, round) = {
                let mut state = self.shared.state();
                state.begun += 1;
                (state.read.clone(), state.begun)
            };
            let Some(last) = last else { return Trouble::StreamGone };
            let read = match reader.after(&last).await {
                Ok(read) => read,
                Err(trouble) => return trouble,
            };
            let came = self.opened(read.entries);
            let news = !came.is_empty();
            let now = self.shared.now();
            let (waited_for, floor) = {
                let mut state = self.shared.state();
                // What comes now comes again when Redis is back.
                if state.mode == Mode::Adrift {
                    return Trouble::Slow;
                }
                came.into_iter().for_each(|come| state.take(come, false, now));
                if read.ended {
                    state.ended = round;
                }
                state.ring.trim(now.steady);
                (state.wanted >= round, state.ring.floor())
            };
            if news || waited_for {
                self.shared.news.send_replace(());
            }
            if now.steady.saturating_sub(trimmed) >= TRIM_EVERY {
                trimmed = now.steady;
                let floor = floor.map(|id| id.place).filter(|place| place.0 != ADRIFT);
                if let Err(trouble) = reader.trim(floor, self.plan.keep_for * 2 + TRIM_EVERY * 6).await {
                    return trouble;
                }
            }
        }
    }

    async fn write(&self, writer: &mut Stream) -> Trouble {
        loop {
            match self.write_some(writer).await {
                Ok(true) => {}
                Ok(false) => self.shared.work.notified().await,
                Err(trouble) => return trouble,
            }
        }
    }

    /// False when there was nothing to write.
    async fn write_some(&self, writer: &mut Stream) -> Result<bool, Trouble> {
        let (life, some) = {
            let state = self.shared.state();
            if state.mode == Mode::Adrift {
                return Err(Trouble::Slow);
            }
            (state.life, state.unwritten(WRITE_AT_ONCE))
        };
        let Some((last, _)) = some.last() else { return Ok(false) };
        let wall = self.plan.clock.now_ms();
        let sealed: Vec<_> = some.iter().map(|(number, word)| self.sealer.seal(&life, *number, wall, word)).collect();
        writer.add(&sealed).await?;
        self.shared.state().note_written(*last);
        Ok(true)
    }

    async fn last_words(&self, writer: &mut Stream) {
        let write = async { while self.write_some(writer).await.is_ok_and(|more| more) {} };
        if tokio::time::timeout(LAST_WORDS, write).await.is_err() {
            tracing::warn!("the last events did not reach Redis");
        }
    }
}

fn backoff(failures: u32) -> Duration {
    let most = BACKOFF_FIRST.saturating_mul(1 << failures.min(10)).min(BACKOFF_MOST);
    let [share] = entropy::bytes::<1>();
    most / 2 + most.mul_f64(f64::from(share) / 512.0)
}
