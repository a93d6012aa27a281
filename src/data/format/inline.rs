//! A few numbers that stand in the run file itself.

use super::super::augment::Subject;
use super::super::dataset::{Places, RealTable, TargetTable, Values};
use super::super::options::{InlineOptions, InlineTargets, Normalize};
use super::super::preprocess::Recipe;
use super::{Pool, numbered};
use crate::error::{Error, Result};

/// The samples that the options hold.
pub(crate) fn open(options: &InlineOptions) -> Result<Pool> {
    let rows = options.inputs.len();
    let (features, values) = flat("data.inputs", &options.inputs)?;
    let (given, targets) = match &options.targets {
        InlineTargets::Real(targets) => {
            let (width, values) = flat("data.targets", targets)?;
            (targets.len(), TargetTable::Real { values, width, places: Places::RunFile })
        }
        InlineTargets::Class(classes) => {
            let (names, labels) = numbered(classes.iter().map(String::as_str));
            (classes.len(), TargetTable::Class { labels, names })
        }
    };
    if given != rows {
        return Err(Error::config(
            "data.targets",
            format!("found {given} targets, expected {rows}: one for each row of data.inputs"),
        ));
    }
    Ok(Pool {
        place: "inline".into(),
        table: RealTable {
            shape: vec![features],
            channels: features,
            full_scale: 1.0,
            background: 0.0,
            values: Values::Doubles(values.into_iter().map(f64::from).collect()),
        },
        targets,
        names: None,
        pattern: None,
        own_validation: rows..rows,
        own_test: rows..rows,
        subject: Subject::Other,
        normalize: Normalize::None,
        pictures: None,
        recipe: Recipe::values(features),
    })
}

/// Rows of equal, non-zero length, one after the other.
fn flat(key: &str, rows: &[Vec<f32>]) -> Result<(usize, Vec<f32>)> {
    let width = rows.first().map_or(0, Vec::len);
    if width == 0 {
        return Err(Error::config(key, "found nothing, expected at least one row of numbers"));
    }
    for (i, row) in rows.iter().enumerate() {
        if row.len() != width {
            return Err(Error::config(key, format!("row {i} has {} numbers, expected {width} as in row 0", row.len())));
        }
        if let Some(value) = row.iter().find(|v| !v.is_finite()) {
            return Err(Error::config(key, format!("row {i} has {value}, expected finite numbers")));
        }
    }
    Ok((width, rows.concat()))
}
