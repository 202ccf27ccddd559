//! Random sequences, legal and illegal, from a seed.

use limosa_protocol::{FeatureIndex, FeatureOp, State};

use super::request::{Request, Script};
use crate::survey::LOGGED;

/// SplitMix64: a seed gives the same numbers on every machine.
pub(super) struct Random(u64);

impl Random {
    /// The numbers of one sequence of a run.
    pub fn new(seed: u64, sequence: u64) -> Random {
        let mut random = Random(seed ^ sequence.wrapping_mul(0xa076_1d64_78bd_642f));
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// The most requests of a sequence's first thread.
const LENGTH_MAX: u64 = 48;

/// A random script for this number of threads.
pub(super) fn script(random: &mut Random, threads: usize) -> Script {
    let length = 1 + random.below(LENGTH_MAX);
    let mut script = Vec::new();
    for _ in 0..length {
        script.push((0, driving(random)));
        for thread in 1..threads {
            script.push((thread, looking(random)));
        }
    }
    Script(script)
}

fn driving(random: &mut Random) -> Request {
    const SIZES: [usize; 6] = [1, 7, 64, 4096, 4097, 100_000];
    match random.below(40) {
        0..=15 => Request::SetState(random.one_of(&State::ALL).raw()),
        16 => Request::SetState(random.one_of(&[8, 9, 255, u32::MAX])),
        17..=19 => Request::GetState,
        20 => Request::Reset,
        21..=24 => Request::Read(random.one_of(&SIZES)),
        25 => Request::OldRead(random.one_of(&SIZES)),
        26..=28 => Request::WriteState(random.one_of(&[1, 64, 4096, 1 << 20, 1 << 20])),
        29 => Request::WriteJunk(random.one_of(&SIZES)),
        30 => Request::Drop,
        31..=32 => Request::PrecopyInfo,
        33 => Request::DataSize,
        34 => Request::LogStart(random.one_of(&[4096, 65536]), LOGGED.iova, LOGGED.length),
        35 => Request::LogStop,
        36..=37 => {
            Request::LogReport(random.one_of(&[4096, 65536]), LOGGED.iova, 1 << random.one_of(&[12, 16, 20]))
        }
        _ => feature(random),
    }
}

/// A request that does not change the device.
fn looking(random: &mut Random) -> Request {
    match random.below(4) {
        0 | 1 => Request::GetState,
        2 => Request::DataSize,
        _ => feature(random),
    }
}

/// A FEATURE request that has no effect: a probe, or one that is wrong.
fn feature(random: &mut Random) -> Request {
    let (get, set, probe) = (FeatureOp::GET.bits(), FeatureOp::SET.bits(), FeatureOp::PROBE.bits());
    let index = random.one_of(&[
        FeatureIndex::MIGRATION.0,
        FeatureIndex::MIG_DEVICE_STATE.0,
        FeatureIndex::DMA_LOGGING_START.0,
        FeatureIndex::DMA_LOGGING_REPORT.0,
        FeatureIndex::MIG_DATA_SIZE.0,
        13,
        0x1234,
        u16::MAX,
    ]);
    let op = random.one_of(&[probe, probe | get, probe | set, probe | get | set, 0, get | set, 1 << 25]);
    Request::Feature(op, index, random.one_of(&[0, 1, 8, 64]))
}
