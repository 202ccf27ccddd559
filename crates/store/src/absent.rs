//! [`Object`] where the client of object stores is not built in: there is none.

use std::convert::Infallible;

use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter};

use crate::ObjectError;

/// An object for a snapshot, which cannot exist here: the feature `s3` is off.
#[derive(Debug)]
pub struct Object(Infallible);

impl Object {
    /// Whether a name is that of an object rather than a file's.
    pub fn is_url(name: &str) -> bool {
        name.starts_with("s3://")
    }

    /// Refused as [`ObjectError::NotBuilt`].
    pub fn from_env(url: &str) -> Result<Object, ObjectError> {
        Object::new(url, [])
    }

    /// Refused as [`ObjectError::NotBuilt`].
    pub fn new(url: &str, _: impl IntoIterator<Item = (String, String)>) -> Result<Object, ObjectError> {
        Err(ObjectError::NotBuilt { url: url.into() })
    }

    /// Whether a save replaces an existing object.
    pub fn replacing(self, _: bool) -> Result<Object, ObjectError> {
        match self.0 {}
    }
}

impl SnapshotTarget for Object {
    fn name(&self) -> String {
        match self.0 {}
    }

    fn create(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        match self.0 {}
    }
}

impl SnapshotSource for Object {
    fn name(&self) -> String {
        match self.0 {}
    }

    fn open(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        match self.0 {}
    }
}
