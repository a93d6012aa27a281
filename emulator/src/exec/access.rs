//! Loads, stores and atomics, with every check of them.

mod copies;
pub(in crate::exec) mod groups;
mod traffic;

pub(super) use groups::{Flight, publish};

use super::trace::{Conflict, Knowledge, Who};
use super::warp::{Warp, lanes};
use super::{Block, LOCAL_WINDOW, Run, SHARED_WINDOW, WINDOW};
use crate::fault::{FaultKind, Range, Space};
use crate::ptx::{CALL_PARAMS, Lanes, Op, Order};

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
    match space {
        // Addresses of shared and local memory have 32 bits.
        Some(space @ (Space::Shared | Space::Local)) => (space, address & 0xffff_ffff),
        Some(space) => (space, address),
        None => match space_of(address) {
            Space::Shared => (Space::Shared, address - SHARED_WINDOW),
            Space::Local => (Space::Local, address - LOCAL_WINDOW),
            space => (space, address),
        },
    }
}

/// What the lanes of one access have in common.
#[derive(Clone, Copy)]
struct Access {
    bytes: u64,
    write: bool,
    /// At least relaxed: it does not race.
    strong: bool,
    instruction: usize,
}

/// The lanes' addresses, each in its space.
struct Places {
    addresses: Lanes,
    /// The space of all lanes; none where they differ.
    space: Option<Space>,
    spaces: [Space; 32],
}

impl Places {
    fn new(space: Option<Space>, bases: &Lanes, offset: i64, active: u32) -> Self {
        let mut places = Places { addresses: [0; 32], space, spaces: [space.unwrap_or(Space::Global); 32] };
        match space {
            Some(Space::Shared | Space::Local) => {
                for (address, base) in places.addresses.iter_mut().zip(bases) {
                    *address = base.wrapping_add_signed(offset) & 0xffff_ffff;
                }
            }
            Some(_) => {
                for (address, base) in places.addresses.iter_mut().zip(bases) {
                    *address = base.wrapping_add_signed(offset);
                }
            }
            None => {
                for i in lanes(active) {
                    (places.spaces[i], places.addresses[i]) = within(None, bases[i].wrapping_add_signed(offset));
                }
                let first = places.spaces[active.trailing_zeros() as usize % 32];
                places.space = lanes(active).all(|i| places.spaces[i] == first).then_some(first);
            }
        }
        places
    }
}

/// One lane's part of an access.
#[derive(Clone, Copy)]
struct Part<'p> {
    places: &'p Places,
    active: u32,
    lane: usize,
    thread: u32,
}

impl Part<'_> {
    fn address(self) -> u64 {
        self.places.addresses[self.lane]
    }

    /// Whether a conflict is with a lane before this one that stores the same in this very instruction.
    fn together(self, conflict: Conflict, write: bool, slot: u32) -> bool {
        let Some(other) = conflict.lane_of(slot, self.thread / 32) else { return false };
        let other = other as usize;
        write
            && conflict.stored
            && other < self.lane
            && self.active >> other & 1 == 1
            && self.places.addresses[other] == self.address()
    }
}

fn all_written(shadow: &[u8]) -> bool {
    shadow.iter().fold(1, |all, &byte| all & byte) == 1
}

/// The bytes of a word that an access of it touches, as a mask.
fn word_mask(address: u64, bytes: u64) -> u32 {
    if bytes >= 4 { 0xf } else { ((1 << bytes) - 1) << (address & 3) }
}

unsafe fn read(place: *const u8, size: usize) -> u64 {
    // SAFETY: `size` bytes lie there, as the caller promises.
    unsafe {
        match size {
            1 => u64::from(place.read()),
            2 => u64::from(place.cast::<u16>().read_unaligned()),
            4 => u64::from(place.cast::<u32>().read_unaligned()),
            _ => place.cast::<u64>().read_unaligned(),
        }
    }
}

unsafe fn write(place: *mut u8, size: usize, value: u64) {
    // SAFETY: `size` bytes lie there, as the caller promises.
    unsafe {
        match size {
            1 => place.write(value as u8),
            2 => place.cast::<u16>().write_unaligned(value as u16),
            4 => place.cast::<u32>().write_unaligned(value as u32),
            _ => place.cast::<u64>().write_unaligned(value),
        }
    }
}

impl Run<'_> {
    /// Whether the lanes' addresses are all aligned and within one allocation: then each need not be asked.
    fn all_inside(&mut self, places: &Places, active: u32, access: Access) -> bool {
        if places.space != Some(Space::Global) {
            return false;
        }
        let (mut least, mut most, mut any) = (u64::MAX, 0, 0);
        for i in lanes(active) {
            let address = places.addresses[i];
            least = least.min(address);
            most = most.max(address);
            any |= address;
        }
        if any % access.bytes != 0 {
            return false;
        }
        let Some(end) = most.checked_add(access.bytes) else { return false };
        let range = &mut self.ranges[access.instruction];
        if least >= range.0 && end <= range.1 {
            return true;
        }
        match self.memory.locate(Some(self.device), least, access.bytes, access.write) {
            Ok(found) => {
                *range = found;
                end <= found.1
            }
            Err(_) => false,
        }
    }

    /// Checks a lane's access and gives the place of its bytes; a write is marked.
    fn place(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        (places, active, lane): (&Places, u32, usize),
        access: Access,
        inside: bool,
    ) -> Result<*mut u8, FaultKind> {
        let (space, address) = (places.spaces[lane], places.addresses[lane]);
        let Access { bytes, write, .. } = access;
        if !inside && address % bytes != 0 {
            return Err(FaultKind::Misaligned { space, write, address, bytes });
        }
        let part = Part { places, active, lane, thread: warp.index * 32 + lane as u32 };
        match space {
            Space::Global => self.place_global(block.number, &warp.knows, part, access, inside),
            Space::Shared => self.place_shared(block, &warp.knows, part, access),
            Space::Local => self.place_local(warp, lane, address, access),
            // Arguments of functions that are called lie among the thread's own memory.
            Space::Param if address >= CALL_PARAMS => {
                // A compiler may load what it left undefined of a structure.
                if !write {
                    let start = lane * self.kernel.local + (address - CALL_PARAMS) as usize;
                    warp.local_written[start..start + bytes as usize].fill(1);
                }
                self.place_local(warp, lane, address - CALL_PARAMS, access)
            }
            Space::Param => {
                let params = self.launch.params;
                let outside = FaultKind::OutOfBounds { space, write, address, bytes, near: None };
                let inside = address.checked_add(bytes).is_some_and(|end| end <= params.len() as u64);
                if write || !inside { Err(outside) } else { Ok(params[address as usize..].as_ptr().cast_mut()) }
            }
        }
    }

    fn place_global(
        &mut self,
        block: u32,
        knows: &Knowledge,
        part: Part<'_>,
        access: Access,
        inside: bool,
    ) -> Result<*mut u8, FaultKind> {
        let (Access { bytes, write, .. }, address) = (access, part.address());
        if !inside {
            let range = &mut self.ranges[access.instruction];
            if address < range.0 || address.saturating_add(bytes) > range.1 {
                *range = self.memory.locate(Some(self.device), address, bytes, write)?;
            }
        }
        // SAFETY: the range is a live allocation, whose shadow is mapped.
        let shadow = unsafe { std::slice::from_raw_parts_mut(self.memory.shadow(address), bytes as usize) };
        if write {
            shadow.fill(1);
        } else if self.launch.checks.unwritten && !all_written(shadow) {
            let range = self.ranges[access.instruction];
            let range = Some(Range { start: range.0, bytes: range.1 - range.0 });
            return Err(FaultKind::Unwritten { space: Space::Global, address, bytes, range });
        }
        if self.launch.checks.races && !access.strong {
            let (mask, who) = (word_mask(address, bytes), Who { block, thread: part.thread, knows });
            let first = address & !3;
            // SAFETY: as above; the entries belong to the words, and this thread alone runs the launch.
            let words = unsafe { std::slice::from_raw_parts_mut(self.memory.trace(first), bytes.div_ceil(4) as usize) };
            let mut first_words = 0;
            for (word, at) in words.iter_mut().zip((first..).step_by(4)) {
                if let Some(conflict) = self.trace.conflict(word, mask, write, who)
                    && !part.together(conflict, write, self.trace.slot(block))
                {
                    return Err(conflict.kind(Space::Global, at, write));
                }
                first_words += u64::from(self.trace.note(word, mask, write, who));
            }
            let touched = if write { &mut self.counts.touched_written } else { &mut self.counts.touched_read };
            *touched += 4 * first_words;
        }
        Ok(address as *mut u8)
    }

    fn place_shared(
        &mut self,
        block: &mut Block,
        knows: &Knowledge,
        part: Part<'_>,
        access: Access,
    ) -> Result<*mut u8, FaultKind> {
        let (Access { bytes, write, .. }, address) = (access, part.address());
        let size = block.shared.len() as u64;
        if address + bytes > size {
            let near = Some(Range { start: 0, bytes: size });
            return Err(FaultKind::OutOfBounds { space: Space::Shared, write, address, bytes, near });
        }
        let range = address as usize..(address + bytes) as usize;
        if write {
            block.shared_written[range.clone()].fill(1);
            if !block.unpublished.is_empty() {
                block.unpublished[address as usize / 4..((address + bytes) as usize).div_ceil(4)]
                    .fill(part.thread as u16 + 1);
            }
        } else if self.launch.checks.unwritten && !all_written(&block.shared_written[range.clone()]) {
            let range = Some(Range { start: 0, bytes: size });
            return Err(FaultKind::Unwritten { space: Space::Shared, address, bytes, range });
        }
        if self.launch.checks.races && !access.strong {
            // Every block has its own shared memory: what earlier blocks left is past by the clock.
            let (mask, who) = (word_mask(address, bytes), Who { block: 0, thread: part.thread, knows });
            let first = address as usize / 4;
            let words = &mut block.shared_trace[first..first + bytes.div_ceil(4) as usize];
            for (word, at) in words.iter_mut().zip((first as u64 * 4..).step_by(4)) {
                if let Some(conflict) = self.trace.conflict(word, mask, write, who)
                    && !part.together(conflict, write, 0)
                {
                    return Err(conflict.kind(Space::Shared, at, write));
                }
                self.trace.note(word, mask, write, who);
            }
        }
        Ok(block.shared[range].as_mut_ptr())
    }

    fn place_local(
        &mut self,
        warp: &mut Warp,
        lane: usize,
        address: u64,
        access: Access,
    ) -> Result<*mut u8, FaultKind> {
        let Access { bytes, write, .. } = access;
        let size = self.kernel.local as u64;
        if address + bytes > size {
            let near = Some(Range { start: 0, bytes: size });
            return Err(FaultKind::OutOfBounds { space: Space::Local, write, address, bytes, near });
        }
        let start = lane as u64 * size + address;
        let range = start as usize..(start + bytes) as usize;
        if write {
            warp.local_written[range.clone()].fill(1);
        } else if self.launch.checks.unwritten && !all_written(&warp.local_written[range.clone()]) {
            return Err(FaultKind::Unwritten { space: Space::Local, address, bytes, range: None });
        }
        Ok(warp.local[range].as_mut_ptr())
    }

    /// What strong accesses order, lane by lane; `reads` and `writes` say what they do.
    fn order(
        &mut self,
        block: &Block,
        warp: &mut Warp,
        active: u32,
        places: &Places,
        order: Order,
        (reads, writes): (bool, bool),
    ) {
        if !order.strong {
            return;
        }
        for i in lanes(active) {
            let place = (places.addresses[i], places.spaces[i] == Space::Shared);
            self.trace.order(place, order, (reads, writes), (block.number, warp.index), &mut warp.knows);
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
        let Op::Load { space, width, d, base, offset, order } = &kernel.code[at].op else { return Ok(()) };
        let size = usize::from(width.bytes);
        let access = Access { bytes: (size * d.len()) as u64, write: false, strong: order.strong, instruction: at };
        let places = Places::new(*space, &warp.registers[*base as usize], *offset, active);
        self.order(block, warp, active, &places, *order, (true, false));
        let inside = self.all_inside(&places, active, access);
        let mut out = [[0u64; 32]; 8];
        for i in lanes(active) {
            *lane = i;
            let place = self.place(block, warp, (&places, active, i), access, inside)?;
            for (part, out) in out[..d.len()].iter_mut().enumerate() {
                // SAFETY: `place` found as many bytes there.
                out[i] = unsafe { read(place.add(part * size), size) };
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
        self.count(places.spaces[*lane], &places.addresses, active, access.bytes, false);
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
        let Op::Store { space, bytes: size, a, base, offset, order } = &kernel.code[at].op else { return Ok(()) };
        let size = usize::from(*size);
        let access = Access { bytes: (size * a.len()) as u64, write: true, strong: order.strong, instruction: at };
        let places = Places::new(*space, &warp.registers[*base as usize], *offset, active);
        self.order(block, warp, active, &places, *order, (false, true));
        let inside = self.all_inside(&places, active, access);
        for i in lanes(active) {
            *lane = i;
            let place = self.place(block, warp, (&places, active, i), access, inside)?;
            for (part, a) in a.iter().enumerate() {
                // SAFETY: `place` found as many bytes there.
                unsafe { write(place.add(part * size), size, warp.registers[*a as usize][i]) };
            }
        }
        if self.launch.checks.races
            && !order.strong
            && let Some((first, second)) = different_values(warp, active, &places, a)
        {
            *lane = second;
            let (space, address) = (places.spaces[second], places.addresses[second]);
            let (other_thread, other_block) = (warp.index * 32 + first as u32, block.number);
            let race = FaultKind::Race { space, address, write: true, other_write: true, other_thread, other_block };
            return Err(race.into());
        }
        self.count(places.spaces[*lane], &places.addresses, active, access.bytes, true);
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
        let Op::Atomic { space, atomic, d, base, offset, b, c, order } = &kernel.code[at].op else { return Ok(()) };
        let size = usize::from(atomic.bytes);
        let access = Access { bytes: size as u64, write: false, strong: true, instruction: at };
        let places = Places::new(*space, &warp.registers[*base as usize], *offset, active);
        self.order(block, warp, active, &places, *order, (true, true));
        let mut out: Lanes = [0; 32];
        let [b, c] = [b, c].map(|&register| warp.registers[register as usize]);
        for i in lanes(active) {
            *lane = i;
            let place = self.place(block, warp, (&places, active, i), access, false)?;
            // SAFETY: `place` found as many bytes; launches of other threads use other allocations.
            unsafe {
                out[i] = read(place, size);
                write(place, size, (atomic.update)(out[i], b[i], c[i]));
            }
            if places.spaces[i] == Space::Global {
                self.counts.global_read += access.bytes;
                self.counts.global_written += access.bytes;
            }
        }
        if let Some(d) = d {
            warp.write(*d, active, &out);
        }
        Ok(())
    }
}

/// Two lanes that store different values to the same address, first and second.
fn different_values(warp: &Warp, active: u32, places: &Places, values: &[u32]) -> Option<(usize, usize)> {
    let mut last = None;
    let ascending = lanes(active).all(|i| {
        let address = places.addresses[i];
        last.replace(address).is_none_or(|last| last < address)
    });
    if ascending || !matches!(places.space, Some(Space::Global | Space::Shared) | None) {
        return None;
    }
    let value = |lane: usize| values.iter().map(move |&register| warp.registers[register as usize][lane]);
    lanes(active).find_map(|second| {
        let same = |&first: &usize| {
            first < second
                && places.addresses[first] == places.addresses[second]
                && places.spaces[first] == places.spaces[second]
                && matches!(places.spaces[first], Space::Global | Space::Shared)
        };
        let first = lanes(active).filter(same).find(|&first| !value(first).eq(value(second)))?;
        Some((first, second))
    })
}
