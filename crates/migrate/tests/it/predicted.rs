//! Predictions of the downtime that were far too long, so that a short stop was refused.

use std::thread;
use std::time::Duration;

use crate::common::hooked::{Call, Hooked, before, ends_in_time, move_over_a_link};

use crate::common::{move_over_links, options};
use limosa_client::DeviceExt;
use limosa_device::{Loopback, Machine};
use limosa_migrate::link::{Bandwidth, LimitedLink};
use limosa_migrate::{
    Convergence, Destination, Error, Ledger, MovedDevice, Obstacle, Options, Outcome, Received, Source,
    WhenStalled,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::{MigrationFlags, State};

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];

fn aborting(goal: Duration) -> Options {
    let wanted = Convergence::default().with_downtime_goal(goal).with_when_stalled(WhenStalled::Abort);
    options().with_convergence(wanted)
}

fn synthetic(name: &str, config: &str) -> Loopback {
    let config: SyntheticConfig = config.parse().unwrap();
    Loopback::new(name, Machine::simple(Synthetic::new(config).unwrap()))
}

#[test]
fn data_that_was_loaded_long_ago_was_counted_as_being_on_its_way() {
    ends_in_time("a device over a slow link", || {
        // The destination acknowledges 2 MiB. The rest, at this rate, would take longer than the goal.
        let (source, destination) =
            (synthetic("source", "state=3584K"), synthetic("there", "state=3584K,seed=9"));
        let options = aborting(Duration::from_millis(600));
        let (here, there, ledger) =
            ([MovedDevice::new(&source)], [MovedDevice::new(&destination)], Ledger::new());
        let bandwidth = Bandwidth::new(2 << 20);
        let (outcome, received) = move_over_links(
            Source::new(&here, &options),
            Destination::new(&there, &ledger, &options),
            |_, inner| Box::new(LimitedLink::new(inner, Some(bandwidth.clone()))),
        );
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
        assert_eq!(source.state().unwrap(), State::Stop);
    });
}

/// A move of a device with slow arcs.
fn moved(source: &Hooked, goal: Duration) -> Outcome {
    let (destination, options, ledger) = (Hooked::new("there", FLAGS, &[]), aborting(goal), Ledger::new());
    let (here, there) = ([MovedDevice::new(source)], [MovedDevice::new(&destination)]);
    let (outcome, _) =
        move_over_a_link(Source::new(&here, &options), Destination::new(&there, &ledger, &options));
    if let Outcome::Moved(_) = outcome {
        assert_eq!(destination.data(), [7; 3000]);
    }
    outcome
}

#[test]
fn one_arc_that_was_slow_once_was_counted_five_times() {
    ends_in_time("a device that is slow once", || {
        let slow = before(Call::Set(State::PreCopy), |_| thread::sleep(Duration::from_millis(500)));
        let source = Hooked::new("source", FLAGS, &[7; 3000]).hook(slow);
        let outcome = moved(&source, Duration::from_secs(2));
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    });
}

#[test]
fn arcs_that_are_always_slow_are_named_and_not_the_few_bytes_of_a_device() {
    ends_in_time("a device that is always slow", || {
        let source = Hooked::new("source", FLAGS, &[7; 3000]).on(|_, call| {
            if matches!(call, Call::Set(_)) {
                thread::sleep(Duration::from_millis(50));
            }
        });
        let outcome = moved(&source, Duration::from_millis(100));
        let Outcome::Undone { why: Error::NotConverging { obstacle, .. }, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(obstacle, Obstacle::Latency);
        assert!(source.state().is_running());
    });
}
