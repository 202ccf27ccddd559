//! The vfio-user protocol, both sides: VFIO requests as messages on a UNIX socket (`vfio-user.rst`), with live
//! migration and the extensions that it needs.
//!
//! [`codec`] has the messages, [`version`] the negotiation, [`connection`] the transport of messages and fds,
//! [`extension`] the extensions of the specification; [`Client`] is a device behind a socket as a VMM sees it,
//! [`server`] serves a device.
#![forbid(unsafe_code)]

pub mod client;
pub mod codec;
pub mod connection;
pub mod extension;
pub mod server;
pub mod version;

pub use client::Client;
