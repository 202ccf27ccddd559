//! What becomes of a device when the command is done: the kernel closes it with the last fd, and what it held may
//! be lost then. `--hold` keeps it open.

use std::io::{self, Write};
use std::sync::mpsc;

use anyhow::Context;

use crate::exit::{self, Code};
use crate::open::Opened;
use crate::output::Output;
use crate::signals;

/// Whether a command leaves something in the device that a user may want to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// A state that was loaded, or one that it was driven to.
    State,
    /// Nothing that was not there before.
    Nothing,
}

/// Ends a command on this device: keeps it open if asked to, else says what closing it means.
///
/// A failed command ends at once; not so one that leaves its device in doubt, since the device may hold the only
/// copy of what was moved.
pub fn end(
    done: anyhow::Result<()>,
    device: &Opened,
    hold: bool,
    leaves: Leaves,
    out: &Output,
) -> anyhow::Result<()> {
    let failure = match done {
        Ok(()) => None,
        Err(error) if hold && exit::code(&error) == Code::InDoubt => {
            // It is said now, not when somebody ends the wait.
            tracing::error!("{}", exit::message(&error));
            Some(error)
        }
        Err(error) => return Err(error),
    };
    if hold {
        until_signal(device, out)?;
    } else if leaves == Leaves::State && device.closes_with_us() {
        tracing::warn!(
            "{}: the kernel closes it with this command, and with that a PCI device is reset, other drivers do as \
             they like; --hold keeps it open",
            device.given()
        );
    }
    failure.map_or(Ok(()), Err)
}

fn until_signal(device: &Opened, out: &Output) -> anyhow::Result<()> {
    let (end, ended) = mpsc::channel();
    signals::on_end(move || {
        // The receiver is there until this function returns.
        let _ = end.send(());
    })?;
    let name = match device.name_while_held() {
        Some(name) => format!(" as {name}"),
        None => String::new(),
    };
    let line = format!("holding {}{name} until SIGINT or SIGTERM", device.given());
    let said = match out.json {
        false => writeln!(io::stdout(), "{line}"),
        true => writeln!(io::stderr(), "{line}"),
    };
    // Whoever does not listen need not be told.
    let _ = said;
    ended.recv().context("nobody listens for signals any more")
}
