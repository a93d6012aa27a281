//! Normalization: one scale and one shift a channel.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::dataset::RealTable;
use super::options::Normalize;
use crate::error::{Error, Result};

/// `y = x * scale + shift`, a channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Affine {
    /// `[channels]`.
    pub scale: Vec<f32>,
    /// `[channels]`.
    pub shift: Vec<f32>,
}

impl Affine {
    /// The same scale for every channel, and no shift.
    pub fn uniform(channels: usize, scale: f32) -> Self {
        Affine { scale: vec![scale; channels], shift: vec![0.0; channels] }
    }

    /// Normalizes one sample in place (`=`). `values: [channels, ..]`.
    pub fn apply(&self, values: &mut [f32]) {
        let plane = (values.len() / self.scale.len().max(1)).max(1);
        for ((values, scale), shift) in values.chunks_mut(plane).zip(&self.scale).zip(&self.shift) {
            for value in values {
                *value = *value * scale + shift;
            }
        }
    }
}

/// The normalization that `how` asks for; `train` names the samples that are measured for [`Normalize::Dataset`].
pub(crate) fn affine(how: &Normalize, table: &RealTable, train: &[u32], place: &Path) -> Result<Affine> {
    let channels = table.channels;
    let unit = 1.0 / table.full_scale;
    let (mean, std) = match how {
        Normalize::None => return Ok(Affine::uniform(channels, 1.0)),
        Normalize::Unit => return Ok(Affine::uniform(channels, unit)),
        Normalize::Dataset => measure(table, train, unit)?,
        Normalize::Given { mean, std } => (widen("mean", mean, channels)?, widen("std", std, channels)?),
    };
    let mut result = Affine { scale: Vec::with_capacity(channels), shift: Vec::with_capacity(channels) };
    for (channel, (mean, std)) in mean.into_iter().zip(std).enumerate() {
        let finite = mean.is_finite() && std.is_finite();
        let measured = *how == Normalize::Dataset;
        if finite && std > 0.0 {
            result.scale.push((f64::from(unit) / std) as f32);
            result.shift.push((-mean / std) as f32);
        } else if finite && measured {
            // A channel that never changes tells nothing: it becomes 0.
            result.scale.push(unit);
            result.shift.push(-mean as f32);
        } else if measured {
            return Err(Error::data(place, format!("channel {channel} has mean {mean} and deviation {std}")));
        } else {
            return Err(Error::config(
                "data.normalize",
                format!(
                    "found mean {mean} and std {std} for channel {channel}, expected finite numbers and std above 0"
                ),
            ));
        }
    }
    Ok(result)
}

fn widen(what: &str, values: &[f32], channels: usize) -> Result<Vec<f64>> {
    match values.len() {
        1 => Ok(vec![f64::from(values[0]); channels]),
        n if n == channels => Ok(values.iter().map(|v| f64::from(*v)).collect()),
        n => Err(Error::config(
            "data.normalize",
            format!("found {n} values of {what}, expected 1, or {channels}: one a channel"),
        )),
    }
}

/// Mean and standard deviation (over the number of values) of each channel, after division by the full scale, in two
/// passes of f64.
fn measure(table: &RealTable, train: &[u32], unit: f32) -> Result<(Vec<f64>, Vec<f64>)> {
    let channels = table.channels;
    let plane = table.elements() / channels;
    let count = (train.len() * plane).max(1) as f64;
    let mut sample = vec![0.0; table.elements()];
    let mut mean = vec![0.0f64; channels];
    for i in train {
        table.raw(*i as usize, &mut sample)?;
        for (sum, values) in mean.iter_mut().zip(sample.chunks(plane)) {
            *sum += values.iter().map(|v| f64::from(*v)).sum::<f64>();
        }
    }
    mean.iter_mut().for_each(|m| *m /= count);
    let mut variance = vec![0.0f64; channels];
    for i in train {
        table.raw(*i as usize, &mut sample)?;
        for ((sum, values), mean) in variance.iter_mut().zip(sample.chunks(plane)).zip(&mean) {
            *sum += values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>();
        }
    }
    let unit = f64::from(unit);
    let std = variance.into_iter().map(|v| (v / count).sqrt() * unit).collect();
    Ok((mean.into_iter().map(|m| m * unit).collect(), std))
}
