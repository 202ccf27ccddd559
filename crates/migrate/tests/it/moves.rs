//! Moves that work, and moves that are refused or called off.

use std::io::{IoSlice, Seek, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Ends, VecPages, world};
use limosa_client::DeviceExt;
use limosa_migrate::link::{Address, Link, LinkError, Listener, SocketLink, Wait, connect};
use limosa_migrate::{
    Cancel, CommitNote, Error, FilePages, MovedDevice, Observer, Outcome, PAGE_BYTES, Phase, Received, Vmm,
    move_local,
};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{AbortCode, MigrationId};
use limosa_testing::{forward_link, memfd};

#[test]
fn a_device_of_every_flag_set_moves() {
    for flags in MigrationFlags::SETS {
        let (source, destination) = world("dev", flags, 100_000);
        let data = source.data();
        let ends = Ends::new(vec![source], vec![destination]);
        let (outcome, received) = ends.run_plain();
        let Outcome::Moved(report) = &outcome else { panic!("{flags}: {outcome:?}") };
        assert_eq!(report.bytes.device_bytes, 100_020);
        let precopies = flags.contains(MigrationFlags::PRE_COPY);
        assert_eq!(report.devices[0].precopy_bytes > 0, precopies, "{flags}");
        assert!(report.downtime_ns.is_some_and(|ns| ns <= report.total_ns));
        let Received::Runs(theirs) = &received else { panic!("{received:?}") };
        assert_eq!(theirs.bytes, report.bytes);
        assert_eq!(theirs.id, report.id);
        assert!(ends.check(outcome, received, &flags.to_string()));
        assert_eq!(ends.destination[0].data(), data);
    }
}

#[test]
fn precopy_can_be_left_out() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 5000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.options.precopy = false;
    let (outcome, received) = ends.run_plain();
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert_eq!(report.devices[0].precopy_bytes, 0);
    assert!(ends.check(outcome, received, "without pre-copy"));
}

#[test]
fn several_devices_of_different_flags_move_together() {
    let (sources, destinations) =
        MigrationFlags::SETS.iter().map(|flags| world(&flags.to_string(), *flags, 3000)).unzip();
    let ends = Ends::new(sources, destinations);
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "four devices"));
}

#[test]
fn a_device_without_state_and_a_move_without_devices_work() {
    let (source, destination) = world("empty", MigrationFlags::SETS[0], 0);
    let ends = Ends::new(vec![source], vec![destination]);
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "no state"));
    let mut ends = Ends::new(vec![], vec![]);
    ends.memory = Some((Arc::new(VecPages::new(8192)), Arc::new(VecPages::new(8192)), 8192));
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "no device"));
    // Of nothing at all there is no move.
    let ends = Ends::new(vec![], vec![]);
    let (Outcome::Undone { why, .. }, _) = ends.run_plain() else { panic!("nothing was moved") };
    assert!(why.to_string().contains("it offers no device and no memory"), "{why}");
}

#[test]
fn memory_that_the_device_writes_during_the_move_arrives() {
    const PAGES: u64 = 600;
    for flags in MigrationFlags::SETS {
        let (source, destination) = world("dma", flags, 300_000);
        let (mut here, there) = (memfd(PAGES * PAGE_BYTES), memfd(PAGES * PAGE_BYTES));
        for page in (0..PAGES).filter(|page| page % 3 != 0) {
            here.seek(std::io::SeekFrom::Start(page * PAGE_BYTES)).unwrap();
            here.write_all(&[page as u8 | 1; 100]).unwrap();
        }
        source.map(&here, PAGES * PAGE_BYTES);
        let mut ends = Ends::new(vec![source], vec![destination]);
        ends.memory =
            Some((Arc::new(FilePages::new(here, 0)), Arc::new(FilePages::new(there, 0)), PAGES * PAGE_BYTES));
        let (outcome, received) = ends.run_plain();
        let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
        // The device may have written a page that was zero before it was sent.
        let moved = report.bytes.zero_bytes + report.bytes.memory_bytes;
        assert!(report.bytes.zero_bytes > 0 && moved >= PAGES * PAGE_BYTES, "{:?}", report.bytes);
        assert!(report.bytes.memory_bytes >= PAGES / 3 * 2 * PAGE_BYTES, "{:?}", report.bytes);
        assert!(ends.check(outcome, received, &flags.to_string()));
    }
}

#[test]
fn stale_pages_of_the_destination_are_overwritten_with_zeroes() {
    let (source, destination) = world("dma", MigrationFlags::SETS[3], 100);
    let (here, there) = (VecPages::new(1 << 16), VecPages::new(1 << 16));
    there.0.lock().unwrap().fill(0xee);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.memory = Some((Arc::new(here), Arc::new(there), 1 << 16));
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "zeroes"));
}

#[test]
fn sockets_of_both_kinds_carry_a_move() {
    let directory = tempfile::tempdir().unwrap();
    for address in [Address::Unix(directory.path().join("link")), Address::Tcp("127.0.0.1".into(), 0)] {
        let (source, destination) = world("dev", MigrationFlags::SETS[3], 3 << 20);
        let ends = Ends::new(vec![source], vec![destination]);
        let listener = Listener::bind(&address).unwrap();
        let limit = Duration::from_secs(10);
        let near = connect(listener.address(), limit).unwrap();
        let far = listener.accept(Wait::within(limit, None)).unwrap();
        let (outcome, received) = ends.run(near, far);
        assert!(ends.check(outcome, received, &address.to_string()));
    }
}

#[test]
fn a_local_move_works() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 3 << 20);
    let ends = Ends::new(vec![source], vec![destination]);
    let (outcome, received) =
        ends.with_source(|source| ends.with_destination(|destination| move_local(source, destination)));
    assert!(ends.check(outcome, received, "local"));
}

/// What a refused offer says, on both sides.
fn refused(ends: &Ends) -> String {
    let (outcome, received) = ends.run_plain();
    let Outcome::Undone { why: Error::Incompatible { reasons }, report } = &outcome else {
        panic!("{outcome:?}")
    };
    assert!(report.phases.iter().all(|phase| phase.phase == Phase::Handshake), "nothing was touched");
    let text = reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if let Received::Discarded { why, .. } = &received {
        assert!(matches!(why, Error::Incompatible { .. } | Error::Link { .. }), "{why}");
    }
    assert!(!ends.check(outcome, received, "refused"));
    text
}

#[test]
fn incompatible_ends_are_refused_with_the_reason_before_anything_moves() {
    let flags = MigrationFlags::SETS[3];
    let (source, destination) = world("dev", flags, 10);
    let (extra, _) = world("extra", flags, 10);
    let ends = Ends::new(vec![source, extra], vec![destination]);
    assert!(refused(&ends).contains("the source has 2 devices, the destination 1"));

    let (source, _) = world("dev", flags, 10);
    let (_, destination) = world("dev", MigrationFlags::empty(), 10);
    let ends = Ends::new(vec![source], vec![destination]);
    let (outcome, _) = ends.run_plain();
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why.to_string().contains("dev-destination: it has no migration"), "{why}");

    let (source, destination) = world("dev", flags, 10);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.memory = Some((Arc::new(VecPages::new(8192)), Arc::new(VecPages::new(8192)), 8192));
    let text = ends.with_source(|source| {
        let (near, far) = limosa_migrate::link::SocketLink::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let devices = [MovedDevice::new(&ends.destination[0].client)];
                let destination = limosa_migrate::Destination::new(&devices, &ends.ledger, &ends.options)
                    .with_vmm(&limosa_migrate::Nobody)
                    .with_observer(&limosa_migrate::Nobody);
                destination.receive(&far)
            });
            let Outcome::Undone { why, .. } = source.send(&near) else { panic!() };
            drop(near);
            why.to_string()
        })
    });
    assert!(text.contains("only the source has memory 0"), "{text}");
}

#[test]
fn kinds_that_both_know_must_agree() {
    let (source, destination) = world("dev", MigrationFlags::SETS[0], 10);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.kinds = (Some("uart".into()), Some("nvme".into()));
    let (outcome, _) = ends.run_plain();
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why.to_string().contains("the source's kind is uart, this one's is nvme"), "{why}");
}

#[test]
fn a_device_that_is_in_use_is_not_taken() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 10);
    let _session = destination.client.set_state(State::Resuming).unwrap();
    let ends = Ends::new(vec![source], vec![destination]);
    let (outcome, _) = ends.run_plain();
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why.to_string().contains("it is in RESUMING"), "{why}");
    assert_eq!(ends.destination[0].state(), State::Resuming, "left alone");
}

#[test]
fn devices_found_in_stop_are_returned_to_stop() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 10);
    source.client.set_state(State::Stop).unwrap();
    destination.client.set_state(State::Stop).unwrap();
    destination.fail(
        crate::common::Step::LoadFinish,
        0,
        limosa_device::Fault::Refused(limosa_protocol::Errno::EIO),
    );
    let ends = Ends::new(vec![source], vec![destination]);
    let (outcome, received) = ends.run_plain();
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
    assert_eq!(ends.source[0].state(), State::Stop);
    assert_eq!(ends.destination[0].state(), State::Stop);
}

/// Cancels when a phase begins.
struct CancelAt(Phase, Cancel);

impl Observer for CancelAt {
    fn phase(&self, phase: Phase) {
        if phase == self.0 {
            self.1.cancel();
        }
    }
}

#[test]
fn a_cancel_undoes_at_every_phase_until_the_commit() {
    for phase in [Phase::Handshake, Phase::PreCopy, Phase::Stop, Phase::StopCopy, Phase::Load, Phase::Commit]
    {
        let (source, destination) = world("dev", MigrationFlags::SETS[3], 10_000);
        let mut ends = Ends::new(vec![source], vec![destination]);
        ends.cancel = Some(Cancel::new().unwrap());
        ends.observer = Arc::new(CancelAt(phase, ends.cancel.clone().unwrap()));
        let (outcome, received) = ends.run_plain();
        let Outcome::Undone { why: Error::Cancelled, .. } = &outcome else {
            panic!("{phase:?}: {outcome:?}")
        };
        assert!(!ends.check(outcome, received, phase.name()));
    }
}

#[test]
fn a_cancel_wakes_a_source_that_waits() {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 10);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.cancel = Some(Cancel::new().unwrap());
    // Nobody answers at the far end.
    let (near, far) = limosa_migrate::link::SocketLink::pair().unwrap();
    let outcome = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| ends.with_source(|source| source.send(&near)));
        ends.cancel.as_ref().unwrap().cancel();
        // Its last words are not waited for either.
        drop(far);
        waiting.join().unwrap()
    });
    assert!(matches!(outcome, Outcome::Undone { why: Error::Cancelled, .. }), "{outcome:?}");
}

/// Takes this number of bytes, then calls the move off.
struct CancelAfter(SocketLink, AtomicUsize, Cancel);

impl Link for CancelAfter {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let left = self.1.load(Ordering::SeqCst);
        if left == 0 {
            self.2.cancel();
        }
        wait.left()?;
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        // After the cancel there is room for all.
        let room = if self.2.is_cancelled() { bytes.len() } else { left.min(bytes.len()) };
        let written = self.0.write(&[IoSlice::new(&bytes[..room])], wait)?;
        self.1.store(left.saturating_sub(written), Ordering::SeqCst);
        Ok(written)
    }
    forward_link!(|this| this.0; read, finish, peer);
}

#[test]
fn a_cancel_within_a_frame_does_not_garble_the_word_of_it() {
    for taken in [0, 1, 40, 41, 72, 100, 500, 600, 700, 1000, 2000] {
        let (source, destination) = world("dev", MigrationFlags::SETS[3], 3000);
        let mut ends = Ends::new(vec![source], vec![destination]);
        let cancel = Cancel::new().unwrap();
        ends.cancel = Some(cancel.clone());
        let (near, far) = SocketLink::pair().unwrap();
        let (outcome, received) = ends.run(CancelAfter(near, AtomicUsize::new(taken), cancel), far);
        assert!(matches!(outcome, Outcome::Undone { why: Error::Cancelled, .. }), "{taken}: {outcome:?}");
        let Received::Discarded { why, .. } = &received else { panic!("{taken}: {received:?}") };
        // Within the preface nothing can be said yet.
        let said = matches!(why, Error::Aborted { code: AbortCode::Cancelled, .. });
        assert!(said || taken < 40, "{taken}: {why}");
        assert!(!ends.check(outcome, received, "cancelled within a frame"));
    }
}

/// Refuses, or tells in which order it was called.
#[derive(Default)]
struct TestVmm {
    /// The method that refuses, by name.
    refuses: &'static str,
    committing: Mutex<Option<MigrationId>>,
    stopped: AtomicBool,
    resumed: AtomicBool,
    started: AtomicBool,
}

impl Vmm for TestVmm {
    fn stop(&self) -> Result<(), String> {
        self.stopped.store(true, Ordering::SeqCst);
        if self.refuses == "stop" { Err("vcpu 3 does not answer".into()) } else { Ok(()) }
    }
    fn committing(&self, note: &CommitNote) -> Result<(), String> {
        *self.committing.lock().unwrap() = Some(note.id);
        if self.refuses == "committing" { Err("the disk is full".into()) } else { Ok(()) }
    }
    fn resume(&self) {
        self.resumed.store(true, Ordering::SeqCst);
    }
    fn prepare(&self) -> Result<(), String> {
        if self.refuses == "prepare" { Err("no memory for a vcpu".into()) } else { Ok(()) }
    }
    fn start(&self) {
        self.started.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_vmm_can_refuse_on_either_side_and_is_told_to_go_on() {
    for refuses in ["nothing", "stop", "committing", "prepare"] {
        let (source, destination) = world("dev", MigrationFlags::SETS[3], 10_000);
        let mut ends = Ends::new(vec![source], vec![destination]);
        let vmm = Arc::new(TestVmm { refuses, ..Default::default() });
        ends.vmm = vmm.clone();
        let (outcome, received) =
            ends.with_source(|source| ends.with_destination(|destination| move_local(source, destination)));
        let noted = vmm.committing.lock().unwrap().map(|id| id.to_string());
        let (Outcome::Moved(report) | Outcome::Undone { report, .. }) = &outcome else {
            panic!("{refuses}: {outcome:?}")
        };
        assert_eq!(noted, (refuses != "stop").then(|| report.id.clone()), "{refuses}");
        let moved = ends.check(outcome, received, refuses);
        let undone = refuses != "nothing";
        assert_eq!(moved, !undone);
        assert!(vmm.stopped.load(Ordering::SeqCst));
        assert_eq!(vmm.resumed.load(Ordering::SeqCst), undone);
        assert_eq!(vmm.started.load(Ordering::SeqCst), !undone);
    }
}

#[test]
fn a_device_without_p2p_beside_others_moved_without_a_word() {
    let flags = |p2p: bool| if p2p { MigrationFlags::SETS[3] } else { MigrationFlags::SETS[0] };
    for (have_p2p, named) in [
        (&[true, false, true, false][..], Some(": dev1-source, dev3-source;")),
        (&[true, true], None),
        (&[false], None),
    ] {
        let worlds =
            have_p2p.iter().enumerate().map(|(at, p2p)| world(&format!("dev{at}"), flags(*p2p), 300));
        let (source, destination) = worlds.unzip();
        let ends = Ends::new(source, destination);
        let (outcome, _) = ends.run_plain();
        let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
        let note = report.notes.iter().find(|note| note.starts_with("without P2P"));
        assert_eq!(note.is_some(), named.is_some(), "{:?}", report.notes);
        assert!(named.is_none_or(|named| note.unwrap().contains(named)), "{note:?}");
    }
}
