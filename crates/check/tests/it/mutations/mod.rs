//! The suite, tested against itself: for each clause a device that breaks just that, and the checks that find it.
//!
//! `docs/conformance/mutations.md` is the table: a fault that is found by more or by fewer checks than it says fails here.
//! With UPDATE_DOCS set the page is written anew.

pub mod faults;
pub mod faulty;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use faults::Fault;
use faulty::{Faulty, FaultyDevice};
use limosa_check::{CLAUSES, Document, Family, Limits, Options, Report, Target, Transport, checks, run};
use limosa_device::{Loopback, Machine, SimpleModel};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{State, fsm};
use limosa_test_device::Memory;

use crate::table::Table;

fn synthetic() -> Box<dyn SimpleModel> {
    let config = SyntheticConfig { state_bytes: 128 << 10, block_bytes: 4096, ..SyntheticConfig::default() };
    Box::new(Synthetic::new(config).unwrap())
}

/// A device with the mandatory flag alone.
fn stop_copy_alone() -> Box<dyn SimpleModel> {
    let config = SyntheticConfig { state_bytes: 128 << 10, block_bytes: 4096, ..SyntheticConfig::default() };
    Box::new(Synthetic::new(SyntheticConfig { p2p: false, pre_copy: false, ..config }).unwrap())
}

/// A device without migration.
fn plain() -> Box<dyn SimpleModel> {
    Box::new(<Memory>::new(0).with_flags(DeviceFlags::RESET))
}

fn device(model: Box<dyn SimpleModel>, fault: Fault) -> Arc<Faulty> {
    Arc::new(Faulty {
        inner: Loopback::new("loopback", Machine::simple(model)),
        fault,
        count: AtomicU64::new(0),
        memory: AtomicU64::new(0),
        broken: AtomicBool::new(false),
    })
}

fn check(model: fn() -> Box<dyn SimpleModel>, fault: Fault, options: &Options) -> Report {
    let of_peer = match fault {
        Fault::PeerLoadIsLost => Fault::LoadIsLost,
        Fault::PeerRefuses => Fault::RefusesItsOwn,
        _ => Fault::Nothing,
    };
    let shared = device(model(), if of_peer == Fault::Nothing { fault } else { Fault::Nothing });
    let peer = device(model(), of_peer);
    let (viewed, broken) = (Arc::clone(&shared), Arc::clone(&shared));
    let target =
        Target::new("faulty", Transport::Kernel, move || Ok(Box::new(FaultyDevice(Arc::clone(&shared)))))
            .peer(move || Ok(Box::new(FaultyDevice(Arc::clone(&peer)))))
            .view(Arc::new(move || {
                Ok(match fault {
                    Fault::ViewIsStuck(state) => state.to_string(),
                    _ => viewed.now().to_string(),
                })
            }))
            .breaks(Arc::new(move || {
                broken.broken.store(true, Ordering::SeqCst);
                Ok(())
            }));
    run(&target, options, |_| {}).unwrap()
}

fn options() -> Options {
    let limits = Limits {
        check: Duration::from_secs(5),
        state_bytes_max: 1 << 20,
        sample_bytes_max: 1 << 20,
        ..Limits::default()
    };
    Options { destructive: true, limits, ..Options::default() }
}

/// A fault with the device and the checks that it meets.
struct Case {
    fault: Fault,
    clause: String,
    model: fn() -> Box<dyn SimpleModel>,
    options: Options,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (fault, clause) in faults::all() {
        let model: fn() -> Box<dyn SimpleModel> = match fault {
            Fault::AbsentOddly => plain,
            Fault::TakesUnsupported => stop_copy_alone,
            _ => synthetic,
        };
        // Without a way back the suite ends at the first check that needs one.
        let families = match fault {
            // What one thread finds of these while another drives is a matter of time, unless the fault is about threads.
            Fault::InfoFromOneThread
            | Fault::GetFromOneThread
            | Fault::SetsFromOneThread
            | Fault::ReadsFromOneThread
            | Fault::StaleReads
            | Fault::StaleErrno => Vec::new(),
            Fault::ResetRefused => vec![Family::Reset],
            Fault::NoWayBackFromBadLoad | Fault::NotAfterHalfLoad => vec![Family::Resuming],
            _ => Family::ALL.into_iter().filter(|family| *family != Family::Concurrency).collect(),
        };
        let options = Options { families, ..options() };
        cases.push(Case { fault, clause: clause.into(), model, options });
    }
    let bare_reset = Fault::ResetRefused;
    cases.push(Case { fault: bare_reset, clause: "reset.running".into(), model: plain, options: options() });
    let all = limosa_protocol::MigrationFlags::SETS[3];
    for from in State::ALL {
        for to in State::ALL {
            let clause = match fsm::path(all, from, to) {
                Err(fsm::Refusal::FromError) => "fsm.from-error",
                Err(fsm::Refusal::ToError) => "fsm.no-error",
                Err(_) => "fsm.refused",
                Ok(_) if from == to => "fsm.same",
                Ok(path) if path.arcs().count() == 1 => "fsm.arcs",
                Ok(_) => "fsm.combined",
            };
            let options = Options { families: vec![Family::States, Family::Error], ..options() };
            cases.push(Case {
                fault: Fault::Pair(from, to),
                clause: clause.into(),
                model: synthetic,
                options,
            });
        }
    }
    cases
}

fn words(case: &Case) -> String {
    let bare = (case.model)().migration().is_none();
    format!("{:?}{}", case.fault, if bare { " of a device without migration" } else { "" })
}

#[test]
fn a_device_without_a_fault_passes() {
    let report = check(synthetic, Fault::Nothing, &options());
    let failed: Vec<_> = report.failed().collect();
    // Without ranges this project's devices log everything, as vfio-user says.
    assert_eq!(
        failed.iter().map(|check| &*check.id).collect::<Vec<_>>(),
        ["logging.no-ranges"],
        "{failed:#?}"
    );
    assert_eq!((&*report.left_in, &report.ended_early), ("RUNNING", &None));
}

#[test]
fn each_fault_is_found_by_exactly_the_checks_that_should() {
    let cases = cases();
    let next = AtomicUsize::new(0);
    let found: Mutex<BTreeMap<usize, BTreeSet<String>>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            // A name: a fault tells a check's second thread by its having none.
            let work = || {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let at = cases.iter().position(|other| std::ptr::eq(other, case)).unwrap();
                    let report = check(case.model, case.fault, &case.options);
                    let failed = report.failed().map(|check| check.id.clone()).collect();
                    found.lock().unwrap().insert(at, failed);
                }
            };
            std::thread::Builder::new().name("mutations".into()).spawn_scoped(scope, work).unwrap();
        }
    });
    let found = found.into_inner().unwrap();
    let mut can_fail = BTreeSet::new();
    let mut rows = Vec::new();
    let mut missed = Vec::new();
    for (at, case) in cases.iter().enumerate() {
        let mut failed = found[&at].clone();
        can_fail.extend(failed.iter().cloned());
        if !matches!(case.fault, Fault::LogTakesAnyRange) {
            failed.remove("logging.no-ranges");
        }
        let cites = checks().iter().any(|check| {
            failed.contains(&*check.id) && check.clauses.iter().any(|clause| *clause == case.clause)
        });
        if !cites {
            missed.push(format!("{}: breaks {}, and failed {failed:?}", words(case), case.clause));
        }
        let failed: Vec<_> = failed.iter().map(|id| format!("`{id}`")).collect();
        rows.push(format!("| {} | `{}` | {} |", words(case), case.clause, failed.join(" ")));
    }
    let never: Vec<_> = checks()
        .iter()
        // Those have their own faults, in wire_mutations.
        .filter(|check| check.family != Family::VfioUser && !can_fail.contains(&*check.id))
        .map(|check| check.id.to_string())
        .collect();
    let unbroken: Vec<_> = CLAUSES
        .iter()
        .filter(|clause| clause.unchecked.is_empty() && clause.document != Document::VfioUser)
        .filter(|clause| !cases.iter().any(|case| case.clause == clause.id))
        .map(|clause| clause.id)
        .collect();
    let page = format!("{HEAD}{}\n", rows.join("\n"));
    Table { file: "mutations.md", page, missed, never, unbroken }.hold();
}

#[test]
fn a_failed_check_did_not_say_where_what_it_read_differed() {
    for (fault, id, words) in [
        (
            Fault::LoadIsLost,
            "resuming.loaded-device-saves",
            &["saves another state than it was given: byte", " differ", ": expected ", " there, came "][..],
        ),
        (Fault::NoPiecesAbove(65535), "resuming.loaded-twice", &["writing bytes 0x0 to 0x10000 of the 0x2"]),
        (
            Fault::RegionsAreOpen,
            "device.region-read-beyond",
            &["a read of 4 bytes at 0x", " of region 0, which has 0x"],
        ),
        (Fault::FewerRegionsInStop, "device.info-is-stable", &["in RUNNING it has", "regions", "in STOP"]),
        (Fault::LogKeepsDirty, "logging.report-clears", &["pages, the first of them at 0x", "expected none"]),
    ] {
        let options = Options { only: vec![id.into()], ..options() };
        let report = check(synthetic, fault, &options);
        let failed: Vec<_> = report.failed().collect();
        let [one] = &failed[..] else { panic!("{fault:?}: {failed:#?}") };
        for words in words {
            assert!(one.outcome.detail().contains(words), "{fault:?}: {one:?} lacks `{words}`");
        }
    }
}

const HEAD: &str = "\
# The suite, tested against itself

For each clause a device that breaks just that: a device of this project with one fault round it. The last column is the
checks that fail, all of them. A test holds the table to what happens, and holds that every check fails somewhere in it.

| fault | clause | checks that fail |
|---|---|---|
";
