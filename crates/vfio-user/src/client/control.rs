//! What a control client asks for beside the standard (`docs/vfio-user-extensions.md: STAY, ECHO, KICK`), and what the errors
//! mean that only its role brings.

use limosa_client::{Device, FeatureRequest, Refers, Result};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};
use zerocopy::IntoBytes;

use super::Client;
use crate::extension::{self, Echo, Stay, StayFlags};

impl Client {
    /// Has the device stay as it is, in STOP or STOP_COPY, until the move with this id is decided ([`Client::release`]): no
    /// client, no client's end and no reset leads it to RUNNING. EBUSY unless this client drives the device, EINVAL in another
    /// state, EEXIST when it stays for another move, ENOTTY where the server has no such feature.
    pub fn stay(&self, id: [u8; 16]) -> Result<()> {
        let mut stay = Stay { id, flags: StayFlags::STAY, reserved: 0 };
        self.control(extension::STAY, FeatureOp::SET, stay.as_mut_bytes())
    }

    /// The move with this id is decided for this side: the device may run, and this client drives it. ENOENT unless it stays
    /// for this move.
    pub fn release(&self, id: [u8; 16]) -> Result<()> {
        let mut stay = Stay { id, flags: StayFlags::RELEASE, reserved: 0 };
        self.control(extension::STAY, FeatureOp::SET, stay.as_mut_bytes())
    }

    /// The move that the device stays for.
    pub fn stays(&self) -> Result<Option<[u8; 16]>> {
        let mut stay = Stay::default();
        self.control(extension::STAY, FeatureOp::GET, stay.as_mut_bytes())?;
        Ok((stay.flags & StayFlags::STAY != 0).then_some(stay.id))
    }

    /// Marks the pages that are in the device's log, which this client has started, in the VMM's log too; how many those were.
    /// `iova` and `length` in bytes, `page_size` as in the log. The log is cleared. EBUSY unless this client drives the device,
    /// EINVAL outside STOP and STOP_COPY, ENOTCONN without a VMM.
    pub fn echo(&self, iova: u64, length: u64, page_size: u64) -> Result<u64> {
        let mut echo = Echo { iova, length, page_size, pages: 0 };
        self.control(extension::ECHO, FeatureOp::SET, echo.as_mut_bytes())?;
        Ok(echo.pages)
    }

    /// Fires every interrupt vector that the VMM has wired, once. Refused as [`Client::echo`] is.
    pub fn kick(&self) -> Result<()> {
        self.control(extension::KICK, FeatureOp::SET, &mut [])
    }

    fn control(&self, index: FeatureIndex, op: FeatureOp, payload: &mut [u8]) -> Result<()> {
        let want = payload.len();
        let mut request = FeatureRequest { index, op, payload, refers: Refers::Nothing };
        match self.feature(&mut request)?.payload_bytes {
            bytes if bytes < want => Err(self.shared.short("a feature of control", bytes, want)),
            _ => Ok(()),
        }
    }
}

/// What a refusal means to a control client; empty where the errno says it all.
pub(super) fn hint(request: &str, errno: Errno) -> &'static str {
    match errno {
        Errno::EBUSY if request.contains("MIG_DEVICE_STATE") => {
            "another client drives the device: its VMM, or another move; or it was given away with a move, which only that \
             move's decision ends"
        }
        Errno::EBUSY if request.contains("STAY") => TAKEN_BACK,
        Errno::ENODEV if request.contains("MIG_DATA") => TAKEN_BACK,
        Errno::EPERM => "that is the VMM's, and this is a control client beside it",
        _ => "",
    }
}

const TAKEN_BACK: &str = "the device was taken back: the VM reset it, or used its device for longer than its accesses wait while the \
                          device is moved";
