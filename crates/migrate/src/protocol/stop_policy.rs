//! [`StopPolicy`]: when pre-copy ends. It compares the predicted downtime with the goal, and judges whether going on would
//! lower it.
//!
//! Memory and each device are judged separately: by how much fewer bytes are left after others were moved. Rounds are
//! counted for memory only.

use std::time::{Duration, Instant};

use super::pace::Pace;
use super::round::Round;
use crate::error::Obstacle;
use crate::options::{Convergence, WhenStalled};

/// A device is judged after it has moved this many bytes, or after this time.
const WINDOW_BYTES: u64 = 32 << 20;
const WINDOW_TIME: Duration = Duration::from_millis(250);
/// The longest time between two looks at devices that stream.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How much a device that does not say its size may give in pre-copy, for each allowed round.
const UNKNOWN_BYTES: u64 = 1 << 30;

/// What a look finds of one device.
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

/// What a look found out.
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
    /// Go on. Look again when a device has news, or after this time.
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
    looks: u32,
    /// The number of rounds that were made because of memory.
    rounds: u32,
    is_for_memory: bool,
    memory: Gains,
    devices: Vec<Tracked>,
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
    /// When the window began, and what was sent then.
    window: Option<(Instant, u64)>,
    /// The least that was left at the end of a window, and what had been sent then.
    best: (u64, u64),
    /// What was left at first.
    first_left: u64,
    stalled: u32,
    /// Since when its initial data holds back the stop.
    initial_since: Option<Instant>,
}

impl StopPolicy {
    pub(crate) fn new(wanted: Convergence, devices: usize) -> StopPolicy {
        StopPolicy {
            wanted,
            looks: 0,
            rounds: 0,
            is_for_memory: true,
            memory: Gains::default(),
            devices: vec![Tracked::default(); devices],
        }
    }

    /// The look, as it is reported to the caller.
    pub(crate) fn round(&self, look: &Look<'_>, pace: &Pace) -> Round {
        let sum = |of: &dyn Fn(&DeviceLook) -> u64| {
            look.devices.iter().fold(0_u64, |sum, device| sum.saturating_add(of(device)))
        };
        let stop = sum(&|device| device.stop_bytes.unwrap_or(0).saturating_add(device.on_the_way));
        let bytes = look.memory_dirty_bytes.saturating_add(stop);
        let initial = sum(&|device| device.initial);
        Round {
            round: self.looks,
            memory_dirty_bytes: look.memory_dirty_bytes,
            device_bytes: stop,
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
            device_gains |= tracked.gains(device, look.now, &self.wanted, pace);
        }
        if device_gains {
            return Next::Continue(LOOK_EVERY);
        }
        let memory_left = pace.transfer(look.memory_dirty_bytes);
        // Memory that no log sees does not move in rounds.
        let memory_gains =
            look.is_round && look.memory_dirty_bytes > 0 && self.rounds < self.wanted.rounds_max;
        if fits {
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
        Next::Stalled(overdue.unwrap_or_else(|| self.obstacle(look)))
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

    /// Whether initial data holds back the stop, and if it has for too long, of which device.
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
    fn obstacle(&self, look: &Look<'_>) -> Obstacle {
        let most = look.devices.iter().max_by_key(|device| device.stop_bytes.unwrap_or(0));
        let bytes = most.and_then(|device| device.stop_bytes).unwrap_or(0);
        if look.memory_dirty_bytes > 0 && look.memory_dirty_bytes >= bytes {
            return Obstacle::DirtyMemory { dirty_bytes: look.memory_dirty_bytes };
        }
        let Some(device) = most.filter(|_| bytes > 0) else { return Obstacle::Latency };
        let name = device.name.clone();
        match device.left {
            Some(left) if device.streams && left > bytes / 2 => {
                Obstacle::DirtyDevice { device: name, left_bytes: left }
            }
            _ => Obstacle::DeviceState { device: name, bytes },
        }
    }
}

enum Initial {
    Loaded,
    Pending,
    Overdue(Obstacle),
}

impl Tracked {
    /// Whether more pre-copy of the device makes the downtime much shorter.
    fn gains(&mut self, device: &DeviceLook, now: Instant, wanted: &Convergence, pace: &Pace) -> bool {
        if !device.streams {
            return false;
        }
        let Some(left) = device.left else {
            // It is only known whether the device has data.
            return !device.drained && device.sent <= UNKNOWN_BYTES.saturating_mul(wanted.rounds_max.into());
        };
        let floor = (wanted.downtime_goal / 64).max(Duration::from_millis(1));
        if left == 0 || pace.transfer(left) <= floor {
            (self.window, self.stalled) = (None, 0);
            return false;
        }
        let Some((since, sent)) = self.window else {
            if self.first_left == 0 {
                self.first_left = left;
            }
            (self.window, self.best) = (Some((now, device.sent)), (left, device.sent));
            return self.stalled < wanted.stalled_rounds_max;
        };
        if device.sent - sent >= WINDOW_BYTES || now.saturating_duration_since(since) >= WINDOW_TIME {
            let (best, sent_then) = self.best;
            // A twentieth of what was moved is gained at least; less is noise, or leads nowhere.
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
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn wanted() -> Convergence {
        Convergence {
            downtime_goal: Duration::from_millis(100),
            stalled_rounds_max: 3,
            rounds_max: 50,
            when_stalled: WhenStalled::Abort,
            initial_max: Duration::from_secs(30),
        }
    }

    /// A GiB in a second, and nothing else takes time.
    fn pace() -> Pace {
        Pace::new(Duration::ZERO, Duration::ZERO, Duration::ZERO)
    }

    struct Played {
        policy: StopPolicy,
        now: Instant,
        devices: Vec<DeviceLook>,
    }

    impl Played {
        fn new(wanted: Convergence, devices: Vec<DeviceLook>) -> Played {
            Played { policy: StopPolicy::new(wanted, devices.len()), now: Instant::now(), devices }
        }

        fn look(&mut self, is_round: bool, memory_dirty_bytes: u64) -> Next {
            self.now += Duration::from_millis(50);
            let (now, harvest) = (self.now, Duration::ZERO);
            let look = Look { now, is_round, memory_dirty_bytes, devices: &self.devices, harvest };
            self.policy.next(&look, &pace()).1
        }
    }

    fn rounds(played: &mut Played, dirty_mib: &[u64]) -> Vec<Next> {
        dirty_mib.iter().map(|dirty| played.look(true, dirty * MIB)).collect()
    }

    fn another() -> Next {
        Next::Continue(Duration::ZERO)
    }

    fn device(left: u64) -> DeviceLook {
        DeviceLook {
            name: "net0".into(),
            streams: true,
            initial_loaded: true,
            left: Some(left),
            stop_bytes: Some(left),
            ..DeviceLook::default()
        }
    }

    #[test]
    fn the_stop_comes_below_the_goal_when_no_round_of_memory_helps_much() {
        let run = |dirty: &[u64]| rounds(&mut Played::new(wanted(), Vec::new()), dirty);
        assert_eq!(run(&[1000, 300, 90, 40, 35]), [another(), another(), another(), another(), Next::Stop]);
        assert_eq!(run(&[1000, 300, 90, 40, 5]).last(), Some(&Next::Stop), "a sixteenth");
        assert_eq!(run(&[0]), [Next::Stop], "nothing is left");
        assert_eq!(run(&[1000, 103, 100]), [another(), another(), Next::Stop]);
    }

    #[test]
    fn rounds_that_do_not_get_better_stall_until_the_guest_is_slowed_down() {
        let mut played = Played::new(wanted(), Vec::new());
        let stalled = Next::Stalled(Obstacle::DirtyMemory { dirty_bytes: 510 * MIB });
        assert_eq!(rounds(&mut played, &[500, 490, 495, 510]), [another(), another(), another(), stalled]);
        played.policy.throttled();
        assert_eq!(rounds(&mut played, &[600, 300, 90]), [another(), another(), another()]);
        let mut played = Played::new(Convergence { rounds_max: 2, ..wanted() }, Vec::new());
        assert!(matches!(rounds(&mut played, &[9000, 3000])[1], Next::Stalled(_)), "the last round");
    }

    #[test]
    fn a_quiet_device_with_gigabytes_is_streamed_to_its_end_however_small_each_step_is() {
        let mut played = Played::new(wanted(), vec![device(40 * GIB)]);
        let mut looks = 0;
        loop {
            looks += 1;
            let left = played.devices[0].left.unwrap();
            match played.look(false, 0) {
                Next::Continue(_) => {}
                Next::Stop => {
                    assert!(pace().transfer(left) <= Duration::from_millis(2), "{left} bytes are left");
                    break;
                }
                next => panic!("{left} bytes are left: {next:?}"),
            }
            let step = left.min(13 * MIB);
            played.devices[0].sent += step;
            played.devices[0].left = Some(left - step);
            played.devices[0].stop_bytes = Some(left - step);
        }
        assert!(looks > 3000, "{looks}");
    }

    #[test]
    fn a_device_that_dirties_as_fast_as_it_gives_stalls_by_its_name_and_not_before_it_was_watched() {
        let mut played = Played::new(wanted(), vec![device(GIB)]);
        let stalled = (0..1000).find_map(|look| {
            played.devices[0].sent += 10 * MIB;
            match played.look(false, 0) {
                Next::Continue(_) => None,
                next => Some((look, next)),
            }
        });
        let (looks, next) = stalled.unwrap();
        assert!(looks >= 10, "{looks}");
        let left_bytes = GIB;
        assert_eq!(next, Next::Stalled(Obstacle::DirtyDevice { device: "net0".into(), left_bytes }));
    }

    #[test]
    fn a_device_that_claims_to_have_endlessly_much_does_not_go_on_for_ever() {
        let mut played = Played::new(wanted(), vec![device(u64::MAX)]);
        played.devices[0].drained = true;
        assert!((0..100).any(|_| matches!(played.look(false, 0), Next::Stalled(_))));
        // Each look makes less of it, but it never ends.
        let mut played = Played::new(wanted(), vec![device(GIB)]);
        let ended = (0..100_000).any(|look| {
            played.devices[0].sent += 64 * MIB;
            played.devices[0].left = Some(if look % 2 == 0 { GIB / 2 } else { GIB });
            matches!(played.look(false, 0), Next::Stalled(_))
        });
        assert!(ended);
        let unknown = DeviceLook { left: None, ..device(0) };
        let mut played = Played::new(wanted(), vec![unknown]);
        assert!(matches!(played.look(false, 0), Next::Continue(_)), "it has not said that it has nothing");
        played.devices[0].drained = true;
        assert_eq!(played.look(false, 0), Next::Stop);
    }

    #[test]
    fn initial_data_holds_the_stop_back_until_it_is_loaded_and_again_when_it_grows_again() {
        let mut played = Played::new(wanted(), vec![DeviceLook { initial: 1, ..device(1) }]);
        let held = |next| assert!(matches!(next, Next::Continue(wait) if wait > Duration::ZERO), "{next:?}");
        (0..200).for_each(|_| held(played.look(false, 0)));
        (played.devices[0].initial, played.devices[0].left) = (0, Some(0));
        played.devices[0].initial_loaded = false;
        held(played.look(true, 0));
        played.devices[0].initial_loaded = true;
        assert_eq!(played.look(false, 0), Next::Stop);
        played.devices[0].initial = 100;
        held(played.look(false, 0));
    }

    #[test]
    fn initial_data_that_never_ends_is_named_when_its_limit_has_passed() {
        let lying = DeviceLook { initial: 4096, drained: true, ..device(4096) };
        let mut played = Played::new(wanted(), vec![lying.clone()]);
        let looks = (0..2000).take_while(|_| matches!(played.look(false, 0), Next::Continue(_))).count();
        assert!((599..=602).contains(&looks), "{looks} of 50 ms");
        let limit = Duration::from_secs(30);
        let obstacle = Obstacle::InitialData { device: "net0".into(), left_bytes: 4096, limit };
        assert_eq!(played.look(false, 0), Next::Stalled(obstacle));
        let keep = Convergence { when_stalled: WhenStalled::KeepTrying, ..wanted() };
        let mut played = Played::new(keep, vec![lying]);
        assert!((0..2000).all(|_| matches!(played.look(false, 0), Next::Continue(_))));
    }

    #[test]
    fn what_is_not_known_is_not_promised() {
        let unknown = DeviceLook { streams: false, left: None, stop_bytes: None, ..device(0) };
        let mut played = Played::new(wanted(), vec![unknown]);
        let next = played.look(false, 0);
        assert_eq!(next, Next::Stalled(Obstacle::SizeUnknown { device: "net0".into() }));
    }

    #[test]
    fn rounds_made_while_a_device_streams_are_not_counted_for_memory() {
        let wanted = Convergence { rounds_max: 3, ..wanted() };
        let mut played = Played::new(wanted, vec![device(10 * GIB)]);
        for _ in 0..100 {
            played.devices[0].sent += 50 * MIB;
            let left = played.devices[0].left.unwrap() - 50 * MIB;
            played.devices[0].left = Some(left);
            assert!(matches!(played.look(true, 5 * MIB), Next::Continue(_)), "{left}");
        }
    }

    #[test]
    fn a_device_with_more_to_give_than_fits_is_named() {
        let large = DeviceLook { streams: false, left: None, stop_bytes: Some(GIB), ..device(0) };
        let mut played = Played::new(wanted(), vec![large]);
        let obstacle = Obstacle::DeviceState { device: "net0".into(), bytes: GIB };
        assert_eq!(played.look(false, 0), Next::Stalled(obstacle));
        let slow = Pace::new(Duration::from_secs(1), Duration::ZERO, Duration::ZERO);
        let look = Look {
            now: Instant::now(),
            is_round: false,
            memory_dirty_bytes: 0,
            devices: &[],
            harvest: Duration::ZERO,
        };
        let next = StopPolicy::new(wanted(), 0).next(&look, &slow).1;
        assert_eq!(next, Next::Stalled(Obstacle::Latency));
    }
}
