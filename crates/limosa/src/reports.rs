//! The report of a move, written to files in the formats of their names. The files are opened before anything is moved.

use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use limosa_migrate::Report;

use crate::args::Reporting;
use crate::exit::{self, Code};

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

/// The files, open.
pub struct Reports(Vec<(ReportFile, File)>);

impl Reports {
    /// Opens all files. An existing one keeps its contents until there is a report, and its mode; a new one is readable by
    /// its owner alone, as a report names devices and addresses.
    pub fn open(args: &Reporting) -> anyhow::Result<Reports> {
        let open = |named: &ReportFile| {
            let mut how = OpenOptions::new();
            how.write(true).create(true).truncate(false).mode(0o600);
            Ok((named.clone(), how.open(&named.path).map_err(|error| failed(&named.path, error))?))
        };
        Ok(Reports(args.report.iter().map(open).collect::<anyhow::Result<_>>()?))
    }

    /// Writes the report of a move that has ended.
    pub fn write(&self, report: &Report) -> anyhow::Result<()> {
        for (named, file) in &self.0 {
            let text = match named.format {
                Format::Html => report.html(),
                Format::Json => serde_json::to_string_pretty(report)? + "\n",
                Format::Text => report.to_string(),
            };
            replace(file, text.as_bytes()).map_err(|error| failed(&named.path, error))?;
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

fn replace(mut file: &File, bytes: &[u8]) -> std::io::Result<()> {
    // A pipe or a terminal has no length and no position.
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        file.rewind()?;
    }
    file.write_all(bytes)
}

fn failed(path: &Path, error: std::io::Error) -> anyhow::Error {
    exit::error(
        Code::Failed,
        format!("--report {}: {error}; expected a file that can be written", path.display()),
    )
}
