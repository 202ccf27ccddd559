//! Stores that answer with more than was asked for, with texts for a terminal, or ever so slowly.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use limosa_migrate::verify;
use limosa_store::Object;

/// What the client may have in its sockets' buffers, and more.
const BUFFERS_MAX: usize = 32 << 20;
static PIECE: [u8; 64 << 10] = [b'A'; 64 << 10];

/// A store that gives every request to this, with its range. How many bytes it could send each time.
fn store(
    answer: impl Fn(&mut TcpStream, &str) -> usize + Send + Sync + 'static,
) -> (Object, Receiver<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sent, sends) = channel();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, sent, answer) = (client.unwrap(), sent.clone(), Arc::clone(&answer));
            thread::spawn(move || {
                let mut head = BufReader::new(client.try_clone().unwrap()).lines();
                let mut range = String::new();
                while let Some(Ok(line)) =
                    head.next().filter(|line| line.as_ref().is_ok_and(|line| !line.is_empty()))
                {
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("range:") {
                        range = value.trim().to_owned();
                    }
                }
                // It fails when the test is over.
                let _ = sent.send(answer(&mut client, &range));
            });
        }
    });
    let variables = [
        ("AWS_ACCESS_KEY_ID", "the-id".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "the-secret".to_owned()),
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value));
    (Object::new("s3://snapshots/guest", variables).unwrap(), sends)
}

/// Sends a terabyte. How many bytes went out before the client closed the connection.
fn endless(to: &mut TcpStream, head: &str) -> usize {
    to.write_all(format!("{head}content-length: 1099511627776\r\n\r\n").as_bytes()).unwrap();
    let mut sent = 0;
    while sent < 4 * BUFFERS_MAX && to.write_all(&PIECE).is_ok() {
        sent += PIECE.len();
    }
    sent
}

fn failure(object: &Object) -> String {
    verify(object, Duration::from_secs(60), None).unwrap_err().to_string()
}

#[test]
fn an_error_was_read_to_its_end_however_long_it_was() {
    let (object, sends) =
        store(|to, _| endless(to, "HTTP/1.1 403 Forbidden\r\ncontent-type: application/xml\r\n"));
    let why = failure(&object);
    assert!(why.contains("denies access") && why.contains("no reason"), "{why}");
    let sent = sends.recv().unwrap();
    assert!(sent < BUFFERS_MAX, "{sent} bytes were taken");
}

#[test]
fn a_range_was_read_beyond_its_end() {
    const BYTES: u64 = 100_000_000;
    let (object, sends) = store(|to, range| {
        let range = range.replace('=', " ");
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\netag: \"x\"\r\nlast-modified: Sat, 28 Nov 2026 16:00:00 GMT\r\n\
             content-range: {range}/{BYTES}\r\n"
        );
        if range == "bytes 0-0" {
            to.write_all(format!("{head}content-length: 1\r\nconnection: close\r\n\r\nx").as_bytes())
                .unwrap();
            return 1;
        }
        endless(to, &head)
    });
    let why = failure(&object);
    // What it sent is no snapshot.
    assert!(why.contains("not a Limosa stream"), "{why}");
    let sent = [(); 2].map(|()| sends.recv().unwrap());
    assert!(sent.iter().all(|sent| *sent < BUFFERS_MAX), "{sent:?} bytes were taken");
}

#[test]
fn a_store_s_words_were_printed_as_they_came() {
    let (object, _sends) = store(|to, _| {
        let text = "<Error><Code>SignatureDoesNotMatch</Code><Message>\x1b[2Jevil\nline</Message></Error>";
        let head = format!("HTTP/1.1 403 Forbidden\r\ncontent-length: {}\r\n\r\n", text.len());
        to.write_all(format!("{head}{text}").as_bytes()).unwrap();
        0
    });
    let why = failure(&object);
    assert!(why.contains(r"SignatureDoesNotMatch: \u{1b}[2Jevil\nline") && !why.contains('\x1b'), "{why}");
}
