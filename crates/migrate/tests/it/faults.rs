//! Everything that can fail, failing, at every place: after each, the invariants hold. Never do two
//! run; never does none without being in doubt, and doubt is resolved by asking; the source has its
//! logs stopped; the destination has nothing left of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{Ends, Fault as LinkFault, FaultyLink, Step, VecPages, Way, options, world};
use limosa_device::Fault;
use limosa_migrate::link::{Link, SocketLink};
use limosa_migrate::{Error, Outcome, Received};
use limosa_protocol::{Errno, MigrationFlags, State};
use limosa_stream::{HEADER_BYTES, PROOF_BYTES};

/// A device that streams in pre-copy, so that no two moves have the same bytes at the same place.
const FLAGS: MigrationFlags = MigrationFlags::SETS[3];
/// A device all of whose data comes after the stop, in a stream that is always the same.
const EXACT: MigrationFlags = MigrationFlags::STOP_COPY.union(MigrationFlags::P2P);

fn ends() -> Ends {
    ends_with(EXACT)
}

fn ends_with(flags: MigrationFlags) -> Ends {
    let (source, destination) = world("dev", flags, 300);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let pages = || {
        let pages = VecPages::new(4 * 4096);
        pages.0.lock().unwrap()[5000] = 1;
        Arc::new(pages)
    };
    ends.memory = Some((pages(), pages(), 4 * 4096));
    ends
}

/// Bytes that the source sends and receives in a whole move.
fn lengths() -> (u64, u64) {
    let ends = ends();
    let (near, far) = SocketLink::pair().unwrap();
    let near = FaultyLink::new(near, Way::Out, u64::MAX, LinkFault::Cut);
    let (sent, received) = (Arc::clone(&near.sent), Arc::clone(&near.received));
    let (outcome, there) = ends.run(near, far);
    assert!(ends.check(outcome, there, "no fault"));
    (sent.load(Ordering::SeqCst), received.load(Ordering::SeqCst))
}

/// Of a frame that has only a proof: COMMIT, RUNNING, DONE.
const WORD: u64 = (HEADER_BYTES + PROOF_BYTES) as u64;

/// Where to fail: every byte of the last frames, some of every frame before.
fn places(bytes: u64) -> impl Iterator<Item = u64> {
    (0..bytes).filter(move |at| at + 3 * WORD + 6 > bytes || at % if *at < 1200 { 11 } else { 61 } == 0)
}

/// One move with a fault in what one side sends; whether it was moved.
fn with_fault(way: Way, at: u64, fault: LinkFault, change: impl FnOnce(&mut Ends)) -> bool {
    fails(ends(), way, at, fault, change)
}

fn fails(mut ends: Ends, way: Way, at: u64, fault: LinkFault, change: impl FnOnce(&mut Ends)) -> bool {
    change(&mut ends);
    let (near, far) = SocketLink::pair().unwrap();
    let what = format!("{fault:?} at byte {at}, {way:?}");
    let (outcome, received) = match way {
        Way::Out => ends.run(FaultyLink::new(near, Way::Out, at, fault), far),
        Way::In => ends.run(near, FaultyLink::new(far, Way::Out, at, fault)),
    };
    ends.check(outcome, received, &what)
}

#[test]
fn a_link_cut_at_any_byte_leaves_one_side_running() {
    let (out, back) = lengths();
    let mut moved = [0, 0];
    for at in places(out) {
        moved[0] += u32::from(with_fault(Way::Out, at, LinkFault::Cut, |_| {}));
    }
    for at in places(back) {
        moved[1] += u32::from(with_fault(Way::In, at, LinkFault::Cut, |_| {}));
    }
    assert_eq!(moved[0], WORD as u32, "COMMIT arrived whole, then only DONE was cut");
    assert_eq!(moved[1], WORD as u32, "cut within RUNNING: the source learns of the move by asking");
}

#[test]
fn a_link_cut_for_the_reader_leaves_one_side_running() {
    let (_, back) = lengths();
    for at in places(back) {
        let ends = ends();
        let (near, far) = SocketLink::pair().unwrap();
        let (outcome, received) = ends.run(FaultyLink::new(near, Way::In, at, LinkFault::Cut), far);
        ends.check(outcome, received, &format!("source cannot read beyond {at}"));
    }
}

#[test]
fn a_link_that_fails_anywhere_while_a_device_streams_leaves_one_side_running() {
    let (out, back) = lengths();
    for fault in [LinkFault::Cut, LinkFault::Flip(3)] {
        for at in (0..out + 200).step_by(43) {
            fails(ends_with(FLAGS), Way::Out, at, fault, |_| {});
        }
        for at in (0..back + 200).step_by(23) {
            fails(ends_with(FLAGS), Way::In, at, fault, |_| {});
        }
    }
}

#[test]
fn every_altered_byte_is_noticed() {
    let (out, back) = lengths();
    for at in places(out) {
        let bit = (at % 8) as u8;
        let moved = with_fault(Way::Out, at, LinkFault::Flip(bit), |_| {});
        assert_eq!(moved, at >= out - WORD, "byte {at} of the source's: only DONE may be altered");
    }
    for at in places(back) {
        // An altered RUNNING is no RUNNING, but the destination does run.
        let moved = with_fault(Way::In, at, LinkFault::Flip((at % 8) as u8), |_| {});
        assert_eq!(moved, at >= back - WORD, "byte {at} of the destination's");
    }
}

/// For faults that show by silence only.
fn hasty(ends: &mut Ends) {
    let short = Duration::from_millis(120);
    ends.options = options().with_silence_max(short).with_load_max(short).with_commit_max(short);
}

#[test]
fn a_link_that_falls_silent_or_loses_a_byte_is_given_up() {
    let (out, back) = lengths();
    std::thread::scope(|scope| {
        let run = |way, at, fault| {
            scope.spawn(move || with_fault(way, at, fault, hasty));
        };
        for fault in [LinkFault::Swallow, LinkFault::Drop] {
            (0..12).for_each(|part| run(Way::Out, part * out / 12, fault));
            (1..64).step_by(9).for_each(|before_end| run(Way::Out, out - before_end, fault));
            (0..back).step_by(17).for_each(|at| run(Way::In, at, fault));
        }
    });
}

#[test]
fn a_source_that_is_killed_at_any_frame_leaves_the_destination_empty() {
    // The source's process is gone: its link closes, and nobody asks.
    let (out, _) = lengths();
    let committed = out - WORD;
    for at in (0..committed).step_by(97).chain(committed - WORD - 1..committed) {
        let ends = ends();
        let (near, far) = SocketLink::pair().unwrap();
        let (outcome, received) = std::thread::scope(|scope| {
            let ends = &ends;
            let received =
                scope.spawn(move || ends.with_destination(|destination| destination.receive(&far)));
            let near = FaultyLink::new(near, Way::Out, at, LinkFault::Cut);
            let outcome = ends.with_source(|source| source.send(&near));
            (outcome, received.join().unwrap())
        });
        drop(outcome);
        assert!(matches!(received, Received::Discarded { .. }), "{at}: {received:?}");
        assert!(!ends.destination[0].holds_guest(), "{at}");
        assert_eq!(ends.destination[0].state(), State::Running, "{at}");
    }
}

#[test]
fn a_destination_that_has_no_word_of_the_source_s_knowing_says_so() {
    let (out, back) = lengths();
    for (way, at) in [(Way::Out, out - 1), (Way::In, back - 1)] {
        let ends = ends();
        let (near, far) = SocketLink::pair().unwrap();
        let (outcome, received) = match way {
            Way::Out => ends.run(FaultyLink::new(near, Way::Out, at, LinkFault::Cut), far),
            Way::In => ends.run(near, FaultyLink::new(far, Way::Out, at, LinkFault::Cut)),
        };
        let Received::Runs(report) = &received else { panic!("{received:?}") };
        assert!(!report.peer_told, "{way:?}");
        assert!(ends.check(outcome, received, "the last word is lost"));
    }
    let ends = ends();
    let (_, received) = ends.run_plain();
    assert!(matches!(received, Received::Runs(report) if report.peer_told));
}

#[test]
fn a_device_that_refuses_any_arc_on_either_side_leaves_the_source_running() {
    for flags in MigrationFlags::SETS {
        for step in Step::ALL {
            for after in 0..3 {
                for at_source in [true, false] {
                    let what = format!("{flags}: {step:?} refused after {after} at the source: {at_source}");
                    let (source, destination) = world("dev", flags, 5000);
                    let device = if at_source { &source } else { &destination };
                    device.fail(step, after, Fault::Refused(Errno::EIO));
                    let ends = Ends::new(vec![source], vec![destination]);
                    let (outcome, received) = ends.run_plain();
                    if let Outcome::Undone { why, .. } = &outcome {
                        assert!(why.to_string().contains("EIO"), "{what}: {why}");
                    }
                    ends.check(outcome, received, &what);
                }
            }
        }
    }
}

#[test]
fn a_device_that_breaks_at_the_destination_leaves_the_source_running() {
    for flags in MigrationFlags::SETS {
        for step in Step::ALL {
            for after in 0..2 {
                let (source, destination) = world("dev", flags, 5000);
                destination.fail(step, after, Fault::Broken(Errno::EIO));
                let ends = Ends::new(vec![source], vec![destination]);
                let (outcome, received) = ends.run_plain();
                ends.check(outcome, received, &format!("{flags}: {step:?} broken after {after}"));
            }
        }
    }
}

#[test]
fn a_device_that_breaks_at_the_source_is_reset_and_named() {
    for flags in MigrationFlags::SETS {
        for step in [Step::Stop, Step::SaveBegin] {
            let (source, destination) = world("dev", flags, 5000);
            source.fail(step, 0, Fault::Broken(Errno::EIO));
            let ends = Ends::new(vec![source], vec![destination]);
            let (outcome, received) = ends.run_plain();
            let Outcome::Undone { report, .. } = outcome else { panic!("{outcome:?}") };
            let told = report.notes.iter().any(|note| note.contains("had to be reset: its state is lost"));
            assert!(told, "{flags} {step:?}: {:?}", report.notes);
            assert_eq!(ends.source[0].state(), State::Running);
            assert!(matches!(received, Received::Discarded { .. }));
            assert!(!ends.destination[0].holds_guest());
        }
    }
}

#[test]
fn a_second_device_that_fails_takes_the_first_back() {
    for step in Step::ALL {
        for at_source in [true, false] {
            let (mut sources, mut destinations) = (Vec::new(), Vec::new());
            for name in ["one", "two"] {
                let (source, destination) = world(name, FLAGS, 5000);
                sources.push(source);
                destinations.push(destination);
            }
            let device = if at_source { &sources[1] } else { &destinations[1] };
            device.fail(step, 0, Fault::Refused(Errno::EIO));
            let ends = Ends::new(sources, destinations);
            let (outcome, received) = ends.run_plain();
            ends.check(outcome, received, &format!("{step:?} at the second, source: {at_source}"));
        }
    }
}

#[test]
fn a_destination_that_cannot_start_gives_the_guest_back() {
    let (source, destination) = world("dev", FLAGS, 5000);
    destination.fail(Step::Start, 0, Fault::Refused(Errno::EIO));
    let ends = Ends::new(vec![source], vec![destination]);
    let (outcome, received) = ends.run_plain();
    let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = &outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("entering RUNNING"), "{reason}");
    assert!(!ends.check(outcome, received, "start"));
}

#[test]
fn a_destination_that_can_neither_start_nor_be_reset_keeps_the_guest() {
    let (source, destination) = world("dev", FLAGS, 5000);
    let twice = world("other", FLAGS, 10);
    destination.fail(Step::Reset, 0, Fault::Refused(Errno::EIO));
    twice.1.fail(Step::Start, 0, Fault::Refused(Errno::EIO));
    let ends = Ends::new(vec![source, twice.0], vec![destination, twice.1]);
    let (outcome, received) = ends.run_plain();
    assert!(matches!(received, Received::Broken { .. }), "{received:?}");
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    let outcome = ends.resolve(doubt);
    assert!(matches!(outcome, Outcome::Moved(_)), "only the destination may run: {outcome:?}");
    assert!(ends.source.iter().all(|device| device.state() == State::Stop));
}

#[test]
fn asking_for_a_move_that_still_holds_takes_it_back() {
    let (out, _) = lengths();
    let mut ends = ends();
    // Only the source is in a hurry; its COMMIT is swallowed, and the old link stays open.
    let short = Duration::from_millis(1500);
    ends.source_options = Some(options().with_commit_max(short).with_silence_max(short));
    let (near, far) = SocketLink::pair().unwrap();
    let (outcome, received) = std::thread::scope(|scope| {
        let ends = &ends;
        let received = scope.spawn(move || ends.with_destination(|destination| destination.receive(&far)));
        let near = FaultyLink::new(near, Way::Out, out - 2 * WORD, LinkFault::Swallow);
        let outcome = ends.with_source(|source| source.send(&near));
        let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
        assert!(!ends.source[0].state().is_running(), "in doubt");
        assert_eq!(ends.destination[0].state(), State::Stop, "it holds");
        let outcome = ends.resolve(doubt);
        drop(near);
        (outcome, received.join().unwrap())
    });
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert!(!ends.check(outcome, received, "asked while it held"));
}

#[test]
fn a_destination_that_was_started_anew_leaves_the_source_in_doubt() {
    let (_, back) = lengths();
    let mut ends = ends();
    let (near, far) = SocketLink::pair().unwrap();
    let (outcome, received) = ends.run(near, FaultyLink::new(far, Way::Out, back - 1, LinkFault::Cut));
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    let remembers = std::mem::take(&mut ends.ledger);
    let Outcome::InDoubt(doubt) = ends.resolve(doubt) else { panic!("it cannot know") };
    assert!(!ends.source[0].state().is_running());
    ends.ledger = remembers;
    // The source too may be started anew: its note is all it needs.
    let outcome = ends.resolve(limosa_migrate::InDoubt::recover(doubt.note().clone()));
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert!(ends.check(outcome, received, "asked twice"));
}

#[test]
fn a_peer_that_is_not_one_is_refused() {
    // Neither end may hang, or take for a move, what any program might send.
    for noise in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0; 40], &[0xff; 4096]] {
        let mut ends = ends();
        hasty(&mut ends);
        let (near, far) = SocketLink::pair().unwrap();
        let wait = limosa_migrate::link::Wait::within(Duration::from_secs(1), None);
        if !noise.is_empty() {
            near.write(&[std::io::IoSlice::new(noise)], wait).unwrap();
        }
        near.finish();
        let received = ends.with_destination(|destination| destination.receive(&far));
        let Received::Discarded { why, .. } = received else { panic!("{received:?}") };
        assert!(matches!(why, Error::Stream { .. } | Error::Link { .. }), "{why}");
        let (near, far) = SocketLink::pair().unwrap();
        if !noise.is_empty() {
            far.write(&[std::io::IoSlice::new(noise)], wait).unwrap();
        }
        far.finish();
        let outcome = ends.with_source(|source| source.send(&near));
        assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
        assert_eq!(ends.source[0].state(), State::Running);
        assert_eq!(ends.destination[0].state(), State::Running);
    }
}
