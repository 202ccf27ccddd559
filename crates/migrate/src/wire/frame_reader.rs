//! The receiving half of a link: frames, checked.

use std::sync::Arc;
use std::time::Duration;

use super::{COMPRESSING, link_failed};
use crate::link::{Link, LinkError, Wait};
use crate::{Error, Result};
use limosa_stream::body::decode_abort;
use limosa_stream::buffer::{Buffer, Gauge};
use limosa_stream::{Compression, Damage, HEADER_BYTES, Header, Kind, Unpacker, unpack};

/// The receiving half of a link.
pub(crate) struct FrameReader<'a> {
    link: &'a dyn Link,
    silence_max: Duration,
    sequence: u32,
    /// The header that is being read; kept, so that a look can stop in its middle.
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    /// At least as long as the frame's payload.
    payload: Buffer,
    unpacker: Option<Unpacker>,
    /// What the next payload that is compressed goes into.
    unpacked: Buffer,
    /// The buffer of the other frames, while there is a device's data in the payload, and the other way round.
    other: Buffer,
    is_device: bool,
    buffers: Arc<Gauge>,
}

impl<'a> FrameReader<'a> {
    pub(crate) fn new(link: &'a dyn Link, silence_max: Duration) -> FrameReader<'a> {
        FrameReader {
            link,
            silence_max,
            sequence: 0,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            payload: Buffer::default(),
            unpacker: None,
            unpacked: Buffer::default(),
            other: Buffer::default(),
            is_device: false,
            buffers: Arc::default(),
        }
    }

    /// Payloads that are compressed are so in this way.
    pub(crate) fn decompress(&mut self, compression: Option<Compression>) -> Result<()> {
        let unpacker = compression.map(Unpacker::new).transpose();
        self.unpacker = unpacker.map_err(|error| Error::Os { doing: COMPRESSING, error })?;
        Ok(())
    }

    /// What it holds is counted there.
    pub(crate) fn count(&mut self, buffers: &Arc<Gauge>) {
        self.buffers = Arc::clone(buffers);
        for buffer in [&mut self.payload, &mut self.unpacked, &mut self.other] {
            *buffer = Buffer::new(buffers);
        }
    }

    /// Of a further link, whose first frame, a JOIN, has been taken.
    pub(crate) fn after_join(link: &'a dyn Link, silence_max: Duration) -> FrameReader<'a> {
        FrameReader { sequence: 1, ..FrameReader::new(link, silence_max) }
    }

    pub(crate) fn peer(&self) -> &str {
        self.link.peer()
    }

    fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    /// The next frame, whose payload is then in [`FrameReader::payload`]; `None` when none has begun within the wait. ABORT
    /// is [`Error::Aborted`].
    pub(crate) fn next(&mut self, doing: &'static str, wait: Wait<'_>) -> Result<Option<Header>> {
        while self.header_bytes < HEADER_BYTES {
            match self.link.read(&mut self.header[self.header_bytes..], wait) {
                Ok(bytes) => self.header_bytes += bytes,
                Err(LinkError::TimedOut) => return Ok(None),
                Err(error) => return Err(self.failed(error, doing)),
            }
        }
        let header = Header::decode(&self.header).map_err(|damage| self.damaged(damage))?;
        header.check_sequence(self.sequence).map_err(|damage| self.damaged(damage))?;
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = header.length as usize;
        // A device's data is taken away, in a buffer that should not be larger than it.
        let is_device = header.kind == Kind::DEVICE_DATA;
        if std::mem::replace(&mut self.is_device, is_device) != is_device {
            std::mem::swap(&mut self.payload, &mut self.other);
        }
        self.payload.grow(bytes);
        let mut wait = Wait::within(self.silence_max, wait.cancel);
        let mut filled = 0;
        while filled < bytes {
            match self.link.read(&mut self.payload[filled..bytes], wait) {
                Ok(bytes) => filled += bytes,
                Err(error) => return Err(self.failed(error, doing)),
            }
            // A link that shares a small bandwidth takes long for a frame, and is not silent.
            wait = Wait::within(self.silence_max, wait.cancel);
        }
        self.header_bytes = 0;
        let payload = &self.payload[..bytes];
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
            return Ok(Some(header));
        }
        Ok(Some(header))
    }

    /// The payload of the frame that came last.
    pub(crate) fn payload(&self, header: &Header) -> &[u8] {
        &self.payload[..header.length as usize]
    }

    /// Takes the payload of the frame that came last away, for another buffer; or a copy of it, so that what is taken
    /// away never holds much more than its bytes.
    pub(crate) fn take_payload(&mut self, header: &Header, instead: impl FnOnce() -> Buffer) -> Buffer {
        let bytes = header.length as usize;
        if self.payload.is_wide_for(bytes) {
            return Buffer::copy(&self.buffers, &self.payload[..bytes]);
        }
        let mut taken = std::mem::replace(&mut self.payload, instead());
        taken.truncate(bytes);
        taken
    }

    /// What is wrong with what came, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        Error::Stream { from: self.peer().into(), damage }
    }

    pub(crate) fn timed_out(&self, doing: &'static str, limit: Duration) -> Error {
        link_failed(self.link, LinkError::TimedOut, doing, limit)
    }

    pub(super) fn failed(&self, error: LinkError, doing: &'static str) -> Error {
        match error {
            LinkError::Closed if !self.has_peer() => {
                let what = if self.header_bytes > 0 { "a frame" } else { "its frames: the SUM is missing" };
                self.damaged(Damage::Truncated { what })
            }
            error => link_failed(self.link, error, doing, self.silence_max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::FrameWriter;
    use super::*;
    use crate::link::SocketLink;

    #[test]
    fn a_small_payload_takes_no_large_buffer_away() {
        let (near, far) = SocketLink::pair().unwrap();
        let silence_max = Duration::from_secs(10);
        let gauge = Arc::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let writer = FrameWriter::new(&near, silence_max);
                for at in 0..20 {
                    writer.send(Kind::MEMORY_DATA, 0, 0, &[1; 1 << 20], None).unwrap();
                    writer.send(Kind::DEVICE_DATA, 0, at * 3, b"few", None).unwrap();
                    writer.send(Kind::DEVICE_DATA, 0, at * 3, &[2; 300_000], None).unwrap();
                }
            });
            let mut reader = FrameReader::new(&far, silence_max);
            reader.count(&gauge);
            let mut taken = Vec::new();
            while taken.len() < 40 {
                let header = reader.next("reading", Wait::within(silence_max, None)).unwrap().unwrap();
                if header.kind == Kind::DEVICE_DATA {
                    let payload = reader.take_payload(&header, || Buffer::new(&gauge));
                    assert!(!payload.is_wide_for(header.length as usize), "{}", payload.capacity());
                    assert_eq!(payload.len(), header.length as usize);
                    taken.push(payload);
                }
            }
            let rollback = 20 * (3 + 300_000) + (1 << 20) + 300_000;
            assert!(gauge.most() <= rollback, "{} bytes for {rollback}", gauge.most());
        });
    }
}
