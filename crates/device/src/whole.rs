//! [`Whole`]: migration for a device whose state is one small message, saved as one checked section when it has
//! stopped ([`crate::saved`]). Its author defines the message and how to restore it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use limosa_protocol::{Errno, MigrationFlags};
use prost::Message;

use crate::saved::{Reader, Section, Writer};
use crate::{Bus, Description, Fault, Save, SimpleMigration, SimpleModel};

/// A device whose state is one small message.
pub trait WholeState: SimpleModel {
    /// The state: tagged fields, whose numbers are never reused.
    type Saved: Message + Default;

    /// The kind of device, such as `limosa.counter`: 1 to 64 printable ASCII characters without a space.
    const KIND: &'static str;

    /// The message's section: its name and version.
    const SECTION: Section;

    /// To STOP: when this returns, the device changes neither itself nor anything outside.
    fn stop(&mut self) -> Result<(), Fault>;

    /// The same for a device that has to wait for requests in flight: if they cannot be completed by `until`,
    /// refuse with ETIMEDOUT; the device keeps running.
    fn stop_until(&mut self, until: Instant) -> Result<(), Fault> {
        let _ = until;
        self.stop()
    }

    /// From STOP to a running state.
    fn start(&mut self) -> Result<(), Fault>;

    /// The current state. Called when the device is stopped, and to estimate the size.
    fn to_saved(&self) -> Self::Saved;

    /// Restores a state that arrived complete and unaltered. A refusal leaves the device as it was.
    fn restore(&mut self, saved: Self::Saved) -> Result<(), Errno>;
}

/// A device with the migration of its [`WholeState`]: only STOP_COPY.
#[derive(Debug)]
pub struct Whole<D> {
    device: D,
    saving: Vec<u8>,
    saved_bytes: usize,
    loading: Option<Loading>,
}

#[derive(Debug)]
struct Loading {
    reader: Reader,
    message: Vec<u8>,
}

/// Header, section head and end together take less than this.
const FRAMING_BYTES_MAX: u64 = 1024;

impl<D: WholeState> Whole<D> {
    /// The device with its migration.
    pub fn new(device: D) -> Whole<D> {
        Whole { device, saving: Vec::new(), saved_bytes: 0, loading: None }
    }

    fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new(D::KIND);
        writer.message(&D::SECTION, &self.device.to_saved());
        writer.finish()
    }
}

impl<D: WholeState> SimpleModel for Whole<D> {
    fn description(&self) -> Description {
        self.device.description()
    }

    fn attach(&mut self, bus: Bus) {
        self.device.attach(bus);
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.device.region_read(region, offset, data)
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.device.region_write(region, offset, data)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.device.reset()
    }

    fn rewired(&mut self, index: u32) {
        self.device.rewired(index);
    }

    fn client_gone(&mut self) {
        self.device.client_gone();
    }

    fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        self.device.region_file(region)
    }

    fn adopts_region_files(&self) -> bool {
        self.device.adopts_region_files()
    }

    fn adopt_region_file(&mut self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        self.device.adopt_region_file(region, file)
    }

    fn adopts_ioeventfds(&self) -> bool {
        self.device.adopts_ioeventfds()
    }

    fn adopt_ioeventfds(&mut self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        self.device.adopt_ioeventfds(region, fds)
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

impl<D: WholeState> SimpleMigration for Whole<D> {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }

    fn stop(&mut self) -> Result<(), Fault> {
        self.device.stop()
    }

    fn stop_until(&mut self, until: Instant) -> Result<(), Fault> {
        self.device.stop_until(until)
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.device.start()
    }

    fn data_size(&self) -> u64 {
        self.encode().len() as u64
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        self.saving = self.encode();
        self.saved_bytes = 0;
        Ok(())
    }

    fn save(&mut self, bytes_max: usize, _stopped: bool) -> Result<Save<'_>, Errno> {
        let left = &self.saving[self.saved_bytes..];
        let chunk = &left[..left.len().min(bytes_max)];
        self.saved_bytes += chunk.len();
        Ok(if chunk.is_empty() { Save::End } else { Save::Data(chunk) })
    }

    fn save_end(&mut self) {
        self.saving = Vec::new();
        self.saved_bytes = 0;
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        let bytes_max = D::SECTION.bytes_max_of() + FRAMING_BYTES_MAX;
        let reader = Reader::new(D::KIND, &[D::SECTION], bytes_max);
        self.loading = Some(Loading { reader, message: Vec::new() });
        Ok(())
    }

    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        let Loading { reader, message } = self.loading.as_mut().ok_or(Errno::EINVAL)?;
        let taken = reader.push(chunk, |item| {
            message.extend_from_slice(item.bytes);
            Ok(())
        });
        taken.map_err(|refusal| refused(D::KIND, &refusal, refusal.errno()))
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        let Loading { reader, message } = self.loading.as_ref().ok_or(Fault::Refused(Errno::EINVAL))?;
        let refuse =
            |refusal: &dyn std::fmt::Display, errno| Fault::Refused(refused(D::KIND, refusal, errno));
        reader.finish().map_err(|refusal| refuse(&refusal, refusal.errno()))?;
        let saved = D::Saved::decode(message.as_slice()).map_err(|error| refuse(&error, Errno::EINVAL))?;
        self.device
            .restore(saved)
            .map_err(|errno| refuse(&"its contents are not valid for this device", errno))?;
        self.loading = None;
        Ok(())
    }

    fn load_abort(&mut self) {
        self.loading = None;
    }
}

fn refused(kind: &str, refusal: &dyn std::fmt::Display, errno: Errno) -> Errno {
    tracing::warn!(kind, "a state is refused: {refusal}");
    errno
}
