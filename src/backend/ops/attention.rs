use crate::backend::op::{op, plain_operand};
use crate::backend::{Act, Backend, Indices, Memory, StepContext};
use crate::error::Result;

/// Scaled dot-product attention (Vaswani et al. 2017) and rotary positions (Su et al. 2021).
pub trait Attention: Sized {
    /// `y = softmax(q k^T / sqrt(head size)) v`, head by head.
    fn attention_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AttentionForward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Gradients of [`AttentionForward`]; the probabilities are computed again, not stored.
    fn attention_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AttentionBackward,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Turns pairs of values by an angle that grows with the position, in place.
    fn rotary(&self, memory: &mut Memory<'_, Self>, args: &Rotary, step: &StepContext) -> Result<()>
    where
        Self: Backend;
}

/// Sizes of an attention. A row of `qkv` holds `heads` queries, then `kv_heads` keys, then `kv_heads` values, each of
/// `head_size`; query head `h` uses key head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionGeometry {
    /// Samples.
    pub batch: usize,
    /// Positions a sample.
    pub time: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_size: usize,
    /// Whether a position sees itself and earlier ones only.
    pub causal: bool,
}

impl AttentionGeometry {
    /// Width of a row of `qkv`.
    pub fn packed_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    /// Width of a row of `y`.
    pub fn width(&self) -> usize {
        self.heads * self.head_size
    }

    fn product_flops(&self) -> usize {
        let full = 2 * self.batch * self.heads * self.time * self.time * self.head_size;
        if self.causal { full / 2 } else { full }
    }
}

/// Dropout of attention probabilities: each is 0 with probability `probability`, the others are scaled up.
///
/// The word that decides on probability `[b, h, i, j]` of a run's micro-batch m stands in stream `stream` of
/// [`Purpose::Dropout`](crate::random::Purpose::Dropout) at position `m 2^40 + ((b heads + h) time + i) time + j`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDropout {
    /// In `[0, 1)`.
    pub probability: f64,
    /// The layer's own stream.
    pub stream: u32,
}

/// Tokens that are padding: nothing attends to them. A row that sees nothing else gives 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// `[batch, time]`.
    pub tokens: Indices,
    /// The token that stands for nothing.
    pub pad: i32,
}

impl crate::backend::op::Operand for Padding {
    fn uses(&self, visit: &mut dyn FnMut(crate::backend::Use)) {
        visit(crate::backend::Use::Indices(self.tokens));
    }
}

plain_operand!(AttentionGeometry, Option<AttentionDropout>);

op! {
    /// Attention over packed queries, keys and values.
    AttentionForward => attention_forward {
        /// `[batch, time, (heads + 2 kv_heads) head_size]`.
        qkv: Act,
        /// `[batch, time, heads head_size]`, `=`.
        y: Act,
        /// `[batch, heads, time]`: logarithm of the sum of the exponentials of the scaled scores, `=`.
        log_sum_exp: Act,
        /// Sizes.
        geometry: AttentionGeometry,
        /// Dropout of probabilities.
        dropout: Option<AttentionDropout>,
        /// Keys that are not seen.
        padding: Option<Padding>,
    }
    flops(a) 2 * a.geometry.product_flops()
}

op! {
    /// Gradients of [`AttentionForward`].
    AttentionBackward => attention_backward {
        /// `[batch, time, (heads + 2 kv_heads) head_size]`.
        qkv: Act,
        /// `[batch, time, heads head_size]`.
        y: Act,
        /// `[batch, time, heads head_size]`.
        dy: Act,
        /// `[batch, heads, time]`.
        log_sum_exp: Act,
        /// As qkv, `=`.
        dqkv: Act,
        /// Sizes.
        geometry: AttentionGeometry,
        /// Dropout of probabilities.
        dropout: Option<AttentionDropout>,
        /// Keys that are not seen.
        padding: Option<Padding>,
    }
    flops(a) 5 * a.geometry.product_flops();
    // The scores.
    repeated a.geometry.product_flops()
}

op! {
    /// Rotary positions, in place, on the first `heads` heads of each row. Pair `i` of a head turns by
    /// `position * base^(-2 i / head_size)`; a pair is `(i, i + head_size / 2)`, or `(2 i, 2 i + 1)` when interleaved.
    Rotary => rotary {
        /// `[batch, time, row_width]`.
        x: Act,
        /// Samples.
        batch: usize,
        /// Positions a sample.
        time: usize,
        /// Width of a row; at least `heads * head_size`.
        row_width: usize,
        /// Heads to turn, from the start of each row.
        heads: usize,
        /// Width of a head, even.
        head_size: usize,
        /// 10,000 in the paper.
        base: f64,
        /// Which values make a pair.
        interleaved: bool,
        /// Turns back: the gradient.
        inverse: bool,
    }
    flops(a) 3 * a.batch * a.time * a.heads * a.head_size;
    // The heads that turn, read and written.
    moved { x: Some(2 * a.batch * a.time * a.heads * a.head_size) }
}
