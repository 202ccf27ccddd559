//! [`Chance`]: draws from a seed, apart from those of the simulator.

/// Draws from a seed (SplitMix64); apart from the simulator's own draws, so that a plan can be read before it runs.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ 0x006c_696d_6f73_6100)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// As often small as large.
    pub fn log_below(&mut self, bound: u64) -> u64 {
        let bits = 64 - bound.max(1).leading_zeros();
        let magnitude = self.below(u64::from(bits) + 1) as u32;
        self.below(1u64.checked_shl(magnitude).unwrap_or(u64::MAX)).min(bound)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
