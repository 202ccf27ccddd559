//! The arguments of `limosa region`.

use std::num::NonZeroU64;

use clap::{Args, Subcommand};
use limosa_protocol::pci_index;

use super::guest::number;

/// Limit on the bytes of one command.
pub const BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Args)]
pub struct Region {
    #[command(subcommand)]
    pub action: RegionAction,
}

#[derive(Debug, Subcommand)]
pub enum RegionAction {
    /// Print bytes of a region.
    Read {
        /// The device.
        #[arg(value_name = "DEVICE")]
        device: String,
        /// The region: a number, BAR0 to BAR5, ROM, config or VGA.
        #[arg(value_name = "REGION", value_parser = region)]
        region: u32,
        /// The first byte, in decimal or with 0x.
        #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = number)]
        offset: u64,
        /// Number of bytes, at most 1M; by default all to the end of the region.
        #[arg(long, value_name = "BYTES", value_parser = size)]
        size: Option<NonZeroU64>,
    },
    /// Write bytes to a region, in one access.
    Write {
        /// The device.
        #[arg(value_name = "DEVICE")]
        device: String,
        /// The region: a number, BAR0 to BAR5, ROM, config or VGA.
        #[arg(value_name = "REGION", value_parser = region)]
        region: u32,
        /// The first byte, in decimal or with 0x.
        #[arg(long, value_name = "OFFSET", default_value = "0", value_parser = number)]
        offset: u64,
        /// The bytes in the order of their addresses, two hexadecimal digits each: a device reads 78563412 as
        /// 0x12345678.
        #[arg(value_name = "HEX", value_parser = hex)]
        data: Bytes,
    },
}

/// Bytes of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

fn region(text: &str) -> Result<u32, String> {
    let bar = |digits: &str| digits.parse().ok().filter(|bar| *bar <= pci_index::BAR5);
    let named = match text.to_ascii_lowercase().as_str() {
        "rom" => Some(pci_index::ROM),
        "config" => Some(pci_index::CONFIG),
        "vga" => Some(pci_index::VGA),
        name => name.strip_prefix("bar").map_or_else(|| name.parse().ok(), bar),
    };
    named.ok_or_else(|| "expected a number, BAR0 to BAR5, ROM, config or VGA".into())
}

fn size(text: &str) -> Result<NonZeroU64, String> {
    let size = NonZeroU64::new(number(text)?).filter(|size| size.get() <= BYTES_MAX);
    size.ok_or_else(|| format!("expected 1 to {BYTES_MAX} bytes"))
}

fn hex(text: &str) -> Result<Bytes, String> {
    let is_hex = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !is_hex || !text.len().is_multiple_of(2) || text.len() as u64 / 2 > BYTES_MAX {
        return Err(format!(
            "expected two hexadecimal digits for each byte, such as 0a1b, of at most {BYTES_MAX} bytes"
        ));
    }
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).map_err(|error| error.to_string());
    (0..text.len()).step_by(2).map(byte).collect::<Result<_, _>>().map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_have_numbers_and_names() {
        assert_eq!(
            ["BAR0", "bar5", "config", "ROM", "12"].map(|name| region(name).unwrap()),
            [0, 5, 7, 6, 12]
        );
        for wrong in ["BAR6", "bar", "", "-1", "x", "BAR-1"] {
            assert!(region(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bytes_are_pairs_of_digits() {
        assert_eq!(hex("00fF1a"), Ok(Bytes(vec![0, 255, 26])));
        for wrong in ["", "0", "0x00", "zz", "éé"] {
            assert!(hex(wrong).is_err(), "{wrong}");
        }
        assert!(size("0").is_err() && size("1M").is_ok() && size("0x100001").is_err());
    }
}
