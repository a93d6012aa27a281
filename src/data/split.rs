//! Which samples are trained on and which are held out.

use std::ops::Range;
use std::path::Path;

use regex::Regex;

use super::options::{Part, SplitOptions};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// Added to the stream that samples of a split are drawn by, for the stream by which ties between classes are.
const TIES: u32 = 2;

/// Numbers of the samples of each split, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    pub train: Vec<u32>,
    pub validation: Vec<u32>,
    pub test: Vec<u32>,
}

/// What is known of the samples before they are split.
#[derive(Default)]
pub(crate) struct Facts<'a> {
    /// Number of samples.
    pub len: usize,
    /// The class of each.
    pub classes: Option<&'a [i32]>,
    /// Number of each within its file, from 0.
    pub ordinals: Option<&'a [u32]>,
    /// Name of each sample's file.
    pub names: Option<&'a [String]>,
    /// `data.pattern`.
    pub pattern: Option<&'a Regex>,
    /// Samples that the files hold out for validation.
    pub own_validation: Range<usize>,
    /// Samples that the files hold out for the test.
    pub own_test: Range<usize>,
}

/// Divides the samples of `place`.
pub(crate) fn divide(place: &Path, facts: &Facts<'_>, options: &SplitOptions, seed: u64) -> Result<Parts> {
    let len = u32::try_from(facts.len).map_err(|_| Error::data(place, "more than 4,294,967,295 samples"))?;
    for (key, own, asked) in [
        ("data.split.validation", &facts.own_validation, &options.validation),
        ("data.split.test", &facts.own_test, &options.test),
    ] {
        if !own.is_empty() && asked.is_some() {
            let problem =
                format!("the files of {} hold out {} samples already; remove the key", place.display(), own.len());
            return Err(Error::config(key, problem));
        }
    }
    let mut parts = Parts {
        train: Vec::new(),
        validation: (facts.own_validation.start as u32..facts.own_validation.end as u32).collect(),
        test: (facts.own_test.start as u32..facts.own_test.end as u32).collect(),
    };
    let mut rest: Vec<u32> = (0..len)
        .filter(|i| !facts.own_validation.contains(&(*i as usize)) && !facts.own_test.contains(&(*i as usize)))
        .collect();
    let total = rest.len();
    let philox = |stream| Philox::new(options.seed.unwrap_or(seed), Purpose::Split, stream);
    let stratify = options.stratify.unwrap_or(facts.classes.is_some());
    for (key, part, into, stream) in [
        ("data.split.test", &options.test, &mut parts.test, 0),
        ("data.split.validation", &options.validation, &mut parts.validation, 1),
    ] {
        let Some(part) = part else { continue };
        let chosen = match count(key, part, total, rest.len())? {
            Some(count) => match facts.classes.filter(|_| stratify) {
                Some(classes) => choose_by_class(&rest, classes, count, &philox(stream), &philox(stream + TIES)),
                None => choose(&rest, count, &philox(stream)),
            },
            None => matching(key, part, &rest, facts)?,
        };
        if chosen.is_empty() {
            let advice = match part {
                Part::Fraction(_) => "give a larger share, or a count such as 1",
                Part::Count(_) => "expected 1 or more, or leave the key out",
                Part::Every(_) => "give a number that the samples of a file reach",
                _ => "give a rule that fits the names of some files",
            };
            return Err(Error::config(key, format!("found {part}, which holds out none of {total} samples; {advice}")));
        }
        rest.retain(|i| chosen.binary_search(i).is_err());
        *into = chosen;
    }
    if rest.is_empty() {
        return Err(Error::data(place, format!("no sample is left to train on out of {len}; check data.split")));
    }
    parts.train = rest;
    Ok(parts)
}

/// How many samples a share or a count means; none for the other kinds.
fn count(key: &str, part: &Part, total: usize, left: usize) -> Result<Option<usize>> {
    let count = match part {
        Part::Fraction(share) if *share > 0.0 && *share < 1.0 => (total as f64 * share).round() as usize,
        Part::Fraction(share) => {
            return Err(Error::config(key, format!("found {share}, expected a share above 0 and below 1, or a count")));
        }
        Part::Count(count) => *count,
        _ => return Ok(None),
    };
    if count >= left {
        return Err(Error::config(
            key,
            format!("found {count} samples, expected fewer than the {left} that are left, so that some are trained on"),
        ));
    }
    Ok(Some(count))
}

fn choose(rest: &[u32], count: usize, philox: &Philox) -> Vec<u32> {
    let mut order = rest.to_vec();
    philox.shuffle(&mut order);
    order.truncate(count);
    order.sort_unstable();
    order
}

/// `count` of `rest`, each class by its share; what rounding leaves goes to the classes with the largest remainders, drawn by `ties`
/// where these are the same.
fn choose_by_class(rest: &[u32], classes: &[i32], count: usize, philox: &Philox, ties: &Philox) -> Vec<u32> {
    let width = rest.iter().map(|i| classes[*i as usize] as usize + 1).max().unwrap_or(0);
    let mut by_class = vec![Vec::new(); width];
    let mut order = rest.to_vec();
    philox.shuffle(&mut order);
    for i in order {
        by_class[classes[i as usize] as usize].push(i);
    }
    let exact = |members: &Vec<u32>| members.len() * count;
    let mut take: Vec<usize> = by_class.iter().map(|m| exact(m) / rest.len()).collect();
    let mut by_remainder: Vec<usize> = (0..width).collect();
    ties.shuffle(&mut by_remainder);
    by_remainder.sort_by_key(|c| std::cmp::Reverse(exact(&by_class[*c]) % rest.len()));
    let missing = count - take.iter().sum::<usize>();
    for class in by_remainder.into_iter().take(missing) {
        take[class] += 1;
    }
    let mut chosen: Vec<u32> =
        by_class.iter().zip(take).flat_map(|(members, take)| members[..take].iter().copied()).collect();
    chosen.sort_unstable();
    chosen
}

/// The samples of `rest` that a rule names.
fn matching(key: &str, part: &Part, rest: &[u32], facts: &Facts<'_>) -> Result<Vec<u32>> {
    let names =
        || facts.names.ok_or_else(|| Error::config(key, "found a rule on file names, but samples are no files"));
    let group = |field: &str| {
        let pattern = facts.pattern.ok_or_else(|| {
            Error::config(key, format!("found the field {field:?}, which needs data.pattern with a group of that name"))
        })?;
        if !pattern.capture_names().flatten().any(|name| name == field) {
            let known: Vec<&str> = pattern.capture_names().flatten().collect();
            return Err(Error::config(
                key,
                format!("found the field {field:?}, expected a group of data.pattern: {}", known.join(", ")),
            ));
        }
        Ok(pattern)
    };
    let capture = |pattern: &Regex, name: &str, field: &str| -> Option<String> {
        captures(pattern, name).and_then(|c| c.name(field)).map(|m| m.as_str().to_string())
    };
    let mut chosen = Vec::new();
    match part {
        Part::Every(0) => return Err(Error::config(key, "found every = 0, expected 2 or more")),
        Part::Every(every) => {
            let ordinal = |i: u32| facts.ordinals.map_or(i, |o| o[i as usize]) as usize;
            chosen.extend(rest.iter().filter(|i| (ordinal(**i) + 1).is_multiple_of(*every)));
        }
        Part::Pattern(pattern) => {
            let pattern = regex(key, pattern)?;
            let names = names()?;
            chosen.extend(rest.iter().filter(|i| {
                let name = &names[**i as usize];
                pattern.is_match(name) || pattern.is_match(without_ending(name))
            }));
        }
        Part::Values { field, values } => {
            let (pattern, names) = (group(field)?, names()?);
            chosen.extend(
                rest.iter()
                    .filter(|i| capture(pattern, &names[**i as usize], field).is_some_and(|v| values.contains(&v))),
            );
        }
        Part::Range { field, from, to } => {
            let (pattern, names) = (group(field)?, names()?);
            for i in rest {
                let name = &names[*i as usize];
                let Some(text) = capture(pattern, name, field) else { continue };
                let number: i64 = text.parse().map_err(|_| {
                    Error::config(key, format!("the field {field:?} of {name} is {text:?}, expected a whole number"))
                })?;
                if (*from..=*to).contains(&number) {
                    chosen.push(*i);
                }
            }
        }
        Part::Fraction(_) | Part::Count(_) => {}
    }
    Ok(chosen)
}

/// A regular expression that the user wrote.
pub(crate) fn regex(key: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| {
        let reason = e.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_string();
        Error::config(key, format!("found {pattern:?}, which is no regular expression: {reason}"))
    })
}

/// What `pattern` captures where it matches the whole of a file's name, without its folders, without or with its ending.
pub(crate) fn captures<'a>(pattern: &Regex, name: &'a str) -> Option<regex::Captures<'a>> {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    let whole = |text: &'a str| pattern.captures(text).filter(|c| c.get(0).is_some_and(|m| m.len() == text.len()));
    whole(without_ending(file)).or_else(|| whole(file))
}

fn without_ending(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

/// The ranges of a text of `len` tokens: training, validation, test, one after the other.
pub(crate) fn divide_text(place: &Path, len: usize, options: &SplitOptions) -> Result<[Range<usize>; 3]> {
    let mut train = len as f64;
    let mut sizes = [0, 0];
    for ((key, part), size) in
        [("data.split.validation", &options.validation), ("data.split.test", &options.test)].into_iter().zip(&mut sizes)
    {
        match part {
            None => {}
            Some(Part::Fraction(share)) if *share > 0.0 && *share < 1.0 => {
                // What is trained on is rounded down, as in nanoGPT; what is held out is the rest.
                *size = len - (len as f64 * (1.0 - share)) as usize;
            }
            Some(Part::Count(count)) if *count > 0 => *size = *count,
            Some(part) => {
                return Err(Error::config(
                    key,
                    format!(
                        "found {part}, expected a share above 0 and below 1, or a count of tokens, 1 or more: text is \
                         divided into one piece for each split"
                    ),
                ));
            }
        }
        train -= *size as f64;
    }
    if train < 1.0 {
        return Err(Error::data(place, format!("no token is left to train on out of {len}; check data.split")));
    }
    let first = len - sizes[0] - sizes[1];
    Ok([0..first, first..first + sizes[0], first + sizes[0]..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(classes: &[i32]) -> Facts<'_> {
        Facts { len: classes.len(), classes: Some(classes), ..Facts::default() }
    }

    #[test]
    fn every_sample_is_in_one_split_and_each_split_has_the_shares_of_the_classes() -> Result<()> {
        let classes: Vec<i32> = (0..1000).map(|i| if i % 10 < 7 { 0 } else { 1 + (i % 3) }).collect();
        let options =
            SplitOptions { validation: Some(Part::Count(100)), test: Some(Part::Fraction(0.2)), ..Default::default() };
        let parts = divide(Path::new("x"), &facts(&classes), &options, 7)?;
        assert_eq!((parts.train.len(), parts.validation.len(), parts.test.len()), (700, 100, 200));
        let mut all = [parts.train.clone(), parts.validation.clone(), parts.test.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<u32>>());
        for class in 0..4 {
            let share = |part: &[u32]| {
                part.iter().filter(|i| classes[**i as usize] == class).count() as f64 / part.len() as f64
            };
            assert!((share(&parts.test) - share(&all)).abs() <= 1.0 / 200.0, "class {class}");
        }
        let again = divide(Path::new("x"), &facts(&classes), &options, 7)?;
        assert_eq!(parts, again);
        assert_ne!(parts, divide(Path::new("x"), &facts(&classes), &options, 8)?);
        Ok(())
    }

    #[test]
    fn of_classes_with_the_same_share_the_seed_chooses_those_that_get_one_more() -> Result<()> {
        let classes: Vec<i32> = (0..80).map(|i| i % 20).collect();
        let options = SplitOptions { test: Some(Part::Fraction(0.1)), ..Default::default() };
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..40 {
            let test = divide(Path::new("x"), &facts(&classes), &options, seed)?.test;
            assert_eq!(test, divide(Path::new("x"), &facts(&classes), &options, seed)?.test);
            let held: std::collections::BTreeSet<i32> = test.iter().map(|i| classes[*i as usize]).collect();
            assert_eq!(held.len(), 8, "seed {seed}: one of each class that is chosen");
            seen.extend(held);
        }
        assert_eq!(seen.len(), 20, "each class is chosen by some seed");
        Ok(())
    }

    #[test]
    fn text_is_split_as_nanogpt_does() -> Result<()> {
        let options = SplitOptions { validation: Some(Part::Fraction(0.1)), ..Default::default() };
        let parts = divide_text(Path::new("x"), 1_115_394, &options)?;
        assert_eq!(parts, [0..1_003_854, 1_003_854..1_115_394, 1_115_394..1_115_394]);
        Ok(())
    }

    #[test]
    fn a_rule_on_a_group_of_the_name_holds_out_its_files() -> Result<()> {
        let pattern = regex("data.pattern", r"(?P<class>\d)_(?P<speaker>\w+)_(?P<index>\d+)")?;
        let names: Vec<String> = (0..12).map(|i| format!("3_theo_{i}.wav")).collect();
        let facts = Facts { len: 12, names: Some(&names), pattern: Some(&pattern), ..Default::default() };
        let range = |field: &str| SplitOptions {
            test: Some(Part::Range { field: field.into(), from: 0, to: 4 }),
            ..Default::default()
        };
        assert_eq!(divide(Path::new("x"), &facts, &range("index"), 1)?.test, [0, 1, 2, 3, 4]);
        let by_pattern = SplitOptions { test: Some(Part::Pattern("_[0-4]$".into())), ..Default::default() };
        assert_eq!(divide(Path::new("x"), &facts, &by_pattern, 1)?.test, [0, 1, 2, 3, 4]);
        let error = divide(Path::new("x"), &facts, &range("take"), 1).unwrap_err().to_string();
        assert!(error.contains("class, speaker, index"), "{error}");
        Ok(())
    }
}
