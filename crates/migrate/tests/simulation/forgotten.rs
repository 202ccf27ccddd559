//! That a notification which the engine forgets is found, wherever the engine notifies.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::plan::{Mutation, Plan};
use crate::play;

/// A defect is to be found within this number of seeds.
const SEEDS: u64 = 200;

/// Functions whose notifications only make something happen sooner: a wait that has a time limit of its own, or that the
/// next notification of the same monitor ends. Forgetting them costs time.
const SOONER: [(&str, &str); 10] = [
    // The thread looks again at each keep-alive.
    ("transfer/keep_alive.rs", "stands_still"),
    ("transfer/keep_alive.rs", "end"),
    // The next look comes after 50 ms.
    ("transfer/sending.rs", "device_has_news"),
    // A device with nothing for now is read again after 100 ms at most.
    ("transfer/sending.rs", "end_streams"),
    // A device that waits for its share of a link looks again after 10 ms.
    ("transfer/sending.rs", "share_memory"),
    ("transfer/sending.rs", "end_round"),
    // The first link's thread sends what the others do not, and notifies them at the end of the round.
    ("transfer/ram.rs", "send_round"),
    ("transfer/ram.rs", "next"),
    // Only for sources that do not need credit, which the simulation does not have.
    ("destination/device_loader.rs", "load"),
    // Only for a team that fails before all of its threads have started.
    ("transfer/device_workers.rs", "end"),
];

/// The places that notify: the end of the file's name, and the line.
fn places(folder: &Path, found: &mut Vec<(&'static str, u32)>) {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            places(&path, found);
            continue;
        }
        if path.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let file = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_str().unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let mut function = "";
        for (at, line) in code.lines().enumerate() {
            if let Some((_, name)) = line.split_once("fn ") {
                function = name.split(['(', '<']).next().unwrap_or_default();
            }
            let is_sooner = SOONER.iter().any(|(of, name)| file.ends_with(of) && *name == function);
            if line.contains(".notify_all()") && !line.trim_start().starts_with("//") && !is_sooner {
                found.push((file.to_owned().leak(), at as u32 + 1));
            }
        }
    }
}

/// The first seed that finds the defect.
fn found(file: &'static str, line: u32) -> Option<u64> {
    let mutation = Some(Mutation::ForgetsNotification { file, line });
    (0..SEEDS).find(|&seed| play(&Plan { mutation, ..Plan::new(seed) }, false).is_err())
}

#[test]
fn a_notification_that_the_engine_forgets_is_found() {
    let mut all = Vec::new();
    places(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
    assert!(all.len() > 12, "{all:?}");
    let next = AtomicUsize::new(0);
    let (all, next) = (&all, &next);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let missed: Vec<String> = std::thread::scope(|scope| {
        let work = || {
            let mut missed = Vec::new();
            while let Some(&(file, line)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                match found(file, line) {
                    Some(seed) => println!("{file}:{line}: seed {seed}"),
                    None => missed.push(format!("{file}:{line}")),
                }
            }
            missed
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(missed.is_empty(), "no seed of {SEEDS} finds what is forgotten at {missed:#?}");
}
