//! Counter-based random numbers: Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011).
//!
//! A value depends on seed, stream and position alone, never on how many were drawn before: initialization, shuffling,
//! augmentation and dropout give the same values on every device, for any number of threads, and after a resume.

const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;

/// One Philox4x32-10 block: four random words for a counter under a key.
#[inline(always)]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(WEYL_0);
            key[1] = key[1].wrapping_add(WEYL_1);
        }
        let p0 = u64::from(MULTIPLIER_0) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIER_1) * u64::from(counter[2]);
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// What a stream of random numbers is for. Streams never share values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial values of parameters.
    Initialization = 1,
    /// The order of samples in an epoch.
    Shuffle = 2,
    /// Random crops, flips and masks.
    Augmentation = 3,
    /// Dropout masks.
    Dropout = 4,
    /// Tokens drawn by `generate`.
    Sampling = 5,
    /// Which samples belong to which split.
    Split = 6,
    /// Stochastic rounding of parameters.
    Rounding = 7,
    /// Which parts of an update are checked.
    Shadow = 8,
}

/// A stream of random numbers: the words of `(seed, purpose, stream)` at 64-bit positions.
///
/// Position `4 i + j` is word `j` of block `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    high: [u32; 2],
}

impl Philox {
    /// The stream `stream` of `purpose` under `seed`.
    pub fn new(seed: u64, purpose: Purpose, stream: u32) -> Self {
        Philox { key: [seed as u32, (seed >> 32) as u32], high: [stream, purpose as u32] }
    }

    /// The four words of block `block`: positions `4 block .. 4 block + 4`.
    #[inline(always)]
    pub fn block(&self, block: u64) -> [u32; 4] {
        philox4x32([block as u32, (block >> 32) as u32, self.high[0], self.high[1]], self.key)
    }

    /// The word at `position`.
    #[inline]
    pub fn word(&self, position: u64) -> u32 {
        self.block(position / 4)[(position % 4) as usize]
    }

    /// `words` = those of 16 blocks from block `first` on, side by side, so that compilers turn them into vectors. Each word lies in 64
    /// bits, as the products are, and only the lower half of these counts until the end: nothing is widened or narrowed between.
    #[inline(always)]
    fn sixteen_blocks(&self, first: u64, words: &mut [u32; 64]) {
        const LOW: u64 = 0xFFFF_FFFF;
        let mut c0: [u64; 16] = std::array::from_fn(|i| first.wrapping_add(i as u64));
        let mut c1 = c0.map(|block| block >> 32);
        let [mut c2, mut c3] = self.high.map(|word| [u64::from(word); 16]);
        let mut key = self.key;
        for _ in 0..10 {
            let [k0, k1] = key.map(u64::from);
            for i in 0..16 {
                let p0 = u64::from(MULTIPLIER_0) * (c0[i] & LOW);
                let p1 = u64::from(MULTIPLIER_1) * (c2[i] & LOW);
                (c0[i], c1[i]) = ((p1 >> 32) ^ c1[i] ^ k0, p1);
                (c2[i], c3[i]) = ((p0 >> 32) ^ c3[i] ^ k1, p0);
            }
            key = [key[0].wrapping_add(WEYL_0), key[1].wrapping_add(WEYL_1)];
        }
        for (i, block) in words.chunks_exact_mut(4).enumerate() {
            (block[0], block[1], block[2], block[3]) = (c0[i] as u32, c1[i] as u32, c2[i] as u32, c3[i] as u32);
        }
    }

    /// The words from `position` on, `=`.
    #[inline(always)]
    pub fn words(&self, position: u64, words: &mut [u32]) {
        let mut at = position;
        let mut rest = words;
        while !rest.is_empty() {
            let skip = (at % 4) as usize;
            let count = if skip == 0
                && let Some(whole) = rest.first_chunk_mut::<64>()
            {
                self.sixteen_blocks(at / 4, whole);
                64
            } else if rest.len() >= 16 {
                // Sixteen blocks at once cost little more than four one by one.
                let mut whole = [0; 64];
                self.sixteen_blocks(at / 4, &mut whole);
                let count = (64 - skip).min(rest.len());
                rest[..count].copy_from_slice(&whole[skip..skip + count]);
                count
            } else {
                let count = (4 - skip).min(rest.len());
                rest[..count].copy_from_slice(&self.block(at / 4)[skip..skip + count]);
                count
            };
            at = at.wrapping_add(count as u64);
            rest = &mut rest[count..];
        }
    }

    /// A uniform value in `[0, 1)` with 24 bits.
    #[inline]
    pub fn uniform(&self, position: u64) -> f32 {
        to_unit(self.word(position))
    }

    /// A whole number in `0..bound`, by multiplication of a 64-bit word (bias below `bound / 2^64`).
    pub fn below(&self, position: u64, bound: u64) -> u64 {
        let words = self.block(position);
        let word = u64::from(words[0]) | u64::from(words[1]) << 32;
        ((u128::from(word) * u128::from(bound)) >> 64) as u64
    }

    /// A value of the standard normal distribution, by Box and Muller over one block (53-bit arithmetic).
    pub fn normal(&self, position: u64) -> f64 {
        let words = self.block(position / 2);
        let pair = (position % 2) as usize * 2;
        let u = (f64::from(words[pair]) + 1.0) / 4_294_967_297.0;
        let angle = f64::from(words[pair + 1]) / 4_294_967_296.0 * std::f64::consts::TAU;
        (-2.0 * u.ln()).sqrt() * angle.cos()
    }

    /// `order`, shuffled in place: Fisher and Yates with the stream's own numbers.
    pub fn shuffle<T>(&self, order: &mut [T]) {
        for i in (1..order.len()).rev() {
            let j = self.below(i as u64, i as u64 + 1) as usize;
            order.swap(i, j);
        }
    }
}

/// The upper 24 bits of a word as a value in `[0, 1)`.
#[inline(always)]
pub fn to_unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's `kat_vectors` for philox4x32 with 10 rounds.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn words_are_the_same_one_by_one_and_many_at_once() {
        let stream = Philox::new(3, Purpose::Dropout, 9);
        for start in [0, 1, 5, (1 << 34) - 30, (3 << 40) + 2] {
            for len in [0, 1, 3, 15, 16, 17, 64, 200] {
                let mut words = vec![0; len];
                stream.words(start, &mut words);
                let expected: Vec<u32> = (0..len as u64).map(|i| stream.word(start + i)).collect();
                assert_eq!(words, expected, "{len} from {start}");
            }
        }
    }

    #[test]
    fn normal_values_have_mean_zero_and_variance_one() {
        let stream = Philox::new(7, Purpose::Initialization, 0);
        let n = 100_000;
        let values: Vec<f64> = (0..n).map(|i| stream.normal(i)).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.015, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
    }

    #[test]
    fn a_shuffle_is_a_permutation_and_depends_on_the_seed() {
        let mut a: Vec<u32> = (0..100).collect();
        let mut b = a.clone();
        Philox::new(1, Purpose::Shuffle, 0).shuffle(&mut a);
        Philox::new(2, Purpose::Shuffle, 0).shuffle(&mut b);
        assert_ne!(a, b);
        a.sort_unstable();
        assert_eq!(a, (0..100).collect::<Vec<u32>>());
    }
}
