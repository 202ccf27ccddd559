//! A device as transports and drivers really show it: without optional features, with a coarse log,
//! with an end where none should be.

use std::sync::Mutex;

use limosa_client::{Chunk, DataStream, Device, Error, FeatureReply, FeatureRequest, Result};
use limosa_device::Loopback;
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::DeviceInfo;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};
use limosa_testing::{forward_device, forward_stream};

/// What is odd about it.
#[derive(Clone, Debug, Default)]
pub struct Quirks {
    /// Features that it does not have.
    pub lacks: Vec<FeatureIndex>,
    /// Features that it refuses to be used with this errno, though PROBE finds them.
    pub refuses: Option<(FeatureIndex, Errno)>,
    /// It logs DMA in pages of this many bytes.
    pub log_page_bytes: Option<u64>,
    /// It says that it does, whatever it does.
    pub log_page_bytes_said: Option<u64>,
    /// START takes no more ranges than this.
    pub log_ranges_max: Option<usize>,
    /// Its streams know no pre-copy info.
    pub no_precopy_info: bool,
    /// Pre-copy ends with 0 bytes rather than with "nothing for now".
    pub end_in_precopy: bool,
    /// In STOP_COPY it says "nothing for now" before the end.
    pub nothing_in_stop_copy: bool,
    /// It claims to have read more than there was room for.
    pub reads_too_much: bool,
    /// No facts beyond the migration features.
    pub no_info: bool,
}

/// A device with quirks.
pub struct Odd {
    pub inner: Loopback,
    pub quirks: Mutex<Quirks>,
}

impl Odd {
    fn quirks(&self) -> Quirks {
        self.quirks.lock().unwrap().clone()
    }
    fn refuse<T>(&self, errno: Errno) -> Result<T> {
        Err(Error::Refused { device: self.name().into(), request: "a test".into(), errno, hint: "".into() })
    }
}

impl Device for Odd {
    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let quirks = self.quirks();
        if quirks.lacks.contains(&request.index) {
            return self.refuse(Errno::ENOTTY);
        }
        let is_probe = request.op.contains(FeatureOp::PROBE);
        if let Some((index, errno)) = quirks.refuses
            && index == request.index
            && !is_probe
        {
            return self.refuse(errno);
        }
        let starts = request.index == FeatureIndex::DMA_LOGGING_START && !is_probe;
        if starts {
            let ranges = u32::from_ne_bytes(request.payload[8..12].try_into().unwrap());
            if quirks.log_ranges_max.is_some_and(|most| ranges as usize > most) {
                return self.refuse(Errno::E2BIG);
            }
            if let Some(bytes) = quirks.log_page_bytes {
                request.payload[..8].copy_from_slice(&bytes.to_ne_bytes());
            }
        }
        let mut reply = self.inner.feature(request)?;
        if starts && let Some(bytes) = quirks.log_page_bytes_said {
            request.payload[..8].copy_from_slice(&bytes.to_ne_bytes());
        }
        reply.stream = reply.stream.map(|inner| Box::new(OddStream { inner, quirks }) as Box<dyn DataStream>);
        Ok(reply)
    }
    fn info(&self) -> Result<DeviceInfo> {
        if self.quirks().no_info { self.refuse(Errno::EINVAL) } else { self.inner.info() }
    }
    forward_device!(|this| this.inner; name, identity, reset, registers);
}

struct OddStream {
    inner: Box<dyn DataStream>,
    quirks: Quirks,
}

impl DataStream for OddStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        Ok(match self.inner.read(data)? {
            Chunk::NothingForNow if self.quirks.end_in_precopy => Chunk::End,
            Chunk::End if self.quirks.nothing_in_stop_copy => Chunk::NothingForNow,
            Chunk::Data(_) if self.quirks.reads_too_much => Chunk::Data(data.len() + 1),
            chunk => chunk,
        })
    }
    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        if self.quirks.no_precopy_info {
            let (device, request) = ("odd".into(), "pre-copy info".into());
            return Err(Error::Refused { device, request, errno: Errno::ENOTTY, hint: "".into() });
        }
        self.inner.precopy_info()
    }
    forward_stream!(|this| this.inner; write, transfer_bytes_max);
}
