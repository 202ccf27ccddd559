//! `limosa check` on the kernel's mtty and on the lab's module: the checks find what `docs/conformance` says, and random sequences
//! find nothing else.

#[path = "command/support.rs"]
mod support;

use std::path::Path;

use limosa_lab::Mdev;
use serde_json::{Value, json};
use support::{Here, full, mtty, path};

/// Failures of mtty that its report explains.
const MTTY_EXCUSED: [&str; 5] = [
    "precopy.info-of-a-stale-session",
    "resuming.altered-first-byte",
    "logging.start-twice",
    "logging.report-while-off",
    "logging.report-after-stop",
];

/// The same as random sequences find it.
const MTTY_KNOWN: [&str; 3] = [
    "log-start with the log on: success, expected a refusal",
    "log-report with the log off: success, expected a refusal",
    "a write to a session that has ended: ENOMEM, expected ENODEV",
];

/// Sequences of a run: some seconds.
const SEQUENCES: &str = "150";

/// The report of this kernel in `docs/conformance` without its title, which names the very release. `None` for a kernel that has
/// none.
fn published(device: &str) -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.');
    let version = format!("{}.{}", numbers.next()?, numbers.next()?);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/conformance");
    let report = std::fs::read_to_string(folder.join(format!("{device}-linux-{version}.md"))).ok()?;
    Some(untitled(&report).to_owned())
}

fn untitled(report: &str) -> &str {
    report.split_once('\n').map_or("", |(_, rest)| rest)
}

/// Runs all checks on a device. `name` is that of its published report, with which the new one is compared.
fn checked(name: &str, device: &Mdev, excused: &[&str], more: &[&str]) {
    let excused: Vec<_> = excused.iter().map(|id| json!({ "id": id, "why": "docs/conformance" })).collect();
    let profile = path("profile");
    std::fs::write(&profile, json!({ "name": name, "excused": excused }).to_string()).unwrap();
    let args = ["check", device.uuid(), "--destructive", "--format", "markdown", "--profile", &profile];
    let ended = Here::new().limosa(&[&args[..], more].concat());
    assert_eq!(ended.code, 0, "{name}: {ended:?}");
    if let Some(published) = published(name) {
        assert_eq!(
            untitled(&ended.out),
            published,
            "docs/conformance has another report of {name} than:\n{}",
            ended.out
        );
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn mtty_is_as_its_report_says() {
    checked("mtty", &mtty().create(), &MTTY_EXCUSED, &[]);
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_module_is_as_its_report_says() {
    let (device, peer) = (full().create(), full().create());
    let state = format!("/sys/bus/mdev/devices/{}/limosa/state", device.uuid());
    let breaks = format!("echo ERROR > {state}");
    checked("lab-module", &device, &[], &["--peer", peer.uuid(), "--break-with", &breaks]);
}

/// Plays random sequences, of which none may find what is not known. Returns how many found what is.
fn fuzzed(device: &Mdev, seed: &str, threads: &str, known: &[&str]) -> u64 {
    let file = path("known");
    std::fs::write(&file, known.join("\n")).unwrap();
    let args = ["--json", "check", device.uuid(), "--destructive", "--known", &file];
    let run = ["--fuzz", SEQUENCES, "--seed", seed, "--threads", threads];
    let ended = Here::new().limosa(&[&args[..], &run].concat());
    let report: Value = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    assert_eq!(ended.code, 0, "{report:#}");
    assert_eq!(report["sequences"].as_u64().unwrap().to_string(), SEQUENCES, "{report:#}");
    report["known"].as_u64().unwrap()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn random_sequences_find_of_mtty_what_is_known() {
    let device = mtty().create();
    for (seed, threads) in [("1", "1"), ("2", "2")] {
        assert!(fuzzed(&device, seed, threads, &MTTY_KNOWN) > 0, "nothing of what is known was found");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn random_sequences_find_nothing_of_the_module() {
    let device = full().create();
    for (seed, threads) in [("3", "1"), ("4", "2")] {
        assert_eq!(fuzzed(&device, seed, threads, &[]), 0);
    }
}
