//! The daemon's side of the warden's socket: starts or finds the warden, and stays attached to it.
//!
//! [`attach`] hands out a [`Warden`]; its background task owns the socket and begins anew whenever
//! the warden goes away. Each attachment begins with [`Event::Welcome`], which tells all that is known.

use mesh_process::Tasks;
use node_warden::frames::{Decoder, Event, FrameError, Request, VERSION};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// Requests on their way to the warden; beyond it the engine keeps them itself.
const REQUESTS: usize = 64;
/// Events on their way from the warden; beyond it the socket is left unread.
const EVENTS: usize = 256;
const RETRY: Duration = Duration::from_secs(1);
const READ_BYTES: usize = 64 << 10;
/// Requests that are written together, but for the last of them.
const WRITE_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum WardenError {
    #[error("the warden cannot be started: {0}")]
    Launch(#[from] node_warden::Error),
    #[error("the warden's socket {path}: {source}")]
    Socket {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the warden's words: {0}")]
    Frame(#[from] FrameError),
    #[error("the warden speaks version {0}, this daemon up to {VERSION}")]
    Version(u32),
    #[error("the warden closed its socket")]
    Closed,
    #[error("work of the daemon was cut off: {0}")]
    Join(#[from] tokio::task::JoinError),
}

/// A handle on an attached warden.
pub struct Warden {
    pub requests: mpsc::Sender<Request>,
    /// Ends once a requested stop is complete, or when the group of tasks ends.
    pub events: mpsc::Receiver<Event>,
}

/// Starts the warden if none runs, attaches to it, and keeps attached. The first start must succeed.
pub async fn attach(exe: PathBuf, data_dir: PathBuf, tasks: &Tasks) -> Result<Warden, WardenError> {
    let (requests, mut to_warden) = mpsc::channel(REQUESTS);
    let (events_in, events) = mpsc::channel(EVENTS);
    let mut stream = Some(open(&exe, &data_dir).await?);
    tasks.spawn_until_cancelled("warden", async move {
        let mut stopping = false;
        loop {
            let end = match stream.take() {
                Some(s) => serve(s, &mut to_warden, &events_in, &mut stopping).await,
                None => match open(&exe, &data_dir).await {
                    Ok(s) => {
                        stream = Some(s);
                        continue;
                    }
                    Err(e) => Err(e),
                },
            };
            if stopping || events_in.is_closed() {
                return;
            }
            if let Err(error) = end {
                tracing::warn!(%error, "the warden is away; attaching again");
            }
            tokio::time::sleep(RETRY).await;
        }
    });
    Ok(Warden { requests, events })
}

async fn open(exe: &Path, data_dir: &Path) -> Result<UnixStream, WardenError> {
    let (exe, dir) = (exe.to_path_buf(), data_dir.to_path_buf());
    tokio::task::spawn_blocking(move || node_warden::launch(&exe, &dir)).await??;
    connect(data_dir).await
}

async fn connect(data_dir: &Path) -> Result<UnixStream, WardenError> {
    let path = node_warden::socket_path(data_dir);
    UnixStream::connect(&path).await.map_err(|source| WardenError::Socket { path, source })
}

/// One attachment, until either side ends it.
async fn serve(
    stream: UnixStream,
    requests: &mut mpsc::Receiver<Request>,
    events: &mpsc::Sender<Event>,
    stopping: &mut bool,
) -> Result<(), WardenError> {
    let (read, write) = stream.into_split();
    // Both directions at once: each side may be in the middle of a large frame.
    tokio::select! {
        biased;
        end = read_events(read, events) => end,
        end = write_requests(write, requests, stopping) => end,
    }
}

async fn read_events(mut read: OwnedReadHalf, events: &mpsc::Sender<Event>) -> Result<(), WardenError> {
    let mut decoder = Decoder::<Event>::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let n = read.read(&mut buffer).await.map_err(|source| WardenError::Socket { path: "(stream)".into(), source })?;
        if n == 0 {
            return Err(WardenError::Closed);
        }
        decoder.push(&buffer[..n]);
        while let Some(event) = decoder.pop()? {
            if let Event::Welcome { version, .. } = &event
                && !(1..=VERSION).contains(version)
            {
                return Err(WardenError::Version(*version));
            }
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
    }
}

async fn write_requests(mut write: OwnedWriteHalf, requests: &mut mpsc::Receiver<Request>, stopping: &mut bool) -> Result<(), WardenError> {
    let io = |source| WardenError::Socket { path: "(stream)".into(), source };
    write.write_all(&Request::Hello { version: VERSION }.encode()).await.map_err(io)?;
    let (mut waiting, mut bytes) = (Vec::with_capacity(REQUESTS), vec![]);
    // What waits goes together, so that the warden hears it in one turn and syncs once for it.
    while requests.recv_many(&mut waiting, REQUESTS).await > 0 {
        for request in waiting.drain(..) {
            *stopping |= request == Request::Stop;
            bytes.extend_from_slice(&request.encode());
            if bytes.len() >= WRITE_BYTES {
                write.write_all(&bytes).await.map_err(io)?;
                bytes.clear();
            }
        }
        write.write_all(&bytes).await.map_err(io)?;
        bytes.clear();
        bytes.shrink_to(WRITE_BYTES);
    }
    // The daemon ends; the warden and its tasks go on.
    Ok(())
}

/// Ends all tasks and the warden when no daemon runs. False when there was no warden.
pub async fn stop(data_dir: &Path) -> Result<bool, WardenError> {
    let Ok(stream) = connect(data_dir).await else { return Ok(false) };
    let (requests, mut queue) = mpsc::channel(1);
    let (events, mut seen) = mpsc::channel(EVENTS);
    let _ = requests.send(Request::Stop).await;
    let mut stopping = false;
    let drain = async { while seen.recv().await.is_some() {} };
    // `requests` stays alive, so that only the warden's end ends this.
    tokio::select! {
        biased;
        _ = serve(stream, &mut queue, &events, &mut stopping) => {}
        () = drain => {}
    }
    drop(requests);
    Ok(true)
}

/// Asks the warden what it knows, for `status` while no daemon runs. None when there is no warden.
pub async fn known(data_dir: &Path) -> Result<Option<Vec<node_warden::frames::Known>>, WardenError> {
    let Ok(stream) = connect(data_dir).await else { return Ok(None) };
    let (requests, mut queue) = mpsc::channel(1);
    let (events, mut seen) = mpsc::channel(EVENTS);
    let mut stopping = false;
    let answer = tokio::select! {
        biased;
        end = serve(stream, &mut queue, &events, &mut stopping) => return end.map(|()| None),
        event = seen.recv() => event,
    };
    drop(requests);
    Ok(match answer {
        Some(Event::Welcome { attempts, .. }) => Some(attempts),
        _ => None,
    })
}
