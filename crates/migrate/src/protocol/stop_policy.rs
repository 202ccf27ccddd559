//! [`StopPolicy`]: when pre-copy ends. It compares the predicted downtime with the goal, and judges whether going on would
//! lower it.
//!
//! Memory and each device are judged separately: by how many fewer bytes remain after bytes were moved. Rounds are
//! counted for memory only.

use std::time::{Duration, Instant};

use super::pace::Pace;
use super::round::Round;
use crate::error::{Obstacle, Remaining};
use crate::options::{Convergence, WhenStalled};

/// A device is judged after it has moved this many bytes, or after this time.
const WINDOW_BYTES: u64 = 32 << 20;
const WINDOW_TIME: Duration = Duration::from_millis(250);
/// The longest time between two looks at devices that stream.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A device that does not report what is left, and always has data, is stopped once it has sent this much, or half of its
/// limit. It may send the same amount again in the stop.
const UNKNOWN_BYTES: u64 = 1 << 30;

/// The findings of a look at one device.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeviceLook {
    pub(crate) name: String,
    /// Whether it has a session and gives data before the stop.
    pub(crate) streams: bool,
    /// How many bytes it gave so far.
    pub(crate) sent: u64,
    /// How many of them the destination has not taken yet.
    pub(crate) on_the_way: u64,
    /// How many bytes of initial data are left to be read.
    pub(crate) initial: u64,
    /// Whether the destination has loaded the initial data that was read.
    pub(crate) initial_loaded: bool,
    /// How many bytes are left in pre-copy, initial ones included; `None` if the device does not say.
    pub(crate) left: Option<u64>,
    /// Whether it had nothing for now when it was read last.
    pub(crate) drained: bool,
    /// How many bytes it would give in the stop; `None` if that is not known.
    pub(crate) stop_bytes: Option<u64>,
}

/// The findings of a look.
#[derive(Clone, Debug)]
pub(crate) struct Look<'a> {
    pub(crate) now: Instant,
    /// Whether a round of memory has just ended; of memory that no log sees there are none.
    pub(crate) is_round: bool,
    pub(crate) memory_dirty_bytes: u64,
    pub(crate) devices: &'a [DeviceLook],
    /// How long a harvest of the dirty log takes, which is part of the downtime.
    pub(crate) harvest: Duration,
}

/// What to do after a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Go on. Look again when a device reports a change, or after this time.
    Continue(Duration),
    /// Stop the devices.
    Stop,
    /// Pre-copy has stalled.
    Stalled(Obstacle),
}

/// Follows the pre-copy of one move.
#[derive(Debug)]
pub(crate) struct StopPolicy {
    wanted: Convergence,
    /// The amount that a device sends before it is stopped if it does not report what is left.
    unknown_bytes: u64,
    looks: u32,
    /// The number of rounds that were made because of memory.
    rounds: u32,
    is_for_memory: bool,
    memory: Gains,
    devices: Vec<Tracked>,
    /// How many looks in a row found that the data would fit into the goal, and that the rest of a stop does not.
    slow_looks: u32,
}

/// Whether rounds of memory gain.
#[derive(Clone, Copy, Debug)]
struct Gains {
    best: u64,
    last: u64,
    stalled: u32,
    shrinks: bool,
}

impl Default for Gains {
    fn default() -> Gains {
        Gains { best: u64::MAX, last: u64::MAX, stalled: 0, shrinks: false }
    }
}

/// Whether the pre-copy of one device gains.
#[derive(Clone, Copy, Debug, Default)]
struct Tracked {
    /// When the window began, and the bytes sent by then.
    window: Option<(Instant, u64)>,
    /// The least amount that was left at the end of a window, and the bytes sent by then.
    best: (u64, u64),
    /// Its bytes at first, sent or left.
    first_left: u64,
    stalled: u32,
    /// Since when its initial data holds back the stop.
    initial_since: Option<Instant>,
}

impl StopPolicy {
    pub(crate) fn new(wanted: Convergence, state_max: Option<u64>, devices: usize) -> StopPolicy {
        StopPolicy {
            wanted,
            unknown_bytes: state_max.map_or(UNKNOWN_BYTES, |max| max / 2),
            looks: 0,
            rounds: 0,
            is_for_memory: true,
            memory: Gains::default(),
            devices: vec![Tracked::default(); devices],
            slow_looks: 0,
        }
    }

    /// The look, as it is reported to the caller.
    pub(crate) fn round(&self, look: &Look<'_>, pace: &Pace) -> Round {
        let sum = |of: &dyn Fn(&DeviceLook) -> u64| sum(look.devices, of);
        let bytes = bytes_left(look);
        let initial = sum(&|device| device.initial);
        Round {
            round: self.looks,
            memory_dirty_bytes: look.memory_dirty_bytes,
            device_bytes: bytes.saturating_sub(look.memory_dirty_bytes),
            devices_unknown: look.devices.iter().filter(|device| device.stop_bytes.is_none()).count() as u32,
            device_dirty_bytes: sum(&|device| device.left.unwrap_or(0)).saturating_sub(initial),
            device_initial_bytes: initial,
            bytes_per_second: pace.bytes_per_second(),
            predicted_downtime: pace.downtime(bytes).saturating_add(look.harvest),
        }
    }

    /// What to do after this look.
    pub(crate) fn next(&mut self, look: &Look<'_>, pace: &Pace) -> (Round, Next) {
        self.looks = self.looks.saturating_add(1);
        if look.is_round {
            self.end_round(look.memory_dirty_bytes);
        }
        let round = self.round(look, pace);
        let next = self.decide(look, pace, &round);
        self.is_for_memory = next == Next::Continue(Duration::ZERO);
        (round, next)
    }

    fn decide(&mut self, look: &Look<'_>, pace: &Pace, round: &Round) -> Next {
        let goal = self.wanted.downtime_goal;
        let fits = round.predicted_downtime <= goal;
        let overdue = match self.initial_data(look) {
            Initial::Pending => return Next::Continue(LOOK_EVERY),
            Initial::Overdue(obstacle) => Some(obstacle),
            Initial::Loaded => None,
        };
        let mut device_gains = false;
        for (tracked, device) in self.devices.iter_mut().zip(look.devices) {
            device_gains |= tracked.gains(device, look.now, &self.wanted, self.unknown_bytes, pace);
        }
        if device_gains {
            return Next::Continue(LOOK_EVERY);
        }
        let memory_left = pace.transfer(look.memory_dirty_bytes);
        // Memory that no log sees does not move in rounds.
        let memory_gains =
            look.is_round && look.memory_dirty_bytes > 0 && self.rounds < self.wanted.rounds_max;
        if fits {
            self.slow_looks = 0;
            if memory_gains && self.memory.shrinks && memory_left > goal / 16 {
                return Next::Continue(Duration::ZERO);
            }
            let unknown = look.devices.iter().find(|device| device.stop_bytes.is_none());
            let obstacle = overdue.or_else(|| Some(Obstacle::SizeUnknown { device: unknown?.name.clone() }));
            return obstacle.map_or(Next::Stop, Next::Stalled);
        }
        if memory_gains && self.memory.stalled < self.wanted.stalled_rounds_max {
            return Next::Continue(Duration::ZERO);
        }
        // One slow harvest or answer may be that of a busy machine.
        if overdue.is_none()
            && pace.transfer(bytes_left(look)) <= goal
            && self.slow_looks < self.wanted.stalled_rounds_max
        {
            self.slow_looks += 1;
            return Next::Continue(LOOK_EVERY);
        }
        Next::Stalled(overdue.unwrap_or_else(|| self.obstacle(look, pace)))
    }

    /// The guest was slowed down: earlier rounds of memory do not count any more.
    pub(crate) fn throttled(&mut self) {
        self.memory = Gains::default();
    }

    fn end_round(&mut self, dirty: u64) {
        let memory = &mut self.memory;
        memory.shrinks = dirty < memory.last / 2;
        memory.last = dirty;
        // A slightly smaller number is not a gain.
        if dirty < memory.best - memory.best / 20 {
            memory.best = dirty;
            memory.stalled = 0;
        } else {
            memory.stalled += u32::from(self.is_for_memory);
        }
        self.rounds = self.rounds.saturating_add(u32::from(self.is_for_memory));
    }

    /// Whether initial data holds back the stop, and the device that has held it back for too long, if one has.
    fn initial_data(&mut self, look: &Look<'_>) -> Initial {
        let limit = self.wanted.initial_max;
        let waits_for_ever = self.wanted.when_stalled == WhenStalled::KeepTrying;
        let mut found = Initial::Loaded;
        for (tracked, device) in self.devices.iter_mut().zip(look.devices) {
            if !device.streams || device.initial == 0 && device.initial_loaded {
                tracked.initial_since = None;
                continue;
            }
            let since = *tracked.initial_since.get_or_insert(look.now);
            if waits_for_ever || look.now.saturating_duration_since(since) < limit {
                return Initial::Pending;
            }
            let (device, left_bytes) = (device.name.clone(), device.initial);
            found = Initial::Overdue(Obstacle::InitialData { device, left_bytes, limit });
        }
        found
    }

    /// The greatest obstacle.
    fn obstacle(&self, look: &Look<'_>, pace: &Pace) -> Obstacle {
        if pace.transfer(bytes_left(look)) <= self.wanted.downtime_goal {
            return Obstacle::Latency;
        }
        let bytes = |device: &DeviceLook| device.stop_bytes.unwrap_or(0).saturating_add(device.on_the_way);
        let most = look.devices.iter().max_by_key(|device| bytes(device));
        if look.memory_dirty_bytes > 0 && look.memory_dirty_bytes >= most.map_or(0, bytes) {
            return Obstacle::DirtyMemory { dirty_bytes: look.memory_dirty_bytes };
        }
        let Some(device) = most.filter(|device| bytes(device) > 0) else { return Obstacle::Latency };
        let (name, bytes) = (device.name.clone(), device.stop_bytes.unwrap_or(0));
        match device.left {
            _ if device.on_the_way > bytes => Obstacle::SlowToLoad { device: name, bytes: device.on_the_way },
            Some(left) if device.streams && left > bytes / 2 => {
                Obstacle::DirtyDevice { device: name, left_bytes: left }
            }
            _ => Obstacle::DeviceState { device: name, bytes },
        }
    }
}

/// Where a stop would have most to move.
pub(crate) fn most_left(look: &Look<'_>) -> Option<Remaining> {
    let bytes = |device: &DeviceLook| device.stop_bytes.unwrap_or(0).saturating_add(device.on_the_way);
    let devices = look.devices.iter().map(|device| (device.name.as_str(), bytes(device)));
    Remaining::most(look.memory_dirty_bytes, devices)
}

/// The sum over all devices.
fn sum(devices: &[DeviceLook], of: &dyn Fn(&DeviceLook) -> u64) -> u64 {
    devices.iter().fold(0_u64, |sum, device| sum.saturating_add(of(device)))
}

/// The bytes that a stop would have to move.
fn bytes_left(look: &Look<'_>) -> u64 {
    let stop = |device: &DeviceLook| device.stop_bytes.unwrap_or(0).saturating_add(device.on_the_way);
    look.memory_dirty_bytes.saturating_add(sum(look.devices, &stop))
}

enum Initial {
    Loaded,
    Pending,
    Overdue(Obstacle),
}

impl Tracked {
    /// Whether more pre-copy of the device makes the downtime much shorter.
    fn gains(
        &mut self,
        device: &DeviceLook,
        now: Instant,
        wanted: &Convergence,
        unknown_bytes: u64,
        pace: &Pace,
    ) -> bool {
        if !device.streams {
            return false;
        }
        let Some(left) = device.left else {
            // It is only known whether the device has data.
            return !device.drained && device.sent <= unknown_bytes;
        };
        let floor = (wanted.downtime_goal / 64).max(Duration::from_millis(1));
        // Data on its way counts as moved only when it is loaded.
        let all = left.saturating_add(device.on_the_way);
        // Before a rate was measured, only a device that has given all its data has little left.
        let has_little = match pace.is_measured() {
            true => pace.transfer(all) <= floor,
            false => (left == 0 || device.drained) && pace.transfer(device.on_the_way) <= floor,
        };
        let left = all;
        if has_little {
            (self.window, self.stalled) = (None, 0);
            return false;
        }
        let Some((since, sent)) = self.window else {
            if self.first_left == 0 {
                self.first_left = device.sent.saturating_add(left);
            }
            (self.window, self.best) = (Some((now, device.sent)), (left, device.sent));
            return self.stalled < wanted.stalled_rounds_max;
        };
        // A device whose data is still being sent may be quiet.
        let is_sending = device.sent == sent && !device.drained;
        let is_over =
            device.sent - sent >= WINDOW_BYTES || now.saturating_duration_since(since) >= WINDOW_TIME;
        if is_over && !is_sending {
            let (best, sent_then) = self.best;
            // Progress is at least a twentieth of the bytes sent; less is noise, or does not converge.
            if left < best.saturating_sub((device.sent - sent_then) / 20) {
                (self.best, self.stalled) = ((left, device.sent), 0);
            } else {
                self.stalled += 1;
            }
            self.window = Some((now, device.sent));
        }
        let most = self.first_left.saturating_mul(wanted.rounds_max.into());
        self.stalled < wanted.stalled_rounds_max && device.sent <= most
    }
}

#[cfg(test)]
mod tests;
