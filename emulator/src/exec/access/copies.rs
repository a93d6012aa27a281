//! Asynchronous copies to shared memory, and matrices out of it.

use super::{Access, Places};
use crate::exec::warp::{PendingCopy, Warp, all_lanes, lanes};
use crate::exec::{Block, Run};
use crate::fault::{FaultKind, Space};
use crate::ptx::{Lanes, Op};

impl Run<'_> {
    /// Reads the source at once; the bytes arrive in shared memory when the copy's group is waited for, and until then nothing
    /// may read what was there.
    pub(in crate::exec) fn copy_async(
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
        let whole = u64::from(*bytes);
        let lengths = source_bytes.map(|register| warp.registers[register as usize]);
        let sources = Places::new(Some(Space::Global), &warp.registers[*from as usize], *from_offset, active);
        let targets = Places::new(Some(Space::Shared), &warp.registers[*to as usize], *to_offset, active);
        let reading = Access { bytes: whole, write: false, strong: false, instruction: at };
        let inside = lengths.is_none() && self.all_inside(&sources, active, reading);
        let mut present = 0;
        for i in lanes(active) {
            *lane = i;
            let length = lengths.map_or(whole, |lengths| lengths[i].min(whole));
            let mut data = [0; 16];
            if length > 0 {
                let address = sources.addresses[i];
                if !address.is_multiple_of(whole) {
                    return Err(
                        FaultKind::Misaligned { space: Space::Global, write: false, address, bytes: whole }.into()
                    );
                }
                present |= 1 << i;
                // A source that ends early is read in parts of its own length.
                let step = if length == whole { whole } else { 1 << length.trailing_zeros().min(4) };
                let mut source = Places { space: sources.space, spaces: sources.spaces, addresses: sources.addresses };
                for part in (0..length).step_by(step as usize) {
                    source.addresses[i] = address + part;
                    let access = Access { bytes: step, ..reading };
                    let place = self.place(block, warp, (&source, active, i), access, inside)?;
                    // SAFETY: `place` found `step` bytes there; `data` has room, as `part + step <= 16`.
                    unsafe {
                        std::ptr::copy_nonoverlapping(place, data[part as usize..].as_mut_ptr(), step as usize);
                    }
                }
            }
            let writing = Access { write: true, ..reading };
            self.place(block, warp, (&targets, active, i), writing, false)?;
            let to = targets.addresses[i];
            block.shared_written[to as usize..(to + whole) as usize].fill(0);
            warp.copies.push(PendingCopy { to, lane: i as u8, data, bytes: *bytes });
        }
        self.count(Space::Global, &sources.addresses, present, whole, false);
        Ok(())
    }

    /// Lets all groups of copies but the last `but` arrive.
    pub(in crate::exec) fn finish_copies(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        but: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        while warp.groups.len() > but {
            for copy in warp.groups.pop_front().unwrap_or_default() {
                let i = usize::from(copy.lane);
                *lane = i;
                let bytes = u64::from(copy.bytes);
                let access = Access { bytes, write: true, strong: false, instruction: 0 };
                let target =
                    Places { space: Some(Space::Shared), spaces: [Space::Shared; 32], addresses: [copy.to; 32] };
                let place = self.place(block, warp, (&target, 1 << i, i), access, false)?;
                // SAFETY: `place` found `bytes` bytes there.
                unsafe { std::ptr::copy_nonoverlapping(copy.data.as_ptr(), place, bytes as usize) };
                self.counts.shared_written += bytes;
            }
        }
        Ok(())
    }

    /// `ldmatrix`: 8 by 8 values of 16 bits; lanes 8i to 8i + 7 name the rows of matrix i.
    pub(in crate::exec) fn load_matrix(
        &mut self,
        block: &mut Block,
        warp: &mut Warp,
        active: u32,
        at: usize,
        lane: &mut usize,
    ) -> Result<(), Box<FaultKind>> {
        let kernel = self.kernel;
        let Op::LoadMatrix { transposed, d, base, offset } = &kernel.code[at].op else { return Ok(()) };
        all_lanes(active, "ldmatrix", lane)?;
        let places = Places::new(Some(Space::Shared), &warp.registers[*base as usize], *offset, active);
        let access = Access { bytes: 16, write: false, strong: false, instruction: at };
        for (matrix, d) in d.iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            let own = 0xff << (8 * matrix);
            for (row, values) in rows.iter_mut().enumerate() {
                let i = matrix * 8 + row;
                *lane = i;
                // The lane that names a row stands for the warp, which reads together.
                let place = self.place(block, warp, (&places, own, i), access, false)?;
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
            self.count(Space::Shared, &places.addresses, own, 16, false);
        }
        self.trace.lanes_meet(&mut warp.knows, active);
        Ok(())
    }
}
