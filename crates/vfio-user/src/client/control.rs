//! The requests of control clients beyond the standard (`docs/vfio-user-extensions.md: STAY, ECHO, KICK, NEXT`),
//! and the meaning of errors that are specific to this role.

use limosa_client::{Device, FeatureRequest, Refers, Result};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};
use zerocopy::IntoBytes;

use super::Client;
use crate::extension::{self, Echo, Next, NextFlags, Stay, StayFlags};

impl Client {
    /// Makes the device stay in STOP or STOP_COPY until the move with this id is decided ([`Client::release`]):
    /// until then no client, no client's end and no reset sets it running. EBUSY unless this client drives the device,
    /// EINVAL in another state, EEXIST if it stays for another move, ENOTTY if the server has no such feature.
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

    /// Names the process whose client is the next VMM: it prepares while the VMM is connected, and gets the device
    /// when the VMM goes. `pid` is the PID in the server's namespace; `None` withdraws the name, and disconnects the
    /// next client. ESRCH if there is no such process, ENOTCONN without a VMM, EBUSY while a next client is connected,
    /// ENOTTY if the server has no such feature.
    pub fn name_next(&self, pid: Option<i32>) -> Result<()> {
        let mut next = Next { pid: pid.unwrap_or(0), flags: 0 };
        self.control(extension::NEXT, FeatureOp::SET, next.as_mut_bytes())
    }

    /// The process that was named ([`Client::name_next`]), and whether its client is connected.
    pub fn next_vmm(&self) -> Result<NextVmm> {
        let mut next = Next::default();
        self.control(extension::NEXT, FeatureOp::GET, next.as_mut_bytes())?;
        let is = |flag| next.flags & flag != 0;
        let pid = (next.pid != 0).then_some(next.pid);
        Ok(NextVmm { pid, is_there: is(NextFlags::THERE), is_this: is(NextFlags::THIS) })
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

/// The next VMM of a device, as its server knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextVmm {
    /// The process that was named.
    pub pid: Option<i32>,
    /// Its client is connected, and prepares.
    pub is_there: bool,
    /// It is this client, which does not have the device yet.
    pub is_this: bool,
}

/// The meaning of a refusal for a control client; empty if the errno is sufficient.
pub(super) fn hint(request: &str, errno: Errno) -> &'static str {
    match errno {
        Errno::EBUSY if request.contains("MIG_DEVICE_STATE") => {
            "another client drives the device: its VMM, or another move; or it was given away with a move, which only that \
             move's decision ends"
        }
        Errno::EBUSY if request.contains("STAY") => TAKEN_BACK,
        Errno::EBUSY if request.contains("NEXT") => {
            "the client of the process that was named before is connected"
        }
        Errno::ENOTCONN if request.contains("NEXT") => {
            "no VMM uses the device: the next client that connects gets it"
        }
        Errno::ESRCH if request.contains("NEXT") => "the server sees no such process",
        Errno::ENODEV if request.contains("MIG_DATA") => TAKEN_BACK,
        Errno::EPERM => "only the VMM may do that, and this is a control client",
        _ => "",
    }
}

const TAKEN_BACK: &str = "the device was taken back: the VM reset it, or used its device for longer than its accesses wait while the \
                          device is moved";
