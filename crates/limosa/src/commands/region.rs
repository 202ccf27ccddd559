//! `limosa region`: the bytes of a device's regions, for developers of devices.

use std::io::{self, Write};

use limosa_protocol::info::{DeviceFlags, RegionFlags};
use limosa_protocol::pci_index;
use serde::Serialize;

use super::probe::region_name;
use crate::args::{REGION_BYTES_MAX, RegionAction, RegionBytes};
use crate::exit::{self, Code};
use crate::open::{Opened, Opening};
use crate::output::Output;

/// A device may have a limit for one access: a page is below that of every one.
const ACCESS_BYTES: usize = 4096;

#[derive(Serialize)]
struct Accessed {
    device: String,
    region: u32,
    offset: u64,
    bytes: u64,
    /// In hexadecimal digits, in the order of the addresses.
    data: String,
}

pub fn run(action: &RegionAction, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let (device, region, offset, data) = match action {
        RegionAction::Read { device, region, offset, size } => {
            let opened = opening.open(device)?;
            let (left, called) = room(&opened, *region, *offset, RegionFlags::READ)?;
            let bytes = size.map_or(left, |size| size.get());
            check(device, &called, *offset, bytes, left)?;
            let mut data = vec![0; bytes as usize];
            for (at, part) in (*offset..).step_by(ACCESS_BYTES).zip(data.chunks_mut(ACCESS_BYTES)) {
                opened.region_read(*region, at, part)?;
            }
            (device, region, offset, data)
        }
        RegionAction::Write { device, region, offset, data: RegionBytes(data) } => {
            let opened = opening.open(device)?;
            let (left, called) = room(&opened, *region, *offset, RegionFlags::WRITE)?;
            check(device, &called, *offset, data.len() as u64, left)?;
            opened.region_write(*region, *offset, data)?;
            (device, region, offset, data.clone())
        }
    };
    let accessed = Accessed {
        device: device.clone(),
        region: *region,
        offset: *offset,
        bytes: data.len() as u64,
        data: data.iter().map(|byte| format!("{byte:02x}")).collect(),
    };
    out.result(&accessed, |to| match action {
        RegionAction::Read { .. } => dump(*offset, &data, to),
        RegionAction::Write { .. } => writeln!(to, "{} bytes written at {offset:#x}", data.len()),
    })
}

/// How many bytes there are from the offset to the region's end, if it can be accessed like this.
fn room(device: &Opened, region: u32, offset: u64, access: RegionFlags) -> anyhow::Result<(u64, String)> {
    let name = device.given();
    let refused = |what: String| exit::error(Code::Refused, format!("{name}: {what}"));
    let info = device.info()?;
    let regions = info.num_regions;
    let is_pci = DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI);
    let called = match is_pci {
        true if region == pci_index::CONFIG => "configuration space".into(),
        true => region_name(region),
        false => format!("region {region}"),
    };
    if region >= regions {
        return Err(refused(format!("there is no region {region}; it has {regions}, from 0 on")));
    }
    let info = device.region(region)?.info;
    if !RegionFlags::from_bits_retain(info.flags).contains(access) {
        let how = if access == RegionFlags::READ { "read" } else { "written" };
        return Err(refused(format!("{called} cannot be {how}; `limosa probe {name}` lists what can")));
    }
    let left = info.size.checked_sub(offset).filter(|left| *left > 0).ok_or_else(|| {
        refused(format!("{called} has {:#x} bytes; nothing is at offset {offset:#x}", info.size))
    })?;
    Ok((left, called))
}

fn check(name: &str, region: &str, offset: u64, bytes: u64, left: u64) -> anyhow::Result<()> {
    let what = if bytes > left {
        format!("{region} has {left:#x} bytes from offset {offset:#x} on, and {bytes:#x} were asked for")
    } else if bytes > REGION_BYTES_MAX {
        format!("{region} has {bytes:#x} bytes there; expected --size, of at most {:#x}", REGION_BYTES_MAX)
    } else {
        return Ok(());
    };
    Err(exit::error(Code::Refused, format!("{name}: {what}")))
}

/// Sixteen bytes a line, with the offset before them.
fn dump(offset: u64, data: &[u8], to: &mut dyn Write) -> io::Result<()> {
    for (at, line) in (offset..).step_by(16).zip(data.chunks(16)) {
        let bytes: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(to, "{at:08x}  {}", bytes.join(" "))?;
    }
    Ok(())
}
