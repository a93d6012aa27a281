//! Whether data are still those that a model was trained on, as far as is known of them.

use serde::{Deserialize, Serialize};

use super::preprocess::{Preprocess, Recipe};
use super::{Affine, Dataset, InputSpec, Splits, TargetSpec};
use crate::error::Error;

/// Largest difference of two normalizations that count as the same, as a share: machines and versions round otherwise.
const ROUNDING: f64 = 1e-5;

/// Samples of each split, or places where a window of text may begin; 0 of a split that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Trained on.
    pub train: usize,
    /// Looked at during training.
    pub validation: usize,
    /// Looked at once, at the end.
    pub test: usize,
}

impl Sizes {
    /// Those of these splits.
    pub(crate) fn of(splits: &Splits) -> Self {
        let size = |split: &dyn Dataset| split.starts().unwrap_or(split.len());
        let held = |split: &Option<std::sync::Arc<dyn Dataset>>| split.as_ref().map_or(0, |split| size(&**split));
        Sizes { train: size(&*splits.train), validation: held(&splits.validation), test: held(&splits.test) }
    }
}

/// What data have otherwise than those that a model was trained on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key of the run file that names them.
    key: &'static str,
    /// Found and expected, as a sentence without its end.
    what: String,
}

impl Change {
    fn of_path(what: String) -> Self {
        Change { key: "data.path", what }
    }

    /// As an error: `source` is what was read, `advice` what to do.
    #[must_use]
    pub fn refused(&self, source: &str, advice: &str) -> Error {
        self.told(source, "not what the model was trained on", advice)
    }

    /// As an error of a process that reads other data than the first one does.
    #[must_use]
    pub fn of_process(&self, source: &str) -> Error {
        self.told(source, "not what process 0 has", "give every process the same")
    }

    fn told(&self, source: &str, problem: &str, advice: &str) -> Error {
        let of = if self.key == "data.path" { format!("{source} is") } else { "its data are".to_owned() };
        Error::config(self.key, format!("{of} {problem}: {}; {advice}", self.what))
    }
}

impl Preprocess {
    /// What data that give `now` have otherwise than those that gave this one; none where nothing is known to differ.
    #[must_use]
    pub fn changed(&self, now: &Preprocess) -> Option<Change> {
        self.changed_sizes(now).or_else(|| self.changed_form(now))
    }

    /// Of [`Preprocess::changed`], how many samples there are.
    fn changed_sizes(&self, now: &Preprocess) -> Option<Change> {
        let (before, now) = self.sizes.zip(now.sizes)?;
        let windows = matches!(self.recipe, Recipe::Text { .. } | Recipe::Tokens { .. });
        let unit = if windows { "windows" } else { "samples" };
        [
            ("data.path", "training", before.train, now.train),
            ("data.validation", "validation", before.validation, now.validation),
            ("data.test", "test", before.test, now.test),
        ]
        .into_iter()
        .find(|(_, _, before, now)| before != now)
        .map(|(key, name, before, now)| Change {
            key,
            what: format!("found {now} {unit} in the {name} split, expected {before}"),
        })
    }

    /// Of [`Preprocess::changed`], all that decides what a file becomes, and what a target means.
    pub(crate) fn changed_form(&self, now: &Preprocess) -> Option<Change> {
        self.changed_input(&now.input, &now.recipe)
            .or_else(|| self.changed_target(&now.target))
            .or_else(|| match (&self.affine, &now.affine) {
                (Some(before), Some(now)) => changed_normalization(before, now),
                _ => None,
            })
            .or_else(|| match (&self.pictures, &now.pictures) {
                (Some(before), Some(now)) => changed_normalization(&before.affine, &now.affine),
                _ => None,
            })
    }

    /// What inputs of this kind, made so, have otherwise than the model's.
    pub(crate) fn changed_input(&self, input: &InputSpec, recipe: &Recipe) -> Option<Change> {
        let told = |input: &InputSpec| match input {
            InputSpec::Real { shape } => format!("values of shape {shape:?}"),
            InputSpec::Tokens { context, vocabulary } => format!("{context} tokens of a vocabulary of {vocabulary}"),
        };
        let what = match (&self.recipe, recipe) {
            _ if self.input != *input => format!("found inputs of {}, expected {}", told(input), told(&self.input)),
            (Recipe::Values { names: Some(before), .. }, Recipe::Values { names: Some(now), .. }) => {
                // Columns of the same names may have moved.
                if before == now {
                    return None;
                }
                format!("found the columns {}, expected {}", now.join(", "), before.join(", "))
            }
            (Recipe::Values { numbers: a, .. }, Recipe::Values { numbers: b, .. }) => {
                if a == b {
                    return None;
                }
                format!("found the columns of numbers {b:?}, expected {a:?}")
            }
            (before, now) if before == now => return None,
            // The value of white is that of a user's files alone.
            (Recipe::Image { .. }, Recipe::Image { .. }) => return None,
            (Recipe::Audio { sample_rate: before, .. }, Recipe::Audio { sample_rate: now, .. }) if before != now => {
                format!("found {now} samples a second, expected {before}")
            }
            (Recipe::Line { .. }, _) => "found another vocabulary".to_owned(),
            (Recipe::Text { .. }, _) => "found other characters".to_owned(),
            _ => "found another kind of file".to_owned(),
        };
        Some(Change::of_path(what))
    }

    fn changed_target(&self, now: &TargetSpec) -> Option<Change> {
        let what = match (&self.target, now) {
            (before, now) if before == now => return None,
            (TargetSpec::Class { names: before }, TargetSpec::Class { names: now }) => {
                let added = now.iter().find(|name| !before.contains(name));
                let gone = before.iter().find(|name| !now.contains(name));
                match (added, gone) {
                    (Some(name), _) => format!("found the class {name:?}, expected the {} of before", before.len()),
                    (None, Some(name)) => format!("found no class {name:?} any more"),
                    (None, None) => "found its classes in another order".to_owned(),
                }
            }
            (TargetSpec::Real { width: before }, TargetSpec::Real { width: now }) => {
                format!("found {now} targets a sample, expected {before}")
            }
            (TargetSpec::Class { .. }, _) => "found targets that are no classes".to_owned(),
            _ => "found targets of another kind".to_owned(),
        };
        Some(Change::of_path(what))
    }
}

fn changed_normalization(before: &Affine, now: &Affine) -> Option<Change> {
    if before.scale.len() != now.scale.len() {
        let (before, now) = (before.scale.len(), now.scale.len());
        return Some(Change::of_path(format!("found {now} channels, expected {before}")));
    }
    let differ = |a: f64, b: f64| (a - b).abs() > ROUNDING * a.abs().max(b.abs());
    let channels = before.scale.iter().zip(&before.shift).zip(now.scale.iter().zip(&now.shift));
    // What a shift is worth depends on the scale: an offset of nothing is no offset.
    let differs =
        |((a, c), (b, d)): ((&f64, &f64), (&f64, &f64))| differ(*a, *b) || (differ(*c, *d) && (c - d).abs() > ROUNDING);
    let channel = channels.into_iter().position(differs)?;
    Some(Change::of_path(format!(
        "found training values of another mean or deviation, so that channel {channel} is normalized as x * {:.6} + {:.6}, \
         expected x * {:.6} + {:.6}",
        now.scale[channel], now.shift[channel], before.scale[channel], before.shift[channel]
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preprocess(scale: f64, shift: f64) -> Preprocess {
        Preprocess {
            input: InputSpec::Real { shape: vec![1] },
            target: TargetSpec::Class { names: vec!["a".into(), "b".into()] },
            recipe: Recipe::values(1),
            affine: Some(Affine { scale: vec![scale], shift: vec![shift] }),
            pictures: None,
            sizes: Some(Sizes { train: 8, validation: 2, test: 0 }),
        }
    }

    #[test]
    fn whatever_differs_is_told_and_rounding_does_not() {
        let before = preprocess(2.0, -7.0);
        assert_eq!(before.changed(&preprocess(2.0 + 1e-7, -7.0 - 1e-7)), None);
        let told = |change: &dyn Fn(&mut Preprocess)| {
            let mut now = before.clone();
            change(&mut now);
            before.changed(&now).map(|change| change.refused("t.csv", "put it back").to_string()).unwrap_or_default()
        };
        let sizes = |train, validation| Some(Sizes { train, validation, test: 0 });
        for (error, expected) in [
            (
                told(&|p| p.sizes = sizes(9, 2)),
                "data.path: t.csv is not what the model was trained on: found 9 samples",
            ),
            (told(&|p| p.sizes = sizes(8, 3)), "data.validation: its data are not"),
            (told(&|p| p.affine = preprocess(2.1, -7.0).affine), "channel 0 is normalized as x * 2.100000"),
            (told(&|p| p.affine = preprocess(2.0, -7.1).affine), "channel 0"),
            (told(&|p| p.input = InputSpec::Real { shape: vec![2] }), "shape [2], expected values of shape [1]"),
            (told(&|p| p.target = TargetSpec::Class { names: vec!["a".into(), "c".into()] }), "the class \"c\""),
            (told(&|p| p.target = TargetSpec::Class { names: vec!["b".into(), "a".into()] }), "another order"),
        ] {
            assert!(error.contains(expected) && error.ends_with("put it back"), "{error:?}: no {expected:?}");
        }
        // A run folder of before says nothing of sizes.
        assert_eq!(
            Preprocess { sizes: None, ..before.clone() }.changed(&Preprocess { sizes: sizes(9, 9), ..before }),
            None
        );
    }
}
