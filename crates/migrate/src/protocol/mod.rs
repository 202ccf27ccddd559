//! The rules of a move, without threads, links or a clock: `now` is an argument.

pub(crate) mod commit;
pub(crate) mod credit;
pub(crate) mod flush;
pub(crate) mod idle;
pub(crate) mod limits;
pub(crate) mod link_count;
pub(crate) mod pace;
mod round;
pub(crate) mod share;
pub(crate) mod state_limit;
pub(crate) mod stop_policy;

pub use round::Round;
