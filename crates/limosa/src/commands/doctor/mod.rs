//! `limosa doctor`: the abilities of this machine and a device, and the obstacles to a move.

mod device;
mod estimate;
pub mod finding;
mod machine;
mod pair;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use finding::KINDS;
use machine::{Host, Running, Wanted};
use report::Report;

use crate::args;
use crate::exit::{self, Code};
use crate::open::{self, Opening};
use crate::output::Output;
use crate::signals;

pub fn run(args: &args::Doctor, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    if args.findings {
        let ids: Vec<_> = KINDS.iter().map(|kind| kind.id).collect();
        return out.result(&ids, |to| to.write_all(finding::document().as_bytes()));
    }
    if !args.root.join("proc").is_dir() {
        let what = format!("--root {}: there is no folder proc in it", args.root.display());
        return Err(exit::error(Code::Usage, what));
    }
    let names: Vec<&String> = args.device.iter().chain(&args.destination).collect();
    let wanted = match names.is_empty() {
        true => Wanted::Machine,
        false if names.iter().all(|name| open::is_socket_path(name)) => Wanted::Socket,
        false => Wanted::KernelDevice,
    };
    let cancel = Arc::new(AtomicBool::new(false));
    if args.measure {
        // A command that only looks leaves nothing behind, so signals end it at once.
        let called_off = Arc::clone(&cancel);
        signals::call_off(move || called_off.store(true, Ordering::Relaxed))?;
    }
    let (machine, mut findings) = machine::look(&Host::new(&args.root, &Running), wanted);

    let opener = device::opener(opening, args.measure);
    let mut looked: Vec<_> = names.iter().map(|name| device::look(name, &opener)).collect();
    if let [source, destination] = &looked[..] {
        findings.extend(pair::compare(source, destination));
    }
    if let Some(source) = looked.first_mut().filter(|_| args.measure) {
        device::measure(source, args.in_use, &cancel, out);
    }
    let estimates = looked.first().map(|source| estimate::of(source, &args.bandwidth)).unwrap_or_default();
    let mut devices = Vec::new();
    for one in looked {
        findings.extend(one.findings);
        devices.push(one.report);
    }
    let report = Report::new(machine, devices, estimates, findings);
    out.result(&report, |to| report.print(to))?;
    if cancel.load(Ordering::Relaxed) {
        return Err(exit::error(Code::Cancelled, "called off; the device was let go"));
    }
    report.judge()
}
