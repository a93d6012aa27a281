//! Samples in memory or in files, as [`Dataset`](super::Dataset)s.

mod labelled;
mod real;
mod stream;

pub(crate) use labelled::LabelledTokens;
pub(crate) use real::{Decode, Places, RealTable, RealView, TargetTable, Values};
pub(crate) use stream::{TokenFile, TokenStore, TokenWindows};

use super::Pick;
use crate::error::{Error, Result};

/// The number of a sample that must be one of `len`.
fn sample(pick: Pick, len: usize) -> Result<usize> {
    match pick {
        Pick::Sample(index) if index < len => Ok(index),
        _ => Err(Error::shape("data", format!("a sample below {len}"), format!("{pick:?}"))),
    }
}
