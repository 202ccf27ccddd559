//! What only a client that moves a device beside its VMM asks for (`docs/vfio-user-extensions.md: STAY, ECHO, KICK`).

use std::time::Instant;

use limosa_device::FeatureDone;
use limosa_protocol::feature::FeatureRules;
use limosa_protocol::{Errno, FeatureCall, FeatureOp, State};
use zerocopy::{FromBytes, IntoBytes};

use super::connection::Connection;
use super::dma::{ClientMemory, echo};
use super::doors::Role;
use crate::codec::Request;
use crate::extension::{self, Echo, Stay, StayFlags};

/// Words of a log that are looked at at once: 256 MiB of 4 KiB pages.
const PIECE_WORDS: usize = 1024;
/// The longest range of one ECHO, in pages.
const ECHO_PAGES_MAX: u64 = 1 << 31;

/// The PCI configuration space (`vfio.h: VFIO_PCI_CONFIG_REGION_INDEX`).
pub(super) const CONFIG_REGION: u32 = 7;

impl Connection<'_> {
    /// EPERM for what a control client may not: memory, interrupts and BARs are the VMM's. A reset it may ask for only to end a
    /// load of its own. EBUSY for what the next client may not yet.
    pub(super) fn check_role(&self, request: &Request<'_>) -> Result<(), Errno> {
        if self.is_next() {
            return self.check_next(request);
        }
        let may = match request {
            _ if self.role != Some(Role::Control) => true,
            Request::Version(..) | Request::GetInfo { .. } | Request::GetRegionInfo { .. } => true,
            Request::GetIrqInfo { .. } | Request::Feature(..) => true,
            Request::MigDataRead(..) | Request::MigDataWrite(..) => true,
            Request::RegionRead(access) => self.is_config(access.region),
            Request::Reset => {
                self.machine.is_driven_by(self.client)
                    && matches!(self.machine.state(), State::Resuming | State::Error)
            }
            _ => false,
        };
        if may { Ok(()) } else { Err(Errno::EPERM) }
    }

    /// Whether a region is the configuration space of a PCI function, which is answered in every state.
    pub(super) fn is_config(&self, region: u32) -> bool {
        use limosa_protocol::info::DeviceFlags;
        let flags = self.machine.description().flags.unwrap_or(DeviceFlags::empty());
        region == CONFIG_REGION && flags.contains(DeviceFlags::PCI)
    }

    pub(super) fn control_feature(
        &self,
        call: FeatureCall,
        payload: &mut [u8],
    ) -> Result<FeatureDone, Errno> {
        if self.machine.migration_flags().is_none() {
            return Err(Errno::ENOTTY);
        }
        let (name, get, payload_bytes) = match call.index {
            extension::STAY => ("STAY", true, size_of::<Stay>()),
            extension::ECHO => ("ECHO", false, size_of::<Echo>()),
            _ => ("KICK", false, 0),
        };
        if !call.check(&FeatureRules { name, get, set: true, payload_bytes })? {
            return Ok(FeatureDone::default());
        }
        let payload = payload.get_mut(..payload_bytes).ok_or(Errno::EINVAL)?;
        match call.index {
            extension::STAY if call.op == FeatureOp::GET => {
                let stays = self.machine.stays();
                let flags = if stays.is_some() { StayFlags::STAY } else { 0 };
                let answer = Stay { id: stays.unwrap_or_default(), flags, reserved: 0 };
                answer.write_to(payload).map_err(|_| Errno::EINVAL)?;
            }
            extension::STAY => {
                let asked = Stay::read_from_bytes(payload).map_err(|_| Errno::EINVAL)?;
                match asked.flags {
                    StayFlags::STAY => self.machine.stay(self.client, asked.id)?,
                    StayFlags::RELEASE => self.machine.release(self.client, asked.id)?,
                    _ => return Err(Errno::EINVAL),
                }
            }
            extension::ECHO => {
                self.stands_still()?;
                let mut asked = Echo::read_from_bytes(payload).map_err(|_| Errno::EINVAL)?;
                asked.pages = self.echo(&asked)?;
                asked.write_to(payload).map_err(|_| Errno::EINVAL)?;
            }
            _ => {
                self.stands_still()?;
                self.machine.wiring().raise_all();
            }
        }
        Ok(FeatureDone { payload_bytes, opened: None })
    }

    /// EBUSY unless this client drives the device, EINVAL unless it is in STOP or STOP_COPY.
    fn stands_still(&self) -> Result<(), Errno> {
        if !self.machine.is_driven_by(self.client) {
            return Err(Errno::EBUSY);
        }
        match self.machine.state() {
            State::Stop | State::StopCopy => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Writes one byte of each page in the device's log once more, with its own value, through the VMM, so that the page is in
    /// the VMM's log too. How many pages that were.
    fn echo(&self, asked: &Echo) -> Result<u64, Errno> {
        self.machine.may_read_log(self.client)?;
        let mappings = self.machine.mappings();
        mappings.logging_check(asked.iova, asked.length, asked.page_size)?;
        if !asked.page_size.is_power_of_two() || asked.length.div_ceil(asked.page_size) > ECHO_PAGES_MAX {
            return Err(Errno::EINVAL);
        }
        let vmm = self.doors.vmm().ok_or(Errno::ENOTCONN)?;
        let until = Instant::now() + self.options.message_limit;
        let memory = &self.machine.bus().memory;
        let (mut iova, mut left, mut pages) = (asked.iova, asked.length, Vec::new());
        let mut count = 0;
        while left > 0 {
            let bytes = left.min(asked.page_size.saturating_mul(PIECE_WORDS as u64 * 64));
            let mut words = vec![0; bytes.div_ceil(asked.page_size).div_ceil(64) as usize];
            mappings.logging_report(iova, bytes, asked.page_size, &mut words)?;
            for (at, word) in words.iter().enumerate() {
                let bits = (0..64).filter(|bit| word & (1 << bit) != 0);
                pages.extend(bits.map(|bit| iova + (at as u64 * 64 + bit) * asked.page_size));
            }
            (iova, left) = (iova.wrapping_add(bytes), left - bytes);
            count += pages.len() as u64;
            for chunk in std::mem::take(&mut pages).chunks(ClientMemory::ECHO_MAX) {
                echo(&vmm, memory, chunk, until)?;
            }
        }
        Ok(count)
    }
}
