//! Log-mel pictures of sound: the transform itself, that data is read through and that backends have as an operation.
//!
//! The waveform is padded by reflection with half a window on each side and cut into windows of `n_fft` samples, `hop`
//! apart. Each is weighted by a periodic Hann window and transformed; the squared magnitudes are summed under triangles
//! spaced evenly on a mel scale, and the natural logarithm of the sum plus 1e-6 is taken. This is what torchaudio's
//! `MelSpectrogram` computes with its own defaults (`htk`) and librosa's with its own (`slaney`).

use std::sync::Arc;

use realfft::{RealFftPlanner, RealToComplex};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// `data.mel.scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MelScale {
    /// `htk`: `2595 log10(1 + f / 700)`, triangles of height 1.
    Htk,
    /// `slaney`: linear below 1 kHz and logarithmic above, triangles of area 1 (Slaney's Auditory Toolbox).
    Slaney,
}

/// Keys of `data.mel`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogMelOptions {
    /// `data.mel.n_fft`: samples of a window (default: the first power of two that is 25 ms or more).
    pub n_fft: Option<usize>,
    /// `data.mel.hop`: samples from one window to the next (default: 10 ms).
    pub hop: Option<usize>,
    /// `data.mel.mels`: bands (default 40).
    pub mels: usize,
    /// `data.mel.scale` (default `htk`).
    pub scale: MelScale,
    /// `data.mel.min_hz`: where the lowest band starts (default 0).
    pub min_hz: f64,
    /// `data.mel.max_hz`: where the highest band ends (default: half the sample rate).
    pub max_hz: Option<f64>,
}

impl Default for LogMelOptions {
    fn default() -> Self {
        LogMelOptions { n_fft: None, hop: None, mels: 40, scale: MelScale::Htk, min_hz: 0.0, max_hz: None }
    }
}

/// Added to every band before the logarithm.
const FLOOR: f32 = 1e-6;

/// The feature of silence.
pub(crate) fn silence() -> f32 {
    FLOOR.ln()
}

/// The transform of waveforms of one length and sample rate.
#[derive(Clone)]
pub struct LogMel {
    n_fft: usize,
    hop: usize,
    samples: usize,
    window: Vec<f32>,
    /// For each band: its first frequency bin, and the weights from there.
    bands: Vec<(usize, Vec<f32>)>,
    transform: Arc<dyn RealToComplex<f32>>,
}

impl std::fmt::Debug for LogMel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let LogMel { n_fft, hop, samples, .. } = self;
        write!(f, "LogMel({samples} samples in {n_fft}, {hop} apart, {} bands)", self.bands.len())
    }
}

impl PartialEq for LogMel {
    /// Window and transform follow from `n_fft`.
    fn eq(&self, other: &Self) -> bool {
        let sizes = |t: &Self| (t.n_fft, t.hop, t.samples);
        sizes(self) == sizes(other) && self.bands == other.bands
    }
}

impl LogMel {
    /// The transform of `[samples]` at `sample_rate` Hz.
    ///
    /// # Errors
    /// Options that do not fit the sample rate or the length.
    pub fn new(options: &LogMelOptions, sample_rate: u32, samples: usize) -> Result<Self> {
        let wrong = |key: &str, found: String, expected: String| {
            Err(Error::config(format!("data.mel.{key}"), format!("found {found}, expected {expected}")))
        };
        let rate = f64::from(sample_rate);
        let n_fft = options.n_fft.unwrap_or_else(|| ((rate * 0.025).ceil() as usize).next_power_of_two());
        let hop = options.hop.unwrap_or_else(|| ((rate * 0.01).round() as usize).max(1));
        let max_hz = options.max_hz.unwrap_or(rate / 2.0);
        if !(4..=1 << 20).contains(&n_fft) || !n_fft.is_multiple_of(2) {
            return wrong("n_fft", n_fft.to_string(), "an even number from 4 to 1048576".into());
        }
        if n_fft / 2 >= samples {
            return wrong("n_fft", n_fft.to_string(), format!("less than twice the {samples} samples of a recording"));
        }
        if hop == 0 || hop > samples {
            return wrong("hop", hop.to_string(), format!("1 to {samples}, the samples of a recording"));
        }
        if options.mels == 0 || options.mels > n_fft {
            return wrong("mels", options.mels.to_string(), format!("1 to {n_fft}"));
        }
        if !(options.min_hz >= 0.0 && options.min_hz < max_hz && max_hz <= rate / 2.0) {
            return wrong(
                "min_hz",
                format!("a range from {} to {max_hz} Hz", options.min_hz),
                format!("one within 0 to {} Hz, half the sample rate", rate / 2.0),
            );
        }
        let bands = bands(options, rate, n_fft, max_hz);
        if let Some(band) = bands.iter().position(|(_, weights)| weights.is_empty()) {
            return wrong(
                "mels",
                options.mels.to_string(),
                format!("fewer, or a larger n_fft: band {band} lies between two frequencies of a window of {n_fft}"),
            );
        }
        let turn = std::f64::consts::TAU / n_fft as f64;
        let window = (0..n_fft).map(|i| (0.5 - 0.5 * (turn * i as f64).cos()) as f32).collect();
        let transform = RealFftPlanner::<f32>::new().plan_fft_forward(n_fft);
        Ok(LogMel { n_fft, hop, samples, window, bands, transform })
    }

    /// `[mels, frames]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.bands.len(), 1 + self.samples / self.hop]
    }

    /// Samples of a waveform.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Samples of a window.
    pub fn n_fft(&self) -> usize {
        self.n_fft
    }

    /// Samples from one window to the next.
    pub fn hop(&self) -> usize {
        self.hop
    }

    /// The window, `[n_fft]`.
    pub fn window(&self) -> &[f32] {
        &self.window
    }

    /// For each band: its first frequency bin, and the weights from there.
    pub fn bands(&self) -> &[(usize, Vec<f32>)] {
        &self.bands
    }

    /// Floating-point operations of one waveform, those of the transform as 2.5 n log2 n.
    pub fn flops(&self) -> usize {
        let n = self.n_fft;
        let weights: usize = self.bands.iter().map(|(_, weights)| weights.len()).sum();
        (1 + self.samples / self.hop) * (5 * n * n.ilog2() as usize / 2 + 5 * n + 2 * weights)
    }

    /// Writes the picture (`=`). `wave: [samples]`, `out: [mels, frames]`.
    ///
    /// # Errors
    /// Lengths that do not fit.
    pub fn apply(&self, wave: &[f32], out: &mut [f32]) -> Result<()> {
        let [mels, frames] = self.shape();
        if wave.len() != self.samples || out.len() != mels * frames {
            return Err(Error::shape(
                "log_mel",
                format!("{} samples into {} values", self.samples, mels * frames),
                format!("{} into {}", wave.len(), out.len()),
            ));
        }
        let half = self.n_fft / 2;
        let mut padded = Vec::with_capacity(wave.len() + self.n_fft);
        padded.extend(wave[1..=half].iter().rev());
        padded.extend_from_slice(wave);
        padded.extend(wave[wave.len() - 1 - half..wave.len() - 1].iter().rev());
        let mut input = self.transform.make_input_vec();
        let mut spectrum = self.transform.make_output_vec();
        let mut scratch = self.transform.make_scratch_vec();
        let mut power = vec![0.0f32; spectrum.len()];
        for frame in 0..frames {
            let samples = &padded[frame * self.hop..][..self.n_fft];
            for ((input, sample), weight) in input.iter_mut().zip(samples).zip(&self.window) {
                *input = sample * weight;
            }
            self.transform
                .process_with_scratch(&mut input, &mut spectrum, &mut scratch)
                .map_err(|e| Error::shape("log_mel", "buffers of the transform's sizes", e.to_string()))?;
            power.iter_mut().zip(&spectrum).for_each(|(power, value)| *power = value.norm_sqr());
            for (band, (first, weights)) in self.bands.iter().enumerate() {
                let sum: f32 = power[*first..].iter().zip(weights).map(|(p, w)| p * w).sum();
                out[band * frames + frame] = (sum + FLOOR).ln();
            }
        }
        Ok(())
    }
}

fn to_mel(scale: MelScale, hz: f64) -> f64 {
    match scale {
        MelScale::Htk => 2595.0 * (1.0 + hz / 700.0).log10(),
        MelScale::Slaney if hz < 1000.0 => hz * 3.0 / 200.0,
        MelScale::Slaney => 15.0 + (hz / 1000.0).ln() / (6.4f64.ln() / 27.0),
    }
}

fn to_hz(scale: MelScale, mel: f64) -> f64 {
    match scale {
        MelScale::Htk => 700.0 * (10f64.powf(mel / 2595.0) - 1.0),
        MelScale::Slaney if mel < 15.0 => mel * 200.0 / 3.0,
        MelScale::Slaney => 1000.0 * ((mel - 15.0) * (6.4f64.ln() / 27.0)).exp(),
    }
}

/// The triangles: for each band its first bin and the weights from there.
fn bands(options: &LogMelOptions, rate: f64, n_fft: usize, max_hz: f64) -> Vec<(usize, Vec<f32>)> {
    let (low, high) = (to_mel(options.scale, options.min_hz), to_mel(options.scale, max_hz));
    let step = (high - low) / (options.mels + 1) as f64;
    let corner = |i: usize| to_hz(options.scale, low + step * i as f64);
    (0..options.mels)
        .map(|band| {
            let (left, middle, right) = (corner(band), corner(band + 1), corner(band + 2));
            let height = if options.scale == MelScale::Slaney { 2.0 / (right - left) } else { 1.0 };
            let weight = |bin: usize| {
                let hz = bin as f64 * rate / n_fft as f64;
                ((hz - left) / (middle - left)).min((right - hz) / (right - middle)) * height
            };
            let inside: Vec<usize> = (0..=n_fft / 2).filter(|bin| weight(*bin) > 0.0).collect();
            (inside.first().copied().unwrap_or(0), inside.iter().map(|bin| weight(*bin) as f32).collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Philox, Purpose};

    /// The definition itself in f64: a sum over every sample for every frequency.
    fn by_definition(wave: &[f32], options: &LogMelOptions, rate: f64, n_fft: usize, hop: usize) -> Vec<f64> {
        let n = wave.len() as isize;
        let reflected = |i: isize| {
            let i = if i < 0 { -i } else { i };
            f64::from(wave[(if i >= n { 2 * (n - 1) - i } else { i }) as usize])
        };
        let frames = 1 + wave.len() / hop;
        let mut out = vec![0.0; options.mels * frames];
        let (low, high) = (to_mel(options.scale, options.min_hz), to_mel(options.scale, rate / 2.0));
        for frame in 0..frames {
            let power: Vec<f64> = (0..=n_fft / 2)
                .map(|k| {
                    let (mut re, mut im) = (0.0, 0.0);
                    for i in 0..n_fft {
                        let hann = (std::f64::consts::PI * i as f64 / n_fft as f64).sin().powi(2);
                        let x = hann * reflected((frame * hop + i) as isize - (n_fft / 2) as isize);
                        let angle = std::f64::consts::TAU * (k * i % n_fft) as f64 / n_fft as f64;
                        re += x * angle.cos();
                        im -= x * angle.sin();
                    }
                    re * re + im * im
                })
                .collect();
            for band in 0..options.mels {
                let corner =
                    |i: usize| to_hz(options.scale, low + (high - low) * (band + i) as f64 / (options.mels + 1) as f64);
                let area = if options.scale == MelScale::Slaney { 2.0 / (corner(2) - corner(0)) } else { 1.0 };
                let sum: f64 = power
                    .iter()
                    .enumerate()
                    .map(|(k, p)| {
                        let hz = k as f64 * rate / n_fft as f64;
                        let up = (hz - corner(0)) / (corner(1) - corner(0));
                        let down = (corner(2) - hz) / (corner(2) - corner(1));
                        p * up.min(down).max(0.0) * area
                    })
                    .sum();
                out[band * frames + frame] = (sum + 1e-6).ln();
            }
        }
        out
    }

    #[test]
    fn the_fast_transform_gives_what_the_definition_gives() -> Result<()> {
        let random = Philox::new(11, Purpose::Sampling, 0);
        let wave: Vec<f32> = (0..1000).map(|i| random.uniform(i) - 0.5 + (i as f32 * 0.3).sin()).collect();
        for scale in [MelScale::Htk, MelScale::Slaney] {
            let options =
                LogMelOptions { n_fft: Some(256), hop: Some(80), mels: 20, scale, ..LogMelOptions::default() };
            let transform = LogMel::new(&options, 8000, wave.len())?;
            let [mels, frames] = transform.shape();
            assert_eq!([mels, frames], [20, 13]);
            let mut found = vec![0.0; mels * frames];
            transform.apply(&wave, &mut found)?;
            for (found, expected) in found.iter().zip(by_definition(&wave, &options, 8000.0, 256, 80)) {
                assert!((f64::from(*found) - expected).abs() < 1e-4, "{scale:?}: {found} {expected}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_mel_scales_have_their_published_points() {
        assert!((to_mel(MelScale::Htk, 1000.0) - 999.9855).abs() < 1e-3);
        assert!((to_mel(MelScale::Slaney, 1000.0) - 15.0).abs() < 1e-12);
        assert!((to_mel(MelScale::Slaney, 6400.0) - 42.0).abs() < 1e-9);
        for hz in [20.0, 440.0, 1000.0, 3999.0] {
            for scale in [MelScale::Htk, MelScale::Slaney] {
                assert!((to_hz(scale, to_mel(scale, hz)) - hz).abs() < 1e-8);
            }
        }
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let options = LogMelOptions { n_fft: Some(64), mels: 60, ..LogMelOptions::default() };
        assert!(LogMel::new(&options, 8000, 8000).is_err());
        assert!(LogMel::new(&LogMelOptions::default(), 8000, 100).is_err());
        assert!(LogMel::new(&LogMelOptions { max_hz: Some(5000.0), ..Default::default() }, 8000, 8000).is_err());
    }
}
