//! Where a trace goes: lines, JSON lines, a capture file, statistics.

mod json;
mod lines;
mod pcapng;
mod statistics;

pub use json::{Json, SCHEMA};
pub use lines::{Lines, line};
pub use pcapng::{LINK_TYPE, Pcapng};
pub use statistics::{Statistics, StatisticsHandle, Table, Tally};
