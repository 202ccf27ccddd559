//! From the name that a user gave to a device.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use limosa_client::{Device, Error};
use limosa_protocol::Errno;
use limosa_vfio_user::client::{Client, Options};

use crate::exit::{self, Code};

/// Opens the device that a user named; requests have this time limit.
pub fn device(name: &str, limit: Duration) -> anyhow::Result<Box<dyn Device>> {
    let path = Path::new(name);
    if !path.exists() {
        return Err(exit::error(
            Code::Unreachable,
            format!(
                "{name}: there is no such socket; expected the path of a vfio-user socket that a server listens on"
            ),
        ));
    }
    if !std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        return Err(exit::error(
            Code::Unreachable,
            format!("{name}: it is no socket; expected the path of a vfio-user socket"),
        ));
    }
    let options = Options { request_limit: limit, ..Options::default() };
    let client = Client::connect(path, options).map_err(|error| {
        let hint = hint(&error);
        anyhow::Error::from(error).context(format!("{name} cannot be opened{hint}"))
    })?;
    Ok(Box::new(client))
}

/// What a person can look for.
fn hint(error: &Error) -> &'static str {
    match error {
        Error::Os { errno: Errno::ECONNREFUSED, .. } => " (nobody listens there: is its server running?)",
        Error::Timeout { .. } => " (most servers serve one client at a time: is another one connected?)",
        Error::Misbehaved { .. } => " (is it a vfio-user server?)",
        _ => "",
    }
}

/// Refuses one device under two names.
pub fn different(source: &str, destination: &str) -> anyhow::Result<()> {
    let place = |name: &str| std::fs::metadata(name).ok().map(|found| (found.dev(), found.ino()));
    match (place(source), place(destination)) {
        (Some(one), Some(other)) if one == other => Err(exit::error(
            Code::Usage,
            format!("{source} and {destination} are the same device; expected another one to move to"),
        )),
        _ => Ok(()),
    }
}
