//! Normalization: over the batch, over a row, and by a row's root mean square.

use super::planned;
use crate::backend::ops::{
    BatchNormBackward, BatchNormForward, BatchNormInference, Epilogue, LayerNormBackward, LayerNormForward,
    RmsNormBackward, RmsNormForward,
};
use crate::backend::{Act, Backend, Param};
use crate::error::{Error, Result};
use crate::model::{Init, Layer, Planner, Tensor};

/// `torch.nn.BatchNorm1d` and `BatchNorm2d`: `[batch, channels]` or `[batch, channels, ..]`, normalized channel by channel.
///
/// Parameters `weight` (1 at first, unless told otherwise) and `bias` (0); kept `running_mean` (0) and `running_var` (1).
#[derive(Debug)]
pub struct BatchNorm {
    epsilon: f64,
    momentum: f64,
    weight_init: f64,
    saved: Option<SavedBatch>,
}

#[derive(Clone, Debug)]
struct SavedBatch {
    x: Act,
    shape: Vec<usize>,
    needs_gradient: bool,
    weight: Param,
    bias: Param,
    mean: Act,
    reciprocal_std: Act,
}

impl Default for BatchNorm {
    fn default() -> Self {
        BatchNorm { epsilon: 1e-5, momentum: 0.1, weight_init: 1.0, saved: None }
    }
}

impl BatchNorm {
    /// With PyTorch's epsilon of 1e-5 and momentum of 0.1.
    pub fn new() -> Self {
        Self::default()
    }

    /// With other constants: `epsilon` is added to the variance, `momentum` is the batch's share in running statistics.
    #[must_use]
    pub fn with_constants(mut self, epsilon: f64, momentum: f64) -> Self {
        (self.epsilon, self.momentum) = (epsilon, momentum);
        self
    }

    /// With weights that are 0 at first, so that a residual branch starts as nothing (Goyal et al. 2017).
    #[must_use]
    pub fn with_zero_weight(mut self) -> Self {
        self.weight_init = 0.0;
        self
    }
}

/// What batch norm takes, where it is given less.
pub(in crate::model) const TOO_FEW: &str = "at least 2 values a channel in training";

/// Checks what is added to a variance or a mean of squares: with less, a norm of what is constant is no number.
fn check_epsilon(epsilon: f64, layer: &str) -> Result<()> {
    if epsilon > 0.0 && epsilon.is_finite() {
        return Ok(());
    }
    Err(Error::shape(layer, "an epsilon above 0", epsilon.to_string()))
}

fn batch_dimensions(shape: &[usize]) -> Result<[usize; 3]> {
    match shape {
        [batch, channels, rest @ ..] => Ok([*batch, *channels, rest.iter().product()]),
        _ => Err(Error::shape("batch_norm", "[batch, channels, ..]", format!("{shape:?}"))),
    }
}

impl<B: Backend> Layer<B> for BatchNorm {
    fn kind(&self) -> &'static str {
        "batch_norm"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        check_epsilon(self.epsilon, "batch_norm")?;
        if !(0.0..=1.0).contains(&self.momentum) {
            return Err(Error::shape("batch_norm", "a momentum from 0 to 1", self.momentum.to_string()));
        }
        let [batch, channels, spatial] = batch_dimensions(&x.shape)?;
        if planner.training() && batch * spatial < 2 {
            return Err(Error::shape("batch_norm", TOO_FEW, format!("{:?}", x.shape)));
        }
        let weight = planner.parameter("weight", &[channels], Init::Constant(self.weight_init))?;
        let bias = planner.parameter("bias", &[channels], Init::Constant(0.0))?;
        let running_mean = planner.state("running_mean", &[channels], 0.0)?;
        let running_var = planner.state("running_var", &[channels], 1.0)?;
        let (y, output) = planner.tensor(&x.shape, true);
        let act = x.real("batch_norm")?;
        let epsilon = self.epsilon;
        if planner.training() {
            let (mean, reciprocal_std) = (planner.statistic(channels), planner.statistic(channels));
            // Running statistics have seen a batch that is recomputed.
            let momentum = if planner.recomputing() { 0.0 } else { self.momentum };
            planner.emit(BatchNormForward {
                x: act,
                weight,
                bias,
                running_mean,
                running_var,
                y,
                epilogue: Epilogue::default(),
                mean,
                reciprocal_std,
                batch,
                channels,
                spatial,
                epsilon,
                momentum,
            });
            let (shape, needs_gradient) = (x.shape, x.needs_gradient);
            self.saved = Some(SavedBatch { x: act, shape, needs_gradient, weight, bias, mean, reciprocal_std });
        } else {
            planner.emit(BatchNormInference {
                x: act,
                weight,
                bias,
                running_mean,
                running_var,
                y,
                epilogue: Epilogue::default(),
                batch,
                channels,
                spatial,
                epsilon,
            });
        }
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let saved = planned(self.saved.take(), "batch_norm")?;
        let [batch, channels, spatial] = batch_dimensions(&saved.shape)?;
        let dx = saved.needs_gradient.then(|| planner.tensor(&saved.shape, true));
        let (dweight, dbias) = (planner.gradient(saved.weight), planner.gradient(saved.bias));
        planner.emit(BatchNormBackward {
            x: saved.x,
            dy: dy.real("batch_norm")?,
            rectified: None,
            weight: saved.weight,
            bias: saved.bias,
            mean: saved.mean,
            reciprocal_std: saved.reciprocal_std,
            dx: dx.as_ref().map(|(act, _)| *act),
            dweight,
            dbias,
            batch,
            channels,
            spatial,
        });
        Ok(dx.map(|(_, tensor)| tensor))
    }
}

#[derive(Clone, Copy, Debug)]
struct SavedRows {
    x: Act,
    needs_gradient: bool,
    weight: Param,
    bias: Option<Param>,
    statistics: [Act; 2],
}

/// `torch.nn.LayerNorm` over the last dimension. Parameters `weight` (1 at first) and `bias` (0).
#[derive(Debug)]
pub struct LayerNorm {
    epsilon: f64,
    bias: bool,
    saved: Option<SavedRows>,
}

impl LayerNorm {
    /// With a bias, and `epsilon` added to the variance.
    pub fn new(epsilon: f64) -> Self {
        LayerNorm { epsilon, bias: true, saved: None }
    }

    /// Without a bias.
    #[must_use]
    pub fn without_bias(mut self) -> Self {
        self.bias = false;
        self
    }
}

impl<B: Backend> Layer<B> for LayerNorm {
    fn kind(&self) -> &'static str {
        "layer_norm"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        check_epsilon(self.epsilon, "layer_norm")?;
        let (rows, width) = (x.rows(), x.width());
        let weight = planner.parameter("weight", &[width], Init::Constant(1.0))?;
        let bias = if self.bias { Some(planner.parameter("bias", &[width], Init::Constant(0.0))?) } else { None };
        let (y, output) = planner.tensor(&x.shape, true);
        let (mean, reciprocal_std) = (planner.statistic(rows), planner.statistic(rows));
        let act = x.real("layer_norm")?;
        let epsilon = self.epsilon;
        planner.emit(LayerNormForward {
            x: act,
            sum: None,
            weight,
            bias,
            y,
            mean,
            reciprocal_std,
            rows,
            width,
            epsilon,
        });
        let statistics = [mean, reciprocal_std];
        self.saved = Some(SavedRows { x: act, needs_gradient: x.needs_gradient, weight, bias, statistics });
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let saved = planned(self.saved.take(), "layer_norm")?;
        let dx = saved.needs_gradient.then(|| planner.tensor(&dy.shape, true));
        let dweight = planner.gradient(saved.weight);
        let dbias = saved.bias.map(|bias| planner.gradient(bias));
        planner.emit(LayerNormBackward {
            x: saved.x,
            dy: dy.real("layer_norm")?,
            weight: saved.weight,
            mean: saved.statistics[0],
            reciprocal_std: saved.statistics[1],
            residual: None,
            dx: dx.as_ref().map(|(act, _)| *act),
            dweight,
            dbias,
            rows: dy.rows(),
            width: dy.width(),
        });
        Ok(dx.map(|(_, tensor)| tensor))
    }
}

/// `torch.nn.RMSNorm` over the last dimension. Parameter `weight` (1 at first).
#[derive(Debug)]
pub struct RmsNorm {
    epsilon: f64,
    saved: Option<(Act, bool, Param, Act)>,
}

impl RmsNorm {
    /// With `epsilon` added to the mean of squares.
    pub fn new(epsilon: f64) -> Self {
        RmsNorm { epsilon, saved: None }
    }
}

impl<B: Backend> Layer<B> for RmsNorm {
    fn kind(&self) -> &'static str {
        "rms_norm"
    }

    fn forward(&mut self, planner: &mut Planner<'_, B>, x: Tensor) -> Result<Tensor> {
        check_epsilon(self.epsilon, "rms_norm")?;
        let (rows, width) = (x.rows(), x.width());
        let weight = planner.parameter("weight", &[width], Init::Constant(1.0))?;
        let (y, output) = planner.tensor(&x.shape, true);
        let reciprocal_rms = planner.statistic(rows);
        let act = x.real("rms_norm")?;
        let epsilon = self.epsilon;
        planner.emit(RmsNormForward { x: act, sum: None, weight, y, reciprocal_rms, rows, width, epsilon });
        self.saved = Some((act, x.needs_gradient, weight, reciprocal_rms));
        Ok(output)
    }

    fn backward(&mut self, planner: &mut Planner<'_, B>, dy: Tensor) -> Result<Option<Tensor>> {
        let (x, needs_gradient, weight, reciprocal_rms) = planned(self.saved.take(), "rms_norm")?;
        let dx = needs_gradient.then(|| planner.tensor(&dy.shape, true));
        let dweight = planner.gradient(weight);
        planner.emit(RmsNormBackward {
            x,
            dy: dy.real("rms_norm")?,
            weight,
            reciprocal_rms,
            residual: None,
            dx: dx.as_ref().map(|(act, _)| *act),
            dweight,
            rows: dy.rows(),
            width: dy.width(),
        });
        Ok(dx.map(|(_, tensor)| tensor))
    }
}
