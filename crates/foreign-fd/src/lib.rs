//! File descriptors from other processes.
//!
//! A process that takes fds from a peer takes on what the peer chose to send. Closing the last fd of a file can block: a
//! TCP socket with SO_LINGER and a full send queue waits for its own peer, a terminal for its output, a file on NFS or
//! FUSE for a server or a daemon. Neither a look at the fd nor `recv` without room for fds helps: what the kernel does
//! not hand out, it closes in the thread that received, and what a socket still holds, it closes in the thread that
//! closes the socket. So
//!
//! - [`receive`] takes all the fds that come, with room for the most that the kernel passes at once;
//! - [`ForeignFd`] holds one, and tells the kinds apart without a call into its file system. An fd that was found to be
//!   of a kind whose closing never blocks becomes an ordinary [`OwnedFd`](std::os::fd::OwnedFd);
//! - [`ForeignEventFd`] is an eventfd that is signalled without waiting, whatever the peer does to it;
//! - [`Foreign`] drops everything else, sockets to peers included, on the threads of a closer, for which nobody waits.
//!
//! One thing this cannot help: a process ends only when all of its files are closed. While the daemon of a FUSE file
//! does not answer, a process that was sent that file does its work and reports its result, but stays in the process
//! table, even after SIGKILL.

mod aio;
mod closer;
mod event;
mod foreign;
mod kind;
mod pidfd;
mod receive;
#[cfg(test)]
mod tests;

pub use closer::{WAITING_MAX, keeps_up};
pub use event::ForeignEventFd;
pub use foreign::{Foreign, ForeignFd};
pub use pidfd::peer_pidfd;
pub use receive::{FDS_MAX, Received, receive, receive_at, receive_bytes, receive_parts};
