//! Gradients in the order in which the backward finishes them, cut into ranges that are summed over processes one by one.

use std::ops::Range;

use crate::backend::{Backend, Op, Use};
use crate::error::{Error, Result};
use crate::plan::ParamLayout;

/// A range of the arena's gradients, and when it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The operation that is the last to write into it.
    pub after: usize,
    /// Its elements, padding between tensors included.
    pub elements: Range<usize>,
}

/// The buckets of a program: whole tensors, at least `elements` long but for the last. The arena is laid out in the order that the
/// backward finishes it, so that a bucket is a range, and buckets are complete in their order.
///
/// `ranges`: the elements of each parameter, in the order of declaration.
///
/// # Errors
/// A program that writes the gradient of a parameter that the layout does not have.
pub fn buckets<B: Backend>(
    program: &[Box<dyn Op<B>>],
    ranges: &[Range<usize>],
    layout: &ParamLayout,
    elements: usize,
) -> Result<Vec<Bucket>> {
    let mut last_write = vec![0; layout.entries().len()];
    for (number, op) in program.iter().enumerate() {
        let mut unknown = None;
        op.uses(&mut |used| {
            let Use::Gradient(grad) = used else { return };
            let start = ranges.get(grad.param.0 as usize).map(|range| range.start);
            match layout.entries().iter().position(|entry| Some(entry.offset) == start) {
                Some(tensor) => last_write[tensor] = number,
                None => unknown = Some(grad.param),
            }
        });
        if let Some(param) = unknown {
            return Err(Error::shape("buckets", "gradients of the layout's tensors", format!("{param:?}")));
        }
    }
    let ends = layout.entries().iter().skip(1).map(|entry| entry.offset).chain([layout.padded_len()]);
    let mut buckets: Vec<Bucket> = Vec::new();
    let (mut start, mut after) = (0, 0);
    for (end, &written) in ends.zip(&last_write) {
        after = after.max(written);
        if end - start >= elements || end == layout.padded_len() {
            buckets.push(Bucket { after, elements: start..end });
            start = end;
        }
    }
    Ok(buckets)
}
