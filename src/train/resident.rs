//! Whether a run's training split lies on the device, which then gathers batches itself; and where batches come from.

use std::sync::Arc;

use super::step::Trainer;
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::data::options::Resident;
use crate::data::{Dataset, Given, Loader, Picked, Prefetch, SamplerOptions, Table};
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
/// A table that is asked for of samples that are not plain, or that is larger than what is free; a device that failed.
pub fn table<B: Backend>(backend: &B, data: &Arc<dyn Dataset>, asked: Resident) -> Result<Option<Arc<Table>>> {
    let Some(table) = candidate(data, asked)? else { return Ok(None) };
    let (bytes, free) = (B::table_room(&table), backend.free_memory()?);
    match (asked, free) {
        (Resident::Always, Some(free)) if bytes > free => {
            let [takes, left] = [bytes.div_ceil(1 << 20), free >> 20];
            let problem = format!(
                "found true, but the training split takes {takes} MiB of the device's memory and {left} MiB are free beside the \
                 model; expected \"auto\" or false"
            );
            Err(Error::config("data.resident", problem))
        }
        (Resident::Always, _) => Ok(Some(table)),
        _ => Ok(fits(bytes, free).then_some(table)),
    }
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

/// Where training batches come from.
pub(super) enum Source {
    /// Read ahead, and copied to the device.
    Values(Loader),
    /// Gathered by the device.
    Table(Loader<Picked>),
}

impl Source {
    /// Batches of a data set from a pass on, gathered where there is a table of it.
    ///
    /// # Errors
    /// As [`Loader::train`].
    pub fn new(
        data: &Arc<dyn Dataset>,
        table: Option<Arc<Table>>,
        options: SamplerOptions,
        first_pass: u64,
        prefetch: Prefetch,
    ) -> Result<Self> {
        match table {
            Some(table) => Loader::picks(&table, options, first_pass, prefetch).map(Source::Table),
            None => Loader::train(Arc::clone(data), options, first_pass, prefetch).map(Source::Values),
        }
    }

    /// Queues a pass over the next batch, and given a learning rate the update after it.
    ///
    /// # Errors
    /// As [`Trainer::queue`], and what the data reports.
    pub fn queue_next<B: Backend + Update>(&mut self, trainer: &mut Trainer<B>, rate: Option<f64>) -> Result<()> {
        match self {
            Source::Values(loader) => queue_next(trainer, loader, rate),
            Source::Table(loader) => queue_next(trainer, loader, rate),
        }
    }
}

fn queue_next<B, T>(trainer: &mut Trainer<B>, loader: &mut Loader<T>, rate: Option<f64>) -> Result<()>
where
    B: Backend + Update,
    T: Send + 'static,
    for<'a> &'a T: Into<Given<'a>>,
{
    let batch = loader.next().ok_or_else(|| Error::Training("the data ended before the run".into()))??;
    trainer.queue(&batch, rate)?;
    loader.recycle(batch);
    Ok(())
}
