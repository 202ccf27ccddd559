//! `limosa man`: a manual page for each command, from the command line's own definition and the list of exit codes.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap_mangen::Man;
use serde::Serialize;

use crate::args;
use crate::exit::{self, MEANINGS};
use crate::output::Output;

/// Command lines by command, each with what it does.
const EXAMPLES: [(&str, &[(&str, &str)]); 23] = [
    ("limosa", &[("limosa demo", "Move two live devices between processes, and verify every byte.")]),
    ("demo", &[("limosa demo --state-size 256M", "Move more state.")]),
    ("serve", &[("limosa serve synthetic --socket net.sock -o state=1M", "Serve a device for tests.")]),
    (
        "switch-over",
        &[(
            "limosa switch-over takeover.sock -- limosa serve uart --socket uart.sock --takeover takeover.sock",
            "Replace the process of a server.",
        )],
    ),
    (
        "probe",
        &[
            ("limosa probe net.sock", "Say whether a device can migrate."),
            ("limosa probe", "List the kernel's devices."),
        ],
    ),
    (
        "doctor",
        &[(
            "limosa doctor 0000:65:00.1 --measure",
            "Say what stands in the way of a move, and estimate the downtime.",
        )],
    ),
    (
        "state",
        &[
            ("limosa state net.sock", "Print the state."),
            ("limosa state net.sock set STOP --hold", "Keep the device stopped."),
        ],
    ),
    ("region", &[("limosa region read net.sock config --size 64", "Print the head of configuration space.")]),
    ("save", &[("limosa save net.sock net.lmsa", "Save a device's state to a file.")]),
    ("load", &[("limosa load net.lmsa net.sock", "Load it again.")]),
    ("inspect", &[("limosa inspect net.lmsa", "Say what is in a saved stream.")]),
    ("verify", &[("limosa verify net.lmsa", "Say whether it is whole, and print its hash.")]),
    (
        "migrate",
        &[(
            "limosa migrate one.sock other.sock --report move.html",
            "Move a device's state on this machine.",
        )],
    ),
    (
        "send",
        &[(
            "limosa send net.sock --to tcp:there:7000 --tls-ca ca.pem --tls-cert here.pem --tls-key here.key",
            "Move a device to another host.",
        )],
    ),
    (
        "receive",
        &[
            ("limosa receive net.sock --listen unix:/run/move", "Take one move."),
            ("limosa receive net.sock --listen unix:/run/move --forever", "Take one after the other."),
        ],
    ),
    (
        "resolve",
        &[
            ("limosa resolve", "List the moves in doubt."),
            ("limosa resolve net.sock", "Ask what became of one."),
        ],
    ),
    ("answer", &[("limosa answer --listen unix:/run/move", "Answer for a receiver that has ended.")]),
    ("check", &[("limosa check net.sock --family states", "Check a device against the standard.")]),
    ("trace", &[("limosa trace -- qemu-system-x86_64 ...", "Show what a VMM asks of its devices.")]),
    ("fsm", &[("limosa fsm --dot | dot -Tsvg", "Draw the migration state machine.")]),
    (
        "bench",
        &[
            ("limosa bench net.sock --report run.json", "Measure a device."),
            ("limosa bench compare before.json after.json", "Compare two runs."),
        ],
    ),
    ("completions", &[("limosa completions bash >/etc/bash_completion.d/limosa", "Install completions.")]),
    ("man", &[("limosa man /usr/local/share/man/man1", "Install the manual pages.")]),
];

const ENVIRONMENT: [(&str, &str); 7] = [
    (
        "RUST_LOG",
        "Which log lines go to standard error, by part and level, such as warn,limosa_migrate=debug. It comes before -v.",
    ),
    ("NO_COLOR", "If it is set and not empty, nothing is coloured."),
    ("XDG_STATE_HOME, HOME", "Below which of them moves are remembered, unless --moves names a folder."),
    (
        "AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_ALLOW_HTTP",
        "Where s3://BUCKET/KEY is, and with whose rights.",
    ),
    ("LISTEN_FDS, LISTEN_PID", "A socket that systemd hands to serve."),
    ("LIMOSA_OLD_SERVER", "Set by serve for the process that it starts in its place: its own number."),
    ("NOTIFY_SOCKET", "Where systemd is told of the state of serve."),
];

const FILES: [(&str, &str); 2] = [
    (
        "$XDG_STATE_HOME/limosa/moves, ~/.local/state/limosa/moves, /var/lib/limosa/moves",
        "The first that the environment allows: records of moves, and notes of guests that stand still.",
    ),
    ("/dev/vfio", "The kernel's VFIO devices."),
];

#[derive(Serialize)]
struct Pages {
    folder: String,
}

pub fn run(folder: &Path, out: &Output) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let mut command = args::command().disable_help_subcommand(true);
    command.build();
    write(&command, "limosa", folder)
        .with_context(|| format!("cannot write manual pages to {}", folder.display()))?;
    out.result(&Pages { folder: folder.display().to_string() }, |to| {
        writeln!(to, "manual pages are in {}", folder.display())
    })
}

/// Writes the pages of a command and of all below it. `top` is the command whose examples they have.
fn write(command: &clap::Command, top: &str, folder: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        let top = if top == "limosa" { below.get_name() } else { top };
        write(below, top, folder)?;
    }
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    synopsis(command, &mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    notes(command, &mut page)?;
    section(
        &mut page,
        "EXIT STATUS",
        MEANINGS.iter().map(|meaning| {
            (
                meaning.code.to_string(),
                format!("{}. The source of a move: {}.", plain(meaning.meaning), plain(meaning.source)),
            )
        }),
    )?;
    let pairs = |list: &'static [(&str, &str)]| {
        list.iter().map(|(name, what)| ((*name).to_owned(), (*what).to_owned()))
    };
    section(&mut page, "ENVIRONMENT", pairs(&ENVIRONMENT))?;
    section(&mut page, "FILES", pairs(&FILES))?;
    let examples = EXAMPLES.iter().find(|(name, _)| *name == top).map_or(&[][..], |(_, examples)| *examples);
    section(&mut page, "EXAMPLES", pairs(examples))?;
    let others = EXAMPLES.iter().map(|(name, _)| *name).filter(|name| *name != "limosa" && *name != top);
    let others: Vec<String> = others.map(|name| format!("limosa\\-{}(1)", escaped(name))).collect();
    writeln!(page, ".SH \"SEE ALSO\"\nlimosa(1), {}", others.join(", "))?;
    std::fs::write(folder.join(man.get_filename()), page)
}

/// The command line as the help has it: that of a command below another one begins with the arguments of that.
fn synopsis(command: &clap::Command, to: &mut Vec<u8>) -> io::Result<()> {
    let usage = command.clone().render_usage().to_string();
    writeln!(to, ".SH SYNOPSIS\n.nf")?;
    for line in usage.trim_start_matches("Usage:").lines().map(str::trim).filter(|line| !line.is_empty()) {
        writeln!(to, "{}", escaped(line))?;
    }
    writeln!(to, ".fi")
}

/// The notes behind the options, without the exit codes, which have a section of their own. Lines that are indented stay lines.
fn notes(command: &clap::Command, to: &mut Vec<u8>) -> io::Result<()> {
    let all = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let text = all.trim_end().strip_suffix(exit::help().trim_end()).unwrap_or(&all).trim();
    if text.is_empty() {
        return Ok(());
    }
    writeln!(to, ".SH NOTES")?;
    let mut is_table = false;
    for line in text.lines() {
        if line.starts_with(' ') != is_table && !line.is_empty() {
            is_table = !is_table;
            writeln!(to, "{}", if is_table { ".nf" } else { ".fi" })?;
        }
        writeln!(to, "{}", if line.is_empty() { ".PP".into() } else { escaped(line) })?;
    }
    if is_table { writeln!(to, ".fi") } else { Ok(()) }
}

fn section(to: &mut Vec<u8>, name: &str, entries: impl Iterator<Item = (String, String)>) -> io::Result<()> {
    writeln!(to, ".SH \"{name}\"")?;
    for (term, what) in entries {
        writeln!(to, ".TP\n\\fB{}\\fR\n{}", escaped(&term), escaped(&what))?;
    }
    Ok(())
}

/// Without the marks of Markdown.
fn plain(text: &str) -> String {
    text.replace(['`', '*'], "")
}

/// A line in which nothing is a request of roff.
fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_every_section() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = args::command().disable_help_subcommand(true);
        command.build();
        write(&command, "limosa", folder.path()).unwrap();
        let mut pages = 0;
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            for name in ["\"EXIT STATUS\"", "\"ENVIRONMENT\"", "\"FILES\"", "\"EXAMPLES\"", "\"SEE ALSO\""] {
                let section = text.split(&format!(".SH {name}\n")).nth(1);
                let first = section.and_then(|section| section.lines().next());
                assert!(first.is_some_and(|line| !line.starts_with(".SH")), "{}: {name}", path.display());
            }
            assert!(!text.contains("Exit codes:"), "{}", path.display());
            pages += 1;
        }
        assert!(pages > 25, "{pages}");
        for action in ["set", "get", "reset", "next"] {
            let page =
                std::fs::read_to_string(folder.path().join(format!("limosa-state-{action}.1"))).unwrap();
            let (_, synopsis) = page.split_once(".SH SYNOPSIS\n").unwrap();
            let (synopsis, _) = synopsis.split_once(".SH").unwrap();
            assert!(
                synopsis.contains("limosa state") && synopsis.contains("<DEVICE>"),
                "{action}: {synopsis}"
            );
        }
        assert_eq!(escaped(".a\\b-c"), "\\&.a\\eb\\-c");
    }
}
