//! The rules of a move without threads, links or a clock: `now` is an argument.

pub(crate) mod link_count;
pub(crate) mod stop_policy;

pub use stop_policy::{Convergence, Round, WhenStalled};
