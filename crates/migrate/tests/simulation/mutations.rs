//! That the checks find what is wrong: with something broken in what the engine relies on, some seed fails.

use std::time::Duration;

use limosa_migrate::{MemoryChecksums, Phase, WhenStalled};
use limosa_stream::Kind;

use crate::adversary::{Forgery, Proof};
use crate::panics::Place;
use crate::plan::{End, Fault, Mutation, Plan, Planned, When};
use crate::play;

/// That some seed says one of these of a machine with this defect, and nothing of a whole one.
#[track_caller]
fn finds(mutation: Mutation, suits: impl Fn(&mut Plan), says: &[&str]) {
    let mut others = String::new();
    let found = (0..400).any(|seed| {
        let with = |mutation| {
            let mut plan = Plan { mutation, ..Plan::new(seed) };
            suits(&mut plan);
            plan
        };
        let (broken, plan) = (with(Some(mutation)), with(None));
        let Err(found) = play(&broken, false) else {
            return false;
        };
        if !says.iter().any(|says| found.contains(says)) {
            others = found;
            return false;
        }
        assert_eq!(play(&plan, false).err(), None, "seed {seed} is to be whole without the defect");
        true
    });
    assert!(found, "no seed finds {mutation:?}, but: {others}");
}

/// Nothing goes wrong but the defect.
fn calm(plan: &mut Plan) {
    plan.faults.clear();
}

/// This goes wrong, at some step of the phase at the source.
fn at(plan: &mut Plan, phase: Phase, fault: Fault) {
    plan.faults = vec![Planned { when: When::Phase(End::Source, phase, plan.seed % 40), fault }];
}

/// It is no save.
fn moves(plan: &mut Plan) {
    plan.saves = None;
}

fn calm_move(plan: &mut Plan) {
    calm(plan);
    moves(plan);
}

#[test]
fn a_destination_that_runs_before_the_commit_is_found() {
    // A source that goes back runs beside it; one that commits is told that the device is not where it was driven.
    let called_off = |plan: &mut Plan| {
        moves(plan);
        at(plan, Phase::Commit, Fault::Cancel(End::Source));
    };
    finds(Mutation::RunsBeforeCommit, called_off, &["two run"]);
}

#[test]
fn a_guest_that_does_not_stop_is_found() {
    finds(Mutation::NeverStops, calm_move, &["is not what the guest wrote"]);
}

#[test]
fn a_destination_that_runs_a_machine_that_stood_still_is_found() {
    let stands = |plan: &mut Plan| {
        calm_move(plan);
        plan.stands = true;
    };
    finds(Mutation::RunsWhatStood, stands, &["differ in what became of it"]);
}

#[test]
fn a_source_that_runs_in_doubt_is_found() {
    let commit_and_cut = |plan: &mut Plan| {
        plan.faults.retain(|planned| matches!(planned.fault, Fault::Cut(_) | Fault::Silence(..)));
    };
    finds(Mutation::RunsInDoubt, commit_and_cut, &["two run", "differ in what became of it"]);
}

#[test]
fn a_log_that_loses_pages_is_found() {
    finds(Mutation::LogForgets, calm_move, &["is not what the guest wrote"]);
}

#[test]
fn an_undo_that_keeps_dirty_pages_to_itself_is_found() {
    finds(Mutation::UndoForgets, |_| {}, &["was taken and not given back"]);
}

#[test]
fn a_ledger_that_forgets_is_found() {
    let crashes = |plan: &mut Plan| {
        plan.faults.retain(|planned| matches!(planned.fault, Fault::Crash { .. }));
        plan.faults.iter_mut().for_each(|planned| {
            planned.when =
                When::Phase(crate::plan::End::Destination, limosa_migrate::Phase::Commit, plan.seed % 40);
        });
    };
    finds(Mutation::LedgerForgets, crashes, &["does not know what became of it"]);
}

#[test]
fn memory_that_loses_pages_is_found() {
    finds(Mutation::MemoryForgets, calm, &["is not what the guest wrote"]);
}

#[test]
fn pages_that_are_lost_on_the_way_to_where_they_belong_are_found() {
    let in_place = |plan: &mut Plan| {
        calm_move(plan);
        plan.pins = [true; 2];
        plan.checksums = [MemoryChecksums::Never; 2];
    };
    finds(Mutation::InPlaceForgets, in_place, &["is not what the guest wrote"]);
}

#[test]
fn a_device_that_loads_something_else_is_found() {
    finds(Mutation::DeviceForgets, calm, &["has not what the guest gave it"]);
}

#[test]
fn a_destination_that_lets_more_come_than_its_window_is_found() {
    finds(Mutation::GivesTooMuch, calm, &["at once, not"]);
}

#[test]
fn a_partial_snapshot_that_gets_its_name_is_found() {
    let saves = |plan: &mut Plan| {
        plan.saves = plan.saves.or(Some(limosa_migrate::AfterSave::Run));
        plan.faults.retain(|planned| !matches!(planned.fault, Fault::Crash { .. }));
    };
    finds(Mutation::PublishesPartial, saves, &["there is something", "nothing ever stopped"]);
}

#[test]
fn a_cancel_that_nobody_hears_is_found() {
    finds(Mutation::CancelIgnored, |_| {}, &["called off at the"]);
}

#[test]
fn a_reset_that_the_engine_does_not_see_is_found() {
    let reset = |plan: &mut Plan| {
        moves(plan);
        at(plan, Phase::Load, Fault::Reset(End::Destination, 0));
    };
    finds(Mutation::ResetHidden, reset, &["a device is in", "has not what the guest gave it"]);
}

#[test]
fn a_device_that_could_have_given_more_before_the_stop_is_found() {
    let quiet = |plan: &mut Plan| {
        calm_move(plan);
        (plan.precopy, plan.convergence) =
            (true, plan.convergence.with_when_stalled(WhenStalled::SwitchOver));
        plan.devices.iter_mut().for_each(|device| (device.quiet, device.initial) = (true, 0));
    };
    finds(Mutation::DrainsNothing, quiet, &["which is quiet, has"]);
}

#[test]
fn a_stop_before_initial_data_is_loaded_is_found() {
    let initial = |plan: &mut Plan| {
        calm_move(plan);
        (plan.precopy, plan.convergence) =
            (true, plan.convergence.with_when_stalled(WhenStalled::SwitchOver));
        plan.devices.iter_mut().for_each(|device| device.initial = 20);
    };
    finds(Mutation::InitialIgnored, initial, &["still has initial data", "has loaded"]);
}

#[test]
fn a_silence_that_is_borne_for_too_long_is_found() {
    let silent = |plan: &mut Plan| {
        moves(plan);
        let end = if plan.seed.is_multiple_of(2) { End::Source } else { End::Destination };
        at(plan, Phase::StopCopy, Fault::Silence(end, 0));
    };
    finds(Mutation::SilenceIgnored, silent, &["after something went wrong"]);
}

#[test]
fn a_guest_that_stands_still_for_too_long_is_found() {
    let slow = |plan: &mut Plan| {
        calm_move(plan);
        (plan.precopy, plan.standstill_max) = (false, Duration::from_secs(2));
        plan.convergence = plan.convergence.with_when_stalled(WhenStalled::SwitchOver);
        plan.links.iter_mut().for_each(|link| link.bytes_per_second = 1 << 16);
        plan.devices.iter_mut().for_each(|device| (device.blocks, device.record_bytes) = (60, 32 << 10));
    };
    finds(Mutation::StandsForever, slow, &["the guest stood still for"]);
}

/// An adversary that knows the secret where nobody checks, and guesses it where somebody does.
fn proof(plan: &Plan) -> Proof {
    if plan.mutation.is_some() { Proof::Right } else { Proof::Random }
}

fn forges(plan: &Plan, kind: Kind, instead_of: Option<Kind>) -> Fault {
    let proof = proof(plan);
    let from = if kind == Kind::COMMIT { End::Source } else { End::Destination };
    Fault::Forge { from, link: 0, forgery: Forgery { kind, proof, instead_of, outcome: 1 } }
}

#[test]
fn a_destination_that_takes_anybody_s_commit_is_found() {
    // The source calls the move off while the destination holds.
    let forged = |plan: &mut Plan| {
        moves(plan);
        let when = When::Phase(End::Destination, Phase::Commit, plan.seed % 20);
        let commit = Planned { when, fault: forges(plan, Kind::COMMIT, None) };
        let when = When::Point(End::Source, 1);
        plan.faults = vec![commit, Planned { when, fault: Fault::NoteFull }];
    };
    finds(Mutation::CommitUnchecked, forged, &["two run", "differ in what became of it"]);
}

#[test]
fn a_source_that_takes_anybody_s_outcome_is_found() {
    // RUNNING is lost, and somebody else answers the source that asks.
    let forged = |plan: &mut Plan| {
        moves(plan);
        at(plan, Phase::Commit, Fault::Cut(0));
        let when = When::Point(End::Source, 1);
        plan.faults.push(Planned { when, fault: forges(plan, Kind::OUTCOME, Some(Kind::OUTCOME)) });
    };
    finds(Mutation::OutcomeUnchecked, forged, &["two run", "differ in what became of it"]);
}

#[test]
fn a_destination_that_takes_anybody_s_link_is_found() {
    // It connects before the source's own further link.
    let joins = |plan: &mut Plan| {
        moves(plan);
        let when = When::Phase(End::Destination, Phase::PreCopy, plan.seed % 20);
        plan.faults = vec![Planned { when, fault: Fault::ForgedLink(proof(plan)) }];
    };
    finds(Mutation::JoinUnchecked, joins, &["wrote guest memory"]);
}

#[test]
fn a_panic_that_nothing_catches_is_found() {
    let panics = |plan: &mut Plan| {
        moves(plan);
        at(plan, Phase::PreCopy, Fault::Panic(End::Source, Place::Device(0)));
    };
    finds(Mutation::LetsPanicsEscape, panics, &["has a defect"]);
}
