//! LARS and LAMB: the learning rate of each tensor by the norms of its weights and of its direction, and LAMB's step
//! (kernels/update_trust.cu).

use super::plan::{Kind, Pass};
use super::{Arrays, Prepared, a_warp_each, gather_pieces};
use crate::backend::Together;
use crate::backend::cuda::launch::{Arg, Grid, args};
use crate::error::Result;
use crate::plan::ALIGNMENT;

const FILE: &str = "update_trust";

impl Prepared {
    /// The learning rate of each tensor under LARS or LAMB.
    pub(super) fn queue_rates(
        &self,
        arrays: &Arrays,
        pass: &Pass,
        kind: Kind,
        together: &mut dyn Together,
    ) -> Result<()> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        let own = &self.own[0];
        let lamb = kind == Kind::Lamb;
        let (kernel, second_pair) = if lamb { ("lamb", arrays.slots) } else { ("lars", [arrays.gradients, 0]) };
        if !own.is_empty() {
            let mut list: Vec<Arg> = vec![arrays.parameters.into(), second_pair[0].into()];
            if lamb {
                list.push(second_pair[1].into());
            }
            let [weights, others] = [&self.squares[0], &self.squares[1]].map(|buffer| buffer.address_of(own.start));
            let shared: &[Arg] = args![self.pieces.address_of(own.start), Arg::of(pass), weights, others];
            list.extend_from_slice(shared);
            let kernel = format!("{kernel}_pieces_{}", arrays.form());
            // SAFETY: tables and results are of the sizes that the kernels name; the arrays hold what is updated, as the plan lays it out.
            unsafe { self.device.launch(FILE, &kernel, Grid::new(own.len(), 256), &mut list)? };
        }
        self.squares.iter().try_for_each(|squares| gather_pieces(together, squares))?;
        together.join()?;
        let [weights, others] = [&self.squares[0], &self.squares[1]].map(|buffer| buffer.address_of(0));
        let rates = self.rates[usize::from(lamb)].address_of(0);
        let finish = args![weights, others, self.tensors.len() as u32, Arg::of(pass), lamb, rates];
        // SAFETY: as above.
        unsafe { self.device.launch(FILE, "tensor_rates", Grid::new(self.tensors.len(), 256), finish) }
    }

    /// LAMB's learning rates, and its step along the directions that the pass before left in the slots.
    pub(super) fn queue_lamb(&self, arrays: &Arrays, pass: &Pass, together: &mut dyn Together) -> Result<()> {
        self.queue_rates(arrays, pass, Kind::Lamb, together)?;
        let warps = self.elements.len() / ALIGNMENT;
        if warps == 0 {
            return Ok(());
        }
        let grid = a_warp_each(warps);
        let (rates, [first, second]) = (self.rates[1].address_of(0), arrays.slots);
        let list = args![arrays.parameters, arrays.copy, first, second, rates, Arg::of(pass)];
        // SAFETY: the arrays hold as many elements as are updated, of the types that the kernel's name says.
        unsafe { self.device.launch(FILE, &format!("lamb_apply_{}", arrays.form()), grid, list) }
    }
}
