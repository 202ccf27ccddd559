//! `limosa region`: what is read and written, and what is refused.

use crate::support::{Folder, JsonOutput, limosa};
use limosa_models::synthetic::{REGISTERS_REGION, registers};

const USAGE: i32 = 2;
const REFUSED: i32 = 3;

#[test]
fn bytes_of_a_region_are_written_and_read() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let (region, at) = (REGISTERS_REGION.to_string(), format!("{:#x}", registers::SCRATCH));
    let write = ["region", "write", &device.socket, &region, "--offset", &at, "8877665544332211"];
    let written = limosa(&write).ok();
    assert!(written.contains("8 bytes written"), "{written}");
    assert_eq!(device.register(registers::SCRATCH), 0x1122_3344_5566_7788);
    let read = ["region", "read", &device.socket, &region, "--offset", &at, "--size", "8"];
    let text = limosa(&read).ok();
    assert_eq!(text, format!("{:08x}  88 77 66 55 44 33 22 11\n", registers::SCRATCH));
    let json = limosa(&[&["--json"], &read[..]].concat()).json();
    assert_eq!((&json["data"], &json["bytes"]), (&"8877665544332211".into(), &8.into()));
    // Configuration space begins with the vendor's number.
    let config = limosa(&["region", "read", &device.socket, "config", "--size", "4"]).ok();
    assert_eq!(config, "00000000  4d 4c 59 53\n");
}

#[test]
fn what_is_out_of_bounds_or_not_allowed_is_refused() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let socket = &device.socket[..];
    for (args, code, parts) in [
        (&["read", socket, "BAR0", "--offset", "4096"][..], REFUSED, &["0x1000 bytes", "offset 0x1000"][..]),
        (
            &["read", socket, "BAR0", "--offset", "4090", "--size", "7"],
            REFUSED,
            &["0x6 bytes", "0x7 were asked for"],
        ),
        (&["write", socket, "BAR0", "--offset", "4095", "0000"], REFUSED, &["0x1 bytes", "0x2"]),
        (&["write", socket, "BAR2", "00"], REFUSED, &["BAR2 cannot be written", "limosa probe"]),
        (&["read", socket, "77"], REFUSED, &["there is no region 77"]),
        (&["read", socket, "BAR7"], USAGE, &["BAR0 to BAR5"]),
        (&["write", socket, "BAR0", "0"], USAGE, &["two hexadecimal digits"]),
        (&["read", socket, "BAR0", "--size", "0"], USAGE, &["1 to"]),
        (&["read", &folder.text("none"), "BAR0"], 4, &["no such socket"]),
    ] {
        limosa(&[&["region"], args].concat()).fails(code, parts);
    }
}

#[test]
fn standard_output_was_a_file_with_a_dash_for_a_name() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    limosa(&["save", &device.socket, "-"]).fails(USAGE, &["-", "limosa send"]);
    limosa(&["load", "-", &device.socket]).fails(USAGE, &["-", "standard input"]);
    limosa(&["inspect", "-"]).fails(USAGE, &["-", "a file"]);
}
