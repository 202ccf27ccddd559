//! [`FrameReader`]: the receiving half of a link, which checks frames.

use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_clockwork::now;
use limosa_stream::body::decode_abort;
use limosa_stream::buffer::{Buffer, Gauge};
use limosa_stream::{
    Compression, Damage, HEADER_BYTES, Header, Kind, PREFACE_BYTES, Preface, Unpacker, unpack,
};

use super::in_place::{FindTarget, InPlace, MemoryTarget, NotReceived};
use super::{COMPRESSING, link_failed};
use crate::link::{Link, LinkError, TlsError, Wait};
use crate::{Cancel, Error, Result};

/// Behind a payload of this length or more, the next header is read in the same call. Shorter ones belong to frames behind which
/// nothing may come for long.
const AHEAD_BYTES_MIN: usize = 4 << 10;
/// With this number of bytes, TLS can be told from anything else that is not a stream.
const TELLING_BYTES: usize = 3;

/// The receiving half of a link. A wait that ends early, at a deadline or by a cancel, loses nothing: the next call
/// goes on in the middle of the frame.
pub(crate) struct FrameReader {
    peer: String,
    has_peer: bool,
    silence_max: Duration,
    sequence: u32,
    /// The header of the frame, or while its payload is being read, that of the next one.
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    /// The header, once it is complete and checked, while its payload is being read.
    reading: Option<Header>,
    payload_bytes: usize,
    /// The payload of the frame, while it is being received into guest memory and not into `payload`.
    in_place: Option<InPlace>,
    /// Whether the payload of the last frame is not in `payload`.
    was_in_place: bool,
    /// Whether payloads of memory may have no checksum.
    takes_unchecked: bool,
    /// At least as long as the frame's payload.
    payload: Buffer,
    unpacker: Option<Unpacker>,
    /// The buffer for the next payload that is decompressed.
    unpacked: Buffer,
    /// How many bytes of frames may still come, where that is limited.
    room: Option<usize>,
    /// While `payload` has the data of a device, the buffer for other frames, and the other way round.
    other: Buffer,
    is_device: bool,
    buffers: Arc<Gauge>,
}

impl FrameReader {
    /// The receiving half of this link. The link is passed to every read again.
    pub(crate) fn new(link: &dyn Link, silence_max: Duration) -> FrameReader {
        FrameReader {
            peer: link.peer().into(),
            has_peer: link.has_peer(),
            silence_max,
            sequence: 0,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            reading: None,
            payload_bytes: 0,
            in_place: None,
            was_in_place: false,
            takes_unchecked: false,
            payload: Buffer::default(),
            unpacker: None,
            unpacked: Buffer::default(),
            room: None,
            other: Buffer::default(),
            is_device: false,
            buffers: Arc::default(),
        }
    }

    /// Limits the bytes of frames before and with an OFFER, a QUERY or a JOIN; `None` is no limit.
    pub(crate) fn limit_opening(&mut self, bytes: Option<usize>) {
        self.room = bytes;
    }

    /// Sets the compression of compressed payloads.
    pub(crate) fn decompress(&mut self, compression: Option<Compression>) -> Result<()> {
        let unpacker = compression.map(Unpacker::new).transpose();
        self.unpacker = unpacker.map_err(|error| Error::Os { doing: COMPRESSING, error })?;
        Ok(())
    }

    /// Whether payloads of memory may have no checksum from now on.
    pub(crate) fn take_unchecked(&mut self, takes: bool) {
        self.takes_unchecked = takes;
    }

    /// From now on the peer's silence on this link has no limit.
    pub(crate) fn allow_silence(&mut self) {
        self.silence_max = Duration::MAX;
    }

    /// From now on this gauge counts its buffers.
    pub(crate) fn count(&mut self, buffers: &Arc<Gauge>) {
        self.buffers = Arc::clone(buffers);
        for buffer in [&mut self.payload, &mut self.unpacked, &mut self.other] {
            *buffer = Buffer::new(buffers);
        }
    }

    /// Reads the other side's preface, which comes before all frames.
    pub(crate) fn preface(&mut self, link: &dyn Link, cancel: Option<&Cancel>) -> Result<Preface> {
        let bytes = self.preface_bytes(link, within(self.silence_max), cancel)?;
        Preface::decode(&bytes).map_err(|damage| self.damaged(damage))
    }

    /// Reads the bytes of a preface, and no more. Unlike a frame, they have to be complete within the limit, since the client
    /// has not shown yet that it is a peer.
    pub(crate) fn preface_bytes(
        &mut self,
        link: &dyn Link,
        within: Option<(Instant, Duration)>,
        cancel: Option<&Cancel>,
    ) -> Result<[u8; PREFACE_BYTES]> {
        let doing = "waiting for the preface";
        let mut bytes = [0; PREFACE_BYTES];
        let (wait, limit) = self.wait(within, cancel);
        let mut filled = 0;
        while filled < bytes.len() {
            filled += match link.read(&mut bytes[filled..], wait) {
                Err(LinkError::Closed) if !self.has_peer => {
                    return Err(self.damaged(Damage::Truncated { what: "its preface" }));
                }
                Err(LinkError::TimedOut) => return Err(self.timed_out(doing, limit)),
                read => read.map_err(|error| self.failed(error, doing))?,
            };
            // Three bytes are enough to tell, and a TLS alert has only seven.
            if crate::link::is_tls(&bytes[..filled]) {
                return Err(self.failed(TlsError::TlsPeer.into(), doing));
            }
            if filled >= TELLING_BYTES && !Preface::may_begin(&bytes[..filled]) {
                return Err(self.damaged(Damage::NotAStream));
            }
        }
        Ok(bytes)
    }

    /// The wait for the next bytes, and its limit: the peer's silence, or the limit that nothing renews if that is earlier.
    fn wait<'c>(
        &self,
        within: Option<(Instant, Duration)>,
        cancel: Option<&'c Cancel>,
    ) -> (Wait<'c>, Duration) {
        let silence = Wait::within(self.silence_max, cancel);
        match within.filter(|(until, _)| *until < silence.deadline) {
            Some((deadline, limit)) => (Wait { deadline, cancel }, limit),
            None => (silence, self.silence_max),
        }
    }

    /// The next frame. Its payload is then in [`FrameReader::payload`]. Every byte renews the limit for silence; `within` is
    /// a limit that nothing renews. ABORT is returned as [`Error::Aborted`].
    pub(crate) fn next(
        &mut self,
        link: &dyn Link,
        doing: &'static str,
        within: Option<(Instant, Duration)>,
        cancel: Option<&Cancel>,
    ) -> Result<Header> {
        self.next_in_place(link, doing, within, cancel, &|_| Ok(None))
    }

    /// The same, with a payload of pages that has no checksum in guest memory if `find` finds some for it: [`FrameReader::was_in_place`]
    /// is then true.
    pub(crate) fn next_in_place(
        &mut self,
        link: &dyn Link,
        doing: &'static str,
        within: Option<(Instant, Duration)>,
        cancel: Option<&Cancel>,
        find: FindTarget<'_>,
    ) -> Result<Header> {
        loop {
            let (wait, limit) = self.wait(within, cancel);
            if self.in_place.is_some() {
                match self.read_in_place(link, wait) {
                    Ok(Some(header)) => return Ok(header),
                    Ok(None) => continue,
                    Err(NotReceived::Link(LinkError::TimedOut)) => return Err(self.timed_out(doing, limit)),
                    Err(NotReceived::Link(error)) => return Err(self.failed(error, doing)),
                    Err(NotReceived::Other(error)) => return Err(error),
                }
            }
            let payload = match &self.reading {
                None => &mut [],
                Some(header) => &mut self.payload[self.payload_bytes..header.length as usize],
            };
            let payload_bytes = payload.len();
            // Behind a long payload, the header of the next frame comes in the same call.
            let takes_header = self.reading.is_none_or(|header| header.length as usize >= AHEAD_BYTES_MIN);
            let header = if takes_header { &mut self.header[self.header_bytes..] } else { &mut [] };
            if payload_bytes > 0 || self.reading.is_none() && !header.is_empty() {
                match link.read_parts(&mut [IoSliceMut::new(payload), IoSliceMut::new(header)], wait) {
                    Ok(bytes) => {
                        let of_payload = bytes.min(payload_bytes);
                        self.payload_bytes += of_payload;
                        self.header_bytes += bytes - of_payload;
                    }
                    Err(LinkError::TimedOut) => return Err(self.timed_out(doing, limit)),
                    Err(error) => return Err(self.failed(error, doing)),
                }
            }
            if self.reading.is_none() && self.header_bytes == HEADER_BYTES {
                self.begin(find)?;
                if self.in_place.is_some() {
                    continue;
                }
            }
            if let Some(header) = self.reading
                && self.payload_bytes == header.length as usize
            {
                self.reading = None;
                return self.end(header);
            }
        }
    }

    /// Reads once into guest memory. Returns the header once all of the payload is there.
    fn read_in_place(&mut self, link: &dyn Link, wait: Wait<'_>) -> Result<Option<Header>, NotReceived> {
        let (Some(in_place), Some(header)) = (&self.in_place, self.reading) else { return Ok(None) };
        let behind = &mut self.header[self.header_bytes..];
        let bytes = in_place.read(link, self.payload_bytes, behind, wait)?;
        let of_payload = bytes.min(header.length as usize - self.payload_bytes);
        self.payload_bytes += of_payload;
        self.header_bytes += bytes - of_payload;
        if self.payload_bytes < header.length as usize {
            return Ok(None);
        }
        in_place.check()?;
        (self.reading, self.in_place, self.was_in_place) = (None, None, true);
        Ok(Some(header))
    }

    /// The header is complete: checks it, and makes room for the payload.
    fn begin(&mut self, find: FindTarget<'_>) -> Result<()> {
        let header = Header::decode(&self.header).map_err(|damage| self.damaged(damage))?;
        header.check_sequence(self.sequence).map_err(|damage| self.damaged(damage))?;
        header.check_is_checked(self.takes_unchecked).map_err(|damage| self.damaged(damage))?;
        self.sequence = self.sequence.wrapping_add(1);
        if let Some(room) = self.room {
            let left = room.checked_sub(HEADER_BYTES + header.length as usize);
            self.room = Some(left.ok_or_else(|| {
                let why = "an OFFER is due by now".into();
                self.damaged(Damage::Misplaced { kind: header.kind, why })
            })?);
        }
        self.was_in_place = false;
        if header.kind == Kind::MEMORY_DATA && header.unchecked {
            let is_whole = |target: &MemoryTarget| target.memory.len() == header.length as usize;
            self.in_place = find(&header)?.filter(is_whole).map(InPlace::new);
            if self.in_place.is_some() {
                (self.reading, self.payload_bytes, self.header_bytes) = (Some(header), 0, 0);
                return Ok(());
            }
        }
        // The caller takes device data away with its buffer, which should not be much larger than the data.
        let is_device = header.kind == Kind::DEVICE_DATA;
        if std::mem::replace(&mut self.is_device, is_device) != is_device {
            std::mem::swap(&mut self.payload, &mut self.other);
        }
        self.payload.grow(header.length as usize);
        (self.reading, self.payload_bytes, self.header_bytes) = (Some(header), 0, 0);
        Ok(())
    }

    /// The payload is complete: checks it, and decompresses it.
    fn end(&mut self, header: Header) -> Result<Header> {
        let payload = &self.payload[..header.length as usize];
        header.check_payload(payload).map_err(|damage| self.damaged(damage))?;
        if header.kind == Kind::ABORT {
            let (code, reason) = decode_abort(payload);
            return Err(Error::Aborted { peer: self.peer().into(), code, reason });
        }
        if header.compressed {
            let unpacker = self.unpacker.as_mut();
            let unpacked = self.unpacked.change(|raw| unpack(unpacker, &header, payload, raw));
            let header = unpacked.map_err(|damage| self.damaged(damage))?;
            std::mem::swap(&mut self.payload, &mut self.unpacked);
            return Ok(header);
        }
        Ok(header)
    }

    /// Whether the payload of the last frame is in guest memory.
    pub(crate) fn was_in_place(&self) -> bool {
        self.was_in_place
    }

    /// The payload of the last frame; nothing, if it is in guest memory.
    pub(crate) fn payload(&self, header: &Header) -> &[u8] {
        if self.was_in_place { &[] } else { &self.payload[..header.length as usize] }
    }

    /// Takes the payload of the last frame away and puts another buffer in its place. If the buffer is much larger than the
    /// payload, returns a copy instead.
    pub(crate) fn take_payload(&mut self, header: &Header, instead: impl FnOnce() -> Buffer) -> Buffer {
        let bytes = header.length as usize;
        if self.payload.is_wide_for(bytes) {
            return Buffer::copy(&self.buffers, &self.payload[..bytes]);
        }
        let mut taken = std::mem::replace(&mut self.payload, instead());
        taken.truncate(bytes);
        taken
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    /// Damage, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        Error::Stream { from: self.peer().into(), damage }
    }

    fn timed_out(&self, doing: &'static str, limit: Duration) -> Error {
        link_failed(&self.peer, LinkError::TimedOut, doing, limit)
    }

    fn failed(&self, error: LinkError, doing: &'static str) -> Error {
        match error {
            LinkError::Closed if !self.has_peer => {
                let what = if self.header_bytes > 0 || self.reading.is_some() {
                    "a frame"
                } else {
                    "its frames: the SUM is missing"
                };
                self.damaged(Damage::Truncated { what })
            }
            error => link_failed(&self.peer, error, doing, self.silence_max),
        }
    }
}

/// The deadline and length of a limit that begins now, for [`FrameReader::next`].
pub(crate) fn within(limit: Duration) -> Option<(Instant, Duration)> {
    Some((now().checked_add(limit)?, limit))
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use super::super::{Frame, FrameWriter};
    use super::*;
    use crate::link::SocketLink;

    const SILENCE_MAX: Duration = Duration::from_secs(10);

    #[test]
    fn a_small_payload_takes_no_large_buffer_away() {
        let (near, far) = SocketLink::pair().unwrap();
        let gauge = Arc::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let writer = FrameWriter::new(&near, SILENCE_MAX);
                let data = |payload| Frame::of(0, Kind::DEVICE_DATA, payload);
                for at in 0..20 {
                    writer.send(&Frame::of(0, Kind::MEMORY_DATA, &[1; 1 << 20]), None).unwrap();
                    writer.send(&data(b"few").at(at * 3), None).unwrap();
                    writer.send(&data(&[2; 300_000]).at(at * 3), None).unwrap();
                }
            });
            let mut reader = FrameReader::new(&far, SILENCE_MAX);
            reader.count(&gauge);
            let mut taken = Vec::new();
            while taken.len() < 40 {
                let header = reader.next(&far, "reading", None, None).unwrap();
                if header.kind == Kind::DEVICE_DATA {
                    let payload = reader.take_payload(&header, || Buffer::new(&gauge));
                    assert!(!payload.is_wide_for(header.length as usize), "{}", payload.capacity());
                    assert_eq!(payload.len(), header.length as usize);
                    taken.push(payload);
                }
            }
            let held = 20 * (3 + 300_000) + (1 << 20) + 300_000;
            assert!(gauge.most() <= held, "{} bytes for {held}", gauge.most());
        });
    }

    #[test]
    fn frames_are_the_same_however_their_bytes_come() {
        let payloads: Vec<Vec<u8>> = [8, AHEAD_BYTES_MIN, 1 << 20, 3, 70_000, AHEAD_BYTES_MIN - 1, 70_001, 1]
            .map(|bytes| vec![bytes as u8; bytes])
            .into();
        let frames = payloads.iter().zip(0..).flat_map(|(payload, sequence)| {
            let header = Header::new(Kind::DEVICE_DATA, 3, 0, sequence, payload);
            [&header.encode()[..], payload].concat()
        });
        let bytes: Vec<u8> = frames.collect();
        for piece in [1 << 20, 70_000, 4096, 999] {
            let (near, far) = SocketLink::pair().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for mut part in bytes.chunks(piece) {
                        while !part.is_empty() {
                            let sent =
                                near.write(&[IoSlice::new(part)], Wait::within(SILENCE_MAX, None)).unwrap();
                            part = &part[sent..];
                        }
                    }
                    near.finish();
                });
                let mut reader = FrameReader::new(&far, SILENCE_MAX);
                for payload in &payloads {
                    let header = reader.next(&far, "reading", None, None).unwrap();
                    assert!(reader.payload(&header) == payload, "{} bytes", payload.len());
                }
                assert!(reader.next(&far, "reading", None, None).is_err(), "nothing is left");
            });
        }
    }

    #[test]
    fn a_cancel_in_the_middle_of_a_frame_loses_nothing_of_it() {
        let (near, far) = SocketLink::pair().unwrap();
        let payload = vec![7; 1000];
        let frame = [&Header::new(Kind::MEMORY_DATA, 3, 0, 0, &payload).encode()[..], &payload].concat();
        let mut reader = FrameReader::new(&far, SILENCE_MAX);
        let past = Some((now(), Duration::ZERO));
        for part in frame.chunks(100) {
            assert!(matches!(reader.next(&far, "reading", past, None), Err(Error::TimedOut { .. })));
            near.write(&[IoSlice::new(part)], Wait::within(SILENCE_MAX, None)).unwrap();
        }
        let header = reader.next(&far, "reading", None, None).unwrap();
        assert_eq!((header.section, reader.payload(&header)), (3, &payload[..]));
    }

    #[test]
    fn a_slow_link_is_not_a_silent_one() {
        let (near, far) = SocketLink::pair().unwrap();
        let silence_max = Duration::from_millis(400);
        let payload = vec![7; 1000];
        let frame = [&Header::new(Kind::MEMORY_DATA, 3, 0, 0, &payload).encode()[..], &payload].concat();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let began = Instant::now();
                for (at, part) in frame.chunks(80).enumerate() {
                    near.write(&[IoSlice::new(part)], Wait::within(SILENCE_MAX, None)).unwrap();
                    // In all, three times as long as the peer may be silent.
                    let due = began + silence_max / 4 * (at as u32 + 1);
                    limosa_clockwork::sleep(due.saturating_duration_since(Instant::now()));
                }
            });
            let mut reader = FrameReader::new(&far, silence_max);
            let header = reader.next(&far, "reading", None, None).unwrap();
            assert_eq!(reader.payload(&header), payload);
            assert!(matches!(reader.next(&far, "reading", None, None), Err(Error::TimedOut { .. })));
        });
    }
}
