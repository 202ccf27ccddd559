//! `limosa bench compare`: two runs, and which differences are beyond their spread.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Context;
use limosa_bench::Document;

use crate::exit::{self, Code};
use crate::output::Output;

pub fn run(first: &Path, second: &Path, out: &Output) -> anyhow::Result<()> {
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
    let name = path.display();
    let file = File::open(path).with_context(|| format!("{name} cannot be read"))?;
    let mut text = Vec::new();
    file.take(limosa_bench::BYTES_MAX + 1)
        .read_to_end(&mut text)
        .with_context(|| format!("{name} cannot be read"))?;
    let damaged = |why: String| exit::error(Code::Damaged, format!("{name}: {why}"));
    if text.len() as u64 > limosa_bench::BYTES_MAX {
        return Err(damaged(format!("it is longer than {} bytes", limosa_bench::BYTES_MAX)));
    }
    let text = String::from_utf8(text).map_err(|_| damaged("it is no text".into()))?;
    Document::parse(&text).map_err(damaged)
}
