//! Samples of real values.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::augment::Augment;
use super::super::{Affine, Dataset, Draw, InputMut, InputSpec, Pick, TargetMut, TargetSpec};
use crate::error::{Error, Result};

/// Values that are decoded when they are read.
pub(crate) trait Decode: Send + Sync {
    /// Writes the raw values of one sample (`=`).
    fn decode(&self, index: usize, out: &mut [f32]) -> Result<()>;
}

/// The raw values of all samples, one after the other.
pub(crate) enum Values {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
    /// Of tables of numbers, until they are normalized.
    Doubles(Vec<f64>),
    Files(Box<dyn Decode>),
}

/// All samples of a source, whatever split they belong to.
pub(crate) struct RealTable {
    pub shape: Vec<usize>,
    /// The first dimension that has its own mean; values are `[samples, channels, ..]`.
    pub channels: usize,
    /// The raw value that stands for 1.
    pub full_scale: f32,
    /// The raw value of nothing: black, silence.
    pub background: f32,
    pub values: Values,
}

impl RealTable {
    /// Values in one sample.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The raw values of sample `index` (`=`).
    pub fn raw(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let elements = self.elements();
        match &self.values {
            Values::Bytes(values) => {
                let values = &values[index * elements..][..elements];
                out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from(*value));
            }
            Values::Floats(values) => out.copy_from_slice(&values[index * elements..][..elements]),
            Values::Doubles(values) => {
                let values = &values[index * elements..][..elements];
                out.iter_mut().zip(values).for_each(|(out, value)| *out = *value as f32);
            }
            Values::Files(files) => files.decode(index, out)?,
        }
        Ok(())
    }

    /// The raw values of sample `index` with all their digits (`=`).
    pub fn wide(&self, index: usize, out: &mut [f64]) -> Result<()> {
        let elements = self.elements();
        if let Values::Doubles(values) = &self.values {
            out.copy_from_slice(&values[index * elements..][..elements]);
            return Ok(());
        }
        let mut values = vec![0.0; elements];
        self.raw(index, &mut values)?;
        out.iter_mut().zip(values).for_each(|(out, value)| *out = f64::from(value));
        Ok(())
    }

    /// Normalizes values of f64 and rounds them; what is left to do for samples as they are read. Values of other types stay as
    /// they are.
    pub fn round(&mut self, affine: &Affine, place: &Path) -> Result<Affine> {
        let elements = self.elements();
        let Values::Doubles(wide) = &self.values else { return Ok(affine.clone()) };
        let mut values = Vec::with_capacity(wide.len());
        for (row, sample) in wide.chunks(elements).enumerate() {
            let rounded = affine.rounded(sample).map_err(|value| {
                Error::data(
                    place,
                    format!(
                        "sample {row}: {value} is out of the range of f32 once it is normalized; correct it, or set \
                         data.normalize = \"none\""
                    ),
                )
            })?;
            values.extend(rounded);
        }
        self.values = Values::Floats(values);
        Ok(Affine::uniform(self.channels, 1.0))
    }
}

/// The targets of all samples.
pub(crate) enum TargetTable {
    Class { labels: Vec<i32>, names: Vec<String> },
    Real { values: Vec<f32>, width: usize, places: Places },
}

/// Where real targets stand, for errors.
pub(crate) enum Places {
    /// In the run file: rows of `data.targets`.
    RunFile,
    /// In tables: the line of each row, and the files, each with the number of its first row and its target columns.
    Tables { lines: Vec<u64>, files: Vec<(usize, PathBuf, Vec<usize>)> },
}

impl Places {
    /// An error about target `column` of `row`.
    fn error(&self, row: usize, column: usize, problem: &str) -> Error {
        let (lines, files) = match self {
            Places::RunFile => return Error::config("data.targets", format!("row {row}: {problem}")),
            Places::Tables { lines, files } => (lines, files),
        };
        let file = files.iter().rev().find(|(first, ..)| *first <= row);
        let (path, columns) = file.map_or((PathBuf::new(), &[][..]), |(_, path, columns)| (path.clone(), &columns[..]));
        let (line, column) = (lines.get(row).copied().unwrap_or(0), columns.get(column).map_or(0, |column| column + 1));
        Error::data(path, format!("line {line}, column {column}: {problem}"))
    }
}

impl TargetTable {
    pub fn spec(&self) -> TargetSpec {
        match self {
            TargetTable::Class { names, .. } => TargetSpec::Class { names: names.clone() },
            TargetTable::Real { width, .. } => TargetSpec::Real { width: *width },
        }
    }

    /// Writes the targets of sample `index` (`=`).
    pub fn read(&self, index: usize, out: TargetMut<'_>) -> Result<()> {
        match self {
            TargetTable::Class { labels, .. } => out.index()?[0] = labels[index],
            TargetTable::Real { values, width, .. } => out.real()?.copy_from_slice(&values[index * width..][..*width]),
        }
        Ok(())
    }

    /// How many of `indices` each class has.
    pub fn counts(&self, indices: &[u32]) -> Option<Vec<usize>> {
        let TargetTable::Class { labels, names } = self else { return None };
        let mut counts = vec![0; names.len()];
        for index in indices {
            counts[labels[*index as usize] as usize] += 1;
        }
        Some(counts)
    }
}

/// One split of a [`RealTable`].
pub(crate) struct RealView {
    pub table: Arc<RealTable>,
    pub targets: Arc<TargetTable>,
    pub indices: Vec<u32>,
    pub affine: Affine,
    pub augment: Option<Augment>,
}

/// `values = bytes * scale + shift`, by the widest instructions that the machine has.
fn convert(values: &mut [f32], bytes: &[u8], scale: f32, shift: f32) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = f32::from(*byte) * scale + shift),
    );
}

impl Dataset for RealView {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn input(&self) -> InputSpec {
        InputSpec::Real { shape: self.table.shape.clone() }
    }

    fn target(&self) -> TargetSpec {
        self.targets.spec()
    }

    fn read(&self, pick: Pick, draw: Option<Draw>, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()> {
        let index = self.indices[super::sample(pick, self.len())?] as usize;
        let values = input.real()?;
        let elements = self.table.elements();
        if values.len() != elements {
            return Err(Error::shape("data", format!("room for {elements} values"), values.len().to_string()));
        }
        if let Values::Bytes(bytes) = &self.table.values {
            let plane = elements / self.table.channels;
            let bytes = &bytes[index * elements..][..elements];
            for (channel, (values, bytes)) in values.chunks_mut(plane).zip(bytes.chunks(plane)).enumerate() {
                let (scale, shift) = (self.affine.scale[channel], self.affine.shift[channel]);
                convert(values, bytes, scale as f32, shift as f32);
            }
        } else {
            self.table.raw(index, values)?;
            self.affine.apply(values);
        }
        if let (Some(augment), Some(draw)) = (&self.augment, draw) {
            augment.apply(values, draw, index);
        }
        self.targets.read(index, target)
    }

    fn check_targets(&self, range: RangeInclusive<f32>, advice: &str) -> Result<()> {
        let TargetTable::Real { values, width, places } = &*self.targets else { return Ok(()) };
        for row in self.indices.iter().map(|index| *index as usize) {
            let targets = &values[row * width..][..*width];
            if let Some(column) = targets.iter().position(|value| !range.contains(value)) {
                let (found, low, high) = (targets[column], range.start(), range.end());
                let problem = format!("found the target {found}, expected a number from {low} to {high}; {advice}");
                return Err(places.error(row, column, &problem));
            }
        }
        Ok(())
    }

    fn is_plain(&self) -> bool {
        self.augment.is_none() && !matches!(self.table.values, Values::Files(_))
    }

    fn class_counts(&self) -> Option<Vec<usize>> {
        self.targets.counts(&self.indices)
    }
}
