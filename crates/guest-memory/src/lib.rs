//! Guest memory that lies in a file, mapped into this process: a [`FileMapping`] for a device that reaches it by DMA
//! and for an engine that moves it.
//!
//! Whoever maps memory that others have too must expect that it changes at any time, and that the file is cut short
//! under the mapping. Both are dealt with here, in the one place with the `unsafe` that this takes.
mod mapping;
mod sigbus;
#[cfg(test)]
mod tests;

pub use mapping::FileMapping;
