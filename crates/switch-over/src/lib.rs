//! Replacing a server process by a new one under a running VM on the same host.
//!
//! The old server listens on a UNIX socket ([`TakeOver`]). The new one connects ([`take`]) and duplicates the other end
//! of a private channel from the old process, which the kernel has to permit. Over this channel the old server
//! transfers [`Item`]s in three parts: an offer, everything possible while devices run (in rounds), and the rest once
//! they are stopped. One compare-and-swap in shared memory decides which of the two serves from then on (`word.rs` has
//! its states). Whatever fails, and at whatever step a process is killed, at most one of them serves, and a surviving
//! process serves if it has the state.
//!
//! This crate does not interpret items: a [`Giver`] creates them and a [`Taker`] uses them. `docs/switch-over.md`
//! describes the protocol and its failures.

mod ask;
pub mod body;
mod channel;
mod child;
mod door;
mod error;
pub mod frame;
mod item;
mod new;
mod old;
mod parts;
mod peer;
mod word;

pub use ask::{Answer, ask};
pub use body::Refusal;
pub use channel::FdTransport;
pub use child::{OLD_SERVER_VARIABLE, parent_server, start_child};
pub use door::{PENDING_MAX, TakeOver};
pub use error::{Cause, Error, Step};
pub use frame::Malformed;
pub use item::{BYTES_MAX, FDS_MAX, ITEM_BYTES_MAX, ITEM_FDS_MAX, ITEMS_MAX, Item, TooLarge, Totals};
pub use new::{Commit, Committed, OldServer, TakeLimits, TakeOptions, Taken, Taker, Withdrawn, take};
pub use old::{GiveLimits, GiveOptions, Given, Giver, ROUNDS_MAX, give_to_child};
pub use parts::Report;
pub use peer::{Ending, Peer};
