//! A planned program: operations in order, and a place for every activation.

use super::layer::Value;
use super::planner::Row;
use crate::backend::{Act, Activations, Backend, Op};
use crate::error::Result;
use crate::plan::{Lifetime, MemoryPlan};

/// Everything that runs for one batch, planned once for its shape.
pub struct Program<B: Backend> {
    /// The operations: forward, loss, backward.
    pub ops: Vec<Box<dyn Op<B>>>,
    /// How many of them are forward and loss.
    pub forward_ops: usize,
    /// Where each activation lies.
    pub values: MemoryPlan,
    /// When each activation is alive.
    pub value_lifetimes: Vec<Lifetime>,
    /// Where each index tensor lies.
    pub indices: MemoryPlan,
    /// When each index tensor is alive.
    pub index_lifetimes: Vec<Lifetime>,
    /// Where the batch's inputs go.
    pub input: Value,
    /// Where the batch's targets go; none for inference.
    pub target: Option<Value>,
    /// The loss's metrics ([`crate::backend::ops::METRICS`] values); none for inference.
    pub metrics: Option<Act>,
    /// The model's output.
    pub output: Act,
    /// Shape of the output, samples first.
    pub output_shape: Vec<usize>,
    /// The model's table.
    pub rows: Vec<Row>,
}

impl<B: Backend> Program<B> {
    /// Memory for the activations.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn activations(&self, backend: &B) -> Result<Activations<B>> {
        let ranges = |plan: &MemoryPlan, lives: &[Lifetime]| {
            plan.offsets.iter().zip(lives).map(|(&offset, life)| offset..offset + life.len).collect()
        };
        Ok(Activations {
            ranges: ranges(&self.values, &self.value_lifetimes),
            index_ranges: ranges(&self.indices, &self.index_lifetimes),
            values: backend.allocate(self.values.peak)?,
            indices: backend.allocate(self.indices.peak)?,
            recording: B::Recording::default(),
        })
    }

    /// Floating-point operations of one run.
    pub fn flops(&self) -> u64 {
        self.ops.iter().map(|op| op.flops()).sum()
    }

    /// Bytes of activations at `element_bytes` a value, whole numbers included.
    pub fn activation_bytes(&self, element_bytes: usize) -> usize {
        self.values.peak * element_bytes + self.indices.peak * size_of::<i32>()
    }
}
