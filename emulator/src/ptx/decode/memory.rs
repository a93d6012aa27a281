//! Loads, stores, atomics and copies.

use half::{bf16, f16};

use super::{Decoded, Decoder, part};
use crate::counts::Class;
use crate::fault::Space;
use crate::ptx::float::Modifiers;
use crate::ptx::instruction::{Atomic, Op, Order, Reg, Update, Width};
use crate::ptx::parse::type_bytes;
use crate::ptx::scope::Operand;

impl Decoder<'_, '_> {
    /// How an access orders memory, by its modifiers.
    fn order(&self, atomic: bool) -> Order {
        let op = self.op;
        let (acquire, release) = (op.has("acquire") || op.has("acq_rel"), op.has("release") || op.has("acq_rel"));
        let strong = atomic || acquire || release || op.has("relaxed") || op.has("volatile");
        Order { strong, acquire, release, block: op.has("cta") }
    }

    fn space(&self) -> Option<Space> {
        self.op.mods.iter().find_map(|modifier| {
            Some(match modifier.split("::").next()? {
                "global" | "const" => Space::Global,
                "shared" => Space::Shared,
                "local" => Space::Local,
                "param" => Space::Param,
                _ => return None,
            })
        })
    }

    fn address(&self, at: usize) -> Result<(Reg, i64), String> {
        match self.operand(at)? {
            Operand::Address { base, offset } => Ok((*base, *offset)),
            other => Err(format!("{other:?} is not an address")),
        }
    }

    pub(super) fn access(&mut self) -> Decoded {
        let op = self.op;
        let ty = op.ty();
        for modifier in &op.mods[..op.mods.len() - 1] {
            let stem = modifier.split("::").next().unwrap_or_default();
            let known = [
                "global", "const", "shared", "local", "param", "volatile", "relaxed", "acquire", "release", "weak",
                "cta", "gpu", "sys", "nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "v2", "v4", "v8", "L1", "L2",
                "cluster",
            ];
            if !known.contains(&stem) {
                return Err(format!("the modifier .{modifier} of {} is not known to the emulated device", op.base));
            }
        }
        let bytes = type_bytes(ty).filter(|&bytes| bytes > 0).ok_or("a type of this access")?.min(8) as u8;
        let order = self.order(false);
        let space = self.space();
        let (value, place) = if op.base == "st" { (1, 0) } else { (0, 1) };
        let (base, offset) = self.address(place)?;
        let parts = match self.operand(value)?.clone() {
            Operand::Vector(parts) => parts,
            Operand::Reg { number, bytes: 16 } => {
                [number, number + 1].map(|number| Operand::Reg { number, bytes: 8 }).to_vec()
            }
            single => vec![single],
        };
        if op.base == "st" {
            let a: Result<Vec<_>, String> = parts.iter().map(|part| self.source_of(part, ty)).collect();
            return self.one(Op::Store { space, bytes, a: a?, base, offset, order }, Class::Store);
        }
        let register =
            parts.iter().find_map(|part| if let Operand::Reg { bytes, .. } = part { Some(*bytes) } else { None });
        let d: Result<Vec<_>, String> = parts.iter().map(part).collect();
        let width = Width { bytes, signed: ty.starts_with('s'), register: register.unwrap_or(bytes) };
        self.one(Op::Load { space, width, d: d?, base, offset, order }, Class::Load)
    }

    pub(super) fn atomic(&mut self) -> Decoded {
        let op = self.op;
        let ty = op.ty();
        let known = ["global", "shared", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "noftz"];
        let rest: Vec<_> = op.mods[..op.mods.len() - 1].iter().filter(|modifier| !known.contains(modifier)).collect();
        let [operation] = rest[..] else { return self.unknown() };
        // Sums of f32 in global memory flush subnormals, whatever the kernel was compiled with; those in shared memory do not.
        let flushes = (*operation, ty) == ("add", "f32") && op.has("global");
        let found = if flushes { Some(add_flushed as Update) } else { update(operation, ty) };
        let Some(update) = found else { return self.unknown() };
        let bytes = type_bytes(ty).unwrap_or(4) as u8;
        let order = self.order(true);
        let returns = op.base == "atom";
        let at = usize::from(returns);
        let d = match self.operand(0)? {
            Operand::Reg { number, .. } if returns => Some(*number),
            _ => None,
        };
        let (base, offset) = self.address(at)?;
        let b = self.source(at + 1, ty)?;
        let c = if *operation == "cas" { self.source(at + 2, ty)? } else { b };
        let space = self.space();
        self.one(Op::Atomic { space, atomic: Atomic { update, bytes }, d, base, offset, b, c, order }, Class::Atomic)
    }

    pub(super) fn copy_async(&mut self) -> Decoded {
        let op = self.op;
        if !op.has("async") {
            return self.unknown();
        }
        if op.has("commit_group") {
            return self.one(Op::CopyCommit, Class::Synchronize);
        }
        if op.has("wait_all") {
            return Ok(vec![(Op::CopyCommit, Class::Synchronize), (Op::CopyWait { but: 0 }, Class::Synchronize)]);
        }
        if op.has("wait_group") {
            let Operand::Bits(but) = *self.operand(0)? else { return self.unknown() };
            return self.one(Op::CopyWait { but: but as u32 }, Class::Synchronize);
        }
        if !(op.has("ca") || op.has("cg")) {
            return self.unknown();
        }
        let ((to, to_offset), (from, from_offset)) = (self.address(0)?, self.address(1)?);
        let Operand::Bits(bytes) = *self.operand(2)? else { return self.unknown() };
        let source_bytes = if self.operands.len() > 3 { Some(self.source(3, "u32")?) } else { None };
        let bytes = bytes as u8;
        self.one(Op::CopyAsync { bytes, to, to_offset, from, from_offset, source_bytes }, Class::Load)
    }

    pub(super) fn load_matrix(&mut self) -> Decoded {
        let op = self.op;
        op.only(1, &["sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"])?;
        let d = self.registers(0)?;
        let (base, offset) = self.address(1)?;
        self.one(Op::LoadMatrix { transposed: op.has("trans"), d, base, offset }, Class::Load)
    }
}

/// What an atomic operation writes, from the old value and its operands.
fn update(operation: &str, ty: &str) -> Option<Update> {
    fn float(a: u64, b: u64) -> u64 {
        u64::from((f32::from_bits(a as u32) + f32::from_bits(b as u32)).to_bits())
    }
    fn half(a: u64, b: u64) -> u64 {
        let [a, b] = [a, b].map(|x| f16::from_bits(x as u16).to_f64());
        u64::from(f16::from_f64(a + b).to_bits())
    }
    fn brain(a: u64, b: u64) -> u64 {
        let [a, b] = [a, b].map(|x| bf16::from_bits(x as u16).to_f64());
        u64::from(bf16::from_f64(a + b).to_bits())
    }
    fn both(add: fn(u64, u64) -> u64, a: u64, b: u64) -> u64 {
        add(a, b) | add(a >> 16, b >> 16) << 16
    }
    Some(match (operation, ty) {
        ("add", "u32" | "s32") => |a, b, _| u64::from((a as u32).wrapping_add(b as u32)),
        ("add", "u64" | "s64") => |a, b, _| a.wrapping_add(b),
        ("add", "f32") => |a, b, _| float(a, b),
        ("add", "f16") => |a, b, _| half(a, b),
        ("add", "bf16") => |a, b, _| brain(a, b),
        ("add", "f16x2") => |a, b, _| both(half, a, b),
        ("add", "bf16x2") => |a, b, _| both(brain, a, b),
        ("add", "f64") => |a, b, _| (f64::from_bits(a) + f64::from_bits(b)).to_bits(),
        ("min", "u32" | "u64") => |a, b, _| a.min(b),
        ("max", "u32" | "u64") => |a, b, _| a.max(b),
        ("min", "s32") => |a, b, _| u64::from((a as i32).min(b as i32) as u32),
        ("max", "s32") => |a, b, _| u64::from((a as i32).max(b as i32) as u32),
        ("min", "s64") => |a, b, _| (a as i64).min(b as i64) as u64,
        ("max", "s64") => |a, b, _| (a as i64).max(b as i64) as u64,
        ("and", "b32" | "b64") => |a, b, _| a & b,
        ("or", "b32" | "b64") => |a, b, _| a | b,
        ("xor", "b32" | "b64") => |a, b, _| a ^ b,
        ("exch", "b32" | "b64") => |_, b, _| b,
        ("cas", "b16" | "b32" | "b64") => |a, b, c| if a == b { c } else { a },
        ("inc", "u32") => |a, b, _| if a >= b { 0 } else { a + 1 },
        ("dec", "u32") => |a, b, _| if a == 0 || a > b { b } else { a - 1 },
        _ => return None,
    })
}

/// The sum of two f32, with subnormals taken and left as 0.
fn add_flushed(a: u64, b: u64, _: u64) -> u64 {
    let flush = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
    let [a, b] = [a, b].map(|x| flush(f32::from_bits(x as u32)));
    u64::from(flush(a + b).to_bits())
}
