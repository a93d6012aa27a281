//! Log-mel pictures that a model makes of its waveforms, within the step.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Affine;
use super::dataset::{RealTable, Values};
use super::normalize;
use super::options::Normalize;
use crate::error::{Error, Result};
use crate::log_mel::{self, LogMel, LogMelOptions};

/// What a model has to know to make the pictures that `data.features = "log_mel"` gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pictures {
    /// Hz.
    pub sample_rate: u32,
    /// Samples of a waveform.
    pub samples: usize,
    /// Window, step and bands.
    pub log_mel: LogMelOptions,
    /// Normalization of the pictures, one scale and one shift.
    pub affine: Affine,
}

impl Pictures {
    /// The transform.
    ///
    /// # Errors
    /// As [`LogMel::new`].
    pub fn transform(&self) -> Result<LogMel> {
        LogMel::new(&self.log_mel, self.sample_rate, self.samples)
    }

    /// The scale and the shift.
    ///
    /// # Errors
    /// More of them than pictures have channels.
    pub fn normalization(&self) -> Result<[f32; 2]> {
        match (&self.affine.scale[..], &self.affine.shift[..]) {
            (&[scale], &[shift]) => Ok([scale as f32, shift as f32]),
            (scales, shifts) => Err(Error::data(
                "preprocess",
                format!("found {} scales and {} shifts of pictures, expected 1", scales.len(), shifts.len()),
            )),
        }
    }
}

/// Pictures that are asked for: their options and the sample rate of the recordings.
pub(crate) struct Asked {
    pub sample_rate: u32,
    pub log_mel: LogMelOptions,
}

impl Asked {
    /// The pictures of `waves: [samples]` with the normalization that `how` asks for: what pictures that were made while data is
    /// read are given. `train` names the waveforms that are measured.
    pub fn measured(self, waves: &RealTable, how: &Normalize, train: &[u32], place: &Path) -> Result<Pictures> {
        let samples = waves.elements();
        let transform = LogMel::new(&self.log_mel, self.sample_rate, samples)?;
        let [mels, frames] = transform.shape();
        let measured: &[u32] = if *how == Normalize::Dataset { train } else { &[] };
        let mut values = super::format::room::<f32>(place, measured.len(), mels * frames)?;
        let pictures = measured.par_iter().zip(values.par_chunks_mut(mels * frames));
        pictures.try_for_each_init(
            || vec![0.0; samples],
            |wave, (index, picture)| {
                waves.raw(*index as usize, wave)?;
                transform.apply(wave, picture)
            },
        )?;
        let table = RealTable {
            shape: vec![1, mels, frames],
            channels: 1,
            full_scale: 1.0,
            background: log_mel::silence(),
            values: Values::Floats(values),
        };
        let numbers: Vec<u32> = (0..measured.len() as u32).collect();
        let affine = normalize::affine(how, &table, &numbers, place)?;
        Ok(Pictures { sample_rate: self.sample_rate, samples, log_mel: self.log_mel, affine })
    }
}
