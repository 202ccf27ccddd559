//! The requests of control clients (`docs/vfio-user-extensions.md: STAY, ECHO, KICK`).

use std::time::Instant;

use limosa_device::FeatureDone;
use limosa_protocol::feature::FeatureRules;
use limosa_protocol::{Errno, FeatureCall, FeatureOp, State};
use zerocopy::{FromBytes, IntoBytes};

use super::dma::{ClientMemory, echo};
use super::peer::Peer;
use crate::extension::{self, Echo, Stay, StayFlags};

/// Words of a log that are read at once: 256 MiB of 4 KiB pages.
const PIECE_WORDS: usize = 1024;
/// The longest range of one ECHO, in pages.
const ECHO_PAGES_MAX: u64 = 1 << 31;

/// The reply to a request for STAY, ECHO or KICK.
pub(super) fn feature(peer: &Peer<'_>, call: FeatureCall, payload: &mut [u8]) -> Result<FeatureDone, Errno> {
    if peer.machine.migration_flags().is_none() {
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
            let stays = peer.machine.stays();
            let flags = if stays.is_some() { StayFlags::STAY } else { 0 };
            let answer = Stay { id: stays.unwrap_or_default(), flags, reserved: 0 };
            answer.write_to(payload).map_err(|_| Errno::EINVAL)?;
        }
        extension::STAY => {
            let asked = Stay::read_from_bytes(payload).map_err(|_| Errno::EINVAL)?;
            match asked.flags {
                StayFlags::STAY => peer.machine.stay(peer.client, asked.id)?,
                StayFlags::RELEASE => peer.machine.release(peer.client, asked.id)?,
                _ => return Err(Errno::EINVAL),
            }
        }
        extension::ECHO => {
            stands_still(peer)?;
            let mut asked = Echo::read_from_bytes(payload).map_err(|_| Errno::EINVAL)?;
            asked.pages = echo_dirty(peer, &asked)?;
            asked.write_to(payload).map_err(|_| Errno::EINVAL)?;
        }
        _ => {
            stands_still(peer)?;
            peer.machine.wiring().raise_all();
        }
    }
    Ok(FeatureDone { payload_bytes, opened: None })
}

/// EBUSY unless this client drives the device, EINVAL unless it is in STOP or STOP_COPY.
fn stands_still(peer: &Peer<'_>) -> Result<(), Errno> {
    if !peer.machine.is_driven_by(peer.client) {
        return Err(Errno::EBUSY);
    }
    match peer.machine.state() {
        State::Stop | State::StopCopy => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

/// Writes one byte of each page in the device's log again, with its current value, through the VMM, so that the
/// page is in the VMM's log too. Returns the number of pages.
fn echo_dirty(peer: &Peer<'_>, asked: &Echo) -> Result<u64, Errno> {
    peer.machine.may_read_log(peer.client)?;
    let mappings = peer.machine.mappings();
    mappings.logging_check(asked.iova, asked.length, asked.page_size)?;
    if !asked.page_size.is_power_of_two() || asked.length.div_ceil(asked.page_size) > ECHO_PAGES_MAX {
        return Err(Errno::EINVAL);
    }
    let vmm = peer.doors.vmm().ok_or(Errno::ENOTCONN)?;
    let until = Instant::now() + peer.options.message_limit;
    let memory = &peer.machine.bus().memory;
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
