//! From the name that a user gave to a device.

use std::path::Path;
use std::time::Duration;

use limosa_client::Device;
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
    let options = Options { request_limit: limit, ..Options::default() };
    Ok(Box::new(Client::connect(path, options)?))
}
