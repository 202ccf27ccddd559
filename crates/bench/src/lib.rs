//! Measures a device. [`measure`] takes what a VMM waits for: arcs, data streams, dirty reports, whole moves, each as a histogram
//! within its share of time. The [`Document`] of a run is compared with that of another by [`compare`]. [`run`] measures the
//! transport itself: the bench's own device beside a bare AF_UNIX request and reply of the same sizes, and beside the `vfio_user`
//! crate where it can do the same, in turns within one run.
//!
//! Programs that measure call [`run_if_child`] first in `main`: the other ends are this program
//! started again.
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
