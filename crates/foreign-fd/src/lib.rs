//! File descriptors from other processes.
//!
//! A process that receives fds from a peer has to deal with any fd that the peer chooses to send. Closing the last fd
//! of a file can block: a TCP socket with SO_LINGER and a full send queue waits for its own peer, a terminal for its
//! output, a file on NFS or FUSE for a server or a daemon. Neither examining the fd nor `recv` without space for fds
//! helps: the kernel closes fds that it does not pass in the receiving thread, and fds in a socket's queue in the
//! thread that closes the socket. So
//!
//! - [`receive`] receives all fds, with space for the most that the kernel passes at once;
//! - [`ForeignFd`] holds one, and determines its kind without a call into its file system. An fd of a kind whose
//!   closing never blocks becomes an ordinary [`OwnedFd`](std::os::fd::OwnedFd);
//! - [`ForeignEventFd`] is an eventfd that is signalled without waiting, whatever the peer does to it;
//! - [`Foreign`] drops everything else, including sockets to peers, on the background threads of a closer.
//!
//! There is one limit: a process ends only when all of its files are closed. While the daemon of a FUSE file does not
//! answer, a process that has received that file does its work and reports its result, but stays in the process table,
//! even after SIGKILL.

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
