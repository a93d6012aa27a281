//! Where layers emit their operations and declare what these need.

use std::collections::HashSet;
use std::ops::Range;

use super::fuse::Operations;
use super::layer::{Tensor, Value};
use super::parameters::{Init, ParamTable};
use super::program::Program;
use super::{Input, Mode};
use crate::backend::ops::Padding;
use crate::backend::{Act, Backend, Grad, Indices, Op, Param, State, Use};
use crate::error::{Error, Result};
use crate::plan::{Lifetime, MemoryPlan};

/// Most elements of a tensor, of parameters or of activations: whatever is counted of them then fits its whole numbers.
const MOST_ELEMENTS: usize = 1 << 40;

/// Elements of this shape; as many as there are numbers where they are more.
fn elements(shape: &[usize]) -> usize {
    shape.iter().fold(1, |elements, &side| elements.saturating_mul(side))
}

/// A line of the model's table: a layer, its output, its cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Dotted name of the layer within the model.
    pub name: String,
    /// What it is.
    pub kind: &'static str,
    /// Shape of its output, samples first.
    pub shape: Vec<usize>,
    /// Parameters declared within it.
    pub parameters: usize,
    /// Floating-point operations of its forward.
    pub flops: u64,
}

#[derive(Clone, Copy)]
struct Storage {
    len: usize,
    kept: bool,
}

/// Where a part of a program begins: what emits that part again under the same names, with the same random numbers.
#[derive(Clone, Debug)]
pub(super) struct Place {
    scope: Vec<String>,
    streams: u32,
    padding: Option<Padding>,
}

/// Operations that were emitted again, and the first of the activations and of the whole numbers that they made.
pub(super) struct Again {
    ops: Range<usize>,
    activations: u32,
    indices: u32,
}

/// Takes the operations, memory and parameters that layers ask for, and makes a [`Program`] of them.
pub struct Planner<'a, B: Backend> {
    parameters: &'a mut ParamTable,
    mode: Mode,
    scope: Vec<String>,
    ops: Vec<Box<dyn Op<B>>>,
    forward_ops: usize,
    activations: Vec<Storage>,
    indices: Vec<Storage>,
    declared: HashSet<String>,
    declared_elements: usize,
    graded: HashSet<Param>,
    streams: u32,
    padding: Option<Padding>,
    rows: Vec<Row>,
    recomputing: bool,
    repeated_flops: u64,
    failed: Vec<String>,
}

impl<'a, B: Backend> Planner<'a, B> {
    pub(super) fn new(parameters: &'a mut ParamTable, mode: Mode) -> Self {
        Planner {
            parameters,
            mode,
            scope: Vec::new(),
            ops: Vec::new(),
            forward_ops: 0,
            activations: Vec::new(),
            indices: Vec::new(),
            declared: HashSet::new(),
            declared_elements: 0,
            graded: HashSet::new(),
            streams: 0,
            padding: None,
            rows: Vec::new(),
            recomputing: false,
            repeated_flops: 0,
            failed: Vec::new(),
        }
    }

    /// What the program is for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether dropout is on and batch norm looks at the batch.
    pub fn training(&self) -> bool {
        self.mode == Mode::Training
    }

    /// Whether what is emitted now was emitted before, and is only to be computed again: then what is kept from step to step must
    /// not move a second time.
    pub fn recomputing(&self) -> bool {
        self.recomputing
    }

    /// Where the program stands now, for [`Planner::again`].
    pub(super) fn place(&self) -> Place {
        Place { scope: self.scope.clone(), streams: self.streams, padding: self.padding }
    }

    /// Runs a `plan` that ran before, from `place` on: parameters are those that it declared then, random numbers those that it
    /// drew, and the model's table stays as it is.
    pub(super) fn again<T>(&mut self, place: &Place, plan: impl FnOnce(&mut Self) -> Result<T>) -> Result<Again> {
        let now = self.place();
        let first = self.ops.len();
        let [activations, indices] = [self.activations.len(), self.indices.len()].map(|len| len as u32);
        let recomputed = std::mem::replace(&mut self.recomputing, true);
        self.move_to(place.clone());
        let result = plan(self);
        self.move_to(now);
        self.recomputing = recomputed;
        result.map(|_| Again { ops: first..self.ops.len(), activations, indices })
    }

    fn move_to(&mut self, place: Place) {
        let Place { scope, streams, padding } = place;
        (self.scope, self.streams, self.padding) = (scope, streams, padding);
    }

    /// Takes those of the operations out that made what nothing has come to read: of a forward that was emitted again for its
    /// backward, such as the last sum of a residual block.
    pub(super) fn drop_unread(&mut self, again: Again) {
        let Again { ops: range, activations, indices } = again;
        let before = self.ops.len();
        for at in range.clone().rev() {
            let (mut made, mut moves) = (Vec::new(), false);
            self.ops[at].uses(&mut |used| match used {
                Use::Activation(act) if act.0 >= activations => {
                    made.push((used, self.activations[act.0 as usize].kept))
                }
                Use::Indices(i) if i.0 >= indices => made.push((used, self.indices[i.0 as usize].kept)),
                Use::Gradient(_) | Use::State(_) => moves = true,
                Use::Activation(_) | Use::Indices(_) | Use::Parameter(_) => {}
            });
            let names = |op: &dyn Op<B>, wanted: Use| {
                let mut found = false;
                op.uses(&mut |used| found |= used == wanted);
                found
            };
            let named = |ops: &[Box<dyn Op<B>>], wanted: Use| ops.iter().any(|op| names(op.as_ref(), wanted));
            // What was made by an operation before is read here, or changed.
            made.retain(|&(used, _)| !named(&self.ops[range.start..at], used));
            let read = made.iter().any(|&(used, kept)| kept || named(&self.ops[at + 1..], used));
            if !made.is_empty() && !moves && !read {
                drop(self.ops.remove(at));
            }
        }
        // Within what is itself computed again, that counts it.
        if !self.recomputing {
            let left = self.ops.len() - (before - range.end);
            self.repeated_flops += self.ops[range.start..left].iter().map(|op| op.flops()).sum::<u64>();
        }
    }

    /// Runs `plan` with `name` appended to the dotted names of what is declared within.
    pub fn scoped<T>(&mut self, name: &str, plan: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.scope.push(name.to_owned());
        let result = plan(self);
        if result.is_err() && self.failed.is_empty() {
            self.failed.clone_from(&self.scope);
        }
        self.scope.pop();
        result
    }

    /// The innermost scope of which planning failed.
    pub(super) fn failed(&self) -> &[String] {
        &self.failed
    }

    /// The dotted name of `name` in the present scope; an empty `name` gives the scope's own.
    pub fn path(&self, name: &str) -> String {
        let mut parts: Vec<&str> = self.scope.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
        if !name.is_empty() {
            parts.push(name);
        }
        parts.join(".")
    }

    /// Declares a parameter under the present scope.
    ///
    /// # Errors
    /// A name that this plan declared already, another shape than an earlier plan gave it, or too many elements to count.
    pub fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        let path = self.path(name);
        if !self.declares(&path, "parameter")? {
            return self.parameters.parameter(path, shape, init);
        }
        if elements(shape) > MOST_ELEMENTS {
            let most = format!("a parameter of {MOST_ELEMENTS} values at most");
            return Err(Error::shape("model", most, format!("`{path}` of shape {shape:?}")));
        }
        self.declared_elements += elements(shape);
        self.parameters.parameter(path, shape, init)
    }

    /// Notes a name: whether it is new, not declared again by what is computed again.
    fn declares(&mut self, path: &str, what: &str) -> Result<bool> {
        if self.declared.insert(path.to_owned()) {
            return Ok(true);
        }
        if self.recomputing {
            return Ok(false);
        }
        Err(Error::shape("model", "layer names that differ", format!("{what} `{path}` twice")))
    }

    /// A parameter that this plan declared before, by its whole dotted name, and its shape: for layers that share one.
    ///
    /// # Errors
    /// No layer before has declared it.
    pub fn shared(&self, path: &str) -> Result<(Param, Vec<usize>)> {
        match self.parameters.find(path) {
            Some((param, spec)) if self.declared.contains(path) => Ok((param, spec.shape.clone())),
            _ => Err(Error::shape("model", format!("a layer before that declares `{path}`"), "none")),
        }
    }

    /// Declares a tensor that is kept but not trained, under the present scope, with one value everywhere at first.
    ///
    /// # Errors
    /// A name that this plan declared already, or another shape than an earlier plan gave it.
    pub fn state(&mut self, name: &str, shape: &[usize], value: f64) -> Result<State> {
        let path = self.path(name);
        self.declares(&path, "kept tensor")?;
        self.parameters.state(path, shape, value)
    }

    /// Where the operation emitted next leaves the gradient of `param`: `=` the first time, `+=` after.
    pub fn gradient(&mut self, param: Param) -> Grad {
        Grad { param, first: self.graded.insert(param) }
    }

    /// A new activation of `len` elements. It lives from the first operation that names it to the last.
    pub fn activation(&mut self, len: usize) -> Act {
        self.activations.push(Storage { len, kept: false });
        Act(self.activations.len() as u32 - 1)
    }

    /// A new activation of `len` values of the backend's arithmetic type, whatever the others are stored in: means, sums,
    /// losses. Only what is meant for statistics reads or writes it.
    pub fn statistic(&mut self, len: usize) -> Act {
        self.activation(len.saturating_mul(size_of::<B::Real>()).div_ceil(size_of::<B::Storage>()))
    }

    /// A new activation as a tensor of this shape.
    pub fn tensor(&mut self, shape: &[usize], needs_gradient: bool) -> (Act, Tensor) {
        let act = self.activation(elements(shape));
        (act, Tensor { value: Value::Real(act), shape: shape.to_vec(), needs_gradient })
    }

    /// `len` new whole numbers.
    pub fn indices(&mut self, len: usize) -> Indices {
        self.indices.push(Storage { len, kept: false });
        Indices(self.indices.len() as u32 - 1)
    }

    /// Keeps an activation for the whole program: inputs, and what hosts read afterwards.
    pub fn keep(&mut self, act: Act) {
        self.activations[act.0 as usize].kept = true;
    }

    /// Keeps whole numbers for the whole program.
    pub fn keep_indices(&mut self, indices: Indices) {
        self.indices[indices.0 as usize].kept = true;
    }

    /// A stream of random numbers that no other layer of this program has. The order of layers decides which.
    pub fn stream(&mut self) -> u32 {
        self.streams += 1;
        self.streams - 1
    }

    /// Says that the token `pad` of the program's input stands for nothing.
    pub fn set_padding(&mut self, padding: Padding) {
        self.padding = Some(padding);
    }

    /// Which tokens stand for nothing, where an embedding said so.
    pub fn padding(&self) -> Option<Padding> {
        self.padding
    }

    /// Appends an operation.
    pub fn emit(&mut self, op: impl Op<B> + 'static) {
        self.ops.push(Box::new(op));
    }

    /// Runs `forward` of a layer called `name` and notes a [`Row`] of the model's table for it.
    ///
    /// # Errors
    /// As `forward`; an output of too many elements to count.
    pub fn layer(
        &mut self,
        name: &str,
        kind: &'static str,
        forward: impl FnOnce(&mut Self) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (elements, ops) = (self.declared_elements, self.ops.len());
        let y = self.scoped(name, |planner| {
            let y = forward(planner)?;
            planner.countable(&y.shape)?;
            Ok(y)
        })?;
        if self.recomputing {
            return Ok(y);
        }
        let path = self.scoped(name, |planner| Ok(planner.path("")))?;
        self.rows.push(Row {
            name: path,
            kind,
            shape: y.shape.clone(),
            parameters: self.declared_elements - elements,
            flops: self.ops[ops..].iter().map(|op| op.flops()).sum(),
        });
        Ok(y)
    }

    /// Whether whatever is counted of a tensor of this shape, samples first, fits its whole numbers.
    pub(super) fn countable(&self, shape: &[usize]) -> Result<()> {
        if elements(shape) <= MOST_ELEMENTS {
            return Ok(());
        }
        let (batch, layer) = (shape.first().copied().unwrap_or(0), self.path(""));
        let what = if layer.is_empty() { "inputs".to_owned() } else { format!("the output of {layer}") };
        let problem = format!(
            "found {batch}, of which {what} would be {shape:?}, more than {MOST_ELEMENTS} values; expected fewer"
        );
        Err(Error::config("data.batch_size", problem))
    }

    pub(super) fn input(&mut self, input: &Input, batch: usize) -> Result<Tensor> {
        let shape: Vec<usize> = match input {
            Input::Real(shape) => std::iter::once(batch).chain(shape.iter().copied()).collect(),
            Input::Tokens(time) => vec![batch, *time],
        };
        self.countable(&shape)?;
        Ok(match input {
            Input::Real(_) => {
                let (act, tensor) = self.tensor(&shape, false);
                self.keep(act);
                tensor
            }
            Input::Tokens(_) => {
                let tokens = self.indices(elements(&shape));
                self.keep_indices(tokens);
                Tensor { value: Value::Tokens(tokens), shape, needs_gradient: false }
            }
        })
    }

    pub(super) fn start_backward(&mut self) {
        self.forward_ops = self.ops.len();
    }

    pub(super) fn finish(
        mut self,
        input: Value,
        target: Option<Value>,
        metrics: Option<Act>,
        output: Act,
        output_shape: Vec<usize>,
    ) -> Result<Program<B>> {
        let forward = if self.forward_ops == 0 { self.ops.len() } else { self.forward_ops };
        let emitted = Operations { ops: self.ops, forward, shrunk: Vec::new() };
        let Operations { ops, forward, shrunk } = emitted.fused(|act| self.activations[act.0 as usize].kept);
        for (act, other) in shrunk {
            self.activations[act.0 as usize].len = self.activations[other.0 as usize].len;
        }
        let end = ops.len();
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; self.activations.len()];
        let mut index_lives: Vec<Option<(usize, usize)>> = vec![None; self.indices.len()];
        for (position, op) in ops.iter().enumerate() {
            op.uses(&mut |used| {
                let life = match used {
                    Use::Activation(act) => &mut lives[act.0 as usize],
                    Use::Indices(indices) => &mut index_lives[indices.0 as usize],
                    Use::Parameter(_) | Use::Gradient(_) | Use::State(_) => return,
                };
                *life = Some((life.map_or(position, |(first, _)| first), position));
            });
        }
        let lifetimes = |storage: &[Storage], lives: &[Option<(usize, usize)>]| -> Vec<Lifetime> {
            storage
                .iter()
                .zip(lives)
                .map(|(s, life)| match (s.kept, life) {
                    (true, _) => Lifetime { first: 0, last: end, len: s.len },
                    (false, Some((first, last))) => Lifetime { first: *first, last: *last, len: s.len },
                    (false, None) => Lifetime { first: 0, last: 0, len: 0 },
                })
                .collect()
        };
        let values = lifetimes(&self.activations, &lives);
        let indices = lifetimes(&self.indices, &index_lives);
        let ungraded: Vec<String> = if self.mode == Mode::Training {
            self.parameters
                .specs()
                .enumerate()
                .filter(|(i, _)| !self.graded.contains(&Param(*i as u32)))
                .map(|(_, spec)| spec.name.clone())
                .collect()
        } else {
            Vec::new()
        };
        if !ungraded.is_empty() {
            return Err(Error::shape(
                "model",
                "a gradient for every parameter",
                format!("none for {}", ungraded.join(", ")),
            ));
        }
        Ok(Program {
            ops,
            forward_ops: forward,
            values: MemoryPlan::new(&values),
            value_lifetimes: values,
            indices: MemoryPlan::new(&indices),
            index_lifetimes: indices,
            input,
            target,
            metrics,
            output,
            output_shape,
            rows: self.rows,
            repeated_flops: self.repeated_flops,
        })
    }
}
