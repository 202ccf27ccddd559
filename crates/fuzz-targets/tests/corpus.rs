//! Replays the fuzzer's corpora, and keeps the list of targets, the fuzzer's and the corpora the
//! same.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use limosa_fuzz_targets::TARGETS;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_input_of_every_corpus_passes() {
    for target in TARGETS {
        for path in files(&fuzz().join("corpus").join(target.name)) {
            let data = fs::read(&path).unwrap();
            let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(&data)));
            assert!(outcome.is_ok(), "{} fails on {}", target.name, path.display());
        }
    }
}

#[test]
fn cut_and_altered_seeds_pass_too() {
    for target in TARGETS {
        for (_, seed) in (target.seeds)() {
            for at in 0..seed.len() {
                (target.run)(&seed[..at]);
                for with in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut altered = seed.clone();
                    altered[at] = with;
                    (target.run)(&altered);
                }
            }
        }
    }
}

#[test]
fn every_seed_is_in_its_corpus() {
    for target in TARGETS {
        for (name, seed) in (target.seeds)() {
            let path = fuzz().join("corpus").join(target.name).join(name);
            assert_eq!(fs::read(&path).ok(), Some(seed), "{}: see the crate's documentation", path.display());
        }
    }
}

#[test]
fn targets_here_are_those_of_the_fuzzer() {
    let here: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let stems = |dir: &str| -> BTreeSet<_> {
        let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        files(&fuzz().join(dir)).into_iter().map(stem).collect()
    };
    assert_eq!(here, stems("fuzz_targets"));
    assert_eq!(here, stems("corpus"));
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in &here {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml has no {name}");
    }
}

#[test]
#[ignore = "writes into fuzz/corpus"]
fn write_seeds() {
    for target in TARGETS {
        let dir = fuzz().join("corpus").join(target.name);
        fs::create_dir_all(&dir).unwrap();
        for (name, seed) in (target.seeds)() {
            fs::write(dir.join(name), seed).unwrap();
        }
    }
}
