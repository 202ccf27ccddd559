//! Transferring the state of a device: it is copied in rounds while the device runs, if it has PRE_COPY, and read
//! to its end once the device has stopped (`vfio.h: VFIO_DEVICE_STATE_PRE_COPY`).
//!
//! Clients have priority. If a client changes the device's state, the copy ends and the attempt fails. After a reset
//! the state is copied again, from its beginning.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use limosa_device::{Copying, Frozen, Machine, Save, SessionId};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_switch_over::{Item, Refusal};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use zerocopy::{FromBytes, IntoBytes};

use super::record::{StateHead, broken, kind};

/// Bytes that are read at once while the device runs, since accesses of clients may wait for them.
const RUNNING_BYTES: usize = 64 << 10;
/// Bytes that are read or loaded at once while the device is stopped.
const STOPPED_BYTES: usize = 1 << 20;
/// State up to this goes in the item itself.
const INLINE_BYTES_MAX: usize = 48 << 10;
/// Limit on the memory that is allocated in advance for the data of stopped devices.
const ROOM_BYTES_MAX: u64 = 64 << 20;
/// A round of all devices ends after this many bytes, which stay in memory until the new server has loaded them.
const ROUND_BYTES_MAX: u64 = 256 << 20;
/// Time limit for a round of all devices: less than the new server waits for one.
const ROUND_LIMIT: Duration = Duration::from_secs(2);
/// Amount of data that may be left for the freeze. Another round would cost more than it saves.
const LEFT_BYTES_SMALL: u64 = INLINE_BYTES_MAX as u64;
/// Copies of a device that is reset again and again; then its state is read once it has stopped.
const COPIES_MAX: u32 = 16;
/// All rounds together.
const ROUNDS_LIMIT: Duration = Duration::from_secs(60);

/// The copy of a device's state.
#[derive(Debug, Default)]
pub(super) struct Copy {
    copying: Option<Copying>,
    /// How many devices are copied at the same time: the limits of a round are shared among them.
    share: u32,
    /// How many copies were begun, this one included.
    number: u32,
    /// The last round.
    last: Round,
    rounds: u32,
    /// When the first began.
    since: Option<Instant>,
    /// Memory for the rest of the state, once the device has stopped.
    room: Option<File>,
    /// Where a piece is read.
    piece: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Round {
    bytes: u64,
    /// It ended at a limit, and not because the device had nothing more.
    is_cut: bool,
}

impl Round {
    /// Whether another round is useful with `left` bytes: the device changes less than a round hands over.
    fn pays(self, left: u64, rounds: u32) -> bool {
        self.is_cut || (left > LEFT_BYTES_SMALL && (rounds < 2 || left <= self.bytes / 2))
    }
}

fn busy(device: u16) -> Refusal {
    Refusal::of_device(device, "a client moves the device, or has its dirty log; try again when it is done")
}

fn unread(device: u16, what: &dyn std::fmt::Display) -> Refusal {
    Refusal::of_device(device, format!("its state cannot be read: {what}"))
}

/// A refusal to copy or stop a device.
pub(super) fn refused(device: u16, errno: Errno) -> Refusal {
    match errno {
        Errno::EBUSY => busy(device),
        errno => Refusal::of_device(device, format!("the device does not stop: {errno}")),
    }
}

impl Copy {
    /// The copy of one of this many devices.
    pub(super) fn new(devices: usize) -> Copy {
        Copy { share: u32::try_from(devices).unwrap_or(u32::MAX).max(1), ..Copy::default() }
    }

    /// Begins to copy the device, if that is possible while it runs. Returns the data read so far.
    pub(super) fn begin(&mut self, device: u16, machine: &Machine) -> Result<Option<Item>, Refusal> {
        self.number += 1;
        if self.number > COPIES_MAX {
            return Ok(None);
        }
        self.since.get_or_insert_with(Instant::now);
        self.copying = machine.begin_copy().map_err(|errno| refused(device, errno))?;
        self.rounds = 0;
        self.round(device, machine)
    }

    /// Another round; `None` when none pays.
    pub(super) fn more(&mut self, device: u16, machine: &Machine) -> Result<Option<Item>, Refusal> {
        let Some(copying) = self.copying else { return Ok(None) };
        if self.since.is_some_and(|since| since.elapsed() > ROUNDS_LIMIT) {
            return Ok(None);
        }
        let left = machine.copy_left(&copying);
        self.copying = self.copying.filter(|_| left.is_ok());
        match left {
            Ok(left) if self.last.pays(left, self.rounds) => self.round(device, machine),
            Ok(_) => Ok(None),
            // It was reset, or a client moves it.
            Err(_) => self.begin(device, machine),
        }
    }

    /// Reads a round of data while the device runs.
    fn round(&mut self, device: u16, machine: &Machine) -> Result<Option<Item>, Refusal> {
        let Some(copying) = self.copying else { return Ok(None) };
        let file = memory(device)?;
        let (began, mut bytes) = (Instant::now(), 0);
        let is_cut = loop {
            self.piece.clear();
            // Written to the file outside the read, to lock the device for a shorter time.
            let piece = &mut self.piece;
            let read = machine.data_read(copying.session(), RUNNING_BYTES, |save| match save {
                Save::Data(data) => piece.extend_from_slice(data),
                Save::NothingForNow | Save::End => {}
            });
            match read {
                Ok(()) if self.piece.is_empty() => break false,
                Ok(()) => {}
                // A reset or a client has ended the copy. The data is dropped.
                Err(Errno::ENODEV) => {
                    self.copying = None;
                    return self.begin(device, machine);
                }
                Err(errno) => return Err(unread(device, &errno)),
            }
            file.write_all_at(&self.piece, bytes).map_err(|error| unread(device, &error))?;
            bytes += self.piece.len() as u64;
            if bytes >= ROUND_BYTES_MAX / u64::from(self.share) || began.elapsed() > ROUND_LIMIT / self.share
            {
                break true;
            }
        };
        self.rounds += 1;
        self.last = Round { bytes, is_cut };
        tracing::debug!(device, bytes, round = self.rounds, "copied while the device runs");
        Ok((bytes > 0).then(|| self.in_file(device, bytes, file)))
    }

    /// Allocates memory for the rest, before the device is stopped.
    pub(super) fn make_room(&mut self, device: u16, machine: &Machine) -> Result<(), Refusal> {
        let bytes = machine.expected_state_bytes().min(ROOM_BYTES_MAX / u64::from(self.share));
        self.piece.clear();
        self.piece.reserve(INLINE_BYTES_MAX);
        if bytes > INLINE_BYTES_MAX as u64 {
            let room = memory(device)?;
            // Pages that are still missing are allocated when they are written, in the freeze.
            let _ = fallocate(&room, FallocateFlags::empty(), 0, bytes);
            self.room = Some(room);
        }
        Ok(())
    }

    /// Stops the device.
    pub(super) fn freeze(
        &mut self,
        device: u16,
        machine: &Machine,
        until: Instant,
    ) -> Result<Frozen, Refusal> {
        // After a failure it may still be copied, which ends with the attempt.
        let frozen = machine.freeze(self.copying, until).map_err(|errno| refused(device, errno))?;
        let copying = self.copying.take();
        if copying.is_none_or(|copying| copying.session() != frozen.session) {
            // The whole state, from its beginning.
            self.number += 1;
        }
        Ok(frozen)
    }

    /// The rest of the state of a stopped device.
    pub(super) fn rest(
        &mut self,
        device: u16,
        machine: &Machine,
        session: SessionId,
    ) -> Result<Item, Refusal> {
        let mut file: Option<(File, u64)> = None;
        self.piece.clear();
        loop {
            let (piece, room, file) = (&mut self.piece, &mut self.room, &mut file);
            let took = machine.data_read(session, STOPPED_BYTES, |save| match save {
                Save::Data(data) if file.is_none() && piece.len() + data.len() <= INLINE_BYTES_MAX => {
                    piece.extend_from_slice(data);
                    Ok(true)
                }
                Save::Data(data) => {
                    let (file, at) = match file {
                        Some(file) => file,
                        None => {
                            let made = room.take().map_or_else(|| memory(device), Ok)?;
                            made.write_all_at(piece, 0).map_err(|error| unread(device, &error))?;
                            file.insert((made, piece.len() as u64))
                        }
                    };
                    file.write_all_at(data, *at).map_err(|error| unread(device, &error))?;
                    *at += data.len() as u64;
                    Ok(true)
                }
                Save::NothingForNow | Save::End => Ok(false),
            });
            if !took.map_err(|errno| unread(device, &errno))?? {
                break;
            }
        }
        Ok(match file {
            Some((file, bytes)) => self.in_file(device, bytes, file),
            None => {
                let head = StateHead { copy: self.number, reserved: 0, bytes: self.piece.len() as u64 };
                let mut bytes = Vec::with_capacity(size_of::<StateHead>() + self.piece.len());
                bytes.extend_from_slice(head.as_bytes());
                bytes.extend_from_slice(&self.piece);
                Item::new(kind::STATE, device, bytes)
            }
        })
    }

    fn in_file(&self, device: u16, bytes: u64, file: File) -> Item {
        let head = StateHead { copy: self.number, reserved: 0, bytes };
        let item = Item::new(kind::STATE, device, head.as_bytes().to_vec());
        item.with_fds([ForeignFd::harmless(OwnedFd::from(file))])
    }

    /// Ends the copy, since the device is not replaced.
    pub(super) fn end(&mut self, machine: &Machine) {
        self.room = None;
        self.piece = Vec::new();
        if let Some(copying) = self.copying.take() {
            machine.end_copy(copying);
        }
    }
}

fn memory(device: u16) -> Result<File, Refusal> {
    let failed = |error| Refusal::of_device(device, format!("there is no file for its state: {error}"));
    memfd_create("limosa-state", MemfdFlags::CLOEXEC).map(File::from).map_err(failed)
}

/// Bytes of a device's state for the new device.
pub(super) struct Loading {
    /// The number of the copy that they belong to.
    pub(super) copy: u32,
    bytes: u64,
    source: Source,
}

enum Source {
    Inline(Vec<u8>),
    File(File),
}

impl Loading {
    /// The contents of a STATE item.
    pub(super) fn of(mut item: Item) -> Result<Loading, Refusal> {
        let wrong = |what: &str| broken(kind::STATE, item.device, &what);
        let (head, inline) =
            StateHead::read_from_prefix(&item.bytes).map_err(|_| wrong("it has an incomplete head"))?;
        let source = match item.fds.pop() {
            None if inline.len() as u64 == head.bytes => Source::Inline(inline.to_vec()),
            None => return Err(wrong("the number of bytes differs from its count")),
            Some(fd) => {
                let file = fd.into_memory().map_err(|_| wrong("a file that is not memory"))?;
                Source::File(File::from(file))
            }
        };
        Ok(Loading { copy: head.copy, bytes: head.bytes, source })
    }

    /// Loads them into a device in RESUMING.
    pub(super) fn load(self, machine: &Machine) -> Result<(), String> {
        let session = machine.session().ok_or("it has no session")?;
        let (mut at, mut spare) = (0, Vec::new());
        while at < self.bytes {
            let want = usize::try_from(self.bytes - at).unwrap_or(usize::MAX).min(STOPPED_BYTES);
            let filled = machine.data_fill(session, want, &mut spare, |into| match &self.source {
                Source::Inline(bytes) => {
                    into.copy_from_slice(&bytes[at as usize..][..into.len()]);
                    Ok(into.len())
                }
                Source::File(file) => file.read_exact_at(into, at).map(|()| into.len()),
            });
            at += filled.map_err(|error| error.to_string())?.map_err(|errno| errno.to_string())? as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_go_on_while_less_and_less_is_left_and_end_with_little_or_no_progress() {
        let round = |bytes, is_cut| Round { bytes, is_cut };
        let mib = 1 << 20;
        assert!(
            round(64 * mib, false).pays(60 * mib, 1),
            "the first round took as long as the new server needed to start"
        );
        assert!(round(60 * mib, false).pays(30 * mib, 2));
        assert!(!round(60 * mib, false).pays(31 * mib, 2));
        assert!(!round(60 * mib, false).pays(LEFT_BYTES_SMALL, 2));
        assert!(!round(60 * mib, false).pays(0, 1));
        assert!(
            round(ROUND_BYTES_MAX, true).pays(ROUND_BYTES_MAX, 9),
            "a round that was cut is no sign of anything"
        );
    }
}
