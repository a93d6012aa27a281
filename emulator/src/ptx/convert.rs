//! `cvt`: conversions between all types, with their roundings.

use half::{bf16, f16};

use super::arithmetic::{map1, map2};
use super::float::{DOWN, Modifiers, NEAREST, UP, ZERO, round};
use super::instruction::{Map1, Map2};

/// What a value is, between two types: whole numbers are exact in one, floats in the other.
#[derive(Clone, Copy)]
enum Value {
    Int(i128),
    Float(f64),
}

#[derive(Clone, Copy, PartialEq)]
enum Rounding {
    Mode(u8),
    /// To a whole number.
    Int(u8),
}

fn read(ty: u8, bits: u64) -> Value {
    match ty {
        0 => Value::Int(i128::from(bits as u8)),
        1 => Value::Int(i128::from(bits as i8)),
        2 => Value::Int(i128::from(bits as u16)),
        3 => Value::Int(i128::from(bits as i16)),
        4 => Value::Int(i128::from(bits as u32)),
        5 => Value::Int(i128::from(bits as i32)),
        6 => Value::Int(i128::from(bits)),
        7 => Value::Int(i128::from(bits as i64)),
        8 => Value::Float(f16::from_bits(bits as u16).to_f64()),
        9 => Value::Float(bf16::from_bits(bits as u16).to_f64()),
        10 => Value::Float(f64::from(f32::from_bits(bits as u32))),
        _ => Value::Float(f64::from_bits(bits)),
    }
}

const TYPES: [&str; 12] = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"];

fn to_int(ty: u8, value: i128, saturate: bool) -> u64 {
    let bits = 8u32 << (ty / 2);
    let (least, most) =
        if ty % 2 == 1 { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1i128 << bits) - 1) };
    let value = if saturate { value.clamp(least, most) } else { value };
    (value as u64) & if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
}

fn whole(x: f64, mode: u8) -> f64 {
    match mode {
        ZERO => x.trunc(),
        DOWN => x.floor(),
        UP => x.ceil(),
        _ => x.round_ties_even(),
    }
}

/// Rounds a float of `digits` bits (its lowest exponent `least`) from f64 by a mode other than to nearest.
fn directed(x: f64, mode: u8, digits: i32, least: i32) -> f64 {
    if !x.is_finite() || x == 0.0 {
        return x;
    }
    let exponent = (((x.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(least);
    let unit = 2f64.powi(exponent - digits + 1);
    whole(x / unit, mode) * unit
}

fn convert(from: u8, to: u8, rounding: Rounding, saturate: bool, ftz: bool, bits: u64) -> u64 {
    let value = read(from, bits);
    if to < 8 {
        return match value {
            Value::Int(value) => to_int(to, value, saturate),
            // Not a number becomes 0; the rest saturates always.
            Value::Float(x) => {
                let x = if ftz && from == 10 && (x as f32).is_subnormal() { 0.0 } else { x };
                let Rounding::Int(mode) = rounding else { return 0 };
                to_int(to, whole(x, mode) as i128, true)
            }
        };
    }
    let mode = match rounding {
        Rounding::Mode(mode) | Rounding::Int(mode) => mode,
    };
    let mut x = match value {
        // To f64 by way of round to odd where 53 bits do not hold it: to f32 and below that rounds right.
        Value::Int(value) if to == 11 => return (value as f64).to_bits(),
        Value::Int(value) => {
            let near = value as f64;
            if near as i128 == value || near.to_bits() & 1 == 1 {
                near
            } else if (near as i128 > value) == (near > 0.0) {
                f64::from_bits(near.to_bits() - 1)
            } else {
                f64::from_bits(near.to_bits() + 1)
            }
        }
        Value::Float(x) => x,
    };
    if matches!(rounding, Rounding::Int(_)) && from >= 8 {
        x = whole(x, mode);
    }
    if ftz && from == 10 && (x as f32).is_subnormal() {
        x = 0.0f64.copysign(x);
    }
    if saturate {
        x = if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) };
    }
    match to {
        8 if x.is_nan() => 0x7fff,
        9 if x.is_nan() => 0x7fff,
        8 if mode == NEAREST => u64::from(f16::from_f64(x).to_bits()),
        9 if mode == NEAREST => u64::from(bf16::from_f64(x).to_bits()),
        8 => u64::from(f16::from_f64(limit(directed(x, mode, 11, -14), 65504.0, mode)).to_bits()),
        9 => u64::from(bf16::from_f64(limit(directed(x, mode, 8, -126), bf16::MAX.to_f64(), mode)).to_bits()),
        10 if x.is_nan() => 0x7fff_ffff,
        10 => {
            let y = match mode {
                ZERO => round::<ZERO>(x),
                DOWN => round::<DOWN>(x),
                UP => round::<UP>(x),
                _ => round::<NEAREST>(x),
            };
            u64::from(if ftz && y.is_subnormal() { 0.0f32.copysign(y) } else { y }.to_bits())
        }
        _ => x.to_bits(),
    }
}

/// A finite value past the largest, rounded away from infinity, is the largest.
fn limit(x: f64, most: f64, mode: u8) -> f64 {
    let keeps = mode == ZERO || (mode == DOWN && x > 0.0) || (mode == UP && x < 0.0);
    if x.is_finite() && x.abs() > most && keeps { most.copysign(x) } else { x }
}

fn rounding(m: &impl Modifiers) -> Rounding {
    let int = [("rni", NEAREST), ("rzi", ZERO), ("rmi", DOWN), ("rpi", UP)];
    let mode = [("rn", NEAREST), ("rz", ZERO), ("rm", DOWN), ("rp", UP)];
    let found = int.iter().find(|(name, _)| m.has(name)).map(|&(_, mode)| Rounding::Int(mode));
    found
        .unwrap_or_else(|| Rounding::Mode(mode.iter().find(|(name, _)| m.has(name)).map_or(NEAREST, |&(_, mode)| mode)))
}

/// A conversion, as a description that is executed lane by lane.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Conversion {
    from: u8,
    to: u8,
    integer: bool,
    mode: u8,
    saturate: bool,
    ftz: bool,
    /// The register is wider than the type, and the type has a sign.
    extend_to: u8,
}

impl Conversion {
    pub fn run(&self, bits: u64) -> u64 {
        let rounding = if self.integer { Rounding::Int(self.mode) } else { Rounding::Mode(self.mode) };
        let value = convert(self.from, self.to, rounding, self.saturate, self.ftz, bits);
        extend(value, self.to, self.extend_to)
    }
}

/// A value of a type with a sign, in a register of so many bytes.
fn extend(value: u64, ty: u8, register: u8) -> u64 {
    if ty >= 8 || ty.is_multiple_of(2) {
        return value;
    }
    let (bits, register) = (8u32 << (ty / 2), u32::from(register) * 8);
    if register <= bits {
        return value;
    }
    let wide = ((value << (64 - bits)) as i64 >> (64 - bits)) as u64;
    if register == 64 { wide } else { wide & ((1 << register) - 1) }
}

/// `cvt` between two types: a fast function where there is one, else a description.
pub(super) fn conversion(to: &str, from: &str, m: &impl Modifiers, register: u8) -> Option<Result<Map1, Conversion>> {
    let plain = !m.has("ftz") && !m.has("sat") && !m.has("relu");
    let fast: Option<Map1> = match (to, from) {
        ("u64" | "u32" | "u16", "u32" | "u16" | "u8") | ("u64", "u64") if plain && wider(to, from) => {
            Some(map1!(|a| a))
        }
        ("u32" | "s32", "u64" | "s64" | "u32" | "s32") if plain && register == 4 => Some(map1!(|a| a & 0xffff_ffff)),
        ("u16" | "s16", "u64" | "s64" | "u32" | "s32") if plain && register == 2 => Some(map1!(|a| a & 0xffff)),
        ("s64", "s32") if plain => Some(map1!(|a| a as i32 as i64 as u64)),
        ("f32", "f16") if plain => Some(map1!(|a| {
            let x = f16::from_bits(a as u16).to_f32();
            u64::from(if x.is_nan() { 0x7fff_ffff } else { x.to_bits() })
        })),
        ("f32", "bf16") if plain => Some(map1!(|a| (a & 0xffff) << 16)),
        ("f64", "f32") if plain => Some(map1!(|a| f64::from(f32::from_bits(a as u32)).to_bits())),
        ("f32", "f64") if plain && m.has("rn") => Some(map1!(|a| {
            let x = f64::from_bits(a) as f32;
            u64::from(if x.is_nan() { 0x7fff_ffff } else { x.to_bits() })
        })),
        ("f16", "f32") if plain && m.has("rn") => Some(map1!(|a| to_f16(a))),
        ("bf16", "f32") if plain && m.has("rn") => Some(map1!(|a| to_bf16(a))),
        ("f32", "s32") if plain && m.has("rn") => Some(map1!(|a| u64::from((a as i32 as f32).to_bits()))),
        ("f32", "u32") if plain && m.has("rn") => Some(map1!(|a| u64::from((a as u32 as f32).to_bits()))),
        // Rounded to nearest, ties away from zero, to 10 bits of mantissa.
        ("tf32", "f32") if m.has("rna") => return Some(Ok(map1!(|a| to_tf32(a)))),
        _ => None,
    };
    if let Some(fast) = fast {
        return Some(Ok(fast));
    }
    if m.has("relu") || m.has("rna") || m.has("rs") {
        return None;
    }
    let number = |name| TYPES.iter().position(|&ty| ty == name).map(|at| at as u8);
    let (integer, mode) = match rounding(m) {
        Rounding::Int(mode) => (true, mode),
        Rounding::Mode(mode) => (false, mode),
    };
    let (from, to) = (number(from)?, number(to)?);
    if to < 8 && from >= 8 && !integer {
        return None;
    }
    let (saturate, ftz) = (m.has("sat"), m.has("ftz"));
    Some(Err(Conversion { from, to, integer, mode, saturate, ftz, extend_to: register }))
}

fn wider(to: &str, from: &str) -> bool {
    let bits = |name: &str| name[1..].parse::<u32>().unwrap_or(0);
    bits(to) >= bits(from)
}

fn to_f16(bits: u64) -> u64 {
    let x = f32::from_bits(bits as u32);
    u64::from(if x.is_nan() { 0x7fff } else { f16::from_f32(x).to_bits() })
}

fn to_bf16(bits: u64) -> u64 {
    let x = f32::from_bits(bits as u32);
    u64::from(if x.is_nan() { 0x7fff } else { bf16::from_f32(x).to_bits() })
}

/// f32 rounded to the 10 bits of tf32.
fn to_tf32(bits: u64) -> u64 {
    let bits = bits as u32;
    if f32::from_bits(bits).is_finite() { u64::from(bits.wrapping_add(0x1000) & !0x1fff) } else { u64::from(bits) }
}

/// `cvt.rn.bf16x2.f32 d, a, b`: `a` in the upper half.
pub(super) fn packed(to: &str, m: &impl Modifiers) -> Option<Map2> {
    if !m.has("rn") || m.has("satfinite") {
        return None;
    }
    fn relu(x: u64) -> u64 {
        if x & 0x8000 != 0 && x & 0x7fff <= 0x7f80 { 0 } else { x }
    }
    Some(match (to, m.has("relu")) {
        ("bf16x2", false) => map2!(|a, b| to_bf16(a) << 16 | to_bf16(b)),
        ("f16x2", false) => map2!(|a, b| to_f16(a) << 16 | to_f16(b)),
        ("bf16x2", true) => map2!(|a, b| relu(to_bf16(a)) << 16 | relu(to_bf16(b))),
        _ => return None,
    })
}
