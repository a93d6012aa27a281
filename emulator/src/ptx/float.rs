//! Functions over the lanes of a warp for floats.
//!
//! Sums, products, fused multiply-adds, quotients and roots are rounded once, as IEEE 754 and the PTX ISA say; the approximate
//! instructions (`ex2.approx`, `tanh.approx`, ..) give the nearest value, which lies within the error that the ISA allows the
//! hardware. f32 results that are not a number are 0x7fffffff, as on the hardware.

use std::cmp::Ordering::{Equal, Greater, Less};

use half::{bf16, f16};

use super::arithmetic::{compare, map1, map2, map3};
use super::instruction::{Compare, Map1, Map2, Map3};

/// Roundings, as parameters of functions.
pub(crate) const NEAREST: u8 = 0;
pub(crate) const ZERO: u8 = 1;
pub(crate) const DOWN: u8 = 2;
pub(crate) const UP: u8 = 3;

/// Rounds to f32. `x` is exact, or rounded to odd.
pub(crate) fn round<const MODE: u8>(x: f64) -> f32 {
    let nearest = x as f32;
    let error = f64::from(nearest);
    match MODE {
        ZERO if error.abs() > x.abs() => {
            if x > 0.0 {
                nearest.next_down()
            } else {
                nearest.next_up()
            }
        }
        DOWN if error > x => nearest.next_down(),
        UP if error < x => nearest.next_up(),
        _ => nearest,
    }
}

/// `a + b`, its last bit set where it is not exact: then rounding it once more rounds right.
pub(crate) fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum;
    }
    let part = sum - a;
    let error = (a - (sum - part)) + (b - part);
    if error == 0.0 || sum.to_bits() & 1 == 1 {
        sum
    } else if (error > 0.0) == (sum > 0.0) {
        f64::from_bits(sum.to_bits() + 1)
    } else {
        f64::from_bits(sum.to_bits() - 1)
    }
}

fn flush<const FTZ: bool>(x: f32) -> f32 {
    if FTZ && x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

fn of<const FTZ: bool>(bits: u64) -> f32 {
    flush::<FTZ>(f32::from_bits(bits as u32))
}

fn put<const FTZ: bool, const SAT: bool>(x: f32) -> u64 {
    let x = flush::<FTZ>(x);
    if SAT {
        return u64::from(if x.is_nan() { 0 } else { x.clamp(0.0, 1.0).to_bits() & 0x7fff_ffff });
    }
    u64::from(if x.is_nan() { 0x7fff_ffff } else { x.to_bits() })
}

fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}

fn fma32(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") {
        #[target_feature(enable = "fma")]
        fn fused(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        // SAFETY: the processor has the feature.
        return unsafe { fused(a, b, c) };
    }
    a.mul_add(b, c)
}

/// Picks `$function::<MODE, FTZ, SAT>` by the modifiers.
macro_rules! rounded {
    ($m:expr, |$($x:ident),*| $map:ident, $nearest:expr, $exact:expr) => {{
        macro_rules! form {
            ($mode:expr, $ftz:expr, $sat:expr) => {
                $map!(|$($x),*| {
                    let ($($x,)*) = ($(of::<$ftz>($x),)*);
                    put::<$ftz, $sat>(if $mode == NEAREST { $nearest } else { round::<{ $mode }>($exact) })
                })
            };
        }
        macro_rules! flags {
            ($mode:expr) => {
                match ($m.has("ftz"), $m.has("sat")) {
                    (false, false) => form!($mode, false, false),
                    (false, true) => form!($mode, false, true),
                    (true, false) => form!($mode, true, false),
                    (true, true) => form!($mode, true, true),
                }
            };
        }
        if $m.has("rz") { flags!(ZERO) } else if $m.has("rm") { flags!(DOWN) } else if $m.has("rp") { flags!(UP) } else { flags!(NEAREST) }
    }};
}

/// The modifiers of an opcode.
pub(super) trait Modifiers {
    fn has(&self, modifier: &str) -> bool;
}

/// A function of f32, in a form that flushes subnormals and one that does not.
macro_rules! flushed {
    ($m:expr, |$x:ident| $value:expr) => {
        if $m.has("ftz") {
            map1!(|$x| {
                let $x = of::<true>($x);
                put::<true, false>($value)
            })
        } else {
            map1!(|$x| {
                let $x = of::<false>($x);
                put::<false, false>($value)
            })
        }
    };
}

macro_rules! halves {
    ($t:ident, $map:ident, |$($x:ident),*| $value:expr) => {
        $map!(|$($x),*| {
            let ($($x,)*) = ($($t::from_bits($x as u16),)*);
            half_bits_of(($value).to_bits())
        })
    };
}
macro_rules! pairs {
    ($t:ident, $map:ident, |$($x:ident),*| $value:expr) => {
        $map!(|$($x),*| {
            let low = { let ($($x,)*) = ($($t::from_bits($x as u16),)*); ($value).to_bits() };
            let high = { let ($($x,)*) = ($($t::from_bits(($x >> 16) as u16),)*); ($value).to_bits() };
            half_bits_of(low) | half_bits_of(high) << 16
        })
    };
}
/// A function of a 16-bit type or a pair of them; `$t` names the type.
macro_rules! by_half {
    ($ty:expr, $map:ident, |$($x:ident),*| $t:ident => $value:expr) => {
        match $ty {
            "f16" => { use f16 as $t; Some(halves!($t, $map, |$($x),*| $value)) }
            "bf16" => { use bf16 as $t; Some(halves!($t, $map, |$($x),*| $value)) }
            "f16x2" => { use f16 as $t; Some(pairs!($t, $map, |$($x),*| $value)) }
            "bf16x2" => { use bf16 as $t; Some(pairs!($t, $map, |$($x),*| $value)) }
            _ => None,
        }
    };
}

fn half_bits_of(bits: u16) -> u64 {
    u64::from(bits)
}

/// `abs`, `neg`, roots, reciprocals, exponentials, logarithms, sines.
pub(super) fn unary(base: &str, ty: &str, m: &impl Modifiers) -> Option<Map1> {
    match (base, ty) {
        ("abs", "f32") => Some(flushed!(m, |a| a.abs())),
        ("neg", "f32") => Some(if m.has("ftz") { flushed!(m, |a| -a) } else { map1!(|a| a ^ 0x8000_0000) }),
        ("abs", "f64") => Some(map1!(|a| a & !(1 << 63))),
        ("neg", "f64") => Some(map1!(|a| a ^ 1 << 63)),
        ("abs", "f16" | "bf16") => Some(map1!(|a| a & 0x7fff)),
        ("neg", "f16" | "bf16") => Some(map1!(|a| a ^ 0x8000)),
        ("abs", "f16x2" | "bf16x2") => Some(map1!(|a| a & 0x7fff_7fff)),
        ("neg", "f16x2" | "bf16x2") => Some(map1!(|a| a ^ 0x8000_8000)),
        ("sqrt", "f64") => Some(map1!(|a| d(a).sqrt().to_bits())),
        ("rcp", "f64") => Some(map1!(|a| (1.0 / d(a)).to_bits())),
        ("rsqrt", "f64") => Some(map1!(|a| (1.0 / d(a).sqrt()).to_bits())),
        ("tanh", "f16" | "bf16" | "f16x2" | "bf16x2") => {
            by_half!(ty, map1, |a| T => T::from_f64(a.to_f64().tanh()))
        }
        ("ex2", "f16" | "bf16" | "f16x2" | "bf16x2") => {
            by_half!(ty, map1, |a| T => T::from_f64(a.to_f64().exp2()))
        }
        ("rcp", "f32") if m.has("rn") => Some(flushed!(m, |a| 1.0 / a)),
        ("sqrt", "f32") if m.has("rn") || m.has("approx") => Some(flushed!(m, |a| a.sqrt())),
        (_, "f32") if m.has("approx") => Some(match base {
            "rcp" => flushed!(m, |a| 1.0 / a),
            "rsqrt" => flushed!(m, |a| (1.0 / f64::from(a).sqrt()) as f32),
            "ex2" => flushed!(m, |a| f64::from(a).exp2() as f32),
            "lg2" => flushed!(m, |a| f64::from(a).log2() as f32),
            "sin" => flushed!(m, |a| f64::from(a).sin() as f32),
            "cos" => flushed!(m, |a| f64::from(a).cos() as f32),
            "tanh" => flushed!(m, |a| f64::from(a).tanh() as f32),
            _ => return None,
        }),
        _ => None,
    }
}

/// The smaller: a number where the other is none; -0 below +0.
fn least(a: f32, b: f32) -> f32 {
    if a == b { if a.is_sign_negative() { a } else { b } } else { a.min(b) }
}
fn most(a: f32, b: f32) -> f32 {
    if a == b { if a.is_sign_negative() { b } else { a } } else { a.max(b) }
}
fn least64(a: f64, b: f64) -> f64 {
    if a == b { if a.is_sign_negative() { a } else { b } } else { a.min(b) }
}
fn most64(a: f64, b: f64) -> f64 {
    if a == b { if a.is_sign_negative() { b } else { a } } else { a.max(b) }
}
/// As `.NaN` has it: not a number where either is none.
fn strict(pick: fn(f32, f32) -> f32, a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { pick(a, b) }
}

/// Instructions of two floats.
pub(super) fn binary(base: &str, ty: &str, m: &impl Modifiers) -> Option<Map2> {
    if matches!(ty, "f16" | "bf16" | "f16x2" | "bf16x2") {
        return half_binary(base, ty, m);
    }
    match (base, ty) {
        ("add", "f32") => Some(rounded!(m, |a, b| map2, a + b, add_to_odd(f64::from(a), f64::from(b)))),
        ("sub", "f32") => Some(rounded!(m, |a, b| map2, a - b, add_to_odd(f64::from(a), -f64::from(b)))),
        ("mul", "f32") => Some(rounded!(m, |a, b| map2, a * b, f64::from(a) * f64::from(b))),
        ("div", "f32") if !(m.has("rz") || m.has("rm") || m.has("rp")) => {
            Some(rounded!(m, |a, b| map2, a / b, f64::from(a) / f64::from(b)))
        }
        ("min", "f32") if m.has("NaN") => {
            Some(map2!(|a, b| put::<false, false>(strict(least, of::<false>(a), of::<false>(b)))))
        }
        ("max", "f32") if m.has("NaN") => {
            Some(map2!(|a, b| put::<false, false>(strict(most, of::<false>(a), of::<false>(b)))))
        }
        ("min", "f32") => Some(if m.has("ftz") {
            map2!(|a, b| put::<true, false>(least(of::<true>(a), of::<true>(b))))
        } else {
            map2!(|a, b| put::<false, false>(least(of::<false>(a), of::<false>(b))))
        }),
        ("max", "f32") => Some(if m.has("ftz") {
            map2!(|a, b| put::<true, false>(most(of::<true>(a), of::<true>(b))))
        } else {
            map2!(|a, b| put::<false, false>(most(of::<false>(a), of::<false>(b))))
        }),
        ("copysign", "f32") => Some(map2!(|a, b| a & 0x8000_0000 | b & 0x7fff_ffff)),
        ("copysign", "f64") => Some(map2!(|a, b| a & (1 << 63) | b & !(1 << 63))),
        (_, "f64") if m.has("rz") || m.has("rm") || m.has("rp") => None,
        ("add", "f64") => Some(map2!(|a, b| (d(a) + d(b)).to_bits())),
        ("sub", "f64") => Some(map2!(|a, b| (d(a) - d(b)).to_bits())),
        ("mul", "f64") => Some(map2!(|a, b| (d(a) * d(b)).to_bits())),
        ("div", "f64") => Some(map2!(|a, b| (d(a) / d(b)).to_bits())),
        ("min", "f64") => Some(map2!(|a, b| least64(d(a), d(b)).to_bits())),
        ("max", "f64") => Some(map2!(|a, b| most64(d(a), d(b)).to_bits())),
        _ => None,
    }
}

/// Clamped to [0, 1]; not a number becomes 0.
trait Saturate {
    fn saturated(self) -> Self;
}
impl Saturate for f16 {
    fn saturated(self) -> Self {
        if self.is_nan() { f16::ZERO } else { f16::from_f32(self.to_f32().clamp(0.0, 1.0).abs()) }
    }
}
impl Saturate for bf16 {
    fn saturated(self) -> Self {
        if self.is_nan() { bf16::ZERO } else { bf16::from_f32(self.to_f32().clamp(0.0, 1.0).abs()) }
    }
}
fn saturated<T: Saturate>(x: T) -> T {
    x.saturated()
}

fn half_binary(base: &str, ty: &str, m: &impl Modifiers) -> Option<Map2> {
    if m.has("sat") {
        return match (base, ty) {
            (_, "bf16" | "bf16x2") => None,
            ("add", _) => by_half!(ty, map2, |a, b| T => saturated(T::from_f64(a.to_f64() + b.to_f64()))),
            ("sub", _) => by_half!(ty, map2, |a, b| T => saturated(T::from_f64(a.to_f64() - b.to_f64()))),
            ("mul", _) => by_half!(ty, map2, |a, b| T => saturated(T::from_f64(a.to_f64() * b.to_f64()))),
            _ => None,
        };
    }
    if m.has("ftz") {
        return None;
    }
    // Sums and products of two such values are exact in f64, so rounding once is right.
    match base {
        "add" => by_half!(ty, map2, |a, b| T => T::from_f64(a.to_f64() + b.to_f64())),
        "sub" => by_half!(ty, map2, |a, b| T => T::from_f64(a.to_f64() - b.to_f64())),
        "mul" => by_half!(ty, map2, |a, b| T => T::from_f64(a.to_f64() * b.to_f64())),
        "min" if m.has("NaN") => by_half!(ty, map2, |a, b| T => T::from_f32(strict(least, a.to_f32(), b.to_f32()))),
        "max" if m.has("NaN") => by_half!(ty, map2, |a, b| T => T::from_f32(strict(most, a.to_f32(), b.to_f32()))),
        "min" => by_half!(ty, map2, |a, b| T => T::from_f32(least(a.to_f32(), b.to_f32()))),
        "max" => by_half!(ty, map2, |a, b| T => T::from_f32(most(a.to_f32(), b.to_f32()))),
        _ => None,
    }
}

/// `fma` and `mad`: one rounding.
pub(super) fn ternary(ty: &str, m: &impl Modifiers) -> Option<Map3> {
    match ty {
        "f32" => {
            Some(rounded!(m, |a, b, c| map3, fma32(a, b, c), { add_to_odd(f64::from(a) * f64::from(b), f64::from(c)) }))
        }
        "f64" if !(m.has("rz") || m.has("rm") || m.has("rp")) => {
            Some(map3!(|a, b, c| d(a).mul_add(d(b), d(c)).to_bits()))
        }
        "f16" | "bf16" | "f16x2" | "bf16x2" if m.has("relu") => by_half!(ty, map3, |a, b, c| T => {
            let x = T::from_f64(add_to_odd(a.to_f64() * b.to_f64(), c.to_f64()));
            if x.to_f32() < 0.0 { T::from_f32(0.0) } else { x }
        }),
        "f16" | "f16x2" if m.has("sat") && !m.has("ftz") => {
            by_half!(ty, map3, |a, b, c| T => saturated(T::from_f64(add_to_odd(a.to_f64() * b.to_f64(), c.to_f64()))))
        }
        "f16" | "bf16" | "f16x2" | "bf16x2" if !m.has("sat") && !m.has("ftz") => {
            by_half!(ty, map3, |a, b, c| T => T::from_f64(add_to_odd(a.to_f64() * b.to_f64(), c.to_f64())))
        }
        _ => None,
    }
}

/// Comparisons of floats: ordered ones fail where either is not a number, those with `u` hold.
pub(super) fn comparison(relation: &str, ty: &str, m: &impl Modifiers) -> Option<Compare> {
    // Unordered values compare as `None`.
    macro_rules! holds {
        ($of:expr, $pattern:pat) => {
            Some(compare!(|a, b| matches!($of(a).partial_cmp(&$of(b)), $pattern)))
        };
    }
    macro_rules! relations {
        ($of:expr) => {
            match relation {
                "eq" => holds!($of, Some(Equal)),
                "ne" => holds!($of, Some(Less | Greater)),
                "lt" => holds!($of, Some(Less)),
                "le" => holds!($of, Some(Less | Equal)),
                "gt" => holds!($of, Some(Greater)),
                "ge" => holds!($of, Some(Greater | Equal)),
                "equ" => holds!($of, Some(Equal) | None),
                "neu" => holds!($of, Some(Less | Greater) | None),
                "ltu" => holds!($of, Some(Less) | None),
                "leu" => holds!($of, Some(Less | Equal) | None),
                "gtu" => holds!($of, Some(Greater) | None),
                "geu" => holds!($of, Some(Greater | Equal) | None),
                "num" => Some(compare!(|a, b| $of(a).partial_cmp(&$of(b)).is_some())),
                "nan" => Some(compare!(|a, b| $of(a).partial_cmp(&$of(b)).is_none())),
                _ => None,
            }
        };
    }
    match ty {
        "f32" if m.has("ftz") => relations!(of::<true>),
        "f32" => relations!(of::<false>),
        "f64" => relations!(f64::from_bits),
        "f16" | "f16x2" => relations!((|x: u64| f16::from_bits(x as u16).to_f32())),
        "bf16" | "bf16x2" => relations!((|x: u64| bf16::from_bits(x as u16).to_f32())),
        _ => None,
    }
}

/// `testp`: of its first operand alone.
pub(super) fn test(property: &str, ty: &str) -> Option<Compare> {
    macro_rules! tests {
        ($of:expr) => {
            match property {
                "finite" => Some(compare!(|a, _b| $of(a).is_finite())),
                "infinite" => Some(compare!(|a, _b| $of(a).is_infinite())),
                "number" => Some(compare!(|a, _b| !$of(a).is_nan())),
                "notanumber" => Some(compare!(|a, _b| $of(a).is_nan())),
                // Zeros count as normal.
                "normal" => Some(compare!(|a, _b| $of(a).is_normal() || $of(a) == 0.0)),
                "subnormal" => Some(compare!(|a, _b| $of(a).is_subnormal())),
                _ => None,
            }
        };
    }
    match ty {
        "f32" => tests!(of::<false>),
        "f64" => tests!(f64::from_bits),
        _ => None,
    }
}
