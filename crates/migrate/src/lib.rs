//! The engine that moves live VFIO devices, with guest memory where there is any.
#![forbid(unsafe_code)]

pub mod stream;
