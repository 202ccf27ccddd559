//! What the simulation has found, each held to what it was.

use std::time::Duration;

use limosa_migrate::Phase;

use crate::plan::{End, Fault, LinkPlan, Plan, Planned, When};
use crate::play;

/// Moves with this fault at any of so many points of a phase of the source's.
#[track_caller]
fn keeps_the_contract(phase: Phase, points: u64, fault: Fault, suits: impl Fn(&mut Plan)) {
    for point in 0..points {
        let mut plan = Plan::new(point);
        plan.faults = vec![Planned { when: When::Phase(End::Source, phase, point * 3), fault }];
        suits(&mut plan);
        if let Err(failure) = play(&plan, false) {
            panic!("{fault:?} at point {}: {failure}", point * 3);
        }
    }
}

#[test]
fn the_log_of_a_source_that_died_bars_no_later_move() {
    keeps_the_contract(Phase::PreCopy, 20, Fault::Crash { end: End::Source, silent: false }, |plan| {
        plan.regions = vec![8];
        plan.devices.iter_mut().for_each(|device| device.logs = true);
    });
}

#[test]
fn the_log_of_a_device_that_could_not_be_reached_bars_no_later_move() {
    keeps_the_contract(Phase::PreCopy, 20, Fault::DeviceGone(End::Source, 0), |plan| {
        plan.regions = vec![8];
        plan.devices.iter_mut().for_each(|device| device.logs = true);
    });
}

#[test]
fn a_further_link_that_falls_silent_at_the_end_holds_nobody_for_ever() {
    keeps_the_contract(Phase::StopCopy, 25, Fault::Silence(End::Source, 1), |plan| {
        let bytes_per_second = 1 << 24;
        let link = LinkPlan { latency: Duration::from_micros(300), bytes_per_second, buffer_bytes: 8192 };
        (plan.links, plan.links_taken) = (vec![link; 2], 2);
    });
}
