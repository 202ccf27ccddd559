//! Hooks and logs that a test states as closures.

use std::io;

use limosa_migrate::{CommitNote, DirtyLog, Vmm};
use limosa_protocol::bitmap::DirtyBitmap;

/// Does something when the vCPUs stop.
pub struct AtStop<F>(pub F);

impl<F: Fn() + Sync> Vmm for AtStop<F> {
    fn stop(&self) -> Result<(), String> {
        (self.0)();
        Ok(())
    }
}

/// Does something when COMMIT is about to be sent.
pub struct AtCommit<F>(pub F);

impl<F: Fn(&CommitNote) + Sync> Vmm for AtCommit<F> {
    fn committing(&self, note: &CommitNote) -> Result<(), String> {
        (self.0)(note);
        Ok(())
    }
}

/// A log of all writers, devices too, of which this is a harvest.
pub struct Harvest<F>(pub F);

impl<F: FnMut(&DirtyBitmap) -> io::Result<()> + Send> DirtyLog for Harvest<F> {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn harvest(&mut self, _: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        (self.0)(dirty)
    }
    fn stop(&mut self) {}
    fn covers_devices(&self) -> bool {
        true
    }
}
