//! The payloads of FEATURE requests and answers (`vfio.h: VFIO_DEVICE_FEATURE`) as text, the same for both transports.

use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaLoggingReport, FeatureHeader, FeatureMigState, FeatureResetCount, PrecopyInfo,
};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, FeaturePayload, MigrationFlags, Records, State};
use limosa_vfio_user::extension::{self, Echo, Next, Stay, StayFlags};
use zerocopy::FromBytes;

use super::{Known, text};
use crate::event::{Request, Transition};

/// Ranges that are shown of a START.
const RANGES_SHOWN: usize = 4;

/// A FEATURE request: its operation and feature, and its payload as text.
pub fn asked(header: FeatureHeader, payload: &[u8], known: Known) -> (Request, String) {
    let index = FeatureIndex((header.flags & 0xffff) as u16);
    let op = FeatureOp::from_bits_truncate(header.flags);
    let is_set = op.contains(FeatureOp::SET) && !op.contains(FeatureOp::PROBE);
    let state = (is_set && index == FeatureIndex::MIG_DEVICE_STATE)
        .then(|| FeatureMigState::read_from_prefix(payload).ok())
        .flatten();
    let to = state.and_then(|(state, _)| State::from_raw(state.device_state));
    let transition = to.map(|to| Transition { from: known.0, to });
    let unknown = header.flags & !(FeatureOp::all().bits() | 0xffff);
    let misuse = match header.call() {
        Ok(_) => String::new(),
        Err(_) if unknown != 0 => format!("unknown flags {unknown:#x}"),
        Err(_) if header.argsz < FeatureHeader::BYTES as u32 => format!("argsz {}", header.argsz),
        Err(_) => "GET with SET".to_owned(),
    };
    let arguments = match (is_set, transition, state) {
        (true, Some(transition), _) => transition.shown(),
        (true, None, Some((state, _))) => format!("state {}", state.device_state),
        (true, None, None) => in_words(index, payload, false),
        // The range of a REPORT is in its request.
        _ if has_bitmap(index) && !op.contains(FeatureOp::PROBE) => in_words(index, payload, false),
        _ => String::new(),
    };
    (Request::Feature { index, op, transition }, text::join(&[&arguments, &misuse]))
}

/// The answer to a successful FEATURE request, as text. Notes the state that it contains.
pub fn answered(request: &Request, payload: &[u8], payload_bytes: usize, known: &mut Known) -> String {
    let Request::Feature { index, op, transition } = request else { return String::new() };
    if op.contains(FeatureOp::PROBE) {
        return String::new();
    }
    if let Some(transition) = transition {
        known.0 = Some(transition.to);
        return String::new();
    }
    if !op.contains(FeatureOp::GET) {
        // A START returns the page size that the device chose.
        return match FeaturePayload::read(*index, payload) {
            Ok(FeaturePayload::DmaLoggingStart(control, _)) => format!("page size {}", control.page_size),
            _ => String::new(),
        };
    }
    let words = in_words(*index, payload, true);
    if *index == FeatureIndex::MIG_DEVICE_STATE
        && let Ok((state, _)) = FeatureMigState::read_from_prefix(payload)
    {
        known.0 = State::from_raw(state.device_state);
    }
    if payload.len() < payload_bytes && has_bitmap(*index) {
        return words + " at least";
    }
    words
}

/// Whether a bitmap follows the fixed part of an answer.
fn has_bitmap(index: FeatureIndex) -> bool {
    matches!(index, FeatureIndex::DMA_LOGGING_REPORT | extension::DIRTY_BLOCKS)
}

/// A payload as text. A payload that this feature does not have is shown as bytes.
fn in_words(index: FeatureIndex, payload: &[u8], is_answer: bool) -> String {
    if let Some(words) = of_extension(index, payload, is_answer) {
        return words;
    }
    let words = match FeaturePayload::read(index, payload) {
        Err(Errno::EINVAL) if payload.is_empty() => return "no payload".to_owned(),
        Err(_) => return format!("a payload of {} bytes, too short: {}", payload.len(), text::hex(payload)),
        Ok(words) => words,
    };
    match words {
        FeaturePayload::PciVfToken(_) => "a token".to_owned(),
        FeaturePayload::Migration(migration) => MigrationFlags::from_bits_retain(migration.flags).to_string(),
        FeaturePayload::MigDeviceState(state) => match state.state() {
            Ok(name) => name.to_string(),
            Err(_) => format!("state {}", state.device_state),
        },
        FeaturePayload::LowPowerEntryWithWakeup(entry) => format!("wakeup eventfd {}", entry.wakeup_eventfd),
        FeaturePayload::DmaLoggingStart(control, ranges) => {
            format!("page size {}, {}", control.page_size, in_ranges(ranges))
        }
        FeaturePayload::DmaLoggingReport(report, _) if !is_answer => {
            format!("{} page size {}", text::range(report.iova, report.length), report.page_size)
        }
        FeaturePayload::DmaLoggingReport(_, bitmap) => {
            let dirty: u64 = bitmap.iter().map(|byte| u64::from(byte.count_ones())).sum();
            format!("{dirty} dirty pages")
        }
        FeaturePayload::MigDataSize(size) => format!("{} bytes", size.stop_copy_length),
        FeaturePayload::BusMaster(master) => match master.on() {
            Ok(true) => "on".to_owned(),
            Ok(false) => "off".to_owned(),
            Err(_) => format!("op {}", master.op),
        },
        FeaturePayload::DmaBuf(buf, ranges) => {
            format!("region {}, {} ranges", buf.region_index, ranges.len())
        }
        FeaturePayload::Unknown(_, bytes) => text::hex(bytes),
        FeaturePayload::LowPowerEntry
        | FeaturePayload::LowPowerExit
        | FeaturePayload::DmaLoggingStop
        | FeaturePayload::MigPrecopyInfoV2 => String::new(),
    }
}

fn in_ranges(ranges: Records<'_, DmaLoggingRange>) -> String {
    if ranges.is_empty() {
        return "no ranges".to_owned();
    }
    let shown: Vec<_> =
        ranges.iter().take(RANGES_SHOWN).map(|range| text::range(range.iova, range.length)).collect();
    let more = if ranges.len() > RANGES_SHOWN {
        format!(" and {} more", ranges.len() - RANGES_SHOWN)
    } else {
        String::new()
    };
    shown.join(" ") + &more
}

/// The payload of an extension of this project.
fn of_extension(index: FeatureIndex, payload: &[u8], is_answer: bool) -> Option<String> {
    match index {
        extension::DIRTY_BLOCKS => {
            let (asked, blocks) = FeatureDmaLoggingReport::read_from_prefix(payload).ok()?;
            let marked: u64 = blocks.iter().map(|byte| u64::from(byte.count_ones())).sum();
            Some(match is_answer {
                true => format!("{marked} blocks"),
                false => format!("{} blocks of {}", text::range(asked.iova, asked.length), asked.page_size),
            })
        }
        extension::PRECOPY_INFO => {
            PrecopyInfo::read_from_prefix(payload).ok().map(|(info, _)| precopy(&info))
        }
        extension::DATA_FD | extension::KICK => Some(String::new()),
        extension::RESET_COUNT => FeatureResetCount::read_from_prefix(payload)
            .ok()
            .map(|(count, _)| format!("{} resets", count.resets)),
        extension::STAY => Stay::read_from_prefix(payload).ok().map(|(stay, _)| match stay.flags {
            StayFlags::STAY => "stay".to_owned(),
            StayFlags::RELEASE => "release".to_owned(),
            flags => format!("flags {flags:#x}"),
        }),
        extension::NEXT => {
            Next::read_from_prefix(payload).ok().map(|(next, _)| format!("process {}", next.pid))
        }
        extension::ECHO => Echo::read_from_prefix(payload).ok().map(|(echo, _)| {
            format!(
                "{} page size {}, {} pages",
                text::range(echo.iova, echo.length),
                echo.page_size,
                echo.pages
            )
        }),
        _ => None,
    }
}

/// `struct vfio_precopy_info`.
pub fn precopy(info: &PrecopyInfo) -> String {
    let reinit = if info.reinit() { ", reinit" } else { "" };
    format!("{} initial, {} dirty bytes{reinit}", info.initial_bytes, info.dirty_bytes)
}
