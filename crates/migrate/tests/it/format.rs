//! The format stays what docs/stream.md says, and streams of every version stay readable.

use limosa_migrate::inspect;
use limosa_stream::{
    DATA_BYTES_MAX, DEVICE_BYTES_MAX, DEVICES_MAX, HEADER_BYTES, Header, Kind, LINKS_MAX, MEMORY_BYTES_MAX,
    MEMORY_REGIONS_MAX, MigrationId, NAME_BYTES_MAX, OFFER_BYTES_MAX, PREFACE_BYTES, Preface, PrefaceFlags,
    REASON_BYTES_MAX, REGIONS_MAX, VERSION, WINDOW_BYTES_MIN,
};

const DOCUMENT: &str = include_str!("../../../../docs/stream.md");

/// The cells of the tables' rows.
fn rows() -> impl Iterator<Item = Vec<&'static str>> {
    let row = |line: &'static str| line.strip_prefix("| ")?.strip_suffix(" |");
    DOCUMENT.lines().filter_map(row).map(|row| row.split(" | ").map(str::trim).collect())
}

#[test]
fn every_kind_is_documented_under_its_number() {
    let documented: Vec<(u16, &str)> =
        rows().filter_map(|row| Some((row[0].parse().ok()?, *row.get(1)?))).collect();
    let known: Vec<(u16, &str)> = (0..200).filter_map(|kind| Some((kind, Kind(kind).name()?))).collect();
    assert_eq!(documented, known);
    for (kind, name) in known {
        let text = rows().find(|row| row.get(1) == Some(&name)).unwrap().concat();
        assert_eq!(text.contains("SKIPPABLE"), Kind(kind).is_skippable(), "{name}");
        assert_eq!(text.contains("proof"), Kind(kind).proof_bytes() > 0, "{name}");
    }
}

#[test]
fn every_limit_is_documented() {
    let limits: [(&str, u64, &str); 11] = [
        ("DATA_BYTES_MAX", DATA_BYTES_MAX as u64, "1 MiB"),
        ("OFFER_BYTES_MAX", OFFER_BYTES_MAX as u64, "256 KiB"),
        ("REASON_BYTES_MAX", REASON_BYTES_MAX as u64, "4 KiB"),
        ("DEVICES_MAX", DEVICES_MAX as u64, "64"),
        ("LINKS_MAX", LINKS_MAX.into(), "16"),
        ("WINDOW_BYTES_MIN", WINDOW_BYTES_MIN, "64 KiB"),
        ("REGIONS_MAX", REGIONS_MAX as u64, "256"),
        ("MEMORY_REGIONS_MAX", MEMORY_REGIONS_MAX as u64, "256"),
        ("MEMORY_BYTES_MAX", MEMORY_BYTES_MAX, "2^48"),
        ("NAME_BYTES_MAX", NAME_BYTES_MAX as u64, "255"),
        ("DEVICE_BYTES_MAX", DEVICE_BYTES_MAX, "2^40"),
    ];
    for (name, value, text) in limits {
        let row = rows().find(|row| row[0].starts_with(&format!("`{name}`")));
        assert_eq!(row.map(|row| row[1]), Some(text), "{name}");
        let number = match text.split_once(' ') {
            Some((number, "MiB")) => number.parse::<u64>().unwrap() << 20,
            Some((number, _)) => number.parse::<u64>().unwrap() << 10,
            None => match text.strip_prefix("2^") {
                Some(power) => 1 << power.parse::<u32>().unwrap(),
                None => text.parse().unwrap(),
            },
        };
        assert_eq!(number, value, "{name}");
    }
    assert!(DOCUMENT.contains(&format!("this page is version {VERSION}")));
    assert!(DOCUMENT.contains(&format!("## Preface: {PREFACE_BYTES} bytes")));
    assert!(DOCUMENT.contains(&format!("## Frame: {HEADER_BYTES} bytes")));
}

#[test]
fn fields_lie_where_the_document_draws_them() {
    let id = MigrationId(*b"0123456789abcdef");
    let preface = Preface::new(id, PrefaceFlags::STORED).encode();
    assert_eq!(&preface[..8], b"\x89LMSA\r\n\x1a");
    assert_eq!(preface[8..16], [1, 0, 1, 0, 1, 0, 0, 0]);
    assert_eq!(&preface[16..32], b"0123456789abcdef");
    assert_eq!(preface[32..36], [0; 4]);
    assert_eq!(preface[36..], crc32c::crc32c(&preface[..36]).to_le_bytes());
    let header = Header::new(Kind::DEVICE_DATA, 0x0403_0201, 0x0807_0605_0403_0201, 5, b"abc").encode();
    assert_eq!(header[..16], [4, 0, 0, 0, 1, 2, 3, 4, 3, 0, 0, 0, 5, 0, 0, 0]);
    assert_eq!(header[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(header[24..28], crc32c::crc32c(b"abc").to_le_bytes());
    assert_eq!(header[28..], crc32c::crc32c(&header[..28]).to_le_bytes());
}

#[test]
fn a_stream_of_version_1_stays_readable() {
    let stream = include_bytes!("streams/version-1");
    let inspection = inspect(&stream[..]).unwrap();
    assert!(inspection.whole && inspection.stored, "{inspection}");
    assert_eq!(inspection.version, Some(1));
    assert_eq!(inspection.devices.len(), 1);
    assert_eq!((inspection.devices[0].name.as_str(), inspection.devices[0].bytes), ("d", 4));
}
