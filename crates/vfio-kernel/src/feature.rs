//! FEATURE requests over the ioctl (`vfio.h: VFIO_DEVICE_FEATURE`): the payload in the kernel's own form, with
//! pointers to what it refers to.

use std::borrow::Cow;
use std::mem::offset_of;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use limosa_client::{Error, FeatureReply, FeatureRequest, Refers, Result};
use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigState,
};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

use crate::device::KernelDevice;
use crate::ioctl;
use crate::refusal::Request;
use crate::stream::DataFd;

/// The longest payload that is passed on, what it refers to inline included; those of `vfio.h` have some
/// dozens of bytes, and 16 for each range of a DMA_BUF.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// `VFIO_DEVICE_FEATURE`.
const FEATURE: u8 = 17;

impl KernelDevice {
    pub(crate) fn perform(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let (index, op) = (request.index, request.op);
        let asked = asked(request);
        let probes = op.contains(FeatureOp::PROBE);
        if index.rules().is_none() && !probes {
            return Err(self.unknown(index, op));
        }
        let pointer = if probes { None } else { self.pointer(request)? };
        let mut payload = Cow::Borrowed(&*request.payload);
        match (&request.refers, pointer) {
            (_, Some(pointer)) => {
                let fixed = index.rules().map_or(0, |rules| rules.payload_bytes);
                payload = Cow::Owned([&payload[..fixed], pointer.to_ne_bytes().as_slice()].concat());
            }
            (Refers::In(inline), None) => payload.to_mut().extend_from_slice(inline),
            (Refers::Nothing | Refers::Bitmap(_), None) => {}
        }
        let sets_state = (index, op) == (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET);
        if sets_state && self.forsaken.load(Ordering::Relaxed) {
            return Err(self.refuse_to_finish(asked));
        }
        let data_fd_at = offset_of!(FeatureMigState, data_fd);
        if sets_state && payload.len() >= size_of::<FeatureMigState>() {
            // Whatever the caller left there is not an fd that came from the kernel.
            payload.to_mut()[data_fd_at..][..4].copy_from_slice(&(-1i32).to_ne_bytes());
        }
        let argsz = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_BYTES_MAX);
        let Some(payload_bytes) = argsz else {
            return Err(self.usage(format!("{asked} with {} bytes", payload.len())));
        };
        let header = FeatureHeader::new(index, op, payload_bytes);
        // Of words, as what is in it has to be aligned.
        let mut argument = vec![0u64; (FeatureHeader::BYTES + payload.len()).div_ceil(8)];
        let bytes = argument.as_mut_bytes();
        bytes[..FeatureHeader::BYTES].copy_from_slice(header.as_bytes());
        bytes[FeatureHeader::BYTES..][..payload.len()].copy_from_slice(&payload);
        let at = bytes.as_mut_ptr().cast();
        // SAFETY: the argument is a `struct vfio_device_feature` of argsz bytes. The features that are let through
        // above have no pointers in their payloads, except for those that `pointer` made of a slice that
        // `request` borrows until this returns, and that is as long as the payload says.
        let answer = unsafe { ioctl::call(self.device_fd(), ioctl::vfio(FEATURE), at) };
        let answer = answer.map_err(|errno| asked.refused(self.name_str(), errno))?;
        let filled = &argument.as_bytes()[FeatureHeader::BYTES..];
        let fixed = index.rules().map_or(0, |rules| rules.payload_bytes).min(request.payload.len());
        let mut reply = FeatureReply::default();
        if probes {
            return Ok(reply);
        }
        request.payload[..fixed].copy_from_slice(&filled[..fixed]);
        reply.payload_bytes = fixed;
        if sets_state && fixed == size_of::<FeatureMigState>() {
            let data_fd = &mut request.payload[data_fd_at..][..4];
            let fd = RawFd::from_ne_bytes([data_fd[0], data_fd[1], data_fd[2], data_fd[3]]);
            data_fd.copy_from_slice(&(-1i32).to_ne_bytes());
            if fd >= 0 {
                // SAFETY: the kernel has put a new fd of this process there, which nobody else knows. (With a refusal it
                // gives none: it installs the fd as the last thing that can fail.)
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                reply.stream = Some(Box::new(DataFd::new(self, fd)));
            }
        }
        if (index, op) == (FeatureIndex::DMA_BUF, FeatureOp::GET) {
            // SAFETY: the value of this ioctl is a new fd of this process, which nobody else knows.
            reply.fd = Some(unsafe { OwnedFd::from_raw_fd(answer.cast_signed()) });
        }
        Ok(reply)
    }

    /// The answer to any state for a device whose load was broken off by the end of whoever had it open.
    fn refuse_to_finish(&self, asked: Request) -> Error {
        Error::Refused {
            device: self.name_str().into(),
            request: asked.to_string(),
            errno: Errno::EINVAL,
            hint: "it is in RESUMING since before it was opened, and what was to be loaded is lost with the process \
                   that had it open; reset it"
                .into(),
        }
    }

    /// The address that closes the kernel's form of the payload, for features that have one.
    ///
    /// It is 0 where the kernel has to refuse the request before it looks there.
    fn pointer(&self, request: &mut FeatureRequest<'_>) -> Result<Option<u64>> {
        let (index, op) = (request.index, request.op);
        match (index, &mut request.refers) {
            (FeatureIndex::DMA_LOGGING_START, refers) => {
                let Ok((control, _)) = FeatureDmaLoggingControl::read_from_prefix(request.payload) else {
                    return Ok(None);
                };
                let ranges = match refers {
                    Refers::In(ranges) => *ranges,
                    _ => &[],
                };
                let have = ranges.len() / size_of::<DmaLoggingRange>();
                if (have as u64) < u64::from(control.num_ranges) {
                    let what = format!(
                        "{} of {} ranges, of which there are {have}",
                        asked(request),
                        control.num_ranges
                    );
                    return Err(self.usage(what));
                }
                Ok(Some(if have == 0 { 0 } else { ranges.as_ptr() as u64 }))
            }
            (FeatureIndex::DMA_LOGGING_REPORT, refers) => {
                let Ok((report, _)) = FeatureDmaLoggingReport::read_from_prefix(request.payload) else {
                    return Ok(None);
                };
                if report.length == 0 {
                    return Err(self.usage(format!("{} of no bytes", asked(request))));
                }
                if report.check().is_err() {
                    return Ok(Some(0));
                }
                let (words, have) = match refers {
                    Refers::Bitmap(words) => (words.as_mut_ptr() as u64, words.len() as u64 * 8),
                    _ => (0, 0),
                };
                if have < report.bitmap_bytes() {
                    let need = report.bitmap_bytes();
                    return Err(self.usage(format!(
                        "{} needs {need} bytes of bitmap, there are {have}",
                        asked(request)
                    )));
                }
                if let Refers::Bitmap(words) = refers {
                    // The kernel sets bits and clears none.
                    words[..(report.bitmap_bytes() / 8) as usize].fill(0);
                }
                Ok(Some(words))
            }
            (_, Refers::Bitmap(_)) => {
                Err(self.usage(format!("{} has no bitmap", Request::Feature(op, index))))
            }
            _ => Ok(None),
        }
    }

    /// The answer to a feature whose payload is not known: nobody can tell whether there are addresses in it,
    /// at which the kernel would write. Most often the device does not know it either, and says so.
    fn unknown(&self, index: FeatureIndex, op: FeatureOp) -> Error {
        let probe = &mut FeatureRequest {
            index,
            op: op | FeatureOp::PROBE,
            payload: &mut [],
            refers: Refers::Nothing,
        };
        match self.perform(probe) {
            Err(Error::Refused { errno, .. }) => Request::Feature(op, index).refused(self.name_str(), errno),
            Err(error) => error,
            Ok(_) => self
                .usage(format!("{index} is not known here, so its payload cannot be passed to the kernel")),
        }
    }
}

fn asked(request: &FeatureRequest<'_>) -> Request {
    match (request.index, request.op) {
        (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET) => {
            match FeatureMigState::read_from_prefix(request.payload) {
                Ok((to, _)) => Request::SetState(to.device_state),
                Err(_) => Request::Feature(request.op, request.index),
            }
        }
        (index, op) => Request::Feature(op, index),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_bindings::bindings::vfio as linux;

    #[test]
    fn pointers_close_the_fixed_part_as_in_linux() {
        use std::mem::offset_of;
        for (index, at, bytes) in [
            (
                FeatureIndex::DMA_LOGGING_START,
                offset_of!(linux::vfio_device_feature_dma_logging_control, ranges),
                size_of::<linux::vfio_device_feature_dma_logging_control>(),
            ),
            (
                FeatureIndex::DMA_LOGGING_REPORT,
                offset_of!(linux::vfio_device_feature_dma_logging_report, bitmap),
                size_of::<linux::vfio_device_feature_dma_logging_report>(),
            ),
        ] {
            assert_eq!(index.rules().unwrap().payload_bytes, at, "{index}");
            assert_eq!(at + size_of::<u64>(), bytes, "{index}");
        }
        assert_eq!(FeatureHeader::BYTES, offset_of!(linux::vfio_device_feature, data));
    }
}
