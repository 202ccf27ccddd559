//! The device opened, and brought back to RUNNING after each check.

use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_client::{Device, DeviceExt, Error, Result};
use limosa_protocol::{Errno, State};

use super::suite::{End, Suite};
use super::within::{Done, GRACE, within};
use crate::check::Needs;
use crate::recorder::Recorded;
use crate::survey::Facts;

/// The time that a supervisor has to restart a server that has ended, and the interval between the attempts to connect.
pub(crate) const RESTART: Duration = Duration::from_secs(2);
pub(crate) const RETRY: Duration = Duration::from_millis(20);

/// Whether an error means that no server is there.
fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Disconnected { .. } | Error::Os { errno: Errno::ENOENT | Errno::ECONNREFUSED, .. })
}

impl Suite {
    /// Opens the device again. A server that has ended with its client may be about to be started again.
    pub(super) fn reopen(&mut self) -> Result<()> {
        let until = Instant::now() + RESTART.min(self.limits.check);
        loop {
            match self.open() {
                Err(error) if is_gone(&error) && Instant::now() < until => std::thread::sleep(RETRY),
                opened => return opened,
            }
        }
    }

    /// Opens the device.
    pub(super) fn open(&mut self) -> Result<()> {
        self.device = None;
        let target = Arc::clone(&self.target);
        let opened = match within(self.limits.check + GRACE, move || (target.open)()) {
            Done::Value(opened) => opened?,
            Done::Panicked(what) => {
                return Err(Error::Misbehaved { device: self.target.name.clone(), what });
            }
            Done::Hangs => return Err(self.silence("opening")),
        };
        let record = Arc::clone(&self.record);
        self.device = Some(Arc::new(Recorded { device: opened, record, prefix: "" }));
        Ok(())
    }

    /// Checks that the device runs, or may be reset.
    pub(super) fn begin(&mut self, destructive: bool) -> Result<()> {
        let Some(device) = self.device.clone() else { return Ok(()) };
        let asked = device.clone();
        match within(self.limits.check + GRACE, move || asked.state()) {
            Done::Value(Ok(State::Running)) => Ok(()),
            // It has no migration, or answers what a check has to judge.
            Done::Value(Err(Error::Refused { .. })) => Ok(()),
            Done::Value(Err(error)) => Err(error),
            Done::Value(Ok(state)) if destructive => {
                match within(self.limits.check + GRACE, move || device.reset()) {
                    Done::Value(Ok(())) => Ok(()),
                    Done::Value(Err(error)) => Err(error),
                    _ => Err(Error::Misbehaved {
                        device: self.target.name.clone(),
                        what: format!("it is in {state} and does not answer a reset"),
                    }),
                }
            }
            Done::Value(Ok(state)) => Err(Error::Usage {
                device: self.target.name.clone(),
                what: format!("it is in {state}, expected RUNNING; --destructive resets it"),
            }),
            Done::Panicked(what) => Err(Error::Misbehaved { device: self.target.name.clone(), what }),
            Done::Hangs => Err(self.silence("GET MIG_DEVICE_STATE")),
        }
    }

    /// Brings the device back to RUNNING: by arcs, else by a reset, else by opening it again and a reset. If all of these fail, the
    /// suite ends.
    pub(super) fn restore(&mut self, has_migration: bool, has_logging: bool) {
        for attempt in 0..2 {
            if self.device.is_none()
                && let Err(error) = self.reopen()
            {
                self.ended = Some(End { why: format!("the device cannot be opened any more: {error}") });
                return;
            }
            let Some(device) = self.device.clone() else { return };
            let restored =
                within(self.limits.check + GRACE, move || back(&*device, has_migration, has_logging));
            match restored {
                Done::Value(Ok(())) => return,
                Done::Value(Err(error)) if attempt > 0 => {
                    self.ended =
                        Some(End { why: format!("the device cannot be brought back to RUNNING: {error}") });
                    return;
                }
                Done::Value(Err(error)) if error.is_connection_lost() => {
                    if matches!(error, Error::Timeout { .. }) {
                        self.count_silence("bringing it back");
                    }
                    self.device = None;
                }
                Done::Value(Err(_)) | Done::Panicked(_) => self.device = None,
                Done::Hangs => {
                    self.device = None;
                    self.count_silence("bringing it back");
                }
            }
            if self.device.is_none()
                && let Err(error) = self.reopen()
            {
                self.ended = Some(End { why: format!("the device cannot be opened any more: {error}") });
                return;
            }
        }
        self.ended.get_or_insert(End { why: "the device cannot be brought back to RUNNING".into() });
    }

    /// Gives the device its state back, and says in which state of the machine it is left.
    pub(super) fn leave(&mut self, facts: &Arc<Facts>, destructive: bool) -> String {
        if self.device.is_none() && self.reopen().is_err() {
            return "unknown: it cannot be opened any more".into();
        }
        let Some(device) = self.device.take() else { return "unknown".into() };
        if !facts.has.contains(Needs::MIGRATION) {
            return "it has no migration state".into();
        }
        let sample = facts.sample.clone().filter(|_| destructive && self.ended.is_none());
        let left = within(self.limits.check + GRACE, move || {
            let mut note = "";
            if let Some(sample) = sample {
                let loaded = (|| -> Result<()> {
                    if let Some(mut stream) = device.set_state(State::Resuming)? {
                        stream.write(&sample)?;
                    }
                    device.set_state(State::Running).map(drop)
                })();
                if loaded.is_err() {
                    note = ", reset: its state could not be given back";
                    let _ = device.reset();
                }
            }
            device.state().map(|state| format!("{state}{note}"))
        });
        match left {
            Done::Value(Ok(state)) => state,
            Done::Value(Err(error)) => format!("unknown: {error}"),
            Done::Panicked(what) => format!("unknown: {what}"),
            Done::Hangs => "unknown: it does not answer".into(),
        }
    }
}

/// Turns logging off and brings the device to RUNNING from any state: by arcs, else by a reset.
pub fn back(device: &dyn Device, has_migration: bool, has_logging: bool) -> Result<()> {
    if has_logging {
        match device.dma_logging_stop() {
            // It is off.
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    if !has_migration {
        return Ok(());
    }
    match device.state() {
        Ok(State::Running) => return Ok(()),
        Ok(_) | Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    match device.set_state(State::Running) {
        Ok(_) if device.state()? == State::Running => return Ok(()),
        Ok(_) | Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    device.reset()?;
    match device.state()? {
        State::Running => Ok(()),
        state => Err(Error::Misbehaved {
            device: device.name().into(),
            what: format!("it is in {state} after a reset, expected RUNNING"),
        }),
    }
}
