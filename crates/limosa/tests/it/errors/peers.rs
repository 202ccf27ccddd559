//! Addresses without a peer, and peers that are not migrating.

use super::*;

#[test]
fn addresses_that_are_none_are_refused_before_anything_is_done() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for address in ["", "x", "unix:", "tcp:h", "tcp:h:99999", "tcp:::1:5", "udp:h:1", "file:x"] {
        let parts = &[&format!("`{address}`")[..], "expected unix:PATH"];
        limosa(&["send", &device.socket, "--to", address]).fails(USAGE, parts);
        limosa(&["receive", &device.socket, "--listen", address]).fails(USAGE, parts);
    }
    assert_eq!(device.state(), State::Running);
}

#[test]
fn nobody_at_the_other_end_is_said_so() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    // A port that is free, and one that is not.
    let port = |listener: &std::net::TcpListener| format!("tcp:{}", listener.local_addr().unwrap());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port(&taken);
    limosa(&["receive", &device.socket, "--listen", &address])
        .fails(UNREACHABLE, &[&address, "in use", "choose another address"]);
    drop(taken);
    for address in [address, format!("unix:{}", folder.text("none"))] {
        limosa(&["send", &device.socket, "--to", &address])
            .fails(UNREACHABLE, &[&address, "is `limosa receive` listening there?"]);
    }
    let link = format!("unix:{}", folder.text("link"));
    limosa(&["receive", &device.socket, "--listen", &link, "--wait", "0.02"])
        .fails(UNREACHABLE, &[&link, "nobody connected within 20ms"]);
    limosa(&["--json", "receive", &device.socket, "--listen", &link, "--wait", "0.02"])
        .fails(UNREACHABLE, &[]);
    assert_eq!(device.state(), State::Running);
    device.is_usable(&folder);
}

#[test]
fn a_client_that_is_not_a_source_is_named_and_does_not_end_the_wait() {
    use std::io::{Read, Write};
    let folder = Folder::new();
    let (source, device) = (folder.device("source", &[]), folder.device("device", &[]));
    source.mark(5);
    device.mark(77);
    let receiver = start(&["receive", &device.socket, "--listen", "tcp:127.0.0.1:0"]);
    let address = receiver.after("listening on tcp:");
    for (words, part) in [
        (&b""[..], "the link to"),
        (&b"\x89LMS"[..], "the link to"),
        (&b"LIMO"[..], "not a Limosa stream"),
        (&b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"[..], "not a Limosa stream"),
        (&[0; 100_000][..], "not a Limosa stream"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "it speaks TLS"),
    ] {
        let mut client = std::net::TcpStream::connect(&address).unwrap();
        let name = client.local_addr().unwrap().to_string();
        // It may be refused before it has said all.
        let _ = client.write_all(words);
        client.shutdown(std::net::Shutdown::Write).unwrap_or_default();
        let _ = client.read_to_end(&mut Vec::new());
        let said = receiver.line(&name);
        assert!(said.contains(part) && said.contains("passed over"), "{part}: {said}");
    }
    limosa(&["send", &source.socket, "--to", &format!("tcp:{address}")]).ok();
    receiver.end().ok();
    assert!(device.runs(5));
}

#[test]
fn clients_that_stay_silent_do_not_block_a_source() {
    let folder = Folder::new();
    let (source, device) = (folder.device("source", &[]), folder.device("device", &[]));
    source.mark(6);
    let args = ["receive", &device.socket, "--listen", "tcp:127.0.0.1:0", "--silence", "3600", "-v"];
    let receiver = start(&args);
    let address = receiver.after("listening on tcp:");
    // More than are heard at a time.
    let silent: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    receiver.line("more clients connected");
    limosa(&["send", &source.socket, "--to", &format!("tcp:{address}"), "--links", "2"]).ok();
    receiver.end().ok();
    drop(silent);
    assert!(device.runs(6));
}

#[test]
fn clients_that_are_not_migrating_do_not_prolong_the_wait_for_a_source() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let link = folder.text("link");
    let listen = format!("unix:{link}");
    let receiver = start(&["receive", &device.socket, "--listen", &listen, "--wait", "1"]);
    receiver.line("listening on");
    drop(std::os::unix::net::UnixStream::connect(&link).unwrap());
    receiver.end().fails(UNREACHABLE, &[&listen, "nobody sent a move within 1s", "one connected"]);
    device.is_usable(&folder);
}
