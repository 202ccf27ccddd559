//! Traps for a caller: options without a limit or of nothing, another machine's doubt, records that cannot be written,
//! and words that do not reach the other side.

use std::io::IoSlice;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::hooked::{Call, Hooked, before, ends_in_time, move_over_a_link};
use crate::common::peer::Peer;
use crate::common::{Ends, Step, VecPages, move_over_links, options, world};
use limosa_client::Error as DeviceError;
use limosa_device::Fault;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    AbortCode, Cancel, CommitNote, Convergence, Decision, Destination, Difference, DirtyLog, Error, InDoubt,
    Ledger, Loss, Memory, MemoryRegion, MovedDevice, Observer, Options, Outcome, PAGE_BYTES, Received, Round,
    Source, Vmm, WhenStalled,
};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::{Errno, MigrationFlags, State};
use limosa_stream::{Answer, Kind};
use limosa_testing::{forward_link, is_alone};

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];

fn region(pages: &VecPages) -> MemoryRegion<'_> {
    let size = pages.0.lock().unwrap().len() as u64;
    MemoryRegion { id: 0, iova: 0, size, pages }
}

/// A log in which all is dirty, or nothing.
#[derive(Default)]
struct Log {
    all: bool,
    fails_to_start: bool,
    stops: usize,
}

impl DirtyLog for Log {
    fn start(&mut self) -> std::io::Result<()> {
        if self.fails_to_start { Err(std::io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
    fn harvest(&mut self, _: usize, dirty: &DirtyBitmap) -> std::io::Result<()> {
        dirty.set_range(0, if self.all { dirty.pages() } else { 0 });
        Ok(())
    }
    fn give_back(&mut self, _: usize, _: &DirtyBitmap) {
        assert!(!self.fails_to_start, "nothing was harvested");
    }
    fn stop(&mut self) {
        self.stops += 1;
    }
    fn covers_devices(&self) -> bool {
        true
    }
}

type Change = fn(Options, Duration) -> Options;
type ChangeConvergence = fn(Convergence, Duration) -> Convergence;

/// Every option that is a time, alone.
fn times() -> Vec<(&'static str, Change)> {
    fn wanted(options: Options, change: ChangeConvergence, time: Duration) -> Options {
        let convergence = change(options.convergence, time);
        options.with_convergence(convergence)
    }
    vec![
        ("silence_max", Options::with_silence_max),
        ("load_max", Options::with_load_max),
        ("commit_max", Options::with_commit_max),
        ("standstill_max", Options::with_standstill_max),
        ("downtime_goal", |options, time| wanted(options, Convergence::with_downtime_goal, time)),
        ("initial_max", |options, time| wanted(options, Convergence::with_initial_max, time)),
        ("all", |options, time| {
            let (_, all) = times().split_last().map(|(_, rest)| ((), rest.to_vec())).unwrap();
            all.into_iter().fold(options, |options, (_, change)| change(options, time))
        }),
    ]
}

fn moves_with(options: Options) -> bool {
    let (source, destination) = (Hooked::new("source", FLAGS, &[7; 999]), Hooked::new("there", FLAGS, &[]));
    let (here, there, ledger) =
        ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
    let (near, far) = (VecPages::new(1 << 16), VecPages::new(1 << 16));
    near.0.lock().unwrap()[9] = 9;
    let (mut log, regions) = (Log::default(), [region(&far)]);
    let (outcome, received) = move_over_a_link(
        Source::new(&here, &options).with_memory(Memory::logged(vec![region(&near)], &mut log)),
        Destination::new(&there, &ledger, &options).with_memory(&regions),
    );
    match outcome {
        Outcome::Moved(_) => {
            assert!(matches!(received, Received::Runs(_)), "{received:?}");
            assert_eq!(destination.data(), [7; 999]);
            true
        }
        Outcome::Undone { .. } => {
            assert_eq!(source.state(), State::Running);
            assert!(destination.data() != [7; 999], "{received:?}");
            false
        }
        // With no time at all for an answer.
        Outcome::InDoubt(_) => {
            assert!(!source.state().is_running());
            false
        }
    }
}

#[test]
fn a_time_without_end_made_the_engine_panic() {
    for (name, change) in times() {
        let moved = ends_in_time(name, move || moves_with(change(options(), Duration::MAX)));
        assert!(moved, "{name}");
    }
}

#[test]
fn a_time_of_nothing_ends_the_move_or_does_not_matter() {
    for (name, change) in times() {
        ends_in_time(name, move || moves_with(change(options(), Duration::ZERO)));
    }
    let goal = options().convergence.with_downtime_goal(Duration::ZERO);
    assert!(moves_with(options().with_convergence(goal)), "a goal is no limit");
    assert!(!moves_with(options().with_standstill_max(Duration::ZERO)));
}

/// Cuts the link when the source is about to commit.
struct Cutting<'a>(&'a SocketLink);

impl Vmm for Cutting<'_> {
    fn committing(&self, _: &CommitNote) -> Result<(), String> {
        self.0.cut();
        Ok(())
    }
}

fn doubt(source: &Hooked, near_pages: &VecPages, options: &Options) -> InDoubt {
    let destination = Hooked::new("there", FLAGS, &[]);
    let far_pages = VecPages::new(1 << 16);
    let (here, there, ledger) = ([MovedDevice::new(source)], [MovedDevice::new(&destination)], Ledger::new());
    let (near, far) = SocketLink::pair().unwrap();
    let (mut log, regions) = (Log::default(), [region(&far_pages)]);
    std::thread::scope(|scope| {
        let destination = Destination::new(&there, &ledger, options).with_memory(&regions);
        scope.spawn(move || drop(destination.receive(&far)));
        let source = Source::new(&here, options)
            .with_memory(Memory::logged(vec![region(near_pages)], &mut log))
            .with_vmm(&Cutting(&near))
            .send(&near);
        let Outcome::InDoubt(doubt) = source else { panic!("{source:?}") };
        doubt
    })
}

#[test]
fn a_doubt_was_decided_with_another_machine() {
    let (source, pages, options) = (Hooked::new("source", FLAGS, &[7; 9]), VecPages::new(1 << 16), options());
    for decision in [Decision::NotCommitted, Decision::Committed] {
        source.inner.machine().reset().unwrap();
        let in_doubt = doubt(&source, &pages, &options);
        // One more region, as after a hot plug; another size; another device; one more; none at all.
        let (more, larger) = (VecPages::new(1 << 12), VecPages::new(1 << 17));
        let second = MemoryRegion { id: 1, iova: 1 << 30, ..region(&more) };
        let (other, third) = (Hooked::new("other", FLAGS, &[]), Hooked::new("third", FLAGS, &[]));
        let (same, others) = ([MovedDevice::new(&source)], [MovedDevice::new(&other)]);
        let both = [MovedDevice::new(&source), MovedDevice::new(&third)];
        let machines: [(&[MovedDevice<'_>], Vec<MemoryRegion<'_>>, bool); 5] = [
            (&same, vec![region(&pages), second], true),
            (&same, vec![region(&larger)], true),
            (&others, vec![region(&pages)], false),
            (&both, vec![region(&pages)], false),
            (&[], vec![region(&pages)], false),
        ];
        let left = machines.into_iter().fold(in_doubt, |in_doubt, (devices, regions, is_memory)| {
            let mut log = Log::default();
            let source = Source::new(devices, &options).with_memory(Memory::logged(regions, &mut log));
            let Outcome::InDoubt(left) = source.decide(decision, in_doubt) else { panic!("it was decided") };
            match &left.why {
                Error::AnotherMachine(Difference::Memory { .. }) => assert!(is_memory),
                Error::AnotherMachine(Difference::Devices { .. }) => assert!(!is_memory),
                why => panic!("{why}"),
            }
            assert_eq!((log.stops, other.state()), (0, State::Running), "nothing of it was touched");
            left
        });
        assert!(!source.state().is_running(), "it is in doubt still");
        let mut log = Log::default();
        let right = Source::new(&same, &options).with_memory(Memory::logged(vec![region(&pages)], &mut log));
        let outcome = right.decide(decision, left);
        match decision {
            Decision::Committed => assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}"),
            _ => assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}"),
        }
        assert_eq!(source.state().is_running(), decision == Decision::NotCommitted);
    }
}

#[test]
fn a_log_that_failed_to_start_was_left_half_started() {
    let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
    let (here, there, ledger) =
        ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
    let (near, far) = (VecPages::new(1 << 16), VecPages::new(1 << 16));
    let (mut log, regions) = (Log { fails_to_start: true, ..Log::default() }, [region(&far)]);
    let options = options();
    let (outcome, _) = move_over_a_link(
        Source::new(&here, &options).with_memory(Memory::logged(vec![region(&near)], &mut log)),
        Destination::new(&there, &ledger, &options).with_memory(&regions),
    );
    let Outcome::Undone { why: Error::Memory { .. }, report } = outcome else { panic!("{outcome:?}") };
    assert_eq!(log.stops, 1);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert_eq!(source.state(), State::Running);
}

#[test]
fn what_became_of_a_device_was_not_told_apart() {
    let flags = MigrationFlags::STOP_COPY;
    let lost = |report: &limosa_migrate::Report| -> Vec<_> {
        report.unrecovered.iter().map(|unrecovered| (unrecovered.device.clone(), unrecovered.loss)).collect()
    };
    // At the source it breaks, and is reset.
    let (source, destination) = world("dev", flags, 300);
    source.fail(Step::Stop, 0, Fault::Broken(Errno::EIO));
    let (outcome, _) = Ends::new(vec![source], vec![destination]).run_plain();
    let Outcome::Undone { report, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(lost(&report), [("dev-source".into(), Loss::StateLost)]);
    // It does not start again.
    let (source, destination) = world("dev", flags, 300);
    source.fail(Step::Start, 0, Fault::Refused(Errno::EBUSY));
    destination.fail(Step::LoadFinish, 0, Fault::Refused(Errno::EIO));
    let (outcome, _) = Ends::new(vec![source], vec![destination]).run_plain();
    let Outcome::Undone { report, .. } = outcome else { panic!("{outcome:?}") };
    let stays = Loss::StaysIn { found: State::Stop, wanted: State::Running };
    assert_eq!(lost(&report), [("dev-source".into(), stays)]);
    assert!(report.unrecovered[0].why.contains("EBUSY"), "{:?}", report.unrecovered);
    // At the destination it cannot be reset.
    let (source, destination) = world("dev", flags, 300);
    drop(destination);
    let (outcome, received) = {
        let hooked = Hooked::new("there", flags, &[]).hook(Arc::new(|device, call| match call {
            Call::Reset | Call::Write => Err(refused(device)),
            _ => Ok(()),
        }));
        let (here, there, ledger) =
            ([MovedDevice::new(&source.client)], [MovedDevice::new(&hooked)], Ledger::new());
        let options = options();
        move_over_a_link(Source::new(&here, &options), Destination::new(&there, &ledger, &options))
    };
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    let Received::Discarded { report, .. } = received else { panic!("{received:?}") };
    assert_eq!(lost(&report), [("there".into(), Loss::NotReset)]);
    // It was found in STOP, and runs on after its reset.
    let hooked = Hooked::new("there", flags, &[]).hook({
        let resets = AtomicUsize::new(0);
        Arc::new(move |device, call| {
            resets.fetch_add(usize::from(call == Call::Reset), Ordering::SeqCst);
            match call {
                Call::Write => Err(refused(device)),
                Call::Set(State::Stop) if resets.load(Ordering::SeqCst) > 0 => Err(refused(device)),
                _ => Ok(()),
            }
        })
    });
    limosa_client::DeviceExt::set_state(&hooked.inner, State::Stop).unwrap();
    let (here, there, ledger) =
        ([MovedDevice::new(&source.client)], [MovedDevice::new(&hooked)], Ledger::new());
    let options = options();
    let (_, received) =
        move_over_a_link(Source::new(&here, &options), Destination::new(&there, &ledger, &options));
    let Received::Discarded { report, .. } = received else { panic!("{received:?}") };
    let stays = Loss::StaysIn { found: State::Running, wanted: State::Stop };
    assert_eq!(lost(&report), [("there".into(), stays)]);
    assert_eq!(hooked.state(), State::Running);
    // At the source it can no longer be reached.
    let gone = AtomicBool::new(false);
    let hooked = Hooked::new("gone", FLAGS, &[7; 900]).hook(Arc::new(move |_, call| {
        if call == Call::Set(State::StopCopy) || gone.load(Ordering::SeqCst) {
            gone.store(true, Ordering::SeqCst);
            return Err(DeviceError::Disconnected { device: "gone".into(), reason: "closed".into() });
        }
        Ok(())
    }));
    let empty = Hooked::new("there", FLAGS, &[]);
    let (here, there, ledger) = ([MovedDevice::new(&hooked)], [MovedDevice::new(&empty)], Ledger::new());
    let (outcome, _) =
        move_over_a_link(Source::new(&here, &options), Destination::new(&there, &ledger, &options));
    let Outcome::Undone { report, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(lost(&report), [("gone".into(), Loss::Unknown)]);
}

fn refused(device: &limosa_device::Loopback) -> DeviceError {
    let device = limosa_client::Device::name(device).into();
    DeviceError::Refused { device, request: "a test's".into(), errno: Errno::EIO, hint: "".into() }
}

/// From COMMIT on this process can write no file any more.
struct FullDisk {
    refuses: bool,
}

impl Vmm for FullDisk {
    fn prepare(&self) -> Result<(), String> {
        let nothing = rustix::process::Rlimit { current: Some(0), maximum: None };
        rustix::process::setrlimit(rustix::process::Resource::Fsize, nothing)
            .map_err(|error| error.to_string())?;
        if self.refuses { Err("no room".into()) } else { Ok(()) }
    }
}

#[test]
fn a_decision_to_run_that_is_not_on_the_disk_was_not_told() {
    // The limit is for all of a process.
    if is_alone("traps::a_decision_to_run_that_is_not_on_the_disk_was_not_told") {
        move_with_a_full_disk(false);
    }
}

#[test]
fn a_decision_to_give_back_that_is_not_on_the_disk_was_not_told() {
    if is_alone("traps::a_decision_to_give_back_that_is_not_on_the_disk_was_not_told") {
        move_with_a_full_disk(true);
    }
}

fn move_with_a_full_disk(refuses: bool) {
    // Otherwise a write beyond the limit ends the process.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()).unwrap();
    let (folder, options) = (tempfile::tempdir().unwrap(), options());
    let ledger = Ledger::open(folder.path()).unwrap();
    let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
    let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
    let (outcome, received) = move_over_a_link(
        Source::new(&here, &options),
        Destination::new(&there, &ledger, &options).with_vmm(&FullDisk { refuses }),
    );
    let report = match (&outcome, received) {
        (Outcome::Moved(_), Received::Runs(report)) if !refuses => report,
        (Outcome::Undone { .. }, Received::Discarded { report, .. }) if refuses => report,
        (_, received) => panic!("{outcome:?} {received:?}"),
    };
    let told = |note: &String| note.contains("is not on the disk") && note.contains(&report.id);
    assert!(report.notes.iter().any(told), "{:?}", report.notes);
}

#[test]
fn a_part_of_the_further_links_is_enough() {
    let options = options().with_links(NonZeroU32::new(4).unwrap()).with_silence_max(Duration::from_secs(2));
    let (source, destination) = (Hooked::new("source", FLAGS, &[7; 9]), Hooked::new("there", FLAGS, &[]));
    let (here, there, ledger) =
        ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
    let (near, far) = SocketLink::pair().unwrap();
    let waiting = Mutex::new(Vec::new());
    let asked = AtomicUsize::new(0);
    let connect = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
        if asked.fetch_add(1, Ordering::SeqCst) == 1 {
            return Err(LinkError::Io(std::io::ErrorKind::ConnectionRefused.into()));
        }
        let (near, far) = SocketLink::pair()?;
        waiting.lock().unwrap().push(far);
        Ok(Box::new(near))
    };
    let accept = |wait: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
        loop {
            if let Some(link) = waiting.lock().unwrap().pop() {
                return Ok(Box::new(link));
            }
            wait.left()?;
            std::thread::yield_now();
        }
    };
    let (outcome, received) = std::thread::scope(|scope| {
        let destination = Destination::new(&there, &ledger, &options);
        let accept = &accept;
        let receiving = scope.spawn(move || destination.receive_over(&far, accept));
        let outcome = Source::new(&here, &options).send_over(&near, &connect);
        drop(near);
        (outcome, receiving.join().unwrap())
    });
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(report.notes.iter().any(|note| note.contains("2 of 4 are used")), "{:?}", report.notes);
}

/// A destination that answers each FLUSH with these links' numbers; why the source went back. The source's device says
/// nothing before the stop, so that it flushes once.
fn flushed(links: &[u32]) -> Error {
    let options = options().with_silence_max(Duration::from_secs(5)).with_unauthenticated_peers(true);
    let source = Hooked::new("source", MigrationFlags::STOP_COPY, &[7; 9]);
    let here = [MovedDevice::new(&source)];
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            let id = peer.read_id();
            peer.preface(id);
            while let Some(header) = peer.next() {
                match header.kind {
                    Kind::OFFER => {
                        let window = Some(1 << 20);
                        let answer = Answer { accepted: true, window, ..Answer::default() };
                        peer.frame(Kind::ANSWER, 0, 0, &answer.encode().unwrap());
                    }
                    Kind::FLUSH => {
                        for link in links {
                            peer.frame(Kind::FLUSHED, *link, header.position, &[]);
                        }
                    }
                    _ => {}
                }
            }
        });
        let outcome = Source::new(&here, &options).send(&near);
        near.cut();
        let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!(source.state(), State::Running);
        why
    })
}

#[test]
fn a_flush_was_answered_by_another_link_or_twice() {
    for (links, named) in [(&[0, 0][..], 0), (&[1], 1), (&[0, 1], 1), (&[40], 40), (&[u32::MAX], u32::MAX)] {
        let why = flushed(links);
        assert!(matches!(why, Error::Stream { .. }), "{links:?}: {why}");
        let expected = format!("flush 1 on link {named} is not waiting for an answer");
        assert!(why.to_string().contains(&expected), "{links:?}: {why}");
    }
}

/// A link of which one write fails, and which works again afterwards.
struct Failing {
    inner: SocketLink,
    writes: AtomicUsize,
    fails: usize,
    failed: Arc<AtomicBool>,
}

impl Link for Failing {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        if self.writes.fetch_add(1, Ordering::SeqCst) == self.fails {
            self.failed.store(true, Ordering::SeqCst);
            return Err(LinkError::Io(std::io::ErrorKind::OutOfMemory.into()));
        }
        self.inner.write(slices, wait)
    }
    forward_link!(|this| this.inner; read, finish, peer);
}

#[test]
fn a_frame_that_was_lost_by_a_link_that_works_again_was_forgotten() {
    let move_with = |fails| {
        let failed = Arc::<AtomicBool>::default();
        // Nothing depends on it but how long a side listens for a reason.
        let options = options().with_silence_max(Duration::from_millis(500));
        let (source, destination) =
            (Hooked::new("source", FLAGS, &[7; 999]), Hooked::new("there", FLAGS, &[]));
        let (here, there, ledger) =
            ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
        let (near, far) = SocketLink::pair().unwrap();
        let near = Failing { inner: near, writes: AtomicUsize::new(0), fails, failed: failed.clone() };
        let (outcome, received) = std::thread::scope(|scope| {
            let destination = Destination::new(&there, &ledger, &options);
            let receiving = scope.spawn(move || destination.receive(&far));
            let outcome = Source::new(&here, &options).send(&near);
            drop(near);
            (outcome, receiving.join().unwrap())
        });
        match outcome {
            // Only DONE, or nothing, is missing.
            Outcome::Moved(_) => assert!(matches!(received, Received::Runs(_)), "{fails}: {received:?}"),
            Outcome::Undone { .. } => {
                assert_eq!(source.state(), State::Running, "{fails}");
                assert!(matches!(received, Received::Discarded { .. }), "{fails}: {received:?}");
            }
            Outcome::InDoubt(_) => assert!(!source.state().is_running(), "{fails}"),
        }
        failed.load(Ordering::SeqCst)
    };
    // All at once: most of them only wait.
    let failed = std::thread::scope(|scope| {
        let moves: Vec<_> = (0..40).map(|fails| scope.spawn(move || move_with(fails))).collect();
        moves.into_iter().map(|moved| moved.join().unwrap()).filter(|failed| *failed).count()
    });
    assert!((8..40).contains(&failed), "{failed}: each write was one of them");
}

/// Cancels in a round.
struct CancelInRound(Cancel);

impl Observer for CancelInRound {
    fn round(&self, round: &Round) {
        if round.round == 3 {
            self.0.cancel();
        }
    }
}

#[test]
fn a_receiver_with_several_links_was_told_of_a_closed_link_instead_of_the_reason() {
    for links in [1, 2, 4] {
        for cancels in [true, false] {
            let what = format!("{links} links, cancelled: {cancels}");
            let again = what.clone();
            ends_in_time(&what, move || {
                let when = if cancels { WhenStalled::KeepTrying } else { WhenStalled::Abort };
                let wanted = Convergence::default()
                    .with_downtime_goal(Duration::ZERO)
                    .with_stalled_rounds_max(1)
                    .with_when_stalled(when);
                let options = options().with_convergence(wanted).with_links(NonZeroU32::new(links).unwrap());
                let source = Hooked::new("source", FLAGS, &[7; 999]);
                let destination = Hooked::new("there", FLAGS, &[]);
                let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
                let size = 2048 * PAGE_BYTES as usize;
                let (near, far, ledger) = (VecPages::new(size), VecPages::new(size), Ledger::new());
                near.0.lock().unwrap().fill(7);
                let (mut log, regions) = (Log { all: true, ..Log::default() }, [region(&far)]);
                let observer = CancelInRound(Cancel::new().unwrap());
                let source = Source::new(&here, &options)
                    .with_memory(Memory::logged(vec![region(&near)], &mut log))
                    .with_observer(&observer)
                    .with_cancel(cancels.then_some(&observer.0));
                let (outcome, received) = move_over_links(
                    source,
                    Destination::new(&there, &ledger, &options).with_memory(&regions),
                    |_, inner| Box::new(inner),
                );
                let Outcome::Undone { why, .. } = outcome else { panic!("{again}: {outcome:?}") };
                let Received::Discarded { why: heard, .. } = received else {
                    panic!("{again}: {received:?}")
                };
                let Error::Aborted { code, reason, .. } = heard else { panic!("{again}: {heard}") };
                let expected = if cancels { AbortCode::Cancelled } else { AbortCode::Standstill };
                assert_eq!((code, reason), (expected, why.to_string()), "{again}");
                assert_eq!(matches!(why, Error::Cancelled), cancels, "{again}: {why}");
                assert_eq!(matches!(why, Error::NotConverging { .. }), !cancels, "{again}: {why}");
            });
        }
    }
}

#[test]
fn a_source_with_several_links_was_told_of_a_closed_link_instead_of_the_destination_s_reason() {
    for links in [1, 2, 4] {
        let what = format!("{links} links");
        let again = what.clone();
        ends_in_time(&what, move || {
            let options = options().with_links(NonZeroU32::new(links).unwrap());
            let cancel = Cancel::new().unwrap();
            let source = Hooked::new("source", FLAGS, &[7; 9]);
            let destination = {
                let cancel = cancel.clone();
                Hooked::new("there", FLAGS, &[]).hook(before(Call::Write, move |_| cancel.cancel()))
            };
            let (here, there, ledger) =
                ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
            let (outcome, received) = move_over_links(
                Source::new(&here, &options),
                Destination::new(&there, &ledger, &options).with_cancel(Some(&cancel)),
                |_, inner| Box::new(inner),
            );
            let Outcome::Undone { why: Error::Aborted { code, reason, .. }, .. } = outcome else {
                panic!("{again}: {outcome:?}")
            };
            assert_eq!((code, reason.as_str()), (AbortCode::Cancelled, "cancelled"), "{again}");
            let Received::Discarded { why: Error::Cancelled, .. } = received else {
                panic!("{again}: {received:?}")
            };
        });
    }
}
