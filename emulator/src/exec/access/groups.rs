//! `wgmma`: products of four warps together, whose right factor lies in shared memory.
//!
//! Each warp's rows of the sums depend on its own rows of the left factor alone, so a warp does its part where it comes to it. On
//! hardware that part runs beside the program. What that asks of the program is checked ([`Flight`]): the registers of a product are
//! left alone until it is waited for, and fenced where they were accessed before; what it reads of shared memory stays as it is until
//! then; and whoever wrote there has published it, for the tensor cores read another way than threads write. All four warps execute
//! the same of these instructions, with the same descriptors and predicates: that is compared when a block has ended.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Access, Places};
use crate::exec::warp::{Warp, all_lanes, lanes};
use crate::exec::{Block, Run, matrix};
use crate::fault::{FaultKind, Space};
use crate::ptx::{Instruction, Op};

/// Eight values of 16 bits.
type Piece = [u16; 8];

/// A product that may still run.
struct Product {
    sums: Vec<u32>,
    left: Vec<u32>,
    right: Described,
    read: Vec<Piece>,
}

/// A warp's part of the products that may still run.
pub(in crate::exec) struct Flight {
    /// Since the last commit.
    open: Vec<Product>,
    groups: VecDeque<Vec<Product>>,
    /// By register: whether it was accessed since the last fence.
    accessed: Vec<bool>,
    /// By register: how many products work on it.
    worked_on: Vec<u32>,
    /// What the warp did together with others: the last instruction, and a number for all of them in their order.
    together: Option<(usize, u64)>,
}

impl Flight {
    pub fn new(registers: usize) -> Self {
        let (open, groups) = (Vec::new(), VecDeque::new());
        Flight { open, groups, accessed: vec![true; registers], worked_on: vec![0; registers], together: None }
    }

    pub fn restart(&mut self) {
        self.open.clear();
        self.groups.clear();
        self.accessed.fill(true);
        self.worked_on.fill(0);
        self.together = None;
    }

    /// The warp executes an instruction that its warpgroup executes together, with operands that are to be the same.
    fn executes(&mut self, at: usize, operands: (u64, bool)) {
        let before = self.together.map_or(0, |(_, all)| all);
        let mut hasher = DefaultHasher::new();
        (before, at, operands).hash(&mut hasher);
        self.together = Some((at, hasher.finish()));
    }

    /// An instruction accesses the registers that it names.
    pub fn access(&mut self, instruction: &Instruction) -> Result<(), FaultKind> {
        if matches!(instruction.op, Op::GroupMatrix { .. }) {
            return Ok(());
        }
        for &register in &*instruction.names {
            if self.worked_on[register as usize] > 0 {
                return Err(FaultKind::InFlight);
            }
            self.accessed[register as usize] = true;
        }
        Ok(())
    }

    pub fn fence(&mut self) {
        self.accessed.fill(false);
    }

    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Whether a product may work on these registers now. Sums that others add to already are the one thing that may be shared, where
    /// they are the same in the same places; left factors are only read.
    fn admits(&self, sums: &[u32], left: &[u32]) -> Result<(), FaultKind> {
        if sums.iter().chain(left).any(|&register| self.accessed[register as usize]) {
            return Err(FaultKind::Unfenced);
        }
        let apart = |other: &Product| {
            let no_sum = |register: &u32| !other.sums.contains(register);
            (other.sums == sums || sums.iter().all(|register| no_sum(register) && !other.left.contains(register)))
                && left.iter().all(no_sum)
        };
        if self.groups.iter().flatten().chain(&self.open).all(apart) { Ok(()) } else { Err(FaultKind::InFlight) }
    }

    fn start(&mut self, product: Product) {
        for &register in product.sums.iter().chain(&product.left) {
            self.worked_on[register as usize] += 1;
        }
        self.open.push(product);
    }

    /// The oldest group where there are more than `but`, which is done.
    fn next_done(&mut self, but: usize) -> Option<Vec<Product>> {
        let done = if self.groups.len() > but { self.groups.pop_front()? } else { return None };
        for &register in done.iter().flat_map(|product| product.sums.iter().chain(&product.left)) {
            self.worked_on[register as usize] -= 1;
        }
        Some(done)
    }
}

/// A right factor as its descriptor says: rows of 128 bytes, swizzled; eight of them, then the next eight `stride` bytes on. `pieces` of
/// eight values are read of each of `rows`.
#[derive(Clone, Copy)]
struct Described {
    start: u64,
    stride: u64,
    rows: u64,
    pieces: u64,
}

impl Described {
    /// PTX ISA, "Matrix descriptor format".
    fn new(bits: u64, [rows, pieces]: [u64; 2]) -> Result<Self, FaultKind> {
        let (swizzle, base) = (bits >> 62, bits >> 49 & 7);
        if (swizzle, base) != (1, 0) {
            let what =
                format!("wgmma with a descriptor of swizzle {swizzle} and base offset {base}: 1 and 0 are known");
            return Err(FaultKind::Launch(what));
        }
        Ok(Described { start: (bits & 0x3fff) << 4, stride: (bits >> 32 & 0x3fff) << 4, rows, pieces })
    }

    /// Address of the `number`th eight values.
    fn address(&self, number: u64) -> u64 {
        let (row, piece) = (number / self.pieces, number % self.pieces);
        let plain = self.start + row / 8 * self.stride + row % 8 * 128 + piece * 16;
        plain ^ (plain >> 7 & 7) << 4
    }
}

/// The tensor cores see what these lanes wrote.
pub(in crate::exec) fn publish(block: &mut Block, warp: u32, active: u32) {
    for writer in &mut block.unpublished {
        let thread = u32::from(*writer).wrapping_sub(1);
        if thread / 32 == warp && active >> (thread % 32) & 1 == 1 {
            *writer = 0;
        }
    }
}

/// What a warpgroup's warps have not executed alike: of the first such warp, its number and its last instruction of that kind.
pub(in crate::exec) fn apart(warps: &[Warp]) -> Option<(u32, usize)> {
    warps.chunks(4).find_map(|group| {
        let all = |warp: &Warp| warp.flight.together.map(|(_, all)| all);
        let other = group.iter().find(|warp| all(warp) != all(&group[0]))?;
        Some((other.index, other.flight.together.or(group[0].flight.together)?.0))
    })
}

/// Fails unless the whole warp of a whole warpgroup is here.
fn whole_group(warp: &Warp, active: u32, what: &'static str, lane: &mut usize) -> Result<(), Box<FaultKind>> {
    all_lanes(active, what, lane)?;
    let (first, threads) = (warp.index / 4 * 128, warp.threads);
    if threads < first + 128 {
        let problem = format!("{what} by {} threads: a warpgroup has 128", threads - first);
        return Err(FaultKind::Launch(problem).into());
    }
    Ok(())
}

/// A warp executes an instruction without operands that its warpgroup executes together.
pub(in crate::exec) fn together(
    warp: &mut Warp,
    active: u32,
    at: usize,
    what: &'static str,
    lane: &mut usize,
) -> Result<(), Box<FaultKind>> {
    whole_group(warp, active, what, lane)?;
    warp.flight.executes(at, (0, false));
    Ok(())
}

impl Run<'_> {
    pub(in crate::exec) fn group_matrix(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::GroupMatrix { width, factors, along, d, a, right, add } = &kernel.code[at].op else { return Ok(()) };
        whole_group(warp, active, "wgmma", lane)?;
        warp.flight.admits(d, a)?;
        let (bits, add) = (warp.registers[*right as usize], warp.pred(*add));
        if bits.iter().any(|&other| other != bits[0]) || ![0, u32::MAX].contains(&add) {
            return Err(FaultKind::ApartInGroup { warp: warp.index }.into());
        }
        warp.flight.executes(at, (bits[0], add != 0));
        // The inner dimension lies along rows, or its 16 places are rows.
        let extent = if *along { [16, u64::from(*width) / 8] } else { [u64::from(*width), 2] };
        let described = Described::new(bits[0], extent)?;
        let read = self.read_described(block, warp, described, at, lane)?;
        for address in (0..described.rows * described.pieces).map(|number| described.address(number)) {
            let words = &block.unpublished[address as usize / 4..][..4];
            if let Some((word, &writer)) = (address..).step_by(4).zip(words).find(|(_, writer)| **writer != 0) {
                return Err(FaultKind::Unpublished { address: word, thread: u32::from(writer) - 1 }.into());
            }
        }
        let right = |k: usize, column: usize| {
            let (row, place) = if *along { (k, column) } else { (column, k) };
            read[row * extent[1] as usize + place / 8][place % 8]
        };
        matrix::multiply_group(warp, *factors, [d, a], right, add != 0);
        warp.flight.start(Product { sums: d.clone(), left: a.clone(), right: described, read });
        self.trace.lanes_meet(&mut warp.knows, active);
        Ok(())
    }

    fn read_described(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        right: Described,
        at: usize,
        lane: &mut usize,
    ) -> Result<Vec<Piece>, FaultKind> {
        let mut values = vec![[0; 8]; (right.rows * right.pieces) as usize];
        let access = Access { bytes: 16, write: false, strong: false, instruction: at };
        for (first, values) in (0..).step_by(32).zip(values.chunks_mut(32)) {
            let own = u32::MAX >> (32 - values.len());
            let mut addresses = [0; 32];
            lanes(own).for_each(|i| addresses[i] = right.address(first + i as u64));
            let places = Places { space: Some(Space::Shared), spaces: [Space::Shared; 32], addresses };
            for (i, values) in values.iter_mut().enumerate() {
                *lane = i;
                let place = self.place(block, warp, (&places, own, i), access, false)?;
                // SAFETY: `place` found 16 bytes there.
                unsafe { std::ptr::copy_nonoverlapping(place, values.as_mut_ptr().cast(), 16) };
            }
        }
        Ok(values)
    }

    /// Waits for all groups of products but the last `but`. They may have read until now: what they read is read again.
    pub(in crate::exec) fn wait_group(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        but: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        while let Some(done) = warp.flight.next_done(but) {
            for Product { right, read, .. } in done {
                let now = self.read_described(block, warp, right, 0, lane)?;
                if let Some(number) = now.iter().zip(&read).position(|(now, then)| now != then) {
                    return Err(FaultKind::ChangedInFlight { address: right.address(number as u64) }.into());
                }
            }
        }
        Ok(())
    }
}
