//! `limosa bench compare`: two runs, and which differences are beyond their spread.

use std::path::Path;

use limosa_bench::Document;

use crate::exit::{self, Code};
use crate::output::Output;
use crate::read_text::read_text;

pub fn run(first: &Path, second: &Path, out: &Output) -> anyhow::Result<()> {
    if first == second && first == Path::new("-") {
        return Err(exit::error(
            Code::Usage,
            "standard input has one document; name a file for the other run",
        ));
    }
    let compared = limosa_bench::compare(&read(first)?, &read(second)?);
    if compared.rows.is_empty() {
        let (first, second) = (first.display(), second.display());
        let what = format!(
            "{first} and {second} have no measure in common, so nothing can be compared; expected two runs on devices of one kind"
        );
        return Err(exit::error(Code::Refused, what));
    }
    out.result(&compared, |to| write!(to, "{compared}"))?;
    match compared.changed() {
        (0, 0) => Ok(()),
        (faster, slower) => {
            let what = format!("beyond the spread: {slower} slower, {faster} faster");
            Err(exit::error(Code::Noteworthy, what))
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Document> {
    let text = read_text(path, limosa_bench::BYTES_MAX)?;
    Document::parse(&text).map_err(|why| exit::error(Code::Damaged, format!("{}: {why}", path.display())))
}
