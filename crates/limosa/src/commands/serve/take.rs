//! The new process of a switch-over, by `--take-from` or as a child of the old one: it takes that one's place, and serves its
//! clients.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_device::Machine;
use limosa_switch_over::{
    Cause, Commit, Committed, Ending, Error, Item, OldServer, Refusal, Report, Step, TakeOptions, Taker,
    Withdrawn, parent_server, take,
};
use limosa_vfio_user::server::{NewDevice, Options, Replacing, Server, ShutdownHandle};
use serde::{Deserialize, Serialize};

use super::config::Device;
use super::requests::Requests;
use super::{Listening, NAME, listen_for_takers, serve};
use crate::args;
use crate::exit::{self, Code};
use crate::metrics::{Listener as MetricsListener, SWITCH_OVERS, Served};
use crate::output::{self, Output, plain};
use crate::service;
use crate::signals;
use crate::standard_error;

/// The old process ends within this time, or is killed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How a switch-over went, as its new server saw it. Times are in nanoseconds.
#[derive(Debug, Serialize, Deserialize)]
pub struct TookOver {
    pub pid: u32,
    pub old_pid: i32,
    pub old_version: String,
    /// How the old process ended: `ended`, `killed`, or `remains` if it was killed and is still there.
    pub old_process: String,
    pub steps: Vec<StepTime>,
    /// From the moment when the old server could freeze until this one served.
    pub standstill_ns: u64,
    pub items: usize,
    pub fds: usize,
    pub bytes: u64,
    /// Why the next process cannot take over from this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub takeover_failed: Option<String>,
}

/// How long a step took.
#[derive(Debug, Serialize, Deserialize)]
pub struct StepTime {
    pub step: String,
    pub ns: u64,
}

/// The old server, and how messages call it; `None` for a process that replaces no other. The server that started this process comes
/// before `--take-from`, which is that of an earlier switch-over then.
pub fn old_server(args: &args::Serve) -> anyhow::Result<Option<(OldServer<'_>, String)>> {
    let parent = parent_server().map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => exit::error(Code::Usage, error.to_string()),
        _ => anyhow::Error::from(error).context("the server that started this process cannot be reached"),
    })?;
    Ok(match (parent, &args.take_from) {
        (Some((parent, pid)), _) => Some((parent, format!("process {pid}, which started this one"))),
        (None, Some(path)) => Some((OldServer::Path(path), path.display().to_string())),
        (None, None) => None,
    })
}

/// `state_limit` is how long the new devices may take for a round of the transfer.
pub fn run(
    (old, name): (OldServer<'_>, String),
    machines: impl IntoIterator<Item = (Arc<Machine>, Options)>,
    devices: &[Device],
    args: &args::Serve,
    state_limit: Duration,
    requests: Requests,
    out: &Output,
) -> anyhow::Result<()> {
    let phase = Arc::new(Mutex::new(Phase::Takes));
    on_end(Arc::clone(&phase), requests.stop.clone(), out.json)?;
    let new = machines.into_iter().zip(devices).map(|((machine, options), device)| NewDevice {
        machine,
        options,
        socket: Some(device.socket.clone()),
        control: device.control.clone(),
    });
    let taker = UntilEnded { devices: Replacing::new(new).with_round_limit(state_limit), phase };
    let on_step = |step: Step| tracing::debug!(%step, "done by this server");
    let options = TakeOptions { name: NAME, observer: Some(&on_step), ..TakeOptions::default() };
    let taken = take(old, taker, &options).map_err(|error| cannot_take(&name, &error))?;
    let (servers, old, report) = (taken.server, taken.old, taken.report);
    serve(&servers, &requests, || {
        // The clients are served already. A failure here must not end that.
        let ending = old.see_off(END_LIMIT).unwrap_or_else(|error| {
            tracing::warn!(%error, "the old server's process cannot be ended");
            Ending::Remains
        });
        let (door, failed) = match args.takeover.as_deref().map(listen_for_takers).transpose() {
            Ok(door) => (door, None),
            Err(error) => (None, Some(exit::message(&error))),
        };
        let metrics = args.metrics.as_ref().and_then(|address| {
            let answers = |listener| Served::new(&servers).answer_at(listener);
            match MetricsListener::bind(address).and_then(answers) {
                Ok(metrics) => Some(metrics),
                Err(error) => {
                    tracing::error!(error = exit::message(&error), "no metrics");
                    None
                }
            }
        });
        SWITCH_OVERS.took_over(report.standstill);
        if let Some(error) = &failed {
            tracing::error!(error, "no other process can take over from this one");
        }
        let listening =
            Listening::new(args, devices, metrics.as_ref(), Some(TookOver::new(report, ending, failed)));
        if let Err(error) = out.result(&listening, |to| listening.print(to)) {
            tracing::warn!(error = exit::message(&error), "the report cannot be printed");
        }
        service::took_over();
        Ok((door, metrics))
    })
}

/// Whether a signal has something to end.
enum Phase {
    /// The old server serves, and a signal ends this process.
    Takes,
    /// This one is about to serve, or does.
    Serves,
}

fn lock(phase: &Mutex<Phase>) -> MutexGuard<'_, Phase> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

fn on_end(phase: Arc<Mutex<Phase>>, stop: ShutdownHandle, json: bool) -> anyhow::Result<()> {
    signals::on_end(move || {
        // Held until the process has ended: it does not begin to serve meanwhile.
        let phase = lock(&phase);
        if matches!(*phase, Phase::Takes) {
            let cancelled = exit::error(Code::Cancelled, "cancelled: the old server goes on");
            let code = exit::tell(&cancelled, &Output::new(json, Some("serve"))) as i32;
            standard_error::end();
            std::process::exit(code);
        }
        drop(phase);
        service::stopping();
        stop.shut_down();
    })
}

/// Takes devices, and does not serve once a signal has ended this process.
struct UntilEnded {
    devices: Replacing,
    phase: Arc<Mutex<Phase>>,
}

impl Taker for UntilEnded {
    type Server = Vec<Server>;

    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal> {
        self.devices.check(offer)
    }

    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        self.devices.prepare(items)
    }

    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        self.devices.load(items)
    }

    fn run(self, commit: Commit<'_>) -> Result<(Committed, Vec<Server>), Withdrawn> {
        *lock(&self.phase) = Phase::Serves;
        self.devices.run(commit)
    }
}

fn cannot_take(from: &str, error: &Error) -> anyhow::Error {
    let code = match &error.cause {
        Cause::Io(_) | Cause::Ended | Cause::Late | Cause::Unanswered | Cause::NoDoor => Code::Unreachable,
        Cause::Malformed(_) => Code::Damaged,
        Cause::Withdrawn => Code::Failed,
        _ => Code::Refused,
    };
    exit::error(code, format!("cannot take over from {from}: {error}"))
}

impl TookOver {
    fn new(report: Report, ending: Ending, takeover_failed: Option<String>) -> TookOver {
        let old_process = match ending {
            Ending::Ended => "ended",
            Ending::Killed => "killed",
            Ending::Remains => "remains",
        };
        let step = |(step, time): &(Step, Duration)| StepTime { step: step.name().into(), ns: ns(*time) };
        TookOver {
            pid: std::process::id(),
            old_pid: report.other_pid,
            old_version: report.other,
            old_process: old_process.into(),
            steps: report.steps.iter().map(step).collect(),
            standstill_ns: ns(report.standstill),
            items: report.totals.items,
            fds: report.totals.fds,
            bytes: report.totals.bytes,
            takeover_failed,
        }
    }

    /// For people.
    pub fn print(&self, to: &mut dyn Write) -> io::Result<()> {
        let TookOver { pid, old_pid, old_process, items, fds, bytes, .. } = self;
        let standstill = Duration::from_nanos(self.standstill_ns);
        writeln!(
            to,
            "process {pid} serves in place of process {old_pid}, which {}",
            match old_process.as_str() {
                "ended" => "has ended",
                "killed" => "had to be killed",
                _ => "was killed and is still there",
            }
        )?;
        let (old, bytes) = (plain(&self.old_version), output::bytes(*bytes));
        writeln!(to, "handed over by {old}: {items} items, {fds} file descriptors, {bytes}")?;
        for StepTime { step, ns } in &self.steps {
            writeln!(to, "  {:<8} {:.1?}", plain(step), Duration::from_nanos(*ns))?;
        }
        writeln!(to, "standstill {standstill:.1?} at most")
    }
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
