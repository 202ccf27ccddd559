//! The machine around the devices, as far as the command can stop and start it: processes by signals, anything else by
//! commands of the user.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use limosa_migrate::{CommitNote, Error, Outcome, Vmm};
use limosa_stream::MigrationId;

use crate::args::{Starting, Stopping};
use crate::hook::{self, Leftovers};
use crate::noting::Noting;
use crate::open::Opened;
use crate::process::{Process, Stopped};
use crate::signals::Standstill;

/// The guest's machine on one side.
#[derive(Default)]
pub struct Guest<'a> {
    processes: Vec<Process>,
    on_stop: Option<&'a str>,
    on_resume: Option<&'a str>,
    on_start: Option<&'a str>,
    noting: Option<Noting>,
    devices: &'a [Opened],
    /// The move for which devices may have been told to stay.
    stays_for: Mutex<Option<MigrationId>>,
    /// Whether the guest may have been stopped by a command, so that another command resumes it.
    is_stopped_by_command: AtomicBool,
    standstill: Standstill,
    /// Processes that were stopped and have ended since, for the message if the guest has to go on.
    lost: Vec<String>,
    failed: Mutex<Vec<String>>,
}

impl<'a> Guest<'a> {
    /// On the source. Nothing is stopped yet.
    pub fn source(
        stopping: &'a Stopping,
        devices: &'a [Opened],
        noting: Option<Noting>,
    ) -> anyhow::Result<Guest<'a>> {
        let processes: Vec<_> =
            stopping.stop_with.iter().map(|pid| Process::open(*pid)).collect::<anyhow::Result<_>>()?;
        let (on_stop, on_resume) = (stopping.on_stop.as_deref(), stopping.on_resume.as_deref());
        if let Some(noting) = &noting {
            noting.check_room(processes.len(), on_stop)?;
        }
        Ok(Guest { processes, on_stop, on_resume, noting, devices, ..Guest::default() })
    }

    /// On a source whose process is gone: the processes that it stopped, and the user's command that resumes a guest which was
    /// stopped by a command.
    pub fn stopped_before(stopped: &[Stopped], on_resume: Option<&'a str>) -> Guest<'a> {
        let mut guest = Guest { on_resume, is_stopped_by_command: true.into(), ..Guest::default() };
        for stopped in stopped {
            match Process::find(stopped) {
                Ok(process) => guest.processes.push(process),
                Err(why) => guest.lost.push(why),
            }
        }
        guest
    }

    /// On the destination.
    pub fn destination(starting: &'a Starting) -> Guest<'a> {
        Guest { on_start: starting.on_start.as_deref(), ..Guest::default() }
    }

    /// The processes that are stopped with the guest.
    fn stopped(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|process| process.was_stopped())
    }

    /// Whether a stopped process could not be resumed.
    pub fn stays_stopped(&self) -> bool {
        self.stopped().any(|process| !process.is_gone())
    }

    /// Removes the notes of a move whose end is known, unless a process could not be resumed after it.
    pub fn forget(&self, outcome: &Outcome) {
        let is_settled = match outcome {
            Outcome::Moved(_) => true,
            Outcome::Undone { .. } => !self.stays_stopped(),
            Outcome::InDoubt(_) => false,
        };
        if let Some(noting) = self.noting.as_ref().filter(|_| is_settled) {
            noting.settled(matches!(outcome, Outcome::Moved(_)));
        }
    }

    /// The likely reason why another client drove a device during the move.
    pub fn taken_back(&self, why: &Error) -> Option<String> {
        let Error::DeviceChanged { device, .. } = why else { return None };
        let is_it = |opened: &&Opened| opened.given() == device && opened.is_beside_vmm();
        self.devices.iter().find(is_it).map(|_| {
            format!(
                "{device}: the VM that uses it reset it, or used it for longer than its accesses wait while it is stopped (4 s); \
                 try again when it is used less, or stop the guest for the move"
            )
        })
    }

    /// The failures that came too late to call the move off.
    pub fn failures(&self) -> Vec<String> {
        std::mem::take(&mut self.failed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The processes that stay stopped while the move is in doubt, for the end of a sentence.
    pub fn what_stays_stopped(&self) -> String {
        let stopped: Vec<_> = self.stopped().map(|process| process.pid().to_string()).collect();
        match stopped.as_slice() {
            [] => String::new(),
            pids => format!(
                "; with it process {} stays stopped, and is set going by `limosa resolve` if the move is undone, or by \
                 `kill -CONT`",
                pids.join(", ")
            ),
        }
    }

    fn too_late(&self, what: &str, command: &str, why: &str) {
        let failed = format!("{what} `{command}`: {why}");
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).push(failed);
    }
}

impl Vmm for Guest<'_> {
    fn stop(&self) -> Result<(), String> {
        if self.processes.is_empty() && self.on_stop.is_none() {
            return Ok(());
        }
        self.standstill.begin();
        if let Some(noting) = &self.noting {
            let mut running = Vec::new();
            for process in &self.processes {
                if !process.is_stopped()? {
                    running.push(process.noted()?);
                }
            }
            noting.stopping(running, self.on_stop)?;
        }
        if let Some(command) = self.on_stop {
            self.is_stopped_by_command.store(true, Ordering::Relaxed);
            hook::run(command, Leftovers::Killed).map_err(|why| format!("--on-stop `{command}`: {why}"))?;
        }
        // All are told to stop before the first is waited for.
        self.processes.iter().try_for_each(Process::stop)?;
        self.processes.iter().try_for_each(Process::wait_until_stopped)
    }

    fn committing(&self, note: &CommitNote) -> Result<(), String> {
        if let Some(noting) = &self.noting {
            let stopped = self.stopped().map(Process::noted).collect::<Result<_, _>>()?;
            noting.committing(note, stopped, self.on_stop)?;
        }
        *self.stays_for.lock().unwrap_or_else(PoisonError::into_inner) = Some(note.id);
        self.devices.iter().try_for_each(|device| device.stay(note.id).map_err(|error| error.to_string()))
    }

    fn undoing(&self) {
        let Some(id) = self.stays_for.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        for device in self.devices {
            if let Err(error) = device.release(id) {
                self.failed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(format!("{}: it stays stopped: {error}", device.given()));
            }
        }
    }

    fn resume(&self) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).extend(self.lost.iter().cloned());
        for process in &self.processes {
            if let Err(why) = process.resume() {
                self.too_late("--stop-with", &process.pid().to_string(), &format!("it stays stopped: {why}"));
            }
        }
        if let Some(command) = self.on_resume
            && self.is_stopped_by_command.load(Ordering::Relaxed)
            && let Err(why) = hook::run(command, Leftovers::Left)
        {
            self.too_late("--on-resume", command, &format!("{why}; the guest may stand still"));
        }
        if let Some(noting) = self.noting.as_ref().filter(|_| !self.stays_stopped()) {
            noting.goes_on();
        }
        self.standstill.end();
    }

    fn start(&self) {
        if let Some(command) = self.on_start
            && let Err(why) = hook::run(command, Leftovers::Left)
        {
            self.too_late("--on-start", command, &format!("{why}; the devices run here, the guest may not"));
        }
    }
}
