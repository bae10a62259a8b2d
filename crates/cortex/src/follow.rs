//! A task's output as it comes, over as many connections as that takes.
//!
//! ```text
//! closed ──connect──▶ open ──event──▶ open ──end──▶ done
//!    ▲                  │
//!    └── pause ◀── broken, silent, 5xx, 429
//! ```
//! What has been given is never given again: a new connection names the last event's id, and what
//! the hub repeats up to it is passed over.

use crate::calls::Stream;
use crate::client::Client;
use crate::error::Error;
use crate::rest::{EndEvent, GapEvent, OutputEvent, TaskView};
use crate::sse::{Event, Parser};
use base64::Engine as _;
use reqwest::{Method, Response};
use std::collections::VecDeque;
use std::time::Duration;

/// The hub writes a comment every 15 s; three missing ones mean that nobody is there.
const SILENCE: Duration = Duration::from_secs(45);
/// Until the answer begins.
pub(crate) const OPEN: Duration = Duration::from_secs(30);
pub(crate) const FIRST_PAUSE: Duration = Duration::from_millis(200);
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Where to begin.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Resume {
    /// With the first output that is kept.
    #[default]
    Start,
    /// With this sequence number.
    FromSeq(u64),
    /// After the event with this id (`Last-Event-ID`).
    After(String),
}

/// What happens while a task is followed.
#[derive(Debug, Clone)]
pub enum OutputItem {
    Output {
        seq: u64,
        stream: Stream,
        /// Milliseconds since the attempt's first output.
        t_ms: u64,
        data: Vec<u8>,
    },
    /// Output that the hub does not have.
    Gap(GapEvent),
    /// The connection is gone; a new one is tried after the pause. The task is not affected.
    Broken { reason: String, pause: Duration },
    /// A new connection stands.
    Resumed,
    /// The task in its final state; nothing follows.
    End(Box<TaskView>),
}

/// Follows one task. Made by [`Client::follow_output`].
#[derive(Debug)]
pub struct Follow {
    client: Client,
    task: String,
    from_seq: Option<u64>,
    last_id: Option<String>,
    last_seq: Option<u64>,
    /// What a new connection repeats up to this number was given before.
    given: Option<u64>,
    open: Option<(Response, Parser)>,
    ready: VecDeque<OutputItem>,
    failures: u32,
    broken: bool,
    pause: Option<Duration>,
    ended: bool,
}

impl Client {
    /// Follows a task's output until its end, and reconnects by itself.
    pub fn follow_output(&self, task: &str, from: Resume) -> Follow {
        let (from_seq, last_id) = match from {
            Resume::Start => (None, None),
            Resume::FromSeq(n) => (Some(n), None),
            Resume::After(id) => (None, Some(id)),
        };
        Follow {
            client: self.clone(),
            task: task.to_owned(),
            from_seq,
            last_seq: None,
            given: None,
            last_id,
            open: None,
            ready: VecDeque::new(),
            failures: 0,
            broken: false,
            pause: None,
            ended: false,
        }
    }
}

impl Follow {
    /// The id of the last event, for [`Resume::After`] in another process.
    pub fn last_event_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }

    /// The next thing that happens; `None` after the end. An error is final: one that time can mend
    /// comes as [`OutputItem::Broken`]. Dropping the future loses no output, but may begin a
    /// connection anew: use [`Follow::into_stream`] within `select!`.
    pub async fn next(&mut self) -> Result<Option<OutputItem>, Error> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                self.ended |= matches!(item, OutputItem::End(_));
                return Ok(Some(item));
            }
            if self.ended {
                return Ok(None);
            }
            if let Some(pause) = self.pause {
                tokio::time::sleep(pause).await;
                self.pause = None;
            }
            let outcome = match &mut self.open {
                None => self.connect().await,
                Some(open) => match read(open, self.client.url()).await {
                    Ok(events) => events.into_iter().try_for_each(|e| self.take(e)),
                    Err(e) => Err(e),
                },
            };
            match outcome {
                Ok(()) => {}
                Err(e) if e.is_transient() => return Ok(Some(self.break_off(&e))),
                Err(e) => {
                    self.ended = true;
                    return Err(e);
                }
            }
        }
    }

    /// The same as a stream, whose `next` can be dropped at any time.
    pub fn into_stream(self) -> futures::stream::BoxStream<'static, Result<OutputItem, Error>> {
        Box::pin(futures::stream::try_unfold(self, |mut follow: Follow| async move { Ok(follow.next().await?.map(|item| (item, follow))) }))
    }

    async fn connect(&mut self) -> Result<(), Error> {
        let call = self
            .client
            .call(Method::GET, &["tasks", &self.task, "output"])
            .query("from_seq", self.from_seq.filter(|_| self.last_id.is_none()))
            .accept("text/event-stream")
            .last_event_id(self.last_id.as_deref())
            .wait_at_most(None);
        let response = tokio::time::timeout(OPEN, self.client.send(&call)).await.map_err(|_| silent(self.client.url()))??;
        let kind = response.headers().get(reqwest::header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("");
        if !kind.starts_with("text/event-stream") {
            let reason = format!("answered {kind:?} where a stream of events was asked for");
            return Err(Error::Protocol { call: format!("output of {}", self.task), reason, status: None });
        }
        self.given = self.last_seq;
        self.open = Some((response, Parser::new()));
        if std::mem::take(&mut self.broken) {
            self.ready.push_back(OutputItem::Resumed);
        }
        Ok(())
    }

    fn break_off(&mut self, error: &Error) -> OutputItem {
        self.open = None;
        self.broken = true;
        let mut pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        if let Error::Problem { retry_after: Some(secs), .. } = error {
            pause = pause.max(Duration::from_secs(*secs));
        }
        self.failures += 1;
        self.pause = Some(pause);
        OutputItem::Broken { reason: error.to_string(), pause }
    }

    fn take(&mut self, event: Event) -> Result<(), Error> {
        self.failures = 0;
        let item = match event.event.as_str() {
            "output" => {
                let o: OutputEvent = self.parse(&event)?;
                let repeated = self.given.is_some_and(|given| o.seq <= given);
                if !repeated {
                    self.given = None;
                    self.last_seq = Some(o.seq);
                    let stream = if o.stream == "stderr" { Stream::Stderr } else { Stream::Stdout };
                    let data = base64::engine::general_purpose::STANDARD
                        .decode(o.data_base64.as_bytes())
                        .map_err(|e| self.protocol(format!("output {}: {e}", o.seq)))?;
                    self.ready.push_back(OutputItem::Output { seq: o.seq, stream, t_ms: o.t_ms, data });
                }
                None
            }
            "gap" => {
                let gap: GapEvent = self.parse(&event)?;
                self.last_seq = self.last_seq.max(gap.to);
                Some(OutputItem::Gap(gap))
            }
            "attempt" => {
                // Its output is another one, whatever was given of the attempt before.
                (self.given, self.last_seq) = (None, None);
                None
            }
            "end" => Some(OutputItem::End(Box::new(self.parse::<EndEvent>(&event)?.task))),
            // What a newer hub may add.
            _ => None,
        };
        self.ready.extend(item);
        if event.id.is_some() {
            self.last_id = event.id;
        }
        Ok(())
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, event: &Event) -> Result<T, Error> {
        serde_json::from_str(&event.data).map_err(|e| self.protocol(format!("event {}: {e}", event.event)))
    }
    fn protocol(&self, reason: String) -> Error {
        Error::Protocol { call: format!("output of {}", self.task), reason, status: None }
    }
}

/// Waits for the next piece; a clean end of the stream before the task's is a break like any other.
pub(crate) async fn read(open: &mut (Response, Parser), url: &str) -> Result<Vec<Event>, Error> {
    let (response, parser) = open;
    let piece = tokio::time::timeout(SILENCE, response.chunk()).await.map_err(|_| silent(url))?;
    match piece.map_err(|e| Error::transport(url, e))? {
        Some(piece) => parser.push(&piece).map_err(|e| Error::Protocol { call: "output".into(), reason: e.to_string(), status: None }),
        None => Err(Error::Interrupted { url: url.to_owned(), reason: "the hub closed it".into() }),
    }
}

pub(crate) fn silent(url: &str) -> Error {
    Error::Interrupted { url: url.to_owned(), reason: "nothing was heard in time".into() }
}
