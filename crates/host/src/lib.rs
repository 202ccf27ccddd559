//! What a process takes from its own host, checked before it is used: files that a user named, descriptors that another
//! process holds, UNIX sockets with a path, the users at the other end of them, and the wall clock.
//!
//! A process with more rights than others on the host must not lend them. A path can lead through a descriptor of another
//! user's process ([`resolve`] and [`Descriptor`]), a socket can have been put there by another user ([`check_server`]), and
//! the name of an own socket can lead to somebody else's by now ([`SocketPath`]).

#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "one call of the C library that has no safe wrapper")]
mod clock;
mod descriptor;
mod named;
mod process;
mod socket;
mod user;

pub use clock::{Clock, clock};
pub use descriptor::{Borrowed, Descriptor};
pub use named::{Entry, Named, open_folder, open_to_read, resolve};
pub use process::Process;
pub use socket::{SocketAccess, SocketPath, Untrusted, check_server, connect, listen, may_give_access};
pub use user::{Group, User};
