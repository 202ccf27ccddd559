//! `limosa demo`: what it prints fits a terminal, and it leaves nothing behind, however it ends.

use std::path::Path;

use crate::support::{Folder, limosa, start_with};
use rustix::process::Signal;

const CANCELLED: i32 = 7;

/// Entries of a folder.
fn entries(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Where a signal finds the demo: at its first file, at a line that it says, or in a phase of the move.
#[derive(Clone, Copy, Debug)]
enum At {
    Folder,
    Says(&'static str),
}

#[test]
fn the_folder_of_a_demo_stayed_behind_after_a_signal() {
    let places = [
        At::Folder,
        At::Says("servers  "),
        At::Says("guest  "),
        At::Says("phase=\"pre-copy\""),
        At::Says("phase=\"stop-copy\""),
        At::Says("phase=\"finish\""),
    ];
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        for at in places {
            let folder = Folder::new();
            let variables = [("TMPDIR".to_owned(), folder.text(""))];
            let demo = start_with(&variables, &["-vv", "demo", "--state-size", "4M", "--memory", "4M"]);
            match at {
                At::Folder => {
                    while entries(&folder.path("")).is_empty() {
                        std::thread::yield_now();
                    }
                }
                At::Says(line) => assert!(demo.says(line), "{line}"),
            }
            demo.signal(signal);
            let ended = demo.end();
            // One that comes late finds the demo at its end.
            assert!([0, CANCELLED].contains(&ended.code), "{signal:?} at {at:?}: {ended:?}");
            if let At::Folder | At::Says("servers  ") = at {
                ended.fails(CANCELLED, &["cancelled", "servers have ended"]);
            }
            assert_eq!(entries(&folder.path("")), [""; 0], "{signal:?} at {at:?}: {ended:?}");
        }
    }
}

#[test]
fn the_timeline_of_the_demo_was_wider_than_a_terminal() {
    let said = limosa(&["demo"]).ok();
    for line in said.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
}
