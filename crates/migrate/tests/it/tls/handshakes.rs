//! Peers that do not speak TLS, speak something else, or stop in the handshake.

use std::io::IoSlice;
use std::time::Duration;

use limosa_migrate::Cancel;
use limosa_migrate::link::{Link, LinkError, SocketLink, TlsLink, Wait};

use super::{Authority, LIMIT, address, attempt, boxed, ends, refused, says, wait};

#[test]
fn a_plain_peer_and_one_with_tls_refuse_each_other_in_sentences() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let plain = |link| Ok(Box::new(link) as Box<dyn Link>);
    let (near, far) = SocketLink::pair().unwrap();
    let world = ends();
    let accept = || boxed(TlsLink::accept(far, &destination, wait()));
    let (outcome, received) = attempt(&world, || plain(near), accept);
    let (near, far) = refused(&world, outcome, received);
    says(&far, &["does not speak TLS", "both sides"]);
    says(&near, &["it speaks TLS", "both sides"]);

    let (near, far) = SocketLink::pair().unwrap();
    let world = ends();
    let connect = || boxed(TlsLink::connect(near, &source, &address(), wait()));
    let (outcome, received) = attempt(&world, connect, || plain(far));
    let (near, far) = refused(&world, outcome, received);
    says(&near, &["does not speak TLS", "both sides"]);
    says(&far, &["it speaks TLS", "both sides"]);
}

#[test]
fn garbage_in_place_of_a_handshake_is_refused() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    let long = [[0x16, 3, 3, 0x40, 0].as_slice(), &[1; 70_000]].concat();
    let noises: [&[u8]; 8] = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 4096],
        &[0xff; 4096],
        &[0x16, 3, 1, 0, 4, 1, 0, 0, 0],
        &[0x16, 3, 3, 0xff, 0xff, 9],
        &[0x15, 3, 3, 0, 2, 2, 40],
        &long,
    ];
    for noise in noises {
        for is_source in [true, false] {
            let (link, other) = SocketLink::pair().unwrap();
            let error = std::thread::scope(|scope| {
                let shaken = scope.spawn(|| match is_source {
                    true => TlsLink::connect(link, &source, &address(), wait()).unwrap_err(),
                    false => TlsLink::accept(link, &destination, wait()).unwrap_err(),
                });
                let mut left = noise;
                // It may have refused before it has all.
                while let (false, Ok(sent)) = (left.is_empty(), other.write(&[IoSlice::new(left)], wait())) {
                    left = &left[sent..];
                }
                other.finish();
                drop(other);
                shaken.join().unwrap()
            });
            assert!(matches!(error, LinkError::Tls(_)), "{error} of {:?}", &noise[..noise.len().min(20)]);
        }
    }
}

#[test]
fn a_peer_that_stalls_in_the_handshake_is_given_up_at_the_deadline_and_at_a_cancel() {
    let authority = Authority::new();
    let (source, destination) = (authority.tls("source"), authority.tls("destination"));
    // Stops at once, and in the middle of a record.
    for said in [&b""[..], &[0x16, 3, 1, 1, 0, 1]] {
        for is_source in [true, false] {
            for cancelled in [true, false] {
                let (link, other) = SocketLink::pair().unwrap();
                if !said.is_empty() {
                    other.write(&[IoSlice::new(said)], wait()).unwrap();
                }
                let cancel = Cancel::new().unwrap();
                let limit = if cancelled { LIMIT } else { Duration::from_millis(20) };
                let wait = Wait::within(limit, Some(&cancel));
                let error = std::thread::scope(|scope| {
                    let shaken = scope.spawn(|| match is_source {
                        true => TlsLink::connect(link, &source, &address(), wait).unwrap_err(),
                        false => TlsLink::accept(link, &destination, wait).unwrap_err(),
                    });
                    if cancelled {
                        cancel.cancel();
                    }
                    shaken.join().unwrap()
                });
                match cancelled {
                    true => assert!(matches!(error, LinkError::Cancelled), "{error}"),
                    false => assert!(matches!(error, LinkError::TimedOut), "{error}"),
                }
            }
        }
    }
}
