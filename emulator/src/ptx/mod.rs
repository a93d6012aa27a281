//! PTX as nvcc emits it, decoded for execution.

mod arithmetic;
mod convert;
mod decode;
pub(crate) mod float;
mod instruction;
mod parse;
mod scope;
mod token;

use std::collections::HashMap;
use std::sync::Arc;

pub(crate) use decode::insert_bits;
pub(crate) use instruction::{Combine, Instruction, Lanes, Matrix, MatrixType, Op, Order, Pred, Shuffle, Vote};

use crate::fault::Fault;
use crate::memory::Memory;

/// PTX that could not be read, or an instruction that the emulated device does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PTX line {line}: {message}")]
pub struct ParseError {
    /// Line of the text.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

/// Addresses of param space from here on: arguments and results of functions that a kernel calls, in the thread's own memory.
pub(crate) const CALL_PARAMS: u64 = 1 << 40;

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Where in the parameters it starts, in bytes.
    pub offset: usize,
    /// Its length in bytes.
    pub size: usize,
    /// What its offset is a multiple of.
    pub align: usize,
}

/// A variable of the module or of a kernel.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub align: usize,
    pub bytes: usize,
    pub initial: Vec<u8>,
}

/// A kernel, decoded.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Its parameters in order.
    pub params: Vec<Param>,
    /// Bytes of shared memory that it declares.
    pub static_shared: usize,
    /// Bytes of local memory a thread.
    pub local: usize,
    /// The most threads a block may have.
    pub max_threads: u32,
    /// Whether warpgroups multiply in it.
    pub(crate) in_groups: bool,
    pub(crate) code: Vec<Instruction>,
    /// Registers, constants and special registers, one [`Lanes`] each.
    pub(crate) registers: usize,
    /// Registers that hold the same value in every lane, from the start.
    pub(crate) constants: Vec<(u32, u64)>,
    /// Registers that hold an address of a variable of the module.
    pub(crate) addresses: Vec<(u32, String)>,
    pub(crate) specials: Vec<(u32, Special)>,
    pub(crate) predicates: usize,
}

impl Kernel {
    /// Bytes of all parameters.
    pub fn param_bytes(&self) -> usize {
        self.params.last().map_or(0, |last| last.offset + last.size)
    }
}

/// A special register that stays as it is while a thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(u8),
    Threads(u8),
    Block(u8),
    Blocks(u8),
    Lane,
    Warp,
    Warps,
    LaneMask(LaneMask),
    Multiprocessor,
    Multiprocessors,
    DynamicShared,
    TotalShared,
    Grid,
    /// `%envreg0` and so on.
    Environment(u8),
}

/// Which lanes a `%lanemask_..` names, relative to the lane that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LaneMask {
    Equal,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

/// A module of PTX, decoded.
#[derive(Debug, Default)]
pub struct Module {
    pub(crate) kernels: HashMap<String, Arc<Kernel>>,
    pub(crate) variables: HashMap<String, Variable>,
    pub(crate) files: Arc<HashMap<u32, String>>,
}

impl Module {
    /// Reads and decodes PTX text.
    ///
    /// # Errors
    /// What is not understood, with its line. An instruction that is not known is an error, never passed over.
    pub fn parse(text: &str) -> Result<Module, ParseError> {
        parse::module(text)
    }

    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels.get(name).map(Arc::as_ref)
    }

    /// Names of all kernels.
    pub fn kernel_names(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }

    /// Gives the module's variables memory on a device.
    ///
    /// # Errors
    /// No memory left.
    pub fn instantiate(self: &Arc<Self>, memory: &Memory, device: u32) -> Result<Loaded, Fault> {
        let mut globals = HashMap::new();
        for (name, variable) in &self.variables {
            let address = memory.allocate(device, variable.bytes)?;
            let mut bytes = variable.initial.clone();
            bytes.resize(variable.bytes, 0);
            memory.copy_in(address, &bytes)?;
            globals.insert(name.clone(), (address, variable.bytes));
        }
        Ok(Loaded { module: Arc::clone(self), device, globals })
    }
}

/// A module on a device.
#[derive(Debug)]
pub struct Loaded {
    /// The module.
    pub module: Arc<Module>,
    /// The device.
    pub device: u32,
    globals: HashMap<String, (u64, usize)>,
}

impl Loaded {
    /// Address and length of a variable.
    pub fn global(&self, name: &str) -> Option<(u64, usize)> {
        self.globals.get(name).copied()
    }

    /// Frees the module's variables.
    ///
    /// # Errors
    /// Variables that were freed before.
    pub fn unload(&self, memory: &Memory) -> Result<(), Fault> {
        self.globals.values().try_for_each(|&(address, _)| memory.free(address))
    }
}

impl LaneMask {
    pub(crate) fn of(self, lane: u32) -> u32 {
        let own = 1u32 << lane;
        match self {
            LaneMask::Equal => own,
            LaneMask::Less => own - 1,
            LaneMask::LessEqual => own | (own - 1),
            LaneMask::Greater => !(own | (own - 1)),
            LaneMask::GreaterEqual => !(own - 1),
        }
    }
}
