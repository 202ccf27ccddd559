//! Guest memory that lies in a file, mapped into this process: a [`FileMapping`] for a device that reaches it by DMA
//! and for an engine that moves it, and [`MappedFiles`], which maps each file of a client once.
//!
//! [`ManyReaders`] is the lock for a table of such mappings: many threads access the memory, and an unmap waits for them.
//!
//! Memory that others have too changes at any time, and its file may be truncated under the mapping. Both are dealt with here, in the one place with the `unsafe` that this takes.
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
