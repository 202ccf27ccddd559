//! Interrupts (`vfio-user.rst: VFIO_USER_DEVICE_SET_IRQS`).

use limosa_device::{Machine, NextClient, SetIrqs};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::IrqSetFlags;

use crate::codec::{IrqData, SetIrqs as Message};

/// Performs a client's request on the device's interrupts, or on those of the next client.
pub(super) fn set_irqs(
    machine: &Machine,
    next: Option<&NextClient>,
    set: &Message<'_>,
    fds: Vec<ForeignFd>,
) -> Result<(), Errno> {
    let apply = |start, what| match next {
        Some(next) => next.set_irqs(machine, set.index, start, what),
        None => machine.set_irqs(set.index, start, what),
    };
    match set.data {
        IrqData::Eventfds => wired(machine, set, fds).and_then(|fds| apply(set.start, SetIrqs::Wire(fds))),
        _ if !fds.is_empty() => Err(Errno::EINVAL),
        IrqData::None if set.count == 0 => {
            let is_disable = set.action == IrqSetFlags::ACTION_TRIGGER && set.start == 0;
            if is_disable { apply(0, SetIrqs::Disable) } else { Err(Errno::EINVAL) }
        }
        IrqData::None => action(set, set.count).and_then(|what| apply(set.start, what)),
        // An invalid range is refused before anything is done.
        IrqData::Bools(bools) => check_range(machine, set).and_then(|()| {
            (set.start..)
                .zip(bools)
                .filter(|&(_, &on)| on != 0)
                .try_for_each(|(vector, _)| action(set, 1).and_then(|what| apply(vector, what)))
        }),
    }
}

/// EINVAL unless all vectors exist, and there is at least one.
fn check_range(machine: &Machine, set: &Message<'_>) -> Result<(), Errno> {
    let count = machine.description().irq_info(set.index)?.count;
    match set.start.checked_add(set.count) {
        Some(end) if end <= count && set.count > 0 => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

fn action(set: &Message<'_>, count: u32) -> Result<SetIrqs, Errno> {
    match set.action {
        IrqSetFlags::ACTION_TRIGGER => Ok(SetIrqs::Trigger(count)),
        IrqSetFlags::ACTION_MASK => Ok(SetIrqs::Mask(count)),
        IrqSetFlags::ACTION_UNMASK => Ok(SetIrqs::Unmask(count)),
        _ => Err(Errno::EINVAL),
    }
}

/// The eventfds for the vectors: one for each, or none to unwire them. Eventfds for masking and unmasking are
/// refused with ENOTTY, as by the kernel without support for them.
fn wired(machine: &Machine, set: &Message<'_>, fds: Vec<ForeignFd>) -> Result<Vec<Option<ForeignFd>>, Errno> {
    if set.action != IrqSetFlags::ACTION_TRIGGER {
        return Err(Errno::ENOTTY);
    }
    check_range(machine, set)?;
    match fds.len() {
        0 => Ok((0..set.count).map(|_| None).collect()),
        count if count == set.count as usize => Ok(fds.into_iter().map(Some).collect()),
        _ => Err(Errno::EINVAL),
    }
}
