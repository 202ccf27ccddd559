//! Interrupts as the device sees them. SEAM.

use std::os::fd::OwnedFd;

use limosa_protocol::Errno;

use crate::Irq;

/// The interrupts of a device, by index and vector, wired to eventfds by the client.
#[derive(Debug, Default)]
pub struct Irqs {}

impl Irqs {
    /// Nothing wired yet.
    pub fn new(_irqs: &[Irq]) -> Irqs {
        todo!()
    }
    /// The device raises a vector: signals its eventfd unless masked (then it is pending and fires at the unmask).
    pub fn trigger(&self, _index: u32, _vector: u32) {
        todo!()
    }
    /// Client side (SET_IRQS): wires vectors; `None` unwires. EINVAL outside the index, or an fd that is no eventfd.
    pub fn wire(&self, _index: u32, _start: u32, _fds: Vec<Option<OwnedFd>>) -> Result<(), Errno> {
        todo!()
    }
    /// Client side: unwires all of an index.
    pub fn disable(&self, _index: u32) -> Result<(), Errno> {
        todo!()
    }
    /// Client side: triggers, masks, unmasks `count` vectors.
    pub fn trigger_range(&self, _index: u32, _start: u32, _count: u32) -> Result<(), Errno> {
        todo!()
    }
    /// Masks.
    pub fn mask(&self, _index: u32, _start: u32, _count: u32) -> Result<(), Errno> {
        todo!()
    }
    /// Unmasks, and fires what is pending.
    pub fn unmask(&self, _index: u32, _start: u32, _count: u32) -> Result<(), Errno> {
        todo!()
    }
    /// Unwires everything.
    pub fn disable_all(&self) {
        todo!()
    }
}
