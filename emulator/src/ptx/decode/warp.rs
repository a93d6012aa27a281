//! What lanes and warps do together: products, exchanges, votes, barriers.

use super::{Decoded, Decoder};
use crate::counts::Class;
use crate::ptx::float::Modifiers;
use crate::ptx::instruction::{Combine, Matrix, MatrixType, Op, Shuffle, Vote};
use crate::ptx::scope::Operand;

impl Decoder<'_, '_> {
    pub(super) fn matrix(&mut self) -> Decoded {
        let op = self.op;
        let ["sync", "aligned", shape, "row", "col", sums, left, right, last] = op.mods[..] else {
            return self.unknown();
        };
        let factors = match (left, right) {
            ("f16", "f16") => MatrixType::F16,
            ("bf16", "bf16") => MatrixType::Bf16,
            ("tf32", "tf32") => MatrixType::Tf32,
            _ => return self.unknown(),
        };
        let k = match (shape, factors) {
            ("m16n8k16", MatrixType::F16 | MatrixType::Bf16) => 16,
            ("m16n8k8", _) => 8,
            ("m16n8k4", MatrixType::Tf32) => 4,
            _ => return self.unknown(),
        };
        let half_sums = match (sums, last) {
            ("f32", "f32") => false,
            ("f16", "f16") if factors == MatrixType::F16 => true,
            _ => return self.unknown(),
        };
        let matrix = Matrix { k, factors, half_sums };
        let (d, a, b, c) = (self.registers(0)?, self.registers(1)?, self.registers(2)?, self.registers(3)?);
        self.one(Op::Matrix { matrix, d, a, b, c }, Class::Matrix)
    }

    /// Products of warpgroups, of 16-bit factors whose left one is in registers, and what orders them.
    pub(super) fn group_matrix(&mut self) -> Decoded {
        let op = self.op;
        let (shape, factors) = match op.mods[..] {
            ["fence", "sync", "aligned"] => return self.one(Op::GroupFence, Class::Synchronize),
            ["commit_group", "sync", "aligned"] => return self.one(Op::GroupCommit, Class::Synchronize),
            ["wait_group", "sync", "aligned"] => {
                let Operand::Bits(but) = *self.operand(0)? else { return self.unknown() };
                return self.one(Op::GroupWait { but: but as u32 }, Class::Synchronize);
            }
            ["mma_async", "sync", "aligned", shape, "f32", "f16", "f16"] => (shape, MatrixType::F16),
            ["mma_async", "sync", "aligned", shape, "f32", "bf16", "bf16"] => (shape, MatrixType::Bf16),
            _ => return self.unknown(),
        };
        let width = shape.strip_prefix("m64n").and_then(|rest| rest.strip_suffix("k16")).and_then(|n| n.parse().ok());
        let (Some(width), Operand::Vector(_)) = (width, self.operand(1)?) else { return self.unknown() };
        let (d, a, right, add) = (self.registers(0)?, self.registers(1)?, self.source(2, "b64")?, self.pred(3)?);
        let constant = |at: usize| match self.operand(at) {
            Ok(Operand::Bits(bits)) => Some(*bits),
            _ => None,
        };
        let along = match [constant(4), constant(5), constant(6)] {
            [Some(1), Some(1), Some(along @ (0 | 1))] => along == 1,
            _ => return self.unknown(),
        };
        // Along rows of 128 bytes there are 64 values.
        if d.len() != usize::from(width) / 2 || a.len() != 4 || (along && width > 64) {
            return self.unknown();
        }
        self.one(Op::GroupMatrix { width, factors, along, d, a, right, add }, Class::Matrix)
    }

    pub(super) fn warp(&mut self, ty: &str) -> Decoded {
        let op = self.op;
        let class = Class::Synchronize;
        match op.base {
            "activemask" => {
                let d = self.target(0)?.0;
                self.one(Op::ActiveMask { d }, class)
            }
            "shfl" => {
                let kind = match op.mods[..] {
                    ["sync", "up", "b32"] => Shuffle::Up,
                    ["sync", "down", "b32"] => Shuffle::Down,
                    ["sync", "bfly", "b32"] => Shuffle::Butterfly,
                    ["sync", "idx", "b32"] => Shuffle::Index,
                    _ => return self.unknown(),
                };
                let (d, present) = match self.operand(0)? {
                    Operand::Pair(value, present) => match (&**value, &**present) {
                        (Operand::Reg { number, .. }, Operand::Pred(pred)) => (*number, Some(pred.index)),
                        _ => return self.unknown(),
                    },
                    _ => (self.target(0)?.0, None),
                };
                let (a, b, c) = (self.source(1, "b32")?, self.source(2, "b32")?, self.source(3, "b32")?);
                let members = self.source(4, "b32")?;
                self.one(Op::Shuffle { kind, d, present, a, b, c, members }, class)
            }
            "vote" => {
                let kind = match op.mods[..] {
                    ["sync", "all", "pred"] => Vote::All,
                    ["sync", "any", "pred"] => Vote::Any,
                    ["sync", "uni", "pred"] => Vote::Uniform,
                    ["sync", "ballot", "b32"] => Vote::Ballot,
                    _ => return self.unknown(),
                };
                let d = if ty == "pred" { self.pred(0)?.index } else { self.target(0)?.0 };
                let (value, members) = (self.pred(1)?, self.source(2, "b32")?);
                self.one(Op::Vote { kind, d, value, members }, class)
            }
            "match" => {
                let (d, present) = match self.operand(0)? {
                    Operand::Pair(value, present) => match (&**value, &**present) {
                        (Operand::Reg { number, .. }, Operand::Pred(pred)) => (Some(*number), Some(pred.index)),
                        (Operand::Sink, Operand::Pred(pred)) => (None, Some(pred.index)),
                        (Operand::Reg { number, .. }, Operand::Sink) => (Some(*number), None),
                        _ => return self.unknown(),
                    },
                    _ => (Some(self.target(0)?.0), None),
                };
                let (a, members) = (self.source(1, ty)?, self.source(2, "b32")?);
                self.one(Op::Match { all: op.has("all"), d, present, a, members }, class)
            }
            _ => {
                let f: fn(u64, u64) -> u64 = match (op.mods[1], ty) {
                    ("add", "u32" | "s32") => |a, b| u64::from((a as u32).wrapping_add(b as u32)),
                    ("min", "u32") => |a, b| a.min(b),
                    ("max", "u32") => |a, b| a.max(b),
                    ("min", "s32") => |a, b| u64::from((a as i32).min(b as i32) as u32),
                    ("max", "s32") => |a, b| u64::from((a as i32).max(b as i32) as u32),
                    ("and", "b32") => |a, b| a & b,
                    ("or", "b32") => |a, b| a | b,
                    ("xor", "b32") => |a, b| a ^ b,
                    _ => return self.unknown(),
                };
                let (d, a, members) = (self.target(0)?.0, self.source(1, ty)?, self.source(2, "b32")?);
                self.one(Op::Reduce { f, d, a, members }, class)
            }
        }
    }

    pub(super) fn barrier(&mut self) -> Decoded {
        let op = self.op;
        if op.has("warp") {
            let members = self.source(0, "b32")?;
            return self.one(Op::WarpBarrier { members }, Class::Synchronize);
        }
        let arrive = op.has("arrive");
        if op.has("red") {
            let with = match () {
                () if op.has("and") => Combine::And,
                () if op.has("or") => Combine::Or,
                // Counts: the sum of the predicates.
                () if op.has("popc") => Combine::Xor,
                () => return self.unknown(),
            };
            let result = match self.operand(0)? {
                Operand::Pred(pred) => Ok(pred.index),
                Operand::Reg { number, .. } => Err(*number),
                _ => return self.unknown(),
            };
            let number = self.source(1, "u32")?;
            let last = self.operands.len() - 1;
            let threads = if last == 3 { Some(self.source(2, "u32")?) } else { None };
            let value = self.pred(last)?;
            return self.one(
                Op::Barrier { number, threads, arrive: false, reduce: Some((with, value, result)) },
                Class::Synchronize,
            );
        }
        if !(op.has("sync") || arrive) {
            return self.unknown();
        }
        let number = self.source(0, "u32")?;
        let threads = if self.operands.len() > 1 { Some(self.source(1, "u32")?) } else { None };
        self.one(Op::Barrier { number, threads, arrive, reduce: None }, Class::Synchronize)
    }
}
