//! Data races: who touched a word last, and whether a barrier or an atomic lies between.
//!
//! A clock ticks at every barrier and every operation that orders memory. Two accesses of a word by different warps, one of
//! them a store, race if no barrier of their block came between them; those of different blocks race unless the first block
//! released (a fence or an atomic) after its access and the second acquired after that.

use crate::fault::{FaultKind, Space};

/// Bits of an entry: clock, block, thread, bytes of the word.
const BLOCK_SHIFT: u32 = 15;
const BLOCKS: u32 = (1 << 17) - 1;
const THREAD_SHIFT: u32 = 4;
/// In place of a thread: several warps of the block.
const SEVERAL: u32 = (1 << 11) - 1;

pub(crate) struct Trace {
    pub clock: u32,
    start: u32,
    released: Vec<u32>,
    acquired: Vec<u32>,
}

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
            thread: low >> THREAD_SHIFT & SEVERAL,
            bytes: low & 0xf,
        }
    }

    fn pack(self) -> u64 {
        u64::from(self.clock) << 32 | u64::from(self.block << BLOCK_SHIFT | self.thread << THREAD_SHIFT | self.bytes)
    }
}

/// Who accesses.
#[derive(Clone, Copy)]
pub(crate) struct Who {
    pub block: u32,
    pub thread: u32,
    /// Clock at the block's last barrier.
    pub epoch: u32,
}

impl Trace {
    pub fn new(start: u32, blocks: usize) -> Self {
        let slots = blocks.min(BLOCKS as usize);
        Trace { clock: start, start, released: vec![0; slots], acquired: vec![0; slots] }
    }

    pub fn tick(&mut self) -> u32 {
        self.clock += 1;
        self.clock
    }

    /// A block orders its accesses: by a fence, an atomic, or an access that is volatile or stronger.
    pub fn order(&mut self, block: u32) {
        self.tick();
        let slot = block as usize % self.released.len();
        self.released[slot] = self.clock;
        self.acquired[slot] = self.clock;
    }

    fn conflicts(&self, entry: Entry, who: Who, bytes: u32) -> bool {
        if entry.bytes & bytes == 0 || entry.clock < self.start {
            return false;
        }
        let slots = self.released.len() as u32;
        if entry.block == who.block % slots {
            let other_warp = entry.thread == SEVERAL || entry.thread / 32 != who.thread / 32;
            return other_warp && entry.clock >= who.epoch;
        }
        let acquired = self.acquired[(who.block % slots) as usize] >= entry.clock;
        let released = self.released.get(entry.block as usize).is_none_or(|&released| released >= entry.clock);
        !(acquired && released)
    }

    /// Notes an access of `bytes` (a mask) of the word at `address`.
    pub fn access(
        &mut self,
        word: &mut [u64; 2],
        (space, address): (Space, u64),
        bytes: u32,
        write: bool,
        who: Who,
    ) -> Result<(), FaultKind> {
        let slot = who.block % self.released.len() as u32;
        for (bits, other_write) in [(word[0], true), (word[1], false)] {
            let entry = Entry::unpack(bits);
            if (write || other_write) && self.conflicts(entry, who, bytes) {
                return Err(FaultKind::Race {
                    space,
                    address,
                    write,
                    other_write,
                    other_thread: entry.thread.min(1023),
                    other_block: entry.block,
                });
            }
        }
        let own = Entry { clock: self.clock, block: slot, thread: who.thread, bytes };
        let place = &mut word[usize::from(!write)];
        let last = Entry::unpack(*place);
        let mut next = own;
        if last.clock >= self.start {
            if last.block != slot {
                // A read that this one is ordered after needs no memory: what is ordered after this one is after both.
                if !write && self.conflicts(Entry { bytes, ..last }, who, bytes) {
                    next.block = BLOCKS;
                }
            } else if last.clock >= who.epoch {
                next.bytes |= last.bytes;
                if last.thread != who.thread && last.thread / 32 != who.thread / 32 && !write {
                    next.thread = SEVERAL;
                }
            }
        }
        *place = next.pack();
        Ok(())
    }
}
