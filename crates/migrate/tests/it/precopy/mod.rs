//! Pre-copy of devices: what they say is left, when they say nonsense or nothing, and what that means for the stop.

mod initial;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::closures::{AtStop, Harvest};
use crate::common::hooked::{Call, Estimates, Hooked, MadeUp, ends_in_time, move_over_a_link};
use crate::common::{Door, Zeroes, options};
use limosa_client::Chunk;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{
    AfterSave, Convergence, Destination, Durability, Error, Ledger, Memory, MemoryRegion, MovedDevice,
    Obstacle, Options, Outcome, PAGE_BYTES, Publication, Received, Report, SnapshotTarget, SnapshotWriter,
    Source, WhenStalled,
};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::feature::{PrecopyFlags, PrecopyInfo};
use limosa_protocol::{FeatureIndex, MigrationFlags};

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];

const GIB: u64 = 1 << 30;

const EVERY: [WhenStalled; 3] = [WhenStalled::SwitchOver, WhenStalled::Abort, WhenStalled::KeepTrying];

/// A place that keeps nothing.
struct Nowhere;

impl SnapshotTarget for Nowhere {
    fn name(&self) -> String {
        "nowhere".into()
    }
    fn create(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        Ok(Box::new(Nowhere))
    }
}

impl SnapshotWriter for Nowhere {
    fn write(&mut self, bytes: &[u8], _: Wait<'_>) -> Result<usize, LinkError> {
        Ok(bytes.len())
    }
    fn publish(self: Box<Self>, _: Wait<'_>) -> Publication {
        Publication::Published { durability: Durability::Durable }
    }
}

fn convergence(goal: Duration, when_stalled: WhenStalled) -> Convergence {
    Convergence::default().with_downtime_goal(goal).with_when_stalled(when_stalled)
}

/// A device that has much to give, and gives it in a row: each byte that is read counts as `each` bytes.
struct Vast {
    left: AtomicU64,
    each: u64,
}

impl MadeUp for Vast {
    fn read(&self, stopped: bool, into: &mut [u8]) -> Chunk {
        let left = self.left.load(Ordering::SeqCst);
        if left == 0 {
            return if stopped { Chunk::End } else { Chunk::NothingForNow };
        }
        let bytes = left.div_ceil(self.each).min(into.len() as u64);
        self.left.store(left.saturating_sub(bytes * self.each), Ordering::SeqCst);
        Chunk::Data(bytes as usize)
    }
    fn info(&self) -> PrecopyInfo {
        PrecopyInfo { dirty_bytes: self.left.load(Ordering::SeqCst), ..Default::default() }
    }
}

#[test]
fn a_quiet_device_with_gigabytes_was_stopped_with_most_of_it_left() {
    std::thread::scope(|scope| {
        for (gib, each) in [(2, 128), (8, 256), (40, 512)] {
            scope.spawn(move || {
                for when_stalled in EVERY {
                    let what = format!("{gib} GiB, {when_stalled:?}");
                    let vast = Arc::new(Vast { left: AtomicU64::new(gib * GIB), each });
                    let device = Hooked::new("vast", FLAGS, &[]).making_up(vast.clone());
                    let at_stop = AtomicU64::new(u64::MAX);
                    let vmm = AtStop(|| at_stop.store(vast.left.load(Ordering::SeqCst), Ordering::SeqCst));
                    // What one arc took is counted five times, and a busy machine may take its time over it.
                    let goal = Duration::from_secs(1);
                    let options = options().with_convergence(convergence(goal, when_stalled));
                    let devices = [MovedDevice::new(&device)];
                    let saved =
                        Source::new(&devices, &options).with_vmm(&vmm).save(&Nowhere, AfterSave::Stop);
                    let Outcome::Moved(report) = saved else { panic!("{what}: {saved:?}") };
                    let left = at_stop.into_inner();
                    assert!(left < gib * GIB / 8, "{what}: {left} bytes were left at the stop");
                    assert_eq!(
                        report.devices[0].precopy_bytes + left.div_ceil(each),
                        report.devices[0].bytes
                    );
                }
            });
        }
    });
}

#[test]
fn nonsense_in_estimates_ends_in_time_and_is_named() {
    let all = Some(u64::MAX);
    let none = Estimates::default();
    let initial = |device: &Obstacle| matches!(device, Obstacle::InitialData { .. });
    let dirty = |device: &Obstacle| matches!(device, Obstacle::DirtyDevice { .. });
    let state = |device: &Obstacle| matches!(device, Obstacle::DeviceState { .. });
    let never = |_: &Obstacle| false;
    type Case = (&'static str, Estimates, fn(&Obstacle) -> bool);
    let cases: [Case; 9] = [
        ("size 0", Estimates { size: Some(0), ..none }, never),
        ("size of 100 GiB", Estimates { size: Some(100 * GIB), ..none }, state),
        ("size without end", Estimates { size: all, ..none }, state),
        ("dirty bytes without end", Estimates { dirty: all, ..none }, dirty),
        ("100 GiB of dirty bytes", Estimates { dirty: Some(100 * GIB), ..none }, dirty),
        ("initial bytes without end", Estimates { initial: all, ..none }, initial),
        ("100 GiB of initial bytes", Estimates { initial: Some(100 * GIB), ..none }, initial),
        ("all without end", Estimates { initial: all, dirty: all, size: all }, initial),
        ("nothing at all", Estimates { initial: Some(0), dirty: Some(0), size: Some(0) }, never),
    ];
    std::thread::scope(|scope| {
        for (what, estimates, names) in cases {
            for when_stalled in [WhenStalled::SwitchOver, WhenStalled::Abort] {
                scope.spawn(move || {
                    // Initial bytes that do end may take a while to be loaded.
                    let initial_max =
                        Duration::from_millis(if estimates.initial.is_some() { 50 } else { 20_000 });
                    let wanted = convergence(Duration::from_secs(2), when_stalled)
                        .with_initial_max(initial_max)
                        .with_stalled_rounds_max(1);
                    let options = options().with_convergence(wanted);
                    let (ended, _) = ends_in_time(what, move || moved(estimates, &[], None, &options));
                    let what = format!("{what}, {when_stalled:?}");
                    match (ended, when_stalled) {
                        (Ok(_), WhenStalled::Abort) => {
                            let is_small = estimates.size == Some(0);
                            assert!(is_small, "{what}: it went on");
                        }
                        (Ok(_), _) => {}
                        (Err(Error::NotConverging { obstacle, predicted, .. }), WhenStalled::Abort) => {
                            assert!(names(&obstacle), "{what}: {obstacle}");
                            let is_initial = matches!(obstacle, Obstacle::InitialData { .. });
                            assert!(
                                is_initial || predicted > Duration::from_secs(2),
                                "{what}: {predicted:?}"
                            );
                        }
                        // What it says would take longer than the guest may stand still.
                        (Err(Error::NotConverging { obstacle, predicted, .. }), _) => {
                            let Obstacle::Standstill { left: Some(left), .. } = &obstacle else {
                                panic!("{what}: {obstacle}")
                            };
                            assert!(obstacle.to_string().contains(&format!("{} bytes of", left.bytes)));
                            assert!(predicted > options_limit(), "{what}: {predicted:?}");
                        }
                        (Err(why), _) => panic!("{what}: {why}"),
                    }
                });
            }
        }
    });
}

fn options_limit() -> Duration {
    Options::default().standstill_max
}

#[test]
fn a_device_that_knows_no_size_was_promised_a_downtime() {
    let lacks = [FeatureIndex::MIG_DATA_SIZE];
    let with = |when| options().with_convergence(convergence(Duration::from_secs(3600), when));
    for when in [WhenStalled::SwitchOver, WhenStalled::KeepTrying] {
        let (report, _) = moved(Estimates::default(), &lacks, None, &with(when));
        let report = report.unwrap();
        assert_eq!(report.predicted_downtime_ns, None, "{when:?}");
        let told = |note: &String| note.contains("source does not say how much it gives in the stop");
        assert!(report.notes.iter().any(told), "{when:?}: {:?}", report.notes);
    }
    let (refused, _) = moved(Estimates::default(), &lacks, None, &with(WhenStalled::Abort));
    let Err(Error::NotConverging { obstacle, is_minimum, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!(obstacle, Obstacle::SizeUnknown { device: "source".into() });
    assert!(is_minimum, "it is of what is known only");
    // Its owner knows.
    for when in EVERY {
        let (report, _) = moved(Estimates::default(), &lacks, Some(20_000), &with(when));
        let report = report.unwrap();
        assert!(report.predicted_downtime_ns.is_some(), "{when:?}");
        assert!(report.notes.is_empty(), "{when:?}: {:?}", report.notes);
    }
}

#[test]
fn a_device_with_nothing_for_now_was_asked_without_a_pause() {
    let limit = Duration::from_millis(300);
    let wanted = options().convergence.with_initial_max(limit);
    let estimates = Estimates { initial: Some(4096), ..Estimates::default() };
    let began = Instant::now();
    let (report, reads) = moved(estimates, &[], None, &options().with_convergence(wanted));
    report.unwrap();
    assert!(began.elapsed() >= limit, "the initial bytes held the stop back");
    // About nine in pre-copy, and a dozen of data.
    assert!(reads < 40, "{reads} reads in {:?}", began.elapsed());
}

/// A device that gives something in each round of memory, and so needs more of them than memory may have.
struct Steady {
    rounds: Arc<AtomicU32>,
    given: AtomicU32,
    stopping: AtomicBool,
}

const STEPS: u32 = 12;

impl MadeUp for Steady {
    fn read(&self, stopped: bool, into: &mut [u8]) -> Chunk {
        let given = self.given.load(Ordering::SeqCst);
        if given == STEPS {
            return if stopped { Chunk::End } else { Chunk::NothingForNow };
        }
        // It is busy until the next round is over.
        let until = Instant::now() + Duration::from_secs(20);
        while self.rounds.load(Ordering::SeqCst) <= given && !stopped && Instant::now() < until {
            std::thread::yield_now();
        }
        self.given.store(given + 1, Ordering::SeqCst);
        self.stopping.fetch_or(stopped, Ordering::SeqCst);
        Chunk::Data(into.len().min(64 << 10))
    }
    fn info(&self) -> PrecopyInfo {
        let left = u64::from(STEPS - self.given.load(Ordering::SeqCst)) * GIB;
        PrecopyInfo { dirty_bytes: left, ..Default::default() }
    }
}

#[test]
fn rounds_in_which_a_device_streamed_were_counted_as_memory_s() {
    let rounds = Arc::<AtomicU32>::default();
    let steady = Arc::new(Steady {
        rounds: rounds.clone(),
        given: AtomicU32::new(0),
        stopping: AtomicBool::new(false),
    });
    let source = Hooked::new("steady", FLAGS, &[]).making_up(steady.clone());
    let destination = Hooked::new("destination", FLAGS, &[]);
    let size = 8 * GIB;
    // It costs nothing: the rate is the one that is assumed, a GiB in a second.
    let zeroes = Zeroes::default();
    let region = MemoryRegion { id: 0, iova: 0, size, pages: &zeroes };
    // All is written in each round while the device streams. Then it is half as much in each.
    let mut pages = size / PAGE_BYTES;
    let mut log = Harvest(|dirty: &DirtyBitmap| {
        rounds.fetch_add(1, Ordering::SeqCst);
        dirty.set_range(0, pages);
        if steady.given.load(Ordering::SeqCst) == STEPS {
            pages /= 2;
        }
        Ok(())
    });
    // From 8 GiB to one in four rounds, as many as came before.
    let wanted = convergence(Duration::from_millis(1500), WhenStalled::Abort)
        .with_rounds_max(STEPS / 2 + 2)
        .with_stalled_rounds_max(3);
    let options = options().with_convergence(wanted);
    let (here, there, ledger) =
        ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
    let regions = [region];
    let (outcome, _) = move_over_a_link(
        Source::new(&here, &options).with_memory(Memory::logged(vec![region], &mut log)),
        Destination::new(&there, &ledger, &options).with_memory(&regions),
    );
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(report.rounds.len() > STEPS as usize, "{} rounds", report.rounds.len());
    assert!(!steady.stopping.load(Ordering::SeqCst), "it was drained before the stop");
}

/// One move of a device that says this of itself, and one that lacks these features.
fn moved(
    estimates: Estimates,
    lacks: &[FeatureIndex],
    stop_bytes: Option<u64>,
    options: &Options,
) -> (Result<Report, Error>, u64) {
    let reads = Arc::new(AtomicU64::new(0));
    let source = {
        let reads = reads.clone();
        let source = Hooked::with_estimates("source", FLAGS, &[7; 20_000], estimates);
        let source = lacks.iter().fold(source, |source, index| source.without(*index));
        source.on(move |_, call| {
            reads.fetch_add(u64::from(call == Call::Read), Ordering::SeqCst);
        })
    };
    let destination = Hooked::new("destination", FLAGS, &[]);
    let here = [MovedDevice::new(&source).with_stop_bytes(stop_bytes)];
    let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
    let (outcome, received) =
        move_over_a_link(Source::new(&here, options), Destination::new(&there, &ledger, options));
    let result = match outcome {
        Outcome::Moved(report) => {
            assert!(matches!(received, Received::Runs(_)), "{received:?}");
            assert_eq!(destination.data(), [7; 20_000]);
            Ok(report)
        }
        Outcome::Undone { why, .. } => {
            assert!(source.state().is_running());
            assert!(destination.data() != [7; 20_000]);
            Err(why)
        }
        Outcome::InDoubt(doubt) => panic!("{doubt:?}"),
    };
    (result, reads.load(Ordering::SeqCst))
}
