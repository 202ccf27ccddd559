//! `limosa state DEVICE next`: the process whose VMM uses the device after the current one
//! (`docs/vfio-user-extensions.md: NEXT`).

use anyhow::Context;
use limosa_vfio_user::client::{NextVmm, Role};
use serde::Serialize;

use crate::exit::{self, Code};
use crate::open::Opened;
use crate::output::Output;

#[derive(Debug, Serialize)]
struct Answer {
    device: String,
    /// The named process.
    next: Option<i32>,
    /// Whether its VMM is connected and prepares.
    is_there: bool,
}

pub fn run(device: &Opened, pid: Option<i32>, nobody: bool, out: &Output) -> anyhow::Result<()> {
    let refused = |why: &str| exit::error(Code::Refused, format!("{}: {why}", device.given()));
    let client = device
        .vfio_user()
        .ok_or_else(|| refused("the kernel hands devices from one process to another by their fds"))?;
    if client.role() == Role::Vmm {
        return Err(refused("no VMM uses it: the VMM that connects next has it at once"));
    }
    if pid.is_some() || nobody {
        client.name_next(pid).context("the next VMM cannot be named")?;
    }
    let NextVmm { pid: next, is_there, .. } =
        client.next_vmm().context("the server does not say who is next")?;
    let answer = Answer { device: device.given().into(), next, is_there };
    let printed = out.result(&answer, |to| match (next, is_there) {
        (None, _) => writeln!(to, "nobody is named"),
        (Some(pid), true) => writeln!(to, "process {pid} is next, and its VMM is there"),
        (Some(pid), false) => writeln!(to, "process {pid} is next, and its VMM has not come"),
    });
    match pid {
        Some(pid) => printed
            .map_err(|error| exit::but(format_args!("process {pid} is named"), &[exit::message(&error)])),
        None => printed,
    }
}
