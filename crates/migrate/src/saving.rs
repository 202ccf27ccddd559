//! One device's saving session on its way to the link. It has its stream to itself, so that it could
//! run in a thread of its own.

use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_protocol::feature::PrecopyInfo;

use crate::channel::Channel;
use crate::devices::failed;
use crate::report::{Act, Recorder};
use crate::stream::body::{encode_device_end, encode_hint};
use crate::stream::{DATA_BYTES_MAX, DEVICE_BYTES_MAX, Kind};
use crate::{Error, Result};

/// A device's data, from its session to DEVICE_DATA frames.
pub(crate) struct Saving<'a> {
    device: &'a dyn Device,
    /// The device's place in the offer, which is its section.
    at: usize,
    stream: Option<Box<dyn DataStream>>,
    begun: bool,
    bytes: u64,
    crc: u32,
    info: Option<PrecopyInfo>,
    buffer: Vec<u8>,
}

impl<'a> Saving<'a> {
    pub(crate) fn new(at: usize, device: &'a dyn Device) -> Saving<'a> {
        Saving { device, at, stream: None, begun: false, bytes: 0, crc: 0, info: None, buffer: Vec::new() }
    }

    /// A session opened, or, with `None`, goes on.
    pub(crate) fn open(&mut self, stream: Option<Box<dyn DataStream>>) -> Result<()> {
        if let Some(stream) = stream {
            let bytes = stream.transfer_bytes_max().clamp(1, DATA_BYTES_MAX);
            self.buffer.resize(bytes, 0);
            self.stream = Some(stream);
        }
        match self.stream {
            Some(_) => Ok(()),
            None => Err(self.misbehaved("it opened a session and gave no data stream")),
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.stream.is_some()
    }

    /// Moves what the device has to say before the stop, about `bytes_max` at most.
    pub(crate) fn precopy(
        &mut self,
        bytes_max: u64,
        channel: &mut Channel<'_>,
        recorder: &Recorder<'_>,
    ) -> Result<u64> {
        let mut moved = 0;
        while moved < bytes_max {
            match self.chunk(Act::PrecopyData, channel, recorder)? {
                // An end before STOP_COPY is not the end; some devices say so for "nothing for now".
                Chunk::NothingForNow | Chunk::End => break,
                Chunk::Data(bytes) => moved += bytes as u64,
            }
        }
        Ok(moved)
    }

    /// Moves everything that is left, in STOP_COPY.
    pub(crate) fn drain(&mut self, channel: &mut Channel<'_>, recorder: &Recorder<'_>) -> Result<()> {
        loop {
            channel.check_cancel()?;
            match self.chunk(Act::FinalData, channel, recorder)? {
                Chunk::Data(_) => {}
                Chunk::NothingForNow => {
                    return Err(self
                        .misbehaved("in STOP_COPY it said \"nothing for now\" instead of data or the end"));
                }
                Chunk::End => break,
            }
        }
        self.begin(channel)?;
        channel.send(Kind::DEVICE_END, self.at as u32, 0, &encode_device_end(self.bytes, self.crc))?;
        Ok(())
    }

    /// Asks what is left of pre-copy, tells it to the other side, and remembers it. A device that does
    /// not know is not asked again.
    pub(crate) fn hint(&mut self, channel: &mut Channel<'_>) -> Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        match stream.precopy_info() {
            Ok(info) => {
                self.info = Some(info);
                self.begin(channel)?;
                channel.send(Kind::DEVICE_HINT, self.at as u32, 0, &encode_hint(&info))?;
                Ok(())
            }
            Err(error) if error.is_connection_lost() => {
                Err(failed(self.device, "asking for pre-copy info", error))
            }
            Err(_) => {
                self.info = None;
                Ok(())
            }
        }
    }

    /// What the device last said is left of pre-copy: initial bytes and dirty bytes.
    pub(crate) fn left(&self) -> (u64, u64) {
        self.info.map_or((0, 0), |info| (info.initial_bytes, info.dirty_bytes))
    }

    /// How many bytes the device would have to give if it were stopped now, as far as it says.
    pub(crate) fn bytes_if_stopped(&self) -> Result<u64> {
        let (initial, dirty) = self.left();
        let size = match self.device.mig_data_size() {
            Ok(size) => size.unwrap_or(0),
            Err(error) if error.is_connection_lost() => {
                return Err(failed(self.device, "asking for the size of its data", error));
            }
            Err(_) => 0,
        };
        Ok(size.max(initial.saturating_add(dirty)))
    }

    fn chunk(&mut self, act: Act, channel: &mut Channel<'_>, recorder: &Recorder<'_>) -> Result<Chunk> {
        let Some(stream) = &mut self.stream else { return Ok(Chunk::End) };
        let mut span = recorder.span(self.at, act);
        let chunk = stream.read(&mut self.buffer);
        let chunk = chunk.map_err(|error| failed(self.device, "reading its data", error))?;
        if let Chunk::Data(bytes) = chunk {
            if bytes == 0 || bytes > self.buffer.len() {
                let room = self.buffer.len();
                return Err(self.misbehaved(&format!("a read of up to {room} bytes gave {bytes}")));
            }
            if self.bytes + bytes as u64 > DEVICE_BYTES_MAX {
                return Err(self.misbehaved(&format!("its data has no end within {DEVICE_BYTES_MAX} bytes")));
            }
            span.bytes(bytes as u64);
            drop(span);
            self.begin(channel)?;
            let data = &self.buffer[..bytes];
            let header = channel.send(Kind::DEVICE_DATA, self.at as u32, self.bytes, data)?;
            self.crc = crc32c::crc32c_combine(self.crc, header.payload_crc, bytes);
            self.bytes += bytes as u64;
            recorder.device_data(self.at, bytes as u64);
        }
        Ok(chunk)
    }

    fn begin(&mut self, channel: &mut Channel<'_>) -> Result<()> {
        if !std::mem::replace(&mut self.begun, true) {
            channel.send(Kind::DEVICE_BEGIN, self.at as u32, 0, &[])?;
        }
        Ok(())
    }

    fn misbehaved(&self, what: &str) -> Error {
        Error::DeviceMisbehaved { device: self.device.name().into(), what: what.into() }
    }
}
