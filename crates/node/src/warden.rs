//! The daemon's side of the warden's socket: starts or finds the warden, and stays attached to it.
//!
//! [`attach`] hands out a [`Warden`]; its background task owns the socket and begins anew whenever
//! the warden goes away. Each attachment begins with [`Event::Welcome`], which tells all that is known.
//!
//! After an upgrade there are several: new tasks go to the warden of this daemon's program, and one of
//! before has what it began until it is empty. Towards the engine they are one.

use mesh_core::SpoolId;
use mesh_process::Tasks;
use node_warden::frames::{Decoder, Event, FrameError, Known, Request, VERSION, WITH_KILL};
use node_warden::{Key, Wardens};
use std::collections::HashMap;
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
/// A warden that was killed answers no more, but a child of it that has not become its program yet holds its
/// socket for a moment: who was launched beside it is launched again, so often.
const LAUNCHES: usize = 10;
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

/// A handle on the attached wardens, as if they were one.
pub struct Warden {
    pub requests: mpsc::Sender<Request>,
    /// Ends once a requested stop is complete, or when the group of tasks ends.
    pub events: mpsc::Receiver<Event>,
}

/// Wardens to talk to: the first takes new tasks.
struct Open {
    streams: Vec<UnixStream>,
    spool: SpoolId,
}

/// Starts the warden if none of this program runs, attaches to all that know anything, and keeps attached.
/// The first start must succeed.
pub async fn attach(exe: PathBuf, data_dir: PathBuf, tasks: &Tasks) -> Result<Warden, WardenError> {
    let (requests, mut to_warden) = mpsc::channel(REQUESTS);
    let (events_in, events) = mpsc::channel(EVENTS);
    let mut wardens = Some(open(&exe, &data_dir).await?);
    let group = tasks.clone();
    tasks.spawn_until_cancelled("warden", async move {
        let mut stopping = false;
        loop {
            let end = match wardens.take() {
                Some(w) => Attachment::new(w, &group).serve(&mut to_warden, &events_in, &mut stopping).await,
                None => match open(&exe, &data_dir).await {
                    Ok(w) => {
                        wardens = Some(w);
                        continue;
                    }
                    Err(e) => Err(e),
                },
            };
            if stopping || events_in.is_closed() {
                return;
            }
            if let Err(error) = end {
                tracing::warn!(%error, "a warden is away; attaching again");
            }
            tokio::time::sleep(RETRY).await;
        }
    });
    Ok(Warden { requests, events })
}

async fn open(exe: &Path, data_dir: &Path) -> Result<Open, WardenError> {
    open_by(|| {
        let (exe, dir) = (exe.to_path_buf(), data_dir.to_path_buf());
        async move { Ok(tokio::task::spawn_blocking(move || node_warden::launch_all(&exe, &dir)).await??) }
    })
    .await
}

/// Launches, and connects to what was launched. The socket that answered may have been a dying warden's: then
/// the next launch finds it gone and starts another.
async fn open_by<F: Future<Output = Result<Wardens, WardenError>>>(mut launch: impl FnMut() -> F) -> Result<Open, WardenError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let wardens = launch().await?;
        match connect_all(&wardens.seats).await {
            Ok(streams) => return Ok(Open { streams, spool: wardens.spool }),
            Err(e) if tries == LAUNCHES => return Err(e),
            Err(error) => tracing::info!(%error, "the warden went away; launching again"),
        }
    }
}

async fn connect_all(seats: &[PathBuf]) -> Result<Vec<UnixStream>, WardenError> {
    let mut streams = vec![];
    for seat in seats {
        streams.push(connect(seat).await?);
    }
    Ok(streams)
}

/// One attachment to all wardens of this node: it begins with all of them and ends with any, so that what
/// the daemon tells the hub is never only a part of what is known here.
struct Attachment {
    spool: SpoolId,
    seats: Vec<Seat>,
    /// Attempts that a warden of before has: whatever is said of them goes there.
    owners: HashMap<Key, usize>,
    words: mpsc::Receiver<(usize, Result<Event, WardenError>)>,
    /// Readers and writers; they end with the attachment.
    streams: Tasks,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.streams.token().cancel();
    }
}

struct Seat {
    orders: mpsc::Sender<Request>,
    /// What it knew first, until that is told.
    welcome: Option<(u32, Vec<Known>)>,
    /// How many attempts it knows, for a warden of before.
    knows: usize,
    /// It was told to end, or has ended so.
    ending: bool,
    ended: bool,
}

impl Attachment {
    fn new(wardens: Open, tasks: &Tasks) -> Self {
        let group = tasks.child();
        let (told, words) = mpsc::channel(EVENTS);
        let mut seats = vec![];
        for (i, stream) in wardens.streams.into_iter().enumerate() {
            let (read, write) = stream.into_split();
            let (orders, queue) = mpsc::channel(REQUESTS);
            let told = told.clone();
            group.spawn_until_cancelled("warden words", async move {
                let end = read_events(read, i, &told).await;
                let _ = told.send((i, Err(end))).await;
            });
            // When it cannot write, the reader hears the end too.
            group.spawn_until_cancelled("warden orders", async move { drop(write_requests(write, queue).await) });
            seats.push(Seat { orders, welcome: None, knows: 0, ending: false, ended: false });
        }
        Self { spool: wardens.spool, seats, owners: HashMap::new(), words, streams: group }
    }

    async fn serve(
        mut self,
        requests: &mut mpsc::Receiver<Request>,
        events: &mpsc::Sender<Event>,
        stopping: &mut bool,
    ) -> Result<(), WardenError> {
        let mut early = vec![];
        while self.seats.iter().any(|s| s.welcome.is_none()) {
            match self.words.recv().await {
                None => return Err(WardenError::Closed),
                Some((_, Err(e))) => return Err(e),
                Some((i, Ok(Event::Welcome { version, attempts, spool }))) => {
                    self.spool = self.spool.max(spool);
                    self.seats[i].welcome = Some((version, attempts));
                }
                Some((_, Ok(event))) => early.push(event),
            }
        }
        let welcome = self.joint_welcome();
        for event in std::iter::once(welcome).chain(early) {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
        for i in 1..self.seats.len() {
            self.retire(i).await;
        }
        loop {
            tokio::select! {
                biased;
                Some((i, word)) = self.words.recv() => match word {
                    Ok(event) => if events.send(event).await.is_err() {
                        return Ok(());
                    },
                    Err(_) if self.seats[i].ending => {
                        self.seats[i].ended = true;
                        if self.seats.iter().all(|s| s.ended) {
                            return Ok(());
                        }
                        if !*stopping {
                            tracing::info!("the warden of before has ended: it was empty");
                        }
                    }
                    Err(e) => return Err(e),
                },
                request = requests.recv() => match request {
                    // The daemon ends; the wardens and their tasks go on.
                    None => return Ok(()),
                    Some(Request::Stop) => {
                        *stopping = true;
                        for i in 0..self.seats.len() {
                            self.end(i).await;
                        }
                    }
                    Some(request) => self.pass(request).await,
                },
            }
        }
    }

    /// What all know together. The first speaks for what it takes.
    fn joint_welcome(&mut self) -> Event {
        let (mut version, mut all) = (VERSION, vec![]);
        for (i, seat) in self.seats.iter_mut().enumerate() {
            let Some((spoken, attempts)) = &mut seat.welcome else { continue };
            if i == 0 {
                version = *spoken;
            } else {
                seat.knows = attempts.len();
                self.owners.extend(attempts.iter().map(|k| ((k.task, k.attempt), i)));
            }
            all.append(attempts);
        }
        if self.seats.len() > 1 {
            let before = self.owners.len();
            tracing::info!(before, "attached to wardens of before too; new tasks go to that of this program");
        }
        Event::Welcome { version, spool: self.spool, attempts: all }
    }

    async fn pass(&mut self, request: Request) {
        let key = match &request {
            Request::Start { grant } => (grant.task(), grant.attempt()),
            Request::Cancel { task, attempt }
            | Request::Kill { task, attempt }
            | Request::Acked { task, attempt, .. }
            | Request::Forget { task, attempt }
            | Request::Input { task, attempt, .. } => (*task, *attempt),
            Request::Hello { .. } | Request::Stop => return,
        };
        let i = self.owners.get(&key).copied().unwrap_or(0);
        let spoken = self.seats[i].welcome.as_ref().map_or(VERSION, |(version, _)| *version);
        let request = match request {
            // One of before gives it its time.
            Request::Kill { task, attempt } if spoken < WITH_KILL => Request::Cancel { task, attempt },
            request => request,
        };
        let forgotten = matches!(request, Request::Forget { .. });
        // One that is gone has its end on the way to us.
        let _ = self.seats[i].orders.send(request).await;
        if forgotten && self.owners.remove(&key).is_some() {
            self.seats[i].knows -= 1;
            self.retire(i).await;
        }
    }

    /// Ends a warden of before that knows nothing any more: what it forgot was ended and acknowledged, and
    /// nothing new was ever given to it.
    async fn retire(&mut self, i: usize) {
        if i > 0 && self.seats[i].knows == 0 {
            self.end(i).await;
        }
    }

    async fn end(&mut self, i: usize) {
        if !std::mem::replace(&mut self.seats[i].ending, true) {
            let _ = self.seats[i].orders.send(Request::Stop).await;
        }
    }
}

async fn connect(data_dir: &Path) -> Result<UnixStream, WardenError> {
    let path = node_warden::socket_path(data_dir);
    UnixStream::connect(&path).await.map_err(|source| WardenError::Socket { path, source })
}

/// Reads what a warden says until it ends; says why.
async fn read_events(mut read: OwnedReadHalf, seat: usize, told: &mpsc::Sender<(usize, Result<Event, WardenError>)>) -> WardenError {
    let mut decoder = Decoder::<Event>::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match read.read(&mut buffer).await {
            Ok(0) => return WardenError::Closed,
            Ok(n) => decoder.push(&buffer[..n]),
            Err(source) => return WardenError::Socket { path: "(stream)".into(), source },
        }
        loop {
            match decoder.pop() {
                Ok(None) => break,
                Ok(Some(Event::Welcome { version, .. })) if !(1..=VERSION).contains(&version) => return WardenError::Version(version),
                Ok(Some(event)) => {
                    if told.send((seat, Ok(event))).await.is_err() {
                        return WardenError::Closed;
                    }
                }
                Err(e) => return e.into(),
            }
        }
    }
}

async fn write_requests(mut write: OwnedWriteHalf, mut requests: mpsc::Receiver<Request>) -> std::io::Result<()> {
    write.write_all(&Request::Hello { version: VERSION }.encode()).await?;
    let (mut waiting, mut bytes) = (Vec::with_capacity(REQUESTS), vec![]);
    // What waits goes together, so that the warden hears it in one turn and syncs once for it.
    while requests.recv_many(&mut waiting, REQUESTS).await > 0 {
        for request in waiting.drain(..) {
            bytes.extend_from_slice(&request.encode());
            if bytes.len() >= WRITE_BYTES {
                write.write_all(&bytes).await?;
                bytes.clear();
            }
        }
        write.write_all(&bytes).await?;
        bytes.clear();
        bytes.shrink_to(WRITE_BYTES);
    }
    Ok(())
}

/// Ends all tasks and the wardens when no daemon runs. False when there was no warden.
pub async fn stop(data_dir: &Path) -> Result<bool, WardenError> {
    let mut streams = vec![];
    for seat in node_warden::seats(data_dir) {
        let Ok(mut stream) = connect(&seat).await else { continue };
        // All are told before any is waited for. One that is gone already cannot hear it.
        let _ = stream.write_all(&Request::Hello { version: VERSION }.encode()).await;
        let _ = stream.write_all(&Request::Stop.encode()).await;
        streams.push(stream);
    }
    let any = !streams.is_empty();
    let mut buffer = vec![0; READ_BYTES];
    for mut stream in streams {
        // Only the warden's end ends this.
        while matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {}
    }
    Ok(any)
}

/// Asks the wardens what they know, for `status` while no daemon runs. None when there is no warden.
pub async fn known(data_dir: &Path) -> Result<Option<Vec<Known>>, WardenError> {
    let mut all = None;
    for seat in node_warden::seats(data_dir) {
        let Ok(stream) = connect(&seat).await else { continue };
        let (read, mut write) = stream.into_split();
        let _ = write.write_all(&Request::Hello { version: VERSION }.encode()).await;
        let (told, mut words) = mpsc::channel(1);
        let word = tokio::select! {
            biased;
            word = words.recv() => word,
            end = read_events(read, 0, &told) => match end {
                // It was dying: nobody is there.
                WardenError::Closed | WardenError::Socket { .. } => continue,
                end => return Err(end),
            },
        };
        if let Some((_, Ok(Event::Welcome { attempts, .. }))) = word {
            all.get_or_insert_with(Vec::new).extend(attempts);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// The socket of a dying warden answers a launch and is gone when the daemon connects.
    #[tokio::test]
    async fn the_first_attachment_outlasts_a_dying_warden() {
        let dir = tempfile::tempdir().unwrap();
        let (dying, living) = (dir.path().join("dying"), dir.path().join("living"));
        for seat in [&dying, &living] {
            std::fs::create_dir(seat).unwrap();
        }
        drop(UnixListener::bind(node_warden::socket_path(&dying)).unwrap());
        let _listener = UnixListener::bind(node_warden::socket_path(&living)).unwrap();
        let spool = SpoolId::from_bytes([1; 16]);
        let mut launches = 0;
        let open = open_by(|| {
            launches += 1;
            let seats = vec![if launches < 3 { dying.clone() } else { living.clone() }];
            std::future::ready(Ok(Wardens { seats, spool }))
        });
        assert_eq!(open.await.unwrap().streams.len(), 1);
        assert_eq!(launches, 3);
        // One that never lives is told, not waited for.
        let open = open_by(|| std::future::ready(Ok(Wardens { seats: vec![dying.clone()], spool })));
        assert!(matches!(open.await, Err(WardenError::Socket { .. })));
    }

    /// Who is hung up by every seat meets no warden, as with no socket at all.
    #[tokio::test]
    async fn a_dying_warden_knows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(known(dir.path()).await.unwrap().is_none());
        let listener = UnixListener::bind(node_warden::socket_path(dir.path())).unwrap();
        let hang_up = async {
            drop(listener.accept().await.unwrap());
        };
        let (found, ()) = tokio::join!(known(dir.path()), hang_up);
        assert!(found.unwrap().is_none());
    }
}
