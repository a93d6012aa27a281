//! Every data format gives the samples that its files hold, and says clearly what is wrong with those that do not.

use std::error::Error as StdError;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use warpstep::data::augment::AugmentOptions;
use warpstep::data::options::{
    AudioFeatures, AudioOptions, Column, CsvOptions, IdxOptions, ImagesOptions, InlineOptions, InlineTargets,
    LinesOptions, Normalize, Part, Sampling, SplitOptions, TargetKind, TextOptions, TokensOptions,
};
use warpstep::data::{
    Batch, DataOptions, Dataset, FormatOptions, InputSpec, Inputs, Loader, OpenedData, Pick, Prefetch, Preprocess,
    TargetSpec, Targets, TokenizerKind, inspect, open, read_batch,
};
use warpstep::plan::Share;

mod media;
mod options;
mod sequences;
mod tables;

type TestResult = Result<(), Box<dyn StdError>>;

/// Where the shared data sets are, or none.
fn shared(name: &str) -> Option<PathBuf> {
    let places = [std::env::var_os("WARPSTEP_DATA").map(PathBuf::from), Some("../shared/data".into())];
    let found = places.into_iter().flatten().map(|p| p.join(name)).find(|p| p.exists());
    if found.is_none() {
        println!("skipped: no {name} in $WARPSTEP_DATA or ../shared/data");
    }
    found
}

fn read(dataset: &dyn Dataset, picks: &[Pick]) -> warpstep::Result<Batch> {
    let mut batch = Batch::zeros(&dataset.input(), &dataset.target(), 0);
    read_batch(dataset, picks, None, &mut batch)?;
    Ok(batch)
}

fn reals(inputs: &Inputs) -> &[f32] {
    match inputs {
        Inputs::Real(values) => values,
        Inputs::Tokens(_) => panic!("expected real inputs"),
    }
}

fn tokens(inputs: &Inputs) -> &[i32] {
    match inputs {
        Inputs::Tokens(values) => values,
        Inputs::Real(_) => panic!("expected tokens"),
    }
}

fn labels(targets: &Targets) -> &[i32] {
    match targets {
        Targets::Index(values) => values,
        Targets::Real(_) => panic!("expected whole-number targets"),
    }
}

fn sizes(data: &OpenedData) -> [usize; 3] {
    let len = |split: &Option<Arc<dyn Dataset>>| split.as_ref().map_or(0, |s| s.len());
    [data.splits.train.len(), len(&data.splits.validation), len(&data.splits.test)]
}

fn split(validation: Option<Part>, test: Option<Part>) -> SplitOptions {
    SplitOptions { validation, test, ..SplitOptions::default() }
}

/// The message of an error that must come, which must be the user's and have all of `parts`.
fn refused(options: &DataOptions, parts: &[&str]) {
    let error = match open(options, None, 1) {
        Ok(data) => match read(&*data.splits.train, &[Pick::Sample(0)]) {
            Ok(_) => panic!("expected an error that tells of {parts:?}"),
            Err(error) => error,
        },
        Err(error) => error,
    };
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    assert!(!text.contains('\n'), "{text}");
    for part in parts {
        assert!(text.contains(part), "expected {part:?} in: {text}");
    }
}

fn text_options(path: &Path, tokenizer: TokenizerKind, context: usize) -> DataOptions {
    DataOptions::new(FormatOptions::Text(TextOptions { path: path.into(), tokenizer, context, ..Default::default() }))
}
