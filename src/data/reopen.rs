//! Data for a model that was trained before: what it remembers of them counts, whatever the files would give by now.

use std::path::Path;
use std::sync::Arc;

use super::dataset::{RealView, TargetTable};
use super::format::{self, Pool};
use super::options::{DataOptions, FormatOptions};
use super::preprocess::{Preprocess, Recipe};
use super::reading::Reading;
use super::source::{Held, Lookup};
use super::{Affine, Dataset, InputSpec, OpenedData, TargetSpec};
use crate::error::{Error, Result};

/// What to do where a split cannot be the one of before.
const ADVICE: &str = "put back the data that the model was trained on, or evaluate a split with files of its own";

/// A split of `data`, which these options gave by now, for a model that was trained on what `saved` tells of. A split with files of
/// its own is read as the model was trained, whatever became of the files that it was trained on.
///
/// # Errors
/// The split is taken from data that are not those of before; files that do not fit the model.
pub(crate) fn as_trained(
    options: &DataOptions,
    base: Option<&Path>,
    data: &OpenedData,
    which: Held,
    saved: &Preprocess,
) -> Result<Option<Arc<dyn Dataset>>> {
    let (split, asked) = match which {
        Held::No => (Some(&data.splits.train), None),
        Held::Validation => (data.splits.validation.as_ref(), options.split.validation.as_ref()),
        Held::Test => (data.splits.test.as_ref(), options.split.test.as_ref()),
    };
    let Some(split) = split else { return Ok(None) };
    let own = which != Held::No && asked.is_none() && !matches!(options.format, FormatOptions::Digits);
    let changed = if own { saved.changed_form(&data.preprocess) } else { saved.changed(&data.preprocess) };
    match changed {
        None => Ok(Some(Arc::clone(split))),
        Some(_) if own => own_split(options, &Lookup::new(base), data, which, saved).map(Some),
        Some(change) => Err(change.refused(&data.source, ADVICE)),
    }
}

/// A split with files of its own, as `saved` has it.
fn own_split(
    options: &DataOptions,
    lookup: &Lookup,
    data: &OpenedData,
    which: Held,
    saved: &Preprocess,
) -> Result<Arc<dyn Dataset>> {
    let (key, what) = if which == Held::Test { ("data.test", "test") } else { ("data.validation", "validation") };
    let pick = |validation: &Option<std::path::PathBuf>, test: &Option<std::path::PathBuf>| {
        if which == Held::Test { test.clone() } else { validation.clone() }.unwrap_or_default()
    };
    let refused = || match saved.changed_form(&data.preprocess) {
        Some(change) => change.refused(&data.source, ADVICE),
        None => Error::data(&data.source, "is not what the model was trained on"),
    };
    let pool = match &options.format {
        FormatOptions::Lines(o) => {
            let (Recipe::Line { words }, Some(names)) = (&saved.recipe, saved.class_names()) else {
                return Err(refused());
            };
            return format::lines::own_split(key, &pick(&o.validation, &o.test), lookup, words, names);
        }
        FormatOptions::Text(o) => {
            let (Recipe::Text { tokenizer }, InputSpec::Tokens { context, .. }) = (&saved.recipe, &saved.input) else {
                return Err(refused());
            };
            let file = pick(&o.validation, &o.test);
            return format::text::own_split(key, &file, lookup, (tokenizer, *context), what);
        }
        FormatOptions::Tokens(_) | FormatOptions::Digits => return Err(refused()),
        FormatOptions::Idx(o) => format::idx::open(o, lookup)?,
        FormatOptions::Csv(o) => format::csv::open(o, lookup)?,
        FormatOptions::Images(o) => format::images::open(o, lookup, &Reading::default())?,
        FormatOptions::Audio(o) => format::audio::open(o, lookup, &Reading::default())?,
        FormatOptions::Inline(o) => format::inline::open(o)?,
    };
    let input = InputSpec::Real { shape: pool.table.shape.clone() };
    if saved.changed_input(&input, &pool.recipe).is_some() {
        return Err(refused());
    }
    of_pool(pool, which, saved, refused)
}

/// The samples that a source holds out as `which`.
fn of_pool(
    mut pool: Pool,
    which: Held,
    saved: &Preprocess,
    refused: impl FnOnce() -> Error,
) -> Result<Arc<dyn Dataset>> {
    let range = if which == Held::Test { pool.own_test.clone() } else { pool.own_validation.clone() };
    let targets = match (pool.targets, &saved.target) {
        (TargetTable::Class { mut labels, names: found }, TargetSpec::Class { names }) => {
            let known: Vec<Option<usize>> = found.iter().map(|name| names.iter().position(|n| n == name)).collect();
            for label in &mut labels[range.clone()] {
                let name = *label as usize;
                let Some(class) = known[name] else {
                    return Err(Error::data(
                        &pool.place,
                        format!("found the class {:?}, which the model was not trained on", found[name]),
                    ));
                };
                *label = class as i32;
            }
            TargetTable::Class { labels, names: names.clone() }
        }
        (real @ TargetTable::Real { .. }, target @ TargetSpec::Real { .. }) if real.spec() == *target => real,
        _ => return Err(refused()),
    };
    let affine = saved.affine.clone().unwrap_or_else(|| Affine::uniform(pool.table.channels, 1.0));
    let affine = pool.table.round(&affine, &pool.place)?;
    Ok(Arc::new(RealView {
        table: Arc::new(pool.table),
        targets: Arc::new(targets),
        indices: (range.start as u32..range.end as u32).collect(),
        affine,
        augment: None,
    }))
}
