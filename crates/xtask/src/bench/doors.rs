//! `bench doors`: many REST clients and many WebSockets on one hub, and how long a read takes meanwhile, beside a
//! bare server under the same load.

use super::bare::{self, Bare};
use super::load;
use super::mesh::Mesh;
use super::report::{Goal, Table, percentile};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1::SendRequest;
use mesh_process::{CancellationToken, Tasks};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

type Sender = SendRequest<Full<Bytes>>;

/// Connections that are opened at once: a burst of thousands measures the queue of the listener.
const OPENED_AT_ONCE: usize = 50;
/// Files that this program needs beside its connections.
const OTHER_FILES: u64 = 100;
/// After the last read, for what is under way.
const GRACE: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Options {
    /// WebSockets that hear every event
    #[arg(long, default_value_t = 1_000)]
    websockets: usize,
    /// Clients that keep their connection and read now and then
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    rest: u32,
    /// Milliseconds between two reads of one client
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..))]
    read_every: u64,
    /// Milliseconds between two events
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..))]
    event_every: u64,
    /// Of load, in each round and for each of the two servers
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Also write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One of the two servers.
struct Server {
    address: String,
    token: String,
    read: &'static str,
    hear: &'static str,
    /// What makes an event, and the body for the n-th.
    make: (&'static str, fn(usize) -> String),
}

/// Milliseconds of each read, and of each event at each WebSocket from when it was asked for.
#[derive(Default)]
struct Times {
    reads: RefCell<Vec<f64>>,
    events: RefCell<Vec<f64>>,
}

pub async fn measure(o: &Options, built: &Path) -> Result<()> {
    enough_files(o)?;
    let mesh = Mesh::start(built).await.context("starting a hub and a node")?;
    let hub = Server {
        address: mesh.address.clone(),
        token: mesh.token.clone(),
        read: "/api/v1/nodes",
        hear: "/api/v1/ws?topics=sessions",
        make: ("/api/v1/sessions", |n| json!({"name": name(n)}).to_string()),
    };
    let connections = Tasks::new();
    let (_, body) = ask(&mut load::connect(&hub.address, &connections).await?, &hub, hub.read, None).await?;
    let bare = Bare::start(body.len())?;
    let floor =
        Server { address: bare.address.clone(), read: bare::READ, hear: bare::EVENTS, make: (bare::EVENTS, name), ..hub_token(&hub) };
    let mut figures = Table::default();
    for round in 1..=o.rounds {
        eprintln!("round {round} of {}: {} WebSockets, {} REST clients, {} s each", o.rounds, o.websockets, o.rest, o.seconds);
        let (mut of_floor, mut of_hub) = (under_load(o, &floor).await.context("the floor")?, under_load(o, &hub).await.context("the hub")?);
        let mut p95 = [0.0; 2];
        for (i, (who, times)) in [("floor", &mut of_floor), ("hub", &mut of_hub)].into_iter().enumerate() {
            let (reads, events) = (times.reads.get_mut(), times.events.get_mut());
            p95[i] = percentile(reads, 0.95);
            let names = match who {
                "hub" => ["hub: a read, p50", "hub: a read, p95", "hub: a read, p99", "hub: an event at a socket, p95"],
                _ => ["floor: a read, p50", "floor: a read, p95", "floor: a read, p99", "floor: an event at a socket, p95"],
            };
            let goal = (who == "hub").then_some(Goal::AtMost(50.0));
            figures.add(names[0], "ms", None, percentile(reads, 0.50));
            figures.add(names[1], "ms", goal, p95[i]);
            figures.add(names[2], "ms", None, percentile(reads, 0.99));
            if !events.is_empty() {
                figures.add(names[3], "ms", None, percentile(events, 0.95));
            }
        }
        figures.add("hub: a read, p95, over that of the floor", "times", None, p95[1] / p95[0]);
        figures.add("hub: reads", "1/s", None, of_hub.reads.get_mut().len() as f64 / o.seconds as f64);
    }
    figures.print();
    if let Some(path) = &o.json {
        let all = json!({
            "rounds": o.rounds, "websockets": o.websockets, "rest": o.rest, "read_every_ms": o.read_every,
            "event_every_ms": o.event_every, "seconds": o.seconds, "figures": figures.rows,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    connections.end(GRACE).await;
    Ok(())
}

fn hub_token(hub: &Server) -> Server {
    Server { address: String::new(), token: hub.token.clone(), ..*hub }
}

/// Of the n-th event; every WebSocket finds the number in what it hears.
fn name(n: usize) -> String {
    format!("event-{n}-")
}

fn number(text: &str) -> Option<usize> {
    text.split_once("event-")?.1.split_once('-')?.0.parse().ok()
}

/// Raises this program's limit of open files as far as it may; the hub does that for itself and inherits it.
fn enough_files(o: &Options) -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("raising the limit of open files")?;
    let needed = o.websockets as u64 + u64::from(o.rest) + OTHER_FILES;
    if let Some(most) = maximum.filter(|most| *most < needed) {
        bail!(
            "{needed} open files are needed and {most} allowed; raise the hard limit (as root: ulimit -Hn {needed}), or ask for fewer clients"
        );
    }
    Ok(())
}

/// One request on a kept connection; anything but success ends the benchmark.
async fn ask(sender: &mut Sender, server: &Server, path: &str, body: Option<String>) -> Result<(u16, Bytes)> {
    let mut request =
        Request::builder().uri(path).header("host", &server.address).header("authorization", format!("Bearer {}", server.token));
    if body.is_some() {
        request = request.method("POST").header("content-type", "application/json");
    }
    sender.ready().await?;
    let answer = sender.send_request(request.body(Full::new(Bytes::from(body.unwrap_or_default())))?).await?;
    let status = answer.status().as_u16();
    let text = answer.into_body().collect().await?.to_bytes();
    ensure!((200..300).contains(&status), "{path} answered {status}: {}", String::from_utf8_lossy(&text));
    Ok((status, text))
}

async fn websocket(server: &Server) -> Result<WebSocketStream<TcpStream>> {
    let mut request = format!("ws://{}{}", server.address, server.hear).into_client_request()?;
    request.headers_mut().insert("authorization", format!("Bearer {}", server.token).parse()?);
    let stream = TcpStream::connect(&server.address).await?;
    Ok(tokio_tungstenite::client_async(request, stream).await.context("a WebSocket")?.0)
}

/// Opens all connections, then lets every client go at its own pace for the time that was asked for.
async fn under_load(o: &Options, server: &Server) -> Result<Times> {
    let connections = Tasks::new();
    let opened = futures::stream::iter(0..o.rest).map(|_| load::connect(&server.address, &connections));
    let readers: Vec<Sender> = opened.buffer_unordered(OPENED_AT_ONCE).try_collect().await?;
    let opened = futures::stream::iter(0..o.websockets).map(|_| websocket(server));
    let mut ears: Vec<WebSocketStream<TcpStream>> = opened.buffer_unordered(OPENED_AT_ONCE).try_collect().await?;
    let mut maker = load::connect(&server.address, &connections).await?;

    let (times, asked, over) = (Times::default(), RefCell::new(Vec::<Instant>::new()), CancellationToken::new());
    let begun = Instant::now();
    let (end, read_every) = (begun + Duration::from_secs(o.seconds), Duration::from_millis(o.read_every));
    let read = async |(i, mut sender): (usize, Sender)| {
        // Spread over the pause, and counted from when a read was due: who waits for an answer must not
        // make the next read look quick.
        let mut due = begun + read_every.mul_f64(i as f64 / f64::from(o.rest));
        while due < end {
            tokio::time::sleep_until(due.into()).await;
            ask(&mut sender, server, server.read, None).await?;
            times.reads.borrow_mut().push(due.elapsed().as_secs_f64() * 1e3);
            due += read_every;
        }
        anyhow::Ok(())
    };
    let make = async {
        let mut due = begun + Duration::from_millis(o.event_every);
        while due < end {
            tokio::time::sleep_until(due.into()).await;
            let n = asked.borrow().len();
            asked.borrow_mut().push(Instant::now());
            ask(&mut maker, server, server.make.0, Some(server.make.1(n))).await?;
            due += Duration::from_millis(o.event_every);
        }
        anyhow::Ok(asked.borrow().len())
    };
    let hear = async |ear: &mut WebSocketStream<TcpStream>| {
        let mut heard = 0;
        loop {
            let came = tokio::select! {
                () = over.cancelled() => return anyhow::Ok(heard),
                came = ear.next() => came,
            };
            match came {
                Some(Ok(Message::Text(text))) => {
                    let at = number(&text).and_then(|n| asked.borrow().get(n).copied()).context("an event of nobody")?;
                    times.events.borrow_mut().push(at.elapsed().as_secs_f64() * 1e3);
                    heard += 1;
                }
                Some(Ok(_)) => {}
                other => bail!("a WebSocket ended under load: {other:?}"),
            }
        }
    };
    let work = async {
        let reads = try_join_all(readers.into_iter().enumerate().map(read));
        let (_, made) = futures::future::try_join(reads, make).await?;
        let all = made * o.websockets;
        let late = Instant::now() + GRACE;
        while times.events.borrow().len() < all && Instant::now() < late {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        over.cancel();
        anyhow::Ok(made)
    };
    let (made, heard) = futures::future::try_join(work, try_join_all(ears.iter_mut().map(hear))).await?;
    ensure!(heard.iter().all(|h| *h == made), "{made} events, and not every WebSocket heard each");
    connections.end(GRACE).await;
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_read_and_every_event_is_counted_once() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server { address, token: "t".into(), read: bare::READ, hear: bare::EVENTS, make: (bare::EVENTS, name) };
        let o = Options { websockets: 3, rest: 4, read_every: 200, event_every: 300, seconds: 1, rounds: 1, json: None };
        let load = async {
            let times = under_load(&o, &server).await.unwrap();
            (times.reads.into_inner().len(), times.events.into_inner().len())
        };
        tokio::select! {
            // However slow the machine is: what was due is asked for.
            counts = load => assert_eq!(counts, (4 * 5, 3 * 3)),
            end = bare::serve(listener, 10) => panic!("{end:?}"),
        }
    }

    #[test]
    fn events_have_numbers() {
        assert_eq!(number(&json!({"data": {"name": name(17)}}).to_string()), Some(17));
        assert_eq!(number("event-x"), None);
    }
}
