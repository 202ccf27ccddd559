//! vfio-user commands.
//!
//! Input: the header, then the body, of which as much is there as there is.

use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_user::codec::{Command, DmaMapMessage, Header, MigData, RegionAccess, Request};
use zerocopy::IntoBytes;

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let header: Header = input.take();
    let body = input.0;
    let _ = (header.kind(), header.body_bytes());
    // As a server does: all of the body, and as little of it as is needed to decode it.
    let whole = Request::decode(header.command, body, body.len());
    let head = &body[..header.command.head_bytes(body.len()).min(body.len())];
    let part = Request::decode(header.command, head, body.len());
    assert_eq!(whole.is_ok(), part.is_ok());
    let claimed = header.size.saturating_sub(Header::BYTES as u32) as usize;
    let _ = Request::decode(header.command, body, claimed);
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let message = |command, body: &[&[u8]]| {
        let body = body.concat();
        let header = Header::command(1, command, body.len()).expect("a short message");
        [header.as_bytes(), &body].concat()
    };
    let map = DmaMapMessage {
        argsz: size_of::<DmaMapMessage>() as u32,
        flags: DmaMapFlags::all().bits(),
        offset: 0,
        address: 0x100000,
        size: 0x10000,
    };
    let access = RegionAccess { offset: 0x10, region: 0, count: 4 };
    let data = MigData { argsz: 12, size: 4 };
    vec![
        ("version", message(Command::VERSION, &[&[0; 4], b"{}\0"])),
        ("dma_map", message(Command::DMA_MAP, &[map.as_bytes()])),
        ("region_read", message(Command::REGION_READ, &[access.as_bytes()])),
        ("region_write", message(Command::REGION_WRITE, &[access.as_bytes(), b"data"])),
        ("mig_data_write", message(Command::MIG_DATA_WRITE, &[data.as_bytes(), b"data"])),
        ("device_feature", message(Command::DEVICE_FEATURE, &[&16u32.to_ne_bytes(), &[1, 0, 1, 0], &[0; 8]])),
        ("reset", message(Command::DEVICE_RESET, &[])),
        ("unknown", message(Command(4711), &[b"body"])),
    ]
}
