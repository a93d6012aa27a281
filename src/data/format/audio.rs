//! Recordings in WAV files, by class folder or by a pattern on their names.

use std::path::{Path, PathBuf};

use hound::{SampleFormat, WavReader};

use super::super::augment::Subject;
use super::super::dataset::{RealTable, TargetTable, Values};
use super::super::options::{AudioFeatures, AudioOptions, Normalize};
use super::super::pictures::Asked;
use super::super::preprocess::Recipe;
use super::super::source::{ClassFile, Held, Lookup, by_class, files_with, must_be_file};
use super::super::split;
use super::{Pool, held, not_empty, numbered, read_all, room};
use crate::error::{Error, Result};
use crate::log_mel::{self, LogMel};

const ENDINGS: [&str; 2] = ["wav", "wave"];
/// Highest sample rate that a file may tell of, in Hz.
const FASTEST: u32 = 768_000;

/// One recording, mixed down to one channel, in -1 to 1.
pub(crate) struct Wave {
    pub sample_rate: u32,
    pub samples: Vec<f32>,
}

/// Opens a folder of recordings.
pub(crate) fn open(options: &AudioOptions, lookup: &Lookup) -> Result<Pool> {
    let place = lookup.folder_for("data.path", &options.path)?;
    let pattern = options.pattern.as_deref().map(|p| split::regex("data.pattern", p)).transpose()?;
    let (names, mut files) = match &pattern {
        Some(pattern) => by_pattern(&place, pattern)?,
        None => by_class(&place, &ENDINGS)?,
    };
    files.sort_by_key(|f| f.held);
    let first = read_wave(&files[0].path)?;
    let sample_rate = first.sample_rate;
    let samples = length(options, sample_rate)?;
    let transform = match &options.features {
        AudioFeatures::LogMel(mel) => Some(LogMel::new(mel, sample_rate, samples)?),
        AudioFeatures::Waveform(_) => None,
    };
    let pictures = match &options.features {
        AudioFeatures::Waveform(Some(log_mel)) => Some(Asked { sample_rate, log_mel: log_mel.clone() }),
        _ => None,
    };
    let shape = match &transform {
        Some(transform) => [vec![1], transform.shape().to_vec()].concat(),
        None => vec![samples],
    };
    let each: usize = shape.iter().product();
    let mut values = room::<f32>(&place, files.len(), each)?;
    let first_path = files[0].path.clone();
    read_all(&files, &mut values, each, |file, out| {
        let wave = read_wave(&file.path)?;
        if wave.sample_rate != sample_rate {
            return Err(Error::data(
                &file.path,
                format!(
                    "has {} samples a second, expected {sample_rate} as {}; bring all recordings to one sample rate",
                    wave.sample_rate,
                    first_path.display()
                ),
            ));
        }
        features(wave.samples, samples, transform.as_ref(), out)
    })?;
    let spectrum = transform.is_some();
    Ok(Pool {
        table: RealTable {
            shape,
            channels: 1,
            full_scale: 1.0,
            background: if spectrum { log_mel::silence() } else { 0.0 },
            values: Values::Floats(values),
        },
        targets: TargetTable::Class { labels: files.iter().map(|f| f.class).collect(), names },
        own_validation: held(&files, Held::Validation),
        own_test: held(&files, Held::Test),
        names: Some(files.into_iter().map(|f| f.name).collect()),
        pattern,
        subject: if spectrum { Subject::Spectrum } else { Subject::Waveform },
        normalize: if spectrum || pictures.is_some() { Normalize::Dataset } else { Normalize::None },
        recipe: Recipe::Audio {
            sample_rate,
            samples,
            log_mel: match &options.features {
                AudioFeatures::LogMel(mel) => Some(mel.clone()),
                AudioFeatures::Waveform(_) => None,
            },
        },
        pictures,
        place,
    })
}

fn length(options: &AudioOptions, sample_rate: u32) -> Result<usize> {
    /// Ten minutes at 192 kHz.
    const MOST: usize = 115_200_000;
    let (key, samples) = match options.samples {
        Some(samples) => ("data.samples", samples),
        None => ("data.seconds", (options.seconds * f64::from(sample_rate)).round() as usize),
    };
    if !(1..=MOST).contains(&samples) {
        return Err(Error::config(key, format!("found a length of {samples} samples, expected 1 to {MOST}")));
    }
    Ok(samples)
}

/// Brings a waveform to its length and to its features (`=`).
pub(crate) fn features(mut wave: Vec<f32>, samples: usize, transform: Option<&LogMel>, out: &mut [f32]) -> Result<()> {
    wave.resize(samples, 0.0);
    match transform {
        Some(transform) => transform.apply(&wave, out),
        None => {
            out.copy_from_slice(&wave);
            Ok(())
        }
    }
}

/// The files of a folder, their classes told by their names.
fn by_pattern(folder: &Path, pattern: &regex::Regex) -> Result<(Vec<String>, Vec<ClassFile>)> {
    if !pattern.capture_names().flatten().any(|n| n == "class") {
        return Err(Error::config(
            "data.pattern",
            format!("found {:?}, expected a group named class, such as (?P<class>\\d)_.*", pattern.as_str()),
        ));
    }
    let paths: Vec<PathBuf> = files_with(folder, &ENDINGS)?;
    not_empty(folder, "WAV file", paths.len())?;
    let mut classes = Vec::with_capacity(paths.len());
    let mut names = Vec::with_capacity(paths.len());
    for path in &paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let class = split::captures(pattern, &name).and_then(|c| c.name("class").map(|m| m.as_str().to_string()));
        let Some(class) = class else {
            return Err(Error::data(
                path,
                format!(
                    "the name does not match data.pattern {:?}; correct the pattern or remove the file",
                    pattern.as_str()
                ),
            ));
        };
        classes.push(class);
        names.push(name);
    }
    let (class_names, labels) = numbered(classes.iter().map(String::as_str));
    let files = paths.into_iter().zip(names).zip(labels);
    let files = files.map(|((path, name), class)| ClassFile { path, name, class, held: Held::No }).collect();
    Ok((class_names, files))
}

/// Reads a WAV file of 8, 16, 24 or 32 bit integers or of 32 bit floats.
pub(crate) fn read_wave(path: &Path) -> Result<Wave> {
    must_be_file(path)?;
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let wrong = |problem: String| Error::data(path, problem);
    let damaged = |e: hound::Error| wrong(format!("is not a WAV file that can be read ({e}); fetch the file again"));
    let mut reader = WavReader::new(&bytes[..]).map_err(damaged)?;
    let spec = reader.spec();
    if spec.channels == 0 || !(1..=FASTEST).contains(&spec.sample_rate) {
        return Err(wrong(format!(
            "has {} channels and {} samples a second, expected 1 or more and 1 to {FASTEST}",
            spec.channels, spec.sample_rate
        )));
    }
    let values: Vec<f32> = match (spec.sample_format, spec.bits_per_sample) {
        (SampleFormat::Float, 32) => reader.samples::<f32>().collect::<Result<_, _>>().map_err(damaged)?,
        (SampleFormat::Int, bits @ (8 | 16 | 24 | 32)) => {
            let scale = 0.5f64.powi(i32::from(bits) - 1);
            let to_real = |s: Result<i32, _>| s.map(|s| (f64::from(s) * scale) as f32);
            reader.samples::<i32>().map(to_real).collect::<Result<_, _>>().map_err(damaged)?
        }
        (_, bits) => return Err(wrong(format!("has samples of {bits} bits, expected 8, 16, 24 or 32"))),
    };
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        return Err(wrong(format!("sample {i} is {}, expected a finite number", values[i])));
    }
    if values.is_empty() {
        return Err(wrong("holds no samples, expected a recording".into()));
    }
    let channels = usize::from(spec.channels);
    let mixed = match channels {
        1 => values,
        _ => values.chunks(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32).collect(),
    };
    Ok(Wave { sample_rate: spec.sample_rate, samples: mixed })
}
