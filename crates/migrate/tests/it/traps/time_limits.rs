//! Options that are a time: without end, and of nothing.

use std::time::Duration;

use limosa_migrate::{
    Convergence, Destination, Ledger, Memory, MovedDevice, Options, Outcome, Received, Source,
};
use limosa_protocol::State;

use super::{FLAGS, Log, region};
use crate::common::hooked::{Hooked, ends_in_time, move_over_a_link};
use crate::common::{VecPages, options};

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
