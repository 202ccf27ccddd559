//! Moves whose output goes to a terminal, as a person sees them: no line is wider than the terminal, the bar is gone in the
//! end, log lines do not tear it, and colours are not used against the user's will.

use crate::support::pair::Pair;
use crate::support::{limosa_on_terminal, start};
use limosa_testing::Screen;

/// Whether a row has a part of a bar: its spinner.
fn has_spinner(row: &str) -> bool {
    row.contains(|letter| ('\u{2800}'..='\u{28ff}').contains(&letter))
}

/// A move of 1 s or more from one command to another; what the source's shows on a terminal of this width.
fn send(columns: u16, variables: &[(&str, &str)], more: &[&str]) -> Screen {
    let pair = Pair::new(&["state=2M"], &["state=2M"]);
    let listen = format!("unix:{}", pair.folder.text("link"));
    let receiver = start(&["receive", &pair.destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    let args = [&["send", "source", "--to", "unix:link", "--bandwidth", "2M"], more].concat();
    let (code, screen) = limosa_on_terminal(columns, &pair.folder, variables, &args);
    assert_eq!(code, 0, "{screen:?}");
    receiver.end().ok();
    pair.has_moved();
    screen
}

#[test]
fn no_line_of_a_move_is_wider_than_its_terminal() {
    for columns in [60, 80] {
        // On a busy machine a warning tells of a long stop, and log lines are not folded.
        let screen = send(columns, &[("RUST_LOG", "off")], &[]);
        assert!(screen.wrapped().is_empty(), "at {columns} columns: {screen:?}");
        let bars: Vec<_> = screen.shown().iter().filter(|row| has_spinner(row)).collect();
        assert!(bars.iter().any(|bar| bar.contains(" % ") && bar.contains("to go")), "{bars:?}");
        // The least important part is left out if it does not fit.
        let is_complete =
            |bar: &&String| ["of 2.00 MiB", "/s ", "to go"].iter().all(|part| bar.contains(part));
        assert_eq!(bars.iter().copied().any(|bar| is_complete(&bar)), columns == 80, "{bars:?}");
        let rows = screen.rows();
        assert!(!rows.iter().any(|row| has_spinner(row)), "the bar is still there: {rows:?}");
        assert!(rows.iter().any(|row| row.contains("moved")), "there is no report: {rows:?}");
        assert!(!screen.is_coloured(), "{screen:?}");
    }
}

#[test]
fn log_lines_do_not_tear_the_bar_and_have_no_colours_with_no_color() {
    for (variables, is_coloured) in [(&[("NO_COLOR", "1")][..], false), (&[][..], true)] {
        let screen = send(80, variables, &["-vv"]);
        assert_eq!(screen.is_coloured(), is_coloured, "{variables:?}: {screen:?}");
        assert!(screen.shown().iter().any(|row| has_spinner(row)), "{screen:?}");
        let rows = screen.rows();
        assert!(!rows.iter().any(|row| has_spinner(row)), "a part of the bar is left: {rows:?}");
        let is_log = |row: &&String| [" INFO ", "DEBUG "].iter().any(|level| row.contains(level));
        let log: Vec<_> = rows.iter().filter(is_log).collect();
        assert!(!log.is_empty(), "there is no log: {rows:?}");
        // Each begins with its time.
        assert!(log.iter().all(|row| row.starts_with("20")), "{log:?}");
    }
}

#[test]
fn a_line_beside_a_result_is_folded_to_the_terminal() {
    let pair = Pair::new(&[], &[]);
    pair.migrate(&[]).ok();
    let (code, screen) = limosa_on_terminal(60, &pair.folder, &[], &["state", "destination"]);
    let rows = screen.rows();
    assert!(code == 0 && screen.wrapped().is_empty() && rows.iter().any(|row| row == "RUNNING"), "{rows:?}");
    assert!(rows[0].starts_with("loaded by move") && rows.len() > 3, "{rows:?}");
}
