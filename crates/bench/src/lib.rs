//! Measures a device beside the floor: region accesses, data streams and dirty reports. A vfio-user device's are
//! each next to a bare AF_UNIX request and reply of the same sizes, and next to the `vfio_user`
//! crate where it can do the same, in turns within one run; for a device of the kernel's see [`run_kernel`].
//!
//! Programs that measure call [`run_if_child`] first in `main`: the other ends are this program
//! started again.
#![forbid(unsafe_code)]

mod cases;
mod child;
mod crate_server;
mod device;
mod floor;
mod kernel;
mod measure;
mod rival;
mod streams;
mod table;

pub use cases::{Subject, run};
pub use child::{pin_to_one_core, run_if_child};
pub use kernel::run_kernel;
pub use measure::Timing;
pub use table::{Figure, print, print_head};
