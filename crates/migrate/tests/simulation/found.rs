//! What the simulation has found, each held to what it was.

use std::time::Duration;

use limosa_migrate::{AfterSave, MemoryChecksums, Phase};

use crate::panics::Place;
use crate::plan::{End, Fault, LinkPlan, Mutation, Plan, Planned, When};
use crate::play;

/// Moves with this fault at any of a number of points of a phase of the source.
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
        let link = LinkPlan {
            latency: Duration::from_micros(300),
            bytes_per_second,
            buffer_bytes: 8192,
            is_authenticated: false,
            finds_damage: false,
        };
        (plan.links, plan.links_taken) = (vec![link; 2], 2);
    });
}

#[test]
fn memory_without_checksums_came_over_a_further_link_of_which_that_was_not_agreed() {
    for seed in 0..40 {
        let mut plan = Plan::new(seed);
        let link = |is_authenticated| LinkPlan {
            latency: Duration::from_micros(300),
            bytes_per_second: 1 << 24,
            buffer_bytes: 8192,
            is_authenticated,
            finds_damage: is_authenticated,
        };
        (plan.links, plan.links_taken) = (vec![link(true), link(false)], 2);
        plan.checksums = [MemoryChecksums::Never, MemoryChecksums::UnlessAuthenticated];
        (plan.faults, plan.saves, plan.mutation) = (Vec::new(), None, None);
        if let Err(failure) = play(&plan, false) {
            panic!("seed {seed}: {failure}");
        }
    }
}

const SEEDS: u64 = 60;

/// A save that leaves the guest stopped, whose publication fails in one way or another.
fn publication_fails(seed: u64, mutation: Option<Mutation>) -> Plan {
    let mut plan = Plan::new(seed);
    let when = When::Phase(End::Source, Phase::Handshake, 0);
    plan.faults = vec![Planned { when, fault: Fault::PublicationFails }];
    (plan.saves, plan.mutation) = (Some(AfterSave::Stop), mutation);
    plan
}

#[test]
fn a_guest_ran_again_though_its_snapshot_was_published_and_only_the_answer_lost() {
    let in_doubt = (0..SEEDS).filter(|seed| match play(&publication_fails(*seed, None), false) {
        Ok(summary) => summary.in_doubt,
        Err(failure) => panic!("seed {seed}: {failure}"),
    });
    let count = in_doubt.count();
    assert!(count > 15, "{count}");
    // That the check can fail: a source that runs again without a look.
    let found =
        (0..SEEDS).find_map(|seed| play(&publication_fails(seed, Some(Mutation::RunsInDoubt)), false).err());
    assert!(found.is_some_and(|found| found.contains("in doubt, and the source runs")));
}

#[test]
fn threads_that_the_system_refuses_end_a_move_before_a_device_is_touched() {
    for end in End::BOTH {
        for after in 0..14 {
            let mut plan = Plan::new(after);
            let fault = Fault::RefuseThreads(end, after);
            plan.faults = vec![Planned { when: When::Point(end, 1), fault }];
            plan.saves = None;
            if let Err(failure) = play(&plan, false) {
                panic!("{fault:?}: {failure}");
            }
        }
    }
}

#[test]
fn a_panic_of_a_device_loses_no_dirty_page() {
    for phase in [Phase::Handshake, Phase::PreCopy, Phase::StopCopy, Phase::Undo] {
        let points = if phase == Phase::PreCopy { 40 } else { 10 };
        keeps_the_contract(phase, points, Fault::Panic(End::Source, Place::Device(0)), |plan| {
            plan.regions = vec![8];
            plan.devices.iter_mut().for_each(|device| device.logs = true);
            // The logs of the others have been read by then.
            plan.faults[0].fault = Fault::Panic(End::Source, Place::Device(plan.devices.len() - 1));
            if phase == Phase::Undo {
                let when = When::Phase(End::Source, Phase::PreCopy, 100);
                plan.faults.push(Planned { when, fault: Fault::Cancel(End::Source) });
            }
        });
    }
}

#[test]
fn a_panic_of_whatever_the_engine_calls_ends_the_move() {
    for place in Place::OTHERS {
        for end in End::BOTH {
            keeps_the_contract(Phase::PreCopy, 3, Fault::Panic(end, place), |plan| plan.saves = None);
        }
    }
}

#[test]
fn a_saver_that_died_while_it_published_looks_before_its_guest_runs() {
    let crash = Fault::Crash { end: End::Source, silent: false };
    keeps_the_contract(Phase::Commit, 25, crash, |plan| plan.saves = Some(AfterSave::Stop));
}
