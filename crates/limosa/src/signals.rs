//! Signals: which of them end the command, and which do not. No signal that can be handled leaves a guest stopped that stands still
//! for a move.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use limosa_migrate::Cancel;
use limosa_trace::ptrace::Ended;
use rustix::process::Signal;
use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2,
    SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};

use crate::standard_error;

/// These call a move off. By default each would end the process at once.
const CALL_OFF: [i32; 5] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU];
/// These would end the process by default, and mean nothing to a move. The standard library ignores SIGPIPE.
const IGNORED: [i32; 7] = [SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGXFSZ];
/// The real-time signals, but for those that the C library uses itself (`signal.7`). By default each would end the process.
const REAL_TIME: std::ops::RangeInclusive<i32> = if cfg!(target_env = "musl") { 35..=64 } else { 34..=64 };
/// These suspend the process, and would prolong a guest's standstill.
const SUSPEND: [i32; 3] = [SIGTSTP, SIGTTIN, SIGTTOU];

/// Signals within this time of the first are one wish that the process ends.
const ONE_END: Duration = Duration::from_secs(2);

/// Whether a guest stands still because of this process.
static STANDS_STILL: AtomicBool = AtomicBool::new(false);

/// A guest's standstill, in which the terminal cannot suspend this process.
#[derive(Debug, Default)]
pub struct Standstill(AtomicBool);

impl Standstill {
    /// The guest is going to stand still.
    pub fn begin(&self) {
        self.0.store(true, Ordering::SeqCst);
        STANDS_STILL.store(true, Ordering::SeqCst);
    }

    /// It continues, or its end does not matter to this process any more.
    pub fn end(&self) {
        if self.0.swap(false, Ordering::SeqCst) {
            STANDS_STILL.store(false, Ordering::SeqCst);
        }
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.end();
    }
}

/// Calls `end` on a thread of its own at the first SIGINT, SIGTERM or SIGHUP. A later one has its default effect, unless it comes
/// right after the first: programs that end others (timeout(1)) signal a process and its group. For commands that need no cleanup. A
/// SIGHUP that was ignored when the command was started stays ignored.
pub fn on_end(end: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let (mut end, mut first) = (Some(end), None);
    let mut signals = vec![SIGINT, SIGTERM, SIGHUP];
    signals.retain(|signal| *signal != SIGHUP || !is_ignored(SIGHUP));
    handle(signals, move |signal| match end.take() {
        Some(end) => {
            first = Some(Instant::now());
            end();
        }
        None if first.is_some_and(|first| first.elapsed() < ONE_END) => {}
        None => default(signal),
    })
}

/// Calls `act` on a thread of its own at each SIGUSR2.
pub fn at_usr2(mut act: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
    handle(vec![SIGUSR2], move |_| act())
}

/// Calls `pass` on a thread of its own at each SIGHUP, SIGINT, SIGQUIT and SIGTERM that a process sent to this one. What the
/// terminal sends goes to the whole of its foreground group, the processes that this one started included.
pub fn pass_on(mut pass: impl FnMut(Signal) + Send + 'static) -> anyhow::Result<()> {
    use signal_hook::iterator::SignalsInfo;
    use signal_hook::iterator::exfiltrator::WithOrigin;
    use signal_hook::low_level::siginfo::Cause;
    let mut signals = vec![SIGINT, SIGQUIT, SIGTERM, SIGHUP];
    signals.retain(|signal| *signal != SIGHUP || !is_ignored(SIGHUP));
    let mut signals = SignalsInfo::<WithOrigin>::new(signals).context("cannot handle signals")?;
    let pass = move || {
        for origin in signals.forever() {
            let signal = Signal::from_named_raw(origin.signal);
            if let (Some(signal), true) = (signal, matches!(origin.cause, Cause::Sent(_))) {
                pass(signal);
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(pass)
        .map(drop)
        .context("cannot start a thread for signals")
}

/// Ends this process as another one has ended: with its code, or by its signal. The shell's code for a signal that does not end
/// this one.
pub fn end_as(ended: Ended) -> ! {
    standard_error::end();
    match ended {
        Ended::Detached => std::process::exit(0),
        Ended::Exited(code) => std::process::exit(code),
        Ended::Killed(signal) => {
            // A core dump of this process says nothing about that one.
            let limit = rustix::process::Rlimit { current: Some(0), maximum: None };
            let _ = rustix::process::setrlimit(rustix::process::Resource::Core, limit);
            if signal == Signal::KILL.as_raw() {
                // It cannot fail, and this does not return.
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
            }
            default(signal);
            std::process::exit(128 + signal)
        }
    }
}

/// A handle by which SIGHUP, SIGINT, SIGQUIT, SIGTERM and SIGXCPU call a move off. The move is undone whatever other signals
/// come: only SIGKILL ends the process before that. A SIGHUP that was ignored when the command was started (`nohup`) stays
/// ignored.
pub fn cancel() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new().context("cannot make an eventfd")?;
    let on_signal = cancel.clone();
    call_off(move || on_signal.cancel())?;
    Ok(cancel)
}

/// Calls `off` on a thread of its own at the first signal that calls a move off, as [`cancel`] does. Further signals do not end the
/// process. For commands that stop a device, and let it run again before they end.
pub fn call_off(off: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let mut off = Some(off);
    at_each(move |signal| match off.take() {
        Some(off) => off(),
        None => {
            let name = signal_name(signal).unwrap_or("a signal");
            tracing::warn!("{name}: what was begun is being called off already, and is undone first");
        }
    })
}

/// For a command that does one job after another: one handle by which a first SIGTERM ends it after the current job, and one by
/// which a second SIGTERM, and every other signal that calls a move off, also call off the current job.
pub fn end_or_cancel() -> anyhow::Result<(Cancel, Cancel)> {
    let new = || Cancel::new().context("cannot make an eventfd");
    let (end, cancel) = (new()?, new()?);
    let (ends, cancels) = (end.clone(), cancel.clone());
    at_each(move |signal| {
        let was_told = ends.is_cancelled();
        ends.cancel();
        if was_told || signal != SIGTERM {
            cancels.cancel();
        }
    })?;
    Ok((end, cancel))
}

/// Calls `act` on a thread of its own at each signal that calls a move off. No other signal ends the process while a guest stands
/// still.
fn at_each(mut act: impl FnMut(i32) + Send + 'static) -> anyhow::Result<()> {
    // The lists of the crate lack it.
    let more = [Signal::POWER, Signal::STKFLT].map(Signal::as_raw);
    let mut signals = [&CALL_OFF[..], &IGNORED, &SUSPEND, &more].concat();
    signals.extend(REAL_TIME);
    signals.retain(|signal| *signal != SIGHUP || !is_ignored(SIGHUP));
    handle(signals, move |signal| {
        let name = signal_name(signal).unwrap_or("a signal");
        match signal {
            signal if CALL_OFF.contains(&signal) => act(signal),
            signal if SUSPEND.contains(&signal) && !STANDS_STILL.load(Ordering::SeqCst) => default(signal),
            _ => tracing::info!("{name} is ignored"),
        }
    })
}

fn handle(signals: Vec<i32>, mut act: impl FnMut(i32) + Send + 'static) -> anyhow::Result<()> {
    let mut signals = Signals::new(signals).context("cannot handle signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(&mut act))
        .context("cannot start a thread for signals")?;
    Ok(())
}

/// Takes the default action of a signal.
fn default(signal: i32) {
    // It only fails for signals that do not exist.
    drop(emulate_default_handler(signal));
}

/// Whether this process was started with a signal ignored (`proc_pid_status.5`: SigIgn).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}
