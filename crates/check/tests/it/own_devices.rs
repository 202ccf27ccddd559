//! The devices of this project pass, over a loopback.

use std::sync::Arc;

use limosa_check::{Family, Options, Outcome, Report, Target, Transport, run};
use limosa_device::{Loopback, Machine, SimpleModel};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_models::uart::{Line, Mtty, Uart};

fn loopback(model: Box<dyn SimpleModel>) -> Target {
    let machine = Machine::simple(model);
    Target::new("loopback", Transport::VfioUser, move || {
        Ok(Box::new(Loopback::new("loopback", Arc::clone(&machine))))
    })
}

fn all() -> Options {
    Options { destructive: true, ..Options::default() }
}

#[track_caller]
fn passes(report: &Report, checks_min: usize) {
    let failed: Vec<_> = report.failed().map(|check| format!("{check:#?}")).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let counts = report.counts();
    assert!(counts.pass >= checks_min, "{counts:?}");
    assert_eq!((&*report.left_in, &report.ended_early), ("RUNNING", &None));
    assert!(report.checks.iter().all(|check| check.outcome != Outcome::Unsafe));
}

fn synthetic() -> Box<dyn SimpleModel> {
    let config = SyntheticConfig { state_bytes: 64 << 10, block_bytes: 4096, ..SyntheticConfig::default() };
    Box::new(Synthetic::new(config).unwrap())
}

#[test]
fn the_synthetic_device_passes() {
    passes(&run(&loopback(synthetic()), &all(), |_| {}).unwrap(), 180);
}

#[test]
fn the_serial_port_passes() {
    passes(&run(&loopback(Box::new(Uart::new(vec![Line::Echo]).unwrap())), &all(), |_| {}).unwrap(), 100);
}

#[test]
fn the_model_of_mtty_passes() {
    passes(&run(&loopback(Box::new(Mtty::new(2).unwrap())), &all(), |_| {}).unwrap(), 150);
}

/// They were 163 skipped checks, and fifty clauses that were not checked.
#[test]
fn a_kernel_device_was_told_of_the_messages_of_vfio_user() {
    let machine = Machine::simple(synthetic());
    let kernel = Target::new("loopback", Transport::Kernel, move || {
        Ok(Box::new(Loopback::new("loopback", Arc::clone(&machine))))
    });
    let report = run(&kernel, &Options::default(), |_| {}).unwrap();
    assert!(report.counts().pass > 100 && report.checks.iter().all(|check| check.family != Family::VfioUser));
    let unchecked = report.unchecked_clauses();
    assert!(
        unchecked.iter().all(|(id, why)| !id.starts_with("wire.") && !why.contains("socket")),
        "{unchecked:#?}"
    );
    let mut table = Vec::new();
    report.table(&mut table, false).unwrap();
    let of = report.clauses.len();
    assert!(
        !String::from_utf8(table).unwrap().contains(&format!(" of {of} clauses")),
        "clauses of messages are none of it"
    );
    // Whoever asks for them is told why there are none.
    let asked = Options { families: vec![Family::VfioUser], ..Options::default() };
    let report = run(&kernel, &asked, |_| {}).unwrap();
    assert!(!report.checks.is_empty());
    assert!(
        report
            .checks
            .iter()
            .all(|check| matches!(&check.outcome, Outcome::Skip(why) if why.contains("socket")))
    );
}
