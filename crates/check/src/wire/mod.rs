//! The messages of vfio-user.

use crate::check::Check;

pub(crate) fn checks() -> Vec<Check> {
    Vec::new()
}
