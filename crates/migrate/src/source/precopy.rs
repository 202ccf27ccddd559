//! The source's pre-copy: devices stream and memory is sent in rounds while everything runs, until the predicted downtime
//! meets the goal, or pre-copy has stalled.

use std::time::{Duration, Instant};

use limosa_client::DeviceExt;
use limosa_clockwork::now;
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::Kind;
use limosa_stream::body::encode_round;

use super::rollback::Rollback;
use super::{Source, Stage};
use crate::context::Context;
use crate::devices::failed;
use crate::error::Remaining;
use crate::memory::PAGE_BYTES;
use crate::protocol::pace::{Pace, Sample};
use crate::protocol::stop_policy::{DeviceLook, Look, Next, StopPolicy, most_left};
use crate::transfer::device_flow::{DeviceFlow, Job};
use crate::transfer::sending::Sending;
use crate::vmm;
use crate::wire::Frame;
use crate::{Error, Obstacle, Result, Round, WhenStalled};

/// The pause between two looks when pre-copy has stalled and the caller wants to keep trying.
const KEEP_TRYING: Duration = Duration::from_millis(50);
/// How many hand-offs to another thread are timed, of which the shortest counts.
const HAND_OFFS: u32 = 3;
/// How often devices that seem slow open a session again.
const REOPENED_MAX: u32 = 2;
/// The interval at which looks without a round of memory are reported.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// The loop of pre-copy, from look to look.
struct Looking {
    names: Vec<String>,
    /// The names of the devices that do not say how much they would give in the stop.
    unknown: Vec<String>,
    /// Where a stop would have most to move.
    most_left: Option<Remaining>,
    policy: StopPolicy,
    pace: Pace,
    has_memory: bool,
    rate: RateSample,
    reported: Option<Instant>,
    news: u64,
    /// A log has failed in a round, of which the report has a note.
    has_lost_log: bool,
}

/// The current measurement of the rate.
struct RateSample {
    since: Instant,
    /// The bytes that the destination had handled then.
    handled: u64,
    /// Whether no device data was on its way then.
    is_exact: bool,
}

impl<'a> Source<'a> {
    /// Sends rounds of dirty memory, while devices stream and everything runs. Returns the measured pace.
    pub(super) fn precopy(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
    ) -> Result<Pace> {
        let sending = stage.sending;
        let pace = self.open_sessions(sending, rollback)?;
        sending.give_all(|at| {
            let mut flow = sending.flows[at].lock();
            flow.streaming = flow.has_session;
            Some(if flow.streaming { Job::Stream } else { Job::Look })
        });
        // A streaming device first reports what is left; the other devices do nothing else.
        sending.wait_all_looked()?;
        let mut looking = Looking {
            names: self.devices.iter().map(|moved| moved.device.name().into()).collect(),
            unknown: Vec::new(),
            most_left: None,
            policy: StopPolicy::new(self.options.convergence, self.options.state_max, self.devices.len()),
            pace,
            has_memory: !self.memory.regions.is_empty() && !rollback.logs.blind,
            rate: RateSample::begin(context, sending),
            reported: None,
            news: 0,
            has_lost_log: false,
        };
        loop {
            sending.team.check()?;
            context.recorder.check()?;
            let (round, next) = self.look(context, stage, rollback, &mut looking)?;
            looking.report(context, sending, &round, &next)?;
            let pause = match next {
                Next::Continue(pause) => pause,
                Next::Stop => {
                    self.check_standstill(&round, &looking)?;
                    break self.predict(context, &round, &looking);
                }
                Next::Stalled(obstacle) => {
                    if self.throttle(context, &obstacle, rollback) {
                        looking.policy.throttled();
                        if !looking.has_memory {
                            // A round of memory takes its time. Other looks give the guest some to become slower.
                            looking.pause(sending, KEEP_TRYING)?;
                        }
                        continue;
                    }
                    match self.stalled(&obstacle, &round, &looking)? {
                        true => KEEP_TRYING,
                        false => {
                            tracing::info!("stopping although the goal is not met: {obstacle}");
                            break self.predict(context, &round, &looking);
                        }
                    }
                }
            };
            looking.pause(sending, pause)?;
        }
        Ok(looking.pace)
    }

    /// Opens a session on each device that has PRE_COPY, and measures how long an arc and a hand-off take.
    fn open_sessions(&mut self, sending: &Sending<'_, '_>, rollback: &Rollback) -> Result<Pace> {
        let began = now();
        for (at, (moved, found)) in self.devices.iter().zip(&rollback.found).enumerate() {
            let device = moved.device;
            let flags =
                device.migration_flags().map_err(|error| failed(device, "reading its flags", error))?;
            if self.options.precopy && flags.contains(MigrationFlags::PRE_COPY) && found.is_running() {
                // Without this feature, initial bytes that reappear are counted as dirty ones.
                let _ = device.precopy_info_v2();
                sending.give(at, Job::Enter(State::PreCopy));
            }
        }
        sending.wait_all()?;
        let took = now() - began;
        let opened = sending.flows.iter().position(|flow| flow.lock().has_session);
        let Some(at) = opened else {
            return Ok(Pace::new(sending.flush()?, Duration::ZERO, Duration::ZERO));
        };
        let mut hand_off = Duration::MAX;
        for _ in 0..HAND_OFFS {
            let began = now();
            sending.give(at, Job::NoOp);
            sending.wait_all()?;
            hand_off = hand_off.min(now() - began);
        }
        let mut pace = Pace::new(sending.flush()?, took, hand_off);
        let wanted = &self.options.convergence;
        // A single slow arc may be that of a busy machine, and would be counted for each arc of the stop.
        for _ in 0..REOPENED_MAX {
            if wanted.when_stalled != WhenStalled::Abort || pace.arcs() <= wanted.downtime_goal / 4 {
                break;
            }
            let began = now();
            sending.give_all(|at| sending.flows[at].lock().has_session.then_some(Job::Reopen));
            sending.wait_all()?;
            pace.arc_took((now() - began) / 2);
        }
        Ok(pace)
    }

    /// Sends a round of memory, if there is any memory, and asks the policy what to do next.
    fn look(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
        looking: &mut Looking,
    ) -> Result<(Round, Next)> {
        let sending = stage.sending;
        let loads = |flow: &DeviceFlow| flow.initial_is_loaded();
        if looking.has_memory {
            looking.rate = RateSample::begin(context, sending);
            stage.ram.send_round(sending)?;
            // A stop would have to wait for data on its way as well.
            looking.pace.answered(sending.flush()?);
        } else if !sending.flows.iter().all(|flow| loads(&flow.lock())) {
            // The flush makes the destination say how much it has loaded.
            looking.pace.answered(sending.flush()?);
        }
        looking.measure(context, sending)?;
        let began = now();
        if !rollback.logs.blind
            && let Some(lost) = rollback.logs.harvest(self.devices, &mut self.memory)?
        {
            tracing::warn!("a log of dirty pages is lost, all is dirty: {lost}");
            if !std::mem::replace(&mut looking.has_lost_log, true) {
                let note = format!("the log of dirty pages was lost in a round, all is sent again: {lost}");
                context.recorder.note(note);
            }
        }
        let blind = rollback.logs.blind;
        let all = self.memory.regions.iter().map(|region| region.size / PAGE_BYTES * PAGE_BYTES).sum();
        let mut devices = sending.look(&looking.names);
        if looking.waits_for_credit(&devices, self.options.convergence.downtime_goal) {
            // Credit is given late, so that data that is long loaded would be counted.
            looking.pace.answered(sending.flush()?);
            devices = sending.look(&looking.names);
        }
        let unknown = devices.iter().filter(|device| device.stop_bytes.is_none());
        looking.unknown = unknown.map(|device| device.name.clone()).collect();
        let look = Look {
            now: now(),
            is_round: looking.has_memory,
            memory_dirty_bytes: if blind { all } else { rollback.logs.pages.bytes() },
            devices: &devices,
            // The harvest after the stop takes as long. A log that compares pages has to read all memory.
            harvest: now() - began,
        };
        looking.most_left = most_left(&look);
        Ok(looking.policy.next(&look, &looking.pace))
    }

    /// Asks the VMM to slow its vCPUs down, if that can help. Returns whether it did.
    fn throttle(&self, context: &Context<'a>, obstacle: &Obstacle, rollback: &mut Rollback) -> bool {
        let helps = match obstacle {
            // Memory that no log sees moves after the stop, however slow the guest is.
            Obstacle::DirtyMemory { .. } => !rollback.logs.blind,
            Obstacle::DirtyDevice { .. } => true,
            _ => false,
        };
        if !helps {
            return false;
        }
        let step = rollback.throttled + 1;
        let mut slowed = false;
        if let Err(why) = vmm::tell("Vmm::throttle", || slowed = self.vmm.throttle(step)) {
            context.recorder.note(why);
        }
        if slowed {
            rollback.throttled = step;
            context.recorder.throttled(step);
        }
        slowed
    }

    /// Pre-copy has stalled. Returns whether to go on nevertheless; an error ends the move.
    fn stalled(&self, obstacle: &Obstacle, round: &Round, looking: &Looking) -> Result<bool> {
        let wanted = &self.options.convergence;
        // Waiting does not make a device say its size.
        let is_final = matches!(obstacle, Obstacle::SizeUnknown { .. });
        match wanted.when_stalled {
            WhenStalled::KeepTrying if !is_final => Ok(true),
            WhenStalled::Abort => Err(self.not_converging(obstacle.clone(), round)),
            WhenStalled::KeepTrying | WhenStalled::SwitchOver => {
                self.check_standstill(round, looking)?;
                Ok(false)
            }
        }
    }

    /// Refuses a stop that is predicted to take longer than the guest may stand still.
    fn check_standstill(&self, round: &Round, looking: &Looking) -> Result<()> {
        let limit = self.options.standstill_max;
        match round.predicted_downtime > limit {
            true => {
                let left = looking.most_left.clone();
                Err(self.not_converging(Obstacle::Standstill { limit, left }, round))
            }
            false => Ok(()),
        }
    }

    fn not_converging(&self, obstacle: Obstacle, round: &Round) -> Error {
        Error::NotConverging {
            obstacle,
            predicted: round.predicted_downtime,
            is_minimum: round.devices_unknown > 0,
            goal: self.options.convergence.downtime_goal,
        }
    }

    /// Records the predicted downtime, or the devices because of which it is not known.
    fn predict(&self, context: &Context<'a>, round: &Round, looking: &Looking) {
        let is_known = looking.unknown.is_empty();
        context.recorder.predicted(is_known.then_some(round.predicted_downtime));
        for name in &looking.unknown {
            context.recorder.note(format!(
                "{name} does not say how much it gives in the stop (no MIG_DATA_SIZE): the downtime is not predicted"
            ));
        }
    }
}

impl Looking {
    /// Measures the rate since the sample began.
    fn measure(&mut self, context: &Context<'_>, sending: &Sending<'_, '_>) -> Result<()> {
        // A round of memory is a sample, however much the devices have. It may be one of zeroes, which need no link.
        let idle_since = if self.has_memory { None } else { idle_since(sending) };
        if idle_since.is_some() && on_the_way(sending) > 0 {
            self.pace.answered(sending.flush()?);
        }
        let RateSample { since, handled: before, is_exact } = self.rate;
        let sample = Sample {
            bytes: handled(context, sending).saturating_sub(before),
            took: now() - since,
            busy: match (self.has_memory, idle_since) {
                (true, _) => Duration::ZERO,
                (false, None) => now() - since,
                (false, Some(idle)) => idle.saturating_duration_since(since),
            },
            ran_dry: idle_since.is_some(),
        };
        // Credit for older data would make a sample of little data look fast.
        let is_usable = idle_since.is_none() || is_exact;
        if is_usable && self.pace.measured(sample) || idle_since.is_some() {
            self.rate = RateSample::begin(context, sending);
        }
        Ok(())
    }

    /// Whether only device data that is sent, and not known to be loaded, makes the predicted downtime exceed the goal.
    fn waits_for_credit(&self, devices: &[DeviceLook], goal: Duration) -> bool {
        let stop = |device: &DeviceLook| device.stop_bytes.unwrap_or(0);
        let (mut left, mut way) = (0_u64, 0_u64);
        for device in devices {
            (left, way) = (left.saturating_add(stop(device)), way.saturating_add(device.on_the_way));
        }
        self.pace.downtime(left) <= goal && self.pace.downtime(left.saturating_add(way)) > goal
    }

    fn report(
        &mut self,
        context: &Context<'_>,
        sending: &Sending<'_, '_>,
        round: &Round,
        next: &Next,
    ) -> Result<()> {
        let is_due = self.reported.is_none_or(|at| at + REPORT_EVERY <= now());
        if self.has_memory || is_due || !matches!(next, Next::Continue(_)) {
            self.reported = Some(now());
            let payload = encode_round(round.round, round.memory_dirty_bytes);
            sending.post(0, &Frame::new(Kind::ROUND, &payload))?;
            context.recorder.round(round);
        }
        Ok(())
    }

    /// Waits for the next look.
    fn pause(&mut self, sending: &Sending<'_, '_>, pause: Duration) -> Result<()> {
        match self.has_memory {
            // Each look is a round, which takes its time.
            true => sending.pause(pause),
            false => sending.wait_for_news(&mut self.news, pause),
        }
    }
}

impl RateSample {
    fn begin(context: &Context<'_>, sending: &Sending<'_, '_>) -> RateSample {
        sending.flows.iter().for_each(|flow| flow.lock().idle_since = None);
        let is_exact = on_the_way(sending) == 0;
        RateSample { since: now(), handled: handled(context, sending), is_exact }
    }
}

/// When the first device had nothing to give, since the sample began.
fn idle_since(sending: &Sending<'_, '_>) -> Option<Instant> {
    sending.flows.iter().filter_map(|flow| flow.lock().idle_since).min()
}

/// The bytes of device data that are sent, and not known to be loaded.
fn on_the_way(sending: &Sending<'_, '_>) -> u64 {
    sending.flows.iter().map(|flow| flow.lock().window.on_the_way()).sum()
}

/// The bytes that the destination has handled.
fn handled(context: &Context<'_>, sending: &Sending<'_, '_>) -> u64 {
    let taken = sending.flows.iter().map(|flow| flow.lock().window.taken()).sum::<u64>();
    context.recorder.totals().memory_bytes + taken
}
