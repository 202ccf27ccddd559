//! The built `limosa`, as a suite runs it.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// The command under test: `$LIMOSA` if set, else the one that was built beside the calling test.
///
/// # Panics
///
/// When it is not there; `cargo build -p limosa` makes it.
pub fn limosa() -> Command {
    let program = env::var_os("LIMOSA").map_or_else(beside_the_test, PathBuf::from);
    assert!(program.exists(), "{} is missing: build it with `cargo build -p limosa`", program.display());
    Command::new(program)
}

/// Cargo puts tests into `deps/` of the folder that holds the programs.
fn beside_the_test() -> PathBuf {
    let test = env::current_exe().expect("a test knows its own file");
    let deps = test.parent().expect("a file is in a folder");
    deps.parent().unwrap_or(deps).join("limosa")
}
