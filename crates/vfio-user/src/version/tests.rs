//! What peers announce, well-formed and not, and what is agreed on.

use proptest::prelude::*;

use super::*;

const QEMU: &[u8] = b"{\"capabilities\": {\"pgsizes\": 4096, \"max_msg_fds\": 16, \"max_dma_maps\": 65535, \
    \"max_data_xfer_size\": 1048576, \"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \
    \"write_multiple\": true}}\0";

#[test]
fn what_qemu_announces_is_understood() {
    assert_eq!(QEMU.len() + 16 + 4, REPLY_BYTES_MAX);
    let caps = Capabilities::decode(QEMU).unwrap();
    assert_eq!(caps.max_msg_fds, Some(16));
    assert_eq!(
        caps.migration,
        Some(MigrationCapability { pgsize: Some(4096), max_bitmap_size: Some(1 << 28) })
    );
    assert_eq!(Capabilities::decode(&caps.encode(JSON_BYTES_MAX)).unwrap(), caps);
}

#[test]
fn nothing_is_offered_that_the_client_did_not_announce() {
    let ours = Capabilities {
        twin_socket: Some(TwinSocket { supported: true, fd_index: Some(0) }),
        migration: Some(MigrationCapability { pgsize: Some(4096), max_bitmap_size: None }),
        ..Capabilities::of_client(1 << 20, true)
    };
    let answer = ours.answer(&Capabilities::default());
    assert_eq!((answer.write_multiple, answer.twin_socket, answer.migration), (None, None, None));
    let answer = ours.answer(&Capabilities::decode(QEMU).unwrap());
    assert_eq!((answer.write_multiple, answer.twin_socket), (Some(true), None));
    assert!(answer.migration.is_some());
}

#[test]
fn the_longest_answer_fits_qemus_buffer() {
    let longest = Capabilities {
        max_msg_fds: Some(16),
        max_data_xfer_size: Some(DATA_XFER_BYTES_MAX.into()),
        max_dma_maps: Some(65535),
        pgsizes: Some(u64::MAX << 12),
        write_multiple: Some(true),
        twin_socket: Some(TwinSocket { supported: true, fd_index: Some(15) }),
        migration: Some(MigrationCapability { pgsize: Some(1 << 30), max_bitmap_size: Some(1 << 28) }),
        role: Some(Role::Either),
    };
    let room = REPLY_BYTES_MAX - 20;
    let data = longest.encode(room);
    assert!(data.len() <= room, "{}", data.len());
    let kept = Capabilities::decode(&data[..]);
    assert_eq!(kept.unwrap().twin_socket, longest.twin_socket, "what matters most is kept");
    assert_eq!(longest.encode(0), b"{\"capabilities\":{}}\0", "there is always an object");
}

#[test]
fn silence_means_the_specifications_defaults() {
    for data in [&b""[..], b"\0", b"{}\0", b"{\"capabilities\":{}}\0", b"{\"other\":[1,{}]}\0"] {
        let caps = Capabilities::decode(data).unwrap();
        let limits = Limits::agree(0, &caps, &caps, &caps);
        assert_eq!(limits.msg_fds_max, 1);
        assert_eq!(limits.data_xfer_bytes_max, 1 << 20);
        assert_eq!((limits.dma_maps_max, limits.page_sizes), (65535, 4096));
        assert_eq!((limits.write_multiple, limits.twin_socket), (false, None));
    }
}

#[test]
fn wrong_types_are_refused_by_name() {
    let cases = [
        ("[]", "version data"),
        ("{\"capabilities\":1}", "capabilities"),
        ("{\"capabilities\":{\"max_msg_fds\":\"8\"}}", "max_msg_fds"),
        ("{\"capabilities\":{\"max_msg_fds\":1.5}}", "max_msg_fds"),
        ("{\"capabilities\":{\"max_data_xfer_size\":-1}}", "max_data_xfer_size"),
        ("{\"capabilities\":{\"max_data_xfer_size\":0}}", "max_data_xfer_size"),
        ("{\"capabilities\":{\"max_dma_maps\":null}}", "max_dma_maps"),
        ("{\"capabilities\":{\"pgsizes\":4095}}", "pgsizes"),
        ("{\"capabilities\":{\"pgsizes\":0}}", "pgsizes"),
        ("{\"capabilities\":{\"write_multiple\":1}}", "write_multiple"),
        ("{\"capabilities\":{\"twin_socket\":true}}", "twin_socket"),
        ("{\"capabilities\":{\"twin_socket\":{\"supported\":0}}}", "supported"),
        ("{\"capabilities\":{\"twin_socket\":{\"fd_index\":-1}}}", "fd_index"),
        ("{\"capabilities\":{\"migration\":[]}}", "migration"),
    ];
    for (json, name) in cases {
        let error = Capabilities::decode(format!("{json}\0").as_bytes()).unwrap_err();
        assert!(error.to_string().contains(name), "{json}: {error}");
    }
}

#[test]
fn damaged_deep_and_huge_json_is_refused() {
    assert_eq!(Capabilities::decode(b"{}"), Err(VersionError::NotTerminated));
    assert!(matches!(Capabilities::decode(b"{\0}\0"), Err(VersionError::NotJson(_))));
    assert!(matches!(Capabilities::decode(b"{\"a\":\"\xff\"}\0"), Err(VersionError::NotJson(_))));
    let deep = format!("{}{}\0", "[".repeat(2000), "]".repeat(2000));
    assert!(matches!(Capabilities::decode(deep.as_bytes()), Err(VersionError::NotJson(_))));
    let huge = format!("{{\"a\":\"{}\"}}\0", "x".repeat(JSON_BYTES_MAX));
    assert!(matches!(Capabilities::decode(huge.as_bytes()), Err(VersionError::TooLong(_))));
}

#[test]
fn a_huge_transfer_size_is_clamped() {
    let caps = Capabilities { max_data_xfer_size: Some(u64::MAX), ..Capabilities::default() };
    assert_eq!(Limits::agree(0, &caps, &caps, &caps).data_xfer_bytes_max, DATA_XFER_BYTES_MAX);
    let small = Capabilities { max_data_xfer_size: Some(512), ..Capabilities::default() };
    assert_eq!(Limits::agree(0, &caps, &small, &caps).data_xfer_bytes_max, 512);
    assert_eq!(Limits::agree(0, &small, &caps, &caps).data_xfer_bytes_max, 512);
}

proptest! {
    #[test]
    fn no_bytes_make_decode_panic(data in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Capabilities::decode(&data);
    }

    #[test]
    fn what_is_encoded_is_decoded(
        fds in any::<Option<u64>>(), xfer in prop::option::of(1..u64::MAX), maps in any::<Option<u64>>(),
        pages in prop::option::of(1..1u64 << 40), multi in any::<Option<bool>>(),
        twin in any::<Option<(bool, Option<u64>)>>(),
    ) {
        let caps = Capabilities {
            max_msg_fds: fds,
            max_data_xfer_size: xfer,
            max_dma_maps: maps,
            pgsizes: pages.map(|n| n * 4096),
            write_multiple: multi,
            twin_socket: twin.map(|(supported, fd_index)| TwinSocket { supported, fd_index }),
            migration: None,
            role: None,
        };
        prop_assert_eq!(Capabilities::decode(&caps.encode(JSON_BYTES_MAX)).unwrap(), caps);
    }
}
