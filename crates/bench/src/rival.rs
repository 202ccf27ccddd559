//! The `vfio_user` crate as a contender: its client with its server.

use std::os::unix::net::UnixListener;

use anyhow::Context;
use vfio_user::Client;

use crate::child::{Child, Role};

/// A connected client of the crate.
pub(crate) struct Rival {
    client: Client,
    // Dropped after the client has gone.
    _server: Child,
}

impl Rival {
    /// On the crate's own server, in another process.
    pub(crate) fn on_its_own_server() -> anyhow::Result<Rival> {
        // It is removed as soon as both ends are connected, so that nothing is left when a signal ends the measurement.
        let folder = tempfile::tempdir().context("cannot make a folder for a socket")?;
        let path = folder.path().join("vfio_user.sock");
        let listener = UnixListener::bind(&path).context("cannot listen on a socket")?;
        let child = Child::start(Role::VfioUserCrate, listener.into())?;
        let client = Client::new(&path).map_err(|error| anyhow::anyhow!("vfio_user's client: {error}"))?;
        Ok(Rival { client, _server: child })
    }

    /// Reads a region.
    pub(crate) fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> anyhow::Result<()> {
        self.client.region_read(region, offset, data).map_err(|error| anyhow::anyhow!("vfio_user: {error}"))
    }

    /// Writes a region.
    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        self.client.region_write(region, offset, data).map_err(|error| anyhow::anyhow!("vfio_user: {error}"))
    }
}
