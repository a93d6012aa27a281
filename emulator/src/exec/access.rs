//! Loads, stores, atomics and asynchronous copies, with every check of them.

use super::trace::Who;
use super::warp::{PendingCopy, Warp, lanes, named};
use super::{Block, LOCAL_WINDOW, Run, SHARED_WINDOW, WINDOW};
use crate::fault::{FaultKind, Range, Space};
use crate::ptx::{Lanes, Op};

/// Which space a generic address lies in.
pub(super) fn space_of(address: u64) -> Space {
    if (SHARED_WINDOW..SHARED_WINDOW + WINDOW).contains(&address) {
        Space::Shared
    } else if (LOCAL_WINDOW..LOCAL_WINDOW + WINDOW).contains(&address) {
        Space::Local
    } else {
        Space::Global
    }
}

/// An address within its space: generic ones lose their window.
fn within(space: Option<Space>, address: u64) -> (Space, u64) {
    let found = named(space, address);
    let window = match found {
        _ if space.is_some() => 0,
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        _ => 0,
    };
    // Addresses of shared and local memory have 32 bits.
    let inside = address.wrapping_sub(window);
    (
        found,
        if matches!(found, Space::Shared | Space::Local) && space.is_some() { inside & 0xffff_ffff } else { inside },
    )
}

/// One lane's access.
#[derive(Clone, Copy)]
struct Access {
    space: Space,
    address: u64,
    bytes: u64,
    write: bool,
    /// Volatile or stronger: it orders, and does not race.
    ordered: bool,
    thread: u32,
    instruction: usize,
}

fn all_written(shadow: &[u8]) -> bool {
    shadow.iter().fold(1, |all, &byte| all & byte) == 1
}

impl Run<'_> {
    /// Checks an access and gives the place of its bytes; a write is marked.
    fn place(&mut self, block: &mut Block, warp: &mut Warp, access: Access) -> Result<*mut u8, FaultKind> {
        let Access { space, address, bytes, write, .. } = access;
        if address % bytes != 0 {
            return Err(FaultKind::Misaligned { space, write, address, bytes });
        }
        match space {
            Space::Global => self.place_global(block, access),
            Space::Shared => self.place_shared(block, access),
            Space::Local => self.place_local(warp, access),
            Space::Param => {
                let params = self.launch.params;
                let outside = FaultKind::OutOfBounds { space, write, address, bytes, near: None };
                let inside = address.checked_add(bytes).is_some_and(|end| end <= params.len() as u64);
                if write || !inside { Err(outside) } else { Ok(params[address as usize..].as_ptr().cast_mut()) }
            }
        }
    }

    fn place_global(&mut self, block: &Block, access: Access) -> Result<*mut u8, FaultKind> {
        let Access { address, bytes, write, .. } = access;
        let range = &mut self.ranges[access.instruction];
        if address < range.0 || address + bytes > range.1 {
            *range = self.memory.locate(address, bytes, write)?;
        }
        let range = *range;
        // SAFETY: the range is a live allocation, whose shadow is mapped.
        let shadow = unsafe { std::slice::from_raw_parts_mut(self.memory.shadow(address), bytes as usize) };
        if write {
            shadow.fill(1);
        } else if self.launch.checks.unwritten && !all_written(shadow) {
            let range = Some(Range { start: range.0, bytes: range.1 - range.0 });
            return Err(FaultKind::Unwritten { space: Space::Global, address, bytes, range });
        }
        if self.launch.checks.races && !access.ordered {
            let words = bytes.div_ceil(4);
            for word in 0..words {
                let at = (address & !3) + 4 * word;
                // SAFETY: as above; an entry belongs to the word, and this thread alone runs the launch.
                let entries = unsafe { &mut *self.memory.trace(at) };
                let mask = if bytes >= 4 { 0xf } else { ((1 << bytes) - 1) << (address & 3) };
                let who = Who { block: block.number, thread: access.thread, epoch: block.epoch };
                self.trace.access(entries, (Space::Global, at), mask, write, who)?;
            }
        }
        Ok(address as *mut u8)
    }

    fn place_shared(&mut self, block: &mut Block, access: Access) -> Result<*mut u8, FaultKind> {
        let Access { address, bytes, write, .. } = access;
        let size = block.shared.len() as u64;
        if address + bytes > size {
            let near = Some(Range { start: 0, bytes: size });
            return Err(FaultKind::OutOfBounds { space: Space::Shared, write, address, bytes, near });
        }
        let range = address as usize..(address + bytes) as usize;
        if write {
            block.shared_written[range.clone()].fill(1);
        } else if self.launch.checks.unwritten && !all_written(&block.shared_written[range.clone()]) {
            let range = Some(Range { start: 0, bytes: size });
            return Err(FaultKind::Unwritten { space: Space::Shared, address, bytes, range });
        }
        if self.launch.checks.races && !access.ordered {
            for word in 0..bytes.div_ceil(4) {
                let at = (address & !3) + 4 * word;
                let mask = if bytes >= 4 { 0xf } else { ((1 << bytes) - 1) << (address & 3) };
                // Every block has its own shared memory: what earlier blocks left is past by the clock.
                let who = Who { block: 0, thread: access.thread, epoch: block.epoch };
                let entries = &mut block.shared_trace[at as usize / 4];
                self.trace.access(entries, (Space::Shared, at), mask, write, who)?;
            }
        }
        Ok(block.shared[range].as_mut_ptr())
    }

    fn place_local(&mut self, warp: &mut Warp, access: Access) -> Result<*mut u8, FaultKind> {
        let Access { address, bytes, write, .. } = access;
        let size = self.kernel.local as u64;
        if address + bytes > size {
            let near = Some(Range { start: 0, bytes: size });
            return Err(FaultKind::OutOfBounds { space: Space::Local, write, address, bytes, near });
        }
        let start = u64::from(access.thread % 32) * size + address;
        let range = start as usize..(start + bytes) as usize;
        self.counts.local += bytes;
        if write {
            warp.local_written[range.clone()].fill(1);
        } else if self.launch.checks.unwritten && !all_written(&warp.local_written[range.clone()]) {
            return Err(FaultKind::Unwritten { space: Space::Local, address, bytes, range: None });
        }
        Ok(warp.local[range].as_mut_ptr())
    }

    /// Counts what a warp's access moved.
    fn count(&mut self, space: Space, addresses: &Lanes, active: u32, bytes: u64, write: bool) {
        let total = bytes * u64::from(active.count_ones());
        match space {
            Space::Global => {
                let sum = if write { &mut self.counts.global_written } else { &mut self.counts.global_read };
                *sum += total;
                self.counts.sectors += distinct(addresses, active, bytes, 32);
                self.counts.ideal_sectors += total.div_ceil(32);
            }
            Space::Shared => {
                let sum = if write { &mut self.counts.shared_written } else { &mut self.counts.shared_read };
                *sum += total;
                self.counts.bank_conflicts += conflicts(addresses, active, bytes);
            }
            Space::Local | Space::Param => {}
        }
    }

    pub(super) fn load(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::Load { space, width, d, base, offset, ordered } = &kernel.code[at].op else { return Ok(()) };
        let size = usize::from(width.bytes);
        let bytes = (size * d.len()) as u64;
        let mut out = [[0u64; 32]; 8];
        let mut addresses: Lanes = [0; 32];
        let mut last = Space::Param;
        let bases = warp.registers[*base as usize];
        if *ordered {
            self.trace.order(block.number);
        }
        for i in lanes(active) {
            *lane = i;
            let (space, address) = within(*space, bases[i].wrapping_add_signed(*offset));
            (addresses[i], last) = (address, space);
            let thread = warp.index * 32 + i as u32;
            let access = Access { space, address, bytes, write: false, ordered: *ordered, thread, instruction: at };
            let place = self.place(block, warp, access)?;
            for (part, out) in out[..d.len()].iter_mut().enumerate() {
                let mut value = [0u8; 8];
                // SAFETY: `place` found `bytes` bytes there.
                unsafe { std::ptr::copy_nonoverlapping(place.add(part * size), value.as_mut_ptr(), size) };
                out[i] = u64::from_le_bytes(value);
            }
        }
        if width.signed && width.register > width.bytes {
            let (shift, mask) =
                (64 - 8 * size, if width.register == 8 { u64::MAX } else { (1 << (8 * width.register)) - 1 });
            for value in out[..d.len()].iter_mut().flatten() {
                *value = ((*value << shift) as i64 >> shift) as u64 & mask;
            }
        }
        for (d, out) in d.iter().zip(&out) {
            if let Some(d) = d {
                warp.write(*d, active, out);
            }
        }
        self.count(last, &addresses, active, bytes, false);
        Ok(())
    }

    pub(super) fn store(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::Store { space, bytes: size, a, base, offset, ordered } = &kernel.code[at].op else { return Ok(()) };
        let size = usize::from(*size);
        let bytes = (size * a.len()) as u64;
        let mut addresses: Lanes = [0; 32];
        let mut last = Space::Param;
        let bases = warp.registers[*base as usize];
        if *ordered {
            self.trace.order(block.number);
        }
        for i in lanes(active) {
            *lane = i;
            let (space, address) = within(*space, bases[i].wrapping_add_signed(*offset));
            (addresses[i], last) = (address, space);
            let thread = warp.index * 32 + i as u32;
            let access = Access { space, address, bytes, write: true, ordered: *ordered, thread, instruction: at };
            let place = self.place(block, warp, access)?;
            for (part, a) in a.iter().enumerate() {
                let value = warp.registers[*a as usize][i].to_le_bytes();
                // SAFETY: `place` found `bytes` bytes there.
                unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), place.add(part * size), size) };
            }
        }
        self.count(last, &addresses, active, bytes, true);
        Ok(())
    }

    pub(super) fn atomic(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::Atomic { space, atomic, d, base, offset, b, c } = &kernel.code[at].op else { return Ok(()) };
        let size = usize::from(atomic.bytes);
        let mut out: Lanes = [0; 32];
        self.trace.order(block.number);
        let [bases, b, c] = [base, b, c].map(|&register| warp.registers[register as usize]);
        for i in lanes(active) {
            *lane = i;
            let (space, address) = within(*space, bases[i].wrapping_add_signed(*offset));
            let thread = warp.index * 32 + i as u32;
            let bytes = size as u64;
            let access = Access { space, address, bytes, write: false, ordered: true, thread, instruction: at };
            let place = self.place(block, warp, access)?;
            let mut value = [0u8; 8];
            // SAFETY: `place` found as many bytes; launches of other threads use other allocations.
            unsafe { std::ptr::copy_nonoverlapping(place, value.as_mut_ptr(), size) };
            out[i] = u64::from_le_bytes(value);
            let next = (atomic.update)(out[i], b[i], c[i]).to_le_bytes();
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(next.as_ptr(), place, size) };
            if space == Space::Global {
                self.counts.global_read += bytes;
                self.counts.global_written += bytes;
            }
        }
        if let Some(d) = d {
            warp.write(*d, active, &out);
        }
        Ok(())
    }

    /// Reads the source at once; the bytes arrive in shared memory when the copy's group is waited for.
    pub(super) fn copy_async(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::CopyAsync { bytes, to, to_offset, from, from_offset, source_bytes } = &kernel.code[at].op else {
            return Ok(());
        };
        let [targets, sources] = [to, from].map(|&register| warp.registers[register as usize]);
        let lengths = source_bytes.map(|register| warp.registers[register as usize]);
        let mut addresses: Lanes = [0; 32];
        let mut present = 0;
        for i in lanes(active) {
            *lane = i;
            let thread = warp.index * 32 + i as u32;
            let length = lengths.map_or(u64::from(*bytes), |lengths| lengths[i].min(u64::from(*bytes)));
            let mut data = [0; 16];
            if length > 0 {
                let address = sources[i].wrapping_add_signed(*from_offset);
                if address % u64::from(*bytes) != 0 {
                    let bytes = u64::from(*bytes);
                    return Err(FaultKind::Misaligned { space: Space::Global, write: false, address, bytes }.into());
                }
                (addresses[i], present) = (address, present | 1 << i);
                // A source that ends early is read in parts of its own length.
                let step = 1 << length.trailing_zeros().min(4);
                for part in (0..length).step_by(step as usize) {
                    let access = Access {
                        space: Space::Global,
                        address: address + part,
                        bytes: step,
                        write: false,
                        ordered: false,
                        thread,
                        instruction: at,
                    };
                    let place = self.place(block, warp, access)?;
                    // SAFETY: `place` found `step` bytes there; `data` has room, as `part + step <= 16`.
                    unsafe {
                        std::ptr::copy_nonoverlapping(place, data[part as usize..].as_mut_ptr(), step as usize);
                    }
                }
            }
            let (_, to) = within(Some(Space::Shared), targets[i].wrapping_add_signed(*to_offset));
            warp.copies.push(PendingCopy { to, thread, data, bytes: *bytes });
        }
        self.count(Space::Global, &addresses, present, u64::from(*bytes), false);
        Ok(())
    }

    /// Lets all groups of copies but the last `but` arrive.
    pub(super) fn finish_copies(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        but: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        while warp.groups.len() > but {
            for copy in warp.groups.pop_front().unwrap_or_default() {
                *lane = copy.thread as usize % 32;
                let bytes = u64::from(copy.bytes);
                let access = Access {
                    space: Space::Shared,
                    address: copy.to,
                    bytes,
                    write: true,
                    ordered: false,
                    thread: copy.thread,
                    instruction: 0,
                };
                let place = self.place(block, warp, access)?;
                // SAFETY: `place` found `bytes` bytes there.
                unsafe { std::ptr::copy_nonoverlapping(copy.data.as_ptr(), place, bytes as usize) };
                self.counts.shared_written += bytes;
            }
        }
        Ok(())
    }

    /// `ldmatrix`: 8 by 8 values of 16 bits; lanes 8i to 8i + 7 name the rows of matrix i.
    pub(super) fn load_matrix(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::LoadMatrix { transposed, d, base, offset } = &kernel.code[at].op else { return Ok(()) };
        if active != u32::MAX {
            *lane = (!active).trailing_zeros() as usize;
            return Err(FaultKind::AbsentLane { instruction: "ldmatrix", lane: *lane as u32 }.into());
        }
        let bases = warp.registers[*base as usize];
        for (matrix, d) in d.iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            let mut addresses: Lanes = [0; 32];
            for (row, values) in rows.iter_mut().enumerate() {
                let i = matrix * 8 + row;
                *lane = i;
                let (space, address) = within(Some(Space::Shared), bases[i].wrapping_add_signed(*offset));
                addresses[row] = address;
                // The warp reads together: any of its lanes may stand for it.
                let thread = warp.index * 32 + i as u32;
                let access =
                    Access { space, address, bytes: 16, write: false, ordered: false, thread, instruction: at };
                let place = self.place(block, warp, access)?;
                // SAFETY: `place` found 16 bytes there.
                unsafe { std::ptr::copy_nonoverlapping(place, values.as_mut_ptr().cast(), 16) };
            }
            let out: Lanes = std::array::from_fn(|i| {
                let (row, column) = (i / 4, 2 * (i % 4));
                let pair = if *transposed {
                    [rows[column][row], rows[column + 1][row]]
                } else {
                    [rows[row][column], rows[row][column + 1]]
                };
                u64::from(pair[0]) | u64::from(pair[1]) << 16
            });
            warp.write(*d, active, &out);
            self.count(Space::Shared, &addresses, 0xff, 16, false);
        }
        Ok(())
    }
}

/// How many parts of `unit` bytes the lanes' accesses touch together.
fn distinct(addresses: &Lanes, active: u32, bytes: u64, unit: u64) -> u64 {
    let mut seen = [u64::MAX; 64];
    let mut count = 0;
    for lane in lanes(active) {
        for sector in addresses[lane] / unit..=(addresses[lane] + bytes - 1) / unit {
            if count > 0 && seen[count - 1] == sector || seen[..count].contains(&sector) {
                continue;
            }
            if count < seen.len() {
                seen[count] = sector;
                count += 1;
            }
        }
    }
    count as u64
}

/// Passes besides the first that an access of shared memory takes: 32 banks of 4 bytes; wide accesses go by halves or quarters
/// of a warp.
fn conflicts(addresses: &Lanes, active: u32, bytes: u64) -> u64 {
    let together = match bytes {
        16.. => 8,
        8.. => 16,
        _ => 32,
    };
    let mut extra = 0;
    for start in (0..32).step_by(together) {
        let group = active & (((1u64 << together) - 1) << start) as u32;
        let mut words: [Vec<u64>; 32] = Default::default();
        for lane in lanes(group) {
            for word in addresses[lane] / 4..(addresses[lane] + bytes).div_ceil(4) {
                let bank = &mut words[word as usize % 32];
                if !bank.contains(&word) {
                    bank.push(word);
                }
            }
        }
        extra += words.iter().map(Vec::len).max().unwrap_or(0).saturating_sub(1) as u64;
    }
    extra
}
