//! [`DeviceQueue`]: the data that a device of the destination has not loaded yet. Some is in order, some arrived ahead over
//! another link. Both together are at most the device's window, in buffers that are not much larger than the data.

use std::collections::{BTreeMap, VecDeque};

use limosa_protocol::State;

use crate::Result;
use crate::protocol::credit::{ReceiveWindow, SMALL_BYTES, WINDOW_BYTES_MAX};
use crate::protocol::state_limit::StateLimit;
use limosa_stream::buffer::Buffer;
use limosa_stream::{Damage, Header, Kind};

/// Consecutive pieces of a device's data are joined as long as they have at most this many bytes, since many small pieces
/// would take more memory than their bytes.
const JOINED_BYTES: usize = 64 << 10;
/// The most pieces of a device's data that may be ahead, unless its window has grown.
const PIECES_AHEAD_MAX: usize = 2 * WINDOW_BYTES_MAX as usize / SMALL_BYTES;

/// The data that a device has not loaded yet, and its command.
#[derive(Default)]
pub(super) struct DeviceQueue {
    pub(super) items: VecDeque<Item>,
    /// How many bytes wait in order or are being loaded.
    pub(super) queued: u64,
    /// The pieces that are ahead, by their position in the device's stream.
    pub(super) ahead: BTreeMap<u64, (Header, Buffer)>,
    pub(super) ahead_bytes: u64,
    pub(super) window: ReceiveWindow,
    /// How much data may come.
    pub(super) limit: StateLimit,
    /// Whether a worker is busy with the device, or was posted to be.
    pub(super) is_busy: bool,
    /// The next command, and the result of the last one.
    pub(super) command: Option<Command>,
    pub(super) done: Option<Result<()>>,
    /// The state in which the device was found, once it has been touched.
    pub(super) found: Option<State>,
    /// Whether it was asked to run, so that it may be running.
    pub(super) asked_to_run: bool,
}

/// A command for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Enter RESUMING. It was found in this state.
    Open(State),
    /// Enter a state.
    Enter(State),
    /// Check that it is in the state to which the engine has driven it, and was not reset.
    Check,
    /// Reset it, so that it never runs the state that it loaded.
    Reset,
    /// After a reset, go back to STOP, where it was found.
    ReturnToStop,
}

pub(super) enum Item {
    Data(Buffer),
    End,
}

/// The bytes of device data in a frame.
pub(super) fn data_bytes(header: &Header, payload: &[u8]) -> u64 {
    if header.kind == Kind::DEVICE_DATA { payload.len() as u64 } else { 0 }
}

impl DeviceQueue {
    /// How many bytes have arrived and are not loaded.
    pub(super) fn waiting(&self) -> u64 {
        self.queued + self.ahead_bytes
    }

    /// Keeps a piece that is ahead. A piece that overlaps with another is refused.
    pub(super) fn keep_ahead(&mut self, place: u64, header: Header, payload: Buffer) -> Result<(), Damage> {
        let misplaced = |why: String| Err(Damage::Misplaced { kind: header.kind, why });
        let bytes = data_bytes(&header, &payload);
        let end_of =
            |(at, (header, payload)): (&u64, &(Header, Buffer))| (*at, at + data_bytes(header, payload));
        let before = self.ahead.range(..=place).next_back().map(end_of);
        if before.is_some_and(|(at, end)| end > place || at == place) {
            return misplaced(format!("byte {place} has arrived already"));
        }
        self.check_ahead(place, &header)?;
        self.ahead_bytes += bytes;
        if let Some((at, end)) = before
            && end == place
            && let Some((first, kept)) = self.ahead.get_mut(&at)
            && bytes > 0
            && first.kind == Kind::DEVICE_DATA
            && kept.len() + payload.len() <= JOINED_BYTES
        {
            kept.extend(&payload);
            return Ok(());
        }
        let pieces_max = PIECES_AHEAD_MAX.max(2 * self.window.bytes() as usize / SMALL_BYTES);
        if self.ahead.len() >= pieces_max {
            return misplaced(format!("{pieces_max} pieces of the device's data are ahead already"));
        }
        self.ahead.insert(place, (header, payload));
        Ok(())
    }

    /// Refuses a piece that overlaps with one that is ahead. The window bounds memory only if no byte is kept twice.
    pub(super) fn check_ahead(&self, place: u64, header: &Header) -> Result<(), Damage> {
        let is_data = header.kind == Kind::DEVICE_DATA;
        match self.ahead.range(place..).next() {
            Some((at, _)) if is_data && *at < place.saturating_add(header.length.into()) => {
                let why = format!("byte {at} has arrived already");
                Err(Damage::Misplaced { kind: header.kind, why })
            }
            _ => Ok(()),
        }
    }

    /// Queues the next piece of the device's data, or its end.
    pub(super) fn hand_on(&mut self, header: &Header, payload: Buffer) {
        if header.kind == Kind::DEVICE_END {
            self.window.end_of_data();
            return self.items.push_back(Item::End);
        }
        self.queued += payload.len() as u64;
        match self.items.back_mut() {
            Some(Item::Data(last)) if last.len() + payload.len() <= JOINED_BYTES => last.extend(&payload),
            _ => self.items.push_back(Item::Data(payload)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn piece(place: u64, bytes: &[u8]) -> (Header, Buffer) {
        (Header::new(Kind::DEVICE_DATA, 0, place, 0, bytes), Buffer::copy(&Arc::default(), bytes))
    }

    fn keep(queue: &mut DeviceQueue, place: u64, bytes: &[u8]) -> Result<(), String> {
        let (header, payload) = piece(place, bytes);
        queue.keep_ahead(place, header, payload).map_err(|damage| damage.to_string())
    }

    #[test]
    fn what_is_for_the_same_byte_is_kept_once() {
        let mut queue = DeviceQueue::default();
        keep(&mut queue, 100, &[1; 50]).unwrap();
        for (place, bytes) in [(100, 1), (100, 50), (149, 1), (90, 11), (0, 500), (120, 5)] {
            let refused = keep(&mut queue, place, &vec![1; bytes]).unwrap_err();
            assert!(refused.contains("has arrived already"), "{place}: {refused}");
        }
        let (header, _) = piece(60, &[0; 41]);
        assert!(queue.check_ahead(60, &header).is_err(), "nor does what is due reach into it");
        keep(&mut queue, 90, &[1; 10]).unwrap();
        keep(&mut queue, 150, &[1; 1]).unwrap();
        assert_eq!((queue.ahead_bytes, queue.ahead.len()), (61, 2), "what follows another joins it");
        let end = Header::new(Kind::DEVICE_END, 0, 0, 0, &[0; 16]);
        queue.keep_ahead(151, end, Buffer::default()).unwrap();
        assert!(queue.keep_ahead(151, end, Buffer::default()).is_err());
        assert!(keep(&mut queue, 151, &[1; 1]).is_err(), "nothing comes after the end");
        assert_eq!(queue.waiting(), 61);
    }

    #[test]
    fn so_many_pieces_that_they_outweigh_their_bytes_are_refused() {
        let mut queue = DeviceQueue::default();
        for at in 0..PIECES_AHEAD_MAX as u64 {
            keep(&mut queue, 2 * at + 1, &[1]).unwrap();
        }
        let refused = keep(&mut queue, 2 * PIECES_AHEAD_MAX as u64 + 1, &[1]).unwrap_err();
        assert!(refused.contains("are ahead already"), "{refused}");
    }

    #[test]
    fn a_device_s_small_pieces_wait_in_few_buffers() {
        let gauge = Arc::default();
        let mut queue = DeviceQueue::default();
        for at in 0..40_000 {
            let header = Header::new(Kind::DEVICE_DATA, 0, at * 24, 0, &[7; 24]);
            queue.hand_on(&header, Buffer::copy(&gauge, &[7; 24]));
        }
        assert_eq!(queue.queued, 960_000);
        assert!(queue.items.len() <= 15, "{} buffers", queue.items.len());
        assert!(gauge.most() < 960_000 * 5 / 4 + 100_000, "{} bytes", gauge.most());
    }
}
