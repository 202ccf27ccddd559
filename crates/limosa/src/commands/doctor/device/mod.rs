//! A device: how it is reached, what it can do, and in which state it is. Each examination has a limit, whatever the device does.

mod facts;
pub mod measure;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use limosa_check::{Done, within};
use limosa_client::Error;
use limosa_protocol::{Errno, MigrationFlags, State};
use limosa_vfio_kernel::Unusable;

use super::finding::{
    DEVICE_FORBIDDEN, DEVICE_GONE, DEVICE_IN_USE, DEVICE_MISSING, DEVICE_NOT_VFIO_USER, DEVICE_SILENT,
    DEVICE_UNUSABLE, Finding, Kind, NOT_MEASURED, NOT_RESTORED,
};
use super::report::{DeviceReport, Facts};
use crate::exit::{self, Code};
use crate::moves::Moves;
use crate::open::{self, Opened, Opener, Opening};
use crate::open_elsewhere::OpenElsewhere;
use crate::output::Output;

/// Time limit for one vfio-user request here, so that a hanging server costs little time.
const REQUEST_MAX: Duration = Duration::from_secs(5);

/// Time limit for one arc in a measurement: less than a VMM waits for its device.
const ARC_MAX: Duration = Duration::from_secs(3);

/// Time limit for the examination of a device. Kernel drivers have no limits of their own.
const LOOK_MAX: Duration = Duration::from_secs(60);

/// How devices are opened here.
pub fn opener(opening: Opening<'_>, measure: bool) -> Opener {
    let limit = opening.limit.min(REQUEST_MAX);
    let state_limit = if measure { opening.state_limit.min(ARC_MAX) } else { opening.state_limit };
    Opener { limit, state_limit, ..opening.owned() }
}

/// The result of the examination of a device.
pub struct Looked {
    pub report: DeviceReport,
    pub findings: Vec<Finding>,
    /// Open, if it could be opened and answers.
    pub device: Option<Arc<Opened>>,
    pub known: Known,
}

/// The facts that other parts need.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    pub flags: Option<MigrationFlags>,
    pub state: Option<State>,
    pub stop_copy_bytes: Option<u64>,
}

impl Looked {
    pub fn name(&self) -> &str {
        &self.report.device
    }

    fn find(&mut self, kind: &'static Kind, what: impl Into<String>) {
        let finding = Finding::new(kind, &self.report.device, what);
        self.findings.push(finding);
    }
}

/// Examines a device. A failure is a finding, not an error.
pub fn look(name: &str, opener: &Opener, moves: &Moves) -> Looked {
    let report = DeviceReport { device: name.into(), facts: Facts::default(), measured: None };
    let nothing = Looked { report, findings: Vec::new(), device: None, known: Known::default() };
    let (given, opener, moves) = (name.to_owned(), opener.clone(), moves.clone());
    let done = within(LOOK_MAX, move || {
        let device = Arc::new(opener.opening().open(&given)?);
        let mut looked = Looked { device: Some(Arc::clone(&device)), ..nothing };
        if let Err(error) = facts::gather(&device, &moves, &mut looked) {
            looked.findings.push(of_error(&given, &error));
            looked.device = None;
        }
        Ok::<Looked, anyhow::Error>(looked)
    });
    let unreached = |finding: Finding| Looked {
        report: DeviceReport { device: name.into(), facts: Facts::default(), measured: None },
        findings: vec![finding],
        device: None,
        known: Known::default(),
    };
    match done {
        Done::Value(Ok(looked)) => looked,
        Done::Value(Err(error)) => unreached(of_error(name, &error)),
        Done::Panicked(what) => {
            unreached(Finding::new(&DEVICE_UNUSABLE, name, format!("the look at it failed: {what}")))
        }
        Done::Hangs => unreached(silent(name, LOOK_MAX)),
    }
}

fn silent(name: &str, limit: Duration) -> Finding {
    Finding::new(&DEVICE_SILENT, name, format!("it did not answer within {limit:?}"))
}

/// The finding for an error of a device.
pub fn of_error(name: &str, error: &anyhow::Error) -> Finding {
    let message = exit::message(error);
    let found = |kind: &'static Kind| Finding::new(kind, name, message.clone());
    // An obstacle that sysfs shows has its own advice.
    if let Some(listed) = open::listed(name)
        && let Some(why) = &listed.unusable
    {
        let kind =
            if matches!(why, Unusable::NoPermission { .. }) { &DEVICE_FORBIDDEN } else { &DEVICE_UNUSABLE };
        return found(kind).with_remedy(why.advice());
    }
    let Some(client) = error.chain().find_map(|cause| cause.downcast_ref::<Error>()) else {
        return found(if exit::code(error) == Code::Unreachable {
            &DEVICE_MISSING
        } else {
            &DEVICE_UNUSABLE
        });
    };
    match client {
        error if exit::is_in_use(error) => in_use(name, message),
        Error::Os { errno: Errno::EACCES | Errno::EPERM, .. } => found(&DEVICE_FORBIDDEN),
        Error::Os { errno: Errno::ENOENT | Errno::ECONNREFUSED, .. } => found(&DEVICE_MISSING),
        Error::Timeout { .. } => found(&DEVICE_SILENT),
        Error::Disconnected { .. } => found(&DEVICE_GONE),
        Error::Refused { errno: Errno::ENODEV, .. } => found(&DEVICE_GONE),
        Error::Misbehaved { .. } if open::is_socket_path(name) => found(&DEVICE_NOT_VFIO_USER),
        _ => found(&DEVICE_UNUSABLE),
    }
}

/// A kernel device that another process has open, by its name in that process.
fn in_use(name: &str, message: String) -> Finding {
    let finding = Finding::new(&DEVICE_IN_USE, name, message);
    let Some(listed) = open::listed(name) else { return finding };
    let group = listed.group.map(|group| Path::new("/dev/vfio").join(group.to_string()));
    let holders = OpenElsewhere::look().holders(&listed.folder, group.as_deref());
    match holders.iter().find_map(|holder| holder.name.as_deref()) {
        Some(held) => finding.with_remedy(format!("name it as its holder has it: limosa doctor {held}")),
        None => finding,
    }
}

/// Measures the arcs of a stop, if the device runs and may be stopped. Says so first.
pub fn measure(looked: &mut Looked, in_use: bool, cancel: &Arc<AtomicBool>, out: &Output) {
    let Some(device) = looked.device.clone() else { return };
    let Known { flags: Some(flags), state: Some(state), .. } = looked.known else { return };
    if !flags.contains(MigrationFlags::STOP_COPY) {
        return;
    }
    let name = looked.name().to_owned();
    if state != State::Running {
        return looked
            .find(&NOT_MEASURED, format!("it is in {state}, and only a device that runs is stopped"));
    }
    if (device.is_beside_vmm() || device.is_borrowed()) && !in_use {
        let what = "a guest is using it, which would wait for its device; --in-use says that it may";
        return looked.find(&NOT_MEASURED, what);
    }
    out.say(&format!(
        "measuring {name}: it is stopped for a moment, for {ARC_MAX:?} or so at most, and runs again then"
    ));
    let (measured, called_off) = (Arc::clone(&device), Arc::clone(cancel));
    match within(LOOK_MAX, move || measure::measure(&**measured, flags, &called_off)) {
        Done::Value(result) => {
            if let Some(why) = result.failed {
                looked.find(&NOT_MEASURED, why);
            }
            if let Some(why) = result.not_restored {
                looked.find(&NOT_RESTORED, why);
            }
            looked.report.measured = result.measured;
        }
        Done::Panicked(what) => looked.find(&NOT_MEASURED, format!("the measurement failed: {what}")),
        Done::Hangs => {
            looked.findings.push(silent(&name, LOOK_MAX));
            looked.find(&NOT_RESTORED, "it does not answer since it was measured");
        }
    }
}
