//! The parameters that a model declares: names, shapes, initial values.

use std::collections::HashMap;
use std::ops::Range;

use crate::backend::{Arena, Backend, Held, Param, State, stores_what_it_computes_in};
use crate::error::{Error, Result};
use crate::plan::{Hold, ParamLayout, ParamSpec, overlap};
use crate::random::{Philox, Purpose, to_unit};
use crate::real::Element;

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// One value everywhere.
    Constant(f64),
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// Half the width.
        bound: f64,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
}

impl Init {
    /// PyTorch's default for linear and convolution layers, weight and bias: uniform within `1 / sqrt(fan_in)`
    /// (`kaiming_uniform_` with `a = sqrt(5)`).
    pub fn torch_default(fan_in: usize) -> Self {
        Init::Uniform { bound: 1.0 / (fan_in.max(1) as f64).sqrt() }
    }

    /// He et al. 2015, by fan out: normal with standard deviation `sqrt(2 / fan_out)` (ResNet's convolutions).
    pub fn kaiming_normal(fan: usize) -> Self {
        Init::Normal { std: (2.0 / fan.max(1) as f64).sqrt() }
    }
}

#[derive(Clone, Debug)]
struct Declared {
    spec: ParamSpec,
    init: Init,
}

/// All parameters and kept tensors of a model, in the order of declaration.
#[derive(Clone, Debug, Default)]
pub struct ParamTable {
    parameters: Vec<Declared>,
    states: Vec<Declared>,
    by_name: HashMap<String, usize>,
    state_by_name: HashMap<String, usize>,
}

impl ParamTable {
    /// Whether nothing was declared.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// Names and shapes, in the order of declaration.
    pub fn specs(&self) -> impl Iterator<Item = &ParamSpec> {
        self.parameters.iter().map(|p| &p.spec)
    }

    /// A parameter by its name.
    pub fn find(&self, name: &str) -> Option<(Param, &ParamSpec)> {
        self.by_name.get(name).map(|&index| (Param(index as u32), &self.parameters[index].spec))
    }

    /// Number of parameters, elements counted.
    pub fn elements(&self) -> usize {
        self.specs().map(|s| s.shape.iter().product::<usize>()).sum()
    }

    /// Declares a parameter, or finds it where an earlier plan declared it.
    ///
    /// # Errors
    /// The name was declared with another shape: the model changed between two plans.
    pub(super) fn parameter(&mut self, name: String, shape: &[usize], init: Init) -> Result<Param> {
        declare(&mut self.parameters, &mut self.by_name, name, shape, init).map(Param)
    }

    /// Declares a kept tensor of one value everywhere.
    pub(super) fn state(&mut self, name: String, shape: &[usize], value: f64) -> Result<State> {
        declare(&mut self.states, &mut self.state_by_name, name, shape, Init::Constant(value)).map(State)
    }

    /// The arena of these parameters with their initial values, laid out in the order that backward finishes them, and
    /// `slots` optimizer slots of zeros.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn arena<B: Backend>(&self, backend: &B, seed: u64, slots: usize) -> Result<Arena<B>> {
        self.arena_with(backend, seed, slots, true)
    }

    /// As [`ParamTable::arena`]; without `master` the parameters are kept in the storage type alone, and
    /// [`Arena::parameters`] is empty.
    ///
    /// # Errors
    /// Not enough memory, or a backend that stores what it computes in.
    pub fn arena_with<B: Backend>(&self, backend: &B, seed: u64, slots: usize, master: bool) -> Result<Arena<B>> {
        let (layout, ranges) = self.layout()?;
        let len = layout.padded_len();
        let one_type = stores_what_it_computes_in::<B>();
        if one_type && !master {
            let problem = format!("{} is what this device computes in; expected true", B::Real::NAME);
            return Err(Error::config("optimizer.master", problem));
        }
        let mut parameters = backend.allocate(if master { len } else { 0 })?;
        let mut stored = backend.allocate(if one_type { 0 } else { len })?;
        for (index, elements) in pieces_of_all(&ranges) {
            let first = elements.start;
            let values = self.initial(index, seed, within(&ranges[index], elements)).into_iter();
            if master {
                backend.upload(&mut parameters, first, &values.map(B::Real::from_f64).collect::<Vec<_>>())?;
            } else {
                backend.upload(&mut stored, first, &values.map(B::Storage::from_f64).collect::<Vec<_>>())?;
            }
        }
        let (state_layout, state) = self.initial_states(backend)?;
        let mut arena = Arena {
            stored,
            gradients: backend.allocate(len)?,
            slots: (0..slots).map(|_| backend.allocate(len)).collect::<Result<_>>()?,
            layout,
            ranges,
            parameters,
            state_layout,
            state,
            prepared: B::Prepared::default(),
            held: None,
        };
        backend.parameters_changed(&mut arena)?;
        Ok(arena)
    }

    /// As [`ParamTable::arena`], of which this process holds what `hold` says: no more than that is ever allocated.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn arena_held<B: Backend>(&self, backend: &B, seed: u64, slots: usize, hold: &Hold) -> Result<Arena<B>> {
        let one_type = stores_what_it_computes_in::<B>();
        let (layout, ranges) = self.layout()?;
        let (len, own) = (layout.padded_len(), hold.elements.clone());
        // Operations read a window, all parameters, or a copy of all in the storage type.
        let (window, seen) = (hold.parameters.is_some(), hold.parameters.unwrap_or(len));
        let mut parameters = backend.allocate(if one_type { seen } else { 0 })?;
        let mut stored = backend.allocate(if one_type { 0 } else { seen })?;
        let own_len = |wanted: bool| wanted.then_some(own.len());
        let mut own_parameters = own_len(window || !one_type).map(|len| backend.allocate(len)).transpose()?;
        let own_stored = own_len(window && !one_type).map(|len| backend.allocate(len)).transpose()?;
        for (index, elements) in pieces_of_all(&ranges) {
            let common = overlap(&own, &elements);
            if common.is_empty() && window {
                continue;
            }
            let first = elements.start;
            let values = self.initial(index, seed, within(&ranges[index], elements)).into_iter();
            let values: Vec<_> = values.map(B::Real::from_f64).collect();
            match &mut own_parameters {
                Some(parameters) if !common.is_empty() => {
                    let values = &values[common.start - first..common.end - first];
                    backend.upload(parameters, common.start - own.start, values)?;
                }
                Some(_) => {}
                None => backend.upload(&mut parameters, first, &values)?,
            }
            if !window && !one_type {
                let values: Vec<_> = values.into_iter().map(|value| B::Storage::from_f32(value.f32())).collect();
                backend.upload(&mut stored, first, &values)?;
            }
        }
        let own_gradients = own_len(hold.gradients.is_some()).map(|len| backend.allocate(len)).transpose()?;
        let (state_layout, state) = self.initial_states(backend)?;
        let (gradient_places, gradients) = hold.gradients.clone().unwrap_or((Vec::new(), len));
        let mut arena = Arena {
            stored,
            gradients: backend.allocate(gradients)?,
            slots: (0..slots).map(|_| backend.allocate(own.len())).collect::<Result<_>>()?,
            held: Some(Held {
                elements: own,
                parameters: own_parameters,
                stored: own_stored,
                gradients: own_gradients,
                // Nothing stands in a window before it is brought there.
                parameter_places: if window { vec![0..0; ranges.len()] } else { Vec::new() },
                gradient_places,
            }),
            layout,
            ranges,
            parameters,
            state_layout,
            state,
            prepared: B::Prepared::default(),
        };
        backend.parameters_changed(&mut arena)?;
        Ok(arena)
    }

    /// The kept tensors with their initial values.
    fn initial_states<B: Backend>(&self, backend: &B) -> Result<(ParamLayout, B::Buffer<B::Real>)> {
        let layout = self.state_layout()?;
        let mut state = backend.allocate(layout.padded_len())?;
        let ranges: Vec<_> = layout.entries().iter().map(|entry| entry.range()).collect();
        for (index, elements) in pieces_of_all(&ranges) {
            let values = vec![B::Real::from_f64(self.initial_state(index)); elements.len()];
            backend.upload(&mut state, elements.start, &values)?;
        }
        Ok((layout, state))
    }

    /// The arena in the order that backward finishes the gradients (the last declared first), and the range of each
    /// parameter in the order of declaration.
    pub fn layout(&self) -> Result<(ParamLayout, Vec<Range<usize>>)> {
        let specs: Vec<ParamSpec> = self.parameters.iter().rev().map(|p| p.spec.clone()).collect();
        let layout = ParamLayout::new(&specs)?;
        let ranges = layout.entries().iter().rev().map(|e| e.range()).collect();
        Ok((layout, ranges))
    }

    /// The arena of kept tensors, in the order of declaration.
    pub fn state_layout(&self) -> Result<ParamLayout> {
        ParamLayout::new(&self.states.iter().map(|s| s.spec.clone()).collect::<Vec<_>>())
    }

    /// Initial values of these elements of parameter `index`: they depend on the seed, the parameter's name and the position alone.
    pub fn initial(&self, index: usize, seed: u64, elements: Range<usize>) -> Vec<f64> {
        let Declared { spec, init } = &self.parameters[index];
        let (first, end) = (elements.start as u64, elements.end as u64);
        let stream = Philox::new(seed, Purpose::Initialization, crc32c::crc32c(spec.name.as_bytes()));
        match *init {
            Init::Constant(value) => vec![value; elements.len()],
            Init::Uniform { bound } => (first / 4..end.div_ceil(4))
                .flat_map(|block| stream.block(block))
                .skip(elements.start % 4)
                .take(elements.len())
                .map(|word| bound * (2.0 * f64::from(to_unit(word)) - 1.0))
                .collect(),
            Init::Normal { std } => (first..end).map(|i| std * stream.normal(i)).collect(),
        }
    }

    /// Initial value of kept tensor `index`.
    pub fn initial_state(&self, index: usize) -> f64 {
        match self.states[index].init {
            Init::Constant(value) => value,
            Init::Uniform { .. } | Init::Normal { .. } => 0.0,
        }
    }
}

/// Elements whose initial values the host makes at a time, so that it needs no room for a whole tensor besides the device's.
const PIECE: usize = 1 << 20;

/// The pieces of all tensors that lie in these ranges, each with the number of its tensor.
fn pieces_of_all(ranges: &[Range<usize>]) -> impl Iterator<Item = (usize, Range<usize>)> {
    ranges.iter().enumerate().flat_map(|(index, range)| {
        let end = range.end;
        range.clone().step_by(PIECE).map(move |first| (index, first..end.min(first.saturating_add(PIECE))))
    })
}

/// Elements of an arena as those of a tensor that lies in `range` of it.
fn within(range: &Range<usize>, elements: Range<usize>) -> Range<usize> {
    elements.start - range.start..elements.end - range.start
}

fn declare(
    declared: &mut Vec<Declared>,
    by_name: &mut HashMap<String, usize>,
    name: String,
    shape: &[usize],
    init: Init,
) -> Result<u32> {
    if let Some(&index) = by_name.get(&name) {
        let before = &declared[index].spec.shape;
        if before != shape {
            return Err(Error::shape(name, format!("{before:?}, as planned before"), format!("{shape:?}")));
        }
        return Ok(index as u32);
    }
    by_name.insert(name.clone(), declared.len());
    declared.push(Declared { spec: ParamSpec { name, shape: shape.to_vec() }, init });
    Ok(declared.len() as u32 - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_are_the_same_in_whatever_pieces_they_are_made() {
        let mut table = ParamTable::default();
        let inits = [Init::Constant(0.5), Init::Uniform { bound: 0.1 }, Init::Normal { std: 0.02 }];
        for (number, init) in inits.into_iter().enumerate() {
            table.parameter(number.to_string(), &[7, 5], init).unwrap();
            let whole = table.initial(number, 1, 0..35);
            for size in 1..35 {
                let pieces = (0..35).step_by(size).map(|first| first..35.min(first + size));
                let pieces: Vec<f64> = pieces.flat_map(|piece| table.initial(number, 1, piece)).collect();
                assert_eq!(pieces, whole, "{init:?}, {size} at a time");
            }
        }
        let ranges = [4..9, 16..16 + PIECE + 3];
        let pieces: Vec<_> = pieces_of_all(&ranges).collect();
        assert_eq!(pieces, [(0, 4..9), (1, 16..16 + PIECE), (1, 16 + PIECE..16 + PIECE + 3)]);
    }
}
