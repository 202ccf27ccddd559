//! A snapshot altered on its way, or exchanged while it is loaded, is refused by its seal.

use super::*;

#[test]
fn a_saved_stream_ends_with_the_hash_of_all_before_it() {
    let (bytes, ends) = saved();
    let (kind, at, payload) = frames(&bytes).pop().unwrap();
    assert_eq!((kind, at), (Kind::SEAL, bytes.len() - SEAL_BYTES));
    assert_eq!(bytes[payload..payload + 8], (at as u64).to_le_bytes());
    assert_eq!(bytes[payload + 8..], *blake3::hash(&bytes[..at]).as_bytes());
    let place = Handle(Arc::new(Place::of(&bytes)));
    let verified = verify(&place, ends.options.silence_max, None).unwrap();
    assert!(verified.sealed);
    assert_eq!((verified.bytes, verified.covered_bytes), (bytes.len() as u64, at as u64));
    assert_eq!(verified.blake3, *blake3::hash(&bytes[..at]).as_bytes());
}

#[test]
fn a_stream_altered_with_all_checksums_of_its_frames_made_to_fit_is_refused_by_its_seal() {
    let (bytes, ends) = saved();
    let received = load(&ends, Place::of(&forged(&bytes)));
    let Received::Discarded { why: Error::Stream { damage: Damage::Seal { .. }, from }, .. } = received
    else {
        panic!("{received:?}")
    };
    assert_eq!(from, format!("the place, byte {}", bytes.len() - SEAL_BYTES));
    assert!(!ends.destination[0].holds_guest());
    let (_, _, there) = ends.memory.as_ref().map(|(here, there, bytes)| (here, bytes, there)).unwrap();
    let mut page = vec![1; 4096];
    there.read(12288, &mut page).unwrap();
    assert_eq!(page, [0; 4096], "not even memory was touched");
}

#[test]
fn what_is_put_in_a_snapshot_s_place_while_it_is_loaded_is_discarded() {
    let (bytes, ends) = saved();
    let altered = forged(&bytes);
    let seconds =
        [altered, bytes[..bytes.len() / 2].to_vec(), bytes[..bytes.len() - SEAL_BYTES - 1].to_vec(), vec![]];
    for second in seconds {
        let what = format!("{} of {} bytes", second.len(), bytes.len());
        let received = load(&ends, Place { second: Some(second), ..Place::of(&bytes) });
        let Received::Discarded { why: why @ Error::Snapshot { .. }, .. } = received else {
            panic!("{what}: {received:?}")
        };
        assert!(why.to_string().contains("altered while it was being loaded"), "{what}: {why}");
        assert!(!ends.destination[0].holds_guest(), "{what}");
        assert_eq!(ends.destination[0].state(), State::Running, "{what}: as it was found");
    }
    assert!(matches!(load(&ends, Place::of(&bytes)), Received::Runs(_)));
}
