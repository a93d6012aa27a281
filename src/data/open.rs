//! From options to the splits of a run.

use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use super::augment::{Augment, AugmentOptions};
use super::dataset::RealView;
use super::format::{self, Pool};
use super::loader::{Loader, Prefetch};
use super::normalize;
use super::options::{DataOptions, FormatOptions, Normalize, Part, Resident, Sampling, SplitOptions};
use super::preprocess::{Preprocess, Recipe};
use super::reading::Reading;
use super::sampler::{Sampler, SamplerOptions};
use super::source::Lookup;
use super::{Dataset, InputSpec, Sizes, Splits, TargetSpec, split};
use crate::error::{Error, Result};
use crate::plan::Share;

/// The share of the embedded digits that is the test split where a run file asks for none.
const DIGITS_TEST: f64 = 0.2;

/// The data of a run, ready to be read.
#[derive(Clone)]
pub struct OpenedData {
    /// What is trained on and what is held out.
    pub splits: Splits,
    /// What `predict` and `generate` need later.
    pub preprocess: Preprocess,
    /// `data.format`.
    pub format: &'static str,
    /// The file or folder that was found.
    pub source: String,
    /// The order of training samples.
    pub sampling: Sampling,
    /// Whether a pass leaves out its last batch where that is not full.
    pub drop_last: bool,
    /// How far ahead batches are read.
    pub prefetch: Prefetch,
    /// Whether the device keeps the training split.
    pub resident: Resident,
}

impl OpenedData {
    /// What a sample's input is.
    pub fn input(&self) -> &InputSpec {
        &self.preprocess.input
    }

    /// What a sample's target is.
    pub fn target(&self) -> &TargetSpec {
        &self.preprocess.target
    }

    /// Checks the real targets of all splits, as [`Dataset::check_targets`] does.
    ///
    /// # Errors
    /// As [`Dataset::check_targets`].
    pub fn check_targets(&self, range: RangeInclusive<f32>, advice: &str) -> Result<()> {
        let Splits { train, validation, test } = &self.splits;
        let splits = [Some(train), validation.as_ref(), test.as_ref()];
        splits.into_iter().flatten().try_for_each(|split| split.check_targets(range.clone(), advice))
    }

    /// How training batches of `batch_size` samples are put together.
    pub fn sampler_options(&self, batch_size: usize, seed: u64) -> SamplerOptions {
        let (sampling, drop_last) = (self.sampling, self.drop_last);
        SamplerOptions { batch_size, accumulate: 1, seed, sampling, drop_last, share: Share::default() }
    }

    /// Batches of one pass over the training split.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn batches_per_epoch(&self, batch_size: usize) -> Result<u64> {
        Ok(Sampler::new(&*self.splits.train, self.sampler_options(batch_size, 0))?.batches_per_epoch())
    }

    /// Training batches from number `first_batch` on, without end.
    ///
    /// # Errors
    /// As [`Loader::train`].
    pub fn train_batches(&self, batch_size: usize, seed: u64, first_batch: u64) -> Result<Loader> {
        let options = self.sampler_options(batch_size, seed);
        Loader::train(Arc::clone(&self.splits.train), options, first_batch, self.prefetch)
    }

    /// All samples of a split in order, once, without augmentations.
    ///
    /// # Errors
    /// As [`Loader::batches`].
    pub fn batches(&self, split: &Arc<dyn Dataset>, batch_size: usize) -> Result<Loader> {
        Loader::batches(Arc::clone(split), batch_size, self.prefetch)
    }
}

/// Opens the data that `options` describe. Relative paths are looked for beside the run file (in `base`), in
/// `$WARPSTEP_DATA` and in `../shared/data`; `seed` keys the splits unless `data.split.seed` does.
///
/// # Errors
/// Options that do not fit the data; files that are missing or damaged, with the place.
pub fn open(options: &DataOptions, base: Option<&Path>, seed: u64) -> Result<OpenedData> {
    open_watched(options, base, seed, &Reading::default())
}

/// As [`open`]; `reading` tells another thread how far it is, where data are many files.
///
/// # Errors
/// As [`open`].
pub fn open_watched(options: &DataOptions, base: Option<&Path>, seed: u64, reading: &Reading) -> Result<OpenedData> {
    for (key, found, most) in [("data.prefetch", options.prefetch, 1 << 16), ("data.threads", options.threads, 1024)] {
        if found > most {
            return Err(Error::config(key, format!("found {found}, expected {most} at most")));
        }
    }
    let lookup = Lookup::new(base);
    let (splits, preprocess, source) = match &options.format {
        FormatOptions::Digits => {
            let mut splits = options.split.clone();
            if splits.test.is_none() && splits.validation.is_none() {
                splits.test = Some(Part::Fraction(DIGITS_TEST));
            }
            of_pool(format::digits::open(), options, &splits, seed)?
        }
        FormatOptions::Idx(o) => of_pool(format::idx::open(o, &lookup)?, options, &options.split, seed)?,
        FormatOptions::Csv(o) => of_pool(format::csv::open(o, &lookup)?, options, &options.split, seed)?,
        FormatOptions::Images(o) => of_pool(format::images::open(o, &lookup, reading)?, options, &options.split, seed)?,
        FormatOptions::Audio(o) => of_pool(format::audio::open(o, &lookup, reading)?, options, &options.split, seed)?,
        FormatOptions::Inline(o) => of_pool(format::inline::open(o)?, options, &options.split, seed)?,
        FormatOptions::Text(o) => of_tokens(format::text::open(o, &options.split, &lookup)?, options)?,
        FormatOptions::Tokens(o) => of_tokens(format::tokens::open(o, &options.split, &lookup)?, options)?,
        FormatOptions::Lines(o) => of_tokens(format::lines::open(o, &options.split, &lookup, seed)?, options)?,
    };
    two_classes(&source, &*splits.train)?;
    let windows = splits.train.starts().is_some();
    let sizes = Some(Sizes::of(&splits));
    Ok(OpenedData {
        splits,
        preprocess: Preprocess { sizes, ..preprocess },
        format: options.format.name(),
        source,
        sampling: options.sampling.unwrap_or(if windows { Sampling::Random } else { Sampling::Shuffle }),
        drop_last: options.drop_last.unwrap_or(true),
        prefetch: Prefetch { batches: options.prefetch, threads: options.threads },
        resident: options.resident,
    })
}

/// Where targets are classes, a model that saw one alone would have nothing to tell apart.
fn two_classes(source: &str, train: &dyn Dataset) -> Result<()> {
    let (TargetSpec::Class { names }, Some(counts)) = (train.target(), train.class_counts()) else { return Ok(()) };
    let mut seen = names.iter().zip(counts).filter(|(_, count)| *count > 0).map(|(name, _)| name);
    match (seen.next(), seen.next()) {
        (Some(name), None) => Err(Error::data(
            source,
            format!(
                "found the one class {name:?} in the training split, expected two or more; give samples of another, or \
                 check data.split"
            ),
        )),
        _ => Ok(()),
    }
}

/// Splits of real-valued samples.
fn of_pool(
    mut pool: Pool,
    options: &DataOptions,
    splits: &SplitOptions,
    seed: u64,
) -> Result<(Splits, Preprocess, String)> {
    let (classes, len) = match &pool.targets {
        super::dataset::TargetTable::Class { labels, .. } => (Some(&labels[..]), labels.len()),
        super::dataset::TargetTable::Real { values, width, .. } => (None, values.len() / width),
    };
    let facts = split::Facts {
        len,
        classes,
        ordinals: None,
        names: pool.names.as_deref(),
        pattern: pool.pattern.as_ref(),
        own_validation: pool.own_validation,
        own_test: pool.own_test,
    };
    let parts = split::divide(&pool.place, &facts, splits, seed)?;
    let how = options.normalize.as_ref().unwrap_or(&pool.normalize);
    let pictures =
        pool.pictures.map(|asked| asked.measured(&pool.table, how, &parts.train, &pool.place)).transpose()?;
    // Where the model makes pictures, it is these that are normalized.
    let how = if pictures.is_some() { &Normalize::None } else { how };
    let affine = normalize::affine(how, &pool.table, &parts.train, &pool.place)?;
    let mut background = vec![pool.table.background; pool.table.channels];
    affine.apply(&mut background);
    let augment = Augment::new(&options.augment, pool.subject, &pool.table.shape, background)?;
    let preprocess = Preprocess {
        input: InputSpec::Real { shape: pool.table.shape.clone() },
        target: pool.targets.spec(),
        recipe: pool.recipe,
        affine: Some(affine.clone()),
        pictures,
        sizes: None,
    };
    let affine = pool.table.round(&affine, &pool.place)?;
    let (table, targets) = (Arc::new(pool.table), Arc::new(pool.targets));
    let view = |indices: Vec<u32>, augment: Option<Augment>| -> Arc<dyn Dataset> {
        let (table, targets) = (Arc::clone(&table), Arc::clone(&targets));
        Arc::new(RealView { table, targets, indices, affine: affine.clone(), augment })
    };
    let held = |indices: Vec<u32>| (!indices.is_empty()).then(|| view(indices, None));
    let splits =
        Splits { validation: held(parts.validation), test: held(parts.test), train: view(parts.train, augment) };
    Ok((splits, preprocess, pool.place.display().to_string()))
}

/// Splits of tokens.
fn of_tokens(
    (place, splits, recipe): (std::path::PathBuf, Splits, Recipe),
    options: &DataOptions,
) -> Result<(Splits, Preprocess, String)> {
    let name = options.format.name();
    if options.augment != AugmentOptions::default() {
        return Err(Error::config(
            "data.augment",
            format!("found it set, but format = \"{name}\" has no augmentations"),
        ));
    }
    if options.normalize.is_some() {
        return Err(Error::config(
            "data.normalize",
            format!("found it set, but format = \"{name}\" has no real inputs"),
        ));
    }
    let preprocess = Preprocess {
        input: splits.train.input(),
        target: splits.train.target(),
        recipe,
        affine: None,
        pictures: None,
        sizes: None,
    };
    Ok((splits, preprocess, place.display().to_string()))
}
