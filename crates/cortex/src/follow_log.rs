//! An agent's log as it comes, over as many connections as that takes.

use crate::client::Client;
use crate::error::Error;
use crate::follow::{FIRST_PAUSE, LONGEST_PAUSE, OPEN, read, silent};
use crate::rest::{AgentEnd, AgentLogLine, AgentView, GapEvent};
use crate::sse::{Event, Parser};
use reqwest::{Method, Response};
use std::collections::VecDeque;
use std::time::Duration;

/// What happens while a log is followed.
#[derive(Debug, Clone)]
pub enum LogItem {
    Line(AgentLogLine),
    /// Lines that the hub does not have any more.
    Gap(GapEvent),
    /// The connection is gone; a new one is tried after the pause. The agent is not affected.
    Broken {
        reason: String,
        pause: Duration,
    },
    /// The agent as it ended; nothing follows.
    End(Box<AgentView>),
}

/// Follows one agent. Made by [`Client::follow_agent`].
#[derive(Debug)]
pub struct FollowLog {
    client: Client,
    agent: String,
    /// Lines that were given, or are passed over.
    offset: u64,
    open: Option<(Response, Parser)>,
    ready: VecDeque<LogItem>,
    failures: u32,
    pause: Option<Duration>,
    ended: bool,
}

impl Client {
    /// Follows an agent's log from an offset until the agent ends, and reconnects by itself.
    pub fn follow_agent(&self, agent: &str, offset: u64) -> FollowLog {
        let (client, agent, ready) = (self.clone(), agent.to_owned(), VecDeque::new());
        FollowLog { client, agent, offset, open: None, ready, failures: 0, pause: None, ended: false }
    }
}

impl FollowLog {
    /// The next thing that happens; `None` after the end. An error is final: one that time can mend comes as
    /// [`LogItem::Broken`].
    pub async fn next(&mut self) -> Result<Option<LogItem>, Error> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                self.ended |= matches!(item, LogItem::End(_));
                return Ok(Some(item));
            }
            if self.ended {
                return Ok(None);
            }
            if let Some(pause) = self.pause.take() {
                tokio::time::sleep(pause).await;
            }
            let outcome = match &mut self.open {
                None => self.connect().await,
                Some(open) => match read(open, self.client.url()).await {
                    Ok(events) => events.into_iter().try_for_each(|e| self.take(&e)),
                    Err(e) => Err(e),
                },
            };
            match outcome {
                Ok(()) => {}
                Err(e) if e.is_transient() => {
                    self.open = None;
                    let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
                    self.failures += 1;
                    self.pause = Some(pause);
                    return Ok(Some(LogItem::Broken { reason: e.to_string(), pause }));
                }
                Err(e) => {
                    self.ended = true;
                    return Err(e);
                }
            }
        }
    }

    async fn connect(&mut self) -> Result<(), Error> {
        let call = self
            .client
            .call(Method::GET, &["agents", &self.agent, "logs"])
            .query("offset", Some(self.offset))
            .query("follow", Some(true))
            .accept("text/event-stream")
            .wait_at_most(None);
        let response = tokio::time::timeout(OPEN, self.client.send(&call)).await.map_err(|_| silent(self.client.url()))??;
        self.open = Some((response, Parser::new()));
        Ok(())
    }

    fn take(&mut self, event: &Event) -> Result<(), Error> {
        self.failures = 0;
        match event.event.as_str() {
            "line" => {
                let line: AgentLogLine = self.parse(event)?;
                self.offset = line.seq;
                self.ready.push_back(LogItem::Line(line));
            }
            "gap" => self.ready.push_back(LogItem::Gap(self.parse(event)?)),
            "end" => self.ready.push_back(LogItem::End(Box::new(self.parse::<AgentEnd>(event)?.agent))),
            // What a newer hub may add.
            _ => {}
        }
        Ok(())
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, event: &Event) -> Result<T, Error> {
        serde_json::from_str(&event.data).map_err(|e| Error::Protocol {
            call: format!("log of {}", self.agent),
            reason: format!("event {}: {e}", event.event),
            status: None,
        })
    }
}
