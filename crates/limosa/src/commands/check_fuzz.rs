//! `limosa check --fuzz` and `--replay`: random sequences of requests, and one of them again.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use limosa_check::{Difference, FuzzOptions, FuzzReport, Limits, Script, Target};
use serde::Serialize;

use crate::args;
use crate::exit::{self, Code};
use crate::output::{self, Output};
use crate::read_text::{read_text, read_text_if_there};

/// The most bytes of a script, and of a file of known differences.
const BYTES_MAX: u64 = 16 << 20;

pub fn run(
    name: &str,
    target: &Target,
    args: &args::Check,
    cancel: Arc<AtomicBool>,
    out: &Output,
) -> anyhow::Result<()> {
    let limits = Limits { check: args.limit, ..Limits::default() };
    if let Some(path) = &args.replay {
        return replay(name, target, path, &limits, out);
    }
    let known = args.known.as_deref().map(known).transpose()?.unwrap_or_default();
    let options = FuzzOptions {
        sequences: args.fuzz.unwrap_or_default(),
        seed: args.seed,
        threads: args.threads.into(),
        known,
        limits,
        cancel: Some(Arc::clone(&cancel)),
    };
    let report = limosa_check::fuzz(target, &options)?;
    out.result(&report, |to| print(&report, to))?;
    if let Some(path) = &args.known {
        add(path, &report.differences)?;
    }
    if cancel.load(Ordering::Relaxed) {
        return Err(exit::error(Code::Cancelled, format!("{name}: called off")));
    }
    match (report.differences.first(), &report.ended_early) {
        (Some(first), _) => {
            let what = format!("{name} differs from the standard: {}", output::plain(&first.signature));
            Err(exit::error(Code::Failed, what))
        }
        (None, Some(why)) => {
            Err(exit::error(Code::Failed, format!("{name}: ended early: {}", output::plain(why))))
        }
        (None, None) => Ok(()),
    }
}

/// The difference that a replay found, or null.
#[derive(Serialize)]
struct Played {
    difference: Option<Difference>,
}

fn replay(name: &str, target: &Target, path: &Path, limits: &Limits, out: &Output) -> anyhow::Result<()> {
    let file = path.display();
    let text = read_text(path, BYTES_MAX)?;
    let script: Script =
        text.parse().map_err(|error| exit::error(Code::Usage, format!("{file}: {error}")))?;
    if script.is_empty() {
        let what = format!("{file}: no request; expected one a line, as a difference is told");
        return Err(exit::error(Code::Usage, what));
    }
    let found = limosa_check::replay(target, &script, limits)?;
    let played = Played { difference: found };
    out.result(&played, |to| match &played.difference {
        Some(difference) => tell(difference, to),
        None => writeln!(to, "{name}: no difference in {} requests", script.len()),
    })?;
    match played.difference {
        Some(difference) => {
            let what = format!("{name} differs from the standard: {}", output::plain(&difference.signature));
            Err(exit::error(Code::Failed, what))
        }
        None => Ok(()),
    }
}

fn tell(difference: &Difference, to: &mut dyn Write) -> std::io::Result<()> {
    writeln!(to, "# {}", output::plain(&difference.signature))?;
    difference.requests.iter().try_for_each(|request| writeln!(to, "{}", output::plain(request)))
}

/// The differences, each as a script that `--replay` plays, then a line that counts.
fn print(report: &FuzzReport, to: &mut dyn Write) -> std::io::Result<()> {
    for difference in &report.differences {
        writeln!(to, "# {}", output::plain(&difference.signature))?;
        writeln!(to, "# seed {}, sequence {}", report.seed, difference.sequence)?;
        for line in &difference.script {
            writeln!(to, "{line}")?;
        }
        writeln!(to)?;
    }
    writeln!(
        to,
        "# {}: {} sequences of {} requests in all, seed {}, {} new differences, {} sequences with known ones, {:.1} s",
        report.device,
        report.sequences,
        report.requests,
        report.seed,
        report.differences.len(),
        report.known,
        report.seconds
    )
}

/// The signatures in a file of known differences; none when it is not there yet.
fn known(path: &Path) -> anyhow::Result<BTreeSet<String>> {
    let text = read_text_if_there(path, BYTES_MAX)?.unwrap_or_default();
    let mut known = BTreeSet::new();
    for (at, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if !limosa_check::is_signature(line) {
            let (file, line) = (path.display(), output::plain(line));
            let what = format!(
                "--known {file}, line {}: `{line}` is no difference; expected lines that `limosa check --fuzz --known` wrote, such \
                 as `set-state STOP in RUNNING: EIO, expected success`",
                at + 1
            );
            return Err(exit::error(Code::Usage, what));
        }
        known.insert(line.to_owned());
    }
    Ok(known)
}

/// Adds what was found, each with its script as a comment.
fn add(path: &Path, found: &[Difference]) -> anyhow::Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let mut text = String::new();
    for difference in found {
        text += &format!("{}\n", output::plain(&difference.signature));
        for line in &difference.script {
            text += &format!("#   {line}\n");
        }
    }
    let written = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("{} cannot be written", path.display()))
}
