//! What of an arena this process updates: the arrays that the kernels are given, and the average that follows the parameters.

use super::{Arrays, FILE, Prepared};
use crate::backend::cuda::launch::{Grid, args};
use crate::backend::cuda::{Buffer, Cuda, Storage};
use crate::backend::{Arena, Held};
use crate::error::{Error, Result};
use crate::optim::UpdatePlan;
use crate::plan::ALIGNMENT;

/// Addresses of the elements that this process updates, and how many of them are there.
struct Own {
    parameters: (u64, usize),
    gradients: (u64, usize),
    copy: u64,
}

impl Own {
    /// `alone`: whether parameters are kept in the storage type alone.
    fn new<S: Storage>(arena: &Arena<Cuda<S>>, alone: bool) -> Self {
        let Some(Held { elements, parameters, stored, gradients, .. }) = &arena.held else {
            let (parameters, stored) = (&arena.parameters, &arena.stored);
            let all = if alone { (stored.address_of(0), stored.len()) } else { whole(parameters) };
            return Own { parameters: all, gradients: whole(&arena.gradients), copy: stored.address_of(0) };
        };
        let part = |own: &Option<Buffer<f32>>, all: &Buffer<f32>| match own {
            Some(own) => whole(own),
            None => {
                let start = elements.start.min(all.len());
                (all.address_of(start), elements.len().min(all.len() - start))
            }
        };
        let copy = match stored {
            Some(own) => own.address_of(0),
            None => arena.stored.address_of(elements.start.min(arena.stored.len())),
        };
        Own { parameters: part(parameters, &arena.parameters), gradients: part(gradients, &arena.gradients), copy }
    }
}

fn whole(buffer: &Buffer<f32>) -> (u64, usize) {
    (buffer.address_of(0), buffer.len())
}

impl<S: Storage> Cuda<S> {
    /// The arrays of an arena, and what is kept of its plan.
    pub(in crate::backend::cuda) fn arrays<'a>(
        &self,
        arena: &'a mut Arena<Self>,
        plan: &UpdatePlan,
    ) -> Result<(&'a mut Prepared, Arrays)> {
        let alone = plan.rounding.is_some();
        if alone && S::NAME != "bf16" {
            return Err(Error::shape("update", "parameters in bf16, where they are kept in that alone", S::NAME));
        }
        let (elements, whole) = (arena.own_elements(), plan.block_groups.len() * ALIGNMENT);
        let own = Own::new(arena, alone);
        let lens = [own.parameters.1, own.gradients.1].into_iter().chain(arena.slots.iter().map(Buffer::len));
        let fits = arena.held.is_some() || elements.len() == whole;
        if !fits
            || elements.end > whole
            || lens.clone().any(|l| l != elements.len())
            || arena.slots.len() < plan.slots.len()
        {
            return Err(Error::shape(
                "update",
                format!("parameters, gradients and {} slots of {} elements", plan.slots.len(), elements.len()),
                format!("{:?}", lens.collect::<Vec<_>>()),
            ));
        }
        let slot = |index: usize| arena.slots.get(index).map_or(0, |slot| slot.address_of(0));
        let arrays = Arrays {
            parameters: own.parameters.0,
            gradients: own.gradients.0,
            copy: if S::HAS_MASTER && !alone { own.copy } else { 0 },
            slots: [slot(0), slot(1)],
            types: [if alone { S::NAME } else { "f32" }, "f32", S::NAME],
        };
        let is_for = |prepared: &Prepared| prepared.plan == *plan && prepared.elements == elements;
        let tables = &mut arena.prepared.tables;
        if !tables.as_ref().is_some_and(is_for) {
            *tables = Some(Prepared::of_part(self.device(), plan, elements)?);
        }
        let Some(prepared) = tables else {
            return Err(Error::DeviceFailed("the update's plan was not kept".into()));
        };
        Ok((prepared, arrays))
    }

    /// Queues a move of the average of the parameters that this process updates; `outcome`, where it is not 0, says whether the
    /// update before it was skipped.
    pub(in crate::backend::cuda) fn queue_average(
        &self,
        average: &mut Buffer<f32>,
        arena: &Arena<Self>,
        decay: f64,
        outcome: u64,
    ) -> Result<()> {
        self.queue_average_of(average, Own::new(arena, false).parameters, decay, outcome)
    }

    /// As [`Cuda::queue_average`], of parameters at an address.
    pub(super) fn queue_average_of(
        &self,
        average: &mut Buffer<f32>,
        (parameters, len): (u64, usize),
        decay: f64,
        outcome: u64,
    ) -> Result<()> {
        if average.len() != len {
            let found = format!("{} and {len}", average.len());
            return Err(Error::shape("average", "as many averages as parameters", found));
        }
        if len == 0 {
            return Ok(());
        }
        let list = args![average.address_of(0), parameters, (1.0 - decay) as f32, len, outcome];
        // SAFETY: two arrays of `len` values, and an outcome or nothing.
        unsafe { self.device().launch(FILE, "average", Grid::elements(self.device(), len, 1), list) }
    }
}
