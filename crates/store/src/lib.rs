//! Snapshots in S3-compatible object stores: [`Object`], `s3://BUCKET/KEY`, to which [`limosa_migrate`]'s source saves
//! and from which its destination loads.
//!
//! ```no_run
//! use limosa_migrate::{AfterSave, Outcome, Source};
//! use limosa_store::Object;
//!
//! fn save(source: Source<'_>) -> Result<(), Box<dyn std::error::Error>> {
//!     // Credentials, region and endpoint are the environment's: AWS_ACCESS_KEY_ID and so on.
//!     let object = Object::from_env("s3://snapshots/guest-17")?;
//!     match source.save(&object, AfterSave::Run) {
//!         Outcome::Moved(report) => println!("{report}"),
//!         Outcome::Undone { why, .. } => return Err(why.into()),
//!         // Only after a save that leaves the guest stopped: see `limosa_migrate::published`.
//!         Outcome::InDoubt(doubt) => return Err(doubt.why.into()),
//!     }
//!     Ok(())
//! }
//! ```
//!
//! The object is one stream of `docs/stream.md`, the same bytes as in a file. `docs/snapshots.md` has the guarantees. In
//! short: the object appears when it is complete, with the request that completes a multipart upload; an existing object is
//! not overwritten unless [`Object::replacing`] asks for it; a load reads the object twice, and the same bytes both times.
//!
//! # Memory
//!
//! A save uses memory for the part that is being filled and the parts in flight: for an object of up to 8 GiB, 8 MiB
//! and at most four times 8 MiB. S3 accepts at most 10,000 parts, so their size doubles with every thousand; from 56
//! GiB on, with parts of 64 MiB and more, there are only two parts. A load uses at most eight ranges of 4 MiB.
//!
//! # Threads
//!
//! The client is asynchronous, and its interface here is not. Each [`Object`] has a thread that runs the client. A caller
//! waits on an eventfd until there is a result, the move is cancelled, or no byte has moved for too long.
//!
//! # Features
//!
//! `s3`, on by default, is the client. Without it [`Object`] refuses every address ([`ObjectError::NotBuilt`]), and the crate has a
//! handful of dependencies: a program that passes the feature on is written once.
#![forbid(unsafe_code)]

#[cfg(not(feature = "s3"))]
mod absent;
#[cfg(feature = "s3")]
mod config;
#[cfg(feature = "s3")]
mod connector;
#[cfg(feature = "s3")]
mod download;
#[cfg(feature = "s3")]
mod error;
mod object_error;
#[cfg(feature = "s3")]
mod runtime;
#[cfg(feature = "s3")]
mod snapshot;
#[cfg(feature = "s3")]
mod upload;

#[cfg(not(feature = "s3"))]
pub use absent::Object;
#[cfg(feature = "s3")]
pub use config::Object;
pub use object_error::ObjectError;
