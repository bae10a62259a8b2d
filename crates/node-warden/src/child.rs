//! What runs on the other side of the clone, in the warden's own memory: raw system calls only.
//!
//! No allocation, no libc, no lock, no panic: whatever is needed was prepared in [`Block`] before.
#![allow(unsafe_code, reason = "runs in memory shared with the warden, on a stack of its own")]

use crate::sys::{CloneArgs, clone3, syscall};
use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// Which step failed before the program ran.
pub(crate) mod step {
    pub const NONE: u32 = 0;
    pub const CLONE: u32 = 1;
    pub const STDIO: u32 = 2;
    pub const USER: u32 = 3;
    pub const CWD: u32 = 4;
    pub const PRIVILEGES: u32 = 5;
    pub const EXEC: u32 = 6;
}

pub(crate) const MAX_RANGES: usize = 8;

/// Everything that init and task need, and the words that they leave behind.
#[repr(C)]
pub(crate) struct Block {
    pub slot: u32,
    pub generation: u32,
    /// Readable once the warden has ended.
    pub warden: i32,
    /// Takes one record of eight bytes once the exec has succeeded or failed.
    pub status: i32,
    pub stdin: i32,
    pub stdout: i32,
    pub stderr: i32,
    pub cwd: i32,
    /// Descriptors that init must not hold, as inclusive ranges.
    pub close: [(u32, u32); MAX_RANGES],
    pub close_len: usize,
    /// Absolute paths, or the name itself, ended by null: tried in order.
    pub candidates: *const *const c_char,
    pub argv: *const *const c_char,
    pub envp: *const *const c_char,
    /// The uid and gid to become; -1 keeps the warden's.
    pub run_as: i64,
    pub nofile: [u64; 2],
    /// False in the cgroup fallback, where nothing else ties the task to init.
    pub pid_namespace: bool,
    pub task_stack: (u64, u64),
    /// One of [`step`].
    pub step: AtomicU32,
    pub errno: AtomicI32,
    /// As wait4(2) gives it; valid once `done` is 1.
    pub wait_status: AtomicI32,
    pub done: AtomicU32,
}

macro_rules! sys {
    ($n:ident) => {
        syscall(libc::$n, [0; 6])
    };
    ($n:ident $(, $a:expr)+) => {{
        let mut a = [0usize; 6];
        let mut _i = 0;
        $( a[_i] = $a as usize; _i += 1; )+
        syscall(libc::$n, a)
    }};
}

const SIGSET: usize = 8;
const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// True once the warden has ended, which a parent-death signal set too late would miss.
unsafe fn warden_is_gone(b: &Block) -> bool {
    let mut fd = libc::pollfd { fd: b.warden, events: libc::POLLIN, revents: 0 };
    let now = [0i64; 2];
    // SAFETY: both structures are local.
    unsafe { sys!(SYS_ppoll, &raw mut fd, 1, &raw const now, 0, SIGSET) > 0 }
}

unsafe fn leave(code: i32) -> ! {
    loop {
        // SAFETY: ends this process.
        unsafe { sys!(SYS_exit_group, code) };
    }
}

/// First process of the task's pid namespace: reaps, forwards SIGTERM, ends with the task.
///
/// # Safety
/// `arg` is a [`Block`] that the warden keeps until this process has ended.
pub(crate) unsafe extern "C" fn init_main(arg: *mut c_void) -> ! {
    // SAFETY: by contract; the warden reads the atomics only, and writes nothing meanwhile. The
    // system calls get descriptors and memory that the block names.
    unsafe {
        let b = &*arg.cast::<Block>();
        // Only a blocked signal is queued for pid 1, and only a blocked SIGCHLD for anybody.
        let all = u64::MAX;
        sys!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, SIGSET);
        sys!(SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if warden_is_gone(b) {
            leave(1);
        }
        if !b.pid_namespace {
            sys!(SYS_prctl, libc::PR_SET_CHILD_SUBREAPER, 1);
        }
        let mut i = 0;
        while i < b.close_len && i < MAX_RANGES {
            let (first, last) = b.close[i];
            sys!(SYS_close_range, first, last, 0);
            i += 1;
        }
        let args = CloneArgs {
            flags: (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
            exit_signal: libc::SIGCHLD as u64,
            stack: b.task_stack.0,
            stack_size: b.task_stack.1,
            pidfd: 0,
            child_tid: 0,
            parent_tid: 0,
            tls: 0,
            set_tid: 0,
            set_tid_size: 0,
            cgroup: 0,
        };
        let task = clone3(&args, task_main, arg);
        if task < 0 {
            b.errno.store(-task as i32, Ordering::Relaxed);
            b.step.store(step::CLONE, Ordering::Release);
        }
        // With VFORK the task has by now left this memory, by its exec or by its end.
        sys!(SYS_close, b.stdin);
        sys!(SYS_close, b.stdout);
        sys!(SYS_close, b.stderr);
        sys!(SYS_close, b.cwd);
        let record = [b.slot, b.generation];
        sys!(SYS_write, b.status, &raw const record, 8);
        if b.step.load(Ordering::Acquire) != step::NONE {
            leave(1);
        }
        // The parent-death signal can have been set between the warden's last word to its children
        // and its end as the poll sees it: one more look after a second closes that gap.
        let first = [1i64, 0];
        let mut timeout: *const [i64; 2] = &raw const first;
        let wanted = bit(libc::SIGCHLD) | bit(libc::SIGTERM);
        loop {
            loop {
                let mut status = 0i32;
                let pid = sys!(SYS_wait4, -1isize, &raw mut status, libc::WNOHANG, 0);
                if pid == task {
                    b.wait_status.store(status, Ordering::Relaxed);
                    b.done.store(1, Ordering::Release);
                    leave(0);
                }
                if pid <= 0 {
                    break;
                }
            }
            // Signals are blocked, which is why even pid 1 gets them queued.
            let got = sys!(SYS_rt_sigtimedwait, &raw const wanted, 0, timeout, SIGSET);
            if got == libc::SIGTERM as isize && sys!(SYS_kill, -task, libc::SIGTERM) == -(libc::ESRCH as isize) {
                sys!(SYS_kill, task, libc::SIGTERM);
            }
            if got == -(libc::EAGAIN as isize) {
                timeout = std::ptr::null();
                if warden_is_gone(b) {
                    leave(1);
                }
            }
        }
    }
}

unsafe fn fail(b: &Block, step: u32, result: isize) -> ! {
    b.errno.store(-result as i32, Ordering::Relaxed);
    b.step.store(step, Ordering::Release);
    // SAFETY: ends this process.
    unsafe { leave(127) }
}

/// The task itself, up to its exec.
///
/// # Safety
/// As for [`init_main`], which waits meanwhile.
unsafe extern "C" fn task_main(arg: *mut c_void) -> ! {
    // SAFETY: as in `init_main`. The credentials of this process alone are changed: the raw calls do
    // not tell other threads, unlike libc's.
    unsafe {
        let b = &*arg.cast::<Block>();
        macro_rules! must {
            ($step:ident, $e:expr) => {{
                let r = $e;
                if r < 0 {
                    fail(b, step::$step, r);
                }
            }};
        }
        sys!(SYS_setsid);
        must!(STDIO, sys!(SYS_dup3, b.stdin, 0, 0));
        must!(STDIO, sys!(SYS_dup3, b.stdout, 1, 0));
        must!(STDIO, sys!(SYS_dup3, b.stderr, 2, 0));
        must!(STDIO, sys!(SYS_prlimit64, 0, libc::RLIMIT_NOFILE, &raw const b.nofile, 0));
        if b.run_as >= 0 {
            must!(USER, sys!(SYS_setgroups, 0, 0));
            must!(USER, sys!(SYS_setresgid, b.run_as, b.run_as, b.run_as));
            must!(USER, sys!(SYS_setresuid, b.run_as, b.run_as, b.run_as));
        }
        // As the task's own user, so that a folder closed to it stays closed.
        must!(CWD, sys!(SYS_fchdir, b.cwd));
        sys!(SYS_umask, 0o022);
        must!(PRIVILEGES, sys!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        if !b.pid_namespace {
            // After the change of user, which clears it.
            must!(PRIVILEGES, sys!(SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL));
        }
        must!(STDIO, sys!(SYS_close_range, 3, u32::MAX, 0));
        let none = 0u64;
        sys!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0, SIGSET);
        let mut last = -(libc::ENOENT as isize);
        let mut next = b.candidates;
        while !(*next).is_null() {
            let r = sys!(SYS_execve, *next, b.argv, b.envp);
            // As execvp(3) searches: a file that exists but may not run is told only if none runs.
            if r == -(libc::EACCES as isize) {
                last = r;
            } else if r != -(libc::ENOENT as isize) && r != -(libc::ENOTDIR as isize) {
                fail(b, step::EXEC, r);
            }
            next = next.add(1);
        }
        fail(b, step::EXEC, last)
    }
}

/// Child of a probe: does nothing, its being there is the answer.
///
/// # Safety
/// Nothing is read.
pub(crate) unsafe extern "C" fn probe_main(_: *mut c_void) -> ! {
    // SAFETY: ends this process.
    unsafe { leave(0) }
}

/// Child of a probe, inside a new user namespace: can it make a pid namespace?
///
/// # Safety
/// `arg` names the half of a stack that nothing else uses.
pub(crate) unsafe extern "C" fn probe_user_main(arg: *mut c_void) -> ! {
    // SAFETY: by contract; the inner child is waited for by VFORK and wait4.
    unsafe {
        let (stack, stack_size) = *arg.cast::<(u64, u64)>();
        let args = CloneArgs {
            flags: (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_NEWPID) as u64,
            exit_signal: libc::SIGCHLD as u64,
            stack,
            stack_size,
            pidfd: 0,
            child_tid: 0,
            parent_tid: 0,
            tls: 0,
            set_tid: 0,
            set_tid_size: 0,
            cgroup: 0,
        };
        let pid = clone3(&args, probe_main, std::ptr::null_mut());
        if pid < 0 {
            leave(1);
        }
        sys!(SYS_wait4, pid, 0, 0, 0);
        leave(0)
    }
}
