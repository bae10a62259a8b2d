//! The warden's side of a start: pipes, prepared arguments, the clone, and the end.
#![allow(unsafe_code, reason = "clones a child that shares memory until its exec")]

use crate::child::{self, Block, MAX_RANGES, step};
use crate::sys::{self, CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP, CloneArgs, Stack};
use mesh_core::policy::Grant;
use mesh_core::task::{Reason, ReasonCode};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions};
use std::ffi::{CString, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// Stacks kept for reuse; beyond it they go back to the kernel.
const POOL: usize = 256;

/// Texts in the form that execve(2) takes; the pointers lead into the strings beside them.
pub(crate) struct Texts {
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl Texts {
    fn new(texts: impl Iterator<Item = Vec<u8>>) -> Result<Self, Reason> {
        let strings = texts
            .map(CString::new)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Reason::new(ReasonCode::BadRequest, "an argument or variable holds a NUL character"))?;
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(std::ptr::null());
        Ok(Self { _strings: strings, pointers })
    }
}

/// The program, its arguments and environment, ready for a child that may not allocate.
pub(crate) struct Program {
    candidates: Texts,
    argv: Texts,
    envp: Texts,
}

impl Program {
    pub fn prepare(grant: &Grant) -> Result<Self, Reason> {
        let name = &grant.argv()[0];
        if name.is_empty() {
            return Err(Reason::new(ReasonCode::NotFound, "program \"\" was not found"));
        }
        let candidates = if name.contains('/') {
            Texts::new(std::iter::once(name.clone().into_bytes()))?
        } else {
            let path = grant.env().get("PATH").map_or("/usr/bin:/bin", String::as_str);
            Texts::new(path.split(':').map(|dir| {
                let dir = if dir.is_empty() { "." } else { dir };
                format!("{dir}/{name}").into_bytes()
            }))?
        };
        let argv = Texts::new(grant.argv().iter().map(|a| a.clone().into_bytes()))?;
        let envp = Texts::new(grant.env().iter().map(|(k, v)| format!("{k}={v}").into_bytes()))?;
        Ok(Self { candidates, argv, envp })
    }
}

/// What a child uses of the warden's memory.
struct Memory {
    block: *mut Block,
    stack: Option<Stack>,
    _program: Program,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`, dropped once, and only when the child has ended or was
        // never made.
        drop(unsafe { Box::from_raw(self.block) });
    }
}

/// How a child ended, as far as init could say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RawEnd {
    /// The program never ran: the failed step and errno.
    NotRun { step: u32, errno: i32 },
    /// The wait status of the task.
    Status(i32),
    /// Init was killed before it could tell.
    Killed,
}

/// A live child: the init of one task.
pub(crate) struct Child {
    pidfd: OwnedFd,
    /// Given back at the reaping; leaked if a child is dropped before, since it may still use it.
    memory: Option<Memory>,
}

impl Child {
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
    fn block(&self) -> &Block {
        let memory = self.memory.as_ref().expect("not reaped yet");
        // SAFETY: the block lives as long as `memory`; both sides change it through atomics only.
        unsafe { &*memory.block }
    }
    /// True when the task itself has ended, although its init may still be on its way out.
    pub fn has_ended(&self) -> bool {
        self.memory.is_some() && self.block().done.load(Ordering::Acquire) == 1
    }
    pub fn exec_failed(&self) -> bool {
        self.block().step.load(Ordering::Acquire) != step::NONE
    }
    /// Init passes it on to the task's process group.
    pub fn terminate(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
    }
    /// With init, the kernel ends the whole namespace.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            std::mem::forget(memory);
        }
    }
}

/// The ends of a child's standard streams that the warden holds.
pub(crate) struct Started {
    pub child: Child,
    /// The pipe, and how much of stdin fitted into it, while there is more to come.
    pub stdin: Option<(OwnedFd, usize)>,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// One order to start.
pub(crate) struct Order<'a> {
    pub slot: u32,
    pub generation: u32,
    pub program: Program,
    pub cwd: BorrowedFd<'a>,
    pub stdin: &'a [u8],
    /// Live input may follow it.
    pub stdin_open: bool,
    /// None keeps the warden's own uid.
    pub run_as: Option<u32>,
    /// In place of a pid namespace.
    pub cgroup: Option<BorrowedFd<'a>>,
}

pub(crate) struct Spawner {
    stacks: Vec<Stack>,
    null: OwnedFd,
    warden: OwnedFd,
    status: OwnedFd,
    /// Held by every init, so that a new warden waits until the inits of a killed one are gone.
    lock: RawFd,
    nofile: [u64; 2],
}

impl Spawner {
    /// `status` is the writing end of the pipe on which inits tell that the exec is over.
    pub fn new(status: OwnedFd, lock: RawFd) -> io::Result<Self> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
        let own = rustix::process::getpid();
        let warden = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty())?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let nofile = [limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX)];
        // The warden needs a few descriptors per task; the tasks get the limit that it was given.
        let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
        Ok(Self { stacks: Vec::new(), null, warden, status, lock, nofile })
    }

    pub fn start(&mut self, order: Order<'_>) -> io::Result<Started> {
        let stack = match self.stacks.pop() {
            Some(s) => s,
            None => Stack::new()?,
        };
        // Between the making of the pipes and the closing of their far ends no other child is
        // cloned, so that nobody else ever holds a writing end.
        let (stdout, out_far) = pipe(End::Read, order.run_as)?;
        let (stderr, err_far) = pipe(End::Read, order.run_as)?;
        let (stdin, in_far) = feed(order.stdin, order.stdin_open, order.run_as)?;
        let in_fd = in_far.as_ref().unwrap_or(&self.null).as_raw_fd();
        let keep = [
            self.warden.as_raw_fd(),
            self.status.as_raw_fd(),
            self.lock,
            in_fd,
            out_far.as_raw_fd(),
            err_far.as_raw_fd(),
            order.cwd.as_raw_fd(),
        ];
        let (close, close_len) = gaps(keep);
        let program = order.program;
        let block = Box::new(Block {
            slot: order.slot,
            generation: order.generation,
            warden: self.warden.as_raw_fd(),
            status: self.status.as_raw_fd(),
            stdin: in_fd,
            stdout: out_far.as_raw_fd(),
            stderr: err_far.as_raw_fd(),
            cwd: order.cwd.as_raw_fd(),
            close,
            close_len,
            candidates: program.candidates.pointers.as_ptr(),
            argv: program.argv.pointers.as_ptr(),
            envp: program.envp.pointers.as_ptr(),
            run_as: order.run_as.map_or(-1, i64::from),
            nofile: self.nofile,
            pid_namespace: order.cgroup.is_none(),
            task_stack: stack.task(),
            step: AtomicU32::new(step::NONE),
            errno: AtomicI32::new(0),
            wait_status: AtomicI32::new(0),
            done: AtomicU32::new(0),
        });
        let (base, size) = stack.init();
        let mut pidfd: RawFd = -1;
        let kind = match order.cgroup {
            None => libc::CLONE_NEWPID as u64,
            Some(_) => CLONE_INTO_CGROUP,
        };
        let args = CloneArgs {
            flags: (libc::CLONE_VM | libc::CLONE_PIDFD) as u64 | CLONE_CLEAR_SIGHAND | kind,
            pidfd: (&raw mut pidfd) as u64,
            exit_signal: libc::SIGCHLD as u64,
            stack: base,
            stack_size: size,
            cgroup: order.cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
            ..CloneArgs::default()
        };
        let memory = Memory { block: Box::into_raw(block), stack: Some(stack), _program: program };
        // SAFETY: stack, block and program live in `memory`, which is kept until the child is reaped;
        // `init_main` keeps to system calls and to the block.
        let pid = unsafe { sys::clone3(&args, child::init_main, memory.block.cast()) };
        if pid < 0 {
            return Err(io::Error::from_raw_os_error(-pid as i32));
        }
        // SAFETY: the kernel has stored a new descriptor, owned by nobody else.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Ok(Started { child: Child { pidfd, memory: Some(memory) }, stdin, stdout, stderr })
    }

    /// Collects a child whose pidfd has become readable.
    pub fn reap(&mut self, mut child: Child) -> RawEnd {
        while let Err(Errno::INTR) = rustix::process::waitid(WaitId::PidFd(child.pidfd()), WaitIdOptions::EXITED) {}
        let b = child.block();
        let end = match b.step.load(Ordering::Acquire) {
            step::NONE if b.done.load(Ordering::Acquire) == 1 => RawEnd::Status(b.wait_status.load(Ordering::Relaxed)),
            step::NONE => RawEnd::Killed,
            step => RawEnd::NotRun { step, errno: b.errno.load(Ordering::Relaxed) },
        };
        let mut memory = child.memory.take().expect("reaped once");
        // It has been waited for: nothing stands on its stack.
        if let Some(stack) = memory.stack.take().filter(|_| self.stacks.len() < POOL) {
            self.stacks.push(stack);
        }
        end
    }
}

enum End {
    Read,
    Write,
}

/// A pipe whose near end does not block. The far end belongs to the task's user, who may then open
/// it again through `/dev/stdout`.
fn pipe(near: End, owner: Option<u32>) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (near, far) = match near {
        End::Read => (read, write),
        End::Write => (write, read),
    };
    rustix::fs::fcntl_setfl(&near, OFlags::NONBLOCK)?;
    if let Some(uid) = owner {
        rustix::fs::fchown(&far, Some(rustix::fs::Uid::from_raw(uid)), Some(rustix::fs::Gid::from_raw(uid)))?;
    }
    Ok((near, far))
}

/// Fills stdin before the clone: what fits needs no further care. Empty input is `/dev/null`, unless
/// it is to stay open.
#[expect(clippy::type_complexity, reason = "near end with its progress, far end")]
fn feed(bytes: &[u8], open: bool, owner: Option<u32>) -> io::Result<(Option<(OwnedFd, usize)>, Option<OwnedFd>)> {
    if bytes.is_empty() && !open {
        return Ok((None, None));
    }
    let (near, far) = pipe(End::Write, owner)?;
    let mut at = 0;
    while at < bytes.len() {
        match rustix::io::write(&near, &bytes[at..]) {
            Ok(n) => at += n,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(((open || at < bytes.len()).then_some((near, at)), Some(far)))
}

/// Everything from 0 up but `keep`.
fn gaps(mut keep: [RawFd; 7]) -> ([(u32, u32); MAX_RANGES], usize) {
    keep.sort_unstable();
    let (mut ranges, mut n, mut from) = ([(0, 0); MAX_RANGES], 0, 0u32);
    for fd in keep.map(|fd| fd as u32) {
        if fd > from {
            ranges[n] = (from, fd - 1);
            n += 1;
        }
        from = fd + 1;
    }
    ranges[n] = (from, u32::MAX);
    (ranges, n + 1)
}

/// Says why the program did not run, in words for its caller.
pub(crate) fn refusal(step: u32, errno: i32, program: &str, cwd: &str) -> Reason {
    let error = io::Error::from_raw_os_error(errno);
    match (step, errno) {
        (step::EXEC, libc::ENOENT | libc::ENOTDIR) => Reason::new(ReasonCode::NotFound, format!("program {program:?} was not found")),
        (step::EXEC, libc::EACCES) => {
            Reason::new(ReasonCode::BadRequest, format!("program {program:?} may not be executed by the task's user"))
        }
        (step::EXEC, libc::ENOEXEC) => {
            Reason::new(ReasonCode::BadRequest, format!("program {program:?} is not in a format that this node can execute"))
        }
        (step::EXEC, libc::E2BIG) => Reason::new(ReasonCode::BadRequest, "arguments and environment are too long"),
        (step::EXEC | step::CLONE, libc::EAGAIN | libc::ENOMEM) => {
            Reason::new(ReasonCode::Limit, format!("no further process can be made: {error}"))
        }
        (step::EXEC, _) => Reason::new(ReasonCode::BadRequest, format!("program {program:?} cannot be executed: {error}")),
        (step::CWD, _) => Reason::new(ReasonCode::PolicyDenied, format!("cwd {cwd:?} is closed to the task's user: {error}")),
        (step::USER, _) => Reason::new(ReasonCode::PolicyDenied, format!("sandbox_unavailable: cannot become the task's user: {error}")),
        _ => Reason::new(ReasonCode::PolicyDenied, format!("sandbox_unavailable: step {step} failed: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::policy::{Asked, Machine, Place, judge};
    use mesh_core::spec::{Program as Words, Shell, Spec};
    use std::io::Read;

    /// The fallback: without a pid namespace, the group ends what the task has left.
    #[test]
    fn a_control_group_ends_what_is_left() {
        let root = rustix::process::geteuid().is_root();
        if crate::cgroup::parent().is_none() {
            return;
        }
        let script = "(setsid setsid sleep 4000 &); (setsid true &); echo up; exit 3";
        let program = Words::Script(script.into());
        let spec = Spec::Shell(Shell { program, cwd: String::new(), env: Default::default(), stdin: b"in".to_vec(), stdin_open: false });
        let task = mesh_core::TaskId::from_bytes([1; 16]);
        let attempt = mesh_core::task::AttemptNo(1);
        let asked = Asked { task, attempt, user: mesh_core::UserId::from_bytes([1; 16]), spec: &spec, digest: [0; 32], timeout_secs: 0 };
        let run_as = root.then_some(65534);
        let grant = judge(&asked, Place { workspace: "/".into(), run_as, ephemeral: false }, &Machine::OPEN).unwrap();
        let (status, status_far) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let lock = tempfile::tempfile().unwrap();
        let mut spawner = Spawner::new(status_far, lock.as_raw_fd()).unwrap();
        let spool = mesh_core::SpoolId::from_parts(crate::clock::unix_ms(), [std::process::id() as u8; 10]);
        let (path, group) = crate::cgroup::make(&spool.to_string(), 1, 1).unwrap();
        let cwd = crate::workspace::enter(&grant).unwrap();
        let program = Program::prepare(&grant).unwrap();
        let (slot, generation, stdin) = (1, 1, grant.stdin());
        let cgroup = Some(group.as_fd());
        let started =
            spawner.start(Order { slot, generation, program, cwd: cwd.as_fd(), stdin, stdin_open: false, run_as, cgroup }).unwrap();
        let mut record = [0; 8];
        assert_eq!(rustix::io::read(&status, &mut record).unwrap(), 8);
        assert!(!started.child.exec_failed());
        assert!(libc::WIFEXITED(match spawner.reap(started.child) {
            RawEnd::Status(s) => s,
            other => panic!("{other:?}"),
        }));
        let alive = || std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines().count();
        assert!(alive() >= 1, "the sleeper is still there");
        crate::cgroup::kill(&path);
        let mut text = String::new();
        let mut out = std::fs::File::from(started.stdout);
        rustix::fs::fcntl_setfl(&out, OFlags::empty()).unwrap();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(text, "up\n", "and the end of its pipe comes");
        // The group is empty only when the last process has left it, which comes after its files are closed.
        while path.exists() {
            crate::cgroup::remove(&path);
        }
    }

    #[test]
    fn gaps_leave_what_is_kept() {
        let (r, n) = gaps([3, 9, 4, 5, 12, 9, 7]);
        assert_eq!(&r[..n], [(0, 2), (6, 6), (8, 8), (10, 11), (13, u32::MAX)]);
    }
}
