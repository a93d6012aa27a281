//! Names within a kernel: registers, variables, labels.

use std::collections::HashMap;

use super::instruction::{Instruction, Op, Pred};
use super::{CALL_PARAMS, Kernel, LaneMask, Param, Special};

/// The end of a function that is called.
pub(super) const RETURN: &str = "end of the call";

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
enum Name {
    /// `count` registers of so many bytes, from a number on.
    Registers {
        first: u32,
        count: u32,
        bytes: u8,
    },
    Predicates {
        first: u32,
        count: u32,
    },
    /// A variable at this address of its space.
    Variable(u64),
    DynamicShared,
}

/// An operand, its names resolved.
#[derive(Clone, Debug)]
pub(super) enum Operand {
    Reg {
        number: u32,
        bytes: u8,
    },
    Pred(Pred),
    /// A whole number, or the bits of a float.
    Bits(u64),
    Address {
        base: u32,
        offset: i64,
    },
    Vector(Vec<Operand>),
    Pair(Box<Operand>, Box<Operand>),
    Clock,
    /// `_`
    Sink,
    Label(String),
}

impl Operand {
    /// Adds the registers that it names.
    pub fn names(&self, to: &mut Vec<u32>) {
        match self {
            Operand::Reg { number, .. } | Operand::Address { base: number, .. } => to.push(*number),
            Operand::Vector(parts) => parts.iter().for_each(|part| part.names(to)),
            Operand::Pair(first, second) => {
                first.names(to);
                second.names(to);
            }
            Operand::Pred(_) | Operand::Bits(_) | Operand::Clock | Operand::Sink | Operand::Label(_) => {}
        }
    }
}

/// Collects a kernel's code.
#[derive(Default)]
pub(super) struct Builder {
    scopes: Vec<HashMap<String, Name>>,
    registers: u32,
    predicates: u32,
    constants: HashMap<u64, u32>,
    addresses: HashMap<String, u32>,
    specials: HashMap<Special, u32>,
    dynamic_shared: Option<(u32, usize)>,
    pub params: Vec<Param>,
    pub static_shared: usize,
    pub local: usize,
    pub max_threads: u32,
    labels: HashMap<String, u32>,
    jumps: Vec<(usize, String)>,
    tables: HashMap<String, Vec<String>>,
    indexed: Vec<(usize, String)>,
    /// The functions whose bodies are being read into the kernel, innermost last: name, and a number that no other call has.
    calls: Vec<(String, u32)>,
    calls_read: u32,
    pub code: Vec<Instruction>,
}

fn align(value: usize, to: usize) -> usize {
    value.div_ceil(to.max(1)) * to.max(1)
}

impl Builder {
    pub fn new() -> Self {
        Builder { scopes: vec![HashMap::new()], max_threads: 1024, ..Builder::default() }
    }

    pub fn enter(&mut self) {
        self.scopes.push(HashMap::new());
    }

    pub fn leave(&mut self) {
        self.scopes.pop();
    }

    fn define(&mut self, name: &str, what: Name) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), what);
        }
    }

    /// `count` registers named `name0`, `name1`, ..; or one named `name`. No bytes: predicates.
    pub fn declare(&mut self, name: &str, count: Option<u32>, bytes: u8) {
        // Values of 128 bits take two registers each.
        let number = count.unwrap_or(1) * if bytes == 16 { 2 } else { 1 };
        let what = if bytes == 0 {
            self.predicates += number;
            Name::Predicates { first: self.predicates - number, count: number }
        } else {
            self.registers += number;
            Name::Registers { first: self.registers - number, count: number, bytes }
        };
        self.define(&if count.is_some() { format!("{name}#") } else { name.to_owned() }, what);
    }

    pub fn declare_param(&mut self, name: &str, size: usize, alignment: usize) {
        let offset = align(self.params.last().map_or(0, |last| last.offset + last.size), alignment);
        self.params.push(Param { offset, size, align: alignment });
        self.define(name, Name::Variable(offset as u64));
    }

    pub fn declare_shared(&mut self, name: &str, size: usize, alignment: usize) {
        let offset = align(self.static_shared, alignment);
        self.static_shared = offset + size;
        self.define(name, Name::Variable(offset as u64));
    }

    pub fn declare_dynamic_shared(&mut self, name: &str, alignment: usize) {
        let most = self.dynamic_shared.map_or(alignment, |(_, other)| other.max(alignment));
        let register = self.dynamic_shared.map_or_else(|| self.register(), |(register, _)| register);
        self.dynamic_shared = Some((register, most));
        self.define(name, Name::DynamicShared);
    }

    pub fn declare_local(&mut self, name: &str, size: usize, alignment: usize) {
        let offset = align(self.local, alignment);
        self.local = offset + size;
        self.define(name, Name::Variable(offset as u64));
    }

    /// An argument or a result of a call.
    pub fn declare_call_param(&mut self, name: &str, size: usize, alignment: usize) {
        let offset = align(self.local, alignment);
        self.local = offset + size;
        self.define(name, Name::Variable(CALL_PARAMS + offset as u64));
    }

    /// Starts the body of a function that is called: its parameters, then its results, stand where the caller's do.
    pub fn enter_call(&mut self, function: &str, bound: &[(String, u64)]) -> Result<(), String> {
        if self.calls.iter().any(|(name, _)| name == function) {
            return Err(format!("{function} calls itself, which is not known to the emulated device"));
        }
        self.calls_read += 1;
        self.calls.push((function.to_owned(), self.calls_read));
        self.enter();
        for (name, address) in bound {
            self.define(name, Name::Variable(*address));
        }
        Ok(())
    }

    /// Ends it: its returns lead here.
    pub fn leave_call(&mut self) {
        self.label(RETURN);
        self.leave();
        self.calls.pop();
    }

    /// Whether the code belongs to a function that is called.
    pub fn in_call(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Labels are a call's own.
    fn own_label(&self, name: &str) -> String {
        self.calls.last().map_or_else(|| name.to_owned(), |(_, number)| format!("{name}@{number}"))
    }

    /// Where a call's body begins, for a guard to jump over it.
    pub fn calls_read(&self) -> u32 {
        self.calls_read
    }

    pub fn table(&mut self, name: &str, labels: Vec<String>) {
        let labels = labels.iter().map(|label| self.own_label(label)).collect();
        self.tables.insert(self.own_label(name), labels);
    }

    /// Remembers that the next instruction jumps by a table.
    pub fn jump_by(&mut self, table: &str) {
        self.indexed.push((self.code.len(), self.own_label(table)));
    }

    pub fn register(&mut self) -> u32 {
        self.registers += 1;
        self.registers - 1
    }

    /// A register that holds `bits` always.
    pub fn constant(&mut self, bits: u64) -> u32 {
        if let Some(&register) = self.constants.get(&bits) {
            return register;
        }
        let register = self.register();
        self.constants.insert(bits, register);
        register
    }

    fn special(&mut self, special: Special) -> Operand {
        if let Some(&number) = self.specials.get(&special) {
            return Operand::Reg { number, bytes: 4 };
        }
        let number = self.register();
        self.specials.insert(special, number);
        Operand::Reg { number, bytes: 4 }
    }

    fn find(&self, name: &str) -> Option<(Name, u32)> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[stem.len()..].parse().ok();
        let family = format!("{stem}#");
        self.scopes.iter().rev().find_map(|scope| {
            let single = scope.get(name).map(|&what| (what, 0));
            single.or_else(|| Some((*scope.get(&family)?, number?)))
        })
    }

    /// What a name stands for; none where it is neither of this kernel nor special.
    pub fn operand(&mut self, name: &str) -> Option<Operand> {
        if let Some((what, number)) = self.find(name) {
            return match what {
                Name::Registers { first, count, bytes: 16 } if 2 * number < count => {
                    Some(Operand::Reg { number: first + 2 * number, bytes: 16 })
                }
                Name::Registers { first, count, bytes } if number < count => {
                    Some(Operand::Reg { number: first + number, bytes })
                }
                Name::Predicates { first, count } if number < count => {
                    Some(Operand::Pred(Pred { index: first + number, negated: false }))
                }
                Name::Variable(address) => Some(Operand::Bits(address)),
                Name::DynamicShared => self.dynamic_shared.map(|(number, _)| Operand::Reg { number, bytes: 4 }),
                _ => None,
            };
        }
        let axis = |letter: &str| ["x", "y", "z"].iter().position(|&axis| axis == letter).map(|axis| axis as u8);
        let (stem, axis) = match name.split_once('.') {
            Some((stem, letter)) => (stem, axis(letter)?),
            None => (name, 0),
        };
        if let Some(number) = stem.strip_prefix("%envreg").and_then(|number| number.parse().ok()) {
            return Some(self.special(Special::Environment(number)));
        }
        Some(self.special(match stem {
            "%tid" => Special::Thread(axis),
            "%ntid" => Special::Threads(axis),
            "%ctaid" => Special::Block(axis),
            "%nctaid" => Special::Blocks(axis),
            "%laneid" => Special::Lane,
            "%warpid" => Special::Warp,
            "%nwarpid" => Special::Warps,
            "%smid" => Special::Multiprocessor,
            "%nsmid" => Special::Multiprocessors,
            "%gridid" => Special::Grid,
            "%dynamic_smem_size" => Special::DynamicShared,
            "%total_smem_size" => Special::TotalShared,
            "%lanemask_eq" => Special::LaneMask(LaneMask::Equal),
            "%lanemask_lt" => Special::LaneMask(LaneMask::Less),
            "%lanemask_le" => Special::LaneMask(LaneMask::LessEqual),
            "%lanemask_gt" => Special::LaneMask(LaneMask::Greater),
            "%lanemask_ge" => Special::LaneMask(LaneMask::GreaterEqual),
            "%clock" | "%clock64" | "%globaltimer" | "%globaltimer_lo" | "%globaltimer_hi" | "%clock_hi" => {
                return Some(Operand::Clock);
            }
            _ => return None,
        }))
    }

    /// A register with the address of a variable of the module.
    pub fn module_variable(&mut self, name: &str) -> u32 {
        if let Some(&register) = self.addresses.get(name) {
            return register;
        }
        let register = self.register();
        self.addresses.insert(name.to_owned(), register);
        register
    }

    pub fn label(&mut self, name: &str) {
        self.labels.insert(self.own_label(name), self.code.len() as u32);
    }

    /// Remembers that the next instruction jumps to a label.
    pub fn jump(&mut self, label: &str) {
        self.jumps.push((self.code.len(), self.own_label(label)));
    }

    /// The kernel, its jumps resolved.
    pub fn finish(mut self, name: &str) -> Result<Kernel, String> {
        let target = |label: &String| self.labels.get(label).copied().ok_or_else(|| format!("no label {label}"));
        for (at, label) in &self.jumps {
            self.code[*at].op = Op::Branch { to: target(label)? };
        }
        for (at, table) in &self.indexed {
            let labels = self.tables.get(table).ok_or_else(|| format!("no table {table}"))?;
            let found: Result<Vec<u32>, String> = labels.iter().map(target).collect();
            if let Op::BranchIndexed { targets, .. } = &mut self.code[*at].op {
                *targets = found?;
            }
        }
        let mut constants: Vec<_> = self.constants.into_iter().map(|(bits, register)| (register, bits)).collect();
        if let Some((register, alignment)) = self.dynamic_shared {
            self.static_shared = align(self.static_shared, alignment);
            constants.push((register, self.static_shared as u64));
        }
        let in_groups = self.code.iter().any(|instruction| matches!(instruction.op, Op::GroupMatrix { .. }));
        Ok(Kernel {
            name: name.to_owned(),
            in_groups,
            params: self.params,
            static_shared: self.static_shared,
            local: align(self.local, 16),
            max_threads: self.max_threads,
            code: self.code,
            registers: self.registers as usize,
            constants,
            addresses: self.addresses.into_iter().map(|(name, register)| (register, name)).collect(),
            specials: self.specials.into_iter().map(|(special, register)| (register, special)).collect(),
            predicates: self.predicates as usize,
        })
    }
}
