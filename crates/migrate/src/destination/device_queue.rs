//! What a device of the destination is still to be given: what is in order, and what came over another link before its
//! turn; of neither more than its window, in buffers and pieces that are not much more than their bytes.

use std::collections::{BTreeMap, VecDeque};

use limosa_protocol::State;

use crate::Result;
use crate::protocol::credit::{ReceiveWindow, SMALL_BYTES, WINDOW_BYTES_MAX};
use limosa_stream::buffer::Buffer;
use limosa_stream::{Damage, Header, Kind};

/// Pieces of a device's data in a row become one as long as it has no more bytes than this: a row of many small ones
/// would need more room than their bytes.
const JOINED_BYTES: usize = 64 << 10;
/// The most pieces of a device's data that wait for what belongs before them.
const PIECES_AHEAD_MAX: usize = 2 * WINDOW_BYTES_MAX as usize / SMALL_BYTES;

/// What a device is still to be given, and told to do.
#[derive(Default)]
pub(super) struct DeviceQueue {
    pub(super) items: VecDeque<Item>,
    /// Bytes of them that wait or are being loaded.
    pub(super) queued: u64,
    /// What came over other links before its turn, by its place in the device's stream.
    pub(super) ahead: BTreeMap<u64, (Header, Buffer)>,
    pub(super) ahead_bytes: u64,
    pub(super) window: ReceiveWindow,
    /// A worker is busy with the device, or about to be.
    pub(super) is_busy: bool,
    /// What it is to do once everything is loaded, and how that went.
    pub(super) command: Option<Command>,
    pub(super) done: Option<Result<()>>,
    /// The state in which the device was found, once it has been touched.
    pub(super) found: Option<State>,
    /// It was asked to run, and may.
    pub(super) asked_to_run: bool,
}

/// What a device is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Enter RESUMING; it was found in this state.
    Open(State),
    /// Enter a state.
    Enter(State),
    /// Be reset, so that it never runs what it was given.
    Reset,
    /// Be reset, and go back to where it was found.
    Discard,
}

pub(super) enum Item {
    Data(Buffer),
    End,
}

/// How much of a device's data a frame has.
pub(super) fn data_bytes(header: &Header, payload: &[u8]) -> u64 {
    if header.kind == Kind::DEVICE_DATA { payload.len() as u64 } else { 0 }
}

impl DeviceQueue {
    /// Bytes that have come and are not loaded.
    pub(super) fn waiting(&self) -> u64 {
        self.queued + self.ahead_bytes
    }

    /// Keeps what has come before its turn. What overlaps with something that is kept is refused.
    pub(super) fn keep_ahead(&mut self, place: u64, header: Header, payload: Buffer) -> Result<(), Damage> {
        let misplaced = |why: String| Err(Damage::Misplaced { kind: header.kind, why });
        let bytes = data_bytes(&header, &payload);
        let end_of =
            |(at, (header, payload)): (&u64, &(Header, Buffer))| (*at, at + data_bytes(header, payload));
        let before = self.ahead.range(..=place).next_back().map(end_of);
        if before.is_some_and(|(at, end)| end > place || at == place) {
            return misplaced(format!("what is for byte {place} has come before"));
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
        if self.ahead.len() >= PIECES_AHEAD_MAX {
            return misplaced(format!(
                "{PIECES_AHEAD_MAX} pieces of the device's data wait for what is before them"
            ));
        }
        self.ahead.insert(place, (header, payload));
        Ok(())
    }

    /// Refuses what overlaps with what has come for later: the window bounds bytes that are there once.
    pub(super) fn check_ahead(&self, place: u64, header: &Header) -> Result<(), Damage> {
        let is_data = header.kind == Kind::DEVICE_DATA;
        match self.ahead.range(place..).next() {
            Some((at, _)) if is_data && *at < place.saturating_add(header.length.into()) => {
                let why = format!("what is for byte {at} has come before");
                Err(Damage::Misplaced { kind: header.kind, why })
            }
            _ => Ok(()),
        }
    }

    /// The next of a device's data, or its end.
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
            assert!(refused.contains("has come before"), "{place}: {refused}");
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
        assert!(refused.contains("wait for what is before them"), "{refused}");
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
