//! System calls without libc, for code that runs in memory shared with the warden.
//!
//! libc keeps `errno` in thread-local storage, which a `CLONE_VM` child shares with its parent, and
//! may take locks; nothing here does either. Results are the kernel's: negative is `-errno`.
#![allow(unsafe_code, reason = "raw system calls and the entry of a cloned child need assembly")]

use std::ffi::c_void;

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("the warden knows the system call interface of Linux on x86_64 and aarch64 only");

/// Arguments of clone3(2), version 2 of the structure.
#[repr(C)]
#[derive(Default)]
pub(crate) struct CloneArgs {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

pub(crate) const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
pub(crate) const CLONE_INTO_CGROUP: u64 = 1 << 33;

pub(crate) type Entry = unsafe extern "C" fn(*mut c_void) -> !;

/// # Safety
/// The arguments must be what system call `n` expects; pointers must hold for its duration.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn syscall(n: libc::c_long, a: [usize; 6]) -> isize {
    let ret: isize;
    // SAFETY: the registers are those of the Linux x86_64 convention; rcx and r11 are declared lost.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") n as isize => ret,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    ret
}

/// # Safety
/// The arguments must be what system call `n` expects; pointers must hold for its duration.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub(crate) unsafe fn syscall(n: libc::c_long, a: [usize; 6]) -> isize {
    let ret: isize;
    // SAFETY: the registers are those of the Linux aarch64 convention.
    unsafe {
        std::arch::asm!(
            "svc 0",
            in("x8") n,
            inlateout("x0") a[0] as isize => ret,
            in("x1") a[1], in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5],
            options(nostack)
        );
    }
    ret
}

/// Clones; the child begins in `entry(arg)` on the stack that `args` names and never returns here.
///
/// # Safety
/// `args.stack` must be a writable region that nothing else uses until the child has left it, `arg`
/// must outlive the child's use of it, and with `CLONE_VM` the child may touch only memory that is
/// meant for it.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn clone3(args: &CloneArgs, entry: Entry, arg: *mut c_void) -> isize {
    let ret: isize;
    // SAFETY: in the child rsp is the top of its own stack, 16-byte aligned, so that the call leaves
    // the alignment that a function expects; r12 and r13 are kept by the kernel.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => ret,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            in("r12") arg,
            in("r13") entry,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    ret
}

/// See the x86_64 variant.
///
/// # Safety
/// As there.
#[cfg(target_arch = "aarch64")]
pub(crate) unsafe fn clone3(args: &CloneArgs, entry: Entry, arg: *mut c_void) -> isize {
    let ret: isize;
    // SAFETY: in the child sp is the top of its own stack, 16-byte aligned; x19 and x20 would be kept,
    // any register is, since the kernel changes x0 alone.
    unsafe {
        std::arch::asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x30, xzr",
            "mov x0, x10",
            "blr x11",
            "brk 1",
            "2:",
            in("x8") libc::SYS_clone3,
            inlateout("x0") std::ptr::from_ref(args) as isize => ret,
            in("x1") size_of::<CloneArgs>(),
            in("x10") arg,
            in("x11") entry,
            lateout("x30") _,
        );
    }
    ret
}

/// Blocks every signal and gives each its default action, so that a child inherits neither an
/// ignored SIGPIPE nor a handler: the warden hears SIGTERM through a descriptor.
pub(crate) fn take_signals() -> std::io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: sets and actions are local, fully written before they are read; the new descriptor is
    // checked and owned by nobody else.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        if libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for n in 1..=libc::SIGRTMAX() {
            libc::sigaction(n, &default, std::ptr::null_mut());
        }
        // Two signals are glibc's own: its posix_spawn leaves them ignored and its sigaction refuses
        // them. All zeros is the kernel's form of the default action.
        let zeros = [0u64; 4];
        for n in 32..=33usize {
            syscall(libc::SYS_rt_sigaction, [n, (&raw const zeros) as usize, 0, 8, 0, 0]);
        }
        let mut term: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut term);
        libc::sigaddset(&mut term, libc::SIGTERM);
        let fd = libc::signalfd(-1, &term, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(std::os::fd::OwnedFd::from_raw_fd(fd))
    }
}

/// A stack for a cloned child, with a page below it that faults.
pub(crate) struct Stack {
    base: *mut c_void,
}

impl Stack {
    /// Init and task share one mapping; each has half. Their frames are a few hundred bytes.
    const HALF: usize = 32 << 10;
    const GUARD: usize = 4096;

    pub fn new() -> std::io::Result<Self> {
        let len = Self::GUARD + 2 * Self::HALF;
        // SAFETY: a fresh anonymous mapping, whose lowest page is taken away again.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let stack = Self { base };
        // SAFETY: the page belongs to the mapping just made.
        if unsafe { libc::mprotect(base, Self::GUARD, libc::PROT_NONE) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(stack)
    }
    /// Lowest address and length of the half for init.
    pub fn init(&self) -> (u64, u64) {
        (self.base as u64 + (Self::GUARD + Self::HALF) as u64, Self::HALF as u64)
    }
    /// Lowest address and length of the half for the task before its exec.
    pub fn task(&self) -> (u64, u64) {
        (self.base as u64 + Self::GUARD as u64, Self::HALF as u64)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; whoever drops a stack knows that no child stands on it.
        unsafe {
            libc::munmap(self.base, Self::GUARD + 2 * Self::HALF);
        }
    }
}
