//! The inspection of a saved stream.
//!
//! Input: the stream.

use limosa_migrate::inspect;
use limosa_stream::body::encode_device_end;
use limosa_stream::{DeviceFacts, Header, Kind, MigrationId, Offer, Preface, PrefaceFlags, Seal, Totals};

/// See the module.
pub fn run(data: &[u8]) {
    let inspection = inspect(data).expect("a slice can be read");
    assert_eq!(inspection.whole, inspection.damage.is_empty());
    assert_eq!(inspection.bytes, data.len() as u64);
    if inspection.whole {
        let longer = [data, &[0]].concat();
        for other in [&longer[..], &data[..data.len() - 1]] {
            assert!(!inspect(other).expect("a slice can be read").whole, "a byte more or less");
        }
    }
    // Whatever it names, what is told of it stays in proportion to what it is.
    assert!(inspection.to_string().len() <= 4096 + 16 * data.len());
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let offer = Offer {
        devices: vec![DeviceFacts { name: "d".into(), flags: 1, ..DeviceFacts::default() }],
        ..Offer::default()
    };
    let offer = offer.encode().expect("within the limits");
    let sum = Totals { device_bytes: 4, ..Totals::default() };
    let end = encode_device_end(4, 0xaed8_7dd1);
    let frames: [(Kind, &[u8]); 6] = [
        (Kind::OFFER, &offer),
        (Kind::DEVICE_BEGIN, &[]),
        (Kind::DEVICE_DATA, b"data"),
        (Kind::STOPPED, &[]),
        (Kind::DEVICE_END, &end),
        (Kind::SUM, &sum.encode()),
    ];
    let stream = |flags| {
        let mut stream = Preface::new(MigrationId([9; 16]), flags).encode().to_vec();
        for (sequence, (kind, payload)) in frames.iter().enumerate() {
            stream.extend(Header::new(*kind, 0, 0, sequence as u32, payload).encode());
            stream.extend_from_slice(payload);
        }
        stream
    };
    let whole = stream(PrefaceFlags::STORED);
    let preface = whole[..40].to_vec();
    let unsealed = stream(PrefaceFlags::STORED | PrefaceFlags::SEALED);
    let mut sealed = unsealed.clone();
    let seal = Seal { bytes: sealed.len() as u64, blake3: hash(&sealed) }.encode();
    sealed.extend(Header::new(Kind::SEAL, 0, 0, frames.len() as u32, &seal).encode());
    sealed.extend(seal);
    vec![
        ("whole", whole),
        ("preface", preface),
        ("empty", Vec::new()),
        ("sealed", sealed),
        ("seal_missing", unsealed),
    ]
}

/// Of a stream without a SEAL.
fn hash(stream: &[u8]) -> [u8; 32] {
    let digits = inspect(stream).expect("a slice can be read").blake3;
    std::array::from_fn(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_seed_is_whole() {
        let (_, seed) = seeds().remove(0);
        let inspection = inspect(&seed[..]).unwrap();
        assert!(inspection.whole, "{inspection}");
    }

    #[test]
    fn the_sealed_seed_is_whole_and_without_its_seal_it_is_not() {
        let sealed = seeds().remove(3).1;
        let inspection = inspect(&sealed[..]).unwrap();
        assert!(inspection.whole && inspection.sealed, "{inspection}");
        let unsealed = seeds().remove(4).1;
        assert!(!inspect(&unsealed[..]).unwrap().whole);
    }
}
