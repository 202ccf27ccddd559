//! That the checks find what is wrong: with something broken in what the engine relies on, some seed fails.

use crate::plan::{Fault, Mutation, Plan, When};
use crate::play;

/// What some seed says of a machine with this defect.
fn found(mutation: Mutation, suits: impl Fn(&mut Plan)) -> String {
    let found = (0..400).find_map(|seed| {
        let mut plan = Plan::new(seed);
        suits(&mut plan);
        let found = play(&Plan { mutation: Some(mutation), ..plan.clone() }, false).err()?;
        assert_eq!(play(&plan, false).err(), None, "seed {seed} is to be whole without the defect");
        Some(found)
    });
    found.unwrap_or_else(|| panic!("no seed finds {mutation:?}"))
}

/// Nothing goes wrong but the defect.
fn calm(plan: &mut Plan) {
    plan.faults.clear();
}

/// It is no save.
fn moves(plan: &mut Plan) {
    plan.saves = None;
}

fn calm_move(plan: &mut Plan) {
    calm(plan);
    moves(plan);
}

#[track_caller]
fn says(found: &str, what: &str) {
    assert!(found.contains(what), "{found}");
}

#[test]
fn a_destination_that_runs_before_the_commit_is_found() {
    says(&found(Mutation::RunsBeforeCommit, moves), "two run");
}

#[test]
fn a_guest_that_does_not_stop_is_found() {
    says(&found(Mutation::NeverStops, calm_move), "is not what the guest wrote");
}

#[test]
fn a_source_that_runs_in_doubt_is_found() {
    let commit_and_cut = |plan: &mut Plan| {
        plan.faults.retain(|planned| matches!(planned.fault, Fault::Cut(_) | Fault::Silence(..)));
    };
    let found = found(Mutation::RunsInDoubt, commit_and_cut);
    assert!(found.contains("two run") || found.contains("differ in what became of it"), "{found}");
}

#[test]
fn a_log_that_loses_pages_is_found() {
    says(&found(Mutation::LogForgets, calm_move), "is not what the guest wrote");
}

#[test]
fn an_undo_that_keeps_dirty_pages_to_itself_is_found() {
    says(&found(Mutation::UndoForgets, |_| {}), "was taken and not given back");
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
    says(&found(Mutation::LedgerForgets, crashes), "does not know what became of it");
}

#[test]
fn memory_that_loses_pages_is_found() {
    says(&found(Mutation::MemoryForgets, calm), "is not what the guest wrote");
}

#[test]
fn a_device_that_loads_something_else_is_found() {
    says(&found(Mutation::DeviceForgets, calm), "has not what the guest gave it");
}

#[test]
fn a_destination_that_lets_more_come_than_its_window_is_found() {
    says(&found(Mutation::GivesTooMuch, calm), "at once, not");
}

#[test]
fn a_partial_snapshot_that_gets_its_name_is_found() {
    let saves = |plan: &mut Plan| {
        plan.saves = plan.saves.or(Some(limosa_migrate::AfterSave::Run));
        plan.faults.retain(|planned| !matches!(planned.fault, Fault::Crash { .. }));
    };
    let found = found(Mutation::PublishesPartial, saves);
    assert!(found.contains("there is something") || found.contains("nothing ever stopped"), "{found}");
}

#[test]
fn a_cancel_that_nobody_hears_is_found() {
    says(&found(Mutation::DeafToCancel, |_| {}), "called off at the");
}
