//! Checked access to the process's own host: files named by a user, descriptors of other processes, UNIX sockets
//! with a path, the users at the other end of them, and the wall clock.
//!
//! A process with more rights than its users must not extend these rights to them. A path can lead through a descriptor
//! of another user's process ([`resolve`] and [`Descriptor`]), another user can have created a socket
//! ([`check_server`]), and the path of the process's own socket can lead to another one by now ([`SocketPath`]).

#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "one call of the C library that has no safe wrapper")]
mod clock;
mod descriptor;
mod named;
mod process;
mod regular;
mod socket;
mod user;

pub use clock::{Clock, clock};
pub use descriptor::{Borrowed, Descriptor};
pub use named::{Entry, Named, open_folder, open_to_read, resolve};
pub use process::Process;
pub use regular::{check_regular, open_regular, other_than_file};
pub use socket::{SocketAccess, SocketPath, Untrusted, check_server, connect, listen, may_give_access};
pub use user::{Group, User};
