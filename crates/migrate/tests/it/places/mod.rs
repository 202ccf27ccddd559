//! Places of snapshots that fail, run full, lose an answer, or return something else the second time: nothing of that
//! reaches a device, and the source runs again only where the snapshot is not.

mod files;
mod publications;
mod seals;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::common::{Ends, VecPages, world};
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Decision, Durability, Error, Ledger, Outcome, Publication, Received,
    SnapshotFile, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter, published, verify,
};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{Damage, HEADER_BYTES, Header, Kind, MigrationId, PREFACE_BYTES};
use limosa_testing::this_test;

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];

const MEMORY_BYTES: u64 = 1 << 16;

/// Of a SEAL with its header.
const SEAL_BYTES: usize = 72;

/// What becomes of a publication.
#[derive(Clone, Copy, Debug, Default)]
enum Publishes {
    #[default]
    Durably,
    /// It is there, and may not survive a power failure.
    NotDurably,
    Refuses,
    /// The answer is lost; whether it is there, and whether what is not there can be withdrawn.
    LosesAnswer {
        is_there: bool,
        can_withdraw: bool,
    },
}

/// A place in memory, which misbehaves as its fields say.
#[derive(Default)]
struct Place {
    published: Mutex<Option<Vec<u8>>>,
    /// How many bytes it has room for.
    room: Option<usize>,
    publishes: Publishes,
    /// What it gives when it is read for the second time.
    second: Option<Vec<u8>>,
    /// Called off at the first byte that is read for the second time.
    cancel: Option<Cancel>,
}

impl Place {
    fn of(bytes: &[u8]) -> Place {
        Place { published: Mutex::new(Some(bytes.to_vec())), ..Place::default() }
    }

    fn bytes(&self) -> Vec<u8> {
        self.published.lock().unwrap().clone().unwrap()
    }
}

struct Handle(Arc<Place>);

struct Writer {
    place: Arc<Place>,
    bytes: Vec<u8>,
}

impl SnapshotTarget for Handle {
    fn name(&self) -> String {
        "the place".into()
    }

    fn create(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        Ok(Box::new(Writer { place: self.0.clone(), bytes: Vec::new() }))
    }
}

impl SnapshotWriter for Writer {
    fn write(&mut self, bytes: &[u8], _: Wait<'_>) -> Result<usize, LinkError> {
        let room = self.place.room.map_or(bytes.len(), |room| room.saturating_sub(self.bytes.len()));
        if room == 0 {
            return Err(io::Error::from(io::ErrorKind::StorageFull).into());
        }
        let taken = bytes.len().min(room).min(1000);
        self.bytes.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn publish(self: Box<Self>, _: Wait<'_>) -> Publication {
        let publishes = self.place.publishes;
        let is_there = match publishes {
            Publishes::Refuses => false,
            Publishes::LosesAnswer { is_there, .. } => is_there,
            Publishes::Durably | Publishes::NotDurably => true,
        };
        if is_there {
            *self.place.published.lock().unwrap() = Some(self.bytes);
        }
        let error = |kind: io::ErrorKind| io::Error::from(kind);
        match publishes {
            Publishes::Durably => Publication::Published { durability: Durability::Durable },
            Publishes::NotDurably => {
                Publication::Published { durability: Durability::Unknown(error(io::ErrorKind::StorageFull)) }
            }
            Publishes::Refuses => Publication::NotPublished(error(io::ErrorKind::PermissionDenied).into()),
            Publishes::LosesAnswer { .. } => Publication::Unknown(LinkError::TimedOut),
        }
    }
}

struct Reader {
    place: Arc<Place>,
    at: usize,
    again: bool,
}

impl SnapshotSource for Handle {
    fn name(&self) -> String {
        "the place".into()
    }

    fn open(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        if self.0.published.lock().unwrap().is_none() {
            return Err(io::Error::from(io::ErrorKind::NotFound).into());
        }
        Ok(Box::new(Reader { place: self.0.clone(), at: 0, again: false }))
    }

    fn withdraw(&self, _: MigrationId, _: Wait<'_>) -> Result<bool, LinkError> {
        Ok(matches!(self.0.publishes, Publishes::LosesAnswer { can_withdraw: true, .. }))
    }
}

impl SnapshotReader for Reader {
    fn read(&mut self, into: &mut [u8], _: Wait<'_>) -> Result<usize, LinkError> {
        if self.again {
            self.place.cancel.iter().for_each(Cancel::cancel);
        }
        let bytes = match &self.place.second {
            Some(second) if self.again => second.clone(),
            _ => self.place.bytes(),
        };
        let some = &bytes[self.at.min(bytes.len())..];
        let given = some.len().min(into.len()).min(777);
        into[..given].copy_from_slice(&some[..given]);
        self.at += given;
        Ok(given)
    }

    fn rewind(&mut self, _: Wait<'_>) -> Result<(), LinkError> {
        (self.at, self.again) = (0, true);
        Ok(())
    }
}

/// Ends with memory on both sides.
fn ends() -> (Ends, Arc<VecPages>) {
    let (source, destination) = world("dev", FLAGS, 300);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let (here, there) =
        (VecPages::new(MEMORY_BYTES as usize), Arc::new(VecPages::new(MEMORY_BYTES as usize)));
    here.0.lock().unwrap()[12288..12388].fill(0x77);
    ends.memory = Some((Arc::new(here), there.clone(), MEMORY_BYTES));
    (ends, there)
}

fn save(ends: &Ends, place: Place, after: AfterSave) -> (Outcome, Arc<Place>) {
    let place = Arc::new(place);
    (ends.with_source(|source| source.save(&Handle(place.clone()), after)), place)
}

fn load(ends: &Ends, place: Place) -> Received {
    ends.with_destination(|destination| destination.load(&Handle(Arc::new(place)), AfterLoad::Run))
}

fn saved() -> (Vec<u8>, Ends) {
    let (ends, _) = ends();
    let (outcome, place) = save(&ends, Place::default(), AfterSave::Stop);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    (place.bytes(), ends)
}

/// Where each frame lies: kind, its header's first byte, its payload's.
fn frames(bytes: &[u8]) -> Vec<(Kind, usize, usize)> {
    let mut at = PREFACE_BYTES;
    let mut frames = Vec::new();
    while at < bytes.len() {
        let header = Header::decode(bytes[at..].first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
        frames.push((header.kind, at, at + HEADER_BYTES));
        at += HEADER_BYTES + header.length as usize;
    }
    frames
}

/// The stream with a byte of guest memory altered, and every checksum but the SEAL's made to fit.
fn forged(bytes: &[u8]) -> Vec<u8> {
    let mut forged = bytes.to_vec();
    let (_, at, payload) = frames(bytes).into_iter().find(|frame| frame.0 == Kind::MEMORY_DATA).unwrap();
    forged[payload + 50] ^= 1;
    let header = Header::decode(bytes[at..].first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
    let data = &forged[payload..payload + header.length as usize];
    let header = Header::new(header.kind, header.section, header.position, header.sequence, data).encode();
    forged[at..payload].copy_from_slice(&header);
    forged
}
