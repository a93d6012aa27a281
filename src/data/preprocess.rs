//! From a user's own file to the input that a model was trained on. Kept with every checkpoint, as JSON.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::format::images::Form;
use super::format::{self, audio};
use super::source;
use super::tokenizer::{GPT2_VOCABULARY, Tokenizer};
use super::words::Words;
use super::{Affine, InputSpec, Inputs, Pictures, Sizes, TargetSpec};
use crate::error::{Error, Result};
use crate::log_mel::{LogMel, LogMelOptions};
use crate::text::grouped;

/// How a kind of file becomes an input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Recipe {
    /// A PNG or JPEG, brought to this size; its white becomes `full_scale`.
    Image {
        /// 1 or 3.
        channels: usize,
        /// Pixels.
        height: usize,
        /// Pixels.
        width: usize,
        /// The value of white before normalization.
        full_scale: f32,
    },
    /// Rows of numbers.
    Values {
        /// Names of the features, where the training table named them.
        names: Option<Vec<String>>,
        /// Their numbers in the training table.
        numbers: Vec<usize>,
        /// Columns of the training table.
        width: usize,
        /// What stands between two cells.
        delimiter: char,
    },
    /// A WAV file.
    Audio {
        /// Hz; a file must have the same.
        sample_rate: u32,
        /// To which it is cut or padded.
        samples: usize,
        /// The log-mel picture, or none for the waveform.
        log_mel: Option<LogMelOptions>,
    },
    /// A text that is continued.
    Text {
        /// Its tokenizer.
        tokenizer: Tokenizer,
    },
    /// Tokens that are continued.
    Tokens {
        /// Number of distinct tokens.
        vocabulary: usize,
        /// The tokenizer, where it is known.
        tokenizer: Option<Tokenizer>,
    },
    /// A line of text.
    Line {
        /// Its vocabulary.
        words: Words,
    },
}

/// Why neither `predict` nor `generate` can use a model of so many tokens.
pub(crate) fn no_tokenizer(vocabulary: usize) -> String {
    format!(
        "and what its {} tokens stand for is not known (of {}, GPT-2's, it is); `warpstep eval` tells how well it does",
        grouped(vocabulary),
        grouped(GPT2_VOCABULARY)
    )
}

impl Recipe {
    /// Rows of `count` numbers, without names.
    pub(crate) fn values(count: usize) -> Self {
        Recipe::Values { names: None, numbers: (0..count).collect(), width: count, delimiter: ',' }
    }
}

/// One sample of a user's file.
#[derive(Clone, Debug, PartialEq)]
pub struct UserSample {
    /// File, and line where a file holds several.
    pub name: String,
    /// `[1, ..shape]`.
    pub input: Inputs,
}

/// What `predict` and `generate` need to know of the data a model was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// What a sample's input is.
    pub input: InputSpec,
    /// What a sample's target is, with the names of the classes.
    pub target: TargetSpec,
    /// How a file becomes an input.
    pub recipe: Recipe,
    /// Normalization of real inputs.
    pub affine: Option<Affine>,
    /// Pictures that the model makes of its inputs.
    #[serde(default)]
    pub pictures: Option<Pictures>,
    /// Samples of each split, by which data that changed are told; none in run folders of before.
    #[serde(default)]
    pub sizes: Option<Sizes>,
}

impl Preprocess {
    /// As JSON.
    ///
    /// # Errors
    /// The encoder's own; none in practice.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::data("preprocess", format!("cannot be written as JSON: {e}")))
    }

    /// From JSON.
    ///
    /// # Errors
    /// Text that [`Preprocess::to_json`] did not write.
    pub fn from_json(json: &str) -> Result<Self> {
        let preprocess: Preprocess = serde_json::from_str(json)
            .map_err(|e| Error::data("preprocess", format!("is not preprocessing JSON: {e}")))?;
        preprocess.check()?;
        Ok(preprocess)
    }

    /// Whether the parts fit each other; a damaged file must not ask for all the memory there is.
    fn check(&self) -> Result<()> {
        const MOST: usize = 1 << 28;
        let wrong = |what: String| Err(Error::data("preprocess", format!("{what}; the checkpoint is damaged")));
        let product = |shape: &[usize]| shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).unwrap_or(usize::MAX);
        let elements = match &self.input {
            InputSpec::Real { shape } => product(shape),
            InputSpec::Tokens { context, .. } => *context,
        };
        if !(1..=MOST).contains(&elements) {
            return wrong(format!("an input has {elements} values, expected 1 to {MOST}"));
        }
        let made = match &self.recipe {
            Recipe::Image { channels, height, width, .. } => product(&[*channels, *height, *width]),
            Recipe::Values { numbers, .. } => numbers.len(),
            Recipe::Audio { samples, .. } if !(1..=MOST).contains(samples) => *samples,
            Recipe::Audio { sample_rate, samples, log_mel: Some(mel) } => {
                LogMel::new(mel, *sample_rate, *samples)?.shape().iter().product()
            }
            Recipe::Audio { samples, log_mel: None, .. } => *samples,
            Recipe::Line { words } => words.length(),
            Recipe::Text { .. } | Recipe::Tokens { .. } => elements,
        };
        if made != elements {
            return wrong(format!("an input has {elements} values, but a file becomes {made}"));
        }
        if let Some(pictures) = &self.pictures {
            if pictures.samples != elements {
                return wrong(format!(
                    "pictures are made of {} samples, but an input has {elements}",
                    pictures.samples
                ));
            }
            pictures.transform()?;
            pictures.normalization()?;
        }
        if let Some(affine) = &self.affine {
            let channels = affine.scale.len();
            if channels == 0 || affine.shift.len() != channels || !elements.is_multiple_of(channels) {
                return wrong(format!(
                    "the normalization has {channels} scales and {} shifts for {elements} values",
                    affine.shift.len()
                ));
            }
        }
        Ok(())
    }

    /// Names of the classes, where targets are classes.
    pub fn class_names(&self) -> Option<&[String]> {
        match &self.target {
            TargetSpec::Class { names } => Some(names),
            _ => None,
        }
    }

    /// The tokenizer for `generate`, where the model continues text.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        match &self.recipe {
            Recipe::Text { tokenizer } => Some(tokenizer),
            Recipe::Tokens { tokenizer, .. } => tokenizer.as_ref(),
            _ => None,
        }
    }

    /// The samples of a user's file: one of a picture or a recording, one a row of a table, one a line of text.
    ///
    /// # Errors
    /// A file of another kind, or one that is damaged.
    pub fn file(&self, path: &Path) -> Result<Vec<UserSample>> {
        let name = path.display().to_string();
        match &self.recipe {
            Recipe::Image { channels, height, width, full_scale } => {
                let form = Form { channels: *channels, height: *height, width: *width, resize: true };
                if !matches!(channels, 1 | 3) {
                    return Err(Error::data(
                        path,
                        format!("the model takes pictures of {channels} channels, a file has 1 or 3"),
                    ));
                }
                let mut pixels = vec![0; form.elements()];
                form.read(path, &mut pixels)?;
                let values = pixels.into_iter().map(|p| f32::from(p) * (full_scale / 255.0)).collect();
                Ok(vec![self.sample(name, values)])
            }
            Recipe::Audio { sample_rate, samples, log_mel } => {
                let wave = audio::read_wave(path)?;
                if wave.sample_rate != *sample_rate {
                    return Err(Error::data(
                        path,
                        format!(
                            "has {} samples a second, but the model was trained on {sample_rate}; bring it to that rate",
                            wave.sample_rate
                        ),
                    ));
                }
                let transform = log_mel.as_ref().map(|mel| LogMel::new(mel, *sample_rate, *samples)).transpose()?;
                let mut values = vec![0.0; self.input.elements()];
                audio::features(wave.samples, *samples, transform.as_ref(), &mut values)?;
                Ok(vec![self.sample(name, values)])
            }
            Recipe::Text { .. } | Recipe::Tokens { .. } => self.text("", path),
            Recipe::Line { .. } | Recipe::Values { .. } => self.text(&source::read_text(path)?, path),
        }
    }

    /// The samples of a text: one a line. `path` is where it is from, for names and errors.
    ///
    /// # Errors
    /// A line that does not fit; a model that takes no text.
    pub fn text(&self, text: &str, path: &Path) -> Result<Vec<UserSample>> {
        let text = text.trim_start_matches('\u{feff}');
        match &self.recipe {
            Recipe::Line { words } => {
                let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
                let sample = |(i, line): (usize, &str)| UserSample {
                    name: format!("{}:{}", path.display(), i + 1),
                    input: Inputs::Tokens(words.encode(line)),
                };
                Ok(lines.map(sample).collect())
            }
            Recipe::Values { names, numbers, width, delimiter } => {
                let known = format::csv::Known { names: names.as_deref(), numbers, width: *width };
                let rows = format::csv::user_rows(text, path, *delimiter, known)?;
                rows.into_iter().map(|(line, row)| self.row(path, line, &row)).collect()
            }
            Recipe::Tokens { vocabulary, tokenizer: None } => Err(Error::data(
                path,
                format!("the model continues tokens and predicts no class of a file, {}", no_tokenizer(*vocabulary)),
            )),
            Recipe::Text { .. } | Recipe::Tokens { .. } => Err(Error::data(
                path,
                "the model continues text and predicts no class of a file; use `warpstep generate`",
            )),
            Recipe::Image { .. } => Err(Error::data(path, "the model takes pictures: give a PNG or JPEG file")),
            Recipe::Audio { .. } => Err(Error::data(path, "the model takes recordings: give a WAV file")),
        }
    }

    /// A row of a table, as the training table's are normalized.
    fn row(&self, path: &Path, line: u64, row: &[f64]) -> Result<UserSample> {
        let normalized = match &self.affine {
            Some(affine) => affine.rounded(row),
            None => Ok(row.iter().map(|value| *value as f32).collect()),
        };
        let input = normalized.map_err(|value| {
            Error::data(
                path,
                format!("line {line}: {value} is out of the range of f32 once it is normalized; correct it"),
            )
        })?;
        Ok(UserSample { name: format!("{}:{line}", path.display()), input: Inputs::Real(input) })
    }

    fn sample(&self, name: String, mut values: Vec<f32>) -> UserSample {
        if let Some(affine) = &self.affine {
            affine.apply(&mut values);
        }
        UserSample { name, input: Inputs::Real(values) }
    }
}
