//! An [`Object`] as the place of a snapshot.

use std::sync::Arc;

use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{MigrationId, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter};

use crate::{Object, download, upload};

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
