//! The built `limosa`, as a suite runs it.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use limosa_testing::beside_the_test;

/// The command under test: `$LIMOSA` if set, else the one that was built beside the calling test.
///
/// # Panics
///
/// When neither is there.
pub fn limosa() -> Command {
    let program = env::var_os("LIMOSA").map(PathBuf::from);
    Command::new(program.unwrap_or_else(|| beside_the_test("limosa")))
}
