//! What bytes mean: one file a format.

pub(crate) mod audio;
pub(crate) mod csv;
pub(crate) mod digits;
pub(crate) mod idx;
pub(crate) mod images;
pub(crate) mod inline;
mod line_numbers;
pub(crate) mod lines;
pub(crate) mod text;
pub(crate) mod tokens;

use std::ops::Range;
use std::path::{Path, PathBuf};

use regex::Regex;

use super::augment::Subject;
use super::dataset::{RealTable, TargetTable};
use super::options::Normalize;
use super::pictures::Asked;
use super::preprocess::Recipe;
use super::reading::Reading;
use super::source::{ClassFile, Held};
use crate::error::{Error, Result};

/// All real-valued samples of a source, before they are split.
pub(crate) struct Pool {
    /// What errors about the whole are said of.
    pub place: PathBuf,
    pub table: RealTable,
    pub targets: TargetTable,
    /// The file of each sample, for split rules.
    pub names: Option<Vec<String>>,
    pub pattern: Option<Regex>,
    pub own_validation: Range<usize>,
    pub own_test: Range<usize>,
    pub subject: Subject,
    pub normalize: Normalize,
    pub recipe: Recipe,
    /// Pictures that the model is to make of the samples.
    pub pictures: Option<Asked>,
}

/// Sorts class names: by value where all are whole numbers, else by their letters.
pub fn natural_order(names: &mut [String]) {
    if names.iter().all(|n| n.parse::<i64>().is_ok()) {
        names.sort_by_key(|n| n.parse::<i64>().unwrap_or(0));
    } else {
        names.sort();
    }
}

/// The distinct names in their natural order, and the number of each of `cells`.
fn numbered<'a>(cells: impl Iterator<Item = &'a str> + Clone) -> (Vec<String>, Vec<i32>) {
    let mut names: Vec<String> = {
        let distinct: std::collections::BTreeSet<&str> = cells.clone().collect();
        distinct.into_iter().map(str::to_string).collect()
    };
    natural_order(&mut names);
    let number: std::collections::HashMap<&str, i32> =
        names.iter().enumerate().map(|(i, n)| (n.as_str(), i as i32)).collect();
    let labels = cells.map(|c| number[c]).collect();
    (names, labels)
}

/// The samples that files hold out themselves; `files` are sorted by that.
fn held(files: &[ClassFile], what: Held) -> Range<usize> {
    files.partition_point(|f| f.held < what)..files.partition_point(|f| f.held <= what)
}

/// Fills `out` by reading every file into its own chunk, on all cores; the error is that of the first file that has one, and those
/// after it are no longer read then.
fn read_all<T: Send, F: Sync>(
    reading: &Reading,
    files: &[F],
    out: &mut [T],
    each: usize,
    read: impl Fn(&F, &mut [T]) -> Result<()> + Sync,
) -> Result<()> {
    use rayon::prelude::*;
    reading.begin(files.len());
    let one = |(file, out)| {
        let found = read(file, out);
        reading.count();
        found
    };
    files.par_iter().zip(out.par_chunks_mut(each)).map(one).find_first(Result::is_err).unwrap_or(Ok(()))
}

/// Zeros for `count` samples of `each` values.
pub(super) fn room<T: Clone + Default>(place: &Path, count: usize, each: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    let total = count.saturating_mul(each);
    if values.try_reserve_exact(total).is_err() {
        let gib = total as f64 * size_of::<T>() as f64 / (1u64 << 30) as f64;
        return Err(Error::data(
            place,
            format!(
                "{count} samples of {each} values need {gib:.1} GiB of memory, more than there is; make them smaller"
            ),
        ));
    }
    values.resize(total, T::default());
    Ok(values)
}

/// What is expected in the place of `value`, of which f32 has no finite number.
fn instead_of(value: f64) -> &'static str {
    if value.is_finite() { "a number within the range of f32, up to 3.4e38 either way" } else { "a finite number" }
}

/// An empty source is no source.
fn not_empty(place: &Path, what: &str, count: usize) -> Result<()> {
    if count == 0 {
        return Err(Error::data(place, format!("holds no {what}, expected at least one")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn after_a_file_that_cannot_be_read_the_others_are_left() {
        let files: Vec<usize> = (0..4000).collect();
        let (read, reading) = (AtomicUsize::new(0), Reading::default());
        assert_eq!(reading.files(), None);
        let error = read_all(&reading, &files, &mut [0u8; 4000], 1, |number, _| {
            read.fetch_add(1, Ordering::Relaxed);
            if *number < 3 {
                return Err(Error::data(format!("{number}.png"), "is damaged"));
            }
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        });
        assert_eq!(error.unwrap_err().to_string(), "0.png: is damaged");
        assert!(read.load(Ordering::Relaxed) < 1000, "{read:?} of 4000 were read");
        assert_eq!(reading.files(), Some((read.into_inner(), 4000)));
    }
}
