//! [`Plan`]: the run of a seed: the machines, the link between them, and the faults with their moments.

mod chance;
mod fault;

use std::num::NonZeroU32;
use std::time::Duration;

use limosa_device::Fault as Arc;
use limosa_migrate::{AfterSave, Convergence, MemoryChecksums, Options, Phase, WhenStalled};
use limosa_protocol::{Errno, MigrationFlags};
use limosa_stream::{Compression, WINDOW_BYTES_MIN};

use crate::adversary::{self, Forgery, Proof};
use crate::panics::Place;
use crate::scripted::Step;
pub use chance::Chance;
use fault::PHASES;
pub use fault::{Fault, Mutation, Planned, When};

pub const SILENCE_MAX: Duration = Duration::from_secs(5);

pub const LOAD_MAX: Duration = Duration::from_secs(60);

pub const COMMIT_MAX: Duration = Duration::from_secs(10);

pub const STANDSTILL_MAX: Duration = Duration::from_secs(60);

/// Bytes of a block of a device in the stream, at least.
pub const RECORD_BYTES_MIN: usize = 24;

/// Pages of a region that is small enough to be sent in full.
const SMALL_PAGES_MAX: u64 = 100;

/// One of the two machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

impl End {
    pub const BOTH: [End; 2] = [End::Source, End::Destination];
}

/// A device, alike on both ends.
#[derive(Clone, Copy, Debug)]
pub struct DevicePlan {
    pub flags: MigrationFlags,
    pub blocks: u32,
    /// Bytes of a block in the stream.
    pub record_bytes: usize,
    /// It logs its DMA.
    pub logs: bool,
    /// Its guest never rings it.
    pub quiet: bool,
    /// The number of its blocks, from the first, that are initial data.
    pub initial: u32,
    /// The second half of its initial data comes so long after its session opened.
    pub late: Duration,
    /// Once in a session, when it has given everything, its initial data is there anew.
    pub rearms: bool,
    /// It counts its resets.
    pub counts_resets: bool,
    /// What its slowest calls take.
    pub slow: Duration,
}

/// A link.
#[derive(Clone, Copy, Debug)]
pub struct LinkPlan {
    pub latency: Duration,
    pub bytes_per_second: u64,
    /// What each direction takes before its writer waits.
    pub buffer_bytes: usize,
    /// Each end knows who is at the other one.
    pub is_authenticated: bool,
    /// It ends where a bit flips.
    pub finds_damage: bool,
}

impl LinkPlan {
    /// The shortest time for a number of bytes.
    pub fn time(&self, bytes: u64) -> Duration {
        let turns = bytes as f64 / self.buffer_bytes as f64;
        self.latency * 4
            + self.latency.mul_f64(turns)
            + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64)
    }
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub devices: Vec<DevicePlan>,
    /// Pages of each region.
    pub regions: Vec<u64>,
    pub links: Vec<LinkPlan>,
    /// How many of them the destination takes.
    pub links_taken: u32,
    pub log_covers_devices: bool,
    /// Whether the memory of each end can be reached by its address.
    pub pins: [bool; 2],
    pub checksums: [MemoryChecksums; 2],
    /// Whether the guest has filled all pages of its small regions before the move.
    pub is_full: bool,
    pub convergence: Convergence,
    pub precopy: bool,
    /// The guest is saved and not moved; what becomes of the source then.
    pub saves: Option<AfterSave>,
    /// The machine stands still before the move: its devices are in STOP, and its vCPU does not run.
    pub stands: bool,
    /// How long the vCPU rests between two of its steps, at most.
    pub rest: Duration,
    pub faults: Vec<Planned>,
    /// How long the guest may stand still.
    pub standstill_max: Duration,
    pub mutation: Option<Mutation>,
}

impl Plan {
    pub fn new(seed: u64) -> Plan {
        let mut chance = Chance::new(seed);
        let optional = [
            MigrationFlags::empty(),
            MigrationFlags::P2P,
            MigrationFlags::PRE_COPY,
            MigrationFlags::P2P | MigrationFlags::PRE_COPY,
            MigrationFlags::P2P | MigrationFlags::PRE_COPY,
        ];
        let slow_us = [0, 0, 50, 3_000, 200_000];
        // Some have more than may be on its way at once.
        let is_large = chance.one_in(8);
        let record_bytes = match is_large {
            // Several MiB, many turns of their windows.
            true => chance.pick(&[4096, 4096, 32 << 10]),
            false => RECORD_BYTES_MIN,
        };
        let devices = (0..1 + chance.below(3))
            .map(|_| DevicePlan {
                flags: MigrationFlags::STOP_COPY | chance.pick(&optional),
                blocks: 1 + chance.log_below(120) as u32,
                record_bytes,
                quiet: chance.one_in(4),
                initial: if chance.one_in(3) { 1 + chance.log_below(60) as u32 } else { 0 },
                late: Duration::from_micros(chance.pick(&[0, 1_000, 400_000])),
                rearms: chance.one_in(2),
                logs: !chance.one_in(5),
                counts_resets: chance.one_in(2),
                slow: Duration::from_micros(chance.pick(&slow_us)),
            })
            .collect::<Vec<_>>();
        let mut regions: Vec<u64> = (0..chance.below(3)).map(|_| 1 + chance.log_below(40)).collect();
        let of_device = |device: &DevicePlan| u64::from(device.blocks) * (device.record_bytes as u64 + 8);
        let bytes = devices.iter().map(of_device).sum::<u64>() + regions.iter().sum::<u64>() * 4096;
        let count = chance.pick(&[1, 1, 2, 3, 4]);
        if count > 1 && chance.one_in(4) {
            // So much that several links are worth it; most of it is zero.
            regions.push(3_000);
        }
        let mut link = || LinkPlan {
            latency: Duration::from_micros(chance.log_below(20_000)),
            bytes_per_second: 1 << (16 + chance.below(16)),
            // Many turns of a small buffer, but not endless ones.
            buffer_bytes: (bytes / 100).max(1 << (9 + chance.below(9))) as usize,
            is_authenticated: false,
            finds_damage: false,
        };
        let links: Vec<LinkPlan> = (0..count).map(|_| link()).collect();
        // About as long as all of it takes once.
        let about = links.iter().map(|link| link.time(bytes)).max().unwrap_or_default();
        let convergence = Convergence::default()
            .with_downtime_goal(Duration::from_micros(chance.pick(&[100, 10_000, 300_000, 10_000_000])))
            .with_stalled_rounds_max(1 + chance.below(5) as u32)
            .with_rounds_max(1 + chance.below(12) as u32)
            .with_when_stalled(chance.pick(&[
                WhenStalled::SwitchOver,
                WhenStalled::SwitchOver,
                WhenStalled::Abort,
            ]))
            .with_initial_max(Duration::from_millis(chance.pick(&[30_000, 30_000, 30_000, 100])));
        let mut plan = Plan {
            seed,
            devices,
            regions,
            links_taken: 1 + chance.below(links.len() as u64) as u32,
            links,
            log_covers_devices: chance.one_in(2),
            pins: [false; 2],
            checksums: [MemoryChecksums::default(); 2],
            is_full: false,
            convergence,
            precopy: !chance.one_in(6),
            saves: chance.one_in(5).then(|| chance.pick(&[AfterSave::Run, AfterSave::Stop])),
            stands: false,
            rest: (about / chance.pick(&[3, 20, 100, 300])).max(Duration::from_micros(5)),
            faults: Vec::new(),
            standstill_max: if chance.one_in(8) { Duration::from_secs(2) } else { STANDSTILL_MAX },
            mutation: None,
        };
        let count = chance.pick(&[0, 1, 1, 1, 1, 1, 2, 2, 2, 3]);
        plan.faults = (0..count).map(|_| plan.draw(&mut chance)).collect();
        plan.stands = chance.one_in(8);
        if plan.stands {
            // A device that is reset runs, and is found so by a move that comes later.
            plan.faults.retain(|planned| !matches!(planned.fault, Fault::Reset(End::Source, _)));
        }
        if plan.saves.is_none() {
            // By draws of its own, so that the rest of the plan does not depend on it.
            plan.faults.extend(adversary::draw(&mut Chance::new(!seed)));
        }
        plan.draw_pages(&mut Chance::new(seed ^ 0x7061_6765));
        plan
    }

    /// How pages are sent and received, by draws of its own.
    fn draw_pages(&mut self, chance: &mut Chance) {
        use MemoryChecksums::{Always, Never, UnlessAuthenticated};
        self.is_full = chance.one_in(3);
        self.pins = [!chance.one_in(3), !chance.one_in(3)];
        self.checksums =
            [(); 2].map(|()| chance.pick(&[Always, UnlessAuthenticated, UnlessAuthenticated, Never]));
        let waives = |plan: &Plan, authenticated| {
            let waives = |checksums| checksums == Never || checksums == UnlessAuthenticated && authenticated;
            plan.checksums.into_iter().all(waives)
        };
        for at in 0..self.links.len() {
            let is_authenticated = chance.one_in(2);
            // Nothing else would find the damage where both sides do without checksums.
            let finds_damage = is_authenticated || waives(self, is_authenticated);
            (self.links[at].is_authenticated, self.links[at].finds_damage) = (is_authenticated, finds_damage);
        }
    }

    fn draw(&self, chance: &mut Chance) -> Planned {
        let end = chance.pick(&End::BOTH);
        let when = match chance.below(4) {
            0 => When::Point(end, chance.log_below(3_000)),
            1 => When::Phase(end, chance.pick(&PHASES), chance.log_below(300)),
            // What matters most lasts the shortest.
            2 => When::Phase(end, chance.pick(&PHASES[4..]), chance.log_below(100)),
            _ => When::Phase(End::Source, Phase::Commit, chance.log_below(60)),
        };
        let end = chance.pick(&End::BOTH);
        let link = chance.below(self.links.len() as u64) as usize;
        let device = chance.below(self.devices.len() as u64) as usize;
        let fault = match chance.below(29) {
            // There is no link.
            0..=2 if self.saves.is_some() => Fault::DiskFull,
            3 if self.saves.is_some() => chance.pick(&[Fault::DiskFails, Fault::DiskPanics]),
            4 if self.saves.is_some() => Fault::PublicationFails,
            5..=8 if self.saves.is_some() => Fault::DiskFlips(chance.below(8) as u8),
            0..=2 => Fault::Cut(link),
            3..=4 => Fault::Silence(end, link),
            5 => Fault::Stall(end, link, Duration::from_millis(1 + chance.log_below(10_000))),
            6..=8 => Fault::Flip(end, link, chance.below(8) as u8),
            9..=11 => Fault::Crash { end, silent: chance.one_in(3) },
            12..=13 => Fault::Cancel(end),
            14 => Fault::LedgerFull,
            15 => Fault::NoteFull,
            16 => {
                chance.pick(&[Fault::PrepareRefused, Fault::StopRefused, Fault::LogLost, Fault::NoMoreLinks])
            }
            17 => Fault::MemoryFails(end),
            18 => Fault::DeviceGone(end, device),
            19..=21 => Fault::Reset(end, device),
            22 => Fault::Panic(end, Place::Device(device)),
            23 => Fault::Panic(end, Place::Stream(device)),
            24 => Fault::Panic(end, chance.pick(&Place::OTHERS)),
            25 => Fault::RefuseThreads(end, chance.log_below(12)),
            _ => {
                let how = chance.pick(&[Arc::Refused(Errno::EBUSY), Arc::Broken(Errno::EIO)]);
                let steps = [&Step::ALL[..], &[Step::Reset]].concat();
                Fault::Device(end, device, chance.pick(&steps), how)
            }
        };
        Planned { when, fault }
    }

    /// The value of each byte of a region before the guest writes to it.
    pub fn fill(&self, pages: u64) -> u8 {
        if self.is_full && pages <= SMALL_PAGES_MAX { 0x11 } else { 0 }
    }

    /// Whether something can go wrong with a device, so that it may have to be reset and lose its state.
    pub fn hurts_devices(&self) -> bool {
        self.faults.iter().any(|planned| {
            matches!(
                planned.fault,
                Fault::Device(..)
                    | Fault::DeviceGone(..)
                    | Fault::Reset(..)
                    | Fault::Panic(_, Place::Device(_) | Place::Stream(_))
            )
        })
    }

    /// Whether an adversary is on the links.
    pub fn has_adversary(&self) -> bool {
        let forges = |planned: &Planned| matches!(planned.fault, Fault::Forge { .. } | Fault::ForgedLink(_));
        self.faults.iter().any(forges)
    }

    /// Whether this place may panic at this end.
    pub fn panics(&self, end: End, place: Place) -> bool {
        let is_it = |fault| matches!(fault, Fault::Panic(at, of) if at == end && of == place);
        self.faults.iter().any(|planned| is_it(planned.fault))
    }

    /// What the slowest call of a device takes.
    pub fn slowest(&self) -> Duration {
        self.devices.iter().map(|device| device.slow).max().unwrap_or_default()
    }

    /// What an undo's calls of devices take at most: of all devices at once, those of one that is being compared, and
    /// those of one after the other.
    pub fn undo_calls(&self) -> Duration {
        let (devices, regions) = (self.devices.len() as u32, self.regions.len() as u32);
        (8 + 6 + devices * (2 * regions + 3)) * self.slowest()
    }
}

impl Plan {
    pub fn compression(&self) -> Option<Compression> {
        [None, None, Some(Compression::Zstd), Some(Compression::Lz4)][(self.seed / 2 % 4) as usize]
    }

    /// How much of all devices may be on its way.
    pub fn windows_bytes(&self) -> u64 {
        self.devices.len() as u64 * self.window_bytes()
    }

    /// How much of one device may be.
    pub fn window_bytes(&self) -> u64 {
        WINDOW_BYTES_MIN << (self.seed / 8 % 2)
    }

    /// How much of all devices may be on its way once windows have grown.
    pub fn windows_bytes_max(&self) -> u64 {
        self.windows_bytes() * (1 + self.seed / 16 % 2)
    }

    pub fn options(&self, end: End) -> Options {
        let links = if end == End::Source { self.links.len() as u32 } else { self.links_taken };
        Options::default()
            .with_links(NonZeroU32::new(links).unwrap_or(NonZeroU32::MIN))
            .with_precopy(self.precopy)
            .with_windows_bytes(match (self.mutation, end) {
                (Some(Mutation::GivesTooMuch), End::Destination) => 4 * self.windows_bytes(),
                _ => self.windows_bytes(),
            })
            .with_windows_bytes_max(self.windows_bytes_max())
            .with_convergence(self.convergence)
            .with_silence_max(SILENCE_MAX)
            .with_load_max(LOAD_MAX)
            .with_commit_max(COMMIT_MAX)
            .with_standstill_max(self.standstill_max)
            .with_links_measured(self.seed.is_multiple_of(2))
            .with_compress(self.compression())
            .with_memory_checksums(self.checksums[end as usize])
    }

    /// The options, with the defect that the plan has.
    pub fn broken_options(&self, end: End) -> Options {
        let options = self.options(end);
        let convergence = options.convergence;
        match self.mutation {
            Some(Mutation::DrainsNothing) => {
                options.with_convergence(convergence.with_rounds_max(0).with_stalled_rounds_max(0))
            }
            Some(Mutation::InitialIgnored) => {
                options.with_convergence(convergence.with_initial_max(Duration::ZERO))
            }
            Some(Mutation::SilenceIgnored) => options.with_silence_max(10 * SILENCE_MAX),
            Some(Mutation::StandsForever) => options.with_standstill_max(Duration::from_secs(3_000)),
            _ => options,
        }
    }
}
