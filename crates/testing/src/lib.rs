//! What the tests of several crates share: processes whose lines and ends are awaited, files of guest memory, and the
//! calls that a wrapper of a device, a stream or a link passes on.
//!
//! It depends on no crate of the workspace, so that the unit tests of each can use it. Like an assertion, every call
//! panics, and says why, when what it is asked for does not come about.
#![forbid(unsafe_code)]

mod forward;
mod memory;
pub mod points;
mod process;
mod programs;
mod terminal;
mod transcript;

use std::time::Duration;

pub use memory::{memfd, memfd_named, proc_path};
pub use process::{Ended, Process};
pub use programs::{
    beside_the_test, built_example, copy_of_this_program, is_alone, program, run_alone, this_test,
};
pub use terminal::{Screen, Terminal};
pub use transcript::{Stream, Transcript};

/// Longer than anything takes in a test on a busy machine; what takes longer hangs.
pub const LIMIT: Duration = Duration::from_secs(120);
