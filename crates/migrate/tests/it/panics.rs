//! Panics in what the engine calls: devices, observers, the VMM, memory and its log. None leaves a call of the engine's
//! or hangs it; the guest runs on one side, or the move is in doubt.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::common::hooked::{Call, Hook, Hooked, before, before_call, ends_in_time, panic_quietly};
use crate::common::options;
use limosa_client::DeviceExt;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    AfterLoad, AfterSave, CommitNote, Destination, DirtyLog, Error, Estimate, GuestPages, Ledger, Memory,
    MemoryRegion, MovedDevice, Nobody, Observer, Options, Outcome, PAGE_BYTES, Phase, Publication, Received,
    Round, SnapshotFile, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter, Source, Totals, Vmm,
    WhenStalled,
};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::{MigrationFlags, State};
use limosa_testing::forward_link;

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];
const PAGES: u64 = 16;

fn guest() -> Vec<u8> {
    (0..1000_u32).map(|at| at as u8 | 1).collect()
}

/// Both ends of a move, of which anything may panic.
struct Machine {
    source: Hooked,
    destination: Hooked,
    observers: [Arc<dyn Observer + Send>; 2],
    vmms: [Arc<dyn Vmm + Send>; 2],
    memory: [Arc<PanickingPages>; 2],
    log: PanickingLog,
    options: Options,
}

impl Machine {
    fn new(flags: MigrationFlags) -> Machine {
        let pages = |panics| {
            let bytes = Mutex::new(vec![0; (PAGES * PAGE_BYTES) as usize]);
            Arc::new(PanickingPages { bytes, panics })
        };
        let machine = Machine {
            source: Hooked::new("source", flags, &guest()),
            destination: Hooked::new("destination", flags, &[]),
            observers: [Arc::new(Nobody), Arc::new(Nobody)],
            vmms: [Arc::new(Nobody), Arc::new(Nobody)],
            memory: [pages(None), pages(None)],
            log: PanickingLog::new(None),
            options: options(),
        };
        machine.memory[0].bytes.lock().unwrap()[5000] = 7;
        machine
    }

    fn run(&mut self) -> (Outcome, Received) {
        self.run_over(|link, _| Box::new(link))
    }

    fn run_over(&mut self, wrap: impl Fn(SocketLink, bool) -> Box<dyn Link>) -> (Outcome, Received) {
        let (here, there) = ([MovedDevice::new(&self.source)], [MovedDevice::new(&self.destination)]);
        let region =
            |at: usize| MemoryRegion { id: 0, iova: 0, size: PAGES * PAGE_BYTES, pages: &*self.memory[at] };
        let (regions, ledger) = ([region(1)], Ledger::new());
        let source = Source::new(&here, &self.options)
            .with_memory(Memory::logged(vec![region(0)], &mut self.log))
            .with_vmm(&*self.vmms[0])
            .with_observer(&*self.observers[0]);
        let destination = Destination::new(&there, &ledger, &self.options)
            .with_memory(&regions)
            .with_vmm(&*self.vmms[1])
            .with_observer(&*self.observers[1]);
        let (near, far) = SocketLink::pair().unwrap();
        let (near, far) = (wrap(near, true), wrap(far, false));
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || destination.receive(&*far));
            let outcome = source.send(&*near);
            drop(near);
            (outcome, receiving.join().unwrap())
        })
    }

    /// The guest runs on one side, or somebody says that it does not.
    fn check(&self, outcome: &Outcome, received: &Received, what: &str) {
        let here = self.source.state().is_running() && self.source.data() == guest();
        let there = self.destination.state().is_running() && self.destination.data() == guest();
        assert!(!(here && there), "{what}: it runs twice");
        match outcome {
            Outcome::Moved(_) => {
                assert!(there && !here, "{what}: {received:?}");
                assert!(matches!(received, Received::Runs(_)), "{what}: {received:?}");
            }
            Outcome::Undone { report, .. } => {
                assert!(!there, "{what}: {received:?}");
                assert!(
                    here || !report.unrecovered.is_empty(),
                    "{what}: it runs nowhere, and nobody says so"
                );
                assert!(matches!(received, Received::Discarded { .. }), "{what}: {received:?}");
            }
            Outcome::InDoubt(_) => {
                assert!(!self.source.state().is_running(), "{what}: in doubt, and it runs");
                assert!(!matches!(received, Received::Discarded { .. }), "{what}: {received:?}");
            }
        }
    }
}

/// Why a move was undone: the source's own error, or the one of the destination, which the source was told of.
fn panicked(outcome: &Outcome, received: &Received) -> Option<String> {
    let place = |why: &Error| match why {
        Error::Panicked { place, message } => {
            assert_eq!(message, "a defect of a test's");
            Some(place.clone())
        }
        _ => None,
    };
    let here = match outcome {
        Outcome::Undone { why, .. } => place(why),
        Outcome::InDoubt(doubt) => place(&doubt.why),
        Outcome::Moved(_) => None,
    };
    let there = match received {
        Received::Discarded { why, .. } | Received::Broken { why, .. } => place(why),
        _ => None,
    };
    here.or(there)
}

/// Panics before so many calls in a row, from the n-th on. Whether there was such a call.
fn from_call(n: usize, count: usize) -> (Hook, Arc<AtomicBool>) {
    let (calls, fired) = (AtomicUsize::new(0), Arc::new(AtomicBool::new(false)));
    let panicked = fired.clone();
    let hook = move |_: &limosa_device::Loopback, _| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        if (n..n + count).contains(&call) {
            panicked.store(true, Ordering::SeqCst);
            panic_quietly();
        }
        Ok(())
    };
    (Arc::new(hook), fired)
}

fn panics_at_any_call(at_source: bool, flags: MigrationFlags, in_a_row: usize) {
    for n in 0.. {
        let what = format!("{flags}: {in_a_row} panics from call {n} on, source: {at_source}");
        let again = what.clone();
        let fired = ends_in_time(&what, move || {
            let (hook, fired) = from_call(n, in_a_row);
            let mut machine = Machine::new(flags);
            match at_source {
                true => machine.source = machine.source.hook(hook),
                false => machine.destination = machine.destination.hook(hook),
            }
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, &again);
            if let Some(place) = panicked(&outcome, &received) {
                let name = if at_source { "source" } else { "destination" };
                let places = [name, "the handshake", "starting the dirty log"];
                assert!(places.iter().any(|known| place.contains(known)), "{again}: {place}");
            }
            fired.load(Ordering::SeqCst)
        });
        if !fired {
            break;
        }
    }
}

#[test]
fn a_panic_in_any_call_of_a_source_s_device_is_an_error() {
    for flags in [MigrationFlags::SETS[0], FLAGS] {
        panics_at_any_call(true, flags, 1);
    }
}

#[test]
fn a_panic_in_any_call_of_a_destination_s_device_is_an_error() {
    for flags in [MigrationFlags::SETS[0], FLAGS] {
        panics_at_any_call(false, flags, 1);
    }
}

#[test]
fn panics_on_the_way_back_are_errors_as_well() {
    for at_source in [true, false] {
        for in_a_row in [2, 4] {
            panics_at_any_call(at_source, FLAGS, in_a_row);
        }
    }
}

#[test]
fn a_device_that_panics_at_every_call_from_some_on_hangs_nobody() {
    for at_source in [true, false] {
        for n in (0..60).step_by(7) {
            let what = format!("panics from call {n} on, source: {at_source}");
            let again = what.clone();
            ends_in_time(&what, move || {
                let (hook, _) = from_call(n, usize::MAX / 2);
                let mut machine = Machine::new(FLAGS);
                match at_source {
                    true => machine.source = machine.source.hook(hook),
                    false => machine.destination = machine.destination.hook(hook),
                }
                let (outcome, received) = machine.run();
                machine.check(&outcome, &received, &again);
            });
        }
    }
}

#[test]
fn a_panic_in_a_stream_names_the_device() {
    for (call, name) in [(Call::Read, "source"), (Call::PrecopyInfo, "source"), (Call::Write, "destination")]
    {
        ends_in_time(name, move || {
            let mut machine = Machine::new(FLAGS);
            let hook = before(call, |_| panic_quietly());
            match name {
                "source" => machine.source = machine.source.hook(hook),
                _ => machine.destination = machine.destination.hook(hook),
            }
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, name);
            assert_eq!(panicked(&outcome, &received).as_deref(), Some(name), "{call:?}: {outcome:?}");
            if name == "destination" {
                let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = outcome else {
                    panic!("{outcome:?}")
                };
                assert_eq!(reason, "destination panicked: a defect of a test's");
            }
        });
    }
}

#[test]
fn a_device_that_panics_when_it_is_to_run_gives_the_guest_back() {
    for arc in [State::RunningP2p, State::Running] {
        ends_in_time("after COMMIT", move || {
            let mut machine = Machine::new(FLAGS);
            machine.destination = machine.destination.hook(before(Call::Set(arc), |_| panic_quietly()));
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, "after COMMIT");
            let Received::Discarded { why: Error::Panicked { place, .. }, .. } = &received else {
                panic!("{received:?}")
            };
            assert_eq!(place, "destination");
            assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
        });
    }
    // Nor can it be reset: the guest may be there.
    ends_in_time("after COMMIT, for good", || {
        let mut machine = Machine::new(FLAGS);
        let asked = AtomicBool::new(false);
        machine.destination = machine.destination.on(move |_, call| {
            if asked.load(Ordering::SeqCst) || call == Call::Set(State::Running) {
                asked.store(true, Ordering::SeqCst);
                panic_quietly();
            }
        });
        let (outcome, received) = machine.run();
        machine.check(&outcome, &received, "after COMMIT, for good");
        assert!(matches!(received, Received::Broken { .. }), "{received:?}");
        assert!(matches!(outcome, Outcome::InDoubt(_)), "{outcome:?}");
    });
}

#[test]
fn a_source_s_device_that_panics_when_the_guest_has_gone_is_noted() {
    ends_in_time("STOP", || {
        let mut machine = Machine::new(FLAGS);
        machine.source = machine.source.hook(before(Call::Set(State::Stop), |_| panic_quietly()));
        let (outcome, received) = machine.run();
        machine.check(&outcome, &received, "STOP");
        let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
        let noted = |note: &String| note.contains("source panicked") && note.contains("must not run");
        assert!(report.notes.iter().any(noted), "{:?}", report.notes);
    });
}

/// Panics in the n-th call of these.
struct Panicking<T> {
    calls: AtomicUsize,
    at: usize,
    /// Where it was when it panicked.
    fired: Mutex<Option<T>>,
}

impl<T: Send> Panicking<T> {
    fn new(at: usize) -> Panicking<T> {
        Panicking { calls: AtomicUsize::new(0), at, fired: Mutex::new(None) }
    }
    fn call(&self, place: T) {
        if self.calls.fetch_add(1, Ordering::SeqCst) == self.at {
            *self.fired.lock().unwrap() = Some(place);
            panic_quietly();
        }
    }
}

impl Observer for Panicking<String> {
    fn phase(&self, phase: Phase) {
        self.call(format!("{phase:?}"));
    }
    fn moved(&self, _: Totals) {
        self.call("moved".into());
    }
    fn round(&self, _: &Round) {
        self.call("round".into());
    }
    fn estimate(&self, _: &Estimate) {
        self.call("estimate".into());
    }
}

#[test]
fn a_panic_in_any_call_of_an_observer_is_an_error_until_the_commit_and_then_a_note() {
    for at_source in [true, false] {
        for n in 0.. {
            let what = format!("the observer's call {n}, source: {at_source}");
            let again = what.clone();
            let fired = ends_in_time(&what, move || {
                let observer = Arc::new(Panicking::<String>::new(n));
                let mut machine = Machine::new(FLAGS);
                machine.observers[usize::from(!at_source)] = observer.clone();
                let (outcome, received) = machine.run();
                let place = observer.fired.lock().unwrap().clone();
                let what = format!("{again}: {place:?}");
                machine.check(&outcome, &received, &what);
                match (&outcome, &received, place.is_some()) {
                    (Outcome::Moved(here), Received::Runs(there), true) => {
                        let report = if at_source { here } else { there };
                        let noted = report.notes.iter().any(|note| note.contains("Observer panicked"));
                        assert!(noted, "{what}: {:?}", report.notes);
                        let after = ["Start", "Finish", "Commit", "moved"];
                        assert!(after.contains(&place.as_deref().unwrap()), "{what}: before the commit");
                    }
                    (_, _, true) => {
                        assert_eq!(panicked(&outcome, &received).as_deref(), Some("Observer"), "{what}");
                    }
                    (_, _, false) => assert!(matches!(outcome, Outcome::Moved(_)), "{what}: {outcome:?}"),
                }
                place.is_some()
            });
            if !fired {
                break;
            }
        }
    }
}

/// A VMM that panics where it is told to.
struct PanickingVmm {
    at: &'static str,
    /// Refuses the commit, so that the move is undone.
    refuses: bool,
    resumed: AtomicUsize,
}

impl PanickingVmm {
    fn new(at: &'static str) -> PanickingVmm {
        let refuses = at == "resume";
        PanickingVmm { at, refuses, resumed: AtomicUsize::new(0) }
    }
    fn call(&self, place: &str) {
        if self.at == place {
            panic_quietly();
        }
    }
}

impl Vmm for PanickingVmm {
    fn throttle(&self, step: u32) -> bool {
        // The word that ends it is another call.
        self.call(if step == 0 { "throttle off" } else { "throttle" });
        step <= 1
    }
    fn stop(&self) -> Result<(), String> {
        self.call("stop");
        Ok(())
    }
    fn committing(&self, _: &CommitNote) -> Result<(), String> {
        self.call("committing");
        if self.refuses { Err("a full disk".into()) } else { Ok(()) }
    }
    fn resume(&self) {
        self.resumed.fetch_add(1, Ordering::SeqCst);
        self.call("resume");
    }
    fn prepare(&self) -> Result<(), String> {
        self.call("prepare");
        Ok(())
    }
    fn start(&self) {
        self.call("start");
    }
}

#[test]
fn a_panic_of_the_vmm_is_a_refusal_where_it_can_refuse_and_a_note_where_it_cannot() {
    let cases = [
        ("stop", "Vmm::stop", false),
        ("committing", "Vmm::committing", false),
        ("resume", "Vmm::resume", false),
        ("prepare", "Vmm::prepare", false),
        ("start", "Vmm::start", true),
        ("throttle", "Vmm::throttle", true),
        ("throttle off", "Vmm::throttle", true),
    ];
    for (at, place, moves) in cases {
        ends_in_time(at, move || {
            let mut machine = Machine::new(FLAGS);
            let vmm = Arc::new(PanickingVmm::new(at));
            machine.vmms = [vmm.clone(), vmm.clone()];
            if at.starts_with("throttle") {
                // The log says that all is dirty whenever it is asked.
                machine.log = PanickingLog { always_dirty: true, ..PanickingLog::new(None) };
                machine.options.convergence = machine
                    .options
                    .convergence
                    .with_downtime_goal(std::time::Duration::ZERO)
                    .with_stalled_rounds_max(1)
                    .with_when_stalled(WhenStalled::SwitchOver);
            }
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, at);
            assert_eq!(matches!(outcome, Outcome::Moved(_)), moves, "{at}: {outcome:?}");
            if at != "stop" || !moves {
                let expected = usize::from(!moves);
                assert_eq!(
                    vmm.resumed.load(Ordering::SeqCst),
                    expected,
                    "{at}: vCPUs that were stopped go on"
                );
            }
            let notes = match (&outcome, &received) {
                (Outcome::Moved(here), Received::Runs(there)) => [&here.notes[..], &there.notes[..]].concat(),
                (Outcome::Undone { report, .. }, _) => report.notes.clone(),
                _ => Vec::new(),
            };
            let told = panicked(&outcome, &received).is_some_and(|told| told == place)
                || notes.iter().any(|note| note.contains(&format!("{place} panicked")));
            assert!(told, "{at}: {outcome:?} {notes:?}");
        });
    }
}

/// Memory that panics.
struct PanickingPages {
    bytes: Mutex<Vec<u8>>,
    panics: Option<&'static str>,
}

impl PanickingPages {
    fn call(&self, place: &str) {
        if self.panics == Some(place) {
            panic_quietly();
        }
    }
}

impl GuestPages for PanickingPages {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.call("read");
        into.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        self.call("write");
        self.bytes.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn data(&self, range: Range<u64>) -> std::io::Result<Option<Range<u64>>> {
        self.call("data");
        Ok((!range.is_empty()).then_some(range))
    }
    fn zero(&self, _: u64, _: u64) -> std::io::Result<()> {
        self.call("zero");
        Ok(())
    }
}

#[test]
fn a_panic_of_guest_memory_is_an_error() {
    for (side, at) in [(0, "read"), (0, "data"), (1, "write"), (1, "zero")] {
        ends_in_time(at, move || {
            let mut machine = Machine::new(FLAGS);
            let bytes = Mutex::new(machine.memory[side].bytes.lock().unwrap().clone());
            machine.memory[side] = Arc::new(PanickingPages { bytes, panics: Some(at) });
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, at);
            assert!(matches!(outcome, Outcome::Undone { .. }), "{at}: {outcome:?}");
            let place = panicked(&outcome, &received).unwrap_or_default();
            assert!(place.starts_with(&format!("GuestPages::{at} at 0x")), "{at}: {outcome:?}");
        });
    }
}

/// A log that panics.
struct PanickingLog {
    panics: Option<&'static str>,
    always_dirty: bool,
    started: Arc<AtomicBool>,
    stopped: Arc<AtomicBool>,
}

impl PanickingLog {
    fn new(panics: Option<&'static str>) -> PanickingLog {
        PanickingLog { panics, always_dirty: false, started: Arc::default(), stopped: Arc::default() }
    }
    fn call(&self, place: &str) {
        if self.panics == Some(place) {
            panic_quietly();
        }
    }
}

impl DirtyLog for PanickingLog {
    fn start(&mut self) -> std::io::Result<()> {
        self.started.store(true, Ordering::SeqCst);
        self.call("start");
        Ok(())
    }
    fn harvest(&mut self, _: usize, dirty: &DirtyBitmap) -> std::io::Result<()> {
        self.call("harvest");
        if self.always_dirty {
            dirty.set_range(0, dirty.pages());
        }
        Ok(())
    }
    fn give_back(&mut self, _: usize, _: &DirtyBitmap) {
        self.call("give_back");
    }
    fn stop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.call("stop");
    }
    fn covers_devices(&self) -> bool {
        true
    }
}

#[test]
fn a_panic_of_the_dirty_log_is_an_error_and_the_log_is_stopped() {
    // The last two are on the way back, which a panic does not end.
    for (at, moves) in [("start", false), ("harvest", false), ("give_back", false), ("stop", true)] {
        ends_in_time(at, move || {
            let mut machine = Machine::new(FLAGS);
            machine.log = PanickingLog::new(Some(at));
            if at == "give_back" {
                machine.destination =
                    machine.destination.hook(before(Call::Set(State::Stop), |_| panic_quietly()));
            }
            let stopped = machine.log.stopped.clone();
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, at);
            assert_eq!(matches!(outcome, Outcome::Moved(_)), moves, "{at}: {outcome:?}");
            assert!(stopped.load(Ordering::SeqCst), "{at}: the log was left on");
            assert!(machine.source.dma_logging_stop().is_err(), "{at}: the device's log was left on");
            let notes = match &outcome {
                Outcome::Moved(report) | Outcome::Undone { report, .. } => &report.notes,
                Outcome::InDoubt(doubt) => panic!("{at}: {doubt:?}"),
            };
            let place = format!("DirtyLog::{at}");
            let told = panicked(&outcome, &received).is_some_and(|told| told == place)
                || notes.iter().any(|note| note.contains(&format!("{place} panicked")));
            assert!(told, "{at}: {outcome:?}");
        });
    }
}

#[test]
fn a_panic_of_a_device_leaves_no_snapshot_and_no_half_loaded_device() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    {
        let (source, options) = (Hooked::new("source", FLAGS, &guest()), options());
        let devices = [MovedDevice::new(&source)];
        let saved = Source::new(&devices, &options).save(&SnapshotFile::new(&whole), AfterSave::Stop);
        assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
    }
    for n in 0.. {
        let path = folder.path().join(n.to_string());
        let fired = ends_in_time("save", move || {
            let (hook, fired) = before_call(n, |_, _| panic_quietly());
            let (source, options) = (Hooked::new("source", FLAGS, &guest()).hook(hook), options());
            let devices = [MovedDevice::new(&source)];
            match Source::new(&devices, &options).save(&SnapshotFile::new(&path), AfterSave::Run) {
                Outcome::Moved(_) => assert!(path.exists(), "{n}"),
                Outcome::Undone { report, .. } => {
                    assert!(!path.exists(), "{n}");
                    assert!(source.state() == State::Running || !report.unrecovered.is_empty(), "{n}");
                }
                Outcome::InDoubt(doubt) => panic!("{n}: {doubt:?}"),
            }
            fired.load(Ordering::SeqCst)
        });
        if !fired {
            break;
        }
    }
    for n in 0.. {
        let whole = whole.clone();
        let fired = ends_in_time("load", move || {
            let (hook, fired) = before_call(n, |_, _| panic_quietly());
            let (destination, options) = (Hooked::new("destination", FLAGS, &[]).hook(hook), options());
            let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
            let received =
                Destination::new(&there, &ledger, &options).load(&SnapshotFile::new(&whole), AfterLoad::Run);
            match received {
                Received::Runs(_) => assert_eq!(destination.data(), guest(), "{n}"),
                Received::Discarded { report, .. } => {
                    assert!(destination.data() != guest() || !report.unrecovered.is_empty(), "{n}");
                }
                received => panic!("{n}: {received:?}"),
            }
            fired.load(Ordering::SeqCst)
        });
        if !fired {
            break;
        }
    }
}

/// A place that panics in its n-th call, over a file.
struct Place {
    file: SnapshotFile,
    panicking: Arc<Panicking<&'static str>>,
}

impl Place {
    fn new(path: &Path, panics_at: usize) -> Place {
        Place { file: SnapshotFile::new(path), panicking: Arc::new(Panicking::new(panics_at)) }
    }
    fn fired(&self) -> Option<&'static str> {
        *self.panicking.fired.lock().unwrap()
    }
}

struct Handle<T: ?Sized>(Arc<Panicking<&'static str>>, Box<T>);

impl SnapshotTarget for Place {
    fn name(&self) -> String {
        self.panicking.call("name");
        "the place".into()
    }
    fn create(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        self.panicking.call("create");
        let inner = SnapshotTarget::create(&self.file, wait)?;
        Ok(Box::new(Handle(self.panicking.clone(), inner)))
    }
}

impl SnapshotWriter for Handle<dyn SnapshotWriter> {
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.0.call("write");
        self.1.write(bytes, wait)
    }
    fn publish(self: Box<Self>, wait: Wait<'_>) -> Publication {
        self.0.call("publish");
        self.1.publish(wait)
    }
}

impl SnapshotSource for Place {
    fn name(&self) -> String {
        self.panicking.call("name");
        "the place".into()
    }
    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        self.panicking.call("open");
        let inner = SnapshotSource::open(&self.file, wait)?;
        Ok(Box::new(Handle(self.panicking.clone(), inner)))
    }
}

impl SnapshotReader for Handle<dyn SnapshotReader> {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.0.call("read");
        self.1.read(into, wait)
    }
    fn rewind(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        self.0.call("rewind");
        self.1.rewind(wait)
    }
}

#[test]
fn a_panic_of_a_snapshot_s_place_is_an_error_and_leaves_the_guest_in_doubt_only_when_it_publishes() {
    let folder = tempfile::tempdir().unwrap();
    let options = options();
    for after in [AfterSave::Run, AfterSave::Stop] {
        for n in 0.. {
            let path = folder.path().join(format!("{after:?}-{n}"));
            let place = Place::new(&path, n);
            let source = Hooked::new("source", FLAGS, &guest());
            let devices = [MovedDevice::new(&source)];
            let outcome = Source::new(&devices, &options).save(&place, after);
            let what = format!("{after:?}, call {n}, {:?}", place.fired());
            let is_named = |why: &Error| matches!(why, Error::Panicked { .. });
            match (&outcome, place.fired(), after) {
                (Outcome::Moved(_), None, _) => assert!(path.exists(), "{what}"),
                (Outcome::InDoubt(doubt), Some("publish"), AfterSave::Stop) => {
                    assert!(is_named(&doubt.why) && !source.state().is_running(), "{what}: {doubt:?}");
                }
                (Outcome::Undone { why, .. }, Some(_), _) => {
                    assert!(is_named(why) && source.state() == State::Running, "{what}: {why}");
                    assert!(!path.exists(), "{what}");
                }
                _ => panic!("{what}: {outcome:?}"),
            }
            if place.fired().is_none() {
                break;
            }
        }
    }
    let path = folder.path().join("whole");
    let source = Hooked::new("source", FLAGS, &guest());
    let devices = [MovedDevice::new(&source)];
    let saved = Source::new(&devices, &options).save(&SnapshotFile::new(&path), AfterSave::Stop);
    assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
    for n in 0.. {
        let place = Place::new(&path, n);
        let destination = Hooked::new("destination", FLAGS, &[]);
        let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
        let received = Destination::new(&there, &ledger, &options).load(&place, AfterLoad::Run);
        match (received, place.fired()) {
            (Received::Runs(_), None) => break,
            (Received::Discarded { why: Error::Panicked { .. }, .. }, Some(_)) => {
                assert!(destination.data() != guest(), "{n}");
            }
            (received, fired) => panic!("call {n}, {fired:?}: {received:?}"),
        }
    }
}

/// A link that panics in its n-th call, or in all from that on.
struct PanickingLink {
    inner: SocketLink,
    calls: AtomicUsize,
    panics: Range<usize>,
}

impl PanickingLink {
    fn called(&self) -> &SocketLink {
        if self.panics.contains(&self.calls.fetch_add(1, Ordering::SeqCst)) {
            panic_quietly();
        }
        &self.inner
    }
}

impl Link for PanickingLink {
    forward_link!(|this| this.called(); write, read);
    forward_link!(|this| this.inner; finish, peer);
}

/// Moves over links of which one side's panics there.
fn panics_of_a_link(at_source: bool, panics: Range<usize>) {
    let what = format!("calls {panics:?} of the link, source: {at_source}");
    let again = what.clone();
    ends_in_time(&what, move || {
        let mut machine = Machine::new(FLAGS);
        machine.options = machine.options.with_silence_max(std::time::Duration::from_millis(200));
        let (outcome, received) = machine.run_over(|inner, is_source| {
            let panics = if is_source == at_source { panics.clone() } else { 0..0 };
            Box::new(PanickingLink { inner, calls: AtomicUsize::new(0), panics })
        });
        match outcome {
            // A COMMIT that was not sent: it is in doubt until the source has asked.
            Outcome::InDoubt(_) => assert!(!machine.source.state().is_running(), "{again}"),
            outcome => machine.check(&outcome, &received, &again),
        }
    });
}

#[test]
fn a_panic_in_any_call_of_a_link_is_an_error() {
    for at_source in [true, false] {
        for n in 0..60 {
            panics_of_a_link(at_source, n..n + 1);
        }
    }
}

#[test]
fn a_link_that_panics_from_any_call_on_is_an_error() {
    for at_source in [true, false] {
        for n in 0..60 {
            panics_of_a_link(at_source, n..usize::MAX);
        }
    }
}
