//! Panics of a device, in any call and in several in a row.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use limosa_migrate::{Error, Outcome, Received};
use limosa_protocol::{MigrationFlags, State};

use super::{FLAGS, Machine, panicked};
use crate::common::hooked::{Call, Hook, before, ends_in_time, panic_quietly};

/// Panics before a number of calls in a row, from the n-th on. Whether there was such a call.
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
