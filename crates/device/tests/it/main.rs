//! Devices of this crate, driven through machines and loopbacks.

mod arcs;
mod client_files;
mod clients;
mod common;
mod copies;
mod features;
mod loopback;
mod next;
mod random_walks;
mod resets;
mod sessions;
mod whole;
