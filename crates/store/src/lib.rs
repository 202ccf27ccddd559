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
use limosa_migrate::{MigrationId, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter};

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

    /// Aborts the upload, which this [`Object`] remembers. Another process cannot know it, and there the answer is
    /// `false`.
    fn withdraw(&self, _: MigrationId, wait: Wait<'_>) -> Result<bool, LinkError> {
        upload::withdraw(&self.client, wait)
    }
}
