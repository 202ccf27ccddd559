//! A machine that stands still when it is moved or saved stays so: its devices in STOP, its vCPUs not started.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{Ends, Fault as LinkFault, FaultyLink, Step, VecPages, Way, world};
use limosa_client::DeviceExt;
use limosa_device::Fault;
use limosa_migrate::link::SocketLink;
use limosa_migrate::{
    AfterLoad, AfterSave, Decision, InDoubt, Outcome, Received, SnapshotFile, Vmm, inspect_file,
};
use limosa_protocol::{Errno, MigrationFlags, State};
use limosa_stream::MigrationId;

/// Counts the calls by which a guest is made to run.
#[derive(Default)]
struct Counting {
    prepared: AtomicUsize,
    started: AtomicUsize,
}

impl Vmm for Counting {
    fn prepare(&self) -> Result<(), String> {
        self.prepared.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn start(&self) {
        self.started.fetch_add(1, Ordering::SeqCst);
    }
}

impl Counting {
    fn calls(&self) -> (usize, usize) {
        (self.prepared.load(Ordering::SeqCst), self.started.load(Ordering::SeqCst))
    }
}

/// Devices of these flags, of which those with `true` stand in STOP.
fn ends(flags: MigrationFlags, stopped: &[bool]) -> (Ends, Arc<Counting>) {
    let (source, destination): (Vec<_>, Vec<_>) = stopped.iter().map(|_| world("dev", flags, 30_000)).unzip();
    for (device, stopped) in source.iter().zip(stopped) {
        if *stopped {
            device.client.set_state(State::Stop).unwrap();
        }
    }
    let (mut ends, vmm) = (Ends::new(source, destination), Arc::new(Counting::default()));
    ends.vmm = vmm.clone();
    (ends, vmm)
}

#[track_caller]
fn stands_at_the_destination(ends: &Ends) {
    for (source, destination) in ends.source.iter().zip(&ends.destination) {
        assert_eq!((source.state(), destination.state()), (State::Stop, State::Stop));
        assert_eq!(destination.data(), source.data());
        assert!(destination.holds_guest());
        assert_eq!(source.guest.running(), 0, "nobody runs it");
    }
}

#[test]
fn a_paused_machine_ran_after_its_move() {
    for flags in MigrationFlags::SETS {
        let (mut ends, vmm) = ends(flags, &[true, true]);
        let (here, there) = (VecPages::new(1 << 16), VecPages::new(1 << 16));
        here.0.lock().unwrap()[12345] = 0x77;
        let there = Arc::new(there);
        ends.memory = Some((Arc::new(here), there.clone(), 1 << 16));
        let (outcome, received) = ends.run_plain();
        let Outcome::Moved(report) = &outcome else { panic!("{flags}: {outcome:?}") };
        assert_eq!(report.downtime_ns, None, "it stood still before");
        assert!(matches!(&received, Received::Stopped(_)), "{flags}: {received:?}");
        stands_at_the_destination(&ends);
        assert_eq!(there.0.lock().unwrap()[12345], 0x77);
        assert_eq!(vmm.calls(), (0, 0), "its vCPUs stand still too");
    }
}

#[test]
fn a_paused_machine_runs_after_its_move_where_that_is_asked_for() {
    let (mut ends, vmm) = ends(MigrationFlags::SETS[3], &[true]);
    ends.after = AfterLoad::Run;
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "run all the same"));
    assert_eq!(vmm.calls(), (1, 1));
}

#[test]
fn a_machine_that_ran_is_left_stopped_where_that_is_asked_for() {
    let (mut ends, vmm) = ends(MigrationFlags::SETS[3], &[false, true]);
    ends.after = AfterLoad::Stop;
    let (outcome, received) = ends.run_plain();
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert!(report.downtime_ns.is_some(), "it did run");
    assert!(matches!(received, Received::Stopped(_)), "{received:?}");
    stands_at_the_destination(&ends);
    assert_eq!(vmm.calls(), (0, 0));
}

#[test]
fn a_paused_machine_stays_paused_after_a_move_that_failed() {
    for step in [Step::SaveBegin, Step::Save, Step::LoadFinish] {
        let (ends, vmm) = ends(MigrationFlags::SETS[3], &[true, true]);
        let side = if step == Step::LoadFinish { &ends.destination } else { &ends.source };
        side[1].fail(step, 0, Fault::Refused(Errno::EIO));
        let (outcome, received) = ends.run_plain();
        let Outcome::Undone { report, .. } = outcome else { panic!("{outcome:?}") };
        assert!(report.unrecovered.is_empty(), "{:?}", report.unrecovered);
        assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
        for (source, destination) in ends.source.iter().zip(&ends.destination) {
            assert_eq!(source.state(), State::Stop, "as it was found");
            assert!(source.holds_guest() && !destination.holds_guest());
            assert_eq!(source.guest.running(), 0);
        }
        assert_eq!(vmm.calls(), (0, 0));
    }
}

#[test]
fn of_a_machine_that_ran_a_device_that_stood_still_stays_so() {
    let (ends, vmm) = ends(MigrationFlags::SETS[3], &[false, true, false]);
    let (outcome, received) = ends.run_plain();
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    let states: Vec<_> = ends.destination.iter().map(|device| device.state()).collect();
    assert_eq!(states, [State::Running, State::Stop, State::Running]);
    assert_eq!(vmm.calls(), (1, 1));
    for (source, destination) in ends.source.iter().zip(&ends.destination) {
        assert_eq!(source.state(), State::Stop);
        assert!(destination.holds_guest() && destination.data() == source.data());
    }
}

#[test]
fn a_paused_machine_in_doubt_is_settled_either_way_and_runs_nowhere() {
    let moves = |ends: &Ends, cut_at: u64| {
        let (near, far) = SocketLink::pair().unwrap();
        let far = FaultyLink::new(far, Way::Out, cut_at, LinkFault::Cut);
        let sent = Arc::clone(&far.sent);
        (ends.run(near, far), sent)
    };
    let (_, sent) = moves(&ends(MigrationFlags::SETS[3], &[true]).0, u64::MAX);
    let last = sent.load(Ordering::SeqCst) - 1;
    for decision in [Decision::Committed, Decision::NotCommitted] {
        let (ends, vmm) = ends(MigrationFlags::SETS[3], &[true]);
        // RUNNING does not arrive.
        let ((outcome, received), _) = moves(&ends, last);
        let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}\n{received:?}") };
        assert!(matches!(received, Received::Stopped(_)), "{received:?}");
        let outcome = ends.with_source(|source| source.decide(decision, doubt));
        assert_eq!(matches!(outcome, Outcome::Moved(_)), decision == Decision::Committed, "{outcome:?}");
        assert_eq!(ends.source[0].state(), State::Stop);
        assert_eq!((ends.source[0].guest.running(), vmm.calls()), (0, (0, 0)));
    }
}

#[test]
fn a_paused_machine_whose_sender_died_was_set_to_run_when_its_move_was_undone() {
    let (ends, _) = ends(MigrationFlags::SETS[3], &[true]);
    let session = ends.source[0].client.set_state(State::StopCopy).unwrap();
    drop(session);
    let doubt = InDoubt::recover(MigrationId([7; 16])).with_found(vec![State::Stop]);
    let outcome = ends.with_source(|source| source.decide(Decision::NotCommitted, doubt));
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert_eq!((ends.source[0].state(), ends.source[0].guest.running()), (State::Stop, 0));
}

#[test]
fn a_paused_machine_that_was_saved_is_loaded_paused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    for (after_save, after_load) in [
        (AfterSave::Stop, AfterLoad::AsFound),
        (AfterSave::Run, AfterLoad::AsFound),
        (AfterSave::Stop, AfterLoad::Run),
        (AfterSave::Stop, AfterLoad::Stop),
    ] {
        let (ends, vmm) = ends(MigrationFlags::SETS[3], &[true]);
        let place = SnapshotFile::new(&path).replacing(true);
        let outcome = ends.with_source(|source| source.save(&place, after_save));
        let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
        assert_eq!(report.outcome.name(), "saved");
        assert_eq!(ends.source[0].state(), State::Stop, "as it was found");
        assert!(inspect_file(&path).unwrap().offer.unwrap().devices[0].stopped);
        let received = ends.with_destination(|destination| destination.load(&place, after_load));
        let runs = after_load == AfterLoad::Run;
        assert_eq!(matches!(received, Received::Runs(_)), runs, "{received:?}");
        assert_eq!(matches!(received, Received::Stopped(_)), !runs, "{received:?}");
        let expected = if runs { State::Running } else { State::Stop };
        assert_eq!((ends.destination[0].state(), vmm.calls().1), (expected, usize::from(runs)));
        assert!(ends.destination[0].holds_guest());
    }
}

#[test]
fn a_machine_that_was_saved_to_stay_stopped_runs_where_it_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let place = SnapshotFile::new(directory.path().join("stream"));
    let (ends, vmm) = ends(MigrationFlags::SETS[3], &[false]);
    let outcome = ends.with_source(|source| source.save(&place, AfterSave::Stop));
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let received = ends.with_destination(|destination| destination.load(&place, AfterLoad::AsFound));
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert_eq!((ends.destination[0].state(), vmm.calls()), (State::Running, (1, 1)));
}
