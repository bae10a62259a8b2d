//! The commands that the bus gives to Redis.
//!
//! One stream per deployment, made by an entry at 0-1, which succeeds on a stream that was not there and
//! on no other. After that nothing is written to a stream that is gone, so a stream that was lost does
//! not come back unnoticed.

use super::ring::Place;
use super::state::Read;
use mesh_core::HubId;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, Pipeline, RedisError, Value};
use std::time::Duration;

/// For the server to take a connection, and for each command.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the server holds a read when there is nothing new.
const BLOCK: Duration = Duration::from_secs(1);
/// Entries of one read.
const READ_AT_ONCE: usize = 256;
const LOAD_AT_ONCE: usize = 1000;
/// The one field of an entry.
const FIELD: &[u8] = b"e";
const BIRTH_PLACE: &str = "0-1";

/// Why there is no bus at present.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("{0}")]
    Redis(#[from] RedisError),
    #[error("no answer in {} s", ANSWER.as_secs())]
    Silent,
    #[error("the stream is not what it was: it was flushed, or was overtaken by newer entries")]
    StreamGone,
    #[error("an answer is not of the expected form")]
    Answer,
    #[error("it does not keep up with what this hub has to tell")]
    Slow,
}
type Result<T> = std::result::Result<T, Trouble>;

/// One connection, for one task.
pub struct Stream {
    conn: MultiplexedConnection,
    key: String,
    keep: usize,
}

async fn in_time<T>(more: Duration, work: impl Future<Output = redis::RedisResult<T>>) -> Result<T> {
    tokio::time::timeout(ANSWER + more, work).await.map_err(|_| Trouble::Silent)?.map_err(Trouble::Redis)
}

/// What one round of reading brought.
pub struct Round {
    pub entries: Vec<Read>,
    /// There was no more.
    pub ended: bool,
}

impl Stream {
    pub async fn connect(client: &redis::Client, hub: HubId, keep: usize) -> Result<Self> {
        // The limits of this module are the ones that count.
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let conn = in_time(Duration::ZERO, client.get_multiplexed_async_connection_with_config(&config)).await?;
        Ok(Self { conn, key: format!("cortex:{hub}:events"), keep })
    }

    async fn ask(&mut self, command: Cmd) -> Result<Value> {
        in_time(Duration::ZERO, command.query_async(&mut self.conn)).await
    }
    fn command(&self, name: &str) -> Cmd {
        let mut command = Cmd::new();
        command.arg(name).arg(&self.key);
        command
    }
    fn range(&self, place: Place) -> Cmd {
        let mut command = self.command("XRANGE");
        command.arg(text(place)).arg(text(place));
        command
    }

    /// Makes the stream if it is not there.
    pub async fn be_born(&mut self, birth: &[u8]) -> Result<()> {
        let mut command = self.command("XADD");
        command.arg(BIRTH_PLACE).arg(FIELD).arg(birth);
        match self.ask(command).await {
            // It is there already: its last place is not before this one.
            Err(Trouble::Redis(e)) if e.code() == Some("ERR") => Ok(()),
            other => other.map(drop),
        }
    }

    /// The newest entries in the order of the stream, one more than are kept.
    pub async fn newest(&mut self) -> Result<Vec<Read>> {
        let mut all: Vec<Read> = vec![];
        while all.len() <= self.keep {
            let end = all.last().map_or("+".to_owned(), |r| format!("({}", text(r.place)));
            let mut command = self.command("XREVRANGE");
            let count = LOAD_AT_ONCE.min(self.keep + 1 - all.len());
            command.arg(end).arg("-").arg("COUNT").arg(count);
            let page = entries(self.ask(command).await?)?;
            let last = page.len() < count;
            all.extend(page);
            if last {
                break;
            }
        }
        all.reverse();
        Ok(all)
    }

    /// Whether this entry stands where it stood.
    pub async fn still_has(&mut self, read: &Read) -> Result<bool> {
        let there = self.ask(self.range(read.place)).await?;
        Ok(entries(there)?.first() == Some(read))
    }

    /// Waits for what comes after this entry, which must still be there.
    pub async fn after(&mut self, last: &Read) -> Result<Round> {
        let mut read = Cmd::new();
        read.arg("XREAD").arg("COUNT").arg(READ_AT_ONCE).arg("BLOCK").arg(BLOCK.as_millis() as u64);
        read.arg("STREAMS").arg(&self.key).arg(text(last.place));
        let mut both = Pipeline::with_capacity(2);
        both.add_command(self.range(last.place)).add_command(read);
        let (there, new): (Value, Value) = in_time(BLOCK, both.query_async(&mut self.conn)).await?;
        if entries(there)?.first() != Some(last) {
            return Err(Trouble::StreamGone);
        }
        let entries = match new {
            Value::Nil => vec![],
            Value::Array(mut streams) => match streams.pop() {
                Some(Value::Array(mut one)) if one.len() == 2 => entries(one.remove(1))?,
                _ => return Err(Trouble::Answer),
            },
            _ => return Err(Trouble::Answer),
        };
        Ok(Round { ended: entries.len() < READ_AT_ONCE, entries })
    }

    /// All of them in their order, unless the stream is gone.
    pub async fn add(&mut self, all: &[Vec<u8>]) -> Result<()> {
        let mut pipeline = Pipeline::with_capacity(all.len());
        for sealed in all {
            let mut command = self.command("XADD");
            command.arg("NOMKSTREAM").arg("MAXLEN").arg("~").arg(self.keep).arg("*").arg(FIELD).arg(sealed.as_slice());
            pipeline.add_command(command);
        }
        let places: Vec<Value> = in_time(Duration::ZERO, pipeline.query_async(&mut self.conn)).await?;
        if places.contains(&Value::Nil) { Err(Trouble::StreamGone) } else { Ok(()) }
    }

    /// Lets go of what is before this place, and of the stream itself once no hub has asked for so long.
    pub async fn trim(&mut self, before: Option<Place>, idle: Duration) -> Result<()> {
        let mut both = Pipeline::with_capacity(2);
        if let Some(place) = before {
            let mut command = self.command("XTRIM");
            command.arg("MINID").arg("~").arg(text(place));
            both.add_command(command);
        }
        let mut command = self.command("EXPIRE");
        command.arg(idle.as_secs());
        both.add_command(command);
        in_time(Duration::ZERO, both.query_async::<Vec<Value>>(&mut self.conn)).await.map(drop)
    }
}

fn text((ms, seq): Place) -> String {
    format!("{ms}-{seq}")
}

/// Anybody may have written anything there; only Redis' own part must be right.
fn entries(answer: Value) -> Result<Vec<Read>> {
    let Value::Array(all) = answer else { return Err(Trouble::Answer) };
    all.into_iter()
        .map(|one| {
            let Value::Array(mut parts) = one else { return Err(Trouble::Answer) };
            let (fields, place) = (parts.pop(), parts.pop());
            let Some(Value::BulkString(place)) = place else { return Err(Trouble::Answer) };
            let place = std::str::from_utf8(&place).ok().and_then(|p| p.split_once('-'));
            let place = place.and_then(|(ms, seq)| Some((ms.parse().ok()?, seq.parse().ok()?))).ok_or(Trouble::Answer)?;
            let sealed = match fields {
                Some(Value::Array(fields)) => match <[Value; 2]>::try_from(fields) {
                    Ok([Value::BulkString(name), Value::BulkString(sealed)]) if name == FIELD => Some(sealed),
                    _ => None,
                },
                _ => None,
            };
            Ok(Read { place, sealed })
        })
        .collect()
}
