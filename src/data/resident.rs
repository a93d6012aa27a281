//! Samples that are handed out by their numbers, since whoever wants their values has them all.
//!
//! A [`Table`] is a data set whose samples lie in memory and are the same whenever they are read. A backend gathers a batch
//! from it: a device keeps the whole table in its own memory, the CPU reads each sample into its place.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Batch, Dataset, InputMut, InputSpec, Pick, TargetMut, TargetSpec};
use crate::error::{Error, Result};

/// A data set that a backend can gather batches from.
pub struct Table {
    dataset: Arc<dyn Dataset>,
    input: InputSpec,
    target: TargetSpec,
    layout: Layout,
    rows: usize,
    /// What devices keep of it, freed with it.
    kept: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

/// How the samples lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One after the other: row `n` is sample `n`.
    Samples,
    /// Windows over one stream: row `n` begins at token `n`, and its targets one token later.
    Windows,
}

impl Table {
    /// The table of a data set whose samples are plain ([`Dataset::is_plain`]); none for another.
    pub fn new(dataset: Arc<dyn Dataset>) -> Option<Arc<Self>> {
        let (layout, rows) = match dataset.starts() {
            Some(starts) => (Layout::Windows, starts),
            None => (Layout::Samples, dataset.len()),
        };
        let (input, target) = (dataset.input(), dataset.target());
        let shifted = layout == Layout::Samples || target == TargetSpec::NextToken;
        // Rows are told to devices in 32 bits.
        if !dataset.is_plain() || !shifted || rows == 0 || u32::try_from(rows).is_err() {
            return None;
        }
        Some(Arc::new(Table { dataset, input, target, layout, rows, kept: Mutex::default() }))
    }

    /// The data set.
    pub fn dataset(&self) -> &dyn Dataset {
        &*self.dataset
    }

    /// What an input is.
    pub fn input(&self) -> &InputSpec {
        &self.input
    }

    /// What a target is.
    pub fn target(&self) -> &TargetSpec {
        &self.target
    }

    /// How the samples lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of one sample: inputs and targets.
    pub fn each(&self) -> [usize; 2] {
        [self.input.elements(), self.target.elements(&self.input)]
    }

    /// Values of the whole table: inputs, and targets where they are not the inputs, shifted.
    pub fn len(&self) -> [usize; 2] {
        let each = self.each();
        match self.layout {
            Layout::Samples => each.map(|each| self.rows * each),
            Layout::Windows => [self.rows + each[0], 0],
        }
    }

    /// Reads a row (`=`).
    ///
    /// # Errors
    /// As [`Dataset::read`].
    pub fn read(&self, row: u32, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()> {
        let pick = match self.layout {
            Layout::Samples => Pick::Sample(row as usize),
            Layout::Windows => Pick::Window(row as usize),
        };
        self.dataset.read(pick, None, input, target)
    }

    /// The row of a pick.
    fn row(&self, pick: Pick) -> Result<u32> {
        let row = match (self.layout, pick) {
            (Layout::Samples, Pick::Sample(sample)) => Some(sample),
            (Layout::Windows, Pick::Window(start)) => Some(start),
            (Layout::Windows, Pick::Sample(sample)) => sample.checked_mul(self.each()[0]),
            (Layout::Samples, Pick::Window(_)) => None,
        };
        let row = row.filter(|&row| row < self.rows);
        row.map(|row| row as u32).ok_or_else(|| {
            let expected = format!("one of {} rows of a table", self.rows);
            Error::shape("data", expected, format!("{pick:?}"))
        })
    }

    /// What a device keeps of the table, of the kind that `is` tells; made by `make` where there is none.
    ///
    /// # Errors
    /// What `make` reports.
    pub fn kept<T: Any + Send + Sync>(
        &self,
        is: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        // A thread that panicked has pushed whole entries alone.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in kept.iter() {
            if let Ok(found) = Arc::clone(entry).downcast::<T>()
                && is(&found)
            {
                return Ok(found);
            }
        }
        let made = Arc::new(make()?);
        kept.push(Arc::clone(&made) as _);
        Ok(made)
    }
}

/// A batch of a table's samples, by their rows, all of which the table has.
#[derive(Clone)]
pub struct Picked {
    table: Arc<Table>,
    rows: Vec<u32>,
}

impl Picked {
    /// No samples of this table yet.
    pub fn new(table: &Arc<Table>) -> Self {
        Picked { table: Arc::clone(table), rows: Vec::new() }
    }

    /// Makes it these samples (`=`).
    ///
    /// # Errors
    /// A pick that the table does not have.
    pub fn set(&mut self, picks: &[Pick]) -> Result<()> {
        self.rows.clear();
        for &pick in picks {
            self.rows.push(self.table.row(pick)?);
        }
        Ok(())
    }

    /// The table.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// The rows, in the batch's order.
    pub fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// Number of samples.
    pub fn samples(&self) -> usize {
        self.rows.len()
    }
}

/// What a pass is given.
#[derive(Clone, Copy)]
pub enum Given<'a> {
    /// Values.
    Values(&'a Batch),
    /// Samples of a table.
    Picked(&'a Picked),
}

impl Given<'_> {
    /// Number of samples.
    pub fn samples(self) -> usize {
        match self {
            Given::Values(batch) => batch.samples,
            Given::Picked(picked) => picked.samples(),
        }
    }
}

impl<'a> From<&'a Batch> for Given<'a> {
    fn from(batch: &'a Batch) -> Self {
        Given::Values(batch)
    }
}

impl<'a> From<&'a Picked> for Given<'a> {
    fn from(picked: &'a Picked) -> Self {
        Given::Picked(picked)
    }
}
