//! The client on every kind of device through both doors: FEATURE and what it refuses, sessions and their data,
//! regions, interrupts, memory, and devices that are open elsewhere or gone.

mod doors;
mod features;
mod regions;
mod sessions;

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error, FeatureRequest, Refers, Result};
use limosa_lab::{Kind, Mdev, kinds};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags};
use limosa_vfio_kernel::{Door, KernelDevice, Options};

const DOORS: [Door; 2] = [Door::Cdev, Door::Group];

/// A device under test, closed before it is removed.
struct Subject {
    what: String,
    device: KernelDevice,
    mdev: Mdev,
    is_ours: bool,
    flags: MigrationFlags,
}

fn open(mdev: &Mdev, door: Door) -> Result<KernelDevice> {
    KernelDevice::open(mdev.uuid(), &Options { door: Some(door), ..Options::default() })
}

fn subject(kind: &Kind, door: Door) -> Subject {
    let mdev = kind.create();
    let device = open(&mdev, door).unwrap();
    let flags = device.migration_flags().unwrap();
    let what = format!("{} through its {door}", kind.name);
    Subject { what, device, mdev, is_ours: kind.parent == "limosa", flags }
}

fn all() -> impl Iterator<Item = Subject> {
    kinds().into_iter().flat_map(|kind| DOORS.map(|door| subject(&kind, door)))
}

/// Those with migration.
fn movable() -> impl Iterator<Item = Subject> {
    all().filter(|subject| !subject.flags.is_empty())
}

fn of_type(name: &str) -> impl Iterator<Item = Subject> + use<'_> {
    let kind = kinds().into_iter().find(|kind| kind.name == name);
    let kind = kind.unwrap_or_else(|| panic!("no {name}: the lab's module is not loaded"));
    DOORS.into_iter().map(move |door| subject(&kind, door))
}

impl Subject {
    /// A request as it is, and its errno if it is refused.
    fn feature(&self, index: FeatureIndex, op: FeatureOp, payload: &mut [u8]) -> Result<usize, Errno> {
        let reply = self.device.feature(&mut FeatureRequest { index, op, payload, refers: Refers::Nothing });
        reply.map(|reply| reply.payload_bytes).map_err(|error| refusal(&self.what, &error))
    }

    /// Everything up to the end, in reads of so many bytes.
    fn drain(&self, stream: &mut dyn DataStream, bytes: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let mut chunk = vec![0; bytes];
        loop {
            match stream.read(&mut chunk).unwrap_or_else(|error| panic!("{}: {error}", self.what)) {
                Chunk::Data(bytes) => data.extend_from_slice(&chunk[..bytes]),
                Chunk::End => return data,
                Chunk::NothingForNow => panic!("{}: nothing for now in STOP_COPY", self.what),
            }
        }
    }
}

/// The errno of a refusal; anything else ends the test.
fn refusal(what: &str, error: &Error) -> Errno {
    match error {
        Error::Refused { errno, .. } => *errno,
        other => panic!("{what}: no refusal: {other}"),
    }
}
