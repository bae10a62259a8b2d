//! The machine's own record of all that ran: two lines an attempt, appended by the daemon and never
//! changed; and one for each that its owner does not allow. A start is written before the warden hears of it, so that nothing runs without its line,
//! whatever becomes of the daemon; an end that came while no daemon was there is written by the next.
//!
//! Lines reach the system's cache, not its disk: a machine that loses power may lose the last seconds.

use crate::link::orders::{Checked, Key};
use mesh_core::task::{AttemptNo, NeverStarted, Outcome};
use mesh_core::{UnixMs, name::is_deceptive};
use mesh_wire::convert::rfc3339;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file of this size becomes the former one, and the one before that goes: twice this is the most.
pub const FILE_BYTES: u64 = 8 << 20;
/// Of an argv; what is longer is cut.
const ARGV_BYTES: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line {
    Start {
        at: String,
        task: String,
        attempt: u64,
        user: String,
        session: Option<String>,
        skill: String,
        argv: Vec<String>,
        /// The argv was longer.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cut: bool,
    },
    End {
        at: String,
        task: String,
        attempt: u64,
        end: String,
    },
    /// Asked for by the hub, and not run since the owner does not allow it.
    Refused {
        at: String,
        task: String,
        attempt: u64,
        user: String,
        session: Option<String>,
        skill: String,
        argv: Vec<String>,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cut: bool,
        why: String,
    },
}

impl Line {
    fn key(&self) -> (String, u64) {
        match self {
            Self::Start { task, attempt, .. } | Self::End { task, attempt, .. } | Self::Refused { task, attempt, .. } => {
                (task.clone(), *attempt)
            }
        }
    }
}

/// One attempt, as `cortex-node log` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Default)]
pub struct Ran {
    pub task: String,
    pub attempt: u64,
    /// Of one that was refused: when it was asked for.
    pub started_at: String,
    pub user: String,
    pub session: Option<String>,
    pub skill: String,
    pub argv: Vec<String>,
    pub cut: bool,
    pub ended_at: Option<String>,
    /// None while it runs, and where the machine or the warden went down with it and it never came back.
    pub end: Option<String>,
}

impl Ran {
    /// One line, harmless on a terminal.
    pub fn line(&self) -> String {
        let what = if self.argv.is_empty() {
            self.skill.clone()
        } else {
            let words = self.argv.iter().map(|a| if a.is_empty() || a.contains([' ', '\n', '\t']) { format!("{a:?}") } else { a.clone() });
            words.collect::<Vec<_>>().join(" ")
        };
        let more = if self.cut { " …" } else { "" };
        let session = self.session.as_deref().unwrap_or("-");
        let end = self.end.as_deref().unwrap_or("no end yet");
        shown(&format!("{}  {}/{}  {}  {session}  {end}  {what}{more}", self.started_at, self.task, ordinal(self.attempt), self.user))
    }
}

fn ordinal(attempt: u64) -> u32 {
    AttemptNo(attempt).ordinal()
}

/// Control characters, line ends and what turns the direction of text are written out.
pub fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_deceptive(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

fn path(dir: &Path) -> PathBuf {
    dir.join("log.jsonl")
}
fn former(dir: &Path) -> PathBuf {
    dir.join("log.jsonl.1")
}

/// Lines that wait are written when they come to so many bytes, whoever asks.
const BATCH_BYTES: usize = 64 << 10;

/// The daemon's hand on the record.
pub struct Record {
    dir: PathBuf,
    /// Started and not ended, as far as the lines go.
    open: BTreeSet<Key>,
    /// Lines that are not in the file yet.
    waiting: Vec<u8>,
    file: Option<Appended>,
}

/// The file as it was left.
struct Appended {
    file: File,
    place: (u64, u64),
    len: u64,
}

impl Record {
    pub fn open(dir: &Path) -> Self {
        let mut open = BTreeSet::new();
        for line in lines(dir) {
            let (task, attempt) = line.key();
            let Ok(task) = task.parse() else { continue };
            let key = Key { task, attempt: AttemptNo(attempt) };
            match line {
                Line::Start { .. } => open.insert(key),
                Line::End { .. } => open.remove(&key),
                Line::Refused { .. } => false,
            };
        }
        Self { dir: dir.to_owned(), open, waiting: vec![], file: None }
    }

    /// To be called, and followed by [`Record::write`], before it can start.
    pub fn start(&mut self, o: &Checked, argv: &[String], at: UnixMs) {
        if !self.open.insert(o.key) {
            return;
        }
        let (argv, cut) = kept(argv);
        self.append(&Line::Start {
            at: rfc3339(at),
            task: o.key.task.to_string(),
            attempt: o.key.attempt.0,
            user: o.user.to_string(),
            session: o.session.map(|s| s.to_string()),
            skill: o.skill.clone(),
            argv,
            cut,
        });
    }

    /// Of one that is not run, by the owner's word.
    pub fn refused(&mut self, o: &Checked, argv: &[String], why: &str, at: UnixMs) {
        let (argv, cut) = kept(argv);
        self.append(&Line::Refused {
            at: rfc3339(at),
            task: o.key.task.to_string(),
            attempt: o.key.attempt.0,
            user: o.user.to_string(),
            session: o.session.map(|s| s.to_string()),
            skill: o.skill.clone(),
            argv,
            cut,
            why: why.to_owned(),
        });
    }

    /// Of one that was started; a second word about the same end is not written.
    pub fn end(&mut self, key: &Key, outcome: &Outcome, at: UnixMs) {
        if self.open.remove(key) {
            self.append(&Line::End { at: rfc3339(at), task: key.task.to_string(), attempt: key.attempt.0, end: words(outcome) });
        }
    }

    fn append(&mut self, line: &Line) {
        if let Err(error) = serde_json::to_writer(&mut self.waiting, line) {
            tracing::error!(%error, "a line of the machine's record cannot be made");
        }
        self.waiting.push(b'\n');
        if self.waiting.len() >= BATCH_BYTES {
            self.write();
        }
    }

    /// Brings what waits into the file, all at once.
    pub fn write(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        if let Err(error) = self.try_write() {
            tracing::error!(%error, "the machine's record of what ran cannot be written");
        }
        self.waiting.clear();
    }

    fn try_write(&mut self) -> io::Result<()> {
        let path = path(&self.dir);
        // Looked for each time: who moves the file away does not make it go on in secret.
        let mut to = match self.file.take() {
            Some(file) if file.is_at(&path) => file,
            _ => Appended::open(&path, &mut self.waiting)?,
        };
        if to.len > 0 && to.len + self.waiting.len() as u64 > FILE_BYTES {
            std::fs::rename(&path, former(&self.dir))?;
            to = Appended::open(&path, &mut self.waiting)?;
        }
        to.file.write_all(&self.waiting)?;
        to.len += self.waiting.len() as u64;
        // After an error it is looked at anew.
        self.file = Some(to);
        Ok(())
    }
}

/// As much of an argv as is kept, and whether that is not all.
fn kept(argv: &[String]) -> (Vec<String>, bool) {
    let (mut kept, mut bytes) = (vec![], 0);
    for word in argv {
        let room = ARGV_BYTES.saturating_sub(bytes);
        let end = (0..=room.min(word.len())).rev().find(|n| word.is_char_boundary(*n)).unwrap_or(0);
        kept.push(word[..end].to_owned());
        bytes += word.len() + 1;
        if bytes > ARGV_BYTES {
            break;
        }
    }
    (kept, bytes > ARGV_BYTES)
}

impl Drop for Record {
    fn drop(&mut self) {
        self.write();
    }
}

impl Appended {
    /// Opens the file for `waiting`.
    fn open(path: &Path, waiting: &mut Vec<u8>) -> io::Result<Self> {
        let file = File::options().read(true).append(true).create(true).mode(0o600).open(path)?;
        let m = file.metadata()?;
        if !ends_whole(&file, m.len())? {
            // A line that a full disk cut short must not swallow the next one.
            waiting.insert(0, b'\n');
        }
        Ok(Self { file, place: (m.dev(), m.ino()), len: m.len() })
    }
    /// Is it still the file at this path, and as it was left?
    fn is_at(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == self.place && m.len() == self.len)
    }
}

fn ends_whole(file: &File, len: u64) -> io::Result<bool> {
    let mut last = [b'\n'];
    if len > 0 {
        file.read_exact_at(&mut last, len - 1)?;
    }
    Ok(last == [b'\n'])
}

fn words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Exited(n) => format!("exit {n}"),
        Outcome::Signalled(n) => format!("signal {n}"),
        Outcome::TimedOut => "timed out".into(),
        Outcome::Cancelled => "cancelled".into(),
        Outcome::Done => "done".into(),
        Outcome::Lost { detail } => format!("lost: {detail}"),
        Outcome::NeverStarted(NeverStarted::Late) => "never started: too late".into(),
        Outcome::NeverStarted(NeverStarted::Cancelled) => "never started: cancelled".into(),
        Outcome::NeverStarted(NeverStarted::Refused(r)) => format!("never started: {}", r.detail),
    }
}

/// A line that cannot be read (it was cut short, or is of a version to come) is passed over.
fn parse(bytes: &[u8]) -> impl Iterator<Item = Line> {
    bytes.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok())
}

fn lines(dir: &Path) -> Vec<Line> {
    let mut all = vec![];
    for file in [former(dir), path(dir)] {
        all.extend(parse(&std::fs::read(file).unwrap_or_default()));
    }
    all
}

/// Joins starts and ends.
#[derive(Default)]
pub struct Reader {
    ran: Vec<Ran>,
    place: BTreeMap<(String, u64), usize>,
}

impl Reader {
    /// Gives the attempt that a line has ended, or that was refused.
    fn take(&mut self, line: Line) -> Option<Ran> {
        let key = line.key();
        match line {
            Line::Start { at, task, attempt, user, session, skill, argv, cut } => {
                self.place.insert(key, self.ran.len());
                self.ran.push(Ran { task, attempt, started_at: at, user, session, skill, argv, cut, ended_at: None, end: None });
                None
            }
            Line::End { at, end, .. } => {
                let ran = self.ran.get_mut(*self.place.get(&key)?)?;
                (ran.ended_at, ran.end) = (Some(at), Some(end));
                Some(ran.clone())
            }
            Line::Refused { at, task, attempt, user, session, skill, argv, cut, why } => {
                let end = Some(format!("refused: {why}"));
                let ran = Ran { task, attempt, started_at: at.clone(), user, session, skill, argv, cut, ended_at: Some(at), end };
                self.ran.push(ran.clone());
                Some(ran)
            }
        }
    }
    /// Everything that is recorded, by start.
    pub fn read(dir: &Path) -> Vec<Ran> {
        let mut reader = Self::default();
        for line in lines(dir) {
            reader.take(line);
        }
        reader.ran
    }
}

/// Reads on where the file ends.
pub struct Follower {
    dir: PathBuf,
    file: Option<File>,
    rest: Vec<u8>,
    reader: Reader,
}

impl Follower {
    /// Gives what is there already, too.
    pub fn new(dir: &Path) -> io::Result<(Self, Vec<Ran>)> {
        let mut own = Self { dir: dir.to_owned(), file: None, rest: vec![], reader: Reader::default() };
        for line in parse(&std::fs::read(former(dir)).unwrap_or_default()) {
            own.reader.take(line);
        }
        own.look()?;
        let ran = own.reader.ran.clone();
        Ok((own, ran))
    }
    /// Attempts that ended since the last look.
    pub fn look(&mut self) -> io::Result<Vec<Ran>> {
        let mut ended = vec![];
        loop {
            if let Some(file) = &mut self.file {
                file.read_to_end(&mut self.rest)?;
                if let Some(end) = self.rest.iter().rposition(|b| *b == b'\n') {
                    let whole: Vec<u8> = self.rest.drain(..=end).collect();
                    ended.extend(parse(&whole).filter_map(|l| self.reader.take(l)));
                }
            }
            let now = match File::open(path(&self.dir)) {
                Ok(f) => f,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(ended),
                Err(e) => return Err(e),
            };
            let same = |f: &File| Ok::<_, io::Error>(f.metadata()?.ino() == now.metadata()?.ino());
            match &self.file {
                Some(f) if same(f)? => return Ok(ended),
                // The old one was read to its end above.
                _ => (self.file, self.rest) = (Some(now), vec![]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::orders::Payload;
    use mesh_core::TaskId;
    use std::os::unix::fs::PermissionsExt;

    fn order(n: u8) -> Checked {
        Checked {
            key: Key { task: TaskId::from_bytes([n; 16]), attempt: AttemptNo::first(1) },
            skill: "shell".into(),
            digest: [0; 32],
            payload: Payload::Inline(vec![]),
            user: mesh_core::UserId::from_bytes([1; 16]),
            session: None,
            timeout_secs: 0,
            start_before_ms: 0,
            granted: true,
            request_id: String::new(),
        }
    }
    fn argv(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn a_start_stays_when_the_daemon_dies_and_its_end_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (order(1), order(2));
        {
            let mut r = Record::open(dir.path());
            r.start(&a, &argv(&["make", "a b", "x\u{1b}[2J\n"]), 1000);
            r.start(&b, &argv(&["true"]), 2000);
            r.end(&b.key, &Outcome::Exited(3), 3000);
            assert!(Reader::read(dir.path()).is_empty(), "what came together is written together");
        }
        // Another daemon: it hears of both ends, one of them again.
        let mut r = Record::open(dir.path());
        r.start(&a, &argv(&["make"]), 4000);
        r.end(&b.key, &Outcome::Exited(3), 5000);
        r.end(&a.key, &Outcome::Signalled(9), 6000);
        r.end(&a.key, &Outcome::Signalled(9), 7000);
        r.end(&order(3).key, &Outcome::Done, 8000);
        r.write();
        let ran = Reader::read(dir.path());
        assert_eq!(ran.len(), 2, "{ran:?}");
        assert_eq!(ran.iter().map(|r| r.end.as_deref()).collect::<Vec<_>>(), [Some("signal 9"), Some("exit 3")]);
        assert_eq!(std::fs::read_to_string(path(dir.path())).unwrap().lines().count(), 4);
        let line = ran[0].line();
        assert!(line.contains(&format!("{}/1", a.key.task)) && line.contains("signal 9  make \"a b\""), "{line}");
        assert!(!line.contains(['\u{1b}', '\n']), "{line:?}");
        assert_eq!(std::fs::metadata(path(dir.path())).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_was_refused_is_a_line_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut r = Record::open(dir.path());
        let (mut follower, _) = Follower::new(dir.path()).unwrap();
        r.start(&order(1), &argv(&["true"]), 1000);
        r.refused(&order(2), &argv(&["rm", "-rf"]), "ceiling: deny[0]", 2000);
        r.write();
        let seen = follower.look().unwrap();
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!((seen[0].end.as_deref(), &seen[0].argv), (Some("refused: ceiling: deny[0]"), &argv(&["rm", "-rf"])));
        assert!(seen[0].ended_at.is_some() && seen[0].line().ends_with("refused: ceiling: deny[0]  rm -rf"), "{seen:?}");
        // The next daemon: what was refused was never started, and is not waited for.
        let mut r = Record::open(dir.path());
        r.end(&order(2).key, &Outcome::Exited(0), 3000);
        r.end(&order(1).key, &Outcome::Exited(0), 4000);
        r.write();
        let ran = Reader::read(dir.path());
        assert_eq!(ran.iter().map(|r| r.end.as_deref()).collect::<Vec<_>>(), [Some("exit 0"), Some("refused: ceiling: deny[0]")]);
    }

    #[test]
    fn it_is_bounded_and_a_torn_line_swallows_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut r = Record::open(dir.path());
        let long = "ä".repeat(ARGV_BYTES);
        r.start(&order(1), &argv(&["x", &long, "y"]), 0);
        r.write();
        std::fs::OpenOptions::new().append(true).open(path(dir.path())).unwrap().write_all(b"{\"event\":\"sta").unwrap();
        r.end(&order(1).key, &Outcome::Exited(0), 0);
        r.write();
        let ran = Reader::read(dir.path());
        assert!(ran[0].cut && ran[0].argv.len() == 2 && ran[0].argv[1].len() <= ARGV_BYTES, "{}", ran[0].argv.len());
        assert_eq!(ran[0].end.as_deref(), Some("exit 0"));

        let (mut follower, before) = Follower::new(dir.path()).unwrap();
        assert_eq!(before.len(), 1);
        for n in 0..4500u16 {
            let mut o = order(2);
            o.key.attempt = AttemptNo(u64::from(n) + 2);
            r.start(&o, &argv(&[&long]), 0);
            r.end(&o.key, &Outcome::Exited(0), 0);
            if n % 1000 == 0 {
                r.write();
                assert!(!follower.look().unwrap().is_empty(), "also over a change of files");
            }
        }
        r.write();
        let size = |p: PathBuf| std::fs::metadata(p).unwrap().len();
        assert!(size(path(dir.path())) <= FILE_BYTES && size(former(dir.path())) <= FILE_BYTES);
        assert!(size(former(dir.path())) > FILE_BYTES / 2);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert_eq!(follower.look().unwrap().last().unwrap().attempt, 4501);
        assert!(follower.look().unwrap().is_empty());

        std::fs::rename(path(dir.path()), dir.path().join("moved")).unwrap();
        let moved = size(dir.path().join("moved"));
        r.start(&order(3), &argv(&["true"]), 0);
        r.write();
        assert_eq!(size(dir.path().join("moved")), moved, "it does not go on in a file that was moved away");
        assert!(std::fs::read_to_string(path(dir.path())).unwrap().contains("true"));
    }
}
