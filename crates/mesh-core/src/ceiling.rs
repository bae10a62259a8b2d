//! The owner's ceiling: what no word of a hub exceeds on the owner's machine.
//!
//! Rules go by what would be executed: a name leads to a file, and how is told by the machine, as a [`Find`].
//! Whoever may run one program can often make it run another (a shell, an interpreter, a copy), so that
//! `deny` is a guard rail; `allow` is as tight as the programs that it names.

use crate::UserId;
use crate::task::{Reason, ReasonCode};
use std::fmt;

/// More would only be a typing error.
pub const MOST_TASKS: u32 = 4096;
/// Of a detail that goes to the hub.
const MAX_DETAIL: usize = 500;

/// A program as the machine finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executable {
    /// The absolute path by which it is called: links in its folders are resolved, a link that it is itself
    /// is not, since a program may go by the name it is called by.
    pub path: String,
    /// Device and inode of the file behind it, whatever names lead there.
    pub file: (u64, u64),
}

/// Where a name leads: on the fixed PATH, an absolute path, or one relative to the task's folder.
pub type Find<'a> = &'a dyn Fn(&str) -> Option<Executable>;

/// Names a program, and perhaps how its arguments begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// A name on the fixed PATH, or an absolute path.
    pub program: String,
    pub args_prefix: Vec<String>,
    /// Examples, whole argvs: these must be hit by the rule …
    pub matches: Vec<Vec<String>>,
    /// … and these must not.
    pub not_matches: Vec<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ceiling {
    /// Nothing else is run; none: whatever is not denied.
    pub allow: Option<Vec<Rule>>,
    pub deny: Vec<Rule>,
    pub scripts: bool,
    /// Nobody else's tasks are taken; none: anybody's.
    pub users: Option<Vec<UserId>>,
    /// Tasks at once.
    pub max_tasks: Option<u32>,
    /// The longest time-out in seconds. Then each task must have one.
    pub timeout_secs: Option<u64>,
}

impl Ceiling {
    /// Bounds nothing.
    pub const OPEN: Ceiling = Ceiling { allow: None, deny: Vec::new(), scripts: true, users: None, max_tasks: None, timeout_secs: None };
}

/// Why a machine takes no work, by its owner's word or for want of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    Disabled,
    /// What its owner allows cannot be read, so nothing counts as allowed.
    CeilingUnreadable,
}

impl Closed {
    /// The text is part of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::CeilingUnreadable => "ceiling_unreadable",
        }
    }
    /// Reads a node's word; empty is none. One of a later version closes too.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" => None,
            "ceiling_unreadable" => Some(Self::CeilingUnreadable),
            _ => Some(Self::Disabled),
        }
    }
}

/// A ceiling that cannot be meant so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct BadCeiling {
    pub key: String,
    pub problem: String,
}

fn bad<T>(key: impl Into<String>, problem: impl Into<String>) -> Result<T, BadCeiling> {
    Err(BadCeiling { key: key.into(), problem: problem.into() })
}

fn denied<T>(rule: impl fmt::Display) -> Result<T, Reason> {
    let detail: String = format!("ceiling: {rule}").chars().take(MAX_DETAIL).collect();
    Err(Reason::new(ReasonCode::PolicyDenied, detail))
}

/// How a rule knows a program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// The path it is called by: of a file with many names (busybox) this name alone.
    Path,
    /// The file too: whatever name leads to it.
    File,
}

impl Rule {
    /// Does it hit this argv, of which `called` is the program as it was found?
    fn hits(&self, argv: &[String], called: Option<&Executable>, by: By, find: Find<'_>) -> bool {
        let Some((name, args)) = argv.split_first() else { return false };
        args.starts_with(&self.args_prefix) && (self.program == *name || self.leads_to(called, by, find))
    }
    fn leads_to(&self, called: Option<&Executable>, by: By, find: Find<'_>) -> bool {
        let Some(called) = called else { return false };
        find(&self.program).is_some_and(|own| own.path == called.path || (by == By::File && own.file == called.file))
    }

    fn check(&self, key: &str, by: By, find: Find<'_>) -> Result<(), BadCeiling> {
        let program = &self.program;
        let plain = |t: &String| !t.contains('\0');
        if program.is_empty() || !plain(program) || (program.contains('/') && !program.starts_with('/')) {
            return bad(format!("{key}.program"), format!("{program:?} is neither a name on the fixed PATH nor an absolute path"));
        }
        if !self.args_prefix.iter().all(plain) {
            return bad(format!("{key}.args_prefix"), "holds a NUL character, which no program can receive");
        }
        let examples = [("match", &self.matches, true), ("not_match", &self.not_matches, false)];
        for (list, argv, wanted) in examples.iter().flat_map(|(l, all, w)| all.iter().map(move |a| (l, a, *w))) {
            let Some(name) = argv.first() else { return bad(format!("{key}.{list}"), "an example is an argv and begins with a program") };
            if self.hits(argv, find(name).as_ref(), by, find) != wanted {
                let does = if wanted { "does not hit" } else { "hits" };
                return bad(format!("{key}.{list}"), format!("the rule {does} its example {argv:?}"));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{program: {:?}", self.program)?;
        if !self.args_prefix.is_empty() {
            write!(f, ", args_prefix: {:?}", self.args_prefix)?;
        }
        f.write_str("}")
    }
}

impl Ceiling {
    /// Checks that it can be meant so; each rule against its own examples.
    pub fn check(&self, find: Find<'_>) -> Result<(), BadCeiling> {
        let allow = self.allow.iter().flatten().enumerate().map(|(i, r)| (format!("allow[{i}]"), r, By::Path));
        let deny = self.deny.iter().enumerate().map(|(i, r)| (format!("deny[{i}]"), r, By::File));
        for (key, rule, by) in allow.chain(deny) {
            rule.check(&key, by, find)?;
        }
        if let Some(n) = self.max_tasks
            && !(1..=MOST_TASKS).contains(&n)
        {
            return bad("max_tasks", format!("{n} is not between 1 and {MOST_TASKS}; `cortex-node disable` takes no tasks at all"));
        }
        if self.timeout_secs == Some(0) {
            return bad("limits.timeout_secs", "0 leaves no time to run; take the key away for no bound");
        }
        Ok(())
    }

    /// Are tasks of this user taken?
    pub fn admit(&self, user: UserId) -> Result<(), Reason> {
        match &self.users {
            Some(users) if !users.contains(&user) => denied(format_args!("users: {user} is not named")),
            _ => Ok(()),
        }
    }

    /// May a task have this time-out? 0 is none.
    pub(crate) fn admit_timeout(&self, secs: u64) -> Result<(), Reason> {
        match self.timeout_secs {
            Some(most) if secs == 0 => denied(format_args!("limits.timeout_secs: {most}, and the task has no time-out")),
            Some(most) if secs > most => denied(format_args!("limits.timeout_secs: {most}, and the task has {secs}")),
            _ => Ok(()),
        }
    }

    /// Judges what is to be executed; gives the argv that stands for it. Where there are rules, its program
    /// is named by the path that was judged, so that no PATH and no link of the task leads elsewhere.
    pub(crate) fn admit_program(&self, argv: Vec<String>, find: Find<'_>) -> Result<Vec<String>, Reason> {
        if self.allow.is_none() && self.deny.is_empty() {
            return Ok(argv);
        }
        let called = argv.first().and_then(|name| find(name));
        let hits = |r: &Rule, by| r.hits(&argv, called.as_ref(), by, find);
        if let Some((i, rule)) = self.deny.iter().enumerate().find(|(_, r)| hits(r, By::File)) {
            return denied(format_args!("deny[{i}] {rule}"));
        }
        let name = || called.as_ref().map_or(argv.first().map_or("", String::as_str), |c| c.path.as_str());
        if self.allow.as_ref().is_some_and(|rules| !rules.iter().any(|r| hits(r, By::Path))) {
            return denied(format_args!("allow: no rule names {:?} with these arguments", name()));
        }
        let Some(called) = called else {
            return Err(Reason::new(ReasonCode::NotFound, format!("program {:?} was not found", name())));
        };
        let mut argv = argv;
        argv[0] = called.path;
        Ok(argv)
    }

    pub(crate) fn admit_scripts(&self) -> Result<(), Reason> {
        if self.scripts { Ok(()) } else { denied("scripts: false") }
    }
}

#[cfg(test)]
mod tests;
