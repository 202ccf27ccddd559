//! What moves devices' data and memory: threads, and what they share.

pub(crate) mod device_stream;
pub(crate) mod device_workers;
pub(crate) mod ram;
pub(crate) mod sending;
