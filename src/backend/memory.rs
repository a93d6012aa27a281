//! Handles to memory and the memory itself: what operations name, and what a backend resolves the names to.
//!
//! An operation never holds a pointer. It holds handles, plain numbers that say which activation or parameter is meant;
//! the tables here give the range of elements. So a program can be copied, printed and captured, and the same program
//! runs on any backend.

use std::ops::Range;

use super::Backend;
use crate::error::{Error, Result};
use crate::plan::ParamLayout;

/// An activation: real values that live for some part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Act(pub u32);

/// Whole numbers that live for some part of a step: tokens, targets, positions of maxima.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Indices(pub u32);

/// A parameter tensor, by its number in the order of declaration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Param(pub u32);

/// A tensor that is kept from step to step but not trained, such as a running mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State(pub u32);

/// Where an operation leaves a parameter's gradient.
///
/// The first operation of a program that writes it overwrites (`=`), unless the step goes on with an accumulation; every
/// later one adds (`+=`). So no pass is spent on setting gradients to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grad {
    /// The parameter.
    pub param: Param,
    /// Whether this is the program's first write of it.
    pub first: bool,
}

/// Parameters, gradients and what else is kept from step to step: one buffer each.
pub struct Arena<B: Backend> {
    /// Name to range of elements, in arena order.
    pub layout: ParamLayout,
    /// Range of each [`Param`], in the order of declaration.
    pub ranges: Vec<Range<usize>>,
    /// Parameters; empty where none are kept but in the storage type. The padding between tensors stays 0.
    pub parameters: B::Buffer<B::Real>,
    /// The parameters as operations read them, where that is another type than they are computed in; else empty.
    pub stored: B::Buffer<B::Storage>,
    /// Gradients, laid out as the parameters are.
    pub gradients: B::Buffer<B::Real>,
    /// Optimizer slots, laid out as the parameters are.
    pub slots: Vec<B::Buffer<B::Real>>,
    /// Layout of the tensors that are kept but not trained.
    pub state_layout: ParamLayout,
    /// Running means and the like; range of [`State`] `i` is entry `i` of the state layout.
    pub state: B::Buffer<B::Real>,
    /// What the device keeps of the arena's update.
    pub prepared: B::Prepared,
    /// What this process keeps of an arena that is shared out over several; none where it keeps all of it. The slots are then those
    /// of [`Held::elements`] alone.
    pub held: Option<Held<B>>,
}

/// What a process keeps of an arena that is shared out, and where its program finds the rest.
pub struct Held<B: Backend> {
    /// The elements that this process updates.
    pub elements: Range<usize>,
    /// Their parameters, where [`Arena::parameters`] does not hold all: where operations read them through a window, or in another
    /// type, of which a copy of all is kept in [`Arena::stored`].
    pub parameters: Option<B::Buffer<B::Real>>,
    /// These as operations read them, where that is another type and [`Arena::stored`] is a window.
    pub stored: Option<B::Buffer<B::Storage>>,
    /// Their gradients, where [`Arena::gradients`] is a window; else they stand there.
    pub gradients: Option<B::Buffer<B::Real>>,
    /// Where each [`Param`] stands in the window of parameters at present; empty where that is none.
    pub parameter_places: Vec<Range<usize>>,
    /// Where the gradient of each [`Param`] stands in the window of gradients; empty where that is none.
    pub gradient_places: Vec<Range<usize>>,
}

impl<B: Backend> Arena<B> {
    /// Where an operation finds a parameter in [`Arena::parameters`], and in [`Arena::stored`] where it reads that.
    pub fn range(&self, param: Param) -> Range<usize> {
        let index = param.0 as usize;
        let place = self.held.as_ref().and_then(|held| held.parameter_places.get(index));
        place.unwrap_or(&self.ranges[index]).clone()
    }

    /// Where an operation leaves the gradient of a parameter in [`Arena::gradients`].
    pub fn gradient_range(&self, param: Param) -> Range<usize> {
        let index = param.0 as usize;
        let place = self.held.as_ref().and_then(|held| held.gradient_places.get(index));
        place.unwrap_or(&self.ranges[index]).clone()
    }

    /// The parameters that this process updates: a buffer, and its elements.
    pub fn own_parameters(&self) -> (&B::Buffer<B::Real>, Range<usize>) {
        match &self.held {
            None => (&self.parameters, 0..self.layout.padded_len()),
            Some(Held { elements, parameters: Some(parameters), .. }) => (parameters, 0..elements.len()),
            Some(Held { elements, .. }) => (&self.parameters, elements.clone()),
        }
    }

    /// Whether all parameters are kept in the storage type, and of what they are computed in this process's elements alone.
    pub fn shares_out_masters(&self) -> bool {
        self.held.as_ref().is_some_and(|held| held.parameters.is_some() && held.parameter_places.is_empty())
    }

    /// The elements that this process updates: all, where the arena is not shared out.
    pub fn own_elements(&self) -> Range<usize> {
        self.held.as_ref().map_or(0..self.layout.padded_len(), |held| held.elements.clone())
    }

    /// The elements of a kept tensor.
    pub fn state_range(&self, state: State) -> Range<usize> {
        self.state_layout.entries()[state.0 as usize].range()
    }
}

/// Where a batch is written to: ranges of a program's inputs and targets, besides those of the plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InputSlot {
    /// Real values.
    pub values: Vec<(Act, Range<usize>)>,
    /// Whole numbers.
    pub indices: Vec<(Indices, Range<usize>)>,
}

/// The memory of a program's activations.
pub struct Activations<B: Backend> {
    /// What the device keeps of the program. It names the memory below, and goes before it.
    pub recording: B::Recording,
    /// Range of each [`Act`] in `values`.
    pub ranges: Vec<Range<usize>>,
    /// Range of each [`Indices`] in `indices`.
    pub index_ranges: Vec<Range<usize>>,
    /// Real values.
    pub values: B::Buffer<B::Storage>,
    /// Whole numbers.
    pub indices: B::Buffer<i32>,
    /// Where batches are written to in turn, so that the next can be copied while the last is being read.
    pub slots: Vec<InputSlot>,
}

impl<B: Backend> Activations<B> {
    /// Makes the inputs and targets those of a slot.
    pub fn select(&mut self, slot: usize) {
        let Some(InputSlot { values, indices }) = self.slots.get(slot) else { return };
        for (act, range) in values {
            self.ranges[act.0 as usize] = range.clone();
        }
        for (indices, range) in indices {
            self.index_ranges[indices.0 as usize] = range.clone();
        }
    }

    /// The slot whose inputs and targets are taken at present: none where there are no slots.
    pub fn selected(&self) -> Option<usize> {
        let is_selected = |InputSlot { values, indices }: &InputSlot| {
            values.iter().all(|(act, range)| self.ranges[act.0 as usize] == *range)
                && indices.iter().all(|(indices, range)| self.index_ranges[indices.0 as usize] == *range)
        };
        self.slots.iter().position(is_selected)
    }

    /// The elements of an activation.
    pub fn range(&self, act: Act) -> Range<usize> {
        self.ranges[act.0 as usize].clone()
    }

    /// The elements of an index tensor.
    pub fn index_range(&self, indices: Indices) -> Range<usize> {
        self.index_ranges[indices.0 as usize].clone()
    }
}

/// All memory that an operation can reach.
pub struct Memory<'a, B: Backend> {
    /// Parameters, gradients, kept tensors.
    pub arena: &'a mut Arena<B>,
    /// Activations of the program that runs.
    pub activations: &'a mut Activations<B>,
}

/// Several activations at once, each as a slice of its own, for backends whose buffers are host memory.
///
/// # Errors
/// Two handles that share elements: an operation that reads what it writes, which no operation here does unless it says so.
pub fn disjoint<'v, T, const N: usize>(
    values: &'v mut [T],
    ranges: [Range<usize>; N],
    operation: &str,
) -> Result<[&'v mut [T]; N]> {
    let found = format!("{ranges:?}");
    values.get_disjoint_mut(ranges).map_err(|_| Error::shape(operation, "operands that share no memory", found))
}
