//! The update alone, of arrays of any owner and of every combination of types that there is a kernel for.

use super::{Arrays, Prepared};
use crate::backend::cuda::Buffer;
use crate::error::{Error, Result};
use crate::optim::{StepOutcome, StepParams};
use crate::plan::ALIGNMENT;
use crate::real::Element;

/// The arrays of an arena, each laid out as the plan's layout says.
pub struct ArenaArrays<'a, P, G, S> {
    /// f32; or bf16, which the plan's [`crate::optim::UpdatePlan::rounding`] goes with.
    pub parameters: &'a mut Buffer<P>,
    /// What is read, or read and set to 0.
    pub gradients: &'a mut Buffer<G>,
    /// f32 parameters rounded, where wanted.
    pub copy: Option<&'a mut Buffer<S>>,
    /// Those that the plan names; zeros before the first update.
    pub slots: &'a mut [Buffer<f32>],
}

/// Types of parameters, gradients and copy that kernels are compiled for: `FOR_EACH_FORM` of kernels/update_plan.cuh.
const FORMS: [[&str; 3]; 7] = [
    ["f32", "f32", "f32"],
    ["f32", "f32", "bf16"],
    ["f32", "f32", "f16"],
    ["f32", "bf16", "bf16"],
    ["f32", "f16", "f16"],
    ["bf16", "f32", "bf16"],
    ["bf16", "bf16", "bf16"],
];

impl Prepared {
    /// One update as [`crate::optim`] defines it. Waits for the device.
    ///
    /// # Errors
    /// Arrays that do not fit the plan or each other in types, what [`StepParams::check`] refuses, or a device that failed.
    pub fn update_buffers<P: Element, G: Element, S: Element>(
        &mut self,
        arrays: ArenaArrays<'_, P, G, S>,
        step: &StepParams,
    ) -> Result<StepOutcome> {
        let types = [P::NAME, G::NAME, S::NAME];
        self.check_types(types, arrays.copy.is_some())?;
        let ArenaArrays { parameters, gradients, copy, slots } = arrays;
        let len = self.plan.block_groups.len() * ALIGNMENT;
        let lens = [parameters.len(), gradients.len(), copy.as_ref().map_or(len, |copy| copy.len())];
        let lens: Vec<usize> = lens.into_iter().chain(slots.iter().map(Buffer::len)).collect();
        if lens.iter().any(|&l| l != len) || slots.len() < self.plan.slots.len() {
            let expected = format!("parameters, gradients, copy and {} slots of {len} elements", self.plan.slots.len());
            return Err(Error::shape("update", expected, format!("{lens:?}")));
        }
        let slot = |index: usize| slots.get(index).map_or(0, |slot| slot.address_of(0));
        let addresses = Arrays {
            parameters: parameters.address_of(0),
            gradients: gradients.address_of(0),
            copy: copy.map_or(0, |copy| copy.address_of(0)),
            slots: [slot(0), slot(1)],
            types,
        };
        self.prepare(step)?;
        self.queue(&addresses, step.zero_gradients, self.params.address_of(0))?;
        self.outcome()
    }

    /// Fails for types that there is no kernel for, or that do not go with the plan's rounding.
    pub(super) fn check_types(&self, types: [&'static str; 3], copied: bool) -> Result<()> {
        if !FORMS.contains(&types) {
            let expected = format!("types of parameters, gradients and copy among {FORMS:?}");
            return Err(Error::shape("update", expected, format!("{types:?}")));
        }
        let alone = types[0] == "bf16";
        if alone != self.plan.rounding.is_some() || alone && copied {
            let found = format!("{types:?} and {:?}", self.plan.rounding);
            let expected = "a seed of the rounding, and no copy, with parameters in bf16 alone; no seed with f32";
            return Err(Error::shape("update", expected, found));
        }
        Ok(())
    }
}
