//! Links that do not prove that they are of the move.

use std::num::NonZeroU32;
use std::sync::Mutex;
use std::time::Duration;

use limosa_migrate::Received;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_stream::body::NEEDS_CREDIT;
use limosa_stream::{Header, Kind, Offer, Preface, PrefaceFlags, Proofs};

use super::{FORGED, Forged, ID, ends, secret, state};
use crate::common::peer::Peer;

/// A link that is one of the move, if its JOIN is right.
fn joins(proofs: &Proofs, forged: Option<Forged>, number: u32) -> (SocketLink, Box<dyn Link>) {
    let (near, far) = SocketLink::pair().unwrap();
    let body = number.to_le_bytes();
    let payload = match forged {
        None => proofs.prove(Kind::JOIN, &body),
        Some(forged) => forged.word(proofs, ID, Kind::JOIN, &body),
    };
    let header = Header::new(Kind::JOIN, 0, 0, 0, &payload);
    let preface = Preface::new(ID, PrefaceFlags::FURTHER).encode();
    let mut peer = Peer::new(near);
    peer.bytes(&[&preface[..], &header.encode(), &payload].concat());
    (peer.link, Box::new(far))
}

#[test]
fn a_link_that_does_not_prove_that_it_is_of_the_move_does_not_join_it() {
    let mut ends = ends();
    ends.options.links = NonZeroU32::new(2).unwrap();
    let (near, far) = SocketLink::pair().unwrap();
    let links = Mutex::new(Vec::<Box<dyn Link>>::new());
    let next = |wait: Wait<'_>| loop {
        if let Some(link) = links.lock().unwrap().pop() {
            return Ok(link);
        }
        wait.left()?;
        std::thread::yield_now();
    };
    let received = std::thread::scope(|scope| {
        let links = &links;
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            let offer = Offer { links: 2, needs: vec![NEEDS_CREDIT.into()], ..Offer::default() };
            assert_eq!(peer.offer(ID, secret(), offer).links, 2);
            // The proof for another number is none, either.
            let (stranger, other) = joins(&peer.proofs, Some(Forged::Bare), 1);
            let (swapped, swapped_far) = {
                let three = peer.proofs.prove(Kind::JOIN, &3_u32.to_le_bytes());
                let (near, far) = SocketLink::pair().unwrap();
                let payload = [&1_u32.to_le_bytes(), &three[4..]].concat();
                let header = Header::new(Kind::JOIN, 0, 0, 0, &payload);
                let preface = Preface::new(ID, PrefaceFlags::FURTHER).encode();
                let mut peer = Peer::new(near);
                peer.bytes(&[&preface[..], &header.encode(), &payload].concat());
                (peer.link, Box::new(far) as Box<dyn Link>)
            };
            links.lock().unwrap().extend([other, swapped_far]);
            let mut strangers = vec![stranger, swapped];
            for forged in &FORGED[1..] {
                let (stranger, far) = joins(&peer.proofs, Some(*forged), 1);
                links.lock().unwrap().push(far);
                strangers.push(stranger);
            }
            for stranger in strangers {
                let wait = Wait::within(Duration::from_secs(10), None);
                assert!(matches!(stranger.read(&mut [0], wait), Err(LinkError::Closed)), "it is closed");
            }
            let (own, far) = joins(&peer.proofs, None, 1);
            links.lock().unwrap().push(far);
            let mut own = Peer::new(own);
            own.sequence = 1;
            own.frame(Kind::LINK_END, 0, 0, &[]);
            let sum = peer.whole(&state()).encode();
            peer.word(Kind::SUM, &sum);
            peer.expect(Kind::READY);
            peer.word(Kind::COMMIT, &[]);
            peer.expect(Kind::RUNNING);
            peer.word(Kind::DONE, &[]);
            while peer.next().is_some() {}
        });
        let received = ends.with_destination(|destination| destination.receive_over(&far, &next));
        drop(far);
        received
    });
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
}
