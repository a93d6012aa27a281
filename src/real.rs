//! The types of values: what training arithmetic is done in (f32, and f64 for checks of gradients and of rounding), and what
//! devices store besides (bf16 and f16).

use std::fmt::{Debug, Display};
use std::iter::Sum;

use half::{bf16, f16};
use num_traits::{Float, NumAssign};

use crate::backend::Numeric;

/// A value as memory holds it.
pub trait Element: Numeric + Default + Debug + PartialEq + 'static {
    /// `f32`, `f64`, `bf16` or `f16`.
    const NAME: &'static str;

    /// The nearest value to `value`.
    fn from_f64(value: f64) -> Self;
    /// The nearest value to `value`.
    fn from_f32(value: f32) -> Self;
    /// The value, exactly.
    fn f64(self) -> f64;
    /// The nearest f32.
    fn f32(self) -> f32;
}

macro_rules! half_element {
    ($($ty:ident),*) => {$(
        impl Element for $ty {
            const NAME: &'static str = stringify!($ty);

            fn from_f64(value: f64) -> Self {
                $ty::from_f64(value)
            }
            fn from_f32(value: f32) -> Self {
                $ty::from_f32(value)
            }
            fn f64(self) -> f64 {
                self.to_f64()
            }
            fn f32(self) -> f32 {
                self.to_f32()
            }
        }
    )*};
}
half_element!(bf16, f16);

/// f32 or f64, with the elementary functions in a form that compilers turn into vector instructions.
pub trait Real: Element + Float + NumAssign + Display + Sum + PartialOrd {
    /// `e^self`. f32: within 2 units in the last place, 0 below about -87.3, without branches.
    fn exp_lane(self) -> Self;
    /// The hyperbolic tangent. f32: within 3 units in the last place of its scale 1, without branches.
    fn tanh_lane(self) -> Self;
    /// `ln(1 + self)` of what is from 0 to 1. f32: within 2e-7 of the value itself, without branches.
    fn ln_1p_lane(self) -> Self;
    /// The error function. f64: to about 1e-15 (Abramowitz and Stegun 7.1). f32: within 1.5e-7, and within 2e-7 of the value
    /// itself, without branches.
    fn erf(self) -> Self;
}

impl Element for f32 {
    const NAME: &'static str = "f32";

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn f32(self) -> f32 {
        self
    }
}

impl Real for f32 {
    /// `2^n * p(r)` with `self = n ln 2 + r`, `|r| <= ln 2 / 2`, and p the Taylor polynomial of degree 7 in Horner form.
    #[inline(always)]
    fn exp_lane(self) -> Self {
        const LN_2_HIGH: f32 = 0.693_145_75; // the upper bits of ln 2: n * LN_2_HIGH is exact for |n| < 2^9
        const LN_2_LOW: f32 = 1.428_606_8e-6;
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
        let clamped = if self < -87.336_54 { -87.336_54 } else { self };
        let clamped = if clamped > 88.722_83 { 88.722_83 } else { clamped };
        let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, clamped));
        let p = r
            .mul_add(1.0 / 5040.0, 1.0 / 720.0)
            .mul_add(r, 1.0 / 120.0)
            .mul_add(r, 1.0 / 24.0)
            .mul_add(r, 1.0 / 6.0)
            .mul_add(r, 0.5)
            .mul_add(r, 1.0)
            .mul_add(r, 1.0);
        // Two factors, since 2^128 is no f32.
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        let scale = |k: i32| f32::from_bits(((k + 127) << 23) as u32);
        let value = p * scale(half) * scale(n - half);
        let value = if self < -87.336_54 { 0.0 } else { value };
        let value = if self > 88.722_83 { f32::INFINITY } else { value };
        if self.is_nan() { self } else { value }
    }

    /// `(e^2x - 1) / (e^2x + 1)` away from 0, a Taylor polynomial near it.
    #[inline(always)]
    fn tanh_lane(self) -> Self {
        let magnitude = self.abs();
        let e = (-2.0 * magnitude).exp_lane();
        let far = (1.0 - e) / (1.0 + e);
        let s = self * self;
        let near = s
            .mul_add(62.0 / 2835.0, -17.0 / 315.0)
            .mul_add(s, 2.0 / 15.0)
            .mul_add(s, -1.0 / 3.0)
            .mul_add(s * magnitude, magnitude);
        let value = if magnitude < 0.3 { near } else { far };
        value.copysign(self)
    }

    /// `2 artanh(s)` with `s = x / (2 + x)`, at most 1/3, by artanh's series up to the 15th power: what is left out is below 2e-9 of it.
    #[inline(always)]
    fn ln_1p_lane(self) -> Self {
        let s = self / (2.0 + self);
        let square = s * s;
        let series = (2.0 / 15.0f32)
            .mul_add(square, 2.0 / 13.0)
            .mul_add(square, 2.0 / 11.0)
            .mul_add(square, 2.0 / 9.0)
            .mul_add(square, 2.0 / 7.0)
            .mul_add(square, 2.0 / 5.0)
            .mul_add(square, 2.0 / 3.0);
        (series * square).mul_add(s, 2.0 * s)
    }

    /// Below 1, x times a polynomial in x^2; above, `1 - e^-q` with a polynomial q. Both were fitted for the smallest largest
    /// error (1.2e-9 and 1.3e-9 before rounding).
    #[inline(always)]
    fn erf(self) -> Self {
        let s = self * self;
        let near = 7.853_858e-5f32
            .mul_add(s, -8.010_192_5e-4)
            .mul_add(s, 5.188_327_7e-3)
            .mul_add(s, -2.685_381_1e-2)
            .mul_add(s, 1.128_358_5e-1)
            .mul_add(s, -3.761_262_6e-1)
            .mul_add(s, std::f32::consts::FRAC_2_SQRT_PI);
        let a = self.abs();
        let a = if a > 4.0 { 4.0 } else { a }; // erf(4) is 1 in f32
        let q = (-1.915_046e-4f32)
            .mul_add(a, 2.999_545e-3)
            .mul_add(a, -2.205_201_4e-2)
            .mul_add(a, 1.035_669_2e-1)
            .mul_add(a, 6.376e-1)
            .mul_add(a, 1.127_426_1)
            .mul_add(a, 2.564_41e-4);
        let far = (1.0 - (-q).exp_lane()).copysign(self);
        if self.abs() < 1.0 { self * near } else { far }
    }
}

impl Element for f64 {
    const NAME: &'static str = "f64";

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn f32(self) -> f32 {
        self as f32
    }
}

impl Real for f64 {
    #[inline(always)]
    fn exp_lane(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn tanh_lane(self) -> Self {
        self.tanh()
    }
    #[inline(always)]
    fn ln_1p_lane(self) -> Self {
        self.ln_1p()
    }
    #[inline(always)]
    fn erf(self) -> Self {
        erf_f64(self)
    }
}

/// The error function to about 1e-15: Maclaurin's series (A&S 7.1.6) below 2.5, the continued fraction of erfc
/// (A&S 7.1.14) above.
fn erf_f64(x: f64) -> f64 {
    let a = x.abs();
    if x.is_nan() {
        return x;
    }
    if a < 2.5 {
        let mut term = a;
        let mut sum = a;
        let mut n = 0.0;
        while term > sum * 1e-17 && term > 0.0 {
            n += 1.0;
            term *= 2.0 * a * a / (2.0 * n + 1.0);
            sum += term;
        }
        (std::f64::consts::FRAC_2_SQRT_PI * (-a * a).exp() * sum).copysign(x)
    } else if a < 6.0 {
        let mut fraction = 0.0;
        for k in (1..=60).rev() {
            fraction = f64::from(k) * 0.5 / (a + fraction);
        }
        let erfc = (-a * a).exp() / (std::f64::consts::PI.sqrt() * (a + fraction));
        (1.0 - erfc).copysign(x)
    } else {
        1f64.copysign(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..=887_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            let unit = f64::from(f32::from_bits((truth as f32).to_bits() + 1)) - f64::from(truth as f32);
            worst = worst.max((f64::from(x.exp_lane()) - truth).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst} units");
        assert_eq!((-200f32).exp_lane(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_lane(), 0.0);
        assert_eq!(200f32.exp_lane(), f32::INFINITY);
        assert!(f32::NAN.exp_lane().is_nan());
        assert_eq!(0f32.exp_lane(), 1.0);
    }

    #[test]
    fn tanh_is_within_its_bound() {
        let mut worst = 0.0f64;
        for i in -200_000..=200_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).tanh();
            worst = worst.max((f64::from(x.tanh_lane()) - truth).abs() / truth.abs().max(1e-30));
        }
        assert!(worst <= 6e-7, "{worst}");
    }

    #[test]
    fn ln_1p_is_within_its_bound_from_0_to_1() {
        let mut worst = 0.0f64;
        for i in 1..=100_000 {
            for x in [i as f32 * 1e-5, i as f32 * 1e-15] {
                let truth = f64::from(x).ln_1p();
                worst = worst.max((f64::from(x.ln_1p_lane()) - truth).abs() / truth);
            }
        }
        assert!(worst <= 2e-7, "{worst:e}");
        assert_eq!(0f32.ln_1p_lane(), 0.0);
        assert!(f32::NAN.ln_1p_lane().is_nan());
    }

    #[test]
    fn erf_in_f32_is_within_its_bounds() {
        let (mut worst, mut relative) = (0.0f64, 0.0f64);
        for i in 1..=60_000 {
            let x = i as f32 * 1e-4;
            let truth = erf_f64(f64::from(x));
            let error = (f64::from(Real::erf(x)) - truth).abs();
            (worst, relative) = (worst.max(error), relative.max(error / truth));
            assert_eq!(Real::erf(-x), -Real::erf(x));
        }
        assert!(worst <= 1.5e-7 && relative <= 2e-7, "{worst:e}, relative {relative:e}");
        let ends = [0.0, f32::INFINITY, f32::NEG_INFINITY].map(<f32 as Real>::erf);
        assert_eq!(ends, [0.0, 1.0, -1.0]);
        assert!(<f32 as Real>::erf(f32::NAN).is_nan());
    }

    #[test]
    fn erf_agrees_with_published_values() {
        // Abramowitz and Stegun, table 7.1, and high-precision values.
        for (x, value) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.0, 0.999_977_909_503_001_4),
        ] {
            assert!((erf_f64(x) - value).abs() < 1e-15, "erf({x}) = {}", erf_f64(x));
            assert_eq!(erf_f64(-x), -erf_f64(x));
        }
    }
}
