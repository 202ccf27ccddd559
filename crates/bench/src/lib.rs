//! Measures a device. [`measure`] measures the operations that a VMM waits for: arcs, data streams, dirty reports,
//! complete moves, each as a histogram within its share of the time. The [`Document`] of a run is compared with that of
//! another by [`compare`]. [`run`] measures the transport itself: the bench's own device, alternately with a bare
//! AF_UNIX request and reply of the same sizes, and with the `vfio_user` crate if it supports the operation.
//!
//! Programs that measure have to call [`run_if_child`] first in `main`, since they start themselves again as the other
//! ends.
#![forbid(unsafe_code)]

mod cases;
mod child;
mod compare;
mod crate_server;
mod device;
mod document;
mod floor;
mod html;
mod rival;
mod samples;
mod streams;
mod suite;
mod table;
mod turns;

pub use cases::run;
pub use child::{pin_to_one_core, run_if_child};
pub use compare::{Change, Comparison, Row, SHARE_LEAST, compare};
pub use document::{BYTES_MAX, Beside, Document, HEAD, Measure, Skipped, VERSION};
pub use suite::{Event, Open, Options, Run, Target, measure};
pub use table::{Figure, print};
pub use turns::Timing;
