//! Traps for a caller: options without a limit or of nothing, another machine's doubt, records that cannot be written,
//! and words that do not reach the other side.

mod links;
mod time_limits;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use limosa_client::Error as DeviceError;
use limosa_device::Fault;
use limosa_migrate::link::SocketLink;
use limosa_migrate::{
    Decision, Destination, Difference, DirtyLog, Error, InDoubt, Ledger, Loss, Memory, MemoryRegion,
    MovedDevice, Options, Outcome, Received, Source, Vmm,
};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_protocol::{Errno, MigrationFlags, State};
use limosa_testing::is_alone;

use crate::common::closures::AtCommit;
use crate::common::hooked::{Call, Hooked, move_over_a_link};
use crate::common::{Ends, Step, VecPages, options, world};

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
            .with_vmm(&AtCommit(|_: &_| near.cut()))
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
