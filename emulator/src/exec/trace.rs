//! Data races: who touched a word last, and whether anything orders that access before this one.
//!
//! Every access is noted with a clock that ticks wherever threads synchronize. A warp knows up to which clock the accesses of
//! each other warp of its block, and of other blocks, come before its own ([`Knowledge`]): barriers join what their warps know,
//! a release leaves it at an address, an acquire takes it from there, as the PTX ISA's memory model has it (a fence makes a
//! release of the stores, and an acquire of the loads, that are at least relaxed). Lanes of one warp are ordered by what names
//! both: `bar.warp.sync`, and the shuffles, votes and products of a warp.
//!
//! What is not found: some races on parts of a word, with a reader that others hide, and between an access that is at least
//! relaxed and one that is weak. What is reported is a race.

use std::collections::HashMap;
use std::rc::Rc;

use crate::fault::{FaultKind, Space};
use crate::ptx::Order;

/// Bits of an entry: clock, block, thread, bytes of the word.
const BLOCK_SHIFT: u32 = 15;
const BLOCKS: u32 = (1 << 17) - 1;
const THREAD_SHIFT: u32 = 4;
const THREADS: u32 = (1 << 11) - 1;
/// In place of a thread, with the warp added: several lanes of it, each all of the bytes.
const LANES: u32 = 1024;
/// The same, each some of the bytes.
const PARTS: u32 = 1056;
/// In place of a thread: several warps of the block; the clock is the earliest of theirs.
const SEVERAL: u32 = THREADS;
/// Vectors of clocks are by warp up to this length, by block above.
const EXACT: usize = 1 << 18;

#[derive(Clone, Copy)]
struct Entry {
    clock: u32,
    block: u32,
    thread: u32,
    bytes: u32,
}

impl Entry {
    fn unpack(bits: u64) -> Self {
        let low = bits as u32;
        Entry {
            clock: (bits >> 32) as u32,
            block: low >> BLOCK_SHIFT,
            thread: low >> THREAD_SHIFT & THREADS,
            bytes: low & 0xf,
        }
    }

    fn pack(self) -> u64 {
        u64::from(self.clock) << 32 | u64::from(self.block << BLOCK_SHIFT | self.thread << THREAD_SHIFT | self.bytes)
    }

    /// The warp, where it is one.
    fn warp(self) -> Option<u32> {
        match self.thread {
            SEVERAL => None,
            thread if thread >= LANES => Some(thread % 32),
            thread => Some(thread / 32),
        }
    }
}

/// A clock for each warp of the grid; none where nothing is known of other blocks.
type Clocks = Option<Rc<Vec<u32>>>;

/// What a fence releases: clocks of the block's warps, of the grid's, and whether to the block alone.
#[derive(Clone)]
struct Fenced {
    warps: [u32; 32],
    others: Clocks,
    within: bool,
}

/// Up to which clocks the accesses of others come before a warp's own.
#[derive(Clone, Default)]
pub(crate) struct Knowledge {
    /// Of the warps of its block.
    pub warps: [u32; 32],
    /// Of its lanes: the clock at which each last synchronized with the others.
    pub lanes: [u32; 32],
    /// Of the warps of other blocks; none where nothing is known of them.
    others: Clocks,
    /// What its last fence releases, and whether to other blocks too.
    fenced: Option<Fenced>,
    /// Where it read what others may have released, until a fence makes it count.
    observed: Vec<Key>,
    /// What it acquired last: not acquired again.
    acquired: Option<(Key, u64)>,
}

/// Where something was released: an address, within a block or to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    address: u64,
    block: Option<u32>,
}

struct Released {
    clocks: Vec<u32>,
    version: u64,
}

/// Who accesses.
#[derive(Clone, Copy)]
pub(crate) struct Who<'a> {
    pub block: u32,
    pub thread: u32,
    pub knows: &'a Knowledge,
}

/// An earlier access that races with this one.
#[derive(Clone, Copy)]
pub(crate) struct Conflict {
    entry: u64,
    /// Whether it stored.
    pub stored: bool,
}

impl Conflict {
    /// The lane that committed it, where it is one of this warp.
    pub fn lane_of(self, slot: u32, warp: u32) -> Option<u32> {
        let entry = Entry::unpack(self.entry);
        (entry.block == slot && entry.thread < LANES && entry.thread / 32 == warp).then_some(entry.thread % 32)
    }

    pub fn kind(self, space: Space, address: u64, write: bool) -> FaultKind {
        let entry = Entry::unpack(self.entry);
        let other_thread = match entry.thread {
            SEVERAL => 0,
            thread if thread >= LANES => thread % 32 * 32,
            thread => thread,
        };
        FaultKind::Race { space, address, write, other_write: self.stored, other_thread, other_block: entry.block }
    }
}

pub(crate) struct Trace {
    pub clock: u32,
    start: u32,
    /// Something was noted since the clock ticked.
    noted: bool,
    slots: u32,
    /// Warps of a block in vectors of clocks; 1 where a block counts as one.
    stride: usize,
    released: HashMap<Key, Released>,
    versions: u64,
}

fn raise(to: &mut [u32], from: &[u32]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = (*to).max(from));
}

/// What two know together.
fn join(to: &mut Clocks, from: &Clocks) {
    match (&mut *to, from) {
        (_, None) => {}
        (None, Some(from)) => *to = Some(Rc::clone(from)),
        (Some(to), Some(from)) if Rc::ptr_eq(to, from) => {}
        (Some(to), Some(from)) => raise(Vec::as_mut_slice(Rc::make_mut(to)), from),
    }
}

impl Knowledge {
    /// At the start of a block: earlier accesses of its slot are past.
    pub fn begin(&mut self, clock: u32) {
        *self = Knowledge { warps: [clock; 32], lanes: [clock; 32], ..Knowledge::default() };
    }

    /// What a barrier gathers from its warps.
    pub fn gather(&mut self, from: &Knowledge, warp: u32, clock: u32) {
        raise(&mut self.warps, &from.warps);
        self.warps[warp as usize] = clock;
        join(&mut self.others, &from.others);
    }

    /// What a warp takes from a barrier.
    pub fn take(&mut self, from: &Knowledge, clock: u32) {
        raise(&mut self.warps, &from.warps);
        join(&mut self.others, &from.others);
        self.lanes = [clock; 32];
    }
}

impl Trace {
    pub fn new(start: u32, blocks: usize, warps: usize) -> Self {
        let slots = blocks.min(BLOCKS as usize);
        let stride = if slots * warps <= EXACT { warps } else { 1 };
        Trace { clock: start, start, noted: false, slots: slots as u32, stride, released: HashMap::new(), versions: 0 }
    }

    /// A clock later than every access so far, and not later than the next.
    pub fn tick(&mut self) -> u32 {
        self.clock += u32::from(self.noted);
        self.noted = false;
        self.clock
    }

    /// The place of a block in entries.
    pub fn slot(&self, block: u32) -> u32 {
        block % self.slots
    }

    /// Lanes of a warp synchronize.
    pub fn lanes_meet(&mut self, knows: &mut Knowledge, mask: u32) {
        let clock = self.tick();
        if mask == u32::MAX {
            knows.lanes = [clock; 32];
        } else {
            (0..32).filter(|lane| mask >> lane & 1 == 1).for_each(|lane| knows.lanes[lane] = clock);
        }
    }

    fn place(&self, address: u64, shared: bool, block: u32, within: bool) -> Key {
        Key { address, block: (shared || within).then_some(block) }
    }

    /// An access that is at least relaxed: takes what was released there, or leaves it, as its order and earlier fences say.
    pub fn order(
        &mut self,
        (address, shared): (u64, bool),
        order: Order,
        (reads, writes): (bool, bool),
        (block, warp): (u32, u32),
        knows: &mut Knowledge,
    ) {
        if reads {
            let keys = [self.place(address, shared, block, false), self.place(address, shared, block, true)];
            for key in &keys[..if shared { 1 } else { 2 }] {
                let Some(released) = self.released.get(key) else { continue };
                if order.acquire {
                    if knows.acquired != Some((*key, released.version)) {
                        self.acquire(*key, order.block, block, knows);
                    }
                } else if !knows.observed.contains(key) {
                    knows.observed.push(*key);
                }
            }
        }
        if writes {
            if order.release {
                let now = self.tick();
                let (mut warps, others) = (knows.warps, knows.others.clone());
                warps[warp as usize] = now;
                self.release(self.place(address, shared, block, order.block), block, &warps, &others);
            } else if let Some(Fenced { warps, others, within }) = knows.fenced.clone() {
                self.release(self.place(address, shared, block, within || order.block), block, &warps, &others);
            }
        }
    }

    /// A fence: loads before it acquire, stores after it release.
    pub fn fence(&mut self, within: bool, (block, warp): (u32, u32), knows: &mut Knowledge) {
        for key in std::mem::take(&mut knows.observed) {
            self.acquire(key, within, block, knows);
        }
        let now = self.tick();
        let mut warps = knows.warps;
        warps[warp as usize] = now;
        knows.fenced = Some(Fenced { warps, others: knows.others.clone(), within });
    }

    fn release(&mut self, key: Key, block: u32, warps: &[u32; 32], others: &Clocks) {
        let (slot, stride) = (self.slot(block) as usize, self.stride);
        let len = self.slots as usize * stride;
        self.versions += 1;
        let released = self.released.entry(key).or_insert_with(|| Released { clocks: vec![0; len], version: 0 });
        released.version = self.versions;
        if let Some(others) = others {
            raise(&mut released.clocks, others);
        }
        if stride == 1 {
            released.clocks[slot] = self.clock;
        } else {
            raise(&mut released.clocks[slot * stride..(slot + 1) * stride], warps);
        }
    }

    fn acquire(&mut self, key: Key, within: bool, block: u32, knows: &mut Knowledge) {
        let Some(released) = self.released.get(&key) else { return };
        knows.acquired = Some((key, released.version));
        let (slot, stride) = (self.slot(block) as usize, self.stride);
        if stride == 1 {
            let clock = released.clocks[slot];
            knows.warps.iter_mut().for_each(|known| *known = clock.max(*known));
        } else {
            raise(&mut knows.warps, &released.clocks[slot * stride..(slot + 1) * stride]);
        }
        if !within && key.block.is_none() {
            match &mut knows.others {
                Some(others) => raise(Vec::as_mut_slice(Rc::make_mut(others)), &released.clocks),
                None => knows.others = Some(Rc::new(released.clocks.clone())),
            }
        }
    }

    /// Whether the access that an entry notes comes before one of `who`.
    #[inline]
    fn unordered(&self, bits: u64, who: Who<'_>) -> bool {
        let entry = Entry::unpack(bits);
        if entry.clock < self.start {
            return false;
        }
        let knows = who.knows;
        if entry.block == self.slot(who.block) {
            if entry.thread == who.thread {
                return false;
            }
            let warp = who.thread / 32;
            return match entry.warp() {
                Some(other) if other == warp => {
                    let mine = entry.clock >= knows.lanes[who.thread as usize % 32];
                    match entry.thread {
                        thread if thread >= PARTS => false,
                        thread if thread >= LANES => mine,
                        thread => mine || entry.clock >= knows.lanes[thread as usize % 32],
                    }
                }
                Some(other) => entry.clock >= knows.warps[other as usize],
                None => (0..32).filter(|&other| other != warp).all(|other| entry.clock >= knows.warps[other as usize]),
            };
        }
        let Some(others) = &knows.others else { return true };
        let of = |slot: usize| &others[slot * self.stride..(slot + 1) * self.stride];
        if entry.block == BLOCKS {
            return others.iter().all(|&known| entry.clock >= known);
        }
        match entry.warp() {
            _ if self.stride == 1 => entry.clock >= of(entry.block as usize)[0],
            Some(warp) => entry.clock >= of(entry.block as usize)[warp as usize],
            None => of(entry.block as usize).iter().all(|&known| entry.clock >= known),
        }
    }

    /// An earlier access of some of `bytes` (a mask) of a word that races with this one.
    #[inline]
    pub fn conflict(&self, word: &[u64; 2], bytes: u32, write: bool, who: Who<'_>) -> Option<Conflict> {
        let stored = word[0];
        if stored as u32 & bytes != 0 && self.unordered(stored, who) {
            return Some(Conflict { entry: stored, stored: true });
        }
        let loaded = word[1];
        if write && loaded as u32 & bytes != 0 && self.unordered(loaded, who) {
            return Some(Conflict { entry: loaded, stored: false });
        }
        None
    }

    /// Notes an access of `bytes` (a mask) of a word; true where it is the launch's first load, or store, of the word.
    #[inline]
    pub fn note(&mut self, word: &mut [u64; 2], bytes: u32, write: bool, who: Who<'_>) -> bool {
        self.noted = true;
        let slot = self.slot(who.block);
        let place = &mut word[usize::from(!write)];
        let mut next = Entry { clock: self.clock, block: slot, thread: who.thread, bytes };
        let last = Entry::unpack(*place);
        // Whoever several accesses stand for, an access after the earliest of them is no proof that it follows them all.
        if last.clock >= self.start {
            if last.block != slot {
                if !write && last.bytes == bytes && self.unordered(*place, who) {
                    next.block = BLOCKS;
                    next.clock = last.clock;
                }
            } else if last.warp() == Some(who.thread / 32) {
                // Earlier accesses of other intervals are ordered before this one, and forgotten.
                if last.clock >= who.knows.lanes[who.thread as usize % 32] {
                    if last.thread != who.thread {
                        let whole = !write && last.bytes == bytes && last.thread < PARTS;
                        next.thread = if whole { LANES } else { PARTS } + who.thread / 32;
                    }
                    if last.bytes != bytes {
                        next.bytes |= last.bytes;
                        next.clock = last.clock;
                    }
                }
            } else if last.bytes == bytes && self.unordered(*place, who) {
                next.thread = SEVERAL;
                next.clock = last.clock;
            }
        }
        *place = next.pack();
        last.clock < self.start
    }
}
