//! Requests of the FEATURE multiplexer.
//!
//! Input: the header, then the payload.

use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaBuf, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigState,
    RegionDmaRange,
};
use limosa_protocol::{FeatureHeader, FeatureIndex, FeatureOp, FeaturePayload, State};
use zerocopy::IntoBytes;

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let header: FeatureHeader = input.take();
    let payload = input.0;
    if let Ok(call) = header.call() {
        assert_eq!(FeatureHeader::new(call.index, call.op, call.payload_bytes as u32), header);
        let carried_out = call.index.rules().map(|rules| call.check(rules));
        assert!(carried_out != Some(Ok(true)) || !call.op.contains(FeatureOp::PROBE));
    }
    let index = FeatureIndex(header.flags as u16);
    if let Ok(read) = FeaturePayload::read(index, payload) {
        assert_eq!(read.index(), index);
        let mut written = Vec::new();
        read.write(&mut written);
        assert!(payload.starts_with(&written));
        if let FeaturePayload::DmaBuf(buf, ranges) = read {
            let _ = buf.check(&ranges, 1 << 20);
        }
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let request = |index, op, payload: &[&[u8]]| {
        let payload = payload.concat();
        [FeatureHeader::new(index, op, payload.len() as u32).as_bytes(), &payload].concat()
    };
    let control = FeatureDmaLoggingControl { page_size: 4096, num_ranges: 2, reserved: 0 };
    let ranges = [
        DmaLoggingRange { iova: 0, length: 0xa0000 },
        DmaLoggingRange { iova: 0x100000, length: 0x7ff00000 },
    ];
    let report = FeatureDmaLoggingReport { iova: 0x100000, length: 0x200000, page_size: 4096 };
    let buf = FeatureDmaBuf { region_index: 2, open_flags: 0o2000002, flags: 0, nr_ranges: 1 };
    let part = RegionDmaRange { offset: 0x1000, length: 0x4000 };
    vec![
        ("probe", request(FeatureIndex::MIGRATION, FeatureOp::PROBE | FeatureOp::GET, &[])),
        ("get_migration", request(FeatureIndex::MIGRATION, FeatureOp::GET, &[&[0; 8]])),
        (
            "set_state",
            request(
                FeatureIndex::MIG_DEVICE_STATE,
                FeatureOp::SET,
                &[FeatureMigState::new(State::StopCopy).as_bytes()],
            ),
        ),
        (
            "logging_start",
            request(
                FeatureIndex::DMA_LOGGING_START,
                FeatureOp::SET,
                &[control.as_bytes(), ranges.as_bytes()],
            ),
        ),
        ("logging_report", request(FeatureIndex::DMA_LOGGING_REPORT, FeatureOp::GET, &[report.as_bytes()])),
        ("dma_buf", request(FeatureIndex::DMA_BUF, FeatureOp::GET, &[buf.as_bytes(), part.as_bytes()])),
        ("unknown", request(FeatureIndex(4711), FeatureOp::SET, &[b"payload"])),
        ("get_and_set", [16u32.to_ne_bytes(), (3u32 << 16 | 2).to_ne_bytes(), [0; 4], [0; 4]].concat()),
    ]
}
