//! What this machine allows, found by doing it: how a task's whole tree can be ended.
#![allow(unsafe_code, reason = "probes by cloning")]

use crate::child;
use crate::sys::{self, CloneArgs, Stack};
use rustix::process::{Pid, WaitOptions};
use std::io::Write;

/// How the whole tree of a task is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeKill {
    /// A pid namespace, made by root.
    PidNamespace,
    /// A pid namespace inside a user namespace that the warden has entered.
    UserPidNamespace,
    /// A control group (version 2) with `cgroup.kill`.
    Cgroup,
    /// Nothing works: the warden refuses to start tasks.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    pub tree_kill: TreeKill,
    pub no_new_privs: bool,
}

/// Tries what a warden of this user could do here; changes nothing. May be called by a process with
/// threads.
pub fn probe() -> Probe {
    let tree_kill = if rustix::process::geteuid().is_root() {
        if makes_pid_namespace() { TreeKill::PidNamespace } else { TreeKill::None }
    } else if makes_user_pid_namespace() {
        TreeKill::UserPidNamespace
    } else {
        TreeKill::None
    };
    let tree_kill = match tree_kill {
        TreeKill::None if crate::cgroup::parent().is_some() => TreeKill::Cgroup,
        t => t,
    };
    // Reading it back proves that the kernel knows it; setting it would be for good.
    Probe { tree_kill, no_new_privs: rustix::thread::no_new_privs().is_ok() }
}

fn try_clone(flags: i32, entry: sys::Entry) -> bool {
    let Ok(stack) = Stack::new() else { return false };
    let (base, size) = stack.init();
    let mut inner = stack.task();
    let args = CloneArgs {
        flags: (libc::CLONE_VM | libc::CLONE_VFORK | flags) as u64 | sys::CLONE_CLEAR_SIGHAND,
        exit_signal: libc::SIGCHLD as u64,
        stack: base,
        stack_size: size,
        ..CloneArgs::default()
    };
    // SAFETY: with VFORK this thread waits until the child has ended, so stack and `inner` outlive it.
    let pid = unsafe { sys::clone3(&args, entry, (&raw mut inner).cast()) };
    let Some(pid) = i32::try_from(pid).ok().filter(|p| *p > 0).and_then(Pid::from_raw) else { return false };
    matches!(rustix::process::waitpid(Some(pid), WaitOptions::empty()), Ok(Some((_, s))) if s.exit_status() == Some(0))
}

fn makes_pid_namespace() -> bool {
    try_clone(libc::CLONE_NEWPID, child::probe_main)
}

fn makes_user_pid_namespace() -> bool {
    try_clone(libc::CLONE_NEWUSER, child::probe_user_main)
}

/// Prepares this process to start tasks, and says by which means. A warden that is not root enters a
/// user namespace of its own, once: there it may make pid namespaces, and its tasks, which lose all
/// capabilities at their exec, cannot touch it. Must be called before any thread is made.
pub(crate) fn enter() -> TreeKill {
    let found = probe().tree_kill;
    if found != TreeKill::UserPidNamespace {
        return found;
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // SAFETY: one thread; nothing of this process is shared with another.
    if let Err(e) = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) } {
        say!("warden: no user namespace: {e}");
        return TreeKill::None;
    }
    let write =
        |file: &str, text: String| std::fs::OpenOptions::new().write(true).open(file).and_then(|mut f| f.write_all(text.as_bytes()));
    let mapped = write("/proc/self/setgroups", "deny".into())
        .and_then(|()| write("/proc/self/uid_map", format!("{uid} {uid} 1")))
        .and_then(|()| write("/proc/self/gid_map", format!("{gid} {gid} 1")));
    match mapped {
        Ok(()) => TreeKill::UserPidNamespace,
        Err(e) => {
            say!("warden: the user namespace cannot be mapped: {e}");
            TreeKill::None
        }
    }
}

/// Keeps other processes of the same user out of this one's memory.
pub(crate) fn hide() {
    if let Err(e) = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable) {
        say!("warden: stays dumpable: {e}");
    }
}
