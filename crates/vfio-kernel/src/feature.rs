//! FEATURE requests over the ioctl (`vfio.h: VFIO_DEVICE_FEATURE`): the payload in the kernel's own form, with
//! pointers to what it refers to.

use std::borrow::Cow;
use std::mem::offset_of;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use limosa_client::{Error, FeatureReply, FeatureRequest, ForeignFd, Refers, Result};
use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaBuf, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigState,
    RegionDmaRange,
};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

use crate::device::KernelDevice;
use crate::ioctl;
use crate::refusal::Request;
use crate::stream::DataFd;

/// The longest payload that is passed on, including what it refers to inline. Those of `vfio.h` have a few dozen bytes,
/// and 16 for each range of a DMA_BUF.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// `VFIO_DEVICE_FEATURE`.
pub(crate) const FEATURE: u8 = 17;

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
            (Refers::In(inline), None) if index == FeatureIndex::DMA_BUF => {
                payload.to_mut().extend_from_slice(inline);
            }
            // A probe, or a payload that is too short to refer to anything, which the kernel refuses.
            (_, None) => {}
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
            let fd = unsafe { OwnedFd::from_raw_fd(answer.cast_signed()) };
            reply.fd = Some(ForeignFd::harmless(fd));
        }
        Ok(reply)
    }

    /// The answer to any state change of a device whose load was cut short because the process that had it open ended.
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
            (FeatureIndex::DMA_BUF, Refers::In(inline)) => {
                let count = FeatureDmaBuf::read_from_bytes(request.payload).map(|buf| buf.nr_ranges);
                let have = inline.len() / size_of::<RegionDmaRange>();
                // The kernel believes the count.
                match count {
                    Ok(count) if count as usize <= have => Ok(None),
                    _ => Err(self.usage(format!("{} with {have} ranges and other numbers", asked(request)))),
                }
            }
            (FeatureIndex::DMA_BUF, Refers::Nothing) => {
                Err(self.usage(format!("{} without ranges", asked(request))))
            }
            (_, Refers::In(_) | Refers::Bitmap(_)) => {
                Err(self.usage(format!("{} refers to nothing", Request::Feature(op, index))))
            }
            (_, Refers::Nothing) => Ok(None),
        }
    }

    /// The answer to a feature whose payload is unknown: it may contain addresses, to which the kernel would write.
    /// Most often the device does not know the feature either, and says so.
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

    /// Whether the request got as far as the ioctl, which knows nothing of it.
    fn reaches_the_kernel(
        index: FeatureIndex,
        op: FeatureOp,
        payload: &mut [u8],
        refers: Refers<'_>,
    ) -> bool {
        let null = std::fs::File::open("/dev/null").unwrap();
        match KernelDevice::unchecked("null", null.into()).perform(&mut FeatureRequest {
            index,
            op,
            payload,
            refers,
        }) {
            Err(Error::Refused { errno: Errno::ENOTTY, .. }) => true,
            Err(Error::Usage { .. }) => false,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_payload_refers_to_is_as_long_as_it_says() {
        let (get, set) = (FeatureOp::GET, FeatureOp::SET);
        let start = |ranges, have: usize| {
            let mut payload = FeatureDmaLoggingControl { page_size: 4096, num_ranges: ranges, reserved: 0 };
            let bytes = vec![0; have];
            reaches_the_kernel(
                FeatureIndex::DMA_LOGGING_START,
                set,
                payload.as_mut_bytes(),
                Refers::In(&bytes),
            )
        };
        assert!(start(0, 0) && start(1, 16) && start(2, 40));
        assert!(!start(1, 0) && !start(2, 31) && !start(u32::MAX, 4096));

        let report = |iova, length, page_size, have: usize| {
            let mut payload = FeatureDmaLoggingReport { iova, length, page_size };
            let mut words = vec![0; have];
            let refers = Refers::Bitmap(&mut words);
            reaches_the_kernel(FeatureIndex::DMA_LOGGING_REPORT, get, payload.as_mut_bytes(), refers)
        };
        assert!(report(0, 64 << 12, 4096, 1) && report(0, 1, 4096, 1));
        assert!(!report(0, 65 << 12, 4096, 1) && !report(0, 4096, 4096, 0) && !report(0, 0, 4096, 1));
        // What the kernel refuses before it looks at the bitmap is the kernel's to refuse.
        assert!(report(0, 4096, 1000, 1) && report(u64::MAX, 4096, 4096, 1));

        let buf = |ranges, have: usize| {
            let mut payload = FeatureDmaBuf { nr_ranges: ranges, ..FeatureDmaBuf::default() };
            let bytes = vec![0; have];
            reaches_the_kernel(FeatureIndex::DMA_BUF, get, payload.as_mut_bytes(), Refers::In(&bytes))
        };
        assert!(buf(0, 0) && buf(2, 32));
        assert!(!buf(1, 0) && !buf(3, 47));
    }

    #[test]
    fn nothing_that_a_caller_appends_is_taken_for_a_pointer() {
        let (get, set) = (FeatureOp::GET, FeatureOp::SET);
        for (index, op) in [
            (FeatureIndex::MIG_DEVICE_STATE, set),
            (FeatureIndex::MIG_DATA_SIZE, get),
            (FeatureIndex::LOW_POWER_ENTRY, set),
            (FeatureIndex::DMA_LOGGING_STOP, set),
        ] {
            assert!(!reaches_the_kernel(index, op, &mut [0; 8], Refers::In(&[0; 32])), "{index}");
            assert!(!reaches_the_kernel(index, op, &mut [0; 8], Refers::Bitmap(&mut [0])), "{index}");
        }
        // Short payloads go as they are; a kernel that knows the feature finds them too short.
        for index in [FeatureIndex::DMA_LOGGING_START, FeatureIndex::DMA_LOGGING_REPORT] {
            let op = if index == FeatureIndex::DMA_LOGGING_START { set } else { get };
            assert!(reaches_the_kernel(index, op, &mut [0; 8], Refers::In(&[0; 32])), "{index}");
        }
        let long = &mut vec![0; PAYLOAD_BYTES_MAX + 1];
        assert!(!reaches_the_kernel(FeatureIndex::MIGRATION, get, long, Refers::Nothing));
    }
}
