//! The checks, by family.

mod concurrency;
mod device;
mod error;
mod feature;
mod kernel;
mod logging;
mod peer;
mod precopy;
mod reset;
mod resuming;
mod session;
mod size;
mod states;
mod vfio_user;

use crate::check::Check;

/// Every check, in the order in which they run.
pub fn checks() -> Vec<Check> {
    let families = [
        device::checks(),
        feature::checks(),
        states::checks(),
        session::checks(),
        precopy::checks(),
        size::checks(),
        resuming::checks(),
        reset::checks(),
        error::checks(),
        logging::checks(),
        concurrency::checks(),
        peer::checks(),
        kernel::checks(),
        vfio_user::checks(),
    ];
    families.into_iter().flatten().collect()
}
