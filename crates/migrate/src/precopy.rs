//! The source's pre-copy: rounds while everything runs, until a stop costs no more than it may.

use std::time::{Duration, Instant};

use limosa_client::DeviceExt;
use limosa_protocol::{MigrationFlags, State};

use crate::channel::Channel;
use crate::convergence::{Course, Next, Pace};
use crate::devices::{enter, failed};
use crate::report::{Act, Recorder};
use crate::saving::Saving;
use crate::stream::Kind;
use crate::stream::body::encode_round;
use crate::undo::Held;
use crate::{Error, Result, Round, Source, WhenStalled};

/// The most bytes that a device moves before the others get their turn.
const TURN_BYTES: u64 = 64 << 20;
/// How long to wait when devices want initial data to be read and have none for now.
const NOTHING_FOR_NOW: Duration = Duration::from_millis(2);

impl Source<'_> {
    /// Rounds of device data and dirty memory while everything runs.
    pub(crate) fn precopy(
        &mut self,
        channel: &mut Channel<'_>,
        recorder: &Recorder<'_>,
        held: &mut Held,
        savings: &mut [Saving<'_>],
    ) -> Result<()> {
        for (at, ((moved, saving), found)) in
            self.devices.iter().zip(&mut *savings).zip(&held.found).enumerate()
        {
            let device = moved.device;
            let flags =
                device.migration_flags().map_err(|error| failed(device, "reading its flags", error))?;
            if self.options.precopy && flags.contains(MigrationFlags::PRE_COPY) && found.is_running() {
                // Without it, initial bytes that grow again are taken for dirty ones.
                let _ = device.precopy_info_v2();
                let span = recorder.span(at, Act::Enter { state: State::PreCopy });
                let stream = channel.attend(|| enter(device, State::PreCopy))?;
                drop(span);
                saving.open(stream)?;
            }
        }
        let has_memory = !self.memory.regions.is_empty() && !held.dirty.blind;
        if !has_memory && !savings.iter().any(Saving::is_open) {
            return Ok(());
        }
        let mut pace = Pace::new(self.flush(channel)?);
        let mut course = Course::new(self.options.convergence);
        for number in 1.. {
            channel.check_cancel()?;
            let (began, before) = (Instant::now(), recorder.totals());
            if has_memory {
                held.dirty.send(&self.memory.regions, channel, recorder, |channel, recorder| {
                    channel.check_cancel()?;
                    let mut open = savings.iter_mut().filter(|saving| saving.is_open());
                    open.try_for_each(|saving| saving.precopy(TURN_BYTES, channel, recorder).map(drop))
                })?;
            }
            for saving in savings.iter_mut().filter(|saving| saving.is_open()) {
                saving.precopy(TURN_BYTES, channel, recorder)?;
            }
            // What is on its way would have to arrive after a stop as well.
            self.flush(channel)?;
            let now = recorder.totals();
            let moved = now.memory_bytes + now.device_bytes - before.memory_bytes - before.device_bytes;
            pace.measured(moved, began.elapsed());
            let round = self.look(number, &pace, channel, held, savings)?;
            channel.send(Kind::ROUND, 0, 0, &encode_round(number, round.memory_dirty_bytes))?;
            recorder.round(&round);
            if self.is_last(&round, &mut course, recorder, held)? {
                break;
            }
            if moved == 0 && round.memory_dirty_bytes == 0 {
                channel.pause(NOTHING_FOR_NOW)?;
            }
        }
        Ok(())
    }

    /// Whether the stop comes now.
    fn is_last(
        &self,
        round: &Round,
        course: &mut Course,
        recorder: &Recorder<'_>,
        held: &mut Held,
    ) -> Result<bool> {
        let (allowed, predicted) = (self.options.convergence, round.predicted_downtime);
        match course.next(round) {
            Next::Round => return Ok(false),
            Next::Stop => {}
            Next::Stalled if self.vmm.throttle(held.throttled + 1) => {
                held.throttled += 1;
                recorder.throttled(held.throttled);
                course.throttled();
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

    /// Waits until the destination has handled all that was sent, and tells how long that took.
    fn flush(&self, channel: &mut Channel<'_>) -> Result<Duration> {
        let began = Instant::now();
        if channel.has_peer() {
            channel.send(Kind::FLUSH, 0, 0, &[])?;
            let doing = "waiting for the destination to handle what was sent";
            channel.expect(Kind::FLUSHED, doing, self.options.load_max)?;
        }
        Ok(began.elapsed())
    }

    /// What is left at the end of a round, and what a stop would cost.
    fn look(
        &mut self,
        number: u32,
        pace: &Pace,
        channel: &mut Channel<'_>,
        held: &mut Held,
        savings: &mut [Saving<'_>],
    ) -> Result<Round> {
        let mut round = Round { round: number, ..Round::default() };
        for saving in savings {
            saving.hint(channel)?;
            let (initial, dirty) = saving.left();
            round.device_initial_bytes = round.device_initial_bytes.saturating_add(initial);
            round.device_dirty_bytes = round.device_dirty_bytes.saturating_add(dirty);
            round.device_bytes = round.device_bytes.saturating_add(saving.bytes_if_stopped()?);
        }
        if !held.dirty.blind {
            held.dirty.harvest(self.devices, &mut self.memory)?;
        }
        round.memory_dirty_bytes = held.dirty.bytes();
        round.bytes_per_second = pace.bytes_per_second();
        round.predicted_downtime = pace.downtime(round.memory_dirty_bytes.saturating_add(round.device_bytes));
        Ok(round)
    }
}
