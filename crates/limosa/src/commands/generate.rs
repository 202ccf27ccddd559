//! `limosa completions` and `limosa man`: made from the command line's own definition.

use std::path::Path;

use anyhow::Context;
use clap_complete::Shell;
use serde::Serialize;

use crate::args;
use crate::output::Output;

#[derive(Serialize)]
struct Completions {
    shell: String,
    script: String,
}

#[derive(Serialize)]
struct Pages {
    folder: String,
}

pub fn completions(shell: Shell, out: &Output) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "limosa", &mut script);
    let script = String::from_utf8(script).context("the script is no text")?;
    let completions = Completions { shell: shell.to_string(), script };
    out.result(&completions, |to| to.write_all(completions.script.as_bytes()))
}

pub fn man(folder: &Path, out: &Output) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    clap_mangen::generate_to(args::command(), folder)
        .with_context(|| format!("cannot write manual pages to {}", folder.display()))?;
    out.result(&Pages { folder: folder.display().to_string() }, |to| {
        writeln!(to, "manual pages are in {}", folder.display())
    })
}
