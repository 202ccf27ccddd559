//! Devices that are ready to use.
//!
//! [`synthetic`]: the device for tests and measurements, with a state of any size that dirties itself, DMA into guest
//! memory, faults on demand, and the means to prove after a move that nothing was lost. [`uart`]: a PCI serial card for
//! the 8250 driver of Linux, or the card of the Linux sample driver mtty, with its data stream.
#![forbid(unsafe_code)]

pub mod synthetic;
pub mod uart;
