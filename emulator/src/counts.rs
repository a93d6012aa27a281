//! What launches did, counted: so that tests hold a kernel to its floor without a clock.

use std::ops::AddAssign;

/// Kinds of instructions that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Class {
    /// Whole numbers, logic, moves and selections.
    Integer,
    /// f32, f16 and bf16.
    Float,
    /// f64.
    Double,
    /// Division, roots, exponentials and their like.
    Special,
    /// Conversions.
    Convert,
    /// Loads.
    Load,
    /// Stores.
    Store,
    /// Atomics.
    Atomic,
    /// Matrix products of a warp.
    Matrix,
    /// Branches.
    Branch,
    /// Barriers, fences, shuffles and votes.
    Synchronize,
}

/// Number of [`Class`]es.
pub const CLASSES: usize = 11;

/// Sums over one or many launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Launches.
    pub launches: u64,
    /// Instructions, one for each thread that executes it, by [`Class`].
    pub instructions: [u64; CLASSES],
    /// Bytes that threads read from global memory.
    pub global_read: u64,
    /// Bytes that threads wrote to global memory.
    pub global_written: u64,
    /// Bytes of global memory, by whole words, that a launch read: each once, as a cache of any size would fetch them. (Atomics
    /// and other ordered accesses are not among them.)
    pub touched_read: u64,
    /// The same of what it wrote.
    pub touched_written: u64,
    /// Bytes that threads read from shared memory.
    pub shared_read: u64,
    /// Bytes that threads wrote to shared memory.
    pub shared_written: u64,
    /// Bytes that threads read from and wrote to local memory (spills, arrays).
    pub local: u64,
    /// 32-byte sectors of global memory that accesses of warps touched.
    pub sectors: u64,
    /// The fewest sectors that accesses of as many different bytes could touch.
    pub ideal_sectors: u64,
    /// Accesses of warps to global memory.
    pub accesses: u64,
    /// Those that touched more sectors than as many bytes need.
    pub uncoalesced: u64,
    /// Passes over shared memory besides the first of an access.
    pub bank_conflicts: u64,
    /// Barriers that blocks completed.
    pub barriers: u64,
}

impl Counts {
    /// All instructions.
    pub fn total(&self) -> u64 {
        self.instructions.iter().sum()
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        for (sum, term) in self.instructions.iter_mut().zip(other.instructions) {
            *sum += term;
        }
        self.launches += other.launches;
        self.global_read += other.global_read;
        self.global_written += other.global_written;
        self.touched_read += other.touched_read;
        self.touched_written += other.touched_written;
        self.shared_read += other.shared_read;
        self.shared_written += other.shared_written;
        self.local += other.local;
        self.sectors += other.sectors;
        self.ideal_sectors += other.ideal_sectors;
        self.accesses += other.accesses;
        self.uncoalesced += other.uncoalesced;
        self.bank_conflicts += other.bank_conflicts;
        self.barriers += other.barriers;
    }
}
