//! The end of a command with its devices: the kernel closes a device with the last fd, and its state may be lost then.
//! `--hold` keeps it open.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context;
use limosa_client::IrqAction;
use limosa_migrate::Cancel;
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::pci_index;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::retry_on_intr;

use crate::exit::{self, Code};
use crate::open::{self, Opened};
use crate::output::Output;
use crate::signals;

/// Whether a command leaves something in the device that a user may want to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// A loaded state, or the migration state that the command set.
    State,
    /// Nothing new.
    Nothing,
}

/// Ends a command on these devices: keeps them open if that was requested, else reports the effect of closing them.
///
/// A failed command ends at once, except one that leaves its devices in doubt, or has moved something before it failed,
/// since they may hold the only copy of what was moved.
pub fn end(
    done: anyhow::Result<()>,
    devices: &[Opened],
    keep_open: bool,
    leaves: Leaves,
    out: &Output,
) -> anyhow::Result<()> {
    let failed = done.as_ref().err().map(exit::code);
    let in_doubt = failed == Some(Code::InDoubt);
    let is_done = matches!(failed, None | Some(Code::DoneBut));
    let leaves_state = in_doubt || (is_done && leaves == Leaves::State);
    if keep_open && (in_doubt || is_done) {
        if let Err(error) = &done {
            // Report it now, and not only when the wait ends.
            exit::tell(error, out);
        }
        let kept = until_told(devices, out);
        return done.and(kept.map_err(|error| exit::but("done", &[exit::message(&error)])));
    }
    for device in devices.iter().filter(|device| leaves_state && device.closes_with_us()) {
        tracing::warn!("{}: {}; --hold keeps it open", device.given(), what_closing_does(device));
    }
    done
}

fn what_closing_does(device: &Opened) -> &'static str {
    match open::listed(device.given()) {
        Some(listed) if listed.bus == "pci" => {
            "the kernel closes it with this command, which resets it, and what it holds now is lost"
        }
        _ => {
            "the kernel closes it with this command, and what it keeps of its state then is up to its driver"
        }
    }
}

/// Keeps the devices open until a signal, or until the kernel asks for one of them.
fn until_told(devices: &[Opened], out: &Output) -> anyhow::Result<()> {
    let end = Cancel::new().context("cannot make an eventfd")?;
    let on_signal = end.clone();
    signals::on_end(move || on_signal.cancel())?;
    let mut wanted = Vec::new();
    for device in devices {
        wanted.extend(wanted_back(device)?.map(|event| (device, event)));
    }
    for device in devices {
        let name = match device.name_while_open() {
            Some(name) => format!(" as {name}"),
            None => String::new(),
        };
        out.say(&format!("holding {}{name} until SIGINT or SIGTERM", device.given()));
    }
    let mut fds: Vec<_> = std::iter::once(end.as_fd())
        .chain(wanted.iter().map(|(_, event)| event.as_fd()))
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    retry_on_intr(|| poll(&mut fds, None)).context("cannot wait for signals")?;
    let asked = fds[1..].iter().zip(&wanted).find(|(fd, _)| !fd.revents().is_empty());
    if let Some((_, (device, _))) = asked.filter(|_| !end.is_cancelled()) {
        tracing::warn!("{}: somebody removes it or unbinds its driver, so it is let go", device.given());
    }
    Ok(())
}

/// An eventfd by which the kernel says that somebody wants to remove a device that was opened here, which waits for
/// its user (`vfio.h: VFIO_PCI_REQ_IRQ_INDEX`); where the device has such an interrupt.
fn wanted_back(device: &Opened) -> anyhow::Result<Option<OwnedFd>> {
    let is_pci = DeviceFlags::from_bits_retain(device.info()?.flags).contains(DeviceFlags::PCI);
    if !is_pci || !device.closes_with_us() {
        return Ok(None);
    }
    let wanted =
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")?;
    let wire = device.irq(pci_index::IRQ_REQ).and_then(|irq| match irq.count {
        0 => Ok(false),
        _ => device.set_irqs(pci_index::IRQ_REQ, 0, IrqAction::Wire(&[Some(wanted.as_fd())])).map(|()| true),
    });
    match wire {
        Ok(wired) => Ok(wired.then_some(wanted)),
        // Not every driver has it. Without it, a removal of the device waits for the signal too.
        Err(limosa_client::Error::Refused { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
