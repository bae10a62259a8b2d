use super::*;
use axum::body::Bytes;
use axum::routing::get;
use futures::StreamExt;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PATIENCE: Duration = Duration::from_secs(90);
const LONG: Duration = Duration::from_secs(600);
const SHORT: Duration = Duration::from_secs(1);

fn limits() -> Limits {
    Limits { connections: 1000, head: LONG, idle: LONG, stalled: LONG, grace: LONG }
}

struct Stage {
    address: SocketAddr,
    tasks: Tasks,
    /// Told when `/slow` is under way.
    begun: Arc<tokio::sync::Notify>,
}

async fn stage(limits: Limits) -> Stage {
    staged(limits, None, |listener| listener).await
}

async fn staged<L: Accept>(limits: Limits, shares: Option<Shares>, door: impl FnOnce(TcpListener) -> L) -> Stage {
    let endless = || async {
        let part = Bytes::from(vec![b'x'; 16 << 10]);
        Body::from_stream(futures::stream::repeat(part).map(Ok::<_, Infallible>))
    };
    let begun = Arc::new(tokio::sync::Notify::new());
    let told = begun.clone();
    let slow = || async move {
        told.notify_one();
        tokio::time::sleep(SHORT).await;
        "late"
    };
    // An event stream with nothing to say.
    let quiet = || async { Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>()) };
    let app = Router::new()
        .route("/", get(|| async { "here" }))
        .route("/endless", get(endless))
        .route("/slow", get(slow))
        .route("/quiet", get(quiet));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tasks = Tasks::new();
    tasks.spawn_vital("test", serve("test", door(listener), app, limits, shares, tasks.clone()));
    Stage { address, tasks, begun }
}

impl Stage {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }
}

async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("waited in vain for: {what}"))
}

/// One request on a kept connection; gives the answer's first line.
async fn ask(io: &mut TcpStream, path: &str) -> String {
    try_ask(io, path).await.expect("an answer")
}

/// None when the connection was closed instead.
async fn try_ask(io: &mut TcpStream, path: &str) -> Option<String> {
    io.write_all(format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.ok()?;
    let mut seen = vec![];
    let whole = soon("an answer", async {
        while !seen.windows(4).any(|w| w == b"here" || w == b"late") {
            if io.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                return false;
            }
        }
        true
    });
    whole.await.then(|| String::from_utf8(seen).unwrap().lines().next().unwrap_or_default().to_owned())
}

/// A connection that was served once. Where a client may be silent only for a moment, one that stood still for
/// all of it, between its connection and its words, comes again.
async fn served(stage: &Stage, path: &str) -> TcpStream {
    let come = async {
        loop {
            let mut io = stage.connect().await;
            if let Some(first) = try_ask(&mut io, path).await {
                assert_eq!(first, "HTTP/1.1 200 OK");
                return io;
            }
        }
    };
    soon("to be served", come).await
}

/// All that comes until the other end closes.
async fn rest(io: &mut TcpStream) -> String {
    let mut seen = vec![];
    // A reset is an end too.
    let _ = soon("the end of a connection", io.read_to_end(&mut seen)).await;
    String::from_utf8_lossy(&seen).into_owned()
}

/// Connections that come from elsewhere, one address after the other, and then all from [`GREEDY`].
const GREEDY: &str = "192.0.2.1";
struct From(TcpListener, std::vec::IntoIter<&'static str>);

impl Accept for From {
    type Io = TcpStream;
    async fn accept(&mut self) -> std::io::Result<Option<(TcpStream, Peer)>> {
        let (io, _) = self.0.accept().await?;
        let address = self.1.next().unwrap_or(GREEDY).parse().unwrap();
        Ok(Some((io, Peer { address: Some(address), local: None })))
    }
}

#[tokio::test]
async fn no_network_takes_all_connections() {
    let shares = Shares::new(2, Networks::parse(["198.51.100.7"]).unwrap());
    let all = [
        (GREEDY, true),
        (GREEDY, true),
        (GREEDY, false),
        ("192.0.2.2", true),
        ("2001:db8::1", true),
        ("2001:db8::2", true),
        ("2001:db8::3", false),
        ("198.51.100.7", true),
        ("198.51.100.7", true),
        ("198.51.100.7", true),
        ("127.0.0.1", true),
        ("127.0.0.1", true),
        ("127.0.0.1", true),
    ];
    let addresses: Vec<&str> = all.iter().map(|(address, _)| *address).collect();
    let stage = staged(limits(), Some(shares), |listener| From(listener, addresses.into_iter())).await;
    let mut kept = vec![];
    for (n, (address, taken)) in all.into_iter().enumerate() {
        let mut io = stage.connect().await;
        if taken {
            assert_eq!(ask(&mut io, "/").await, "HTTP/1.1 200 OK", "{n}: {address}");
            kept.push(io);
        } else {
            assert!(rest(&mut io).await.starts_with("HTTP/1.1 503 "), "{n}: {address}");
        }
    }
    kept.remove(0);
    soon("a place that was given back", async {
        loop {
            let mut io = stage.connect().await;
            let mut first = [0; 12];
            io.write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n").await.ok();
            if io.read_exact(&mut first).await.is_ok() && first == *b"HTTP/1.1 200" {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_silent_connection_is_closed_and_a_used_one_stays() {
    let stage = stage(Limits { idle: SHORT, ..limits() }).await;
    let mut silent = stage.connect().await;
    let mut used = served(&stage, "/").await;
    assert_eq!(rest(&mut silent).await, "");
    // What it waits for is no silence of the client.
    served(&stage, "/slow").await;
    assert_eq!(rest(&mut used).await, "", "and it is closed when its own silence has lasted");
}

#[tokio::test]
async fn a_head_that_trickles_is_cut_whatever_it_says() {
    let stage = stage(Limits { head: SHORT, ..limits() }).await;
    for begin in ["G", "GET / HTTP/1.1\r\nHost: h\r\n", "PR"] {
        let mut io = stage.connect().await;
        io.write_all(begin.as_bytes()).await.unwrap();
        let trickle = async {
            while io.write_all(b"X").await.is_ok() {
                let mut one = [0];
                if matches!(tokio::time::timeout(Duration::from_millis(20), io.read(&mut one)).await, Ok(Ok(0) | Err(_))) {
                    break;
                }
            }
        };
        soon("the cut", trickle).await;
    }
    // The second head on a kept connection as well.
    let mut io = served(&stage, "/").await;
    io.write_all(b"GET").await.unwrap();
    assert_eq!(rest(&mut io).await, "");
}

#[tokio::test]
async fn beyond_the_limit_is_refused_until_one_goes() {
    let stage = stage(Limits { connections: 2, ..limits() }).await;
    let (mut one, mut two) = (stage.connect().await, stage.connect().await);
    ask(&mut one, "/").await;
    ask(&mut two, "/").await;
    let told = rest(&mut stage.connect().await).await;
    assert!(told.starts_with("HTTP/1.1 503 ") && told.contains("Retry-After"), "{told:?}");
    drop(one);
    soon("a free place", async {
        loop {
            let mut next = stage.connect().await;
            let _ = next.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await;
            if rest(&mut next).await.starts_with("HTTP/1.1 200") {
                return;
            }
        }
    })
    .await;
    ask(&mut two, "/").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_is_cut_and_a_quiet_stream_is_not() {
    let stage = stage(Limits { stalled: SHORT, connections: 2, ..limits() }).await;
    let mut quiet = stage.connect().await;
    quiet.write_all(b"GET /quiet HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    let mut stalled = stage.connect().await;
    stalled.write_all(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
    // Both places are taken until the stalled one's is given back, unread.
    soon("the stalled one's place", async {
        loop {
            let mut next = stage.connect().await;
            let _ = next.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").await;
            if rest(&mut next).await.starts_with("HTTP/1.1 200") {
                return;
            }
        }
    })
    .await;
    let mut some = [0; 12];
    soon("the quiet stream's answer", quiet.read_exact(&mut some)).await.unwrap();
    assert_eq!(&some, b"HTTP/1.1 200");
    let mut head = vec![0; 1024];
    let _ = quiet.read(&mut head).await;
    assert!(tokio::time::timeout(SHORT * 3, quiet.read(&mut head)).await.is_err(), "it is still there");
}

#[tokio::test]
async fn heads_are_bounded() {
    let stage = stage(limits()).await;
    for head in ["X: ".to_owned() + &"x".repeat(HEAD_BYTES * 2), "X: y\r\n".repeat(HEAD_LINES * 2)] {
        let mut io = stage.connect().await;
        let _ = io.write_all(format!("GET / HTTP/1.1\r\nHost: h\r\n{head}\r\n\r\n").as_bytes()).await;
        let told = rest(&mut io).await;
        assert!(told.starts_with("HTTP/1.1 431 "), "{told:?}");
    }
}

#[tokio::test]
async fn a_stop_lets_requests_end_and_nobody_else_wait() {
    let stage = stage(limits()).await;
    let (mut idle, mut half, mut busy) = (stage.connect().await, stage.connect().await, stage.connect().await);
    ask(&mut idle, "/").await;
    half.write_all(b"GET / HT").await.unwrap();
    let asked = async {
        let first = ask(&mut busy, "/slow").await;
        (first, rest(&mut busy).await)
    };
    let stopped = async {
        soon("the request to be under way", stage.begun.notified()).await;
        stage.tasks.end(PATIENCE).await
    };
    let ((first, after), ended) = futures::join!(asked, stopped);
    assert_eq!((first.as_str(), after.as_str()), ("HTTP/1.1 200 OK", ""));
    assert_eq!(ended, mesh_process::tasks::Ended::Clean);
    assert_eq!((rest(&mut idle).await, rest(&mut half).await), (String::new(), String::new()));
}

async fn h2(stage: &Stage) -> (hyper::client::conn::http2::SendRequest<Body>, tokio::task::JoinHandle<bool>) {
    let io = TokioIo::new(stage.connect().await);
    let (send, conn) = hyper::client::conn::http2::handshake(Streams(stage.tasks.clone()), io).await.unwrap();
    let (told, ended) = tokio::sync::oneshot::channel();
    stage.tasks.spawn("client", async move {
        let _ = told.send(conn.await.is_ok());
    });
    let ended = tokio::task::spawn_blocking(move || ended.blocking_recv().unwrap_or(false));
    (send, ended)
}

fn get_of(path: &str) -> hyper::Request<Body> {
    hyper::Request::get(format!("http://h{path}")).body(Body::empty()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_has_its_own_silence() {
    // Its own frames between requests are no beginning of a head.
    let stage = stage(Limits { head: SHORT, stalled: SHORT, ..limits() }).await;
    let (mut send, _ended, first) = soon("to be served", async {
        loop {
            // As for [`served`].
            let (mut send, ended) = h2(&stage).await;
            if let Ok(answer) = send.send_request(get_of("/slow")).await {
                return (send, ended, answer);
            }
        }
    })
    .await;
    let mut first = Some(first);
    for _ in 0..3 {
        let answer = match first.take() {
            Some(answer) => answer,
            None => soon("an answer", send.send_request(get_of("/slow"))).await.unwrap(),
        };
        assert_eq!((answer.status().as_u16(), answer.version()), (200, hyper::Version::HTTP_2));
        let read = soon("a body", Body::new(answer.into_body()).into_data_stream().next()).await.unwrap().unwrap();
        assert_eq!(read, "late");
        tokio::time::sleep(SHORT * 2).await;
    }
    // One stream whose window is never opened again ends the connection, though it answers every ping.
    let answer = soon("an answer", send.send_request(get_of("/endless"))).await.unwrap();
    soon("the cut", async {
        while send.ready().await.is_ok() {
            tokio::time::sleep(SHORT).await;
        }
    })
    .await;
    drop(answer);
}
