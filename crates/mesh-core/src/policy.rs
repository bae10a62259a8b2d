//! The last judgement before something runs. A [`Grant`] is made by [`judge`] alone, and its only
//! decoder stands here too: the warden takes nothing else.

use crate::canon::{Malformed, Reader, Tag, Writer};
use crate::ceiling::{Ceiling, Find};
use crate::spec::{Program, Shell, Spec};
use crate::task::{AttemptNo, Reason, ReasonCode};
use crate::{Digest, TaskId, UserId};
use std::collections::BTreeMap;

/// Where and as whom a node lets tasks run: the node's own words, never the hub's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Absolute path of the workspace folder.
    pub workspace: String,
    /// The uid and gid that the task gets; none where the node itself is not root and has but one.
    pub run_as: Option<u32>,
    /// Remove the workspace after the end.
    pub ephemeral: bool,
}

/// Permission to start one attempt of one process, with everything that the warden needs to do it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    task: TaskId,
    attempt: AttemptNo,
    spec: Digest,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: String,
    stdin: Vec<u8>,
    stdin_open: bool,
    place: Place,
    /// Seconds of wall time; 0 is none.
    timeout_secs: u64,
}

impl Grant {
    pub fn task(&self) -> TaskId {
        self.task
    }
    pub fn attempt(&self) -> AttemptNo {
        self.attempt
    }
    /// Digest of the spec it came from: a second grant for the same attempt must carry the same.
    pub fn spec(&self) -> &Digest {
        &self.spec
    }
    pub fn argv(&self) -> &[String] {
        &self.argv
    }
    /// The whole environment of the task.
    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }
    /// Relative to the workspace.
    pub fn cwd(&self) -> &str {
        &self.cwd
    }
    pub fn stdin(&self) -> &[u8] {
        &self.stdin
    }
    /// Live input may follow [`Grant::stdin`].
    pub fn stdin_open(&self) -> bool {
        self.stdin_open
    }
    pub fn place(&self) -> &Place {
        &self.place
    }
    pub fn timeout_secs(&self) -> u64 {
        self.timeout_secs
    }

    pub fn encode(&self) -> Vec<u8> {
        // A warden of before live input reads version 1, and what needs none of it is still written so.
        let mut w = Writer::new(Tag::Grant, if self.stdin_open { 2 } else { 1 });
        w.raw(self.task.as_bytes()).u64(self.attempt.0).raw(&self.spec).u32(self.argv.len() as u32);
        for a in &self.argv {
            w.str(a);
        }
        w.u32(self.env.len() as u32);
        for (k, v) in &self.env {
            w.str(k).str(v);
        }
        w.str(&self.cwd).bytes(&self.stdin).str(&self.place.workspace);
        w.option(self.place.run_as, |w, uid| {
            w.u32(uid);
        });
        w.u8(self.place.ephemeral.into()).u64(self.timeout_secs);
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let stdin_open = bytes.get(1) == Some(&2);
        let mut r = Reader::new(bytes, Tag::Grant, if stdin_open { 2 } else { 1 })?;
        let task = TaskId::from_bytes(r.array()?);
        let attempt = AttemptNo(r.u64()?);
        let spec = r.array()?;
        let n = r.count()?;
        let argv = (0..n).map(|_| r.str().map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
        if argv.is_empty() {
            return Err(Malformed::Bounds("argv"));
        }
        let n = r.count()?;
        let env = (0..n).map(|_| Ok((r.str()?.to_owned(), r.str()?.to_owned()))).collect::<Result<_, Malformed>>()?;
        let cwd = r.str()?.to_owned();
        let stdin = r.bytes()?.to_vec();
        let workspace = r.str()?.to_owned();
        let run_as = r.option(Reader::u32)?;
        let ephemeral = match r.u8()? {
            0 => false,
            1 => true,
            v => return Err(Malformed::Unknown { what: "flag", value: v.into() }),
        };
        let timeout_secs = r.u64()?;
        r.end()?;
        // What may never run as root is refused here too, whoever wrote these bytes.
        if run_as == Some(0) {
            return Err(Malformed::Bounds("uid"));
        }
        Ok(Self { task, attempt, spec, argv, env, cwd, stdin, stdin_open, place: Place { workspace, run_as, ephemeral }, timeout_secs })
    }
}

/// What an order asks a node to do, after its signature was checked.
#[derive(Debug, Clone)]
pub struct Asked<'a> {
    pub task: TaskId,
    pub attempt: AttemptNo,
    /// Whose task it is.
    pub user: UserId,
    pub spec: &'a Spec,
    pub digest: Digest,
    pub timeout_secs: u64,
}

/// What the machine itself brings into a judgement.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    pub ceiling: &'a Ceiling,
    /// Where a name leads, from the task's folder.
    pub find: Find<'a>,
}

impl Machine<'static> {
    /// One whose owner bounds nothing.
    pub const OPEN: Machine<'static> = Machine { ceiling: &Ceiling::OPEN, find: &|_| None };
}

/// Where a program is looked for, whatever PATH a task brings: by the ceiling's rules, and by default.
pub const FIXED_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Judges a process to be started. The environment starts empty but for PATH, HOME, LANG, TMPDIR and
/// USER; names that steer the loader are refused, since they would change what is executed.
pub fn judge(asked: &Asked<'_>, place: Place, machine: &Machine<'_>) -> Result<Grant, Reason> {
    let Spec::Shell(Shell { program, cwd, env, stdin, stdin_open }) = asked.spec else {
        return Err(Reason::new(ReasonCode::BadRequest, "not a process"));
    };
    asked.spec.validate().map_err(|e| Reason::new(ReasonCode::BadRequest, e.to_string()))?;
    if place.run_as == Some(0) {
        return Err(Reason::new(ReasonCode::PolicyDenied, "tasks never run as root"));
    }
    if let Some(name) = env.keys().find(|k| k.starts_with("LD_") || k.starts_with("DYLD_")) {
        return Err(Reason::new(ReasonCode::PolicyDenied, format!("environment variable {name} steers the loader")));
    }
    let ceiling = machine.ceiling;
    ceiling.admit(asked.user)?;
    ceiling.admit_timeout(asked.timeout_secs)?;
    if let Program::Script(_) = program {
        ceiling.admit_scripts()?;
    }
    let argv = ceiling.admit_program(program.argv(), machine.find)?;
    let mut full: BTreeMap<String, String> =
        [("PATH", FIXED_PATH), ("HOME", place.workspace.as_str()), ("LANG", "C.UTF-8"), ("TMPDIR", "/tmp"), ("USER", "cortex")]
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
    full.extend(env.clone());
    Ok(Grant {
        task: asked.task,
        attempt: asked.attempt,
        spec: asked.digest,
        argv,
        env: full,
        cwd: cwd.clone(),
        stdin: stdin.clone(),
        stdin_open: *stdin_open,
        place,
        timeout_secs: asked.timeout_secs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ceiling::{Executable, Rule};
    use proptest::prelude::*;

    fn place() -> Place {
        Place { workspace: "/w".into(), run_as: Some(1000), ephemeral: false }
    }
    fn shell(program: Program, env: &[(&str, &str)]) -> Spec {
        let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Spec::Shell(Shell { program, cwd: "sub".into(), env, stdin: b"in".to_vec(), stdin_open: false })
    }
    fn ask(spec: &Spec) -> Asked<'_> {
        Asked {
            task: TaskId::from_bytes([1; 16]),
            attempt: AttemptNo(1),
            user: UserId::from_bytes([7; 16]),
            spec,
            digest: spec.digest(),
            timeout_secs: 3,
        }
    }

    #[test]
    fn a_grant_round_trips() {
        let spec = shell(Program::Script("echo".into()), &[("A", "b")]);
        let g = judge(&ask(&spec), place(), &Machine::OPEN).unwrap();
        assert_eq!(g.argv(), ["/bin/sh", "-c", "echo"]);
        assert_eq!(g.env()["HOME"], "/w");
        assert_eq!(Grant::decode(&g.encode()).unwrap(), g);
        assert_eq!(g.encode()[1], 1, "a warden of before live input reads it");
        let Spec::Shell(s) = spec else { unreachable!() };
        let open = Spec::Shell(Shell { stdin_open: true, ..s });
        let g = judge(&ask(&open), place(), &Machine::OPEN).unwrap();
        assert!(g.stdin_open() && Grant::decode(&g.encode()).unwrap() == g);
    }

    #[test]
    fn root_is_refused_by_judge_and_by_decoder() {
        let spec = shell(Program::Argv(vec!["id".into()]), &[]);
        let root = Place { run_as: Some(0), ..place() };
        assert_eq!(judge(&ask(&spec), root, &Machine::OPEN).unwrap_err().code, ReasonCode::PolicyDenied);
        let mut bytes = judge(&ask(&spec), place(), &Machine::OPEN).unwrap().encode();
        let at = bytes.len() - 1 - 8 - 4;
        bytes[at..at + 4].fill(0);
        assert_eq!(Grant::decode(&bytes), Err(Malformed::Bounds("uid")));
    }

    #[test]
    fn the_loader_is_not_steered() {
        let spec = shell(Program::Argv(vec!["id".into()]), &[("LD_PRELOAD", "/tmp/x.so")]);
        assert_eq!(judge(&ask(&spec), place(), &Machine::OPEN).unwrap_err().code, ReasonCode::PolicyDenied);
    }

    #[test]
    fn the_ceiling_has_its_say_in_everything() {
        let script = shell(Program::Script("true".into()), &[]);
        let argv = shell(Program::Argv(vec!["true".into(), "x".into()]), &[("PATH", "/evil")]);
        let judged = |spec: &Spec, ceiling: &Ceiling| {
            let find = |name: &str| Some(Executable { path: format!("/found/{}", name.rsplit('/').next()?), file: (1, 1) });
            judge(&ask(spec), place(), &Machine { ceiling, find: &find }).map(|g| g.argv().to_vec()).map_err(|r| r.detail)
        };
        let rule = |program: &str| Rule { program: program.into(), args_prefix: vec![], matches: vec![], not_matches: vec![] };
        let denied = |spec: &Spec, c: Ceiling| judged(spec, &c).unwrap_err();
        assert!(denied(&argv, Ceiling { users: Some(vec![]), ..Ceiling::OPEN }).starts_with("ceiling: users"));
        assert!(denied(&argv, Ceiling { timeout_secs: Some(2), ..Ceiling::OPEN }).starts_with("ceiling: limits.timeout_secs"));
        assert!(denied(&argv, Ceiling { deny: vec![rule("true")], ..Ceiling::OPEN }).starts_with("ceiling: deny[0]"));
        let allow_other = Ceiling { allow: Some(vec![rule("other")]), ..Ceiling::OPEN };
        assert!(denied(&argv, allow_other.clone()).starts_with("ceiling: allow"));
        assert_eq!(denied(&script, Ceiling { scripts: false, ..Ceiling::OPEN }), "ceiling: scripts: false");
        assert!(denied(&script, allow_other).contains("sh"), "a script is also what runs it");
        assert!(denied(&script, Ceiling { deny: vec![rule("/bin/sh")], ..Ceiling::OPEN }).starts_with("ceiling: deny[0]"));
        let no_scripts = Ceiling { scripts: false, deny: vec![rule("/bin/other")], ..Ceiling::OPEN };
        let found_elsewhere = |name: &str| (name == "true").then(|| Executable { path: "/usr/bin/true".into(), file: (1, 1) });
        let g = judge(&ask(&argv), place(), &Machine { ceiling: &no_scripts, find: &found_elsewhere }).unwrap();
        assert_eq!(g.argv(), ["/usr/bin/true", "x"], "what was judged is what is executed");
    }

    proptest! {
        #[test]
        fn decoder_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Grant::decode(&bytes);
        }
    }
}
