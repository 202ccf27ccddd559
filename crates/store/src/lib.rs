//! Snapshots in S3-compatible object stores: [`Object`], the place `s3://BUCKET/KEY`, which
//! [`limosa_migrate`]'s source saves to and its destination loads from.
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
//!         Outcome::InDoubt(_) => unreachable!("nobody else runs a snapshot"),
//!     }
//!     Ok(())
//! }
//! ```
//!
//! The object is one stream of `docs/stream.md`, the same bytes as in a file. `docs/snapshots.md` says what is promised
//! of it. In short: it appears when it is whole, with the request that completes a multipart upload; one that is there
//! already is not overwritten unless [`Object::replacing`] says so; a load reads it twice, and both times the same.
//!
//! # Memory
//!
//! A save holds the part that is being filled and those on their way: of an object of up to 8 GiB, 8 MiB and at most
//! four times 8 MiB. As S3 takes no more than 10,000 parts their size doubles with every thousand; with parts of 64 MiB
//! and more, which is from 56 GiB on, two are held. A load holds at most eight ranges of 4 MiB.
//!
//! # Threads
//!
//! The client is asynchronous; nobody sees that. It runs in one thread that each [`Object`] has, and callers wait on
//! an eventfd until something has come, somebody calls the move off, or nothing has moved for too long.
#![forbid(unsafe_code)]

mod config;
mod connector;
mod download;
mod error;
mod runtime;
mod upload;

use std::sync::Arc;

pub use config::{Object, ObjectError};
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter};

impl SnapshotTarget for Object {
    fn name(&self) -> String {
        self.url.clone()
    }

    fn create(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        Ok(Box::new(upload::Upload::begin(Arc::clone(&self.client), self.replace, wait)?))
    }
}

impl SnapshotSource for Object {
    fn name(&self) -> String {
        self.url.clone()
    }

    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        Ok(Box::new(download::Download::open(Arc::clone(&self.client), wait)?))
    }
}
