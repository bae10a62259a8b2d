//! HTTP by hand: what is sent is exactly what a test says, and what came is kept whole.

use mesh_tests::{Hub, PATIENCE};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};

pub trait Both: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Both for T {}

pub type Io = BufReader<Box<dyn Both>>;

/// A connection to the hub: by its address, or by its control socket.
pub async fn connect(hub: &Hub, socket: bool) -> Io {
    let io: Box<dyn Both> = if socket {
        Box::new(UnixStream::connect(hub.data().join("hub.sock")).await.expect("the socket takes the connection"))
    } else {
        Box::new(TcpStream::connect(hub.address()).await.expect("the hub takes the connection"))
    };
    BufReader::new(io)
}

/// Within the patience of tests.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// An answer as it came.
#[derive(Debug, Default)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// Empty where the connection goes on: a stream, or a WebSocket.
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
    pub fn is_open(&self) -> bool {
        self.status == 101 || self.header("content-type") == Some("text/event-stream")
    }
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }
    /// All of it, to look for what must not be there.
    pub fn whole(&self) -> String {
        format!("{:?}{}", self.headers, self.body)
    }
}

/// Reads one answer; none if the hub has hung up instead.
pub async fn answer(io: &mut Io) -> Option<Answer> {
    let mut line = String::new();
    io.read_line(&mut line).await.ok().filter(|n| *n > 0)?;
    let mut answer = Answer { status: line.split(' ').nth(1)?.parse().ok()?, ..Answer::default() };
    loop {
        let mut line = String::new();
        io.read_line(&mut line).await.ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        answer.headers.push((name.to_lowercase(), value.to_owned()));
    }
    if !answer.is_open() {
        let mut body = vec![];
        while let Some(piece) = piece(io, &answer, body.len()).await {
            body.extend(piece);
        }
        answer.body = String::from_utf8_lossy(&body).into_owned();
    }
    Some(answer)
}

/// The next piece of a body of which `seen` bytes are read. None: it has come to its own end.
async fn piece(io: &mut Io, answer: &Answer, seen: usize) -> Option<Vec<u8>> {
    let length = answer.header("content-length").and_then(|l| l.parse::<usize>().ok());
    if length.is_some() || answer.header("transfer-encoding").is_none() {
        let mut body = vec![0; length.unwrap_or(0) - seen.min(length.unwrap_or(0))];
        io.read_exact(&mut body).await.expect("a body as long as it was said");
        return Some(body).filter(|b| !b.is_empty());
    }
    chunk(io).await.expect("a body that is not cut")
}

/// One chunk of a chunked body, None at its end; an error where it was cut.
pub async fn chunk(io: &mut Io) -> Result<Option<Vec<u8>>, ()> {
    let mut line = String::new();
    io.read_line(&mut line).await.map_err(drop)?;
    let length = usize::from_str_radix(line.trim_end(), 16).map_err(drop)?;
    let mut bytes = vec![0; length + 2];
    io.read_exact(&mut bytes).await.map_err(drop)?;
    bytes.truncate(length);
    Ok(Some(bytes).filter(|b| !b.is_empty()))
}

/// Sends a request and reads its answer, with what may come after.
pub async fn exchange(hub: &Hub, socket: bool, request: &str) -> (Answer, Io) {
    soon("an answer", async {
        let mut io = connect(hub, socket).await;
        // The hub may have answered and hung up before all was said.
        let _ = io.write_all(request.as_bytes()).await;
        let answer = answer(&mut io).await.unwrap_or_else(|| panic!("no answer to {}", request.chars().take(300).collect::<String>()));
        (answer, io)
    })
    .await
}
