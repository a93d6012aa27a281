//! IDX, the format of MNIST: two zero bytes, a type, the number of dimensions, the dimensions as big-endian `u32`, values.

use std::path::{Path, PathBuf};

use super::super::augment::Subject;
use super::super::dataset::{RealTable, TargetTable, Values};
use super::super::options::{IdxOptions, Normalize};
use super::super::preprocess::Recipe;
use super::super::source::{self, Lookup};
use super::{Pool, instead_of};
use crate::error::{Error, Result};

/// Most classes that labels may tell of; those of bytes tell of 256.
const MOST_CLASSES: usize = 1 << 16;

/// An array of an IDX file.
struct Array {
    dims: Vec<usize>,
    values: Values,
}

/// Opens the four (or two) files.
pub(crate) fn open(options: &IdxOptions, lookup: &Lookup) -> Result<Pool> {
    if let Some(classes) = options.classes.filter(|classes| !(2..=MOST_CLASSES).contains(classes)) {
        return Err(Error::config("data.classes", format!("found {classes}, expected 2 to {MOST_CLASSES}")));
    }
    let folder = options.path.as_deref().map(|p| lookup.find(p)).transpose()?;
    let pick =
        |given: &Option<PathBuf>, key: &str, split: &[&str], kind: &[&str], required: bool| match (given, &folder) {
            (Some(path), Some(folder)) if folder.join(path).is_file() => Ok(Some(folder.join(path))),
            (Some(path), _) => lookup.file_for(&format!("data.{key}"), path).map(Some),
            (None, Some(folder)) => by_name(folder, key, split, kind, required),
            (None, None) if required => Err(Error::config(
                format!("data.{key}"),
                "found neither data.path nor this key, expected one of them: a folder, or the file",
            )),
            (None, None) => Ok(None),
        };
    const IMAGES: [&str; 2] = ["images", "idx3"];
    const LABELS: [&str; 2] = ["labels", "idx1"];
    const TEST: [&str; 2] = ["t10k", "test"];
    let images = pick(&options.images, "images", &["train"], &IMAGES, true)?;
    let labels = pick(&options.labels, "labels", &["train"], &LABELS, true)?;
    let (Some(images), Some(labels)) = (images, labels) else {
        return Err(Error::config("data.images", "found no file of training samples"));
    };
    // Files given one by one and no test among them: then there is none.
    let folder_test = options.images.is_none() || options.test_images.is_some();
    let test_images =
        if folder_test { pick(&options.test_images, "test_images", &TEST, &IMAGES, false)? } else { None };
    let test_labels = match &test_images {
        Some(_) => pick(&options.test_labels, "test_labels", &TEST, &LABELS, true)?,
        None => None,
    };

    let (array, mut labels_all) = pair(&images, &labels, None)?;
    let Array { dims, mut values } = array;
    let train = dims[0];
    let most = labels_all.iter().copied().max().unwrap_or(0);
    let white = white(&values);
    if let Some((image_path, label_path)) = test_images.zip(test_labels) {
        let (array, labels) = pair(&image_path, &label_path, Some(&dims[1..]))?;
        match (&mut values, array.values) {
            (Values::Bytes(all), Values::Bytes(more)) => all.extend(more),
            (Values::Floats(all), Values::Floats(more)) => all.extend(more),
            _ => {
                return Err(Error::data(image_path, format!("holds another type of values than {}", images.display())));
            }
        }
        let known = options.classes.unwrap_or(most as usize + 1);
        within(&label_path, &labels, known)?;
        labels_all.extend(labels);
    }
    let classes = options.classes.unwrap_or(most as usize + 1);
    within(&labels, &labels_all[..train], classes)?;
    let total = labels_all.len();
    let bytes = matches!(values, Values::Bytes(_));
    let full_scale = if bytes { 255.0 } else { 1.0 };
    let (shape, picture) = match dims[1..] {
        [height, width] => (vec![1, height, width], true),
        [channels, height, width] => (vec![channels, height, width], true),
        _ => (dims[1..].to_vec(), false),
    };
    let recipe = match white {
        Some(full_scale) if picture => {
            Recipe::Image { channels: shape[0], height: shape[1], width: shape[2], full_scale }
        }
        _ => Recipe::values(shape.iter().product()),
    };
    Ok(Pool {
        place: images,
        table: RealTable { channels: if picture { shape[0] } else { 1 }, shape, full_scale, background: 0.0, values },
        targets: TargetTable::Class { labels: labels_all, names: (0..classes).map(|c| c.to_string()).collect() },
        names: None,
        pattern: None,
        own_validation: total..total,
        own_test: train..total,
        subject: if picture { Subject::Picture } else { Subject::Other },
        normalize: Normalize::Unit,
        pictures: None,
        recipe,
    })
}

/// The value that stands for white in pictures of these values, so that a PNG or JPEG can be brought to them: 255 for bytes; for
/// other types the least of 1, 255 and 65535 that none is above. None where no such is known, since some are below 0 or above
/// all of these.
fn white(values: &Values) -> Option<f32> {
    let Values::Floats(values) = values else { return Some(255.0) };
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    [1.0, 255.0, 65535.0].into_iter().find(|white| low >= 0.0 && high <= *white)
}

/// The file of `folder` whose name has one of `split` and one of `kind`.
fn by_name(folder: &Path, key: &str, split: &[&str], kind: &[&str], required: bool) -> Result<Option<PathBuf>> {
    if !folder.is_dir() {
        return Err(Error::data(
            folder,
            "is a file, expected a folder with IDX files; or give data.images and data.labels",
        ));
    }
    let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let has = |name: &str, parts: &[&str]| parts.iter().any(|p| name.contains(p));
    let mut found = source::files_that(folder, |p| has(&name(p), split) && has(&name(p), kind))?;
    if found.len() > 1 {
        // A file and its packed twin are one.
        let all = found.clone();
        found.retain(|p| !(name(p).ends_with(".gz") && all.contains(&p.with_extension(""))));
    }
    match found.len() {
        0 if required => Err(Error::data(
            folder,
            format!(
                "found no file for data.{key}: expected a name with {:?} and {:?} in it, or that key",
                split[0], kind[0]
            ),
        )),
        0 => Ok(None),
        1 => Ok(found.pop()),
        _ => {
            let names: Vec<String> = found.iter().map(|p| name(p)).collect();
            Err(Error::data(
                folder,
                format!("found several files for data.{key}: {}; name one by that key", names.join(", ")),
            ))
        }
    }
}

/// Samples and their labels, which must be as many.
fn pair(images: &Path, labels: &Path, shape: Option<&[usize]>) -> Result<(Array, Vec<i32>)> {
    let array = parse(images, source::read(images)?)?;
    if array.dims.len() < 2 {
        return Err(Error::data(
            images,
            format!("found dimensions {:?}, expected samples and their values", array.dims),
        ));
    }
    if array.dims.contains(&0) {
        return Err(Error::data(images, format!("found dimensions {:?}, expected none of them 0", array.dims)));
    }
    if let Some(shape) = shape.filter(|s| **s != array.dims[1..]) {
        return Err(Error::data(
            images,
            format!("found samples of shape {:?}, expected {shape:?} as in the training split", &array.dims[1..]),
        ));
    }
    let numbers = parse(labels, source::read(labels)?)?;
    if numbers.dims.len() != 1 {
        return Err(Error::data(
            labels,
            format!("found dimensions {:?}, expected one: a label a sample", numbers.dims),
        ));
    }
    if numbers.dims[0] != array.dims[0] {
        return Err(Error::data(
            labels,
            format!("holds {} labels, but {} holds {} samples", numbers.dims[0], images.display(), array.dims[0]),
        ));
    }
    let as_label = |(i, value): (usize, f32)| {
        if value >= 0.0 && value.fract() == 0.0 && value < MOST_CLASSES as f32 {
            return Ok(value as i32);
        }
        let most = MOST_CLASSES - 1;
        Err(Error::data(labels, format!("label {i} is {value}, expected a whole number from 0 to {most}; correct it")))
    };
    let labels = match numbers.values {
        Values::Floats(values) => values.into_iter().enumerate().map(as_label).collect::<Result<_>>()?,
        Values::Bytes(values) => values.into_iter().map(i32::from).collect(),
        Values::Doubles(_) | Values::Files(_) => Vec::new(),
    };
    Ok((array, labels))
}

fn within(path: &Path, labels: &[i32], classes: usize) -> Result<()> {
    match labels.iter().position(|l| *l as usize >= classes) {
        Some(i) => Err(Error::data(
            path,
            format!(
                "label {i} is {}, expected a class from 0 to {}; correct data.classes or the file",
                labels[i],
                classes.saturating_sub(1)
            ),
        )),
        None => Ok(()),
    }
}

fn parse(path: &Path, mut bytes: Vec<u8>) -> Result<Array> {
    let wrong = |problem: String| Err(Error::data(path, problem));
    let (kind, rank) = match bytes.get(..4) {
        Some([0, 0, kind, rank]) => (*kind, usize::from(*rank)),
        Some(magic) => {
            return wrong(format!("found the first bytes {magic:02x?}, expected an IDX file, which starts with 00 00"));
        }
        None => return wrong(format!("holds {} bytes, expected an IDX header of 4 and more", bytes.len())),
    };
    let width = match kind {
        0x08 | 0x09 => 1,
        0x0b => 2,
        0x0c | 0x0d => 4,
        0x0e => 8,
        _ => return wrong(format!("found the value type 0x{kind:02x}, expected 08, 09, 0b, 0c, 0d or 0e")),
    };
    let header = 4 + 4 * rank;
    let Some(dims) = bytes.get(4..header) else {
        return wrong(format!("cut short: {} bytes, expected a header of {header}", bytes.len()));
    };
    let dims: Vec<usize> =
        dims.chunks_exact(4).map(|d| u32::from_be_bytes([d[0], d[1], d[2], d[3]]) as usize).collect();
    let expected = dims.iter().try_fold(width, |n: usize, d| n.checked_mul(*d)).and_then(|n| n.checked_add(header));
    if expected != Some(bytes.len()) {
        let expected = expected.map_or("far more".to_string(), |n| n.to_string());
        return wrong(format!(
            "holds {} bytes, expected {expected} for dimensions {dims:?}; fetch the file again",
            bytes.len()
        ));
    }
    bytes.drain(..header);
    let told = |i: usize, value: f64| format!("value {i} is {value:?}, expected {}", instead_of(value));
    let values = match kind {
        0x08 => Values::Bytes(bytes),
        0x09 => Values::Floats(bytes.iter().map(|b| f32::from(*b as i8)).collect()),
        0x0b => Values::Floats(bytes.chunks_exact(2).map(|b| f32::from(i16::from_be_bytes([b[0], b[1]]))).collect()),
        0x0c => Values::Floats(words(&bytes).map(|w| w as i32 as f32).collect()),
        0x0d => Values::Floats(words(&bytes).map(f32::from_bits).collect()),
        _ => {
            let double = |b: &[u8]| f64::from_bits(words(b).fold(0, |high, low| high << 32 | u64::from(low)));
            let doubles = bytes.chunks_exact(8).map(double);
            if let Some((i, value)) = doubles.clone().enumerate().find(|(_, value)| !(*value as f32).is_finite()) {
                return wrong(told(i, value));
            }
            Values::Floats(doubles.map(|value| value as f32).collect())
        }
    };
    if let Values::Floats(values) = &values
        && let Some(i) = values.iter().position(|v| !v.is_finite())
    {
        return wrong(told(i, f64::from(values[i])));
    }
    Ok(Array { dims, values })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}
