//! `limosa completions`: made from the command line's own definition.

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

pub fn completions(shell: Shell, out: &Output) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "limosa", &mut script);
    let script = String::from_utf8(script).context("the script is no text")?;
    let completions = Completions { shell: shell.to_string(), script };
    out.result(&completions, |to| to.write_all(completions.script.as_bytes()))
}
