//! The vfio-user protocol, both sides: VFIO requests as messages on a UNIX socket
//! (`vfio-user.rst`), with live migration and what that needs beyond the specification.
//!
//! [`codec`] is what messages look like, [`version`] what two sides agree on when they meet,
//! [`connection`] how messages and fds travel, [`extension`] what is added to the specification;
//! [`Client`] is a device behind a socket as a VMM sees it, [`server`] puts one there.
#![forbid(unsafe_code)]

pub mod client;
pub mod codec;
pub mod connection;
pub mod extension;
pub mod server;
pub mod version;

pub use client::Client;
