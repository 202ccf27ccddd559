//! The threads of one side, which move device data and memory, and what they share.

pub(crate) mod device_flow;
pub(crate) mod device_sender;
pub(crate) mod device_workers;
pub(crate) mod driven;
pub(crate) mod jobs;
pub(crate) mod keep_alive;
pub(crate) mod ram;
pub(crate) mod read_ahead;
pub(crate) mod sending;
pub(crate) mod team;
pub(crate) mod way_back;
