//! The items of a switch-over (`docs/switch-over.md: items`). Everything from the other process is checked again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use limosa_device::{DirtyWords, ExportedLog, ExportedMapping, MemoryKind};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_switch_over::{ITEM_FDS_MAX, Item, Refusal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::version::Limits;

/// The kinds of items.
pub(super) mod kind {
    pub const OFFER: u16 = 1;
    pub const FILES: u16 = 2;
    pub const MAPPINGS: u16 = 3;
    pub const LISTENER: u16 = 4;
    pub const CONNECTION: u16 = 5;
    pub const RECEIVED: u16 = 6;
    pub const QUEUED: u16 = 7;
    pub const PARKED: u16 = 8;
    pub const WIRING: u16 = 9;
    pub const EVENTFDS: u16 = 10;
    pub const LOG: u16 = 11;
    pub const DIRTY: u16 = 12;
    pub const MACHINE: u16 = 13;
    pub const STATE: u16 = 14;
    pub const SOCKETS: u16 = 15;
    pub const REGION_FILE: u16 = 16;
    pub const IOEVENTFDS: u16 = 17;
    pub const UNSENT: u16 = 18;
}

/// A device, for the new server to compare with its own.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offer {
    pub flags: u32,
    pub regions: Vec<OfferedRegion>,
    /// Flags and vectors.
    pub irqs: Vec<(u32, u32)>,
    pub migration: u64,
    /// Registers that a client may signal instead of writing, by region: offset, bytes and value of each.
    #[serde(default)]
    pub ioeventfds: BTreeMap<u32, Vec<(u64, u64, Option<u64>)>>,
    /// The absolute path at which it listens, which identifies it to the new server.
    #[serde(default)]
    pub socket: Option<std::path::PathBuf>,
    /// Whether clients other than control clients are connected.
    #[serde(default)]
    pub has_client: bool,
    /// The name of its model ([`Options::model`](crate::server::Options::model)).
    #[serde(default)]
    pub model: Option<String>,
}

/// Flags, bytes, and where it begins in its file, with the parts that can be mapped, if any can.
pub(super) type OfferedRegion = (u32, u64, Option<(u64, Vec<(u64, u64)>)>);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listener {
    pub control: bool,
    /// Its path, if the server created it, and the identity of the socket.
    pub path: Option<(std::path::PathBuf, (u64, u64))>,
    /// The mode and the group from the server's options, unless it is the control socket.
    #[serde(default)]
    pub access: Option<(u32, Option<u32>)>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Connection {
    /// Names it among the connections of the device: its SOCKETS.
    pub id: u64,
    /// The agreed limits; `None` before VERSION.
    pub limits: Option<Limits>,
    pub by_control_door: bool,
    pub foreign_dma: bool,
    pub next_id: u16,
    /// It has a twin socket, with ids of its own.
    pub twin_next_id: Option<u16>,
}

/// Where bytes were received, which follow, and whose fds come with them.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Received {
    pub twin: bool,
    /// For each fd the offset of the last byte that it came with, and whether it was kept.
    pub fds: Vec<(u64, bool)>,
}

/// How a message was received. It follows, from its header on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message {
    pub fds_truncated: bool,
    pub fits: u8,
    pub writes_done: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    pub stopped: bool,
    pub resets: u64,
    pub precopy_reinit: bool,
    pub stays: Option<[u8; 16]>,
    /// When the old server takes back, by the monotonic clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ns: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LogHead {
    pub page_size: u64,
    pub everything: bool,
    pub ranges: Vec<(u64, u64)>,
}

/// The head of STATE. The bytes follow, or are in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct StateHead {
    /// Counts the copies of the device's state: a new number starts a new copy.
    pub copy: u32,
    pub reserved: u32,
    /// How many bytes.
    pub bytes: u64,
}

/// A mapping. Its file is one of FILES, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct MappingRow {
    pub iova: u64,
    pub size: u64,
    pub offset: u64,
    pub flags: u32,
    /// 0 a mapping, 1 file I/O, 2 messages.
    pub kind: u16,
    pub reserved: u16,
    pub file: u32,
    pub reserved2: u32,
}

pub(super) fn encode(kind: u16, device: u16, record: &impl Serialize) -> Result<Item, Refusal> {
    let bytes = serde_json::to_vec(record).map_err(|error| broken(kind, device, &error))?;
    Ok(Item::new(kind, device, bytes))
}

pub(super) fn decode<T: DeserializeOwned>(item: &Item) -> Result<T, Refusal> {
    serde_json::from_slice(&item.bytes).map_err(|error| broken(item.kind, item.device, &error))
}

/// A record, followed by raw bytes.
pub(super) fn encode_with(
    kind: u16,
    device: u16,
    record: &impl Serialize,
    bytes: &[&[u8]],
) -> Result<Item, Refusal> {
    let record = serde_json::to_vec(record).map_err(|error| broken(kind, device, &error))?;
    let mut whole = Vec::with_capacity(4 + record.len() + bytes.iter().map(|part| part.len()).sum::<usize>());
    whole.extend_from_slice(&(record.len() as u32).to_ne_bytes());
    whole.extend_from_slice(&record);
    bytes.iter().for_each(|part| whole.extend_from_slice(part));
    Ok(Item::new(kind, device, whole))
}

/// Decodes the output of [`encode_with`].
pub(super) fn decode_with<T: DeserializeOwned>(item: &Item) -> Result<(T, &[u8]), Refusal> {
    let short = || broken(item.kind, item.device, &"it ends within its record");
    let (bytes, rest) = item.bytes.split_first_chunk().ok_or_else(short)?;
    let (record, rest) = rest.split_at_checked(u32::from_ne_bytes(*bytes) as usize).ok_or_else(short)?;
    let record = serde_json::from_slice(record).map_err(|error| broken(item.kind, item.device, &error))?;
    Ok((record, rest))
}

pub(super) fn broken(kind: u16, device: u16, error: &dyn std::fmt::Display) -> Refusal {
    let what = "expected an item of a compatible server; use matching versions";
    Refusal::of_device(device, format!("a record of kind {kind} is not understood: {error}; {what}"))
}

pub(super) fn copy(fd: impl AsFd) -> Result<ForeignFd, Refusal> {
    let copied = rustix::io::fcntl_dupfd_cloexec(fd, 0);
    let failed = |error| Refusal::new(format!("a file descriptor cannot be duplicated: {error}"));
    copied.map(ForeignFd::new).map_err(failed)
}

/// The files behind mappings, each once.
#[derive(Debug, Default)]
pub(super) struct Files {
    known: Vec<Arc<OwnedFd>>,
    /// How many of them were handed over.
    given: usize,
}

impl Files {
    fn number(&mut self, fd: &Arc<OwnedFd>) -> u32 {
        let at = self.known.iter().position(|known| Arc::ptr_eq(known, fd)).unwrap_or_else(|| {
            self.known.push(Arc::clone(fd));
            self.known.len() - 1
        });
        at as u32
    }

    /// The mappings, and the files that were not handed over yet.
    pub(super) fn mappings(
        &mut self,
        device: u16,
        mappings: &[ExportedMapping],
    ) -> Result<Vec<Item>, Refusal> {
        let row = |mapping: &ExportedMapping| MappingRow {
            iova: mapping.iova,
            size: mapping.size,
            offset: mapping.offset,
            flags: mapping.flags.bits(),
            kind: match mapping.kind {
                MemoryKind::File => 0,
                MemoryKind::FileIo => 1,
                MemoryKind::Remote => 2,
            },
            reserved: 0,
            file: mapping.fd.as_ref().map_or(u32::MAX, |fd| self.number(fd)),
            reserved2: 0,
        };
        let rows: Vec<_> = mappings.iter().map(row).collect();
        let mut items = Vec::new();
        for files in self.known[self.given..].chunks(ITEM_FDS_MAX) {
            let fds = files.iter().map(copy).collect::<Result<Vec<_>, _>>()?;
            items.push(Item::new(kind::FILES, device, Vec::new()).with_fds(fds));
        }
        self.given = self.known.len();
        items.push(Item::new(kind::MAPPINGS, device, rows.as_bytes().to_vec()));
        Ok(items)
    }
}

pub(super) fn rows(item: &Item) -> Result<Vec<MappingRow>, Refusal> {
    let wrong = || broken(item.kind, item.device, &"incomplete rows");
    if !item.bytes.len().is_multiple_of(size_of::<MappingRow>()) {
        return Err(wrong());
    }
    let rows = item.bytes.chunks_exact(size_of::<MappingRow>());
    rows.map(|row| MappingRow::read_from_bytes(row).map_err(|_| wrong())).collect()
}

/// A row as a mapping with its file.
pub(super) fn mapping(
    device: u16,
    row: &MappingRow,
    files: &[Arc<OwnedFd>],
) -> Result<ExportedMapping, Refusal> {
    let wrong = |what: &str| broken(kind::MAPPINGS, device, &what);
    let kind = match row.kind {
        0 => MemoryKind::File,
        1 => MemoryKind::FileIo,
        2 => MemoryKind::Remote,
        _ => return Err(wrong("a mapping of an unknown kind")),
    };
    let fd = match kind {
        MemoryKind::Remote => None,
        _ => Some(
            files
                .get(row.file as usize)
                .cloned()
                .ok_or_else(|| wrong("a mapping of a file that did not come"))?,
        ),
    };
    let flags = DmaMapFlags::from_bits_retain(row.flags);
    Ok(ExportedMapping { iova: row.iova, size: row.size, flags, kind, fd, offset: row.offset })
}

pub(super) fn log(device: u16, log: &ExportedLog) -> Result<Vec<Item>, Refusal> {
    let ranges = log.ranges.iter().map(|range| (range.iova, range.length)).collect();
    let head = LogHead { page_size: log.page_size, everything: log.everything, ranges };
    let mut items = vec![encode(kind::LOG, device, &head)?];
    for dirty in &log.dirty {
        let mut bytes = [dirty.iova, dirty.pages].as_bytes().to_vec();
        bytes.extend_from_slice(dirty.words.as_bytes());
        items.push(Item::new(kind::DIRTY, device, bytes));
    }
    Ok(items)
}

pub(super) fn log_head(item: &Item) -> Result<ExportedLog, Refusal> {
    let LogHead { page_size, everything, ranges } = decode(item)?;
    let range = |(iova, length)| DmaLoggingRange { iova, length };
    Ok(ExportedLog {
        page_size,
        everything,
        ranges: ranges.into_iter().map(range).collect(),
        dirty: Vec::new(),
    })
}

pub(super) fn dirty(item: &Item) -> Result<DirtyWords, Refusal> {
    let mut words: Vec<u64> =
        item.bytes.chunks_exact(8).map(|word| u64::read_from_bytes(word).unwrap_or(0)).collect();
    if words.len() < 2 || !item.bytes.len().is_multiple_of(8) {
        return Err(broken(item.kind, item.device, &"incomplete words"));
    }
    let rest = words.split_off(2);
    Ok(DirtyWords { iova: words[0], pages: words[1], words: rest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_behind_a_record_come_as_they_are_and_an_item_that_ends_within_its_record_is_refused() {
        let how = Message { fds_truncated: true, fits: 2, writes_done: 3 };
        let item = encode_with(kind::QUEUED, 4, &how, &[b"head", &[0xff; 3]]).unwrap();
        let (back, bytes) = decode_with::<Message>(&item).unwrap();
        assert_eq!((back.fds_truncated, back.fits, back.writes_done), (true, 2, 3));
        assert_eq!(bytes, b"head\xff\xff\xff");
        for end in 0..item.bytes.len() - bytes.len() {
            let cut = Item::new(item.kind, item.device, item.bytes[..end].to_vec());
            let refused = decode_with::<Message>(&cut).unwrap_err();
            assert!(refused.to_string().contains("device 4"), "{refused}");
        }
        let huge = Item::new(item.kind, 4, u32::MAX.to_ne_bytes().to_vec());
        assert!(decode_with::<Message>(&huge).is_err());
    }
}
