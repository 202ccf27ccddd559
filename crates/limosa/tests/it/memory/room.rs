//! Files and disks that have no room, or less than they had.

use super::{empty, memory, same};
use crate::support::pair::Pair;
use crate::support::{Ended, on_a_disk, start_by};

#[test]
fn a_file_that_becomes_shorter_in_the_move_undoes_it() {
    let pair = Pair::new(&[], &[]);
    let (from, to) = (memory(&pair.folder, "from", 64), empty(&pair.folder, "to", 64));
    let (here, there) = (format!("{from}@0"), format!("{to}@0"));
    let stop = format!("truncate -s 4096 {from}");
    pair.migrate(&["--memory", &here, &there, "--on-stop", &stop])
        .fails(1, &["guest memory at", "the source is as it was before"]);
    pair.is_as_before();
}

/// Runs the command where files cannot grow beyond this many KiB.
fn limosa_with_little_room(kib: u32, args: &[&str]) -> Ended {
    let limit = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
    start_by("bash", &["-c", &limit], args).end()
}

#[test]
fn a_file_that_can_take_no_more_brings_the_source_back_and_leaves_nothing_behind() {
    let pair = Pair::new(&[], &[]);
    let folder = &pair.folder;
    let (from, to) = (memory(folder, "from", 512), empty(folder, "to", 512));
    let (file, here, there) = (folder.text("file"), format!("{from}@0"), format!("{to}@0"));
    let before = std::fs::read_dir(folder.path("")).unwrap().count();
    limosa_with_little_room(64, &["save", &pair.source.socket, &file])
        .fails(1, &[&file, "too large", "the source is as it was before"]);
    pair.is_as_before();
    let save = ["save", &pair.source.socket, &file, "--memory", &here, "--guest-stopped"];
    limosa_with_little_room(1536, &save).fails(1, &[&file, "too large", "the source is as it was before"]);
    pair.is_as_before();
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), before, "nothing is left behind");
    pair.migrate(&["--memory", &here, &there, "--guest-stopped"]).ok();
    same(&from, &to);
}

#[test]
fn a_full_disk_brings_the_source_back() {
    let pair = Pair::new(&[], &[]);
    let folder = &pair.folder;
    let disk = folder.path("disk");
    std::fs::create_dir(&disk).unwrap();
    let from = memory(folder, "from", 512);
    let (file, here) = (folder.text("disk/file"), format!("{from}@0"));
    let there = format!("{file}@0,size=2M,create");
    let save = ["save", &pair.source.socket, &file, "--memory", &here, "--guest-stopped"];
    let commands = "\"$@\"; code=$?; [ -z \"$(ls -A \"$0\")\" ] || exit 98; exit $code";
    let Some(saved) = on_a_disk("size=1m", &disk, commands, &save) else {
        return;
    };
    saved.fails(1, &[&file, "No space left", "the source is as it was before"]);
    pair.is_as_before();
    let migrate = pair.migration(&["--guest-stopped", "--memory", &here, &there]);
    let moved = on_a_disk("size=1m", &disk, "exec \"$@\"", &migrate).unwrap();
    moved.fails(1, &["guest memory at", "no more room on its disk", "the source is as it was before"]);
    pair.is_as_before();
}
