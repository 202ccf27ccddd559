//! `limosa fsm`: the migration state machine.

use limosa_protocol::{MigrationFlags, State, fsm};
use serde::Serialize;

use crate::args;
use crate::output::{self, Output};

/// Every pair of states, for every set of flags.
#[derive(Serialize)]
struct Machine {
    transitions: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    flags: Vec<&'static str>,
    from: &'static str,
    to: &'static str,
    /// The states passed; absent where the transition is refused with EINVAL.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<Vec<&'static str>>,
}

pub fn run(args: &args::Fsm, out: &Output) -> anyhow::Result<()> {
    let text = match () {
        () if args.dot => fsm::dot(),
        () if args.mermaid => fsm::mermaid(),
        () if args.paths => fsm::paths_table(),
        () => fsm::table(MigrationFlags::SETS[3]),
    };
    if out.json {
        out.result(&Machine { transitions: lines() }, |_| Ok(()))
    } else {
        out.text(|to| to.write_all(text.as_bytes()))
    }
}

fn lines() -> Vec<Line> {
    let pairs = || State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to)));
    let line = |flags: MigrationFlags, from: State, to: State| Line {
        flags: output::flag_names(flags),
        from: from.name(),
        to: to.name(),
        path: fsm::path(flags, from, to)
            .ok()
            .map(|path| path.states().iter().map(|state| state.name()).collect()),
    };
    let lines = |flags| pairs().map(move |(from, to)| line(flags, from, to));
    MigrationFlags::SETS.into_iter().flat_map(lines).collect()
}
