//! Checks that a new device, its sockets and their rights match the device of the old server.

use std::path::Path;

use limosa_host::{Group, SocketAccess};
use limosa_switch_over::Refusal;

use super::super::listener::CameListener;
use super::super::offer::{difference, offer_of};
use super::super::record::Offer;
use super::super::{regions, signals};
use super::New;

impl New {
    /// Refuses a device that differs from this one, or that this one cannot continue.
    pub(in super::super) fn check(&self, device: u16, theirs: &Offer) -> Result<(), Refusal> {
        let flags = self.machine.migration_flags();
        let flags = flags.ok_or_else(|| Refusal::of_device(device, "the new device has no migration"))?;
        let ours = Offer { model: self.options.model.clone(), ..offer_of(self.machine.description(), flags) };
        if let Some(what) = difference(theirs, &ours) {
            let what = format!(
                "{what}; start the new server with the same options, or use a version with the same device"
            );
            return Err(Refusal::of_device(device, what));
        }
        signals::check(device, &self.machine)?;
        regions::check(device, &self.machine)
    }

    /// The new mode and group of its socket, if they differ from the old server's.
    pub(super) fn new_access(&self) -> Option<SocketAccess> {
        let (mode, group) = self.door.as_ref()?.record.access?;
        let theirs = SocketAccess { mode, group: group.map(Group) };
        Some(self.options.socket).filter(|ours| *ours != theirs)
    }

    /// Refuses sockets that were handed over, unless the path of each leads to it.
    pub(super) fn check_sockets(&self, device: u16) -> Result<(), Refusal> {
        let (Some(path), Some(door)) = (&self.socket, &self.door) else { return Ok(()) };
        let named = |path: Option<&Path>| path.map_or("no path".into(), |path| path.display().to_string());
        let refused = |what: &str, theirs: Option<&Path>, ours: Option<&Path>| {
            let (theirs, ours) = (named(theirs), named(ours));
            let what = format!(
                "it listens {what}at {theirs}, and the new server at {ours}; start the new server with the same socket"
            );
            Err(Refusal::of_device(device, what))
        };
        if !door.is_at(path) {
            return refused("", door.at().as_deref(), Some(path));
        }
        match (&self.control, &self.control_socket) {
            (None, None) => Ok(()),
            (Some(theirs), Some(ours)) if theirs.is_at(ours) => Ok(()),
            (theirs, ours) => {
                let theirs = theirs.as_ref().and_then(CameListener::at);
                refused("for control clients ", theirs.as_deref(), ours.as_deref())
            }
        }
    }

    /// Refuses a mode or group that this process cannot give to the socket.
    pub(super) fn check_access(&self, device: u16) -> Result<(), Refusal> {
        let (Some(access), Some(path)) = (self.new_access(), &self.socket) else { return Ok(()) };
        limosa_host::may_give_access(path, &access).map_err(|error| {
            let what = format!("the new server cannot give its socket another mode or group: {error}");
            Refusal::of_device(device, what)
        })
    }
}
