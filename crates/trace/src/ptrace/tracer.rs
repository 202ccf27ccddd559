//! The loop of a tracer: what each thread does next, and which of its calls are recorded.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use limosa_protocol::Errno;

use super::Ended;
use super::calls::{ARCH, Syscall, syscall};
use super::files::{self, Files};
use super::os::{self, SyscallStop, Waited, Waker};
use super::sockets::Sockets;
use crate::recorder::RecorderHandle;
use crate::seen::Seen;

/// How long threads may take to stop, so that they can be detached. The kernel detaches the others when this thread ends.
const DETACH_MAX: Duration = Duration::from_secs(5);

/// A tracer.
pub struct Tracer<'a> {
    pub(super) recorder: &'a RecorderHandle,
    waker: Waker,
    threads: HashMap<i32, Thread>,
    pub(super) processes: HashMap<i32, Process>,
    pub(super) sockets: Sockets,
    /// Sessions that devices opened so far.
    pub(super) sessions: HashMap<String, u64>,
    /// Whether it was reported that the kernel does not say at which calls threads stop.
    is_blind: bool,
}

/// A thread that is traced.
#[derive(Debug)]
struct Thread {
    process: i32,
    /// Its current call.
    entered: Option<Entered>,
}

/// A call that matters and has not returned.
#[derive(Clone, Debug)]
pub(super) struct Entered {
    pub call: Syscall,
    pub time_ns: u64,
    pub what: What,
}

/// The facts about a call that were collected before it was made.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// On a file of VFIO, or a data fd: the file, and the ioctl's argument and what that points to.
    File(files::File, Vec<u8>, Vec<u8>),
    /// On a socket with this inode. Written bytes are framed after the call, or before the answer to them is framed.
    Socket { inode: u64, is_done: bool },
    /// Another call whose fd or result matters.
    Fd,
}

/// A process that is traced.
#[derive(Clone, Debug, Default)]
pub(super) struct Process {
    pub files: Files,
    /// It ran before the trace began, so its connections may have begun before as well.
    pub existed: bool,
    is_foreign: bool,
    threads: usize,
}

impl<'a> Tracer<'a> {
    pub fn new(recorder: &'a RecorderHandle, waker: Waker) -> Tracer<'a> {
        Tracer {
            recorder,
            waker,
            threads: HashMap::new(),
            processes: HashMap::new(),
            sockets: Sockets::default(),
            sessions: HashMap::new(),
            is_blind: false,
        }
    }

    pub fn has(&self, tid: i32) -> bool {
        self.threads.contains_key(&tid)
    }

    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// How many threads are traced.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// A thread is traced from now on.
    pub fn add(&mut self, tid: i32, process: i32, existed: bool) {
        // A known thread may be in a call already.
        if let Entry::Vacant(new) = self.threads.entry(tid) {
            new.insert(Thread { process, entered: None });
            let of = self.processes.entry(process).or_default();
            of.existed |= existed;
            of.threads += 1;
        }
    }

    /// Traces until all threads have ended, or the waker does. Returns how process `first` ended.
    pub fn run(&mut self, first: i32) -> Ended {
        let mut ended = Ended::Detached;
        while !self.threads.is_empty() {
            let Ok(waited) = os::wait() else { break };
            match waited {
                Waited::Exited(tid, _) | Waited::Killed(tid, _) if tid == self.waker.pid() => {
                    self.detach(first, &mut ended);
                    if self.recorder.is_deaf() {
                        // No reader of the trace is left, but the end of a command is awaited.
                        self.wait_for(first, &mut ended);
                    }
                    break;
                }
                waited => self.turn(waited, first, &mut ended),
            }
        }
        ended
    }

    fn turn(&mut self, waited: Waited, first: i32, ended: &mut Ended) {
        match waited {
            Waited::Exited(tid, code) => self.gone(tid, Ended::Exited(code), first, ended),
            Waited::Killed(tid, signal) => self.gone(tid, Ended::Killed(signal), first, ended),
            Waited::Stopped(tid, signal, event) => {
                let time_ns = self.recorder.now_ns();
                self.stopped(tid, signal, event, time_ns);
            }
        }
    }

    fn gone(&mut self, tid: i32, how: Ended, first: i32, ended: &mut Ended) {
        if tid == first {
            *ended = how;
        }
        self.remove(tid);
    }

    fn remove(&mut self, tid: i32) {
        let Some(thread) = self.threads.remove(&tid) else { return };
        let Some(process) = self.processes.get_mut(&thread.process) else { return };
        process.threads -= 1;
        if process.threads == 0 {
            self.processes.remove(&thread.process);
            self.sockets.process_ended(thread.process, self.recorder);
        }
    }

    fn stopped(&mut self, tid: i32, signal: i32, event: i32, time_ns: u64) {
        if !self.has(tid) {
            // It stops as the child of a traced thread, whose own stop may be reported only later.
            let process = files::status(tid).map_or(tid, |(process, _)| process);
            self.add(tid, process, false);
        }
        const SYSCALL: i32 = libc::SIGTRAP | 0x80;
        let answer = match (event, signal) {
            (libc::PTRACE_EVENT_STOP, libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU) => {
                os::listen(tid)
            }
            (0, SYSCALL) => {
                match os::syscall_stop(tid) {
                    Ok(SyscallStop::Entry { arch, number, args }) => self.entry(tid, arch, number, args),
                    Ok(SyscallStop::Exit(result)) => self.exit(tid, result, time_ns),
                    // It was killed meanwhile.
                    Ok(SyscallStop::Other) | Err(Errno::ESRCH) => {}
                    Err(errno) => self.blind(tid, errno),
                }
                os::resume(tid, 0)
            }
            (libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE, _) => {
                self.forked(tid);
                os::resume(tid, 0)
            }
            (libc::PTRACE_EVENT_EXEC, _) => {
                self.executed(tid);
                os::resume(tid, 0)
            }
            (0, signal) => os::resume(tid, signal),
            _ => os::resume(tid, 0),
        };
        // A thread that was killed meanwhile cannot continue: its end is awaited.
        let _ = answer;
    }

    /// Says once that no call can be shown.
    fn blind(&mut self, tid: i32, errno: Errno) {
        if std::mem::replace(&mut self.is_blind, true) {
            return;
        }
        let pid = self.threads.get(&tid).and_then(|thread| u32::try_from(thread.process).ok());
        let text = format!(
            "no call is shown: this kernel does not tell at which one a thread stops (PTRACE_GET_SYSCALL_INFO: {errno}); Linux does \
             from 5.3 on, and not as User-Mode Linux 6.12"
        );
        self.recorder.record(Seen::Note { time_ns: self.recorder.now_ns(), pid, text });
    }

    /// A thread created another thread or a process, which inherits its fds. The new one is registered at its own first stop; the
    /// fds of a process are copied here.
    fn forked(&mut self, tid: i32) {
        let Ok(child) = os::event_message(tid) else { return };
        let Some(parent) = self.threads.get(&tid).map(|thread| thread.process) else { return };
        // It may have ended before its parent's stop was reported; it has been waited for then, and has no further stops.
        let Some((process, _)) = files::status(child) else { return };
        self.add(child, process, false);
        if process != parent
            && let Some(parent) = self.processes.get(&parent).cloned()
            && let Some(child) = self.processes.get_mut(&process)
        {
            child.files = parent.files;
            child.existed |= parent.existed;
        }
    }

    /// A process runs another program: its other threads are gone, and the one that is left has the process's number.
    fn executed(&mut self, tid: i32) {
        let others: Vec<_> = self
            .threads
            .iter()
            .filter(|(other, thread)| thread.process == tid && **other != tid)
            .map(|(other, _)| *other)
            .collect();
        self.add(tid, tid, false);
        others.into_iter().for_each(|other| self.remove(other));
        if let Some(thread) = self.threads.get_mut(&tid) {
            thread.entered = None;
        }
        if let Some(process) = self.processes.get_mut(&tid) {
            process.is_foreign = false;
        }
    }

    fn entry(&mut self, tid: i32, arch: u32, number: u64, args: [u64; 6]) {
        let Some(thread) = self.threads.get_mut(&tid) else { return };
        thread.entered = None;
        let process = thread.process;
        if arch != ARCH {
            self.foreign(process);
            return;
        }
        let Some(call) = syscall(number, args) else { return };
        let Some(what) = self.before(process, &call) else { return };
        // The tracer's own time does not count as the call's.
        let time_ns = self.recorder.now_ns();
        if let Some(thread) = self.threads.get_mut(&tid) {
            thread.entered = Some(Entered { call, time_ns, what });
        }
    }

    fn exit(&mut self, tid: i32, result: Result<i64, Errno>, time_ns: u64) {
        let Some(thread) = self.threads.get_mut(&tid) else { return };
        let process = thread.process;
        let Some(entered) = thread.entered.take() else { return };
        let is_read = matches!(entered.call, Syscall::Transfer { is_write: false, .. });
        if let (What::Socket { inode, .. }, true, Ok(1..)) = (&entered.what, is_read, result) {
            self.finish_writes(*inode);
        }
        self.after(process, entered, result, time_ns);
    }

    /// If there is an answer, everything that is being written to a socket was written. The writer's call may return after that of
    /// the reader, which is another thread.
    fn finish_writes(&mut self, socket: u64) {
        let mut writes: Vec<(u64, i32)> = Vec::new();
        for (tid, thread) in &mut self.threads {
            if let Some(Entered {
                call: Syscall::Transfer { is_write: true, .. },
                what: What::Socket { inode, is_done: is_done @ false },
                time_ns,
            }) = &mut thread.entered
                && *inode == socket
            {
                *is_done = true;
                writes.push((*time_ns, *tid));
            }
        }
        writes.sort_unstable();
        for (_, tid) in writes {
            let Some(thread) = self.threads.get(&tid) else { continue };
            let (process, entered) = (thread.process, thread.entered.clone());
            if let Some(entered) = entered {
                self.write(process, socket, &entered, None);
            }
        }
    }

    fn foreign(&mut self, pid: i32) {
        let Some(process) = self.processes.get_mut(&pid) else { return };
        if !std::mem::replace(&mut process.is_foreign, true) {
            let text = "runs a program of another architecture (of 32 bits?), whose calls are not decoded"
                .to_owned();
            let time_ns = self.recorder.now_ns();
            self.recorder.record(Seen::Note { time_ns, pid: u32::try_from(pid).ok(), text });
        }
    }

    /// Detaches all threads, each as soon as it stops.
    fn detach(&mut self, first: i32, ended: &mut Ended) {
        let Ok(limit) = Waker::start(Some(DETACH_MAX)) else { return };
        for tid in self.threads.keys() {
            // A thread that is gone is waited for below.
            let _ = os::interrupt(*tid);
        }
        while !self.threads.is_empty() {
            match os::wait() {
                Ok(Waited::Exited(tid, _) | Waited::Killed(tid, _)) if tid == limit.pid() => break,
                Ok(Waited::Stopped(tid, signal, event)) => {
                    self.let_go(tid, signal, event);
                }
                Ok(waited) => self.turn(waited, first, ended),
                Err(_) => break,
            }
        }
    }

    /// Detaches a stopped thread.
    fn let_go(&mut self, tid: i32, signal: i32, event: i32) {
        self.add(tid, files::status(tid).map_or(tid, |(process, _)| process), false);
        let is_signal = event == 0 && signal != libc::SIGTRAP | 0x80;
        // A thread that was killed meanwhile is gone.
        let _ = os::detach(tid, if is_signal { signal } else { 0 });
        self.remove(tid);
    }

    /// Waits for a child that is not traced any more.
    fn wait_for(&mut self, child: i32, ended: &mut Ended) {
        while *ended == Ended::Detached {
            match os::wait() {
                Ok(Waited::Exited(tid, code)) if tid == child => *ended = Ended::Exited(code),
                Ok(Waited::Killed(tid, signal)) if tid == child => *ended = Ended::Killed(signal),
                // A thread that could not be stopped in time.
                Ok(Waited::Stopped(tid, signal, event)) => self.let_go(tid, signal, event),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}
