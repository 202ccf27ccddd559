//! `limosa completions`: made from the command line's own definition.

use anyhow::Context;
use clap::builder::PossibleValue;
use clap_complete::Shell;
use serde::Serialize;

use crate::args;
use crate::output::Output;

#[derive(Serialize)]
struct Completions {
    shell: String,
    script: String,
}

/// The command line as a shell completes it: with words where the command takes more than these.
fn completed() -> clap::Command {
    args::command().mut_subcommand("serve", |serve| {
        serve.mut_arg("options", |options| {
            // They live as long as the process, which ends when the script is written.
            let words = args::model_option_words().map(|word| PossibleValue::new(&*word.leak()));
            options.value_parser(words.collect::<Vec<_>>())
        })
    })
}

pub fn completions(shell: Shell, out: &Output) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut completed(), "limosa", &mut script);
    let script = String::from_utf8(script).context("the script is no text")?;
    let completions = Completions { shell: shell.to_string(), script };
    out.result(&completions, |to| to.write_all(completions.script.as_bytes()))
}
