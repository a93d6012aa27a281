//! One labelled text a line: a file a class, or `label<TAB>text`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::dataset::{LabelledTokens, TargetTable};
use super::super::options::{LinesOptions, SplitOptions};
use super::super::preprocess::Recipe;
use super::super::source::{Lookup, files_that, read_text};
use super::super::words::Words;
use super::super::{Dataset, Splits, split};
use super::{not_empty, numbered, room};
use crate::error::{Error, Result};

/// Most words that `data.length` may ask of a line.
const MOST_WORDS: usize = 1 << 16;

/// All lines, before they are split.
#[derive(Default)]
struct Lines {
    texts: Vec<String>,
    labels: Vec<String>,
    /// Number of each among the samples of its file, from 0: blank lines are none.
    ordinals: Vec<u32>,
    /// Number of each among the lines of its file, from 1.
    numbers: Vec<usize>,
    files: Vec<String>,
}

/// The splits of labelled lines and what `predict` needs.
pub(crate) fn open(
    options: &LinesOptions,
    splits: &SplitOptions,
    lookup: &Lookup,
    seed: u64,
) -> Result<(PathBuf, Splits, Recipe)> {
    if let Some(length) = options.length.filter(|length| !(1..=MOST_WORDS).contains(length)) {
        return Err(Error::config(
            "data.length",
            format!("found {length}, expected 1 to {MOST_WORDS}; without the key, the longest line gives it"),
        ));
    }
    let place = lookup.find(&options.path)?;
    let mut lines = Lines::default();
    if !options.classes.is_empty() {
        for (class, file) in &options.classes {
            let beside = place.join(file);
            lines.add_class(&if beside.is_file() { beside } else { lookup.file_for("data.classes", file)? }, class)?;
        }
    } else if place.is_dir() {
        for (class, file) in by_name(&place)? {
            lines.add_class(&file, &class)?;
        }
    } else {
        lines.add_labelled(&place)?;
    }
    let train = lines.texts.len();
    not_empty(&place, "line", train)?;
    let known: std::collections::HashSet<String> = lines.labels.iter().cloned().collect();
    let mut ends = [train; 2];
    let own = [("data.validation", &options.validation), ("data.test", &options.test)];
    for ((key, file), end) in own.into_iter().zip(&mut ends) {
        if let Some(file) = file {
            let path = lookup.file_for(key, file)?;
            let first = lines.texts.len();
            lines.add_labelled(&path)?;
            if let Some(i) = (first..lines.texts.len()).find(|i| !known.contains(&lines.labels[*i])) {
                return Err(Error::data(
                    path,
                    format!(
                        "line {}: found the class {:?}, which the training lines do not have",
                        lines.numbers[i], lines.labels[i]
                    ),
                ));
            }
        }
        *end = lines.texts.len();
    }
    let (names, labels) = numbered(lines.labels.iter().map(String::as_str));
    let facts = split::Facts {
        len: lines.texts.len(),
        classes: Some(&labels),
        ordinals: Some(&lines.ordinals),
        names: Some(&lines.files),
        pattern: None,
        own_validation: train..ends[0],
        own_test: ends[0].max(train)..ends[1].max(ends[0]),
    };
    let parts = split::divide(&place, &facts, splits, seed)?;
    let text = |i: &u32| lines.texts[*i as usize].as_str();
    let words =
        Words::build(parts.train.iter().map(text), options.words, options.lowercase, options.min_count, options.length);
    let (length, vocabulary) = (words.length(), words.vocabulary());
    let mut values = room::<i32>(&place, lines.texts.len(), length)?;
    for (out, text) in values.chunks_exact_mut(length).zip(&lines.texts) {
        out.copy_from_slice(&words.encode(text));
    }
    let values = Arc::new(values);
    let targets = Arc::new(TargetTable::Class { labels, names });
    let view = |indices: Vec<u32>| -> Arc<dyn Dataset> {
        let (values, targets) = (Arc::clone(&values), Arc::clone(&targets));
        Arc::new(LabelledTokens { values, length, vocabulary, targets, indices })
    };
    let held = |indices: Vec<u32>| (!indices.is_empty()).then(|| view(indices));
    let splits = Splits { validation: held(parts.validation), test: held(parts.test), train: view(parts.train) };
    Ok((place, splits, Recipe::Line { words }))
}

/// A split with a file of its own, `file` by `key`, for a model that knows these words and classes.
pub(crate) fn own_split(
    key: &str,
    file: &Path,
    lookup: &Lookup,
    words: &Words,
    names: &[String],
) -> Result<Arc<dyn Dataset>> {
    let path = lookup.file_for(key, file)?;
    let mut lines = Lines::default();
    lines.add_labelled(&path)?;
    let numbers: HashMap<&str, i32> = names.iter().map(String::as_str).zip(0..).collect();
    let label = |(label, number): (&String, &usize)| {
        numbers.get(&**label).copied().ok_or_else(|| {
            Error::data(&path, format!("line {number}: found the class {label:?}, which the model was not trained on"))
        })
    };
    let labels = lines.labels.iter().zip(&lines.numbers).map(label).collect::<Result<Vec<_>>>()?;
    let indices = (0..labels.len() as u32).collect();
    let values = lines.texts.iter().flat_map(|text| words.encode(text)).collect();
    Ok(Arc::new(LabelledTokens {
        values: Arc::new(values),
        length: words.length(),
        vocabulary: words.vocabulary(),
        targets: Arc::new(TargetTable::Class { labels, names: names.to_vec() }),
        indices,
    }))
}

/// The files of a folder with the class that each name tells: its stem, or its ending where all stems are the same.
fn by_name(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let files = files_that(folder, |_| true)?;
    not_empty(folder, "text file", files.len())?;
    let stem = |p: &Path| p.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let same = files.len() > 1 && files.iter().all(|f| stem(f) == stem(&files[0]));
    let ending = |p: &Path| p.extension().unwrap_or_default().to_string_lossy().into_owned();
    Ok(files.into_iter().map(|f| (if same { ending(&f) } else { stem(&f) }, f)).collect())
}

impl Lines {
    /// Appends the sample of line `number` of a file whose first sample is number `first` of all.
    fn push(&mut self, path: &Path, first: usize, number: usize, label: &str, text: &str) {
        self.ordinals.push((self.texts.len() - first) as u32);
        self.numbers.push(number);
        self.texts.push(text.to_string());
        self.labels.push(label.to_string());
        self.files.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }

    /// Every line of a file that is not blank is a sample of `class`.
    fn add_class(&mut self, path: &Path, class: &str) -> Result<()> {
        let text = read_text(path)?;
        let first = self.texts.len();
        for (number, line) in (1..).zip(text.lines()) {
            if !line.trim().is_empty() {
                self.push(path, first, number, class, line);
            }
        }
        not_empty(path, "line", self.texts.len() - first)
    }

    /// Every line of a file that is not blank is a label, a tab and a text.
    fn add_labelled(&mut self, path: &Path) -> Result<()> {
        let text = read_text(path)?;
        let first = self.texts.len();
        for (number, line) in (1..).zip(text.lines()) {
            if line.trim().is_empty() {
                continue;
            }
            match line.split_once('\t') {
                Some((label, text)) if !label.trim().is_empty() => self.push(path, first, number, label.trim(), text),
                _ => {
                    return Err(Error::data(
                        path,
                        format!("line {number}: found no label, expected a label, a tab and a text"),
                    ));
                }
            }
        }
        not_empty(path, "line", self.texts.len() - first)
    }
}
