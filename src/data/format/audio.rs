//! Recordings in WAV files, by class folder or by a pattern on their names.

use std::io::Read;
use std::path::{Path, PathBuf};

use hound::{SampleFormat, WavReader};

use super::super::augment::Subject;
use super::super::dataset::{RealTable, TargetTable, Values};
use super::super::options::{AudioFeatures, AudioOptions, Normalize};
use super::super::pictures::Asked;
use super::super::preprocess::Recipe;
use super::super::reading::Reading;
use super::super::source::{ClassFile, Held, Lookup, by_class, files_with, read_raw};
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
pub(crate) fn open(options: &AudioOptions, lookup: &Lookup, reading: &Reading) -> Result<Pool> {
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
    read_all(reading, &files, &mut values, each, |file, out| {
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
    // With a pattern, classes are no folders.
    not_empty(folder, "WAV file of its own (with data.pattern none is looked for in folders within it)", paths.len())?;
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

/// The chunks of a WAV file that are read: what the samples are, and the samples.
struct Chunks<'a> {
    format: &'a [u8],
    data: &'a [u8],
    /// Bytes of samples that the file tells of.
    told: u32,
}

impl<'a> Chunks<'a> {
    /// Finds them, whatever lies before them; none in a file that is built otherwise. A chunk of an odd size has a byte after it that
    /// counts for nothing, which some programs leave out.
    fn find(bytes: &'a [u8]) -> Option<Self> {
        if bytes.get(..4)? != b"RIFF" || bytes.get(8..12)? != b"WAVE" {
            return None;
        }
        let mut format = None;
        let mut rest = &bytes[12..];
        loop {
            let (name, size) = (rest.get(..4)?, rest.get(4..8)?);
            let told = u32::from_le_bytes([size[0], size[1], size[2], size[3]]);
            let body = &rest[8..];
            match (name, format) {
                (b"data", Some(format)) => return Some(Chunks { format, data: body, told }),
                (b"fmt ", _) => format = Some(body.get(..told as usize)?),
                _ => {}
            }
            rest = body.get(told as usize..)?;
            if told % 2 == 1 && !matches!(rest.get(..4), Some(b"data" | b"fmt ")) {
                rest = rest.get(1..)?;
            }
        }
    }

    /// A file of these chunks alone, up to the samples.
    fn head(&self) -> Vec<u8> {
        let size = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        let all = (self.told as usize).saturating_add(self.format.len()).saturating_add(20);
        let format = [b"fmt ".as_slice(), &size(self.format.len()), self.format].concat();
        [b"RIFF".as_slice(), &size(all), b"WAVE", &format, b"data", &self.told.to_le_bytes()].concat()
    }

    /// The kind of samples, where it is one that is not read.
    fn unknown(&self) -> Option<String> {
        let word = |at: usize| self.format.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        let (tag, bits) = (word(0)?, word(14)?);
        // The extensible form has the tag further on.
        let tag = if tag == 0xfffe { word(24).unwrap_or(tag) } else { tag };
        match (tag, bits) {
            (1, 8 | 16 | 24 | 32) | (3, 32) => None,
            (1, bits) => Some(format!("integers of {bits} bits")),
            (3, bits) => Some(format!("floats of {bits} bits")),
            (6, _) => Some("A-law samples".to_owned()),
            (7, _) => Some("mu-law samples".to_owned()),
            (tag, bits) => Some(format!("samples of {bits} bits in the format of number {tag}")),
        }
    }
}

/// Reads a WAV file of 8, 16, 24 or 32 bit integers or of 32 bit floats.
pub(crate) fn read_wave(path: &Path) -> Result<Wave> {
    let bytes = read_raw(path)?;
    let wrong = |problem: String| Error::data(path, problem);
    let damaged = |e: hound::Error| wrong(format!("is not a WAV file that can be read ({e}); fetch the file again"));
    let chunks = Chunks::find(&bytes);
    if let Some(kind) = chunks.as_ref().and_then(Chunks::unknown) {
        return Err(wrong(format!(
            "holds {kind}, expected integers of 8, 16, 24 or 32 bits, or floats of 32; convert it to one of these"
        )));
    }
    // What is built otherwise is left to the reader, which tells what is wrong with it.
    let (head, data) = chunks.map_or((Vec::new(), &bytes[..]), |chunks| (chunks.head(), chunks.data));
    let mut reader = WavReader::new((&head[..]).chain(data)).map_err(damaged)?;
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
