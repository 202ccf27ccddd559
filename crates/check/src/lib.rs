//! A conformance suite for VFIO live migration: named checks, each of which cites its clauses.
//!
//! The suite uses a device only through [`limosa_client::Device`], so that kernel drivers and vfio-user servers pass or
//! fail the same checks. Only the checks of the family `vfio-user` work below it: they send their own messages over a
//! [`Wire`]. [`CLAUSES`] is the list of all requirements of the documents; [`checks`] lists the checks; [`run`] runs
//! them and returns a [`Report`].
#![forbid(unsafe_code)]

mod bytes;
mod check;
mod clause;
mod families;
mod fuzz;
mod profile;
mod recorder;
mod report;
mod run;
mod survey;
mod target;
mod trial;
mod wire;

pub use check::{Check, Family, Needs, Outcome};
pub use clause::{CLAUSES, Clause, Document, clauses_document, coverage};
pub use families::checks;
pub use fuzz::{Difference, FuzzOptions, FuzzReport, Script, fuzz, is_signature, replay};
pub use profile::{Profile, ProfileError};
pub use report::{Checked, Counts, Report};
pub use run::{Done, Limits, Options, back, run, within};
pub use survey::Facts;
pub use target::{Action, StateView, Target, Transport};
pub use wire::{SocketWire, Wire};
