//! Functions over the lanes of a warp for whole numbers and logic, as the PTX ISA defines them.

use super::instruction::{Compare, Map1, Map2, Map3};

macro_rules! map1 {
    (|$a:ident| $value:expr) => {{
        fn map(a: &$crate::ptx::Lanes, d: &mut $crate::ptx::Lanes) {
            for i in 0..32 {
                let $a = a[i];
                d[i] = $value;
            }
        }
        map as $crate::ptx::instruction::Map1
    }};
}
macro_rules! map2 {
    (|$a:ident, $b:ident| $value:expr) => {{
        fn map(a: &$crate::ptx::Lanes, b: &$crate::ptx::Lanes, d: &mut $crate::ptx::Lanes) {
            for i in 0..32 {
                let ($a, $b) = (a[i], b[i]);
                d[i] = $value;
            }
        }
        map as $crate::ptx::instruction::Map2
    }};
}
macro_rules! map3 {
    (|$a:ident, $b:ident, $c:ident| $value:expr) => {{
        fn map(a: &$crate::ptx::Lanes, b: &$crate::ptx::Lanes, c: &$crate::ptx::Lanes, d: &mut $crate::ptx::Lanes) {
            for i in 0..32 {
                let ($a, $b, $c) = (a[i], b[i], c[i]);
                d[i] = $value;
            }
        }
        map as $crate::ptx::instruction::Map3
    }};
}
macro_rules! compare {
    (|$a:ident, $b:ident| $value:expr) => {{
        fn compare(a: &$crate::ptx::Lanes, b: &$crate::ptx::Lanes) -> u32 {
            let mut mask = 0;
            for i in 0..32 {
                let ($a, $b) = (a[i], b[i]);
                mask |= u32::from($value) << i;
            }
            mask
        }
        compare as $crate::ptx::instruction::Compare
    }};
}
pub(super) use {compare, map1, map2, map3};

/// A function of a type that is chosen by its name: `u` is the type without a sign of the same width.
macro_rules! by_type {
    ($ty:expr, $kind:ident, |$($x:ident),*| $t:ident, $u:ident => $value:expr) => {
        match $ty {
            "u16" | "b16" => { type $t = u16; type $u = u16; Some($kind!(|$($x),*| { let ($($x,)*) = ($($x as $t,)*); u64::from(($value) as $u) })) }
            "u32" | "b32" => { type $t = u32; type $u = u32; Some($kind!(|$($x),*| { let ($($x,)*) = ($($x as $t,)*); u64::from(($value) as $u) })) }
            "u64" | "b64" => { type $t = u64; type $u = u64; Some($kind!(|$($x),*| { let ($($x,)*) = ($($x as $t,)*); ($value) as $u })) }
            "s16" => { type $t = i16; type $u = u16; Some($kind!(|$($x),*| { let ($($x,)*) = ($($x as $t,)*); u64::from(($value) as $u) })) }
            "s32" => { type $t = i32; type $u = u32; Some($kind!(|$($x),*| { let ($($x,)*) = ($($x as $t,)*); u64::from(($value) as $u) })) }
            "s64" => { type $t = i64; type $u = u64; Some($kind!(|$($x),*| { let ($($x,)*) = ($($x as $t,)*); ($value) as $u })) }
            _ => None,
        }
    };
}

/// `abs`, `neg`, `not`, `cnot`, `popc`, `clz`, `brev` and `bfind` without its modifier.
pub(super) fn unary(base: &str, ty: &str) -> Option<Map1> {
    match base {
        "abs" => by_type!(ty, map1, |a| T, U => if a < 0 as T { (0 as T).wrapping_sub(a) } else { a }),
        "neg" => by_type!(ty, map1, |a| T, U => (0 as T).wrapping_sub(a)),
        "not" => by_type!(ty, map1, |a| T, U => !a),
        "cnot" => by_type!(ty, map1, |a| T, U => u8::from(a == 0)),
        "popc" => by_type!(ty, map1, |a| T, U => a.count_ones()),
        "clz" => by_type!(ty, map1, |a| T, U => a.leading_zeros()),
        "brev" => by_type!(ty, map1, |a| T, U => a.reverse_bits()),
        _ => None,
    }
}

/// `bfind`: the highest bit that differs from the sign, or all ones.
pub(super) fn find_bit(ty: &str, shift_amount: bool) -> Option<Map1> {
    fn highest(a: u64) -> u64 {
        if a == 0 { 0xffff_ffff } else { 63 - u64::from(a.leading_zeros()) }
    }
    fn amount(place: u64, bits: u64) -> u64 {
        if place == 0xffff_ffff { place } else { bits - 1 - place }
    }
    Some(match (ty, shift_amount) {
        ("u32" | "u64", false) => map1!(|a| highest(a)),
        ("s32", false) => map1!(|a| {
            let x = a as i32;
            highest(u64::from(if x < 0 { !x } else { x } as u32))
        }),
        ("s64", false) => map1!(|a| {
            let x = a as i64;
            highest(if x < 0 { !x } else { x } as u64)
        }),
        ("u32", true) => map1!(|a| amount(highest(a), 32)),
        ("u64", true) => map1!(|a| amount(highest(a), 64)),
        ("s32", true) => {
            map1!(|a| {
                let x = a as i32;
                amount(highest(u64::from(if x < 0 { !x } else { x } as u32)), 32)
            })
        }
        ("s64", true) => map1!(|a| {
            let x = a as i64;
            amount(highest(if x < 0 { !x } else { x } as u64), 64)
        }),
        _ => return None,
    })
}

/// Instructions of two whole numbers. Division by zero gives all ones, as devices do; shifts clamp.
pub(super) fn binary(base: &str, ty: &str) -> Option<Map2> {
    match base {
        "add" => by_type!(ty, map2, |a, b| T, U => a.wrapping_add(b)),
        "sub" => by_type!(ty, map2, |a, b| T, U => a.wrapping_sub(b)),
        "mul.lo" => by_type!(ty, map2, |a, b| T, U => a.wrapping_mul(b)),
        "mul.hi" => by_type!(ty, map2, |a, b| T, U => ((a as i128).wrapping_mul(b as i128) >> T::BITS) as T),
        "div" => by_type!(ty, map2, |a, b| T, U => if b == 0 { !(0 as T) } else { a.wrapping_div(b) }),
        "rem" => by_type!(ty, map2, |a, b| T, U => if b == 0 { a } else { a.wrapping_rem(b) }),
        "min" => by_type!(ty, map2, |a, b| T, U => a.min(b)),
        "max" => by_type!(ty, map2, |a, b| T, U => a.max(b)),
        "and" => by_type!(ty, map2, |a, b| T, U => a & b),
        "or" => by_type!(ty, map2, |a, b| T, U => a | b),
        "xor" => by_type!(ty, map2, |a, b| T, U => a ^ b),
        "mul.wide" => Some(match ty {
            "u16" => map2!(|a, b| u64::from(a as u16) * u64::from(b as u16)),
            "s16" => map2!(|a, b| (i32::from(a as i16) * i32::from(b as i16)) as u32 as u64),
            "u32" => map2!(|a, b| u64::from(a as u32) * u64::from(b as u32)),
            "s32" => map2!(|a, b| (i64::from(a as i32) * i64::from(b as i32)) as u64),
            _ => return None,
        }),
        "mul24.lo" => Some(match ty {
            "u32" => map2!(|a, b| u64::from(((a as u32) & 0xff_ffff).wrapping_mul((b as u32) & 0xff_ffff))),
            "s32" => map2!(|a, b| u64::from((((a as i32) << 8 >> 8).wrapping_mul((b as i32) << 8 >> 8)) as u32)),
            _ => return None,
        }),
        // `bmsk`: ones from a start, so many; the start is clamped to the width, or wraps.
        "bmsk.clamp" => {
            (ty == "b32").then_some(map2!(|a, b| ones((a & 0xffff_ffff).min(32), (b & 0xffff_ffff).min(32))))
        }
        "bmsk.wrap" => (ty == "b32").then_some(map2!(|a, b| ones(a & 31, b & 31))),
        "szext.clamp" => Some(match ty {
            "u32" => map2!(|a, b| if b >= 32 { a } else { a & ((1 << b) - 1) }),
            "s32" => map2!(|a, b| if b >= 32 { a } else { extract(a, 0, b, 32, true) & 0xffff_ffff }),
            _ => return None,
        }),
        "szext.wrap" => Some(match ty {
            "u32" => map2!(|a, b| a & ((1 << (b & 31)) - 1)),
            "s32" => map2!(|a, b| extract(a, 0, b & 31, 32, true) & 0xffff_ffff),
            _ => return None,
        }),
        "add.sat" => (ty == "s32").then_some(map2!(|a, b| u64::from((a as i32).saturating_add(b as i32) as u32))),
        "sub.sat" => (ty == "s32").then_some(map2!(|a, b| u64::from((a as i32).saturating_sub(b as i32) as u32))),
        "shl" => shift_left(ty),
        "shr" => shift_right(ty),
        _ => None,
    }
}

fn shift_left(ty: &str) -> Option<Map2> {
    Some(match ty {
        "b16" => map2!(|a, b| u64::from((a as u16).checked_shl(b as u32).unwrap_or(0))),
        "b32" => map2!(|a, b| u64::from((a as u32).checked_shl(b as u32).unwrap_or(0))),
        "b64" => map2!(|a, b| a.checked_shl(b as u32).unwrap_or(0)),
        _ => return None,
    })
}

fn shift_right(ty: &str) -> Option<Map2> {
    Some(match ty {
        "b16" | "u16" => map2!(|a, b| u64::from((a as u16).checked_shr(b as u32).unwrap_or(0))),
        "b32" | "u32" => map2!(|a, b| u64::from((a as u32).checked_shr(b as u32).unwrap_or(0))),
        "b64" | "u64" => map2!(|a, b| a.checked_shr(b as u32).unwrap_or(0)),
        "s16" => map2!(|a, b| u64::from(((a as i16) >> (b as u32).min(15)) as u16)),
        "s32" => map2!(|a, b| u64::from(((a as i32) >> (b as u32).min(31)) as u32)),
        "s64" => map2!(|a, b| ((a as i64) >> (b as u32).min(63)) as u64),
        _ => return None,
    })
}

/// Instructions of three whole numbers.
pub(super) fn ternary(base: &str, ty: &str) -> Option<Map3> {
    match base {
        "mad.lo" => by_type!(ty, map3, |a, b, c| T, U => a.wrapping_mul(b).wrapping_add(c)),
        "mad.hi" => {
            by_type!(ty, map3, |a, b, c| T, U => (((a as i128).wrapping_mul(b as i128) >> T::BITS) as T).wrapping_add(c))
        }
        "mad.wide" => Some(match ty {
            "u16" => map3!(|a, b, c| u64::from((u32::from(a as u16) * u32::from(b as u16)).wrapping_add(c as u32))),
            "s16" => map3!(|a, b, c| {
                u64::from((i32::from(a as i16) * i32::from(b as i16)).wrapping_add(c as i32) as u32)
            }),
            "u32" => map3!(|a, b, c| (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c)),
            "s32" => map3!(|a, b, c| (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64),
            _ => return None,
        }),
        "sad" => {
            by_type!(ty, map3, |a, b, c| T, U => c.wrapping_add(if a < b { b.wrapping_sub(a) } else { a.wrapping_sub(b) }))
        }
        // `shf`: the pair b:a shifted by c, its upper (left) or lower (right) half.
        "shf.l.wrap" => Some(map3!(|a, b, c| (((b << 32 | a) << (c & 31)) >> 32) & 0xffff_ffff)),
        "shf.l.clamp" => Some(map3!(|a, b, c| (((b << 32 | a) << (c as u32).min(32)) >> 32) & 0xffff_ffff)),
        "shf.r.wrap" => Some(map3!(|a, b, c| ((b << 32 | a) >> (c & 31)) & 0xffff_ffff)),
        "shf.r.clamp" => Some(map3!(|a, b, c| ((b << 32 | a) >> (c as u32).min(32)) & 0xffff_ffff)),
        "bfe" => Some(match ty {
            "u32" => map3!(|a, b, c| extract(a & 0xffff_ffff, b, c, 32, false)),
            "u64" => map3!(|a, b, c| extract(a, b, c, 64, false)),
            "s32" => map3!(|a, b, c| extract(a as i32 as i64 as u64, b, c, 32, true) & 0xffff_ffff),
            "s64" => map3!(|a, b, c| extract(a, b, c, 64, true)),
            _ => return None,
        }),
        "prmt" => Some(map3!(|a, b, c| permute(a, b, c))),
        // The modes of `prmt`: bytes of b:a that the lower two bits of c choose.
        "prmt.f4e" => Some(map3!(|a, b, c| gather(a, b, c, |i, n| n + i))),
        "prmt.b4e" => Some(map3!(|a, b, c| gather(a, b, c, |i, n| (n + 8 - i) % 8))),
        "prmt.rc8" => Some(map3!(|a, b, c| gather(a, b, c, |_, n| n))),
        "prmt.ecl" => Some(map3!(|a, b, c| gather(a, b, c, |i, n| i.max(n)))),
        "prmt.ecr" => Some(map3!(|a, b, c| gather(a, b, c, |i, n| i.min(n)))),
        "prmt.rc16" => Some(map3!(|a, b, c| gather(a, b, c, |i, n| i % 2 + 2 * (n % 2)))),
        "dp4a.u32.u32" => Some(map3!(|a, b, c| dot(c, 4, |i| byte(a, i, false) * byte(b, i, false)))),
        "dp4a.u32.s32" => Some(map3!(|a, b, c| dot(c, 4, |i| byte(a, i, false) * byte(b, i, true)))),
        "dp4a.s32.u32" => Some(map3!(|a, b, c| dot(c, 4, |i| byte(a, i, true) * byte(b, i, false)))),
        "dp4a.s32.s32" => Some(map3!(|a, b, c| dot(c, 4, |i| byte(a, i, true) * byte(b, i, true)))),
        "dp2a.lo.u32.u32" => Some(map3!(|a, b, c| dot(c, 2, |i| half(a, i, false) * byte(b, i, false)))),
        "dp2a.lo.s32.s32" => Some(map3!(|a, b, c| dot(c, 2, |i| half(a, i, true) * byte(b, i, true)))),
        "dp2a.hi.u32.u32" => Some(map3!(|a, b, c| dot(c, 2, |i| half(a, i, false) * byte(b, i + 2, false)))),
        "dp2a.hi.s32.s32" => Some(map3!(|a, b, c| dot(c, 2, |i| half(a, i, true) * byte(b, i + 2, true)))),
        _ => None,
    }
}

/// `length` ones from `start` on, within 32 bits.
fn ones(start: u64, length: u64) -> u64 {
    (((1 << length) - 1) << start) & 0xffff_ffff
}

/// Four bytes of b:a, the places by the number of the byte and the lower bits of c.
fn gather(a: u64, b: u64, c: u64, place: fn(u64, u64) -> u64) -> u64 {
    let bytes = (b & 0xffff_ffff) << 32 | a & 0xffff_ffff;
    (0..4).fold(0, |out, i| out | (bytes >> (8 * place(i, c & 3)) & 0xff) << (8 * i))
}

/// Byte `i`, with its sign or without.
fn byte(x: u64, i: u64, signed: bool) -> i64 {
    let byte = (x >> (8 * i)) as u8;
    if signed { i64::from(byte as i8) } else { i64::from(byte) }
}

fn half(x: u64, i: u64, signed: bool) -> i64 {
    let half = (x >> (16 * i)) as u16;
    if signed { i64::from(half as i16) } else { i64::from(half) }
}

/// `c` and the products of `terms`, wrapped to 32 bits.
fn dot(c: u64, terms: u64, product: impl Fn(u64) -> i64) -> u64 {
    let sum: i64 = (0..terms).map(product).sum();
    u64::from((c as u32).wrapping_add(sum as u32))
}

/// `bfe`: `length` bits from `start` on; bits past the width are copies of the sign, or 0.
fn extract(value: u64, start: u64, length: u64, bits: u64, signed: bool) -> u64 {
    let (start, length) = (start & 0xff, length & 0xff);
    let sign_place = (start + length).saturating_sub(1).min(bits - 1);
    let sign = signed && length > 0 && value >> sign_place & 1 == 1;
    (0..bits).fold(0, |out, i| {
        let bit = if i < length && start + i < bits { value >> (start + i) & 1 == 1 } else { sign };
        out | u64::from(bit) << i
    })
}

/// `bfi`: `length` bits of `a` put into `b` from `start` on.
pub(crate) fn insert(a: u64, b: u64, start: u64, length: u64, bits: u64) -> u64 {
    let (start, length) = (start & 0xff, length & 0xff);
    (0..length)
        .take_while(|i| start + i < bits)
        .fold(b, |out, i| out & !(1 << (start + i)) | (a >> i & 1) << (start + i))
}

/// `prmt`: each of 4 bytes chosen from the 8 of b:a, or its sign repeated.
fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let bytes = (b & 0xffff_ffff) << 32 | a & 0xffff_ffff;
    (0..4).fold(0, |out, i| {
        let choice = selector >> (4 * i) & 0xf;
        let byte = (bytes >> (8 * (choice & 7))) as u8;
        let byte = if choice & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 };
        out | u64::from(byte) << (8 * i)
    })
}

macro_rules! by_type_compare {
    ($ty:expr, |$a:ident, $b:ident| $value:expr) => {
        match $ty {
            "u16" | "b16" => Some(compare!(|$a, $b| {
                let ($a, $b) = ($a as u16, $b as u16);
                $value
            })),
            "u32" | "b32" => Some(compare!(|$a, $b| {
                let ($a, $b) = ($a as u32, $b as u32);
                $value
            })),
            "u64" | "b64" => Some(compare!(|$a, $b| $value)),
            "s16" => Some(compare!(|$a, $b| {
                let ($a, $b) = ($a as i16, $b as i16);
                $value
            })),
            "s32" => Some(compare!(|$a, $b| {
                let ($a, $b) = ($a as i32, $b as i32);
                $value
            })),
            "s64" => Some(compare!(|$a, $b| {
                let ($a, $b) = ($a as i64, $b as i64);
                $value
            })),
            _ => None,
        }
    };
}

/// Comparisons of whole numbers.
pub(super) fn comparison(relation: &str, ty: &str) -> Option<Compare> {
    match relation {
        "eq" => by_type_compare!(ty, |a, b| a == b),
        "ne" => by_type_compare!(ty, |a, b| a != b),
        "lt" | "lo" => by_type_compare!(ty, |a, b| a < b),
        "le" | "ls" => by_type_compare!(ty, |a, b| a <= b),
        "gt" | "hi" => by_type_compare!(ty, |a, b| a > b),
        "ge" | "hs" => by_type_compare!(ty, |a, b| a >= b),
        _ => None,
    }
}
