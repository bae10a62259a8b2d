//! The floor of `bench doors`: the same crates as the hub's doors are made of, with nothing behind them. One
//! answer of a given size, and WebSockets that are told when somebody posts.

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::http::header;
use axum::response::Response;
use axum::routing::{get, post};
use bytes::Bytes;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

pub const SUBCOMMAND: &str = "bench-bare";
pub const READ: &str = "/read";
pub const EVENTS: &str = "/events";
/// Events that a slow reader may be behind.
const BEHIND: usize = 1024;

#[derive(clap::Args)]
pub struct Options {
    /// Of an answer
    #[arg(long)]
    bytes: usize,
}

#[derive(Clone)]
struct App {
    body: Bytes,
    events: broadcast::Sender<Bytes>,
}

async fn read(State(app): State<App>) -> ([(header::HeaderName, &'static str); 1], Bytes) {
    ([(header::CONTENT_TYPE, "application/json")], app.body)
}

async fn tell(State(app): State<App>, body: Bytes) {
    // Nobody may be there yet.
    let _ = app.events.send(body);
}

async fn hear(State(app): State<App>, upgrade: WebSocketUpgrade) -> Response {
    let mut events = app.events.subscribe();
    upgrade.on_upgrade(async move |mut socket| {
        while let Ok(event) = events.recv().await {
            let text = String::from_utf8_lossy(&event).into_owned();
            if socket.send(Message::text(text)).await.is_err() {
                return;
            }
        }
    })
}

/// Serves answers of so many bytes, for ever.
pub async fn serve(listener: TcpListener, bytes: usize) -> Result<()> {
    let app = App { body: Bytes::from(vec![b'x'; bytes]), events: broadcast::channel(BEHIND).0 };
    let router = Router::new().route(READ, get(read)).route(EVENTS, post(tell).get(hear)).with_state(app);
    axum::serve(listener, router).await.context("the bare server")
}

/// The other side of [`Bare`]: prints its address and serves until its standard input ends.
pub fn child(o: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        // Its owner holds the other end, and may die.
        let owner = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut vec![]));
        tokio::select! {
            served = serve(listener, o.bytes) => served,
            _ = owner => Ok(()),
        }
    });
    // A thread still reads standard input if it was not that which ended.
    runtime.shutdown_background();
    done
}

/// A bare server in a process of its own, which ends with its owner.
pub struct Bare {
    child: Child,
    pub address: String,
}

impl Bare {
    pub fn start(bytes: usize) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([SUBCOMMAND, "--bytes", &bytes.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut bare = Self { child: command.spawn().context("the bare server")?, address: String::new() };
        let out = bare.child.stdout.take().context("the bare server's output")?;
        BufReader::new(out).read_line(&mut bare.address)?;
        bare.address = bare.address.trim().to_owned();
        if bare.address.is_empty() {
            bail!("the bare server did not start");
        }
        Ok(bare)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
