//! The report of a move, written to files in the formats of their names. The files are prepared before anything is moved: a
//! report appears under its name when it is complete, as a snapshot does, and an older one stays until then.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Publication, Report, SnapshotFile, SnapshotTarget, SnapshotWriter};
use limosa_stream::MigrationId;
use serde::Serialize;

use crate::args::Reporting;
use crate::exit::{self, Code};
use crate::new_file;
use crate::output::Output;
use crate::text;

/// The format of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Html,
    Json,
    Text,
}

/// The file of a `--report`.
#[derive(Clone, Debug)]
pub struct ReportFile {
    path: PathBuf,
    format: Format,
}

/// Parses a name that ends in .html, .json or .txt.
pub fn report_file(text: &str) -> Result<ReportFile, String> {
    let path = PathBuf::from(text);
    let format = match path.extension().and_then(|extension| extension.to_str()) {
        Some("html") => Format::Html,
        Some("json") => Format::Json,
        Some("txt") => Format::Text,
        _ => return Err("expected a file whose name ends in .html, .json or .txt".into()),
    };
    Ok(ReportFile { path, format })
}

/// What can be written to a file in each format.
pub trait Printed: Serialize {
    /// A page.
    fn html(&self) -> String;
    /// For a terminal.
    fn text(&self) -> String;
}

impl Printed for Report {
    fn html(&self) -> String {
        Report::html(self)
    }

    fn text(&self) -> String {
        self.to_string()
    }
}

/// The files, prepared.
pub struct Reports<'a> {
    prepared: Vec<Prepared>,
    out: &'a Output,
}

struct Prepared {
    named: ReportFile,
    /// Until the report is published.
    file: Mutex<Option<Box<dyn SnapshotWriter>>>,
}

/// Writes to a file need no deadline.
fn no_wait() -> Wait<'static> {
    Wait::within(std::time::Duration::MAX, None)
}

impl<'a> Reports<'a> {
    /// Prepares all files, and refuses names that cannot be used: only a regular file is replaced,
    /// and no link is followed. A report is readable by its owner alone, as it names devices, addresses and commands.
    pub fn open(args: &Reporting, out: &'a Output) -> anyhow::Result<Reports<'a>> {
        let open = |named: &ReportFile| {
            new_file::check(&named.path, "--report ", true)?;
            let file = named.target().create(no_wait()).map_err(|error| failed(&named.path, &error))?;
            Ok(Prepared { named: named.clone(), file: Mutex::new(Some(file)) })
        };
        let prepared = args.report.iter().map(open).collect::<anyhow::Result<_>>()?;
        Ok(Reports { prepared, out })
    }

    /// Writes the report of a move that has ended.
    pub fn write(&self, report: &impl Printed) -> anyhow::Result<()> {
        for prepared in &self.prepared {
            let text = match prepared.named.format {
                Format::Html => report.html(),
                Format::Json => text::json(&self.out.document(report), false)? + "\n",
                Format::Text => text::lines(&report.text()),
            };
            let path = &prepared.named.path;
            prepared.write(text.as_bytes()).map_err(|error| failed(path, &error))?;
        }
        Ok(())
    }

    /// Writes the report of a move that has failed. An error is only logged: that of the move matters more.
    pub fn write_failed(&self, report: &Report) {
        if let Err(error) = self.write(report) {
            tracing::warn!("{error}");
        }
    }
}

impl ReportFile {
    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file for one of many moves: the id of the move stands before the ending of the name.
    pub fn of_move(&self, id: MigrationId) -> ReportFile {
        let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_os_string();
        let mut name = part(self.path.file_stem());
        name.push(format!("-{id}."));
        name.push(part(self.path.extension()));
        ReportFile { path: self.path.with_file_name(name), format: self.format }
    }

    fn target(&self) -> SnapshotFile {
        SnapshotFile::new(&self.path).replacing(true)
    }
}

impl Prepared {
    fn write(&self, mut bytes: &[u8]) -> Result<(), LinkError> {
        let prepared = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let mut file = match prepared {
            Some(file) => file,
            None => self.named.target().create(no_wait())?,
        };
        while !bytes.is_empty() {
            bytes = &bytes[file.write(bytes, no_wait())?..];
        }
        match file.publish(no_wait()) {
            Publication::Published { .. } => Ok(()),
            Publication::NotPublished(error) | Publication::Unknown(error) => Err(error),
            _ => Err(std::io::Error::other("it is not known whether it is there").into()),
        }
    }
}

fn failed(path: &Path, error: &LinkError) -> anyhow::Error {
    let code = match error {
        LinkError::Io(error) => exit::of_file(error),
        _ => Code::Failed,
    };
    exit::error(code, format!("--report {}: {error}; expected a file that can be written", path.display()))
}
