//! The devices of a note, opened as far as they still exist: a missing device does not block the others.

use limosa_protocol::Errno;

use crate::exit::{self, Code};
use crate::moves::Halted;
use crate::open::{self, Opened, Opening};

/// The devices of a note, each with its index in the note.
pub struct NotedDevices {
    pub open: Vec<(usize, Opened)>,
    /// Devices that no longer exist, and why.
    pub gone: Vec<(usize, String)>,
    /// Devices that may still exist.
    pub unreachable: Vec<(usize, anyhow::Error)>,
}

impl NotedDevices {
    /// Opens them. `given` is the name by which the user means one of them now.
    pub fn open(opening: Opening<'_>, halted: &Halted, given: Option<&str>) -> NotedDevices {
        let mut devices = NotedDevices { open: Vec::new(), gone: Vec::new(), unreachable: Vec::new() };
        if halted.is_of_another_boot() {
            let why = || "this machine was restarted since".to_owned();
            devices.gone = (0..halted.devices.len()).map(|at| (at, why())).collect();
            return devices;
        }
        for (at, noted) in halted.devices.iter().enumerate() {
            let expected = halted.known(at).identity;
            let given = given.filter(|name| expected.is_some() && open::identity(name) == expected);
            let name = given.unwrap_or(noted);
            if given.is_none() && !open::is_lasting(noted) {
                let what = "the note names it relative to a folder that it does not say";
                devices.unreachable.push((at, exit::error(Code::Refused, what)));
                continue;
            }
            match (expected, open::identity(name)) {
                (Some(_), None) => devices.gone.push((at, "it is gone".into())),
                (Some(expected), Some(found)) if expected != found => {
                    let why = "another device has this name now: it is not the one that was moved";
                    devices.gone.push((at, why.into()));
                }
                _ => match opening.open(name) {
                    Ok(device) => devices.open.push((at, device)),
                    Err(error) if is_gone(&error) => {
                        devices.gone.push((at, format!("it is gone ({})", exit::message(&error))));
                    }
                    Err(error) => devices.unreachable.push((at, error)),
                },
            }
        }
        devices
    }
}

/// Whether no process serves the device any more.
fn is_gone(error: &anyhow::Error) -> bool {
    let refused = |cause: &limosa_client::Error| {
        matches!(cause, limosa_client::Error::Os { errno: Errno::ECONNREFUSED, .. })
    };
    error.chain().filter_map(|cause| cause.downcast_ref()).any(refused)
}
