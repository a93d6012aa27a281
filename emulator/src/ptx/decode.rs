//! From an opcode with its modifiers to what is executed. What is not known is an error.

mod memory;
mod warp;

use super::arithmetic::{self, insert};
use super::convert;
use super::float::{self, Modifiers};
use super::instruction::{Combine, Compare, Map1, Map2, Map3, Op, Pred, Reg};
use super::parse::type_bytes;
use super::scope::{Builder, Operand};
use crate::counts::Class;
use crate::fault::Space;

/// An opcode, split at its points.
pub(super) struct Opcode<'a> {
    pub base: &'a str,
    pub mods: Vec<&'a str>,
}

impl<'a> Opcode<'a> {
    pub fn new(word: &'a str) -> Self {
        let mut parts = word.split('.');
        Opcode { base: parts.next().unwrap_or_default(), mods: parts.collect() }
    }

    /// The last modifier: the type, in most instructions.
    fn ty(&self) -> &'a str {
        self.mods.last().copied().unwrap_or_default()
    }

    /// Whether every modifier besides the last `types` is among `known`.
    fn only(&self, types: usize, known: &[&str]) -> Result<(), String> {
        let rest = &self.mods[..self.mods.len().saturating_sub(types)];
        match rest.iter().find(|modifier| !known.contains(modifier)) {
            Some(unknown) => {
                Err(format!("the modifier .{unknown} of {} is not known to the emulated device", self.base))
            }
            None => Ok(()),
        }
    }
}

impl Modifiers for Opcode<'_> {
    fn has(&self, modifier: &str) -> bool {
        self.mods.contains(&modifier)
    }
}

type Decoded = Result<Vec<(Op, Class)>, String>;

fn is_float(ty: &str) -> bool {
    matches!(ty, "f16" | "f16x2" | "bf16" | "bf16x2" | "f32" | "f64")
}

/// Bits of a value of a type, set.
fn mask(ty: &str) -> u64 {
    match type_bytes(ty) {
        Some(8 | 16) | None => u64::MAX,
        Some(bytes) => (1 << (8 * bytes)) - 1,
    }
}

struct Decoder<'o, 'b> {
    op: &'o Opcode<'o>,
    operands: &'o [Operand],
    builder: &'b mut Builder,
}

pub(super) fn decode(op: &Opcode<'_>, operands: &[Operand], builder: &mut Builder) -> Decoded {
    Decoder { op, operands, builder }.decode()
}

impl Decoder<'_, '_> {
    fn unknown<T>(&self) -> Result<T, String> {
        Err("this instruction is not known to the emulated device".to_owned())
    }

    fn operand(&self, at: usize) -> Result<&Operand, String> {
        self.operands.get(at).ok_or_else(|| format!("{} takes more operands", self.op.base))
    }

    /// A source register; constants get one of their own.
    fn source(&mut self, at: usize, ty: &str) -> Result<Reg, String> {
        let operand = self.operand(at)?.clone();
        self.source_of(&operand, ty)
    }

    fn source_of(&mut self, operand: &Operand, ty: &str) -> Result<Reg, String> {
        match operand {
            Operand::Reg { number, .. } => Ok(*number),
            Operand::Bits(bits) => Ok(self.builder.constant(bits & mask(ty))),
            other => Err(format!("{other:?} is not a value")),
        }
    }

    fn target(&self, at: usize) -> Result<(Reg, u8), String> {
        match self.operand(at)? {
            Operand::Reg { number, bytes } => Ok((*number, *bytes)),
            other => Err(format!("{other:?} is not a register")),
        }
    }

    fn pred(&self, at: usize) -> Result<Pred, String> {
        match self.operand(at)? {
            Operand::Pred(pred) => Ok(*pred),
            other => Err(format!("{other:?} is not a predicate")),
        }
    }

    fn one(&self, op: Op, class: Class) -> Decoded {
        Ok(vec![(op, class)])
    }

    fn map1(&mut self, f: Option<Map1>, ty: &str, class: Class) -> Decoded {
        let Some(f) = f else { return self.unknown() };
        let (d, a) = (self.target(0)?.0, self.source(1, ty)?);
        self.one(Op::Map1 { f, d, a }, class)
    }

    fn map2(&mut self, f: Option<Map2>, types: [&str; 2], class: Class) -> Decoded {
        let Some(f) = f else { return self.unknown() };
        let (d, a, b) = (self.target(0)?.0, self.source(1, types[0])?, self.source(2, types[1])?);
        self.one(Op::Map2 { f, d, a, b }, class)
    }

    fn map3(&mut self, f: Option<Map3>, types: [&str; 3], class: Class) -> Decoded {
        let Some(f) = f else { return self.unknown() };
        let d = self.target(0)?.0;
        let (a, b, c) = (self.source(1, types[0])?, self.source(2, types[1])?, self.source(3, types[2])?);
        self.one(Op::Map3 { f, d, a, b, c }, class)
    }

    fn decode(&mut self) -> Decoded {
        let op = self.op;
        let ty = op.ty();
        match op.base {
            "mov" => self.mov(ty),
            "cvta" => {
                // Generic addresses of global memory are its addresses; the other spaces have windows.
                let window = if op.has("shared") {
                    crate::exec::SHARED_WINDOW
                } else if op.has("local") {
                    crate::exec::LOCAL_WINDOW
                } else {
                    0
                };
                let (d, a) = (self.target(0)?.0, self.source(1, ty)?);
                if window == 0 {
                    return self.one(Op::Map1 { f: arithmetic::map1!(|a| a), d, a }, Class::Integer);
                }
                let b = self.builder.constant(window);
                let f = if op.has("to") {
                    arithmetic::map2!(|a, b| a.wrapping_sub(b))
                } else {
                    arithmetic::map2!(|a, b| a.wrapping_add(b))
                };
                self.one(Op::Map2 { f, d, a, b }, Class::Integer)
            }
            "cvt" => self.convert(),
            "add" | "sub" | "mul" | "div" | "rem" | "min" | "max" | "and" | "or" | "xor" | "copysign" => {
                self.binary(ty)
            }
            "shl" | "shr" => {
                op.only(1, &[])?;
                self.map2(arithmetic::binary(op.base, ty), [ty, "u32"], Class::Integer)
            }
            "mul24" => self.map2(arithmetic::binary(&format!("mul24.{}", op.mods[0]), ty), [ty, ty], Class::Integer),
            "mad" | "fma" | "madc" => self.multiply_add(ty),
            "addc" | "subc" => self.carry(ty),
            "sad" => self.map3(arithmetic::ternary("sad", ty), [ty; 3], Class::Integer),
            "shf" => self.map3(
                arithmetic::ternary(&format!("shf.{}.{}", op.mods[0], op.mods[1]), ty),
                [ty, ty, "u32"],
                Class::Integer,
            ),
            "bfe" => self.map3(arithmetic::ternary("bfe", ty), [ty, "u32", "u32"], Class::Integer),
            "prmt" => {
                // Its type comes first, a mode after it.
                let form = if op.mods.len() == 1 { "prmt".to_owned() } else { format!("prmt.{ty}") };
                self.map3(arithmetic::ternary(&form, "b32"), ["b32"; 3], Class::Integer)
            }
            "bmsk" => {
                self.map2(arithmetic::binary(&format!("bmsk.{}", op.mods[0]), ty), ["u32", "u32"], Class::Integer)
            }
            "szext" => self.map2(arithmetic::binary(&format!("szext.{}", op.mods[0]), ty), [ty, "u32"], Class::Integer),
            "dp2a" if op.mods.len() == 3 => self.map3(
                arithmetic::ternary(&format!("dp2a.{}.{}.{}", op.mods[0], op.mods[1], op.mods[2]), ty),
                [ty; 3],
                Class::Integer,
            ),
            "dp4a" => self.map3(
                arithmetic::ternary(&format!("dp4a.{}.{}", op.mods[0], op.mods[1]), ty),
                [ty; 3],
                Class::Integer,
            ),
            "bfi" => {
                let (d, a, b) = (self.target(0)?.0, self.source(1, ty)?, self.source(2, ty)?);
                let (start, length) = (self.source(3, "u32")?, self.source(4, "u32")?);
                self.one(Op::Insert { wide: ty == "b64", d, a, b, start, length }, Class::Integer)
            }
            "lop3" if op.mods.len() == 1 => {
                let (d, a, b, c) = (self.target(0)?.0, self.source(1, ty)?, self.source(2, ty)?, self.source(3, ty)?);
                let Operand::Bits(table) = *self.operand(4)? else { return self.unknown() };
                self.one(Op::Logic3 { table: table as u8, mask: mask(ty), d, a, b, c }, Class::Integer)
            }
            "bfind" => self.map1(arithmetic::find_bit(ty, op.has("shiftamt")), ty, Class::Integer),
            "not" | "cnot" | "popc" | "clz" | "brev" if ty != "pred" => {
                self.map1(arithmetic::unary(op.base, ty), ty, Class::Integer)
            }
            "not" => {
                let (d, a) = (self.pred(0)?.index, self.pred(1)?);
                self.one(Op::PredMove { d, a: Pred { negated: !a.negated, ..a } }, Class::Integer)
            }
            "abs" | "neg" if !is_float(ty) => self.map1(arithmetic::unary(op.base, ty), ty, Class::Integer),
            "abs" | "neg" | "sqrt" | "rcp" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
                op.only(1, &["rn", "approx", "ftz"])?;
                let class = if matches!(op.base, "abs" | "neg") { Class::Float } else { Class::Special };
                self.map1(float::unary(op.base, ty, op), ty, class)
            }
            "setp" | "set" => self.compare(),
            "selp" => {
                let (d, a, b, by) = (self.target(0)?.0, self.source(1, ty)?, self.source(2, ty)?, self.pred(3)?);
                self.one(Op::Select { d, a, b, by }, Class::Integer)
            }
            "slct" if op.mods.len() == 2 => {
                let f = match ty {
                    "s32" => arithmetic::map3!(|a, b, c| if c as i32 >= 0 { a } else { b }),
                    "f32" => arithmetic::map3!(|a, b, c| if f32::from_bits(c as u32) >= 0.0 { a } else { b }),
                    _ => return self.unknown(),
                };
                self.map3(Some(f), [op.mods[0], op.mods[0], ty], Class::Integer)
            }
            "ld" | "ldu" | "st" => self.access(),
            "atom" | "red" => self.atomic(),
            "cp" => self.copy_async(),
            "ldmatrix" => self.load_matrix(),
            "mma" => self.matrix(),
            "wgmma" => self.group_matrix(),
            "shfl" | "vote" | "match" | "activemask" | "redux" => self.warp(ty),
            "bar" | "barrier" => self.barrier(),
            // Between the ways that a thread's own accesses and others go.
            "fence" if op.has("proxy") => {
                op.only(0, &["proxy", "async", "alias", "global", "shared", "shared::cta"])?;
                let shared = op.has("async") && !op.has("global");
                self.one(if shared { Op::ProxyFence } else { Op::Nothing }, Class::Synchronize)
            }
            "membar" | "fence" => {
                op.only(0, &["sc", "acq_rel", "acquire", "release", "cta", "gl", "gpu", "sys"])?;
                self.one(Op::Fence { within: op.has("cta") }, Class::Synchronize)
            }
            "movmatrix" => {
                op.only(1, &["sync", "aligned", "m8n8", "trans"])?;
                let (d, a) = (self.target(0)?.0, self.source(1, "b32")?);
                self.one(Op::MoveMatrix { d, a }, Class::Synchronize)
            }
            "testp" => {
                let f: Compare =
                    float::test(op.mods[0], ty).ok_or("a test that is not known to the emulated device")?;
                let (d, a) = (self.pred(0)?.index, self.source(1, ty)?);
                self.one(Op::Compare { f, d, opposite: None, a, b: a, combine: None }, Class::Integer)
            }
            "prefetch" | "prefetchu" | "nanosleep" | "discard" | "applypriority" => {
                self.one(Op::Nothing, Class::Integer)
            }
            "isspacep" => {
                let space = match ty {
                    "shared" => Space::Shared,
                    "local" => Space::Local,
                    "global" => Space::Global,
                    _ => return self.unknown(),
                };
                let (d, a) = (self.pred(0)?.index, self.source(1, "u64")?);
                self.one(Op::IsSpace { d, a, space }, Class::Integer)
            }
            // Resolved to its place when the kernel ends.
            "bra" if matches!(self.operand(0)?, Operand::Label(_)) => self.one(Op::Branch { to: 0 }, Class::Branch),
            "brx" if op.has("idx") && matches!(self.operand(1)?, Operand::Label(_)) => {
                let a = self.source(0, "u32")?;
                self.one(Op::BranchIndexed { targets: Vec::new(), a }, Class::Branch)
            }
            "ret" | "exit" => self.one(Op::Exit, Class::Branch),
            "trap" | "brkpt" => self.one(Op::Trap, Class::Branch),
            _ => self.unknown(),
        }
    }

    fn mov(&mut self, ty: &str) -> Decoded {
        if ty == "pred" {
            let d = self.pred(0)?.index;
            let a = match self.operand(1)? {
                Operand::Pred(pred) => *pred,
                // A constant: a predicate against itself, or against its opposite.
                Operand::Bits(bits) => {
                    let (a, b) = (Pred { index: d, negated: false }, Pred { index: d, negated: *bits != 0 });
                    return self.one(Op::PredLogic { with: Combine::Xor, d, a, b }, Class::Integer);
                }
                _ => return self.unknown(),
            };
            return self.one(Op::PredMove { d, a }, Class::Integer);
        }
        let bytes = type_bytes(ty).ok_or("a type of mov")? as u8;
        if bytes == 16 {
            let halves = |operand: &Operand| match operand {
                Operand::Reg { number, bytes: 16 } => Ok(vec![Some(*number), Some(*number + 1)]),
                Operand::Vector(parts) => parts.iter().map(part).collect(),
                other => Err(format!("{other:?} is no value of 128 bits")),
            };
            let (to, from) = (halves(self.operand(0)?)?, halves(self.operand(1)?)?);
            let moves = to.into_iter().zip(from).filter_map(|(d, a)| Some((d?, a?)));
            let f = arithmetic::map1!(|a| a);
            return Ok(moves.map(|(d, a)| (Op::Map1 { f, d, a }, Class::Integer)).collect());
        }
        match (self.operand(0)?.clone(), self.operand(1)?.clone()) {
            (Operand::Vector(parts), _) => {
                let a = self.source(1, ty)?;
                let d: Result<Vec<_>, String> = parts.iter().map(part).collect();
                self.one(Op::Unpack { bits: bytes * 8 / parts.len() as u8, d: d?, a }, Class::Integer)
            }
            (Operand::Reg { number: d, .. }, Operand::Vector(parts)) => {
                let a: Result<Vec<_>, String> = parts.iter().map(|part| self.source_of(part, ty)).collect();
                self.one(Op::Pack { bits: bytes * 8 / parts.len() as u8, d, a: a? }, Class::Integer)
            }
            (Operand::Reg { number: d, .. }, Operand::Clock) => {
                self.one(Op::Clock { d, bits: bytes * 8 }, Class::Integer)
            }
            (Operand::Reg { .. }, _) => self.map1(Some(arithmetic::map1!(|a| a)), ty, Class::Integer),
            _ => self.unknown(),
        }
    }

    fn convert(&mut self) -> Decoded {
        let op = self.op;
        let [.., to, from] = op.mods[..] else { return self.unknown() };
        op.only(2, &["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", "sat", "ftz", "relu"])?;
        if matches!(to, "bf16x2" | "f16x2") && from == "f32" {
            return self.map2(convert::packed(to, op), ["f32", "f32"], Class::Convert);
        }
        let (d, register) = self.target(0)?;
        let a = self.source(1, from)?;
        match convert::conversion(to, from, op, register) {
            Some(Ok(f)) => self.one(Op::Map1 { f, d, a }, Class::Convert),
            Some(Err(conversion)) => self.one(Op::Convert { conversion, d, a }, Class::Convert),
            None => self.unknown(),
        }
    }

    fn binary(&mut self, ty: &str) -> Decoded {
        let op = self.op;
        if ty == "pred" {
            let with = match op.base {
                "and" => Combine::And,
                "or" => Combine::Or,
                "xor" => Combine::Xor,
                _ => return self.unknown(),
            };
            let (d, a) = (self.pred(0)?.index, self.pred(1)?);
            // A constant: the first operand, or its opposite, gives the same with `and` and `or`.
            let b = match *self.operand(2)? {
                Operand::Bits(bits) if op.base == "xor" => {
                    let a = Pred { negated: a.negated ^ (bits != 0), ..a };
                    return self.one(Op::PredMove { d, a }, Class::Integer);
                }
                Operand::Bits(bits) => Pred { negated: a.negated ^ ((bits != 0) == (op.base == "or")), ..a },
                _ => self.pred(2)?,
            };
            return self.one(Op::PredLogic { with, d, a, b }, Class::Integer);
        }
        if is_float(ty) {
            op.only(1, &["rn", "rz", "rm", "rp", "ftz", "sat", "NaN", "approx", "full"])?;
            let class = match (op.base, ty) {
                ("div", _) => Class::Special,
                (_, "f64") => Class::Double,
                _ => Class::Float,
            };
            return self.map2(float::binary(op.base, ty, op), [ty, ty], class);
        }
        if op.has("cc") {
            return self.carry(ty);
        }
        op.only(1, &["lo", "hi", "wide", "sat"])?;
        let form = if op.mods.len() > 1 { format!("{}.{}", op.base, op.mods[0]) } else { op.base.to_owned() };
        self.map2(arithmetic::binary(&form, ty), [ty, ty], Class::Integer)
    }

    fn multiply_add(&mut self, ty: &str) -> Decoded {
        let op = self.op;
        if is_float(ty) {
            op.only(1, &["rn", "rz", "rm", "rp", "ftz", "sat", "relu"])?;
            let class = if ty == "f64" { Class::Double } else { Class::Float };
            return self.map3(float::ternary(ty, op), [ty; 3], class);
        }
        if op.base == "madc" || op.has("cc") {
            let (d, a, b, c) = (self.target(0)?.0, self.source(1, ty)?, self.source(2, ty)?, self.source(3, ty)?);
            let bits = type_bytes(ty).unwrap_or(4) as u8 * 8;
            if !ty.starts_with('u') {
                return self.unknown();
            }
            let (carry_in, carry_out) = (op.base == "madc", op.has("cc"));
            return self
                .one(Op::MulAddCarry { d, a, b, c, bits, high: op.has("hi"), carry_in, carry_out }, Class::Integer);
        }
        op.only(1, &["lo", "hi", "wide"])?;
        let sum = if op.has("wide") { "u64" } else { ty };
        self.map3(arithmetic::ternary(&format!("mad.{}", op.mods[0]), ty), [ty, ty, sum], Class::Integer)
    }

    fn carry(&mut self, ty: &str) -> Decoded {
        let op = self.op;
        op.only(1, &["cc"])?;
        let (d, a, b) = (self.target(0)?.0, self.source(1, ty)?, self.source(2, ty)?);
        let bits = type_bytes(ty).unwrap_or(4) as u8 * 8;
        let (subtract, carry_in) = (op.base.starts_with("sub"), op.base.ends_with('c'));
        self.one(Op::AddCarry { d, a, b, bits, subtract, carry_in, carry_out: op.has("cc") }, Class::Integer)
    }

    /// `setp.lt.and.f32 p|q, a, b, c` and `set.lt.u32.f32 d, a, b`.
    fn compare(&mut self) -> Decoded {
        let op = self.op;
        let ty = op.ty();
        let relation = op.mods[0];
        let f: Option<Compare> =
            if is_float(ty) { float::comparison(relation, ty, op) } else { arithmetic::comparison(relation, ty) };
        let Some(f) = f else { return self.unknown() };
        let with = [("and", Combine::And), ("or", Combine::Or), ("xor", Combine::Xor)];
        let with = with.iter().find(|(name, _)| op.has(name)).map(|&(_, with)| with);
        let (a, b) = (self.source(1, ty)?, self.source(2, ty)?);
        let combine = match with {
            Some(with) => Some((with, self.pred(3)?)),
            None => None,
        };
        let class = Class::Integer;
        if op.base == "set" {
            let value = match op.mods[op.mods.len() - 2] {
                "u32" | "s32" => 0xffff_ffff,
                "f32" => u64::from(1.0f32.to_bits()),
                _ => return self.unknown(),
            };
            let d = self.target(0)?.0;
            return self.one(Op::SetValue { f, value, d, a, b, combine }, class);
        }
        op.only(1, &[relation, "and", "or", "xor", "ftz"])?;
        if matches!(ty, "f16x2" | "bf16x2") {
            return self.compare_pairs(f, (a, b), combine);
        }
        let (d, opposite) = match self.operand(0)? {
            Operand::Pred(pred) => (pred.index, None),
            Operand::Pair(first, second) => {
                let second = if let Operand::Pred(pred) = **second { Some(pred.index) } else { None };
                let Operand::Pred(first) = **first else { return self.unknown() };
                (first.index, second)
            }
            _ => return self.unknown(),
        };
        self.one(Op::Compare { f, d, opposite, a, b, combine }, class)
    }

    /// `setp.lt.f16x2 p|q, a, b`: `p` for the lower halves, `q` for the upper.
    fn compare_pairs(&mut self, f: Compare, (a, b): (Reg, Reg), combine: Option<(Combine, Pred)>) -> Decoded {
        let (Operand::Pair(low, high), class) = (self.operand(0)?.clone(), Class::Integer) else {
            return self.unknown();
        };
        let (Operand::Pred(low), Operand::Pred(high)) = (*low, *high) else { return self.unknown() };
        let upper = arithmetic::map1!(|a| a >> 16);
        let [upper_a, upper_b] = [self.builder.register(), self.builder.register()];
        // The upper ones first into a register each: the predicates may be among what is combined.
        let compare = |d: Pred, a, b| (Op::Compare { f, d: d.index, opposite: None, a, b, combine }, class);
        Ok(vec![
            (Op::Map1 { f: upper, d: upper_a, a }, class),
            (Op::Map1 { f: upper, d: upper_b, a: b }, class),
            compare(low, a, b),
            compare(high, upper_a, upper_b),
        ])
    }

    fn registers(&mut self, at: usize) -> Result<Vec<Reg>, String> {
        match self.operand(at)?.clone() {
            Operand::Vector(parts) => parts.iter().map(|part| self.source_of(part, "b32")).collect(),
            single => Ok(vec![self.source_of(&single, "b32")?]),
        }
    }
}

fn part(operand: &Operand) -> Result<Option<Reg>, String> {
    match operand {
        Operand::Reg { number, .. } => Ok(Some(*number)),
        Operand::Sink => Ok(None),
        other => Err(format!("{other:?} is not a register")),
    }
}

/// `bfi` for a lane.
pub(crate) fn insert_bits(wide: bool, a: u64, b: u64, start: u64, length: u64) -> u64 {
    insert(a, b, start, length, if wide { 64 } else { 32 })
}
