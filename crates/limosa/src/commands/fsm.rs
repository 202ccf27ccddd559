//! `limosa fsm`: the migration state machine.

use limosa_protocol::{MigrationFlags, State, fsm};
use serde::Serialize;

use crate::args;
use crate::output::{self, Output};
use crate::{terminal, text};

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
        () => in_blocks(&fsm::table(MigrationFlags::SETS[3]), terminal::output_columns().unwrap_or(80)),
    };
    if out.json {
        out.result(&Machine { transitions: lines() }, |_| Ok(()))
    } else {
        out.text(|to| to.write_all(text.as_bytes()))
    }
}

/// The table of next states in blocks of columns that fit, one below the other. Its columns begin where the states of its head do.
fn in_blocks(table_text: &str, columns: usize) -> String {
    let is_head = |line: &&str| line.starts_with("   ") && line.contains("RUNNING");
    let Some(head) = table_text.lines().find(is_head) else { return table_text.to_owned() };
    let mut starts: Vec<usize> = head.match_indices(|c: char| c != ' ').map(|(at, _)| at).collect();
    starts.retain(|at| head[..*at].ends_with(' '));
    let (Some(first), Some(wide)) = (starts.first().copied(), starts.get(1).map(|next| next - starts[0]))
    else {
        return table_text.to_owned();
    };
    let count = (columns.saturating_sub(first) / wide).max(1);
    let mut out = String::new();
    let mut table: Vec<&str> = Vec::new();
    let flush = |table: &mut Vec<&str>, out: &mut String| {
        for (at, block) in starts.chunks(count).enumerate().filter(|_| !table.is_empty()) {
            let end = block.last().map_or(first, |last| last + wide);
            if at > 0 {
                out.push('\n');
            }
            for line in &*table {
                let cells = line.get(block[0]..end.min(line.len())).unwrap_or_default();
                *out += format!("{:first$}{cells}", line.get(..first).unwrap_or(line)).trim_end();
                out.push('\n');
            }
        }
        table.clear();
    };
    for line in table_text.lines() {
        let is_row = line == head || (!table.is_empty() && line.starts_with("  "));
        if is_row {
            table.push(line);
            continue;
        }
        flush(&mut table, &mut out);
        out += &text::folded(&format!("{line}\n"), columns);
    }
    flush(&mut table, &mut out);
    out
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_next_states_was_wider_than_a_terminal() {
        let table = fsm::table(MigrationFlags::SETS[3]);
        assert_eq!(in_blocks(&table, 200), table);
        for columns in [60, 80, 100] {
            let text = in_blocks(&table, columns);
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{text}");
            let words = |text: &str| {
                let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
                words.sort_unstable();
                words.dedup();
                words
            };
            assert_eq!(words(&text), words(&table));
            assert_eq!(text.matches(" EINVAL").count(), table.matches(" EINVAL").count());
        }
    }
}
