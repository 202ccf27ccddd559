//! Programs that tests start: those that cargo built, and the test itself once more.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Ended, Process};

/// The folder of programs that the test was built into. Cargo puts tests into `deps/` of it.
fn built() -> PathBuf {
    let test = env::current_exe().expect("a test knows its own file");
    test.parent().and_then(Path::parent).expect("a test is in `deps/`").to_owned()
}

/// A program of the workspace that was built beside the calling test.
pub fn beside_the_test(program: &str) -> PathBuf {
    let path = built().join(program);
    assert!(path.exists(), "{} is missing: build it with `cargo build --workspace`", path.display());
    path
}

/// An example of a package. Cargo builds the examples of the packages whose tests it runs, except where a test is selected by its
/// name (`--test`). Then they are built here, with the features of the whole workspace, which the selection by `--workspace` has
/// built already. To build them for the package alone would build all that it depends on once more: minutes, during which a test
/// seems to hang.
pub fn built_example(package: &str, example: &str) -> PathBuf {
    let folder = built();
    let program = folder.join("examples").join(example);
    if !is_fresh(&program) {
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--quiet", "--workspace", "--example", example]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let built = build.status().is_ok_and(|status| status.success());
        assert!(built, "the example {example} of {package} does not build");
    }
    program
}

/// Whether no source of a program is newer than it is, as far as cargo has noted which they are.
fn is_fresh(program: &Path) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|found| found.modified()).ok();
    let (Some(built), Ok(noted)) = (changed(program), std::fs::read_to_string(program.with_extension("d")))
    else {
        return false;
    };
    let sources = noted.split_whitespace().skip(1);
    sources.map(Path::new).all(|source| changed(source).is_some_and(|changed| changed <= built))
}

/// One of the tests of this binary, ignored or not, as a program.
pub fn this_test(test: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("a test knows its own file"));
    command.args(["--exact", test, "--include-ignored", "--nocapture", "--test-threads=1"]);
    command
}

/// Runs the calling test in a process of its own, and returns how that ended; `None` in that process.
#[track_caller]
pub fn run_alone(test: &str) -> Option<Ended> {
    const ALONE: &str = "LIMOSA_TEST_ALONE";
    let is_alone = env::var_os(ALONE).is_some_and(|alone| alone == test);
    (!is_alone).then(|| Process::start(this_test(test).env(ALONE, test)).end())
}

/// Whether the calling test runs in a process of its own. If not it passes in one here, and the caller has nothing left
/// to do.
#[track_caller]
pub fn is_alone(test: &str) -> bool {
    let Some(ended) = run_alone(test) else { return true };
    assert!(ended.code == 0 && ended.out.contains("1 passed"), "{test}: {}{}", ended.out, ended.err);
    false
}

/// Makes a program of this text. Another process writes it: a child that another test starts at that moment would have this process'
/// file open for writing, and what is open for writing cannot be executed.
#[track_caller]
pub fn program(path: &Path, text: &str) {
    let script = r#"printf %s "$2" >"$1" && chmod 755 "$1""#;
    let made = Command::new("sh").args(["-c", script, "sh"]).arg(path).arg(text).status().expect("a shell");
    assert!(made.success(), "{} cannot be written", path.display());
}

/// Copies this test's program, by another process as in [`program`].
#[track_caller]
pub fn copy_of_this_program(to: &Path) {
    let this = std::env::current_exe().expect("it runs");
    let copied = Command::new("cp").arg(this).arg(to).status().expect("cp");
    assert!(copied.success(), "{} cannot be written", to.display());
}
