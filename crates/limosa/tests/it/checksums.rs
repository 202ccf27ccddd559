//! `--memory-checksums`: which frames of memory go without a checksum, by what both sides say.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::support::{Folder, limosa, start};
use limosa_stream::{Header, Kind, PREFACE_BYTES};

/// Passes one connection on, and returns what the sender sent.
fn recorded(listener: &UnixListener, to: &str) -> Vec<u8> {
    let (near, _) = listener.accept().unwrap();
    let far = UnixStream::connect(to).unwrap();
    let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let answers = std::thread::spawn(move || {
        let (mut from, mut into) = back;
        // Either side may be gone when the other one ends.
        let _ = std::io::copy(&mut from, &mut into);
        let _ = into.shutdown(Shutdown::Both);
    });
    let (mut sent, mut piece) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match (&near).read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(bytes) => {
                sent.extend_from_slice(&piece[..bytes]);
                if (&far).write_all(&piece[..bytes]).is_err() {
                    break;
                }
            }
        }
    }
    let _ = far.shutdown(Shutdown::Both);
    answers.join().unwrap();
    sent
}

/// How many frames of memory there are, and how many of them have no checksum.
fn frames(sent: &[u8]) -> (usize, usize) {
    let (mut all, mut unchecked, mut left) = (0, 0, &sent[PREFACE_BYTES..]);
    while let Some((header, rest)) = left.split_first_chunk() {
        let header = Header::decode(header).unwrap();
        if [Kind::MEMORY_DATA, Kind::MEMORY_RUNS].contains(&header.kind) {
            (all, unchecked) = (all + 1, unchecked + usize::from(header.unchecked));
        }
        left = &rest[header.length as usize..];
    }
    (all, unchecked)
}

#[test]
fn memory_goes_without_checksums_where_both_sides_say_so() {
    let folder = Folder::new();
    let [from, to, receiver, path] = ["from", "to", "receiver", "path"].map(|name| folder.text(name));
    std::fs::write(&from, vec![7; 4 << 20]).unwrap();
    std::fs::write(&to, vec![0; 4 << 20]).unwrap();
    for (here, there, without) in [
        ("auto", "auto", false),
        ("never", "never", true),
        ("never", "auto", false),
        ("always", "never", false),
    ] {
        let (listen, memory) = (format!("unix:{receiver}"), format!("{to}@0"));
        let receives =
            start(&["receive", "--memory", &memory, "--listen", &listen, "--memory-checksums", there]);
        receives.line("listening on");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let (sent, all) = std::thread::scope(|scope| {
            let recording = scope.spawn(|| recorded(&listener, &receiver));
            let (memory, address) = (format!("{from}@0"), format!("unix:{path}"));
            let args = ["send", "--memory", &memory, "--to", &address, "--guest-stopped"];
            limosa(&[&args[..], &["--memory-checksums", here]].concat()).ok();
            receives.end().ok();
            let sent = recording.join().unwrap();
            (frames(&sent), sent.len())
        });
        assert!(sent.0 > 0 && all > 4 << 20, "{sent:?} {all}");
        assert_eq!(sent.1, if without { sent.0 } else { 0 }, "{here} here, {there} there");
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        std::fs::write(&to, vec![0; 4 << 20]).unwrap();
    }
    for args in [&["send", "--to", "unix:x"][..], &["receive", "--listen", "unix:x"], &["migrate", "y"]] {
        limosa(&[args, &["x", "--memory-checksums", "sometimes"]].concat()).fails_usage();
    }
}

trait Usage {
    fn fails_usage(&self);
}

impl Usage for crate::support::Ended {
    #[track_caller]
    fn fails_usage(&self) {
        assert_eq!(self.code, 2, "{self:?}");
        assert!(
            ["sometimes", "auto", "always", "never"].iter().all(|word| self.err.contains(word)),
            "{self:?}"
        );
    }
}
