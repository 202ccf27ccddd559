//! Devices that are ready to use.
//!
//! [`synthetic`]: the device for tests and measurements, with a state of any size that dirties
//! itself, DMA into guest memory, faults on demand, and the means to prove after a move that
//! nothing was lost. [`uart`]: a PCI serial card that Linux binds its 8250 driver to; or as Linux'
//! sample device mtty is one, with that one's data stream.
#![forbid(unsafe_code)]

pub mod synthetic;
pub mod uart;
