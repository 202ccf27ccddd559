//! System calls on files of VFIO and iommufd, and on data fds (`vfio.h`, `iommufd.h`).

use std::collections::BTreeMap;

use limosa_protocol::feature::{FeatureMigState, PrecopyInfo};
use limosa_protocol::info::{DeviceInfo, IrqInfo, IrqSet, RegionInfo};
use limosa_protocol::{FeatureHeader, FeatureIndex, FeatureOp};
use zerocopy::FromBytes;

use super::{Known, feature, text};
use crate::event::{Direction, Event, Outcome, Request, printable};
use crate::seen::{Action, Call, FileKind};

/// The most devices whose state is remembered.
const DEVICES_MAX: usize = 4096;

/// The numbers of `vfio.h` start here: `_IO(VFIO_TYPE, VFIO_BASE)`.
const VFIO: u32 = (b';' as u32) << 8 | 100;
/// Those of `iommufd.h`: `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE)`.
const IOMMUFD: u32 = (b';' as u32) << 8 | 0x80;

/// `VFIO_DEVICE_FEATURE`.
pub const FEATURE: u32 = VFIO + 17;
/// `VFIO_GROUP_GET_DEVICE_FD`.
pub const GROUP_GET_DEVICE_FD: u32 = VFIO + 6;
/// `VFIO_DEVICE_RESET`.
const RESET: u32 = VFIO + 11;
const GET_INFO: u32 = VFIO + 7;
const GET_REGION_INFO: u32 = VFIO + 8;
const GET_IRQ_INFO: u32 = VFIO + 9;
const SET_IRQS: u32 = VFIO + 10;
const PRECOPY_INFO: u32 = VFIO + 21;

/// The name of an ioctl on a kind of file.
pub fn ioctl_name(file: FileKind, request: u32) -> Option<&'static str> {
    let vfio = [
        (0, "GET_API_VERSION", "GET_API_VERSION"),
        (1, "CHECK_EXTENSION", "CHECK_EXTENSION"),
        (2, "SET_IOMMU", "SET_IOMMU"),
        (3, "GROUP_GET_STATUS", "GROUP_GET_STATUS"),
        (4, "GROUP_SET_CONTAINER", "GROUP_SET_CONTAINER"),
        (5, "GROUP_UNSET_CONTAINER", "GROUP_UNSET_CONTAINER"),
        (6, "GROUP_GET_DEVICE_FD", "GROUP_GET_DEVICE_FD"),
        (7, "DEVICE_GET_INFO", ""),
        (8, "DEVICE_GET_REGION_INFO", ""),
        (9, "DEVICE_GET_IRQ_INFO", ""),
        (10, "DEVICE_SET_IRQS", ""),
        (11, "DEVICE_RESET", ""),
        (12, "DEVICE_GET_PCI_HOT_RESET_INFO", "IOMMU_GET_INFO"),
        (13, "DEVICE_PCI_HOT_RESET", "IOMMU_MAP_DMA"),
        (14, "DEVICE_QUERY_GFX_PLANE", "IOMMU_UNMAP_DMA"),
        (15, "DEVICE_GET_GFX_DMABUF", "IOMMU_ENABLE"),
        (16, "DEVICE_IOEVENTFD", "IOMMU_DISABLE"),
        (17, "DEVICE_FEATURE", "IOMMU_DIRTY_PAGES"),
        (18, "DEVICE_BIND_IOMMUFD", ""),
        (19, "DEVICE_ATTACH_IOMMUFD_PT", ""),
        (20, "DEVICE_DETACH_IOMMUFD_PT", ""),
        (21, "MIG_GET_PRECOPY_INFO", ""),
    ];
    let iommufd = [
        "IOMMU_DESTROY",
        "IOMMU_IOAS_ALLOC",
        "IOMMU_IOAS_ALLOW_IOVAS",
        "IOMMU_IOAS_COPY",
        "IOMMU_IOAS_IOVA_RANGES",
        "IOMMU_IOAS_MAP",
        "IOMMU_IOAS_UNMAP",
        "IOMMU_OPTION",
        "IOMMU_VFIO_IOAS",
        "IOMMU_HWPT_ALLOC",
        "IOMMU_GET_HW_INFO",
        "IOMMU_HWPT_SET_DIRTY_TRACKING",
        "IOMMU_HWPT_GET_DIRTY_BITMAP",
        "IOMMU_HWPT_INVALIDATE",
        "IOMMU_FAULT_QUEUE_ALLOC",
        "IOMMU_IOAS_MAP_FILE",
        "IOMMU_VIOMMU_ALLOC",
        "IOMMU_VDEVICE_ALLOC",
        "IOMMU_IOAS_CHANGE_PROCESS",
        "IOMMU_VEVENTQ_ALLOC",
        "IOMMU_HW_QUEUE_ALLOC",
    ];
    if let Some(number) = request.checked_sub(IOMMUFD)
        && let Some(name) = iommufd.get(number as usize)
    {
        return Some(name);
    }
    let number = request.checked_sub(VFIO)?;
    let (_, of_device, of_container) = vfio.iter().find(|(at, ..)| *at == number)?;
    let is_containers = matches!(file, FileKind::Container | FileKind::Iommufd | FileKind::Group);
    let name = if is_containers { of_container } else { of_device };
    // On the wrong file it is called by the only name that it has.
    Some(if name.is_empty() { of_device } else { name })
}

/// What is remembered of the devices of traced processes.
#[derive(Debug, Default)]
pub struct Calls {
    /// By the device's name.
    known: BTreeMap<String, Known>,
}

impl Calls {
    /// A call with its result.
    pub fn decode(&mut self, call: &Call) -> Event {
        let mut one = Event {
            time_ns: call.time_ns,
            duration_ns: Some(call.duration_ns),
            pid: Some(call.pid),
            name: call.name.clone(),
            direction: Direction::ToDevice,
            request: Request::Named("close"),
            arguments: String::new(),
            outcome: match call.result {
                Ok(_) => Outcome::Done(String::new()),
                Err(errno) => Outcome::Refused(errno),
            },
            bytes: 0,
            session_of: call.device.clone(),
            fds: Vec::new(),
        };
        let done = call.result.ok();
        match &call.action {
            Action::Close => {}
            Action::Read { offset, bytes, head } => {
                one.request = Request::Named(if offset.is_some() { "pread" } else { "read" });
                one.arguments = in_file(*offset, *bytes);
                if let Some(got) = done {
                    one.bytes = got.unsigned_abs();
                    one.outcome = Outcome::Done(transferred(call.file, got, head));
                }
            }
            Action::Write { offset, bytes, head } => {
                one.request = Request::Named(if offset.is_some() { "pwrite" } else { "write" });
                let shown =
                    if call.file == FileKind::Data { String::new() } else { text::data(head, *bytes) };
                one.arguments = text::join(&[&in_file(*offset, *bytes), &shown]);
                if let Some(put) = done {
                    one.bytes = put.unsigned_abs();
                    one.outcome = Outcome::Done(format!("{put} bytes"));
                }
            }
            Action::Ioctl { request, before, after, referred } => {
                self.ioctl(call, *request, (before, after, referred), &mut one);
            }
        }
        one
    }

    fn ioctl(
        &mut self,
        call: &Call,
        request: u32,
        (before, after, referred): (&[u8], &[u8], &[u8]),
        one: &mut Event,
    ) {
        one.request = match ioctl_name(call.file, request) {
            Some(name) => Request::Named(name),
            None => Request::Numbered("ioctl", request),
        };
        let is_containers = matches!(call.file, FileKind::Container | FileKind::Iommufd | FileKind::Group);
        if request == FEATURE && !is_containers {
            self.feature(call, (before, after, referred), one);
            return;
        }
        match request {
            GROUP_GET_DEVICE_FD => {
                let name = before.split(|byte| *byte == 0).next().unwrap_or_default();
                one.arguments = printable(&String::from_utf8_lossy(name));
            }
            RESET if call.result.is_ok() => self.known(&call.name).reset(),
            GET_REGION_INFO | GET_IRQ_INFO => {
                // The index is at the same place in both (`vfio.h`).
                let index = before.get(8..12).and_then(|index| index.try_into().ok()).map(u32::from_ne_bytes);
                one.arguments = index.map(|index| format!("index {index}")).unwrap_or_default();
            }
            SET_IRQS => {
                if let Ok((set, _)) = IrqSet::read_from_prefix(before) {
                    let end = u64::from(set.start) + u64::from(set.count);
                    one.arguments =
                        format!("index {} flags {:#x} vectors {}..{end}", set.index, set.flags, set.start);
                }
            }
            _ => {}
        }
        let Ok(value) = call.result else { return };
        let words = match request {
            GET_INFO => read::<DeviceInfo>(after)
                .map(|info| format!("{} regions, {} interrupt indexes", info.num_regions, info.num_irqs)),
            GET_REGION_INFO => read::<RegionInfo>(after).map(|info| {
                format!("{} {:#x} bytes at {:#x}", text::region_flags(info.flags), info.size, info.offset)
            }),
            GET_IRQ_INFO => read::<IrqInfo>(after)
                .map(|info| format!("{} vectors {}", info.count, text::irq_flags(info.flags))),
            PRECOPY_INFO => read::<PrecopyInfo>(after).map(|info| feature::precopy(&info)),
            GROUP_GET_DEVICE_FD => {
                one.fds.push(value.to_string());
                Some(format!("device fd {value}"))
            }
            _ => Some(if value == 0 { String::new() } else { value.to_string() }),
        };
        one.outcome = Outcome::Done(words.unwrap_or_else(|| text::hex(after)));
    }

    /// `VFIO_DEVICE_FEATURE`, whose payloads have pointers where vfio-user has what these point to.
    fn feature(&mut self, call: &Call, (before, after, referred): (&[u8], &[u8], &[u8]), one: &mut Event) {
        let Ok((header, payload)) = FeatureHeader::read_from_prefix(before) else {
            one.arguments = format!("argument of {} bytes", before.len());
            return;
        };
        let index = FeatureIndex((header.flags & 0xffff) as u16);
        let wire = |payload: &[u8]| match index {
            FeatureIndex::DMA_LOGGING_START | FeatureIndex::DMA_LOGGING_REPORT => {
                let fixed = index.rules().map_or(0, |rules| rules.payload_bytes).min(payload.len());
                [&payload[..fixed], referred].concat()
            }
            _ => payload.to_vec(),
        };
        let known = *self.known(&call.name);
        (one.request, one.arguments) = feature::asked(header, &wire(payload), known);
        let known = self.known(&call.name);
        match call.result {
            Err(_) => {
                if matches!(one.request, Request::Feature { transition: Some(_), .. }) {
                    known.refused();
                }
            }
            Ok(value) => {
                let payload = after.get(FeatureHeader::BYTES..).unwrap_or_default();
                let bitmap = report_bytes(index, payload);
                let payload = wire(payload);
                let mut words =
                    feature::answered(&one.request, &payload, bitmap.unwrap_or(payload.len()), known);
                if let Some(fd) = data_fd(index, header.flags, &payload) {
                    words = format!("data_fd {fd}");
                    one.fds.push(fd.to_string());
                } else if index == FeatureIndex::DMA_BUF && value > 0 {
                    words = format!("fd {value}");
                    one.fds.push(value.to_string());
                }
                one.outcome = Outcome::Done(words);
            }
        }
    }

    fn known(&mut self, name: &str) -> &mut Known {
        if self.known.len() >= DEVICES_MAX && !self.known.contains_key(name) {
            self.known.clear();
        }
        self.known.entry(name.to_owned()).or_default()
    }
}

/// The bytes of a report with all of its bitmap.
fn report_bytes(index: FeatureIndex, payload: &[u8]) -> Option<usize> {
    if index != FeatureIndex::DMA_LOGGING_REPORT {
        return None;
    }
    let (report, _) = limosa_protocol::feature::FeatureDmaLoggingReport::read_from_prefix(payload).ok()?;
    usize::try_from(report.bitmap_bytes()).ok()?.checked_add(size_of_val(&report))
}

/// The data fd that a SET of MIG_DEVICE_STATE gave.
pub fn data_fd(index: FeatureIndex, flags: u32, payload: &[u8]) -> Option<i32> {
    let op = FeatureOp::from_bits_truncate(flags);
    let sets = op.contains(FeatureOp::SET) && !op.contains(FeatureOp::PROBE);
    let (state, _) = FeatureMigState::read_from_prefix(payload).ok()?;
    (index == FeatureIndex::MIG_DEVICE_STATE && sets && state.data_fd >= 0).then_some(state.data_fd)
}

fn read<T: FromBytes>(bytes: &[u8]) -> Option<T> {
    T::read_from_prefix(bytes).ok().map(|(value, _)| value)
}

fn in_file(offset: Option<u64>, bytes: u64) -> String {
    match offset {
        Some(offset) => text::range(offset, bytes),
        None => format!("{bytes} bytes"),
    }
}

fn transferred(file: FileKind, bytes: i64, head: &[u8]) -> String {
    match file {
        FileKind::Data if bytes == 0 => "0 bytes, the end".to_owned(),
        FileKind::Data => format!("{bytes} bytes"),
        _ => text::data(head, bytes.unsigned_abs()),
    }
}
