//! The capabilities in a vfio-user VERSION message.
//!
//! Input: the JSON with its NUL.

use limosa_vfio_user::version::Capabilities;

/// See the module.
pub fn run(data: &[u8]) {
    if let Ok(read) = Capabilities::decode(data) {
        let written = read.encode(usize::MAX);
        assert_eq!(Capabilities::decode(&written).ok().as_ref(), Some(&read));
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("nothing", b"{}\0".to_vec()),
        ("ours", Capabilities::of_client(1 << 20, true).encode(usize::MAX)),
        (
            "qemu",
            br#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_data_xfer_size": 1048576,
                "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#
                .iter()
                .chain(&[0])
                .copied()
                .collect(),
        ),
        ("deep", [&[b'['; 300][..], &[0]].concat()),
        ("unterminated", b"{\"capabilities\": {}}".to_vec()),
    ]
}
