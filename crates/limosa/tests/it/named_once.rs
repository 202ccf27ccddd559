//! A file that a command line names for two purposes.

use std::fs;

use crate::support::pair::Pair;
use crate::support::{GUEST, limosa};
use limosa_protocol::State;

const USAGE: i32 = 2;

#[test]
fn a_report_replaced_the_snapshot_that_it_was_about() {
    let pair = Pair::new(&[], &[]);
    let (source, file) = (&pair.source, pair.folder.text("guest.json"));
    let alias = format!(
        "{}/../{}/guest.json",
        pair.folder.text(""),
        pair.folder.path("").file_name().unwrap().display()
    );
    for report in [&file, &alias] {
        limosa(&["save", "--stop", &source.socket, &file, "--report", report])
            .fails(USAGE, &["--report", "would replace the snapshot", "another name"]);
        assert!(source.runs(GUEST) && !pair.folder.path("guest.json").exists());
    }
    limosa(&["save", &source.socket, &file]).ok();
    let (saved, other) = (fs::read(&file).unwrap(), pair.folder.text("other.json"));
    fs::hard_link(&file, &other).unwrap();
    for report in [&file, &alias, &other] {
        limosa(&["load", &file, &pair.destination.socket, "--report", report])
            .fails(USAGE, &["would replace the snapshot"]);
        assert!(fs::read(&file).unwrap() == saved);
    }
    limosa(&["load", &file, &pair.destination.socket, "--report", &file, "--report", &other])
        .fails(USAGE, &[]);
    let report = pair.folder.text("report.json");
    limosa(&["load", &file, &pair.destination.socket, "--report", &report, "--report", &report])
        .fails(USAGE, &["another --report"]);
    limosa(&["load", &file, &pair.destination.socket, "--report", &report]).ok();
}

#[test]
fn a_report_replaced_the_memory_that_was_received() {
    let pair = Pair::new(&[], &[]);
    let (here, there) = (pair.folder.text("here.txt"), pair.folder.text("there.txt"));
    fs::write(&here, vec![7; 1 << 20]).unwrap();
    let (from, to) = (format!("{here}@0"), format!("{there}@0,size=1M,create"));
    for report in [&here, &there] {
        pair.migrate(&["--memory", &from, &to, "--guest-stopped", "--report", report])
            .fails(USAGE, &["would replace --memory"]);
    }
    assert_eq!((pair.source.state(), fs::read(&here).unwrap().len()), (State::Running, 1 << 20));
}
