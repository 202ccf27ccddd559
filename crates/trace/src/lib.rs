//! What others ask of VFIO devices and vfio-user servers, decoded as it happens: which feature, GET, SET or PROBE, the payload,
//! the fds, the errno, the time (`docs/trace.md`).
//!
//! Sources see: [`proxy`], between a client and a server, and [`ptrace`], in a process. What they see ([`seen`]) goes to a
//! [`Recorder`](recorder::Recorder), in whose thread it is decoded ([`decode`]) and written ([`sink`]). The [`framer`] and
//! the decoders are pure: bytes in, [`Event`]s out.
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
