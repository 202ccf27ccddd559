//! What moves devices' data and memory: the threads of one side, and what they share.

pub(crate) mod device_sender;
pub(crate) mod device_workers;
pub(crate) mod driven;
pub(crate) mod keep_alive;
pub(crate) mod ram;
pub(crate) mod sending;
pub(crate) mod team;
