//! `limosa bench`: how long a device takes for the requests that a VMM and a move wait for.

mod compare;
mod progress;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use limosa_bench::{Document, Open, Options, Run, Target};
use limosa_client::{Device, DeviceExt};
use limosa_migrate::way_out_of;
use limosa_protocol::State;
use limosa_vfio_user::client::Role;

use crate::args::{self, BenchAction};
use crate::exit::{self, Code};
use crate::open::{self, Opened, Opener, Opening};
use crate::output::Output;
use crate::reports::{Printed, Reports};
use crate::signals;
use progress::Progress;

/// Time limit for a change of state or one request here.
const REQUEST_MAX: Duration = Duration::from_secs(10);

impl Printed for Document {
    fn html(&self) -> String {
        Document::html(self)
    }

    fn text(&self) -> String {
        self.to_string()
    }
}

pub fn run(args: &args::Bench, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    if let Some(BenchAction::Compare { first, second }) = &args.action {
        return compare::run(first, second, out);
    }
    let Some(name) = &args.device else { return Ok(()) };
    if args.one_core {
        limosa_bench::pin_to_one_core()?;
    }
    let cancel = Arc::new(AtomicBool::new(false));
    let called_off = Arc::clone(&cancel);
    signals::call_off(move || called_off.store(true, Ordering::Relaxed))?;
    let reports = Reports::open(&args.reporting, out)?;
    let opener = Opener {
        limit: opening.limit.min(REQUEST_MAX),
        state_limit: opening.state_limit.min(REQUEST_MAX),
        // Without the option, it connects beside a VMM only to detect it.
        role: Role::Either,
        ..opening.owned()
    };
    let target = target(name, args, &opener)?;
    out.say(&what_it_does(name, args));
    let options = Options {
        each: args.seconds,
        limit: (opener.limit + opener.state_limit) * 2,
        cancel: Arc::clone(&cancel),
    };
    let mut progress = Progress::new(out);
    let run = limosa_bench::measure(&target, &options, &mut |event| progress.show(&event))?;
    let Run { document, not_moved } = run;
    progress.end(&document)?;
    out.result(&document, |_| Ok(()))?;
    let written = reports.write(&document);
    judge(name, &document, &cancel)?;
    if let Some(why) = not_moved {
        return Err(why.context(format!("{name}: measured, but no move")));
    }
    written.map_err(|error| exit::but("measured", &[exit::message(&error)]))
}

/// The effects on the device, reported before the run begins.
fn what_it_does(name: &str, args: &args::Bench) -> String {
    let what = match args.in_use {
        true => "it is stopped again and again, and the guest that uses it waits",
        false => "it is stopped and reset again and again, and gets its state back in the end",
    };
    let peer = args.peer.as_ref().map_or(String::new(), |peer| format!("; {peer} loses its state"));
    format!("measuring {name}: {what}{peer}")
}

/// The open device, after a check that it may be measured.
fn target(name: &str, args: &args::Bench, opener: &Opener) -> anyhow::Result<Target> {
    let device = opener.opening().open(name)?;
    if let Some(peer) = &args.peer {
        if open::same(name, peer) {
            let what = format!("{peer} is the device itself; --peer takes another one");
            return Err(exit::error(Code::Usage, what));
        }
        let peer = opener.opening().open(peer)?;
        refuse_use(&peer)?;
        refuse_state(&peer, &[State::Running])?;
    }
    let in_use = device.is_beside_vmm() || device.is_borrowed();
    if !args.in_use {
        refuse_use(&device)?;
    }
    // A device in ERROR loses nothing by the reset that recovers it.
    let states: &[State] = if in_use { &[State::Running] } else { &[State::Running, State::Error] };
    refuse_state(&device, states)?;
    // Without it accesses have no baseline.
    let fd = device.kernel().map(|kernel| Arc::new(Mutex::new(kernel.as_fd().try_clone_to_owned().ok())));
    let peer = args.peer.clone().map(|peer| -> Open {
        let opener = opener.clone();
        Arc::new(move || opener.open(&peer))
    });
    // The kernel resets a device that is closed.
    let first = Mutex::new(Some(device.into_device()));
    let (again, given) = (opener.clone(), name.to_owned());
    let open = move || -> limosa_client::Result<Box<dyn Device>> {
        match first.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(device) => Ok(device),
            None => again.open(&given),
        }
    };
    Ok(Target { name: name.into(), open: Arc::new(open), peer, fd, in_use })
}

/// The device of a guest is not stopped without a request.
fn refuse_use(device: &Opened) -> anyhow::Result<()> {
    let why = match (device.is_beside_vmm(), device.is_borrowed()) {
        (true, _) => "a VMM is using it, and a measurement stops and resets it",
        (false, true) => "another process has it open, and a measurement stops and resets it",
        (false, false) => return Ok(()),
    };
    let given = device.given();
    let what =
        format!("{given}: {why}; end that process, or measure what can be measured beside it with --in-use");
    Err(exit::error(Code::Refused, what))
}

/// A device in the middle of a move is left alone.
fn refuse_state(device: &Opened, states: &[State]) -> anyhow::Result<()> {
    if device.migration_flags()?.is_empty() {
        return Ok(());
    }
    let state = device.state()?;
    if states.contains(&state) {
        return Ok(());
    }
    let what = format!("{}: it is in {state}, RUNNING is expected; {}", device.given(), way_out_of(state));
    Err(exit::error(Code::Refused, what))
}

/// The exit code: whether the run came to its end, and the device runs.
fn judge(name: &str, document: &Document, cancel: &AtomicBool) -> anyhow::Result<()> {
    let left_in = &document.left_in;
    // This matters also if the run was called off. A device without migration has only one state.
    if left_in != State::Running.name() && !left_in.starts_with("its only state") {
        let why = document.ended_early.as_ref().map_or(String::new(), |why| format!("{why}; "));
        return Err(exit::error(Code::Failed, format!("{name}: {why}left in {left_in}")));
    }
    if cancel.load(Ordering::Relaxed) {
        return Err(exit::error(Code::Cancelled, format!("{name}: called off, left in {left_in}")));
    }
    if let Some(why) = &document.ended_early {
        return Err(exit::error(Code::Failed, format!("{name}: {why}; left in {left_in}")));
    }
    Ok(())
}
