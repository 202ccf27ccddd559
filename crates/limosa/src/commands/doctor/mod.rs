//! `limosa doctor`: the abilities of this machine and a device, and the obstacles to a move.

mod device;
mod estimate;
pub mod finding;
mod machine;
mod pair;
mod report;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use finding::{KINDS, NOT_RESTORED};
use machine::{Host, Running, Wanted};
use report::Report;

use crate::args;
use crate::exit::{self, Code};
use crate::moves::Moves;
use crate::open::{self, Opening};
use crate::output::{self, Output};
use crate::signals;

/// What `--findings` lists.
#[derive(Serialize)]
struct Findings {
    findings: Vec<&'static str>,
}

pub fn run(args: &args::Doctor, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    if args.findings {
        let ids: Vec<_> = KINDS.iter().map(|kind| kind.id).collect();
        return out.result(&Findings { findings: ids }, |to| to.write_all(finding::document().as_bytes()));
    }
    refuse_root(&args.root)?;
    let names: Vec<&String> = args.device.iter().chain(&args.destination).collect();
    let wanted = match names.is_empty() {
        true => Wanted::Machine,
        false if names.iter().all(|name| open::is_socket_path(name)) => Wanted::Socket,
        false => Wanted::KernelDevice,
    };
    let cancel = Arc::new(AtomicBool::new(false));
    if args.measure {
        // A command that only reads has nothing to clean up, so signals end it at once.
        let called_off = Arc::clone(&cancel);
        signals::call_off(move || called_off.store(true, Ordering::Relaxed))?;
    }
    let (machine, mut findings) = machine::look(&Host::new(&args.root, &Running), wanted);

    let (opener, moves) = (device::opener(opening, args.measure), Moves::new(args.moves.as_deref()));
    let mut looked: Vec<_> = names.iter().map(|name| device::look(name, &opener, &moves)).collect();
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
    out.result(&report, |to| output::folded(to, |to| report.print(to)))?;
    // A device that does not run again is reported first, also if a signal ended the measurement.
    if cancel.load(Ordering::Relaxed) && !report.has(&NOT_RESTORED) {
        return Err(exit::error(Code::Cancelled, "called off; the device was let go"));
    }
    report.judge()
}

/// The folder of another machine has its `/proc`; that of an image of a disk is empty, and nothing is known then.
fn refuse_root(root: &Path) -> anyhow::Result<()> {
    let (code, why) = match std::fs::read_dir(root.join("proc")).map(|mut entries| entries.next().is_none()) {
        Ok(false) => return Ok(()),
        Ok(true) => (Code::Usage, "its folder proc is empty".into()),
        Err(error) => (exit::of_file(&error), format!("its folder proc cannot be read: {error}")),
    };
    if root == Path::new("/") {
        let what = format!("/proc of this machine: {}; mount it", why.replace("its folder proc", "it"));
        return Err(exit::error(Code::Unreachable, what));
    }
    let what = format!("--root {}: {why}; expected the root of a machine that runs", root.display());
    Err(exit::error(code, what))
}
