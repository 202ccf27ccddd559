//! `limosa check`: whether a driver or a server complies with the standard.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use limosa_check::{Options, Profile, Report, SocketWire, Target, Transport};
use limosa_vfio_user::client::Role;
use serde::Serialize;

use super::check_fuzz;
use crate::args::{self, Format};
use crate::exit::{self, Code};
use crate::open::{self, Opener, Opening};
use crate::output::{self, Output};
use crate::read_text::read_text;
use crate::signals;

/// Time limit for one vfio-user request here, so that a hanging server costs little time.
const REQUEST_MAX: Duration = Duration::from_secs(5);

/// The most bytes of a profile.
const PROFILE_BYTES_MAX: u64 = 1 << 20;

pub fn run(args: &args::Check, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    if args.clauses {
        let clauses = limosa_check::CLAUSES.iter().map(|clause| clause.id).collect();
        return out
            .result(&Clauses { clauses }, |to| to.write_all(limosa_check::clauses_document().as_bytes()));
    }
    check_names(&args.only)?;
    let options = Options {
        families: args.families.clone(),
        only: args.only.clone(),
        destructive: args.destructive,
        limits: limosa_check::Limits { check: args.limit, ..limosa_check::Limits::default() },
        cancel: None,
    };
    if args.list {
        return list(&options, out);
    }
    let profile = args.profile.as_deref().map(profile).transpose()?;
    let Some(name) = &args.device else { return Ok(()) };
    let cancel = Arc::new(AtomicBool::new(false));
    let called_off = Arc::clone(&cancel);
    signals::call_off(move || called_off.store(true, Ordering::Relaxed))?;
    let target = target(name, args, opening)?;
    if args.fuzz.is_some() || args.replay.is_some() {
        return check_fuzz::run(name, &target, args, cancel, out);
    }
    let options = Options { cancel: Some(Arc::clone(&cancel)), ..options };
    let report = limosa_check::run(&target, &options, |_| {})?;
    print(&report, args, out)?;
    if cancel.load(Ordering::Relaxed) {
        let code = if report.left_in.starts_with("unknown") { Code::Failed } else { Code::Cancelled };
        return Err(exit::error(code, format!("{name}: called off, left in {}", report.left_in)));
    }
    judge(&report, profile.as_ref(), name)
}

/// Whether there are checks of these names.
fn check_names(only: &[String]) -> anyhow::Result<()> {
    let checks = limosa_check::checks();
    let unknown = only
        .iter()
        .find(|name| !Options { only: vec![(*name).clone()], ..Options::default() }.selects_any(&checks));
    match unknown {
        Some(name) => Err(exit::error(Code::Usage, format!("there is no check {name}; --list lists them"))),
        None => Ok(()),
    }
}

/// What `--clauses` prints.
#[derive(Serialize)]
struct Clauses {
    clauses: Vec<&'static str>,
}

/// What `--list` prints.
#[derive(Serialize)]
struct List<'a> {
    checks: Vec<Listed<'a>>,
}

#[derive(Serialize)]
struct Listed<'a> {
    id: &'a str,
    family: &'a str,
    clauses: &'a [&'static str],
    destructive: bool,
}

fn list(options: &Options, out: &Output) -> anyhow::Result<()> {
    let checks = limosa_check::checks();
    let selected: Vec<_> = checks
        .iter()
        .filter(|check| options.selects(check))
        .map(|check| Listed {
            id: &check.id,
            family: check.family.name(),
            clauses: &check.clauses,
            destructive: check.destructive,
        })
        .collect();
    let list = List { checks: selected };
    out.result(&list, |to| {
        output::folded(to, |to| {
            for check in &list.checks {
                let mark = if check.destructive { "destructive" } else { "" };
                writeln!(to, "{:<40} {mark:<11}  {}", check.id, check.clauses.join(", "))?;
            }
            Ok(())
        })
    })
}

fn profile(path: &Path) -> anyhow::Result<Profile> {
    let name = path.display();
    let text = read_text(path, PROFILE_BYTES_MAX)?;
    Profile::parse(&text).map_err(|error| exit::error(Code::Usage, format!("{name}: {error}")))
}

/// The device and the ways to it.
fn target(name: &str, args: &args::Check, opening: Opening<'_>) -> anyhow::Result<Target> {
    let opener = Opener {
        limit: opening.limit.min(REQUEST_MAX),
        state_limit: opening.state_limit.min(args.limit),
        // It makes all requests that a VMM may make.
        role: Role::Vmm,
        ..opening.owned()
    };
    let first = opener.opening().open(name)?;
    if first.is_borrowed() {
        let what =
            format!("{name}: another process has it open, and the checks stop it; name the device itself");
        return Err(exit::error(Code::Usage, what));
    }
    let kernel = first.kernel().is_some();
    let transport = if kernel { Transport::Kernel } else { Transport::VfioUser };
    // The kernel resets a device that is closed.
    let first = Mutex::new(Some(first.into_device()));
    let (again, given) = (opener.clone(), name.to_owned());
    let mut target = Target::new(name, transport, move || {
        match first.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(device) => Ok(device),
            None => again.open(&given),
        }
    });
    if !kernel {
        let (path, servers, limit) = (PathBuf::from(name), opening.servers.to_vec(), opener.limit);
        target = target.dial(move || {
            let socket = limosa_host::connect(&path, limit)?;
            limosa_host::check_server(&socket, &servers)?;
            Ok(Box::new(SocketWire::new(socket)?))
        });
    }
    if let Some(peer) = &args.peer {
        if open::same(name, peer) {
            return Err(exit::error(
                Code::Usage,
                format!("{peer} is the device itself; --peer takes another one"),
            ));
        }
        let (opener, peer) = (opener.clone(), peer.clone());
        target = target.peer(move || opener.open(&peer));
    }
    if let Some(view) = view(name).filter(|_| kernel) {
        target = target.view(Arc::new(move || std::fs::read_to_string(&view)));
    }
    if let Some(command) = args.break_with.clone() {
        target = target.breaks(Arc::new(move || {
            let status = Command::new("/bin/sh").args(["-c", &command]).stdin(Stdio::null()).status();
            match status {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(format!("`{command}`: {status}")),
                Err(error) => Err(format!("`{command}`: {error}")),
            }
        }));
    }
    Ok(target)
}

/// The file in debugfs with the state of a device, if there is one.
fn view(name: &str) -> Option<PathBuf> {
    let folder = open::listed(name)?.folder;
    let file = Path::new("/sys/kernel/debug/vfio").join(folder.file_name()?).join("migration/state");
    file.exists().then_some(file)
}

fn print(report: &Report, args: &args::Check, out: &Output) -> anyhow::Result<()> {
    out.result(report, |to| match args.format {
        Format::Table => report.table(to, args.all),
        Format::Tap => report.tap(to),
        Format::Junit => report.junit(to),
        Format::Markdown => report.markdown(to),
    })
}

/// The exit code, from the checks that the profile requires, or from all.
fn judge(report: &Report, profile: Option<&Profile>, name: &str) -> anyhow::Result<()> {
    let required = Profile::default();
    let profile = profile.unwrap_or(&required);
    for id in profile.out_of_date(report) {
        tracing::warn!("the profile excuses {id}, which passes");
    }
    let broken = profile.broken_by(report);
    let Some(first) = broken.first() else { return Ok(()) };
    let more = match broken.len() {
        1 => String::new(),
        count => format!(" (and {} more)", count - 1),
    };
    Err(exit::error(Code::Failed, format!("{name} does not conform: {}{more}", output::plain(first))))
}
