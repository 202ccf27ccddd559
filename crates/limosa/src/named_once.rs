//! A file that a command line names for two purposes: what is written last would replace the rest. It is refused before anything is
//! touched.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf, absolute};

use crate::args::{Command, Link, Reporting};
use crate::exit::{self, Code};

/// A file and what names it.
struct Named<'a> {
    what: &'static str,
    path: &'a Path,
}

impl Named<'_> {
    fn is_same_as(&self, other: &Named<'_>) -> bool {
        let inode = |named: &Named<'_>| fs::metadata(named.path).ok().map(|found| (found.dev(), found.ino()));
        let is_one = inode(self).is_some_and(|one| inode(other) == Some(one));
        is_one || place(self.path) == place(other.path)
    }
}

/// Where a file of this path is, or is going to be: two paths of one place are one file, whatever links lead there.
pub fn place(path: &Path) -> PathBuf {
    // A link at the path itself may lead to a file that is yet to be made.
    let target = fs::read_link(path).map(|target| path.parent().unwrap_or(Path::new("")).join(target));
    let path = target.unwrap_or_else(|_| path.to_owned());
    let absolute = absolute(&path).unwrap_or(path);
    let folder = absolute.parent().and_then(|folder| folder.canonicalize().ok());
    folder.zip(absolute.file_name()).map_or_else(|| absolute.clone(), |(folder, name)| folder.join(name))
}

/// Refuses a report in a file that the same command line names for something else.
pub fn check(command: &Command) -> anyhow::Result<()> {
    let (reporting, snapshot, memory, link) = match command {
        Command::Save(args) => (&args.reporting, Some(args.names.file()), &args.memory.memory[..], None),
        Command::Load(args) => (&args.reporting, Some(&*args.file), &args.memory.memory[..], None),
        Command::Migrate(args) => (&args.reporting, None, &args.memory.memory[..], None),
        Command::Send(args) => (&args.reporting, None, &args.memory.memory[..], Some(&args.link)),
        Command::Receive(args) => (&args.reporting, None, &args.memory.memory[..], Some(&args.link)),
        Command::Bench(args) => (&args.reporting, None, &[][..], None),
        _ => return Ok(()),
    };
    let mut others: Vec<_> = snapshot.map(|path| Named { what: "the snapshot", path }).into_iter().collect();
    others.extend(memory.iter().map(|named| Named { what: "--memory", path: &named.file }));
    others.extend(link.into_iter().flat_map(certificates));
    check_reports(reporting, others)
}

fn certificates(link: &Link) -> impl Iterator<Item = Named<'_>> {
    let tls = &link.tls;
    let files = [("--tls-ca", &tls.tls_ca), ("--tls-cert", &tls.tls_cert), ("--tls-key", &tls.tls_key)];
    files.into_iter().filter_map(|(what, path)| Some(Named { what, path: path.as_ref()? }))
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
