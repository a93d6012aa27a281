//! `wgmma`: products of four warps together, whose right factor lies in shared memory.
//!
//! Each warp's rows of the sums depend on its own rows of the left factor alone, so a warp does its part where it comes to it. What
//! runs beside the program on hardware is done at once here: sums that are read before they are waited for, and the fence between
//! copies and these products, are not checked.

use super::{Access, Places};
use crate::exec::warp::{Warp, all_lanes};
use crate::exec::{Block, Run, matrix};
use crate::fault::{FaultKind, Space};
use crate::ptx::Op;

/// A right factor as its descriptor says: rows of 128 bytes, swizzled; eight of them, then the next eight `stride` bytes on.
struct Described {
    start: u64,
    stride: u64,
}

impl Described {
    /// PTX ISA, "Matrix descriptor format".
    fn new(bits: u64) -> Result<Self, FaultKind> {
        let (swizzle, base) = (bits >> 62, bits >> 49 & 7);
        if (swizzle, base) != (1, 0) {
            let what =
                format!("wgmma with a descriptor of swizzle {swizzle} and base offset {base}: 1 and 0 are known");
            return Err(FaultKind::Launch(what));
        }
        Ok(Described { start: (bits & 0x3fff) << 4, stride: (bits >> 32 & 0x3fff) << 4 })
    }

    /// Address of eight values of row `row`, the `piece`th.
    fn address(&self, row: u64, piece: u64) -> u64 {
        let plain = self.start + row / 8 * self.stride + row % 8 * 128 + piece * 16;
        plain ^ (plain >> 7 & 7) << 4
    }
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
        all_lanes(active, "wgmma", lane)?;
        let described = Described::new(warp.registers[*right as usize][0])?;
        // Rows of the tile, and pieces of them: the inner dimension lies along rows, or its 16 places are rows.
        let (rows, pieces) = if *along { (16, *width as u64 / 8) } else { (*width as u64, 2) };
        let mut values = vec![[0u16; 8]; (rows * pieces) as usize];
        let access = Access { bytes: 16, write: false, strong: false, instruction: at };
        for (first, values) in values.chunks_mut(32).enumerate() {
            let mut addresses = [0; 32];
            for (i, address) in addresses.iter_mut().enumerate().take(values.len()) {
                let number = (first * 32 + i) as u64;
                *address = described.address(number / pieces, number % pieces);
            }
            let own = u32::MAX >> (32 - values.len());
            let places = Places { space: Some(Space::Shared), spaces: [Space::Shared; 32], addresses };
            for (i, values) in values.iter_mut().enumerate() {
                *lane = i;
                let place = self.place(block, warp, (&places, own, i), access, false)?;
                // SAFETY: `place` found 16 bytes there.
                unsafe { std::ptr::copy_nonoverlapping(place, values.as_mut_ptr().cast(), 16) };
            }
        }
        let right = |k: usize, column: usize| {
            let (row, place) = if *along { (k, column) } else { (column, k) };
            values[row * pieces as usize + place / 8][place % 8]
        };
        let add = warp.pred(*add) != 0;
        matrix::multiply_group(warp, *factors, [d, a], right, add);
        self.trace.lanes_meet(&mut warp.knows, active);
        Ok(())
    }
}
