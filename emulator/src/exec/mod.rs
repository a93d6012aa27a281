//! Executes kernels: blocks of warps of 32 lanes in lockstep.
//!
//! Lanes of a warp that part at a branch wait for each other where their ways meet again: the group of lanes that stands
//! furthest back in the code always runs, which is a legal order for most kernels and the one that brings lanes together
//! soonest. (A lock that lanes of one warp take from each other can turn for ever; hardware would get out.) Blocks run one
//! after another, or in turn where the launch is cooperative: then a barrier of the whole grid ends. The warps of a block have
//! turns too, so that one may wait for what another writes.

mod access;
mod matrix;
mod trace;
mod warp;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use crate::counts::Counts;
use crate::fault::{Fault, FaultKind, Place};
use crate::memory::Memory;
use crate::ptx::{Kernel, Lanes, Loaded, Special};
use warp::{Status, Warp};

/// Where shared memory lies among generic addresses.
pub(crate) const SHARED_WINDOW: u64 = 0x1_0000_0000;
/// Where a thread's local memory lies among generic addresses.
pub(crate) const LOCAL_WINDOW: u64 = 0x2_0000_0000;
/// Bytes of each window.
pub(crate) const WINDOW: u64 = 0x1_0000_0000;
/// The most shared memory that a block may declare.
pub const STATIC_SHARED_LIMIT: u64 = 48 << 10;
/// The most shared memory that a block may have.
pub const SHARED_LIMIT: u64 = 163 << 10;
/// Threads of the largest block.
pub const BLOCK_LIMIT: u64 = 1024;
/// Blocks that a cooperative launch may have at once.
pub const COOPERATIVE_LIMIT: u64 = 108 * 32;

/// What is looked for beside what hardware reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Reads of memory that nothing wrote.
    pub unwritten: bool,
    /// Data races.
    pub races: bool,
    /// Instructions after which a launch counts as endless.
    pub instructions: u64,
}

impl Default for Checks {
    fn default() -> Self {
        Checks { unwritten: true, races: true, instructions: 200_000_000_000 }
    }
}

/// How a kernel is launched.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// The parameters, laid out as the kernel declares them.
    pub params: &'a [u8],
    /// Whether all blocks run at once.
    pub cooperative: bool,
    /// What is checked.
    pub checks: Checks,
}

/// What blocks of a launch share.
pub(crate) struct Run<'a> {
    pub kernel: &'a Kernel,
    pub launch: &'a Launch<'a>,
    pub memory: &'a Memory,
    pub counts: Counts,
    pub instructions: u64,
    /// The range that each instruction found its last address in.
    pub ranges: Vec<(u64, u64)>,
    /// The device that the kernel runs on.
    pub device: u32,
    /// What cooperative groups ask for by `%envreg1` and `%envreg2`: memory of the grid's barrier.
    workspace: u64,
    pub trace: trace::Trace,
}

/// A block's own state.
pub(crate) struct Block {
    pub number: u32,
    pub coordinates: [u32; 3],
    pub shared: Vec<u8>,
    pub shared_written: Vec<u8>,
    pub shared_trace: Vec<[u64; 2]>,
    /// Of each word, where warpgroups multiply: 1 + the thread that wrote it and did not publish it since.
    pub unpublished: Vec<u16>,
    /// Threads that arrived at each barrier, how many should, the combined predicate and the count.
    pub barriers: [BarrierState; 16],
}

#[derive(Clone, Default)]
pub(crate) struct BarrierState {
    /// What the warps that arrived know.
    pub knows: Option<Box<trace::Knowledge>>,
    pub arrived: u32,
    pub expected: u32,
    pub all: bool,
    pub any: bool,
    pub count: u32,
}

/// Clocks go on from launch to launch, so that what earlier launches left in the traces counts as past.
static CLOCK: AtomicU32 = AtomicU32::new(1);

/// Launches hold it to read; who sets the clock back holds it alone.
static RUNNING: RwLock<()> = RwLock::new(());

/// A launch that starts later than this sets the clock back first: a launch has room for two thousand million ticks.
const LATE: u32 = 1 << 31;

/// Instructions of a warp until the next of its block has its turn, where blocks run one by one.
const TURN: u64 = 1 << 16;
/// The same where all blocks run at once.
const COOPERATIVE_TURN: u64 = 2000;
/// Turns of a block in which nothing was written and nobody left or arrived, after which it counts as waiting for ever.
const IDLE_TURNS: u32 = 2000;

/// Runs a kernel to its end and adds what it did to `counts`.
///
/// # Errors
/// The first fault.
pub fn launch(
    loaded: &Loaded,
    kernel: &str,
    launch: &Launch<'_>,
    memory: &Memory,
    counts: &mut Counts,
) -> Result<(), Fault> {
    let module = &loaded.module;
    let Some(kernel) = module.kernel(kernel) else {
        return Err(FaultKind::Launch(format!("no kernel {kernel} in the module")).into());
    };
    check(kernel, launch)?;
    let blocks = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
    let warps = launch.block.iter().product::<u32>().div_ceil(32);
    let running = run_after_the_clock(memory);
    let start = CLOCK.load(Ordering::Relaxed) + 1;
    let grid_barrier = kernel.specials.iter().any(|(_, special)| matches!(special, Special::Environment(_)));
    let workspace = if launch.cooperative && grid_barrier {
        let address = memory.allocate(loaded.device, WORKSPACE)?;
        memory.fill(address, &[0], WORKSPACE)?;
        address
    } else {
        0
    };
    let mut run = Run {
        kernel,
        launch,
        memory,
        counts: Counts { launches: 1, ..Counts::default() },
        instructions: 0,
        ranges: vec![(0, 0); kernel.code.len()],
        device: loaded.device,
        workspace,
        trace: trace::Trace::new(start, blocks as usize, warps as usize),
    };
    let result = if launch.cooperative { run.in_turn(loaded, blocks) } else { run.one_by_one(loaded, blocks) };
    CLOCK.fetch_max(run.trace.clock, Ordering::Relaxed);
    drop(running);
    *counts += run.counts;
    if workspace != 0 {
        memory.free(workspace)?;
    }
    result.map_err(|found| found.placed(kernel, launch, &module.files))
}

/// Bytes of what a grid's barrier works with.
const WORKSPACE: usize = 64;

/// Joins the launches that run; where the clock is late, all traces are forgotten first.
fn run_after_the_clock(memory: &Memory) -> RwLockReadGuard<'static, ()> {
    if CLOCK.load(Ordering::Relaxed) > LATE {
        let _alone = RUNNING.write().unwrap_or_else(PoisonError::into_inner);
        if CLOCK.load(Ordering::Relaxed) > LATE {
            memory.forget_traces();
            CLOCK.store(1, Ordering::Relaxed);
        }
    }
    RUNNING.read().unwrap_or_else(PoisonError::into_inner)
}

fn check(kernel: &Kernel, launch: &Launch<'_>) -> Result<(), Fault> {
    let refuse = |message: String| Err(Fault::from(FaultKind::Launch(message)));
    let threads: u64 = launch.block.iter().map(|&n| u64::from(n)).product();
    if threads == 0 || threads > BLOCK_LIMIT || launch.block[2] > 64 {
        return refuse(format!(
            "a block of {:?} threads; a block has 1 to {BLOCK_LIMIT}, at most 64 deep",
            launch.block
        ));
    }
    if threads > u64::from(kernel.max_threads) {
        return refuse(format!("a block of {threads} threads for a kernel compiled for {}", kernel.max_threads));
    }
    let [x, y, z] = launch.grid;
    if x == 0 || y == 0 || z == 0 || x > 0x7fff_ffff || y > 65535 || z > 65535 {
        return refuse(format!("a grid of {:?} blocks; the limits are (2147483647, 65535, 65535)", launch.grid));
    }
    if launch.cooperative && u64::from(x) * u64::from(y) * u64::from(z) > COOPERATIVE_LIMIT {
        return refuse(format!("a cooperative grid of {:?} blocks; {COOPERATIVE_LIMIT} fit at once", launch.grid));
    }
    if launch.params.len() < kernel.param_bytes() {
        let (given, needed) = (launch.params.len(), kernel.param_bytes());
        return refuse(format!("{given} bytes of parameters for a kernel that takes {needed}"));
    }
    let asked = kernel.static_shared as u64 + u64::from(launch.dynamic_shared);
    if kernel.static_shared as u64 > STATIC_SHARED_LIMIT || asked > SHARED_LIMIT {
        return Err(FaultKind::SharedMemory { asked, limit: SHARED_LIMIT }.into());
    }
    Ok(())
}

/// A fault with the lane that met it.
#[derive(Debug)]
pub(crate) struct Found {
    pub kind: FaultKind,
    pub block: [u32; 3],
    pub thread: u32,
    pub instruction: usize,
}

impl Found {
    fn placed(self, kernel: &Kernel, launch: &Launch<'_>, files: &std::collections::HashMap<u32, String>) -> Fault {
        let [width, height, _] = launch.block;
        let instruction = &kernel.code[self.instruction.min(kernel.code.len() - 1)];
        let (file, line) = instruction.source;
        let place = Place {
            kernel: kernel.name.clone(),
            block: self.block,
            thread: [self.thread % width, self.thread / width % height, self.thread / width / height],
            ptx_line: instruction.line,
            instruction: instruction.text.to_string(),
            source: files.get(&file).map(|file| (file.clone(), line)),
        };
        Fault { kind: self.kind, place: Some(Box::new(place)) }
    }
}

impl Run<'_> {
    fn one_by_one(&mut self, loaded: &Loaded, blocks: u64) -> Result<(), Found> {
        let mut warps = self.warps(loaded);
        let mut block = self.block();
        for number in 0..blocks {
            self.start(&mut block, &mut warps, number as u32);
            let mut idle = 0;
            let mut before = self.progress();
            while !self.turn(&mut block, &mut warps, TURN)? {
                let now = self.progress();
                idle = if now == before { idle + 1 } else { 0 };
                before = now;
                if idle > IDLE_TURNS {
                    return Err(idling(&block, &warps, self.instructions));
                }
            }
        }
        Ok(())
    }

    fn in_turn(&mut self, loaded: &Loaded, blocks: u64) -> Result<(), Found> {
        let mut all: Vec<_> = (0..blocks).map(|_| (self.block(), self.warps(loaded), false)).collect();
        for (number, (block, warps, _)) in all.iter_mut().enumerate() {
            self.start(block, warps, number as u32);
        }
        let mut idle = 0;
        while all.iter().any(|(_, _, done)| !done) {
            let before = self.progress();
            for (block, warps, done) in all.iter_mut().filter(|(_, _, done)| !done) {
                *done = self.turn(block, warps, COOPERATIVE_TURN)?;
            }
            idle = if self.progress() == before { idle + 1 } else { 0 };
            if let (true, Some((block, warps, _))) = (idle > IDLE_TURNS, all.iter().find(|(_, _, done)| !done)) {
                return Err(idling(block, warps, self.instructions));
            }
        }
        Ok(())
    }

    /// What changes when a block gets on, other than its registers.
    fn progress(&self) -> [u64; 4] {
        let counts = &self.counts;
        [counts.global_written, counts.shared_written, counts.local, counts.barriers]
    }

    fn block(&self) -> Block {
        let shared = self.kernel.static_shared + self.launch.dynamic_shared as usize;
        Block {
            number: 0,
            coordinates: [0; 3],
            shared: vec![0; shared],
            shared_written: vec![0; shared],
            shared_trace: vec![[0; 2]; shared.div_ceil(4)],
            unpublished: vec![0; if self.kernel.in_groups { shared.div_ceil(4) } else { 0 }],
            barriers: Default::default(),
        }
    }

    /// The warps of a block, with all that is the same for every block.
    fn warps(&self, loaded: &Loaded) -> Vec<Warp> {
        let (launch, kernel) = (self.launch, self.kernel);
        let [width, height, depth] = launch.block;
        let threads = width * height * depth;
        let count = threads.div_ceil(32);
        (0..count)
            .map(|index| {
                let mut warp = Warp::new(kernel, index, threads);
                for &(register, bits) in &kernel.constants {
                    warp.registers[register as usize] = [bits; 32];
                }
                for (register, name) in &kernel.addresses {
                    warp.registers[*register as usize] = [loaded.global(name).map_or(0, |(address, _)| address); 32];
                }
                for &(register, special) in &kernel.specials {
                    warp.registers[register as usize] = std::array::from_fn(|lane| {
                        let thread = index * 32 + lane as u32;
                        u64::from(match special {
                            Special::Thread(0) => thread % width,
                            Special::Thread(1) => thread / width % height,
                            Special::Thread(_) => thread / width / height,
                            Special::Threads(axis) => launch.block[axis as usize],
                            Special::Blocks(axis) => launch.grid[axis as usize],
                            Special::Lane => lane as u32,
                            Special::Warp => index,
                            Special::Warps => count,
                            Special::LaneMask(mask) => mask.of(lane as u32),
                            Special::Multiprocessors => 108,
                            Special::DynamicShared => launch.dynamic_shared,
                            Special::TotalShared => launch.dynamic_shared + kernel.static_shared as u32,
                            Special::Environment(1) => (self.workspace >> 32) as u32,
                            Special::Environment(2) => self.workspace as u32,
                            Special::Environment(_) | Special::Grid | Special::Block(_) | Special::Multiprocessor => 0,
                        })
                    });
                }
                warp
            })
            .collect()
    }

    fn start(&mut self, block: &mut Block, warps: &mut [Warp], number: u32) {
        let [width, height, _] = self.launch.grid;
        block.number = number;
        block.coordinates = [number % width, number / width % height, number / width / height];
        block.shared_written.fill(0);
        block.unpublished.fill(0);
        let clock = self.trace.tick();
        block.barriers = Default::default();
        for warp in warps {
            warp.restart(clock);
            for &(register, special) in &self.kernel.specials {
                let value = match special {
                    Special::Block(axis) => block.coordinates[axis as usize],
                    Special::Multiprocessor => number % 108,
                    _ => continue,
                };
                warp.registers[register as usize] = [u64::from(value); 32] as Lanes;
            }
        }
    }

    /// Runs each warp of a block that can run for at most `quantum` instructions; true when the block is done.
    fn turn(&mut self, block: &mut Block, warps: &mut [Warp], quantum: u64) -> Result<bool, Found> {
        let mut ran = false;
        for warp in warps.iter_mut() {
            if warp.waiting.is_some() || warp.live == 0 {
                continue;
            }
            ran = true;
            match self.run_warp(block, warp, quantum)? {
                Status::Running | Status::Done => {}
                Status::Waiting(number) => warp.waiting = Some(number),
            }
        }
        let released = self.release(block, warps);
        if warps.iter().all(|warp| warp.live == 0) {
            return match access::groups::apart(warps) {
                None => Ok(true),
                Some((warp, instruction)) => {
                    let kind = FaultKind::ApartInGroup { warp };
                    Err(Found { kind, block: block.coordinates, thread: warp * 32, instruction })
                }
            };
        }
        if ran || released {
            return Ok(false);
        }
        Err(stuck(block, warps))
    }

    /// Lets the warps go on whose barrier is complete.
    fn release(&mut self, block: &mut Block, warps: &mut [Warp]) -> bool {
        let mut any = false;
        for (number, state) in block.barriers.iter_mut().enumerate() {
            if state.arrived == 0 || state.arrived < state.expected {
                continue;
            }
            any = true;
            let clock = self.trace.tick();
            if let Some(knows) = &mut state.knows {
                // Who waited has accessed nothing since.
                let waited = warps.iter().filter(|warp| warp.waiting == Some(number as u8));
                waited.for_each(|warp| knows.warps[warp.index as usize] = clock);
            }
            for warp in warps.iter_mut().filter(|warp| warp.waiting == Some(number as u8)) {
                warp.waiting = None;
                warp.finish_reduction(state);
                if let Some(knows) = &state.knows {
                    warp.knows.take(knows, clock);
                }
            }
            *state = BarrierState::default();
            self.counts.barriers += 1;
        }
        any
    }
}

/// Threads turn round and round and wait for what nobody writes.
fn idling(block: &Block, warps: &[Warp], instructions: u64) -> Found {
    let turning = warps.iter().find(|warp| warp.waiting.is_none() && warp.live != 0);
    let thread = turning.map_or(0, |warp| warp.index * 32 + warp.mask.trailing_zeros().min(31));
    let instruction = turning.map_or(0, |warp| warp.pc as usize);
    Found { kind: FaultKind::Endless { instructions }, block: block.coordinates, thread, instruction }
}

/// No warp can go on: some wait at a barrier that the others never reach.
fn stuck(block: &Block, warps: &[Warp]) -> Found {
    let waiting = warps.iter().find(|warp| warp.waiting.is_some());
    let number = waiting.and_then(|warp| warp.waiting).unwrap_or_default();
    let state = &block.barriers[usize::from(number)];
    let reason = if warps.iter().any(|warp| warp.live == 0) {
        "the others have left the kernel"
    } else {
        "the others wait at another barrier"
    };
    let kind = FaultKind::DivergentBarrier {
        barrier: u32::from(number),
        arrived: state.arrived,
        expected: state.expected,
        reason,
    };
    let thread = waiting.map_or(0, |warp| warp.index * 32 + warp.mask.trailing_zeros().min(31));
    let instruction = waiting.map_or(0, |warp| warp.pc.saturating_sub(1) as usize);
    Found { kind, block: block.coordinates, thread, instruction }
}
