//! A device with much data is read while the piece before is on its way to a link.

use std::io::IoSlice;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use limosa_client::Chunk;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Destination, Ledger, MovedDevice, Outcome, Received, Source};
use limosa_protocol::MigrationFlags;
use limosa_protocol::feature::PrecopyInfo;
use limosa_stream::{HEADER_BYTES, Header, Kind};
use limosa_testing::forward_link;

use crate::common::hooked::{Hooked, MadeUp};
use crate::common::options;

const PIECES: usize = 24;
/// A test that fails waits for so long, once.
const LONG: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Reads {
    count: Mutex<usize>,
    changed: Condvar,
}

/// Gives full pieces in the stop, and counts how often it was read.
struct Large(Arc<Reads>);

impl MadeUp for Large {
    fn read(&self, stopped: bool, into: &mut [u8]) -> Chunk {
        if !stopped {
            return Chunk::NothingForNow;
        }
        let mut count = self.0.count.lock().unwrap();
        *count += 1;
        self.0.changed.notify_all();
        match *count <= PIECES {
            true => {
                into.fill(*count as u8);
                Chunk::Data(into.len())
            }
            false => Chunk::End,
        }
    }
    fn info(&self) -> PrecopyInfo {
        PrecopyInfo::default()
    }
}

/// A link that takes a piece of the device's data only when the next one was read.
struct Waits {
    link: SocketLink,
    reads: Arc<Reads>,
    /// Pieces that it was given, and how many of them went out behind a later read.
    pieces: Mutex<(usize, usize)>,
}

impl Link for Waits {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        // Small frames may come before it in the same write.
        let mut headers = slices
            .iter()
            .filter_map(|slice| Header::decode(<&[u8; HEADER_BYTES]>::try_from(&**slice).ok()?).ok());
        if headers.any(|header| header.kind == Kind::DEVICE_DATA) {
            let mut pieces = self.pieces.lock().unwrap();
            pieces.0 += 1;
            // The first ones are sent by the thread that reads.
            if pieces.0 > PIECES / 2 {
                let count = self.reads.count.lock().unwrap();
                let (_count, waited) =
                    (self.reads.changed).wait_timeout_while(count, LONG, |count| *count <= pieces.0).unwrap();
                pieces.1 += usize::from(!waited.timed_out());
                assert!(!waited.timed_out(), "piece {} was sent before the next one was read", pieces.0);
            }
        }
        self.link.write(slices, wait)
    }
    forward_link!(|this| this.link; read, finish, peer);
}

#[test]
fn a_device_was_not_read_while_a_link_took_its_data() {
    let reads = Arc::<Reads>::default();
    let source =
        Hooked::new("large", MigrationFlags::SETS[0], &[]).making_up(Arc::new(Large(Arc::clone(&reads))));
    let destination = Hooked::new("there", MigrationFlags::SETS[0], &[]);
    let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
    let (options, ledger) = (options(), Ledger::new());
    let (link, far) = SocketLink::pair().unwrap();
    let near = Waits { link, reads, pieces: Mutex::default() };
    let (outcome, received) = std::thread::scope(|scope| {
        let received = scope.spawn(|| Destination::new(&there, &ledger, &options).receive(&far));
        let outcome = Source::new(&here, &options).send(&near);
        near.finish();
        (outcome, received.join().unwrap())
    });
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert_eq!(*near.pieces.lock().unwrap(), (PIECES, PIECES / 2));
}
