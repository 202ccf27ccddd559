//! `limosa completions` and `limosa man`: made from the command line's own definition.

use std::io;
use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::output::Output;

pub fn completions(shell: Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "limosa", &mut io::stdout());
}

pub fn man(folder: &Path, out: &Output) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    clap_mangen::generate_to(Cli::command(), folder)
        .with_context(|| format!("cannot write manual pages to {}", folder.display()))?;
    out.result(&folder, |to| writeln!(to, "manual pages are in {}", folder.display()))
}
