//! A PostgreSQL server for tests, from Debian's package `postgresql`.
//!
//! It lies in a folder of its own, listens on a socket there and nowhere else, and syncs like a real
//! one. A watching shell is its parent: that ends the server and removes the folder when this process
//! has ended, however it ended.

#![expect(clippy::disallowed_methods, reason = "tests start the real server")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Reads words, answers each; the end of its input is the end of everything. `postgres` refuses to run
/// as root, and should this shell itself be killed it goes too.
const WATCH: &str = r#"
trap '' INT TERM HUP PIPE
bin=$1 server=
dir=$(mktemp -d "${TMPDIR:-/tmp}/cortex-postgres.XXXXXX") || exit 1
cd "$dir" || exit 1
as() {
    if [ "$(id -u)" = 0 ]; then set -- --reuid=postgres --regid=postgres --clear-groups "$@"; fi
    exec setpriv --pdeathsig=QUIT "$@"
}
start() {
    as "$bin/postgres" -D "$dir/data" -k "$dir" -c listen_addresses= -c max_connections=400 -c shared_buffers=32MB \
        -c fsync=on -c deadlock_timeout=50ms >>"$dir/log" 2>&1 &
    server=$!
    until "$bin/pg_isready" -q -h "$dir"; do
        kill -0 "$server" 2>/dev/null || return 1
        sleep 0.05
    done
}
halt() {
    [ -z "$server" ] || { kill -"$1" "$server" && wait "$server"; server=; } 2>/dev/null
    return 0
}
say() { if "$@"; then echo "done $dir"; else echo "failed $dir"; fi; }
[ "$(id -u)" != 0 ] || chown postgres "$dir"
(as "$bin/initdb" -D "$dir/data" -U postgres -A trust -E UTF8 --locale=C.UTF-8 --no-sync) >"$dir/log" 2>&1
say start
while read -r word; do
    case $word in
    start) say start ;;
    stop) say halt INT ;;
    crash) say halt QUIT ;;
    esac
done
halt QUIT
rm -rf "$dir"
"#;

/// A running server.
#[derive(Debug)]
pub struct Server {
    bin: PathBuf,
    folder: PathBuf,
    watch: Mutex<Watch>,
    databases: AtomicU32,
}

#[derive(Debug)]
struct Watch {
    shell: Child,
    words: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    /// The one that all tests of a program share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// One that a test has for itself, to stop it.
    pub fn start() -> Self {
        let bin = programs();
        let mut shell = Command::new("/bin/sh")
            .args(["-c", WATCH, "watch"])
            .arg(&bin)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A Ctrl-C is for the test; the shell hears of it by the end of its input.
            .process_group(0)
            .spawn()
            .expect("a shell starts");
        let words = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().expect("it was asked for"));
        let mut watch = Watch { shell, words, answers };
        let folder = watch.answer();
        Self { bin, folder, watch: Mutex::new(watch), databases: AtomicU32::new(0) }
    }

    /// The address of a new, empty database.
    pub fn database(&self) -> String {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::AcqRel));
        let made = Command::new(self.bin.join("createdb")).arg("-h").arg(&self.folder).args(["-U", "postgres", &name]).output();
        let made = made.expect("createdb starts");
        assert!(made.status.success(), "createdb: {}", String::from_utf8_lossy(&made.stderr));
        format!("postgres://postgres@{}/{name}", self.folder.display().to_string().replace('/', "%2F"))
    }

    /// Ends every connection to its databases; new ones are taken at once.
    pub fn cut(&self) {
        const CUT: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let done = Command::new(self.bin.join("psql")).arg("-h").arg(&self.folder).args(["-U", "postgres", "-qc", CUT]).output();
        let done = done.expect("psql starts");
        assert!(done.status.success(), "psql: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Ends the server as a power cut would, as far as its files are concerned.
    pub fn crash(&self) {
        self.ask("crash");
    }
    /// Ends the server as its service would: connections are closed, with a reason.
    pub fn stop(&self) {
        self.ask("stop");
    }
    /// Starts it again, on what it has kept.
    pub fn again(&self) {
        self.ask("start");
    }

    fn ask(&self, word: &str) {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(watch.words.as_mut().expect("open until the end"), "{word}").expect("the shell listens");
        watch.answer();
    }
}

impl Watch {
    fn answer(&mut self) -> PathBuf {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the shell answers");
        match line.trim_end().split_once(' ') {
            Some(("done", folder)) => folder.into(),
            Some((_, folder)) => {
                let log = std::fs::read_to_string(PathBuf::from(folder).join("log")).unwrap_or_default();
                panic!("the PostgreSQL server did not start:\n{log}")
            }
            None => panic!("the shell that starts PostgreSQL ended: {line:?}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let watch = self.watch.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(watch.words.take());
        let _ = watch.shell.wait();
    }
}

/// The newest version's folder of programs.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.filter_map(|v| Some((v.file_name().to_str()?.parse::<u32>().ok()?, v.path().join("bin"))));
    let found = found.filter(|(_, bin)| bin.join("initdb").exists() && bin.join("postgres").exists()).max();
    found.expect("PostgreSQL is not installed; this test needs it: apt-get install postgresql").1
}
