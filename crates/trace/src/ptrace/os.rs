//! The system calls of a tracer (ptrace(2), waitpid(2), process_vm_readv(2), fork(2)), as safe functions.
//!
//! Only the thread that seized the tracees may call them: for other threads the kernel refuses them, or does not see the
//! tracees (`__WNOTHREAD`).
#![allow(unsafe_code, reason = "the one place of this crate where the OS is touched without rustix")]

use std::ffi::{CString, c_int, c_long, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use limosa_protocol::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal};

/// Distinguishes stops at the entry and the exit of a system call, at new children and at new programs from signals.
const OPTIONS: c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC;

/// `linux/ptrace.h`, the same on every architecture; not every C library has it.
const PTRACE_GET_SYSCALL_INFO: libc::c_uint = 0x420e;

/// What the calling thread's child or tracee did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// It exited with this code.
    Exited(i32, i32),
    /// A signal ended it.
    Killed(i32, i32),
    /// It stopped: the signal, and the event behind it (`PTRACE_EVENT_*`), or 0.
    Stopped(i32, i32, i32),
}

/// A stop at a system call (`ptrace_syscall_info` in ptrace(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallStop {
    /// Before it: the architecture (`AUDIT_ARCH_*`), its number and its arguments.
    Entry { arch: u32, number: u64, args: [u64; 6] },
    /// After it: its value, or its errno.
    Exit(Result<i64, Errno>),
    /// At no system call.
    Other,
}

fn last_errno() -> Errno {
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    Errno::from_raw(errno.unsigned_abs())
}

/// A request of ptrace(2) whose last arguments are numbers.
fn ptrace(request: libc::c_uint, tid: i32, address: usize, data: usize) -> Result<c_long, Errno> {
    // SAFETY: the callers in this module pass requests that take numbers, or no argument: the kernel writes to no memory of
    // this process.
    let value = unsafe { libc::ptrace(request as _, tid, address as *mut c_void, data as *mut c_void) };
    if value == -1 { Err(last_errno()) } else { Ok(value) }
}

/// Begins to trace a thread, which keeps running.
pub fn seize(tid: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_SEIZE as _, tid, 0, OPTIONS as usize).map(drop)
}

/// Stops a running thread.
pub fn interrupt(tid: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_INTERRUPT as _, tid, 0, 0).map(drop)
}

/// Lets a stopped thread run to its next system call, with this signal, or none for 0.
pub fn resume(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_SYSCALL as _, tid, 0, signal as usize).map(drop)
}

/// Leaves a thread in its group-stop, and waits for the end of that.
pub fn listen(tid: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_LISTEN as _, tid, 0, 0).map(drop)
}

/// Detaches a stopped thread, with this signal, or none for 0.
pub fn detach(tid: i32, signal: i32) -> Result<(), Errno> {
    ptrace(libc::PTRACE_DETACH as _, tid, 0, signal as usize).map(drop)
}

/// The number of the thread that the stop is about: the new one, or the one that ran another program.
pub fn event_message(tid: i32) -> Result<i32, Errno> {
    let mut number: libc::c_ulong = 0;
    // SAFETY: the kernel writes an unsigned long, to a variable that nothing else uses.
    let value = unsafe {
        libc::ptrace(
            libc::PTRACE_GETEVENTMSG as _,
            tid,
            ptr::null_mut::<c_void>(),
            (&raw mut number).cast::<c_void>(),
        )
    };
    if value == -1 { Err(last_errno()) } else { Ok(i32::try_from(number).unwrap_or(0)) }
}

/// The system call at which a thread stopped.
pub fn syscall_stop(tid: i32) -> Result<SyscallStop, Errno> {
    // op, 3 bytes, arch; instruction pointer; stack pointer; then the number and six arguments, or the value and whether it is an
    // errno.
    let mut info = [0u64; 11];
    // SAFETY: the kernel writes at most the number of bytes in the third argument, to memory of that length that nothing else
    // uses.
    let value = unsafe {
        libc::ptrace(
            PTRACE_GET_SYSCALL_INFO as _,
            tid,
            size_of_val(&info) as *mut c_void,
            (&raw mut info).cast::<c_void>(),
        )
    };
    if value == -1 {
        return Err(last_errno());
    }
    let bytes = info[0].to_ne_bytes();
    let arch = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    Ok(match bytes[0] {
        1 => SyscallStop::Entry {
            arch,
            number: info[3],
            args: [info[4], info[5], info[6], info[7], info[8], info[9]],
        },
        2 => {
            let value = info[3].cast_signed();
            let is_error = info[4].to_ne_bytes()[0] != 0;
            let errno = || Errno::from_raw(u32::try_from(value.unsigned_abs()).unwrap_or(u32::MAX));
            SyscallStop::Exit(if is_error { Err(errno()) } else { Ok(value) })
        }
        _ => SyscallStop::Other,
    })
}

/// Waits for a child or tracee of the calling thread. ECHILD where it has none.
pub fn wait() -> Result<Waited, Errno> {
    loop {
        let mut status: c_int = 0;
        // SAFETY: the status is an int that nothing else uses.
        let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        if tid == -1 {
            match last_errno() {
                Errno::EINTR => continue,
                errno => return Err(errno),
            }
        }
        if libc::WIFEXITED(status) {
            return Ok(Waited::Exited(tid, libc::WEXITSTATUS(status)));
        }
        if libc::WIFSIGNALED(status) {
            return Ok(Waited::Killed(tid, libc::WTERMSIG(status)));
        }
        if libc::WIFSTOPPED(status) {
            return Ok(Waited::Stopped(tid, libc::WSTOPSIG(status), status >> 16));
        }
    }
}

/// Reads memory of a process, as much of the range as exists. Returns nothing if the process is gone.
pub fn read_memory(pid: i32, address: u64, into: &mut [u8]) -> usize {
    let Ok(address) = usize::try_from(address) else { return 0 };
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: into.len() };
    // SAFETY: the kernel writes at most as many bytes as the slice has, and the other address belongs to the other process.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(got) {
        Ok(got) => got,
        // A kernel without CONFIG_CROSS_MEMORY_ATTACH.
        Err(_) if last_errno() == Errno::ENOSYS => {
            read_file_of_memory(pid, address as u64, into).unwrap_or(0)
        }
        Err(_) => 0,
    }
}

/// The same by `/proc/PID/mem` (proc(5)).
fn read_file_of_memory(pid: i32, address: u64, into: &mut [u8]) -> std::io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(&std::fs::File::open(format!("/proc/{pid}/mem"))?, into, address)
}

/// A child process that only ends: when it is told to, when its time is over, or with the thread that started it. Its end wakes
/// a thread that waits for tracees.
#[derive(Debug)]
pub struct Waker {
    pid: i32,
    process: OwnedFd,
    tell: OwnedFd,
}

impl Waker {
    /// Starts one, which ends by itself after this time.
    #[allow(clippy::multiple_unsafe_ops_per_block, reason = "one proof holds for all calls of a child")]
    pub fn start(limit: Option<Duration>) -> Result<Waker, Errno> {
        let (listen, tell) = pipe()?;
        let limit = limit.map_or(-1, |limit| i32::try_from(limit.as_millis()).unwrap_or(i32::MAX));
        let (listen, told) = (listen.as_raw_fd(), tell.as_raw_fd());
        // SAFETY: the child only makes system calls that are async-signal-safe, on fds that it inherited, and ends without
        // running anything of this process (`_exit`).
        let pid = unsafe {
            fork(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::close(told);
                let mut fds = libc::pollfd { fd: listen, events: libc::POLLIN, revents: 0 };
                while libc::poll(&raw mut fds, 1, limit) < 0 && *libc::__errno_location() == libc::EINTR {}
                0
            })
        }?;
        Ok(Waker { pid, process: pidfd(pid)?, tell })
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The handle by which another thread ends it.
    pub fn tell(&self) -> BorrowedFd<'_> {
        self.tell.as_fd()
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        // It may have ended and been waited for already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let _ = rustix::process::waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED);
    }
}

/// A program that waits to be started.
#[derive(Debug)]
pub struct Waiting {
    /// Its process.
    pub pid: i32,
    go: OwnedFd,
    failed: OwnedFd,
}

impl Waiting {
    /// Creates a process that starts the program once it is told to. All strings include their NUL.
    #[allow(clippy::multiple_unsafe_ops_per_block, reason = "one proof holds for all calls of a child")]
    pub fn start(program: &CString, args: &[CString], environment: &[CString]) -> Result<Waiting, Errno> {
        let (may_go, go) = pipe()?;
        let (failed, tell) = pipe()?;
        let pointers = |strings: &[CString]| {
            strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect::<Vec<_>>()
        };
        let (args, environment) = (pointers(args), pointers(environment));
        let (program, args, environment) = (program.as_ptr(), args.as_ptr(), environment.as_ptr());
        let (may_go, tell, go_end): (RawFd, RawFd, RawFd) =
            (may_go.as_raw_fd(), tell.as_raw_fd(), go.as_raw_fd());
        // SAFETY: the child only makes system calls that are async-signal-safe. The pointers are to strings and to arrays of
        // them that end with a null pointer; the child has a copy of them, as they live until fork returns.
        let pid = unsafe {
            fork(move || {
                libc::close(go_end);
                let mut byte = 0u8;
                // The end of the pipe means that no tracer is there.
                if libc::read(may_go, (&raw mut byte).cast(), 1) != 1 {
                    return 127;
                }
                for signal in 1..32 {
                    // Ignored signals stay ignored, except SIGPIPE, which the standard library ignores for this process.
                    let mut action: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();
                    libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
                    if signal == libc::SIGPIPE || (*action.as_ptr()).sa_sigaction != libc::SIG_IGN {
                        libc::signal(signal, libc::SIG_DFL);
                    }
                }
                let mut none: MaybeUninit<libc::sigset_t> = MaybeUninit::zeroed();
                libc::sigemptyset(none.as_mut_ptr());
                libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
                libc::execve(program, args, environment);
                let errno = *libc::__errno_location();
                libc::write(tell, (&raw const errno).cast(), size_of::<c_int>());
                127
            })
        }?;
        Ok(Waiting { pid, go, failed })
    }

    /// Lets it start the program.
    pub fn go(self) -> Starting {
        // If it is gone, its end is awaited.
        let _ = rustix::io::write(&self.go, &[1]);
        Starting { failed: self.failed }
    }
}

/// A program that was told to start.
#[derive(Debug)]
pub struct Starting {
    failed: OwnedFd,
}

impl Starting {
    /// Once the process has ended: why the program did not start.
    pub fn failed(&self) -> Option<Errno> {
        let mut errno = [0; 4];
        let got = rustix::io::read(&self.failed, &mut errno);
        (got == Ok(4)).then(|| Errno::from_raw(i32::from_ne_bytes(errno).unsigned_abs()))
    }
}

/// A process that was not waited for.
pub fn pidfd(pid: i32) -> Result<OwnedFd, Errno> {
    let pid = Pid::from_raw(pid).ok_or(Errno::from_raw(libc::ESRCH.unsigned_abs()))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(errno_of)
}

fn errno_of(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error().unsigned_abs())
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = rustix::pipe::PipeFlags::CLOEXEC;
    rustix::pipe::pipe_with(flags).map_err(errno_of)
}

/// Forks with all signals blocked, in the child for good: no handler of this process runs there.
///
/// # Safety
///
/// `child` only does what is async-signal-safe (signal-safety(7)): other threads may hold any lock.
unsafe fn fork(child: impl FnOnce() -> c_int) -> Result<i32, Errno> {
    let mut all: MaybeUninit<libc::sigset_t> = MaybeUninit::zeroed();
    let mut before: MaybeUninit<libc::sigset_t> = MaybeUninit::zeroed();
    // SAFETY: fills in the set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set was filled in, and the other one is as long.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: as the caller promises.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = child();
        // SAFETY: ends the child and runs nothing of this process.
        unsafe { libc::_exit(code) };
    }
    let result = if pid == -1 { Err(last_errno()) } else { Ok(pid) };
    // SAFETY: the set is what the call above has filled in.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waker_ends_when_it_is_told_to_and_when_its_time_has_come() {
        for limit in [None, Some(Duration::from_millis(1))] {
            let waker = Waker::start(limit).unwrap();
            if limit.is_none() {
                rustix::io::write(waker.tell(), &[1]).unwrap();
            }
            assert_eq!(wait(), Ok(Waited::Exited(waker.pid(), 0)));
        }
        assert_eq!(wait(), Err(Errno::from_raw(libc::ECHILD as u32)));
    }

    #[test]
    fn memory_is_read_as_far_as_it_is_there() {
        let data: Vec<u8> = (0..100).collect();
        let mut into = [0; 100];
        let pid = std::process::id().cast_signed();
        assert_eq!(read_memory(pid, data.as_ptr() as u64, &mut into), 100);
        assert_eq!(into[..], data[..]);
        into.fill(0);
        assert_eq!(read_file_of_memory(pid, data.as_ptr() as u64, &mut into).unwrap(), 100);
        assert_eq!(into[..], data[..]);
        assert_eq!(read_memory(pid, 0, &mut into), 0);
        assert_eq!(read_memory(pid, u64::MAX - 3, &mut into), 0);
    }
}
