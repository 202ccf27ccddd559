//! Two devices: whether the state of one can go to the other, by the engine's own comparison.

use std::sync::Arc;
use std::time::Duration;

use limosa_check::{Done, within};
use limosa_migrate::{MismatchKind, MovedDevice};
use limosa_protocol::{MigrationFlags, State};

use super::device::{Looked, of_error};
use super::finding::{DESTINATION_USED, DEVICE_SILENT, DIFFERS, Finding, PAIR_FLAGS, SAME_DEVICE};
use crate::open;

/// Time limit for the comparison.
const COMPARE_MAX: Duration = Duration::from_secs(60);

pub fn compare(source: &Looked, destination: &Looked) -> Vec<Finding> {
    let subject = format!("{} -> {}", source.name(), destination.name());
    if open::same(source.name(), destination.name()) {
        return vec![Finding::new(&SAME_DEVICE, &subject, "it is one device")];
    }
    let (Some(from), Some(to)) = (source.device.clone(), destination.device.clone()) else {
        return Vec::new();
    };
    let beside_vmm = to.is_beside_vmm() || to.is_borrowed();
    let compared = within(COMPARE_MAX, move || {
        let (from, to) = (Arc::clone(&from), Arc::clone(&to));
        limosa_migrate::compare(&[MovedDevice::new(&**from)], &[MovedDevice::new(&**to)])
    });
    let mut findings = Vec::new();
    match compared {
        Done::Value(Ok(reasons)) => {
            // A device without migration is a finding of its own.
            let reasons = reasons.into_iter().filter(|reason| reason.kind != MismatchKind::NoMigration);
            findings.extend(reasons.map(|reason| Finding::new(&DIFFERS, &subject, reason.message)));
        }
        Done::Value(Err(error)) => findings.push(of_error(&subject, &error.into())),
        Done::Panicked(what) => {
            findings.push(Finding::new(&DIFFERS, &subject, format!("not compared: {what}")))
        }
        Done::Hangs => {
            let what = format!("one of them did not answer within {COMPARE_MAX:?}");
            findings.push(Finding::new(&DEVICE_SILENT, &subject, what));
        }
    }
    if let (Some(from), Some(to)) = (source.known.flags, destination.known.flags)
        && from != to
        && from.intersection(to).contains(MigrationFlags::STOP_COPY)
    {
        findings.push(Finding::new(&PAIR_FLAGS, &subject, format!("{from} and {to}")));
    }
    if beside_vmm && destination.known.state == Some(State::Running) {
        findings.push(Finding::new(&DESTINATION_USED, &subject, format!("{} runs", destination.name())));
    }
    findings
}
