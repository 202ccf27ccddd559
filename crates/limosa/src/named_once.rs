//! A file that a command line names for two purposes: what is written last would replace the rest. It is refused before anything is
//! touched.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::args::{Command, Link, Memory, Reporting};
use crate::exit::{self, Code};

/// A file and what names it.
struct Named<'a> {
    what: &'static str,
    path: &'a Path,
}

impl Named<'_> {
    /// Where it is, or is going to be, without links.
    fn place(&self) -> Option<PathBuf> {
        if let Ok(place) = fs::canonicalize(self.path) {
            return Some(place);
        }
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        Some(fs::canonicalize(folder.unwrap_or(Path::new("."))).ok()?.join(self.path.file_name()?))
    }

    fn is_same_as(&self, other: &Named<'_>) -> bool {
        let inode = |named: &Named<'_>| fs::metadata(named.path).ok().map(|found| (found.dev(), found.ino()));
        let is_one = inode(self).is_some_and(|one| inode(other) == Some(one));
        is_one || self.place().is_some_and(|one| other.place() == Some(one))
    }
}

/// Refuses a report in a file that the same command line names for something else.
pub fn check(command: &Command) -> anyhow::Result<()> {
    let mut others = Vec::new();
    let reporting = match command {
        Command::Save(args) => {
            others.push(Named { what: "the snapshot", path: args.names.file() });
            memory(&mut others, &args.memory.memory);
            &args.reporting
        }
        Command::Load(args) => {
            others.push(Named { what: "the snapshot", path: &args.file });
            memory(&mut others, &args.memory.memory);
            &args.reporting
        }
        Command::Migrate(args) => {
            memory(&mut others, &args.memory.memory);
            &args.reporting
        }
        Command::Send(args) => {
            memory(&mut others, &args.memory.memory);
            certificates(&mut others, &args.link);
            &args.reporting
        }
        Command::Receive(args) => {
            memory(&mut others, &args.memory.memory);
            certificates(&mut others, &args.link);
            &args.reporting
        }
        Command::Bench(args) => &args.reporting,
        _ => return Ok(()),
    };
    check_reports(reporting, others)
}

fn memory<'a>(others: &mut Vec<Named<'a>>, memory: &'a [Memory]) {
    others.extend(memory.iter().map(|named| Named { what: "--memory", path: &named.file }));
}

fn certificates<'a>(others: &mut Vec<Named<'a>>, link: &'a Link) {
    let tls = &link.tls;
    let files = [("--tls-ca", &tls.tls_ca), ("--tls-cert", &tls.tls_cert), ("--tls-key", &tls.tls_key)];
    others.extend(files.into_iter().filter_map(|(what, path)| Some(Named { what, path: path.as_ref()? })));
}

fn check_reports<'a>(reporting: &'a Reporting, mut others: Vec<Named<'a>>) -> anyhow::Result<()> {
    for report in &reporting.report {
        let report = Named { what: "another --report", path: report.path() };
        if let Some(other) = others.iter().find(|other| report.is_same_as(other)) {
            let (path, what) = (report.path.display(), other.what);
            let message =
                format!("--report {path} would replace {what}, which is in that file; expected another name");
            return Err(exit::error(Code::Usage, message));
        }
        others.push(report);
    }
    Ok(())
}
