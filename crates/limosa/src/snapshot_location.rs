//! Where snapshots lie: a file, or an object in an S3-compatible store.

use std::io::ErrorKind;
use std::path::Path;

use limosa_migrate::{SnapshotFile, SnapshotSource, SnapshotTarget};
use limosa_store::{Object, ObjectError};

use crate::exit::{self, Code};
use crate::new_file;

/// Where a snapshot is.
pub enum SnapshotLocation {
    File(SnapshotFile),
    Object(Object),
}

impl SnapshotLocation {
    /// Where a snapshot is to be saved; nothing is opened yet. `replace` is whether an existing one may be replaced.
    pub fn to_save(name: &Path, replace: bool) -> anyhow::Result<SnapshotLocation> {
        if name.as_os_str() == "-" {
            let what = "-: a snapshot is published when it is whole, which a pipe cannot do; expected a file, as ./- if that is its \
                        name. From host to host, `limosa send` and `limosa receive` move without a file between them";
            return Err(exit::error(Code::Usage, what));
        }
        let place = SnapshotLocation::of(name, replace)?;
        match &place {
            SnapshotLocation::File(_) => new_file::check(name, "", replace)?,
            SnapshotLocation::Object(_) => {}
        }
        Ok(place)
    }

    /// A snapshot that the user names; nothing is opened yet. A file of another kind is refused.
    pub fn saved(name: &Path) -> anyhow::Result<SnapshotLocation> {
        if name.as_os_str() == "-" {
            let what = "-: a snapshot is not read from standard input; expected a file that `limosa save` wrote, as ./- if that is \
                        its name, or s3://BUCKET/KEY";
            return Err(exit::error(Code::Usage, what));
        }
        let place = SnapshotLocation::of(name, false)?;
        if matches!(place, SnapshotLocation::File(_)) {
            match limosa_host::check_regular(name, "expected a file that `limosa save` wrote") {
                Err(error) if error.kind() == ErrorKind::InvalidInput => {
                    return Err(exit::error(Code::Unreachable, format!("{}: {error}", name.display())));
                }
                // Any other error is explained where the file is opened.
                _ => {}
            }
        }
        Ok(place)
    }

    /// The snapshot that a note of this command names.
    pub fn noted(name: &Path) -> anyhow::Result<SnapshotLocation> {
        SnapshotLocation::of(name, false)
    }

    fn of(name: &Path, replace: bool) -> anyhow::Result<SnapshotLocation> {
        match name.to_str().filter(|name| name.starts_with("s3://")) {
            Some(url) => SnapshotLocation::object(url, replace),
            None => Ok(SnapshotLocation::File(SnapshotFile::new(name).replacing(replace))),
        }
    }

    fn object(url: &str, replace: bool) -> anyhow::Result<SnapshotLocation> {
        let object = Object::from_env(url).and_then(|object| object.replacing(replace));
        object.map(SnapshotLocation::Object).map_err(|error| {
            let code = match &error {
                ObjectError::Url { .. } | ObjectError::NotBuilt { .. } => Code::Usage,
                _ => Code::Unreachable,
            };
            exit::error(code, error.to_string())
        })
    }

    /// To save to.
    pub fn target(&self) -> &dyn SnapshotTarget {
        match self {
            SnapshotLocation::File(file) => file,
            SnapshotLocation::Object(object) => object,
        }
    }

    /// To load from.
    pub fn source(&self) -> &dyn SnapshotSource {
        match self {
            SnapshotLocation::File(file) => file,
            SnapshotLocation::Object(object) => object,
        }
    }
}
