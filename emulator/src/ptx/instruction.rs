//! Instructions in the form that is executed: every operand is a number of a register, and what an arithmetic instruction
//! computes is a function over all lanes of a warp.

use crate::counts::Class;
use crate::fault::Space;

/// A value for each lane of a warp. Values of fewer than 64 bits are zero-extended.
pub(crate) type Lanes = [u64; 32];

pub(crate) type Map1 = fn(&Lanes, &mut Lanes);
pub(crate) type Map2 = fn(&Lanes, &Lanes, &mut Lanes);
pub(crate) type Map3 = fn(&Lanes, &Lanes, &Lanes, &mut Lanes);
/// A comparison: the lanes for which it holds.
pub(crate) type Compare = fn(&Lanes, &Lanes) -> u32;
/// An atomic's new value from the old one and its operands.
pub(crate) type Update = fn(u64, u64, u64) -> u64;

/// A register, by number.
pub(crate) type Reg = u32;

/// A predicate, by number, or its opposite.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pred {
    pub index: u32,
    pub negated: bool,
}

/// How an access or an atomic orders memory between threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// Relaxed or stronger, volatile included.
    pub strong: bool,
    pub acquire: bool,
    pub release: bool,
    /// Among the threads of a block only.
    pub block: bool,
}

/// How a comparison is combined with a predicate.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Combine {
    And,
    Or,
    Xor,
}

/// Bytes of a value and whether it is extended by its sign.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Width {
    pub bytes: u8,
    pub signed: bool,
    /// Bytes of the register.
    pub register: u8,
}

/// How the source lane of a shuffle is found.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// What a vote computes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// Types of the factors of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixType {
    F16,
    Bf16,
    Tf32,
}

/// A matrix product of a warp: 16 by 8 by `k`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub k: u8,
    pub factors: MatrixType,
    /// Sums in f16 rather than f32.
    pub half_sums: bool,
}

/// An atomic operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Atomic {
    pub update: Update,
    pub bytes: u8,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Map1 {
        f: Map1,
        d: Reg,
        a: Reg,
    },
    Map2 {
        f: Map2,
        d: Reg,
        a: Reg,
        b: Reg,
    },
    Map3 {
        f: Map3,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    /// `d = f(a, b, c)` with a table of 8 bits.
    Logic3 {
        table: u8,
        mask: u64,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    },
    Convert {
        conversion: super::convert::Conversion,
        d: Reg,
        a: Reg,
    },
    /// `bfi`.
    Insert {
        wide: bool,
        d: Reg,
        a: Reg,
        b: Reg,
        start: Reg,
        length: Reg,
    },
    Compare {
        f: Compare,
        d: u32,
        opposite: Option<u32>,
        a: Reg,
        b: Reg,
        combine: Option<(Combine, Pred)>,
    },
    /// A comparison whose result is a value: 0 or `value`.
    SetValue {
        f: Compare,
        value: u64,
        d: Reg,
        a: Reg,
        b: Reg,
        combine: Option<(Combine, Pred)>,
    },
    Select {
        d: Reg,
        a: Reg,
        b: Reg,
        by: Pred,
    },
    PredLogic {
        with: Combine,
        d: u32,
        a: Pred,
        b: Pred,
    },
    PredMove {
        d: u32,
        a: Pred,
    },
    /// Splits a value into parts of so many bits, lowest first; no register where a part is not wanted.
    Unpack {
        bits: u8,
        d: Vec<Option<Reg>>,
        a: Reg,
    },
    /// Joins parts of so many bits, lowest first.
    Pack {
        bits: u8,
        d: Reg,
        a: Vec<Reg>,
    },
    AddCarry {
        d: Reg,
        a: Reg,
        b: Reg,
        bits: u8,
        subtract: bool,
        carry_in: bool,
        carry_out: bool,
    },
    MulAddCarry {
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
        bits: u8,
        high: bool,
        carry_in: bool,
        carry_out: bool,
    },
    Clock {
        d: Reg,
        bits: u8,
    },
    Load {
        space: Option<Space>,
        width: Width,
        d: Vec<Option<Reg>>,
        base: Reg,
        offset: i64,
        order: Order,
    },
    Store {
        space: Option<Space>,
        bytes: u8,
        a: Vec<Reg>,
        base: Reg,
        offset: i64,
        order: Order,
    },
    Atomic {
        space: Option<Space>,
        atomic: Atomic,
        d: Option<Reg>,
        base: Reg,
        offset: i64,
        b: Reg,
        c: Reg,
        order: Order,
    },
    CopyAsync {
        bytes: u8,
        to: Reg,
        to_offset: i64,
        from: Reg,
        from_offset: i64,
        source_bytes: Option<Reg>,
    },
    CopyCommit,
    CopyWait {
        but: u32,
    },
    LoadMatrix {
        transposed: bool,
        d: Vec<Reg>,
        base: Reg,
        offset: i64,
    },
    Matrix {
        matrix: Matrix,
        d: Vec<Reg>,
        a: Vec<Reg>,
        b: Vec<Reg>,
        c: Vec<Reg>,
    },
    /// `wgmma.mma_async`: sums of 16 rows a warp and `width` columns, the right factor in shared memory as `right` describes it.
    GroupMatrix {
        width: u16,
        factors: MatrixType,
        /// Whether its columns lie along rows of memory, rather than the inner dimension.
        along: bool,
        d: Vec<Reg>,
        a: Vec<Reg>,
        right: Reg,
        add: Pred,
    },
    /// `wgmma.fence`: what it works on from here on holds what was written before.
    GroupFence,
    /// `wgmma.commit_group`
    GroupCommit,
    /// `wgmma.wait_group`: all groups but the last `but` are done.
    GroupWait {
        but: u32,
    },
    IsSpace {
        d: u32,
        a: Reg,
        space: Space,
    },
    Shuffle {
        kind: Shuffle,
        d: Reg,
        present: Option<u32>,
        a: Reg,
        b: Reg,
        c: Reg,
        members: Reg,
    },
    Vote {
        kind: Vote,
        d: u32,
        value: Pred,
        members: Reg,
    },
    Match {
        all: bool,
        /// None where only `present` is asked for.
        d: Option<Reg>,
        present: Option<u32>,
        a: Reg,
        members: Reg,
    },
    /// `movmatrix`: an 8 by 8 matrix of 16-bit values, transposed.
    MoveMatrix {
        d: Reg,
        a: Reg,
    },
    WarpBarrier {
        members: Reg,
    },
    ActiveMask {
        d: Reg,
    },
    Reduce {
        f: fn(u64, u64) -> u64,
        d: Reg,
        a: Reg,
        members: Reg,
    },
    Barrier {
        number: Reg,
        threads: Option<Reg>,
        arrive: bool,
        reduce: Option<(Combine, Pred, Result<u32, Reg>)>,
    },
    Fence {
        /// Among the threads of a block only.
        within: bool,
    },
    /// `fence.proxy.async`: what `wgmma` reads of shared memory is what was written before.
    ProxyFence,
    Nothing,
    Branch {
        to: u32,
    },
    /// To the target that a lane's value numbers.
    BranchIndexed {
        targets: Vec<u32>,
        a: Reg,
    },
    Exit,
    Trap,
}

/// An instruction with what decides whether a lane executes it, and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub op: Op,
    pub guard: Option<Pred>,
    pub class: Class,
    /// Line of the PTX text.
    pub line: u32,
    /// File and line of the source.
    pub source: (u32, u32),
    pub text: std::sync::Arc<str>,
    /// The registers that it names.
    pub names: std::sync::Arc<[Reg]>,
}
