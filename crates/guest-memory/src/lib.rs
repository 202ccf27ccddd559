//! Mappings of files with guest memory: a [`FileMapping`] for a device's DMA and for the migration engine, and
//! [`MappedFiles`], which maps each file of a client once.
//!
//! [`ManyReaders`] is the lock for a table of such mappings: many threads access the memory, and an unmap waits for them.
//!
//! Shared memory changes at any time, and its file may be truncated under the mapping. This crate handles both, and
//! contains the `unsafe` code for it.
mod count;
mod files;
mod many_readers;
mod mapping;
mod pinned;
mod pinned_sockets;
mod sigbus;
#[cfg(test)]
mod tests;
mod window;

pub use files::{ClientFile, FILES_MAX, MAPPED_BYTES_MAX, MappedFiles, WINDOWS_MAX};
pub use many_readers::{ManyReaders, ReadGuard, WriteGuard};
pub use mapping::{FileMapping, has_no_swap};
pub use pinned::PinnedBytes;
pub use pinned_sockets::SendPart;
pub use window::kernel_mappings_max;
