//! Stochastic rounding to bf16.

use half::bf16;

/// Rounds to bf16: up in magnitude with the probability that the value's distance from the lower neighbour gives, so that the
/// mean over many roundings is the value itself (Gupta et al. 2015). The upper 16 bits of `word` are the random number.
///
/// A value that bf16 holds stays as it is, to the bit; what is not finite is rounded to the nearest.
#[inline(always)]
pub fn round_stochastically(value: f32, word: u32) -> bf16 {
    if !value.is_finite() {
        return bf16::from_f32(value);
    }
    // No overflow: the exponent's bits of a finite value are not all set, so the sum stays below 2^32.
    bf16::from_bits(((value.to_bits() + (word >> 16)) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Philox, Purpose};

    #[test]
    fn the_mean_of_many_roundings_is_the_value_and_each_is_a_neighbour_of_it() {
        let words = Philox::new(11, Purpose::Rounding, 0);
        let draws = 4096u64;
        for (i, value) in [1.0f32, 1.001, -3.3333, 0.1, 1e-30, -7.77e20, 65535.9].into_iter().enumerate() {
            let low = bf16::from_bits((value.to_bits() >> 16) as u16);
            let high = bf16::from_bits(low.to_bits() + 1);
            let mut sum = 0.0;
            for draw in 0..draws {
                let rounded = round_stochastically(value, words.word(i as u64 * draws + draw));
                assert!(rounded == low || rounded == high, "{rounded} for {value}");
                sum += f64::from(rounded.to_f32());
            }
            let gap = f64::from(high.to_f32()) - f64::from(low.to_f32());
            // Five standard deviations of the mean of a coin.
            let allowed = 5.0 * gap.abs() * 0.5 / (draws as f64).sqrt();
            let error = (sum / draws as f64 - f64::from(value)).abs();
            assert!(error <= allowed, "{value}: the mean is off by {error}, more than {allowed}");
        }
    }

    #[test]
    fn what_bf16_holds_stays_and_what_is_not_finite_stays_so() {
        for bits in (0..=u16::MAX).step_by(3) {
            let value = bf16::from_bits(bits);
            let rounded = round_stochastically(value.to_f32(), u32::MAX);
            assert!(rounded.to_bits() == bits || value.is_nan() && rounded.is_nan(), "{bits:04x}");
        }
    }
}
