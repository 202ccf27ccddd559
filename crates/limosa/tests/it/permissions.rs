//! Files that hold a guest's memory, a device's state, or what a report or a note says of them: they are their owner's
//! alone, whatever the umask.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::support::{Folder, start_under};

const UMASKS: [&str; 3] = ["000", "022", "077"];

/// Every file below the folder is its owner's alone, and so is every folder. How many files there are.
#[track_caller]
fn are_private(folder: &Path, umask: &str) -> usize {
    let mut files = 0;
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let (path, found) = (entry.path(), entry.metadata().unwrap());
        if found.is_dir() {
            files += are_private(&path, umask);
        } else if found.is_file() {
            files += 1;
        } else {
            continue;
        }
        let (mode, expected) = (found.mode() & 0o7777, if found.is_dir() { 0o700 } else { 0o600 });
        assert_eq!(mode, expected, "umask {umask}: {} has mode {mode:o}", path.display());
    }
    files
}

#[test]
fn snapshots_memory_and_reports_were_readable_by_every_user_of_the_host() {
    for umask in UMASKS {
        let folder = Folder::new();
        let (one, other) = (folder.device("one", &[]), folder.device("other", &[]));
        std::fs::create_dir(folder.path("made")).unwrap();
        std::fs::set_permissions(folder.path("made"), std::fs::Permissions::from_mode(0o700)).unwrap();
        let [from, to, new, old, text, html, json] =
            ["from", "made/to", "made/new", "made/old", "made/r.txt", "made/r.html", "made/r.json"]
                .map(|name| folder.text(name));
        std::fs::write(&from, vec![7; 1 << 20]).unwrap();
        std::fs::write(&old, "an older snapshot").unwrap();
        std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o666)).unwrap();
        let memory = ["--memory", &format!("{from}@0"), "--guest-stopped"].map(str::to_owned);
        let memory: Vec<&str> = memory.iter().map(String::as_str).collect();
        for args in [&["save", &one.socket, &new][..], &["save", "--replace", &one.socket, &old]] {
            start_under(umask, &[args, &memory].concat()).end().ok();
        }
        let (here, there) = (format!("{from}@0"), format!("{to}@0,size=1M,create"));
        let reports = ["--report", &text, "--report", &html, "--report", &json];
        let args = ["migrate", &one.socket, &other.socket, "--memory", &here, &there, "--guest-stopped"];
        start_under(umask, &[&args[..], &reports].concat()).end().ok();
        assert_eq!(are_private(&folder.path("made"), umask), 6);
    }
}

#[test]
fn records_and_notes_of_moves_were_readable_by_every_user_of_the_host() {
    for umask in UMASKS {
        let folder = Folder::new();
        let source = folder.device("source", &[]);
        // The commit takes a while, in which the note and the record are there.
        let destination = folder.device("destination", &["fault=stall:STOP>RUNNING_P2P:800"]);
        let listen = format!("unix:{}", folder.text("link"));
        let (here, there) = (folder.text("state/here"), folder.text("state/there"));
        let receive = ["receive", &destination.socket, "--listen", &listen, "--moves", &there];
        let receiver = start_under(umask, &receive);
        receiver.line("listening on");
        let sender = start_under(umask, &["send", &source.socket, "--to", &listen, "--moves", &here]);
        destination.line("stalls as scripted");
        assert_eq!(are_private(&folder.path("state"), umask), 3);
        let state = std::fs::metadata(folder.path("state")).unwrap().mode() & 0o7777;
        assert_eq!(state, 0o700, "umask {umask}");
        sender.end().ok();
        receiver.end().ok();
    }
}
