//! How many writes to the link a device costs.

use std::io::IoSlice;
use std::sync::{Arc, Mutex};

use limosa_client::Chunk;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{Destination, Ledger, MovedDevice, Outcome, Received, Source};
use limosa_protocol::MigrationFlags;
use limosa_protocol::feature::PrecopyInfo;
use limosa_stream::{Decoded, Decoder, Kind};
use limosa_testing::forward_link;

use crate::common::hooked::{Estimates, Hooked, MadeUp};
use crate::common::options;

/// A link that notes which frames end with each write, and the length of the largest.
struct Noting {
    link: SocketLink,
    notes: Mutex<(Decoder, Notes)>,
}

#[derive(Default)]
struct Notes {
    writes: Vec<Vec<Kind>>,
    bytes_max: u32,
}

impl Link for Noting {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let (decoder, notes) = &mut *self.notes.lock().unwrap();
        let written = self.link.write(slices, wait)?;
        let mut bytes = slices.iter().map(|slice| &**slice).collect::<Vec<_>>().concat();
        bytes.truncate(written);
        decoder.push(&bytes);
        let mut kinds = Vec::new();
        while let Some(decoded) = decoder.next().unwrap() {
            if let Decoded::Frame { header, .. } = decoded {
                kinds.push(header.kind);
                notes.bytes_max = notes.bytes_max.max(header.length);
            }
        }
        notes.writes.push(kinds);
        Ok(written)
    }
    forward_link!(|this| this.link; read, finish, peer);
}

/// Gives pieces that fill the buffer, and has no more than this many bytes.
struct Gives(Mutex<usize>);

impl MadeUp for Gives {
    fn read(&self, _stopped: bool, into: &mut [u8]) -> Chunk {
        let mut left = self.0.lock().unwrap();
        let bytes = into.len().min(*left);
        *left -= bytes;
        into[..bytes].fill(7);
        if bytes == 0 { Chunk::End } else { Chunk::Data(bytes) }
    }
    fn info(&self) -> PrecopyInfo {
        PrecopyInfo::default()
    }
}

fn source(bytes: usize, says: usize) -> Hooked {
    let estimates = Estimates { size: Some(says as u64), ..Estimates::default() };
    let device = Hooked::with_estimates("gives", MigrationFlags::SETS[0], &[], estimates);
    device.making_up(Arc::new(Gives(Mutex::new(bytes))))
}

/// The notes of a link about a move of these devices.
fn noted(here: &[Hooked]) -> Notes {
    let count = here.len();
    let there: Vec<_> = (0..count).map(|_| Hooked::new("there", MigrationFlags::SETS[0], &[])).collect();
    let [ours, theirs] = [here, &there[..]]
        .map(|devices| devices.iter().map(|device| MovedDevice::new(device)).collect::<Vec<_>>());
    let (options, ledger) = (options(), Ledger::new());
    let (near, far) = SocketLink::pair().unwrap();
    let near = Noting { link: near, notes: Mutex::new((Decoder::new(), Notes::default())) };
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| Destination::new(&theirs, &ledger, &options).receive(&far));
        let outcome = Source::new(&ours, &options).send(&near);
        near.finish();
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        let received = receiving.join().unwrap();
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
    });
    near.notes.into_inner().unwrap().1
}

/// The writes that carry frames of devices, in a move of this many devices with this much data each.
fn writes(count: usize, bytes: usize) -> Vec<Vec<Kind>> {
    let here: Vec<_> = (0..count).map(|_| source(bytes, bytes)).collect();
    let writes = noted(&here).writes;
    let is_device = |kind: &Kind| [Kind::DEVICE_BEGIN, Kind::DEVICE_DATA, Kind::DEVICE_END].contains(kind);
    writes.into_iter().filter(|kinds| kinds.iter().any(is_device)).collect()
}

#[test]
fn begin_data_and_end_of_a_small_device_were_three_writes() {
    let found = writes(1, 4096);
    assert_eq!(found, [[Kind::DEVICE_BEGIN, Kind::DEVICE_DATA, Kind::DEVICE_END]]);
}

#[test]
fn the_end_of_a_device_s_data_was_a_write_of_its_own() {
    let found = writes(1, 1 << 20);
    assert_eq!(found.concat(), [Kind::DEVICE_BEGIN, Kind::DEVICE_DATA, Kind::DEVICE_DATA, Kind::DEVICE_END]);
    // A socket may take a part of a piece with DEVICE_BEGIN.
    assert_eq!(found.last().unwrap()[..], [Kind::DEVICE_DATA, Kind::DEVICE_END], "{found:?}");
}

#[test]
fn each_of_many_small_devices_costs_two_writes_at_most() {
    const DEVICES: usize = 40;
    let found = writes(DEVICES, 4096);
    let ends = found.iter().flatten().filter(|kind| **kind == Kind::DEVICE_END).count();
    assert_eq!(ends, DEVICES, "{found:?}");
    // The data of some came before STOPPED, and their end after it.
    assert!(found.len() <= 2 * DEVICES, "{} writes: {found:?}", found.len());
}

#[test]
fn a_device_that_had_more_than_it_said_sent_more_at_once_than_half_of_a_window() {
    const PIECE: usize = 512 << 10;
    let notes = noted(&[source(3 * PIECE, PIECE)]);
    assert_eq!(notes.bytes_max as usize, PIECE, "{:?}", notes.writes);
}
