//! What a task asks for. One canonical encoding serves the digest that is sealed and signed, the
//! journal's column and the payload that a node pulls, so that all of them mean the same bytes.

use crate::canon::{Malformed, Reader, Tag, Writer};
use crate::{Digest, sha256};
use std::collections::BTreeMap;

/// Bytes of an encoded spec; larger input is refused at the door.
pub const MAX_SPEC_BYTES: usize = 8 << 20;
/// A spec up to this size travels inside its order; a larger one is pulled by its digest.
pub const INLINE_SPEC_BYTES: usize = 2 << 10;
/// Arguments plus environment, as the kernel would refuse it later (`ARG_MAX` is 2 MiB by default).
pub const MAX_ARGV_BYTES: usize = 1 << 20;

/// Flag of an encoded spec.
const STDIN_OPEN: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    Shell(Shell),
    /// Gives its payload back as the result: the cheapest proof that the whole path works.
    Echo {
        payload: Vec<u8>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shell {
    pub program: Program,
    /// Relative to the workspace; empty is the workspace itself.
    pub cwd: String,
    /// Added to the few variables that every task gets (PATH, HOME, LANG, TMPDIR, USER).
    pub env: BTreeMap<String, String>,
    pub stdin: Vec<u8>,
    /// Standard input stays open behind `stdin`, and live input follows it until its end is said.
    pub stdin_open: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// Executed as it is; no shell looks at it.
    Argv(Vec<String>),
    /// Run by `/bin/sh -c`, and judged as a script.
    Script(String),
}

impl Program {
    /// What is executed.
    pub fn argv(&self) -> Vec<String> {
        match self {
            Self::Argv(argv) => argv.clone(),
            Self::Script(text) => vec!["/bin/sh".into(), "-c".into(), text.clone()],
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSpec {
    #[error("argv names no program")]
    NoProgram,
    #[error("{0} holds a NUL character, which no program can receive")]
    Nul(&'static str),
    #[error("{0:?} is not a name for an environment variable")]
    EnvName(String),
    #[error("cwd {0:?} leaves the workspace; give a path inside it, relative to its root")]
    CwdOutside(String),
    #[error("arguments and environment take {0} bytes; {MAX_ARGV_BYTES} are allowed")]
    ArgvTooLong(usize),
    #[error("the task takes {0} bytes; {MAX_SPEC_BYTES} are allowed")]
    TooLarge(usize),
}

impl Spec {
    /// The skill's name on the wire and in queries.
    pub fn skill(&self) -> &'static str {
        match self {
            Spec::Shell(_) => "shell",
            Spec::Echo { .. } => "echo",
        }
    }

    pub fn validate(&self) -> Result<(), BadSpec> {
        let Spec::Shell(shell) = self else { return self.check_size() };
        let mut bytes = 0;
        match &shell.program {
            Program::Argv(argv) => {
                if argv.first().is_none_or(String::is_empty) {
                    return Err(BadSpec::NoProgram);
                }
                for a in argv {
                    if a.contains('\0') {
                        return Err(BadSpec::Nul("argv"));
                    }
                    bytes += a.len() + 1;
                }
            }
            Program::Script(s) => {
                if s.trim().is_empty() {
                    return Err(BadSpec::NoProgram);
                }
                if s.contains('\0') {
                    return Err(BadSpec::Nul("command"));
                }
                bytes += s.len() + 1;
            }
        }
        for (k, v) in &shell.env {
            if k.is_empty() || k.contains(['=', '\0']) {
                return Err(BadSpec::EnvName(k.clone()));
            }
            if v.contains('\0') {
                return Err(BadSpec::Nul("env"));
            }
            bytes += k.len() + v.len() + 2;
        }
        if bytes > MAX_ARGV_BYTES {
            return Err(BadSpec::ArgvTooLong(bytes));
        }
        if shell.cwd.contains('\0') {
            return Err(BadSpec::Nul("cwd"));
        }
        if !stays_inside(&shell.cwd) {
            return Err(BadSpec::CwdOutside(shell.cwd.clone()));
        }
        self.check_size()
    }

    fn check_size(&self) -> Result<(), BadSpec> {
        let n = match self {
            Spec::Echo { payload } => payload.len(),
            Spec::Shell(s) => s.stdin.len(),
        };
        if n > MAX_SPEC_BYTES - MAX_ARGV_BYTES - 4096 { Err(BadSpec::TooLarge(n)) } else { Ok(()) }
    }

    /// What is executed; nothing for a skill without a process.
    pub fn argv(&self) -> Vec<String> {
        match self {
            Spec::Shell(s) => s.program.argv(),
            Spec::Echo { .. } => vec![],
        }
    }

    /// True when the task takes input while it runs.
    pub fn takes_input(&self) -> bool {
        matches!(self, Spec::Shell(Shell { stdin_open: true, .. }))
    }

    /// Version 2 is version 1 with a byte of flags behind it, and is written only when a flag is set:
    /// what version 1 can say keeps its bytes and its digest.
    pub fn encode(&self) -> Vec<u8> {
        let flags = if self.takes_input() { STDIN_OPEN } else { 0 };
        let mut w = Writer::new(Tag::Spec, if flags == 0 { 1 } else { 2 });
        match self {
            Spec::Shell(s) => {
                w.u8(1);
                match &s.program {
                    Program::Argv(argv) => {
                        w.u8(1).u32(argv.len() as u32);
                        for a in argv {
                            w.str(a);
                        }
                    }
                    Program::Script(text) => {
                        w.u8(2).str(text);
                    }
                }
                w.str(&s.cwd).u32(s.env.len() as u32);
                for (k, v) in &s.env {
                    w.str(k).str(v);
                }
                w.bytes(&s.stdin);
            }
            Spec::Echo { payload } => {
                w.u8(2).bytes(payload);
            }
        }
        if flags != 0 {
            w.u8(flags);
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let version = if bytes.get(1) == Some(&2) { 2 } else { 1 };
        let mut r = Reader::new(bytes, Tag::Spec, version)?;
        let mut spec = match r.u8()? {
            1 => {
                let program = match r.u8()? {
                    1 => {
                        let n = r.count()?;
                        Program::Argv((0..n).map(|_| r.str().map(str::to_owned)).collect::<Result<_, _>>()?)
                    }
                    2 => Program::Script(r.str()?.to_owned()),
                    v => return Err(Malformed::Unknown { what: "program", value: v.into() }),
                };
                let cwd = r.str()?.to_owned();
                let n = r.count()?;
                let mut env = BTreeMap::new();
                let mut last: Option<&str> = None;
                for _ in 0..n {
                    let (k, v) = (r.str()?, r.str()?);
                    if last.is_some_and(|l| l >= k) {
                        return Err(Malformed::Bounds("order of env"));
                    }
                    last = Some(k);
                    env.insert(k.to_owned(), v.to_owned());
                }
                Spec::Shell(Shell { program, cwd, env, stdin: r.bytes()?.to_vec(), stdin_open: false })
            }
            2 => Spec::Echo { payload: r.bytes()?.to_vec() },
            v => return Err(Malformed::Unknown { what: "skill", value: v.into() }),
        };
        if version == 2 {
            match (r.u8()?, &mut spec) {
                (STDIN_OPEN, Spec::Shell(s)) => s.stdin_open = true,
                (v, _) => return Err(Malformed::Unknown { what: "flags", value: v.into() }),
            }
        }
        r.end()?;
        Ok(spec)
    }

    /// SHA-256 of [`Spec::encode`]: what intent, order and approval bind.
    pub fn digest(&self) -> Digest {
        sha256(&self.encode())
    }
}

/// Judges a relative path by its text alone; the node opens it with the kernel's own check besides.
fn stays_inside(path: &str) -> bool {
    if path.starts_with('/') {
        return false;
    }
    let mut depth = 0i64;
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => depth -= 1,
            _ => depth += 1,
        }
        if depth < 0 {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn argv(a: &[&str]) -> Spec {
        Spec::Shell(Shell {
            program: Program::Argv(a.iter().map(|s| s.to_string()).collect()),
            cwd: String::new(),
            env: BTreeMap::new(),
            stdin: vec![],
            stdin_open: false,
        })
    }

    #[test]
    fn golden_encoding() {
        let mut spec = argv(&["ls", "-l"]);
        if let Spec::Shell(s) = &mut spec {
            s.cwd = "a".into();
            s.env.insert("K".into(), "v".into());
            s.stdin = vec![0, 255];
        }
        assert_eq!(
            hex::encode(spec.encode()),
            "01010101000000020000 00026c73000000022d6c 0000000161 00000001 000000014b 0000000176 0000000200ff".replace(' ', "")
        );
        assert_eq!(hex::encode(Spec::Echo { payload: b"hi".to_vec() }.encode()), "010102000000026869");
        if let Spec::Shell(s) = &mut spec {
            s.stdin_open = true;
        }
        let open = "01020101000000020000 00026c73000000022d6c 0000000161 00000001 000000014b 0000000176 0000000200ff 01".replace(' ', "");
        assert_eq!(hex::encode(spec.encode()), open);
    }

    #[test]
    fn version_2_says_only_what_version_1_cannot() {
        let mut spec = argv(&["cat"]);
        let plain = spec.encode();
        if let Spec::Shell(s) = &mut spec {
            s.stdin_open = true;
        }
        let open = spec.encode();
        assert_eq!((plain[1], open[1]), (1, 2));
        assert!(spec.takes_input() && !Spec::decode(&plain).unwrap().takes_input());
        assert_ne!(sha256(&plain), sha256(&open));
        // No second encoding of the same thing: no empty or unknown flags, and none on what has no stdin.
        for flags in [0, 2, 3, 255] {
            let mut bytes = open.clone();
            *bytes.last_mut().unwrap() = flags;
            assert!(Spec::decode(&bytes).is_err(), "{flags}");
        }
        let mut echo = Spec::Echo { payload: vec![] }.encode();
        echo[1] = 2;
        echo.push(STDIN_OPEN);
        assert!(Spec::decode(&echo).is_err());
        let mut missing = plain;
        missing[1] = 2;
        assert_eq!(Spec::decode(&missing), Err(Malformed::Short));
    }

    #[test]
    fn refuses_what_cannot_run() {
        assert_eq!(argv(&[]).validate(), Err(BadSpec::NoProgram));
        assert_eq!(argv(&[""]).validate(), Err(BadSpec::NoProgram));
        assert_eq!(argv(&["a\0b"]).validate(), Err(BadSpec::Nul("argv")));
        for (cwd, ok) in [("", true), ("a/b", true), ("a/../b", true), ("./a", true), ("..", false), ("a/../../b", false), ("/etc", false)]
        {
            let mut s = argv(&["ls"]);
            if let Spec::Shell(x) = &mut s {
                x.cwd = cwd.into();
            }
            assert_eq!(s.validate().is_ok(), ok, "{cwd}");
        }
        assert!(matches!(argv(&["x", &"y".repeat(MAX_ARGV_BYTES)]).validate(), Err(BadSpec::ArgvTooLong(_))));
    }

    proptest! {
        #[test]
        fn round_trips(argv in proptest::collection::vec(".*", 0..5), cwd in ".*", env in proptest::collection::btree_map(".*", ".*", 0..4), stdin in proptest::collection::vec(any::<u8>(), 0..50), stdin_open in any::<bool>()) {
            let spec = Spec::Shell(Shell { program: Program::Argv(argv), cwd, env, stdin, stdin_open });
            prop_assert_eq!(Spec::decode(&spec.encode()).unwrap(), spec);
        }
        #[test]
        fn never_panics_on_garbage(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(spec) = Spec::decode(&bytes) {
                prop_assert_eq!(spec.encode(), bytes);
            }
        }
    }
}
