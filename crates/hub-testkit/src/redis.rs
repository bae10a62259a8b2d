//! A Redis server for tests, from Debian's package `redis-server`.
//!
//! It listens on a free port of the loopback address, keeps nothing on disk and forgets all when it
//! ends. A watching shell is its parent: that ends the server and removes its folder when this process
//! has ended, however it ended.

#![expect(clippy::disallowed_methods, reason = "tests start the real server")]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

const PROGRAM: &str = "/usr/bin/redis-server";
/// Another program may take a port between its choice and its use.
const PORTS_TRIED: usize = 10;

/// Reads words, answers each; the end of its input is the end of everything.
const WATCH: &str = r#"
trap '' INT TERM HUP PIPE
bin=$1 port=$2 server=
shift 2
dir=$(mktemp -d "${TMPDIR:-/tmp}/cortex-redis.XXXXXX") || exit 1
cd "$dir" || exit 1
start() {
    : >"$dir/log"
    setpriv --pdeathsig=KILL "$bin" --bind 127.0.0.1 --port "$port" --dir "$dir" --save '' --appendonly no \
        --daemonize no --loglevel notice "$@" >>"$dir/log" 2>&1 &
    server=$!
    until grep -q 'Ready to accept connections' "$dir/log"; do
        kill -0 "$server" 2>/dev/null || return 1
        sleep 0.02
    done
}
halt() {
    [ -z "$server" ] || { kill -"$1" "$server" && kill -CONT "$server"; wait "$server"; server=; } 2>/dev/null
    return 0
}
say() { if "$@"; then echo "done $dir"; else echo "failed $dir"; fi; }
say start "$@"
while read -r word; do
    case $word in
    start) say start "$@" ;;
    stop) say halt TERM ;;
    crash) say halt KILL ;;
    freeze) say kill -STOP "$server" ;;
    thaw) say kill -CONT "$server" ;;
    esac
done
halt KILL
rm -rf "$dir"
"#;

/// A running server.
#[derive(Debug)]
pub struct Server {
    port: u16,
    watch: Mutex<Watch>,
}

#[derive(Debug)]
struct Watch {
    shell: Child,
    words: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With options of its own, such as `--requirepass`.
    pub fn start_with(options: &[&str]) -> Self {
        assert!(Path::new(PROGRAM).exists(), "Redis is not installed; this test needs it: apt-get install redis-server");
        let mut why = String::new();
        for _ in 0..PORTS_TRIED {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a free port").port();
            let mut watch = Watch::open(port, options);
            match watch.answer() {
                Ok(()) => return Self { port, watch: Mutex::new(watch) },
                Err(log) => why = log,
            }
        }
        panic!("the Redis server did not start:\n{why}")
    }

    pub fn port(&self) -> u16 {
        self.port
    }
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Ends the server without a word to anybody.
    pub fn crash(&self) {
        self.ask("crash");
    }
    /// Ends the server as its service would.
    pub fn stop(&self) {
        self.ask("stop");
    }
    /// Starts it again on the same port, empty.
    pub fn again(&self) {
        self.ask("start");
    }
    /// It keeps its connections and answers nothing more.
    pub fn freeze(&self) {
        self.ask("freeze");
    }
    pub fn thaw(&self) {
        self.ask("thaw");
    }

    /// One command over a connection of its own; the first line of its answer, as Redis wrote it.
    pub fn command(&self, words: &[&[u8]]) -> String {
        self.commands(&[words])
    }

    /// Several that answer with one line each, over one connection; the answer to the last.
    pub fn commands(&self, all: &[&[&[u8]]]) -> String {
        let mut socket = BufReader::new(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).expect("the server takes connections"));
        let mut line = vec![];
        for words in all {
            let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
            for word in *words {
                bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
                bytes.extend_from_slice(word);
                bytes.extend_from_slice(b"\r\n");
            }
            socket.get_mut().write_all(&bytes).expect("the server reads");
            line.clear();
            socket.read_until(b'\n', &mut line).expect("the server answers");
        }
        String::from_utf8_lossy(&line).trim_end().to_owned()
    }

    fn ask(&self, word: &str) {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(watch.words.as_mut().expect("open until the end"), "{word}").expect("the shell listens");
        watch.answer().unwrap_or_else(|log| panic!("the Redis server did not {word}:\n{log}"));
    }
}

impl Watch {
    fn open(port: u16, options: &[&str]) -> Self {
        let mut shell = Command::new("/bin/sh")
            .args(["-c", WATCH, "watch", PROGRAM, &port.to_string()])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A Ctrl-C is for the test; the shell hears of it by the end of its input.
            .process_group(0)
            .spawn()
            .expect("a shell starts");
        let words = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().expect("it was asked for"));
        Self { shell, words, answers }
    }

    /// The server's log where it failed.
    fn answer(&mut self) -> Result<(), String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the shell answers");
        match line.trim_end().split_once(' ') {
            Some(("done", _)) => Ok(()),
            Some((_, folder)) => Err(std::fs::read_to_string(PathBuf::from(folder).join("log")).unwrap_or_default()),
            None => Err(format!("the shell that starts Redis ended: {line:?}")),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.words.take());
        let _ = self.shell.wait();
    }
}
