//! Moves under a deterministic simulation: source, destination, their devices, guest and links in one process, under a
//! virtual clock, in an order and with faults that a seed determines (`docs/failure.md`).
//!
//! `LIMOSA_SEEDS` is how many seeds to run (300 otherwise), `LIMOSA_SEED` is one to run alone, with its trace.

mod adversary;
mod bounds;
mod device;
mod disk;
mod fate;
mod forgotten;
mod found;
mod guest;
mod link;
mod machine;
mod memory;
mod model;
mod mutations;
mod panics;
mod plan;
mod script;
#[path = "../scripted/mod.rs"]
mod scripted;
mod standstill;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use plan::Plan;
use script::{Summary, run};

/// Steps of all runs.
static STEPS: AtomicU64 = AtomicU64::new(0);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, a number is expected")))
}

/// Runs seeds from 0 on, on all processors.
fn sweep(count: u64, each: impl Fn(u64, Result<Summary, String>) + Sync) {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        return;
                    }
                    each(seed, play(&Plan::new(seed), false));
                }
            });
        }
    });
}

fn play(plan: &Plan, trace: bool) -> Result<Summary, String> {
    let folder = tempfile::tempdir().expect("a folder for the ledger");
    match run(plan, folder.path(), trace) {
        Ok(run) => {
            if trace {
                println!("{}", run.trace);
            }
            STEPS.fetch_add(run.steps, Ordering::Relaxed);
            Ok(run.value)
        }
        Err(failure) => Err(format!("{}{failure}", failure.trace)),
    }
}

#[test]
fn a_seed_plays_the_same_twice() {
    for seed in 0..30 {
        let traces = [(); 2].map(|()| {
            let folder = tempfile::tempdir().expect("a folder for the ledger");
            let run = run(&Plan::new(seed), folder.path(), true);
            run.map(|run| (run.digest, run.trace)).unwrap_or_else(|failure| panic!("{failure}"))
        });
        let [(digest, first), (again, second)] = traces;
        let differs = first.lines().zip(second.lines()).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!((digest, first.len()), (again, second.len()), "seed {seed}");
    }
}

#[test]
fn moves_keep_the_failure_contract_whatever_goes_wrong() {
    if let Some(seed) = number("LIMOSA_SEED") {
        return play(&Plan::new(seed), true).map(drop).unwrap_or_else(|failure| panic!("{failure}"));
    }
    let count = number("LIMOSA_SEEDS").unwrap_or(300);
    let failures = Mutex::new(BTreeMap::new());
    let tally = Mutex::new(BTreeMap::<_, u64>::new());
    let began = std::time::Instant::now();
    sweep(count, |seed, summary| match summary {
        Ok(summary) => {
            let mut tally = tally.lock().unwrap();
            *tally.entry(format!("{:?}", summary.ended)).or_default() += 1;
            for (what, is_so) in [
                ("in doubt", summary.in_doubt),
                ("looked at by a person", summary.looked_at),
                ("with a crash", summary.crashes > 0),
                ("with a fault", summary.fired > 0),
                ("with a full window", summary.filled),
                ("with a window that grew", summary.grew),
                ("with a forged word", summary.forged),
                ("with a forged word, in doubt", summary.forged && summary.in_doubt),
                ("with pages received in place", summary.received_in_place),
                ("with pages without checksums", summary.sent_unchecked),
            ] {
                *tally.entry(what.into()).or_default() += u64::from(is_so);
            }
        }
        Err(failure) => drop(failures.lock().unwrap().insert(seed, failure)),
    });
    let rate = count as f64 / began.elapsed().as_secs_f64();
    let steps = STEPS.load(Ordering::Relaxed) / count.max(1);
    println!("{count} seeds, {rate:.0} a second, {steps} steps each: {:?}", tally.lock().unwrap());
    let failures = failures.into_inner().unwrap();
    for (seed, failure) in failures.iter().take(10) {
        println!(
            "{failure}\nLIMOSA_SEED={seed} cargo test -p limosa-migrate --test simulation -- moves_keep\n"
        );
    }
    assert!(failures.is_empty(), "{} of {count} seeds fail: {:?}", failures.len(), failures.keys());
    let tally = tally.into_inner().unwrap();
    for what in [
        "Moved",
        "Undone",
        "in doubt",
        "with a crash",
        "with a full window",
        "with a window that grew",
        "with a forged word",
        "with a forged word, in doubt",
        "with pages received in place",
        "with pages without checksums",
        "Saved",
        "NotSaved",
    ] {
        assert!(count < 100 || tally.get(what).is_some_and(|times| *times > 0), "no seed ended {what}");
    }
}
