//! Records and decodes requests of other processes to VFIO devices and vfio-user servers: the feature, GET, SET or
//! PROBE, the payload, the fds, the errno, the time (`docs/trace.md`).
//!
//! The sources are [`proxy`], between a client and a server, and [`ptrace`], in a process. Their records ([`seen`]) go
//! to a [`Recorder`](recorder::Recorder), whose thread decodes ([`decode`]) and writes them ([`sink`]). The [`framer`]
//! and the decoders are pure: they turn bytes into [`Event`]s.
#![deny(unsafe_code)]

pub mod decode;
pub mod event;
pub mod framer;
pub mod proxy;
pub mod ptrace;
pub mod recorder;
pub mod seen;
pub mod sink;

pub use event::Event;
