//! Devices of this crate, driven through machines and loopbacks.

mod arcs;
mod clients;
mod common;
mod features;
mod loopback;
mod random_walks;
mod resets;
mod sessions;
mod whole;
