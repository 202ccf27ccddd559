//! The source's pre-copy: rounds while everything runs, until a stop costs no more than it may.

use std::time::Duration;

use limosa_client::DeviceExt;
use limosa_clockwork::now;
use limosa_protocol::{MigrationFlags, State};

use crate::devices::failed;
use crate::protocol::stop_policy::{Next, Pace, StopPolicy};
use crate::report::Recorder;
use crate::source::rollback::Rollback;
use crate::transfer::device_stream::{self, Job};
use crate::transfer::sending::Sending;
use crate::{Error, Result, Round, Source, WhenStalled};
use limosa_stream::Kind;
use limosa_stream::body::encode_round;

/// The most bytes that a device moves in a round.
const TURN_BYTES: u64 = 64 << 20;
/// How long to wait when devices want initial data to be read and have none for now.
const NOTHING_FOR_NOW: Duration = Duration::from_millis(2);

impl Source<'_> {
    /// Rounds of device data and dirty memory while everything runs.
    pub(crate) fn precopy(
        &mut self,
        sending: &Sending<'_, '_>,
        recorder: &Recorder<'_>,
        rollback: &mut Rollback,
    ) -> Result<()> {
        let began = now();
        for (at, (moved, found)) in self.devices.iter().zip(&rollback.found).enumerate() {
            let device = moved.device;
            let flags =
                device.migration_flags().map_err(|error| failed(device, "reading its flags", error))?;
            if self.options.precopy && flags.contains(MigrationFlags::PRE_COPY) && found.is_running() {
                // Without it, initial bytes that grow again are taken for dirty ones.
                let _ = device.precopy_info_v2();
                device_stream::give(sending, at, Job::Enter(State::PreCopy));
            }
        }
        device_stream::wait_all(sending, |_| false)?;
        let arc = now() - began;
        let open: Vec<_> = (0..self.devices.len()).filter(|at| sending.flows[*at].lock().open).collect();
        let has_memory = !self.memory.regions.is_empty() && !rollback.dirty.blind;
        if !has_memory && open.is_empty() {
            return Ok(());
        }
        let mut pace = match open.first() {
            None => Pace::new(sending.flush()?, Duration::ZERO, Duration::ZERO),
            Some(at) => {
                let began = now();
                device_stream::give(sending, *at, Job::Nothing);
                device_stream::wait_all(sending, |_| false)?;
                let passing = now() - began;
                Pace::new(sending.flush()?, arc, passing)
            }
        };
        let mut policy = StopPolicy::new(self.options.convergence);
        for number in 1.. {
            sending.check()?;
            let (began, before) = (now(), recorder.totals());
            open.iter().for_each(|at| device_stream::give(sending, *at, Job::PreCopy(TURN_BYTES)));
            if has_memory {
                rollback.dirty.send(&self.memory.regions, sending, recorder)?;
            }
            device_stream::wait_all(sending, |_| false)?;
            // What is on its way would have to arrive after a stop as well.
            sending.flush()?;
            let after = recorder.totals();
            let moved = after.memory_bytes + after.device_bytes - before.memory_bytes - before.device_bytes;
            pace.measured(moved, now() - began);
            let round = self.look(number, &pace, sending, rollback)?;
            sending.send(0, Kind::ROUND, 0, 0, &encode_round(number, round.memory_dirty_bytes))?;
            recorder.round(&round);
            if self.is_last(&round, &mut policy, recorder, rollback)? {
                break;
            }
            if moved == 0 && round.memory_dirty_bytes == 0 {
                sending.pause(NOTHING_FOR_NOW)?;
            }
        }
        Ok(())
    }

    /// Whether the stop comes now.
    fn is_last(
        &self,
        round: &Round,
        policy: &mut StopPolicy,
        recorder: &Recorder<'_>,
        rollback: &mut Rollback,
    ) -> Result<bool> {
        let (allowed, predicted) = (self.options.convergence, round.predicted_downtime);
        match policy.next(round) {
            Next::Round => return Ok(false),
            Next::Stop => {}
            Next::Stalled if self.vmm.throttle(rollback.throttled + 1) => {
                rollback.throttled += 1;
                recorder.throttled(rollback.throttled);
                policy.throttled();
                return Ok(false);
            }
            Next::Stalled => match allowed.when_stalled {
                WhenStalled::KeepTrying => return Ok(false),
                WhenStalled::Abort => {
                    let allowed = allowed.downtime_max;
                    return Err(Error::NotConverging { rounds: round.round, predicted, allowed });
                }
                WhenStalled::SwitchOver => {
                    tracing::info!("the stop may take {predicted:?}, allowed are {:?}", allowed.downtime_max);
                }
            },
        }
        recorder.predicted(predicted);
        Ok(true)
    }

    /// What is left at the end of a round, and what a stop would cost.
    fn look(
        &mut self,
        number: u32,
        pace: &Pace,
        sending: &Sending<'_, '_>,
        rollback: &mut Rollback,
    ) -> Result<Round> {
        let mut round = Round { round: number, ..Round::default() };
        for device in &sending.flows {
            let flow = device.lock();
            let info = flow.info.unwrap_or_default();
            round.device_initial_bytes = round.device_initial_bytes.saturating_add(info.initial_bytes);
            round.device_dirty_bytes = round.device_dirty_bytes.saturating_add(info.dirty_bytes);
            round.device_bytes = round.device_bytes.saturating_add(flow.bytes_if_stopped);
        }
        let began = limosa_clockwork::now();
        if !rollback.dirty.blind {
            rollback.dirty.harvest(self.devices, &mut self.memory)?;
        }
        // After the stop it takes as long; a log that compares has to read all of the memory.
        let harvest = limosa_clockwork::now() - began;
        round.memory_dirty_bytes = rollback.dirty.bytes();
        round.bytes_per_second = pace.bytes_per_second();
        let bytes = round.memory_dirty_bytes.saturating_add(round.device_bytes);
        round.predicted_downtime = pace.downtime(bytes).saturating_add(harvest);
        Ok(round)
    }
}
