use crate::backend::op::op;
use crate::backend::{Act, Backend, Indices, Memory, StepContext};
use crate::error::Result;

/// Losses, each with its gradient in the same pass.
///
/// Each leaves four values in `metrics`: the mean loss, the sum of losses, what the sum is over (targets that count, or
/// values), and how many predictions were right. Gradients, not losses, are multiplied by the arena's loss scale, where there is one
/// ([`super::Update::set_loss_scale`]).
pub trait Loss: Sized {
    /// Softmax and cross-entropy, as `torch.nn.functional.cross_entropy`.
    fn cross_entropy(&self, memory: &mut Memory<'_, Self>, args: &CrossEntropy, step: &StepContext) -> Result<()>
    where
        Self: Backend;
    /// Mean of squared differences.
    fn mean_squared_error(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanSquaredError,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
    /// Binary cross-entropy of logits, as `torch.nn.functional.binary_cross_entropy_with_logits`.
    fn binary_cross_entropy(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &BinaryCrossEntropy,
        step: &StepContext,
    ) -> Result<()>
    where
        Self: Backend;
}

/// Number of values that a loss leaves in its metrics.
pub const METRICS: usize = 4;

op! {
    /// `-sum over classes of q log softmax(logits)`, q = 1 at the target mixed with `label_smoothing` of the uniform
    /// distribution; the mean over targets that count. A prediction is right when the first largest logit is the target's.
    CrossEntropy => cross_entropy {
        /// `[rows, classes]`.
        logits: Act,
        /// `[rows]`: below `classes`, or `ignore_index`.
        targets: Indices,
        /// `[METRICS]`, `=`.
        metrics: Act,
        /// `[rows, classes]`: gradient of the mean loss, `=`.
        dlogits: Option<Act>,
        /// Number of rows.
        rows: usize,
        /// Number of classes.
        classes: usize,
        /// In `[0, 1)`.
        label_smoothing: f64,
        /// The target that does not count.
        ignore_index: i32,
    }
    flops(a) 5 * a.rows * a.classes
}

op! {
    /// `mean of (prediction - target)^2`.
    MeanSquaredError => mean_squared_error {
        /// `[len]`.
        prediction: Act,
        /// `[len]`.
        target: Act,
        /// `[METRICS]`, `=`; no prediction counts as right.
        metrics: Act,
        /// `[len]`: gradient of the mean loss, `=`.
        dprediction: Option<Act>,
        /// Number of values.
        len: usize,
    }
    flops(a) 4 * a.len
}

op! {
    /// `mean of -t log sigmoid(x) - (1 - t) log(1 - sigmoid(x))`. Right: the sign of x says whether t is above 1/2.
    BinaryCrossEntropy => binary_cross_entropy {
        /// `[len]`.
        logits: Act,
        /// `[len]`, in `[0, 1]`.
        target: Act,
        /// `[METRICS]`, `=`.
        metrics: Act,
        /// `[len]`: gradient of the mean loss, `=`.
        dlogits: Option<Act>,
        /// Number of values.
        len: usize,
    }
    flops(a) 8 * a.len
}
