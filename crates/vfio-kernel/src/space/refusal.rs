//! The errors of an address space, and what a refused mapping means.

use limosa_client::Error;
use limosa_protocol::Errno;

use super::mappings::Mapping;

pub(super) fn usage(name: &str, what: impl Into<String>) -> Error {
    Error::Usage { device: name.into(), what: what.into() }
}

pub(super) fn refused(
    name: &str,
    request: impl Into<String>,
    errno: Errno,
    hint: impl Into<String>,
) -> Error {
    Error::Refused { device: name.into(), request: request.into(), errno, hint: hint.into().into() }
}

/// How messages name the mapping of memory.
pub(super) fn map_request(mapping: &Mapping) -> String {
    format!("mapping {:#x} bytes at IOVA {:#x}", mapping.size, mapping.iova)
}

/// What a refused mapping means, where that does not depend on the door.
pub(super) fn map_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::EEXIST => "memory is mapped there already",
        Errno::EFAULT => "the memory cannot be pinned: is all of it mapped, and is its file long enough?",
        Errno::ENOMEM => "pinning the memory would exceed RLIMIT_MEMLOCK (ulimit -l)",
        Errno::ENOSPC => {
            "the container has its maximum of mappings; map larger pieces, or raise dma_entry_limit of the module vfio_iommu_type1"
        }
        _ => "",
    }
}
