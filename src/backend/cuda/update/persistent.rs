//! The update in one cooperative launch, for arenas whose gradients stay in the second-level cache.

use super::plan::{Kind, Norm, Pass};
use super::{Arrays, Prepared};
use crate::backend::cuda::launch::{Arg, Grid, args};
use crate::error::Result;

const FILE: &str = "update_persistent";
/// `TENSORS` and `GROUPS` of the kernel.
const MOST_TENSORS: usize = 512;
const MOST_GROUPS: usize = 16;
const THREADS: u32 = 256;

impl Prepared {
    fn persistent_kernel(&self, arrays: &Arrays) -> String {
        format!("persistent_{}_{}", self.kernel(), arrays.form())
    }

    /// How many blocks the persistent form has; none where several launches are better, or needed.
    pub fn persistent_blocks(&self, arrays: &Arrays) -> Result<Option<usize>> {
        let needs_norms = |kind: Kind| matches!(kind, Kind::Lars | Kind::Lamb | Kind::Muon);
        let element_wise = !self.plan.groups.iter().any(|group| needs_norms(Kind::of(&group.rule)));
        let fits = self.tensors.len() <= MOST_TENSORS && self.groups.len() <= MOST_GROUPS;
        let whole = self.elements.len() == self.plan.block_groups.len() * crate::plan::ALIGNMENT;
        if !whole || !self.device.options().persistent_update || !element_wise || !fits || !self.unit_tensors.is_empty()
        {
            return Ok(None);
        }
        let blocks = self.plan.block_groups.len();
        let bytes = blocks * crate::plan::ALIGNMENT * if arrays.types[1] == "f32" { 4 } else { 2 };
        // What else the update reads passes through the cache too, so a part of it is left to that.
        if bytes > self.device.cache_bytes()? / 4 * 3 {
            return Ok(None);
        }
        let wanted = blocks.div_ceil(8).max(self.pieces.len()).max(1);
        let resident = self.device.resident_blocks(FILE, &self.persistent_kernel(arrays), THREADS)?;
        Ok(Some(wanted.min(resident)).filter(|&blocks| blocks > 0))
    }

    /// Queues the persistent form.
    pub(super) fn queue_persistent(&self, arrays: &Arrays, pass: &Pass, blocks: usize) -> Result<()> {
        let [piece_count, tensor_count, group_count] =
            [self.pieces.len(), self.tensors.len(), self.groups.len()].map(|count| count as u32);
        let norm = Norm {
            pieces: self.pieces.address_of(0),
            squares: self.squares[0].address_of(0),
            clamped: self.clamped.address_of(0),
            tensor_squares: self.tensor_squares.address_of(0),
            barrier: self.barrier.address_of(0),
            clip: self.clip,
            piece_count,
            tensor_count,
            group_count,
            padding: 0,
        };
        let [first, second] = arrays.slots;
        let list =
            args![arrays.parameters, arrays.gradients, arrays.copy, first, second, Arg::of(pass), Arg::of(&norm)];
        let kernel = self.persistent_kernel(arrays);
        // SAFETY: the arrays hold as many elements as the plan's layout, of the types that the kernel's name says; the tables are
        // of the sizes that `norm` says; `blocks` came from `resident_blocks`.
        unsafe { self.device.launch_cooperative(FILE, &kernel, Grid::new(blocks, THREADS), list) }
    }
}
