//! The machine in words and pictures, printed from [`ARCS`] and the paths derived from them.

use alloc::format;
use alloc::string::String;
use core::fmt::Write;

use super::{ARCS, Arc, Session, next, path};
use crate::{MigrationFlags, State};

/// Writing to a `String` cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out, $($arg)*); }};
}

impl Session {
    /// What an arc does to the session, in two words; nothing where it does nothing.
    pub const fn effect(self) -> &'static str {
        match self {
            Session::None => "",
            Session::Opens => "opens session",
            Session::Keeps => "keeps session",
            Session::Ends => "ends session",
        }
    }
}

/// Every path: a line for each set of flags and each pair of states, of flags, from, to and the
/// states on the way, such as `STOP_COPY+P2P+PRE_COPY PRE_COPY STOP PRE_COPY>RUNNING>RUNNING_P2P>STOP`,
/// or `EINVAL` in the path's place where the transition is refused.
///
/// Sets in the order of [`MigrationFlags::SETS`], states by number.
pub fn paths_table() -> String {
    let mut out = String::new();
    for flags in MigrationFlags::SETS {
        for from in State::ALL {
            for to in State::ALL {
                match path(flags, from, to) {
                    Ok(path) => put!(out, "{flags} {from} {to} {path}"),
                    Err(_) => put!(out, "{flags} {from} {to} EINVAL"),
                }
            }
        }
    }
    out
}

/// The machine of a device with these flags for a reader: its arcs (those over states that it lacks
/// too) with what they do to the session, and for each pair of states the one to enter next.
pub fn table(flags: MigrationFlags) -> String {
    let mut out = String::new();
    let states = || State::ALL.into_iter().filter(|state| *state != State::Error && flags.has(*state));
    put!(out, "Arcs of a device with {flags}");
    for from in states() {
        for to in states().filter(|to| from != *to && next(flags, from, *to) == Ok(*to)) {
            let effect = Arc::new(from, to).session.effect();
            put!(out, "{}", format!("  {from:12} -> {to:12}  {effect}").trim_end());
        }
    }
    put!(out, "");
    put!(out, "Next state on the way (rows: from, columns: to; . is already there)");
    let line = |name: &str, cell: &dyn Fn(State) -> String| {
        let mut line = format!("  {name:14}");
        states().for_each(|to| {
            let _ = write!(line, "{:14}", cell(to));
        });
        line
    };
    put!(out, "{}", line("", &|to| format!("{to}")).trim_end());
    for from in states() {
        let cell = |to: State| match next(flags, from, to) {
            Ok(_) if from == to => String::from("."),
            Ok(step) => format!("{step}"),
            Err(_) => String::from("EINVAL"),
        };
        put!(out, "{}", line(from.name(), &cell).trim_end());
    }
    put!(out, "");
    put!(out, "ERROR cannot be asked for. A reset leads from every state, ERROR too, to RUNNING.");
    out
}

/// The machine as a graph for Graphviz.
pub fn dot() -> String {
    let mut out = String::from("digraph vfio_migration {\n  node [shape=box, style=rounded];\n");
    for state in State::ALL {
        let look = match state {
            State::Error => " [color=red]",
            state if state.has_session() => " [style=\"rounded,filled\", fillcolor=lightblue]",
            _ => "",
        };
        put!(out, "  {state}{look};");
    }
    for Arc { from, to, session } in ARCS {
        match session.effect() {
            "" => put!(out, "  {from} -> {to};"),
            effect => put!(out, "  {from} -> {to} [label=\"{effect}\"];"),
        }
    }
    put!(out, "  {} -> {} [label=\"reset\", style=dashed];", State::Error, State::Running);
    out.push_str("}\n");
    out
}

/// The machine as a state diagram for Mermaid.
pub fn mermaid() -> String {
    let mut out = String::from("stateDiagram-v2\n");
    put!(out, "    [*] --> {}", State::Running);
    for Arc { from, to, session } in ARCS {
        match session.effect() {
            "" => put!(out, "    {from} --> {to}"),
            effect => put!(out, "    {from} --> {to}: {effect}"),
        }
    }
    put!(out, "    {} --> {}: reset", State::Error, State::Running);
    out
}
