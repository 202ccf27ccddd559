//! The inspection of a saved stream.
//!
//! Input: the stream.

use limosa_migrate::inspect;
use limosa_migrate::stream::body::encode_device_end;
use limosa_migrate::stream::{DeviceFacts, Header, Kind, MigrationId, Offer, Preface, PrefaceFlags, Totals};

/// See the module.
pub fn run(data: &[u8]) {
    let inspection = inspect(data).expect("a slice can be read");
    assert_eq!(inspection.whole, inspection.damage.is_empty());
    assert_eq!(inspection.bytes, data.len() as u64);
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
    let frames: [(Kind, &[u8]); 6] = [
        (Kind::OFFER, &offer),
        (Kind::DEVICE_BEGIN, &[]),
        (Kind::DEVICE_DATA, b"data"),
        (Kind::STOPPED, &[]),
        (Kind::DEVICE_END, &encode_device_end(4, 0xaed8_7dd1)),
        (Kind::SUM, &sum.encode()),
    ];
    let mut whole = Preface::new(MigrationId([9; 16]), PrefaceFlags::STORED).encode().to_vec();
    for (sequence, (kind, payload)) in frames.iter().enumerate() {
        whole.extend(Header::new(*kind, 0, 0, sequence as u32, payload).encode());
        whole.extend_from_slice(payload);
    }
    let preface = whole[..40].to_vec();
    vec![("whole", whole), ("preface", preface), ("empty", Vec::new())]
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
}
