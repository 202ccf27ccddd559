//! Payloads that are compressed.
//!
//! Input: with what (u8), whether the rest is compressed already (u8), the rest.

use limosa_stream::{Compression, DATA_BYTES_MAX, Header, Kind, Packer, Unpacker};

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let compression = Compression::ALL[usize::from(input.take::<u8>()) % Compression::ALL.len()];
    let is_packed = input.take::<u8>() != 0;
    let rest = &input.0[..input.0.len().min(DATA_BYTES_MAX)];
    if rest.is_empty() {
        return;
    }
    let mut raw = Vec::new();
    let mut unpacker = Unpacker::new(compression).expect("memory");
    let header = |payload: &[u8]| Header::new(Kind::MEMORY_DATA, 0, 0, 0, payload);
    if is_packed {
        if let Ok(found) = unpacker.unpack(&header(rest), rest, &mut raw) {
            assert_eq!(found, header(&raw));
            assert!(raw.len() > rest.len() && raw.len() <= DATA_BYTES_MAX);
        }
    } else if let Some(packed) = Packer::new(compression).expect("memory").pack(rest) {
        assert!(packed.len() < rest.len());
        assert_eq!(unpacker.unpack(&header(packed), packed, &mut raw), Ok(header(rest)));
        assert!(raw == rest);
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let payload = [[7; 300].as_slice(), b"once upon a time, once upon a time"].concat();
    let packed = |number: usize| {
        let mut packer = Packer::new(Compression::ALL[number]).expect("memory");
        let packed = packer.pack(&payload).expect("it becomes shorter").to_vec();
        [&[number as u8, 1][..], &packed].concat()
    };
    // Says that it was a megabyte.
    let lie = |mut seed: Vec<u8>| {
        seed[2..6].copy_from_slice(&(DATA_BYTES_MAX as u32).to_le_bytes());
        seed
    };
    vec![
        ("zstd", packed(0)),
        ("lz4", packed(1)),
        ("zstd-lie", lie(packed(0))),
        ("lz4-lie", lie(packed(1))),
        ("raw-zstd", [&[0, 0][..], &payload].concat()),
        ("raw-lz4", [&[1, 0][..], &payload].concat()),
    ]
}
