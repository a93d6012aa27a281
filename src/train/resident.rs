//! Whether a run's training split lies on the device, which then gathers batches itself.

use std::sync::Arc;

use crate::backend::Backend;
use crate::data::options::Resident;
use crate::data::{Dataset, Table};
use crate::error::{Error, Result};

/// The part of a device's free memory that a data set may take unasked: the rest is left to evaluations, to what libraries take
/// as they run, and to other processes.
const PART: usize = 4;

/// Whether a device that has so many bytes free (none: it computes in the host's memory) keeps a data set of so many.
pub fn fits(bytes: usize, free: Option<usize>) -> bool {
    free.is_none_or(|free| bytes <= free / PART)
}

/// The table that batches are gathered from, where the run asks for it or the device has room for it now.
///
/// # Errors
/// A table that is asked for of samples that are not plain; a device that failed.
pub fn table<B: Backend>(backend: &B, data: &Arc<dyn Dataset>, asked: Resident) -> Result<Option<Arc<Table>>> {
    let Some(table) = candidate(data, asked)? else { return Ok(None) };
    let kept = asked == Resident::Always || fits(B::table_room(&table), backend.free_memory()?);
    Ok(kept.then_some(table))
}

/// The table of a data set, where one is wanted and its samples are plain.
///
/// # Errors
/// It is asked for, and they are not.
pub fn candidate(data: &Arc<dyn Dataset>, asked: Resident) -> Result<Option<Arc<Table>>> {
    match (asked, Table::new(Arc::clone(data))) {
        (Resident::Never, _) | (Resident::Auto, None) => Ok(None),
        (Resident::Always, None) => Err(Error::config(
            "data.resident",
            "found true, but samples of the training split are augmented at random or read from files as they are needed; \
             expected \"auto\" or false",
        )),
        (_, table) => Ok(table),
    }
}
