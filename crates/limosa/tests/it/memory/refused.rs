//! Memory that is refused before anything is touched.

use std::path::Path;

use super::{empty, memory};
use crate::support::pair::Pair;
use crate::support::{limosa, start};

#[test]
fn memory_maps_that_do_not_match_are_refused_before_the_guest_is_stopped() {
    let pair = Pair::new(&[], &[]);
    let (from, to) = (memory(&pair.folder, "from", 64), empty(&pair.folder, "to", 64));
    let stopped = pair.folder.text("stopped");
    let stop = format!("touch {stopped}");
    let link = format!("unix:{}", pair.folder.text("link"));
    for (here, there, parts) in [
        (vec!["@0"], vec![], vec!["only the source has memory 0"]),
        (vec![], vec!["@0"], vec!["only the destination has memory 0"]),
        (vec!["@0"], vec!["@0,size=32K"], vec!["0x40000 bytes at 0x0", "0x8000 bytes at 0x0"]),
        (vec!["@0"], vec!["@0x1000"], vec!["0x40000 bytes at 0x0", "0x40000 bytes at 0x1000"]),
        // A hole there where there is none here.
        (
            vec!["@0"],
            vec!["@0,size=32K", "@0x10000,size=32K,offset=32K"],
            vec!["0x40000 bytes at 0x0", "0x8000 bytes at 0x0", "only the destination has memory 1"],
        ),
    ] {
        let words = |file: &str, parts: &[&str]| -> Vec<String> {
            parts.iter().flat_map(|part| ["--memory".to_owned(), format!("{file}{part}")]).collect()
        };
        let receive = ["receive", &pair.destination.socket, "--listen", &link].map(str::to_owned);
        let receiver = start(&[&receive[..], &words(&to, &there)].concat());
        receiver.line("listening on");
        let send = ["send", &pair.source.socket, "--to", &link, "--on-stop", &stop].map(str::to_owned);
        limosa(&[&send[..], &words(&from, &here)].concat())
            .fails(3, &[&["cannot be moved"][..], &parts].concat());
        receiver.end().fails(3, &parts);
        pair.is_as_before();
        assert!(!Path::new(&stopped).exists(), "the guest was not disturbed");
    }
    assert!(std::fs::read(&to).unwrap().iter().all(|byte| *byte == 0), "nothing was written");
}

#[test]
fn memory_that_cannot_be_one_guests_is_refused_before_anything_is_opened_for_long() {
    let pair = Pair::new(&[], &[]);
    let folder = &pair.folder;
    let file = memory(folder, "file", 64);
    std::fs::write(folder.path("odd"), [1; 5000]).unwrap();
    let (odd, dir, none) = (folder.text("odd"), folder.text(""), folder.text("none"));
    let link = format!("unix:{}", folder.text("link"));
    let send = |memory: &[String]| {
        let words = ["send", &pair.source.socket, "--to", &link, "--guest-stopped"].map(str::to_owned);
        let memory = memory.iter().flat_map(|memory| ["--memory".to_owned(), memory.clone()]);
        limosa(&words.into_iter().chain(memory).collect::<Vec<_>>())
    };
    for (memory, code, parts) in [
        (vec![format!("{file}@0"), format!("{file}@0x10000")], 2, vec!["overlap", "0x0 to 0x3ffff"]),
        (
            vec![format!("{file}@1G,size=64K"), format!("{file}@0,offset=32K,size=64K")],
            2,
            vec!["the same bytes of one file"],
        ),
        (vec![format!("{file}@0,create,size=1M")], 2, vec!["create is for where memory is written to"]),
        (vec![format!("{file}@0x800")], 2, vec!["not a multiple of 4096"]),
        (vec![file.clone()], 2, vec!["expected FILE@GPA"]),
        (vec![format!("{file}@0,size=1M")], 3, vec!["262144 bytes, and 1048576 are needed"]),
        (vec![format!("{file}@0,offset=1M")], 3, vec!["expected whole pages"]),
        (vec![format!("{file}@0xfffffffffffff000")], 3, vec!["beyond 2^64"]),
        (vec![format!("{odd}@0")], 3, vec!["5000 bytes", "expected whole pages of 4096"]),
        (vec![format!("{none}@0")], 4, vec!["No such file", "a mapping of"]),
        (vec![format!("{dir}@0")], 4, vec!["it is a folder", "expected a regular file"]),
    ] {
        send(&memory).fails(code, &[&["--memory"][..], &parts].concat());
    }
    pair.is_as_before();
    let (here, there) = (format!("{file}@0"), format!("{file}@0"));
    pair.migrate(&["--memory", &here, &there, "--guest-stopped"]).fails(2, &["the same bytes of one file"]);
    pair.migrate(&["--memory", &here, &there]).fails(2, &["--stop-with", "--on-stop", "--guest-stopped"]);
    pair.migrate(&["--memory", &here]).fails(2, &["2 values"]);
    pair.migrate(&["--guest-stopped", "--on-stop", "true"]).fails(2, &["cannot be used with"]);
    pair.migrate(&["--on-resume", "true"]).fails(2, &["--on-stop"]);
    pair.migrate(&["--stop-with", "0"]).fails(2, &["--stop-with"]);
    pair.migrate(&["--stop-with", "2147483647"]).fails(4, &["--stop-with 2147483647", "no such process"]);
    pair.is_as_before();
}
