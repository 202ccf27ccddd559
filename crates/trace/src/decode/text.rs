//! How values are shown.

use std::fmt::Write as _;

use limosa_protocol::info::{DmaMapFlags, IrqFlags, RegionFlags};

/// The most bytes that are shown of data.
const SHOWN_BYTES: usize = 32;

/// Bytes in hexadecimal, in their order in memory, with an ellipsis where there are more.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in &bytes[..bytes.len().min(SHOWN_BYTES)] {
        let _ = write!(text, "{byte:02x}");
    }
    if bytes.len() > SHOWN_BYTES {
        text.push('…');
    }
    text
}

/// What a register holds: a number where the access has the width of one, else the bytes.
pub fn data(bytes: &[u8], all: u64) -> String {
    match bytes.len() {
        width @ (1 | 2 | 4 | 8) if all == width as u64 => {
            let mut value = [0; 8];
            value[..width].copy_from_slice(bytes);
            format!("{:#0digits$x}", u64::from_le_bytes(value), digits = 2 + 2 * width)
        }
        _ if all > bytes.len() as u64 && !bytes.is_empty() && bytes.len() <= SHOWN_BYTES => hex(bytes) + "…",
        _ => hex(bytes),
    }
}

/// `0x1000+0x200`: an address or offset, and bytes.
pub fn range(start: u64, bytes: u64) -> String {
    format!("{start:#x}+{bytes:#x}")
}

/// Flags of a region: `read+write+mmap`.
pub fn region_flags(flags: u32) -> String {
    let flags = RegionFlags::from_bits_retain(flags);
    names(&[
        (flags.contains(RegionFlags::READ), "read"),
        (flags.contains(RegionFlags::WRITE), "write"),
        (flags.contains(RegionFlags::MMAP), "mmap"),
        (flags.contains(RegionFlags::CAPS), "caps"),
    ])
}

/// Flags of an interrupt index.
pub fn irq_flags(flags: u32) -> String {
    let flags = IrqFlags::from_bits_retain(flags);
    names(&[
        (flags.contains(IrqFlags::EVENTFD), "eventfd"),
        (flags.contains(IrqFlags::MASKABLE), "maskable"),
        (flags.contains(IrqFlags::AUTOMASKED), "automasked"),
        (flags.contains(IrqFlags::NORESIZE), "noresize"),
    ])
}

/// Flags of a DMA mapping.
pub fn map_flags(flags: u32) -> String {
    let known = DmaMapFlags::from_bits_retain(flags);
    names(&[(known.contains(DmaMapFlags::READ), "read"), (known.contains(DmaMapFlags::WRITE), "write")])
}

fn names(flags: &[(bool, &str)]) -> String {
    let names: Vec<_> = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, name)| *name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join("+") }
}

/// Joins the parts that are there with spaces.
pub fn join(parts: &[&str]) -> String {
    parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join(" ")
}
