//! What the emulated device finds wrong, in one sentence that says where.

use std::fmt;

/// A state space of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Memory of the device, and pinned memory of the host.
    Global,
    /// Memory of a block.
    Shared,
    /// Memory of a thread.
    Local,
    /// Arguments of a kernel.
    Param,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Global => "global",
            Space::Shared => "shared",
            Space::Local => "local",
            Space::Param => "param",
        })
    }
}

/// An allocation as faults name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the allocation of {} bytes at {:#x}", self.bytes, self.start)
    }
}

/// What was wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultKind {
    /// An access that no allocation holds whole.
    #[error("{} of {bytes} bytes at {space} address {address:#x} {}", access(*write), outside(.near.as_ref(), *address))]
    OutOfBounds {
        /// Where.
        space: Space,
        /// A store or a load.
        write: bool,
        /// First address of the access.
        address: u64,
        /// Its length.
        bytes: u64,
        /// The allocation before it, if any.
        near: Option<Range>,
    },
    /// An access to memory that was freed.
    #[error("{} of {bytes} bytes at address {address:#x}, in {range}, which was freed", access(*write))]
    UseAfterFree {
        /// A store or a load.
        write: bool,
        /// First address of the access.
        address: u64,
        /// Its length.
        bytes: u64,
        /// What was freed.
        range: Range,
    },
    /// An access of a kernel to another device's memory.
    #[error("{} at address {address:#x}, which is memory of device {owner}; device {by} has no access to it", access(*write))]
    OtherDevice {
        /// A store or a load.
        write: bool,
        /// First address of the access.
        address: u64,
        /// Whose memory it is.
        owner: u32,
        /// The device that the kernel runs on.
        by: u32,
    },
    /// An address that is not a multiple of the access's length.
    #[error("{} of {bytes} bytes at {space} address {address:#x}, which is not a multiple of {bytes}", access(*write))]
    Misaligned {
        /// Where.
        space: Space,
        /// A store or a load.
        write: bool,
        /// First address of the access.
        address: u64,
        /// Its length.
        bytes: u64,
    },
    /// A load of bytes that nothing wrote.
    #[error("read of {bytes} bytes at {space} address {address:#x}, which nothing wrote{}", within(.range.as_ref(), *address))]
    Unwritten {
        /// Where.
        space: Space,
        /// First address of the access.
        address: u64,
        /// Its length.
        bytes: u64,
        /// The allocation.
        range: Option<Range>,
    },
    /// Two accesses that nothing orders, one of them a store.
    #[error("data race on {space} address {address:#x}: {} here, {} by thread {other_thread} of block {other_block}, and nothing orders the two", access(*write), access(*other_write))]
    Race {
        /// Where.
        space: Space,
        /// Address of the word.
        address: u64,
        /// Whether this access stores.
        write: bool,
        /// Whether the earlier one stored.
        other_write: bool,
        /// Thread of the earlier access, by number within its block.
        other_thread: u32,
        /// Block of the earlier access, by number.
        other_block: u32,
    },
    /// A barrier that some threads cannot reach together.
    #[error("barrier {barrier} is reached by {arrived} of {expected} threads: {reason}")]
    DivergentBarrier {
        /// Number of the barrier.
        barrier: u32,
        /// Threads that came.
        arrived: u32,
        /// Threads that should.
        expected: u32,
        /// Why the others do not.
        reason: &'static str,
    },
    /// A shuffle or vote that reads a lane which does not take part.
    #[error("{instruction} reads lane {lane}, which does not take part")]
    AbsentLane {
        /// The instruction.
        instruction: &'static str,
        /// The lane read.
        lane: u32,
    },
    /// An access to registers that products of a warpgroup work on.
    #[error("an access to registers that wgmma works on until a wgmma.wait_group tells that it is done")]
    InFlight,
    /// A product of a warpgroup whose registers were accessed since the last fence.
    #[error("wgmma works on registers that were accessed since the last wgmma.fence, or there was none")]
    Unfenced,
    /// A product of a warpgroup that may read what was in shared memory before.
    #[error("wgmma reads shared address {address:#x}, which thread {thread} wrote with no fence.proxy.async since")]
    Unpublished {
        /// First address of the word.
        address: u64,
        /// The thread that wrote it last, by number within its block.
        thread: u32,
    },
    /// A store to shared memory while a product of a warpgroup read it.
    #[error("shared address {address:#x} changed while wgmma read it")]
    ChangedInFlight {
        /// First address of eight values.
        address: u64,
    },
    /// Instructions of a warpgroup that its four warps do not execute alike.
    #[error(
        "warp {warp} has executed other wgmma instructions than the first of its four warps, or with another descriptor or predicate"
    )]
    ApartInGroup {
        /// The warp, by number within its block.
        warp: u32,
    },
    /// More shared memory than a block can have.
    #[error("a block asks for {asked} bytes of shared memory; the limit is {limit}")]
    SharedMemory {
        /// Static and dynamic together.
        asked: u64,
        /// The most there is.
        limit: u64,
    },
    /// A jump past the end of its table.
    #[error("a jump to entry {index} of a table of {length}")]
    BranchTable {
        /// The entry asked for.
        index: u64,
        /// Entries of the table.
        length: u64,
    },
    /// A launch that the device refuses.
    #[error("{0}")]
    Launch(String),
    /// A collective that the ranks do not do together.
    #[error("{0}")]
    Collective(String),
    /// `trap`, or an assertion.
    #[error("the kernel trapped")]
    Trap,
    /// A kernel that does not end.
    #[error("the kernel did not end within {instructions} instructions")]
    Endless {
        /// Instructions executed.
        instructions: u64,
    },
    /// No memory left.
    #[error("{asked} bytes asked of device {device}, {free} free")]
    OutOfMemory {
        /// What was asked.
        asked: u64,
        /// What is left.
        free: u64,
        /// Of which device.
        device: u32,
    },
    /// An address that no allocation starts at.
    #[error("{address:#x} is not the start of an allocation")]
    NotAllocated {
        /// The address.
        address: u64,
    },
}

fn access(write: bool) -> &'static str {
    if write { "write" } else { "read" }
}

fn outside(near: Option<&Range>, address: u64) -> String {
    match near {
        Some(range) if address < range.start + range.bytes => format!("crosses the end of {range}"),
        Some(range) => format!("lies {} bytes past the end of {range}", address - range.start - range.bytes),
        None => "lies in no allocation".to_owned(),
    }
}

fn within(range: Option<&Range>, address: u64) -> String {
    range.map(|range| format!(" (byte {} of {range})", address - range.start)).unwrap_or_default()
}

/// Where in a kernel a fault was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the kernel.
    pub kernel: String,
    /// The block's coordinates.
    pub block: [u32; 3],
    /// The thread's coordinates.
    pub thread: [u32; 3],
    /// Line of the PTX text.
    pub ptx_line: u32,
    /// The instruction, as the PTX has it.
    pub instruction: String,
    /// File and line of the source, where the PTX says.
    pub source: Option<(String, u32)>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(f, "kernel {}, block ({bx}, {by}, {bz}), thread ({tx}, {ty}, {tz})", self.kernel)?;
        if let Some((file, line)) = &self.source {
            write!(f, ", {file}:{line}")?;
        }
        write!(f, ", PTX line {} ({})", self.ptx_line, self.instruction)
    }
}

/// Something wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What was wrong.
    pub kind: FaultKind,
    /// Where; none for calls of the host.
    pub place: Option<Box<Place>>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "{} ({place})", self.kind),
            None => self.kind.fmt(f),
        }
    }
}

impl std::error::Error for Fault {}

impl From<FaultKind> for Fault {
    fn from(kind: FaultKind) -> Self {
        Fault { kind, place: None }
    }
}
