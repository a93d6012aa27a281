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
    pub scale: Vec<f64>,
    /// `[channels]`.
    pub shift: Vec<f64>,
}

impl Affine {
    /// The same scale for every channel, and no shift.
    pub fn uniform(channels: usize, scale: f64) -> Self {
        Affine { scale: vec![scale; channels], shift: vec![0.0; channels] }
    }

    /// Normalizes one sample in place (`=`), in f32. `values: [channels, ..]`.
    pub fn apply(&self, values: &mut [f32]) {
        let plane = self.plane(values.len());
        for ((values, scale), shift) in values.chunks_mut(plane).zip(&self.scale).zip(&self.shift) {
            let (scale, shift) = (*scale as f32, *shift as f32);
            for value in values {
                *value = *value * scale + shift;
            }
        }
    }

    /// One sample, normalized in f64 and then rounded, so that no offset takes the digits of a number. `values: [channels, ..]`.
    ///
    /// # Errors
    /// The first of the values that is no finite f32 then.
    pub fn rounded(&self, values: &[f64]) -> Result<Vec<f32>, f64> {
        let plane = self.plane(values.len());
        let mut result = Vec::with_capacity(values.len());
        for ((values, scale), shift) in values.chunks(plane).zip(&self.scale).zip(&self.shift) {
            for value in values {
                let normalized = (value * scale + shift) as f32;
                if !normalized.is_finite() {
                    return Err(*value);
                }
                result.push(normalized);
            }
        }
        Ok(result)
    }

    /// Values of one channel among `elements` of a sample.
    fn plane(&self, elements: usize) -> usize {
        (elements / self.scale.len().max(1)).max(1)
    }
}

/// The normalization that `how` asks for; `train` names the samples that are measured for [`Normalize::Dataset`].
pub(crate) fn affine(how: &Normalize, table: &RealTable, train: &[u32], place: &Path) -> Result<Affine> {
    let channels = table.channels;
    let unit = f64::from(1.0 / table.full_scale);
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
        let (scale, shift) = (unit / std, -mean / std);
        if finite && std > 0.0 && (scale as f32).is_finite() && (shift as f32).is_finite() {
            result.scale.push(scale);
            result.shift.push(shift);
        } else if finite && measured {
            // A channel that never changes, or by less than its scale can be told, tells nothing: it becomes 0.
            result.scale.push(unit);
            result.shift.push(-mean);
        } else if measured {
            return Err(Error::data(place, format!("channel {channel} has mean {mean} and deviation {std}")));
        } else {
            return Err(Error::config(
                "data.normalize",
                format!(
                    "found mean {mean} and std {std} for channel {channel}, expected finite numbers, std above 0, and mean and 1 \
                     over std within the range of f32"
                ),
            ));
        }
    }
    Ok(result)
}

fn widen(what: &str, values: &[f64], channels: usize) -> Result<Vec<f64>> {
    match values.len() {
        1 => Ok(vec![values[0]; channels]),
        n if n == channels => Ok(values.to_vec()),
        n => Err(Error::config(
            "data.normalize",
            format!("found {n} values of {what}, expected 1, or {channels}: one a channel"),
        )),
    }
}

/// Mean and standard deviation (over the number of values) of each channel, after division by the full scale, in two
/// passes of f64 over what values are more than the first one, so that an offset takes no digits and a constant is exact.
fn measure(table: &RealTable, train: &[u32], unit: f64) -> Result<(Vec<f64>, Vec<f64>)> {
    let channels = table.channels;
    let plane = table.elements() / channels;
    let count = (train.len() * plane).max(1) as f64;
    let mut sample = vec![0.0; table.elements()];
    if let Some(first) = train.first() {
        table.wide(*first as usize, &mut sample)?;
    }
    let offsets: Vec<f64> = sample.chunks(plane).map(|values| values[0]).collect();
    let mut mean = vec![0.0f64; channels];
    for i in train {
        table.wide(*i as usize, &mut sample)?;
        for ((sum, values), offset) in mean.iter_mut().zip(sample.chunks(plane)).zip(&offsets) {
            *sum += values.iter().map(|v| v - offset).sum::<f64>();
        }
    }
    mean.iter_mut().for_each(|m| *m /= count);
    let mut variance = vec![0.0f64; channels];
    for i in train {
        table.wide(*i as usize, &mut sample)?;
        for (((sum, values), mean), offset) in variance.iter_mut().zip(sample.chunks(plane)).zip(&mean).zip(&offsets) {
            *sum += values.iter().map(|v| (v - offset - mean).powi(2)).sum::<f64>();
        }
    }
    let std = variance.into_iter().map(|v| (v / count).sqrt() * unit).collect();
    Ok((mean.into_iter().zip(offsets).map(|(mean, offset)| (offset + mean) * unit).collect(), std))
}
