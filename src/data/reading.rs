//! How far the reading of many files is, for whoever waits for it.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the files of a data set as they are read.
#[derive(Debug, Default)]
pub struct Reading {
    done: AtomicUsize,
    all: AtomicUsize,
}

impl Reading {
    /// So many files are to be read.
    pub(crate) fn begin(&self, files: usize) {
        self.all.store(files, Ordering::Relaxed);
    }

    /// One more is read.
    pub(crate) fn count(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// Files that were read, and how many there are; none where they are not known yet, or not counted.
    pub fn files(&self) -> Option<(usize, usize)> {
        let all = self.all.load(Ordering::Relaxed);
        (all > 0).then(|| (self.done.load(Ordering::Relaxed), all))
    }
}
