//! Peers that break the protocol with frames that are right in themselves: swapped, doubled, too
//! early, too late, endless, newer. The other side stays usable, and nothing is run twice.

mod destinations;
mod sources;
mod windows;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::hooked::{Call, Hooked};
use crate::common::peer::Peer;
use crate::common::{Door, Ends, options, world};
use limosa_client::Device;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    Decision, Destination, Error, Ledger, MovedDevice, Observer, Options, Outcome, Phase, Received,
};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::encode_abort;
use limosa_stream::{
    AbortCode, Answer, Damage, DeviceFacts, Header, Kind, MigrationId, Offer, Preface, PrefaceFlags,
};

const ID: MigrationId = MigrationId([5; 16]);

/// The made-up peers here prove nothing, as those of the first versions.
fn believing() -> Options {
    options().with_unauthenticated_peers(true)
}

fn ends() -> Ends {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 300);
    Ends { options: believing(), ..Ends::new(vec![source], vec![destination]) }
}

/// Lets a made-up source speak to a destination; what the destination said of it. Its device is then
/// as it was.
fn source_says(ends: &Ends, speak: impl FnOnce(&mut Peer) + Send) -> Error {
    let (near, far) = SocketLink::pair().unwrap();
    let received = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            speak(&mut peer);
            peer.link.finish();
            // Until the other side is done.
            let wait = Wait::within(Duration::from_secs(10), None);
            while peer.link.read(&mut [0; 4096], wait).is_ok() {}
        });
        let received = ends.with_destination(|destination| destination.receive(&far));
        drop(far);
        received
    });
    let Received::Discarded { why, .. } = received else { panic!("{received:?}") };
    assert_eq!(ends.destination[0].state(), State::Running);
    assert!(!ends.destination[0].holds_guest());
    why
}

fn greet(peer: &mut Peer) {
    peer.preface(ID);
    let device = DeviceFacts { id: 7, name: "made up".into(), flags: 7, ..DeviceFacts::default() };
    let offer = Offer { devices: vec![device], ..Offer::default() };
    peer.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
}

/// A whole device of which the destination's would take nothing.
fn whole(peer: &mut Peer, data: &[u8]) {
    let sum = peer.whole(data);
    peer.frame(Kind::SUM, 0, 0, &sum.encode());
}
