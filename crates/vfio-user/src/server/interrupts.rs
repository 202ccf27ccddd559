//! Interrupts (`vfio-user.rst: VFIO_USER_DEVICE_SET_IRQS`).

use std::mem::take;

use limosa_device::{Machine, SetIrqs};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::IrqSetFlags;

use super::connection::{Connection, Handled, Job, Outcome};
use crate::codec::{IrqData, SetIrqs as Message};

impl Connection<'_> {
    pub(super) fn set_irqs(&mut self, job: &mut Job, set: Message<'_>) -> Handled {
        let machine = self.machine;
        let fds = take(&mut job.fds);
        let done = match set.data {
            IrqData::Eventfds => wire(machine, &set, fds),
            _ if !fds.is_empty() => Err(Errno::EINVAL),
            IrqData::None if set.count == 0 => {
                if set.action == IrqSetFlags::ACTION_TRIGGER && set.start == 0 {
                    machine.set_irqs(set.index, 0, SetIrqs::Disable)
                } else {
                    Err(Errno::EINVAL)
                }
            }
            IrqData::None => act(machine, &set, set.start, set.count),
            // A range that is not there is refused before anything is done.
            IrqData::Bools(bools) => check_range(machine, &set).and_then(|()| {
                (set.start..)
                    .zip(bools)
                    .filter(|&(_, &on)| on != 0)
                    .try_for_each(|(vector, _)| act(machine, &set, vector, 1))
            }),
        };
        match done {
            Ok(()) => self.reply(job, &[]),
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }
}

/// EINVAL unless the vectors are there, and at least one.
fn check_range(machine: &Machine, set: &Message<'_>) -> Result<(), Errno> {
    let count = machine.description().irq_info(set.index)?.count;
    match set.start.checked_add(set.count) {
        Some(end) if end <= count && set.count > 0 => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

fn act(machine: &Machine, set: &Message<'_>, start: u32, count: u32) -> Result<(), Errno> {
    let what = match set.action {
        IrqSetFlags::ACTION_TRIGGER => SetIrqs::Trigger(count),
        IrqSetFlags::ACTION_MASK => SetIrqs::Mask(count),
        IrqSetFlags::ACTION_UNMASK => SetIrqs::Unmask(count),
        _ => return Err(Errno::EINVAL),
    };
    machine.set_irqs(set.index, start, what)
}

/// Wires the vectors to as many eventfds, or takes theirs away when there is none. Eventfds for
/// masking and unmasking are refused with ENOTTY, as the kernel does where it has none.
fn wire(machine: &Machine, set: &Message<'_>, fds: Vec<ForeignFd>) -> Result<(), Errno> {
    if set.action != IrqSetFlags::ACTION_TRIGGER {
        return Err(Errno::ENOTTY);
    }
    check_range(machine, set)?;
    let fds: Vec<_> = match fds.len() {
        0 => (0..set.count).map(|_| None).collect(),
        count if count == set.count as usize => fds.into_iter().map(Some).collect(),
        _ => return Err(Errno::EINVAL),
    };
    machine.set_irqs(set.index, set.start, SetIrqs::Wire(fds))
}
