//! Deterministic random numbers (splitmix64) and the values that break
//! processors: boundaries, signs, NaNs, denormals, infinities.

/// A stream of random numbers that depends on its seed alone.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream from a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The stream of one case, unlike that of its neighbours.
    pub fn for_case(seed: u64, index: u64) -> Self {
        let mut mix = Self(seed ^ index.wrapping_mul(0xd134_2543_de82_ef95));
        Self(mix.next() ^ index.rotate_left(32))
    }

    /// 64 random bits.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True in `percent` of 100 times.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the choices.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// An integer where things change: 0, 1, -1, a power of two or its
    /// neighbours, a small number, or anything.
    pub fn integer(&mut self) -> u64 {
        match self.below(10) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 | 4 => {
                let power = 1u64 << self.below(64);
                let near = power.wrapping_add(self.below(3)).wrapping_sub(1);
                if self.one_in(2) {
                    near
                } else {
                    near.wrapping_neg()
                }
            }
            5 => self.below(256),
            6 => self.below(256).wrapping_neg(),
            7 => self.next() >> self.below(64),
            8 => u64::from(self.next() as u32),
            _ => self.next(),
        }
    }

    /// Bits of a double.
    pub fn double(&mut self) -> u64 {
        const ODD: [u64; 14] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0xfff8_0000_0000_0000,
            0x7ff4_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
            0x0010_0000_0000_0000,
            0x7fef_ffff_ffff_ffff,
            0x41df_ffff_ffc0_0000,
        ];
        match self.below(4) {
            0 => self.pick(&ODD),
            1 => self.next(),
            2 => (self.next() as i32 as f64 / 16.0).to_bits(),
            _ => (self.next() & 0x800f_ffff_ffff_ffff) | (1023 - 8 + self.below(16)) << 52,
        }
    }

    /// Bits of a float, in the low half.
    pub fn float(&mut self) -> u64 {
        const ODD: [u32; 12] = [
            0,
            1 << 31,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7fa0_0001,
            1,
            0x007f_ffff,
            0x0080_0000,
            0x7f7f_ffff,
        ];
        u64::from(match self.below(4) {
            0 => self.pick(&ODD),
            1 => self.next() as u32,
            2 => (self.next() as i16 as f32 / 4.0).to_bits(),
            _ => (self.next() as u32 & 0x807f_ffff) | ((127 - 8 + self.below(16) as u32) << 23),
        })
    }

    /// An 80-bit x87 value.
    pub fn extended(&mut self) -> [u8; 10] {
        let (mantissa, exponent): (u64, u16) = match self.below(10) {
            0 => (0, 0),
            1 => (0, 0x8000),
            2 => (1 << 63, 0x3fff),
            3 => (1 << 63, 0x7fff),
            4 => (0xc000_0000_0000_0000, 0xffff),
            5 => (0xa000_0000_0000_0001, 0x7fff),
            6 => (self.next() >> 1, 0),
            7 => (self.next(), self.next() as u16),
            _ => (
                self.next() | 1 << 63,
                (0x3fff - 16 + self.below(64) as u16) | if self.one_in(2) { 0x8000 } else { 0 },
            ),
        };
        let mut value = [0; 10];
        value[..8].copy_from_slice(&mantissa.to_le_bytes());
        value[8..].copy_from_slice(&exponent.to_le_bytes());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_same_for_ever() {
        // Values of splitmix64 seeded with 1234567, from its author's page.
        let mut random = Random::new(1234567);
        assert_eq!(random.next(), 6457827717110365317);
        assert_eq!(random.next(), 3203168211198807973);
        assert!((0..1000).all(|_| random.below(7) < 7));
    }
}
