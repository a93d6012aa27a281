use crate::backend::op::op;
use crate::backend::{Act, Backend, Grad, Indices, Memory, Param, StepContext};
use crate::error::Result;

/// Tables of vectors, looked up by token and by position.
pub trait Embedding: Sized {
    /// `y[row] = weight[tokens[row]] (+ positions[row mod time])`.
    fn embedding_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &EmbeddingForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// `dweight[t] = sum of dy over the rows of token t`, in the order of the rows; positions likewise.
    fn embedding_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &EmbeddingBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// `y[row] = x[row] + weight[row mod time]`.
    fn position_forward(&self, memory: &mut Memory<'_, Self>, args: &PositionForward, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// `dweight[t] = sum of dy over the rows of position t`.
    fn position_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &PositionBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
}

op! {
    /// Token vectors, and the position's where given.
    EmbeddingForward => embedding_forward {
        /// `[batch, time]`, each below `vocabulary`.
        tokens: Indices,
        /// `[vocabulary, width]`.
        weight: Param,
        /// `[positions >= time, width]`.
        positions: Option<Param>,
        /// `[batch, time, width]`, `=`.
        y: Act,
        /// Samples.
        batch: usize,
        /// Tokens a sample.
        time: usize,
        /// Width of a vector.
        width: usize,
        /// Rows of the table.
        vocabulary: usize,
    }
    flops(a) a.batch * a.time * a.width * usize::from(a.positions.is_some());
    // A row for each token, if they are all different.
    moved { weight: Some((a.batch * a.time).min(a.vocabulary) * a.width), positions: Some(a.time * a.width) }
}

op! {
    /// Gradients of [`EmbeddingForward`]. Rows that no token names become 0 where the write is `=`.
    EmbeddingBackward => embedding_backward {
        /// `[batch, time]`.
        tokens: Indices,
        /// `[batch, time, width]`.
        dy: Act,
        /// `[vocabulary, width]`.
        dweight: Grad,
        /// `[positions, width]`; rows at `time` and beyond become 0 where the write is `=`.
        dpositions: Option<Grad>,
        /// Samples.
        batch: usize,
        /// Tokens a sample.
        time: usize,
        /// Width of a vector.
        width: usize,
        /// Rows of the token table.
        vocabulary: usize,
    }
    flops(a) a.batch * a.time * a.width * (1 + usize::from(a.dpositions.is_some()));
    // Where rows are added to, the batch's alone, read and written.
    moved {
        dweight: (!a.dweight.first).then(|| 2 * (a.batch * a.time).min(a.vocabulary) * a.width),
        dpositions: a.dpositions.filter(|grad| !grad.first).map(|_| 2 * a.time * a.width)
    }
}

op! {
    /// Adds a learned vector for each position.
    PositionForward => position_forward {
        /// `[batch, time, width]`.
        x: Act,
        /// `[positions >= time, width]`.
        weight: Param,
        /// `[batch, time, width]`, `=`.
        y: Act,
        /// Samples.
        batch: usize,
        /// Positions a sample.
        time: usize,
        /// Width of a vector.
        width: usize,
    }
    flops(a) a.batch * a.time * a.width;
    moved { weight: Some(a.time * a.width) }
}

op! {
    /// Gradient of the table of [`PositionForward`] (that of x is dy itself).
    PositionBackward => position_backward {
        /// `[batch, time, width]`.
        dy: Act,
        /// `[positions, width]`; rows at `time` and beyond become 0 where the write is `=`.
        dweight: Grad,
        /// Samples.
        batch: usize,
        /// Positions a sample.
        time: usize,
        /// Width of a vector.
        width: usize,
    }
    flops(a) a.batch * a.time * a.width;
    moved { dweight: (!a.dweight.first).then(|| 2 * a.time * a.width) }
}
