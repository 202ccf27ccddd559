//! How a new server process replaces an old one under a running VM on the same host.
//!
//! The old server listens on a UNIX socket ([`TakeOver`]). The new one connects ([`take`]) and pulls from the old process, with
//! the kernel's consent, the other end of a private channel. Over it the old server hands over [`Item`]s in three parts:
//! an offer, what can be handed over while devices run (in rounds), and the rest once they stand still. One compare-and-swap in
//! memory that both map decides which of the two serves from then on (`word.rs` has its states). Whatever fails, and at
//! whatever step a process is killed, exactly one of them serves, or the one that lives if it can.
//!
//! This crate gives items no meaning: a [`Giver`] makes them and a [`Taker`] uses them. `docs/switch-over.md` draws the protocol
//! and goes through its failures.

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
