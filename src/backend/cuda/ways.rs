//! Which of two ways to do the same operation is taken: the faster on this device, measured once and kept on disk (see kept.rs), by
//! replays of a recorded graph, as a step replays them.

use std::sync::PoisonError;

use super::context::Device;
use super::kept::{Entry, fastest, times};
use super::recording::record;
use crate::error::Result;

/// First line of an entry.
const HEAD: &str = "warpstep way 1";

/// How often a way is recorded one after the other: what is timed is then work, not a launch of the graph.
const REPEATS: usize = 16;

/// A way to do an operation, and the address of memory that is its own while it is measured.
pub(super) type Way<'a> = &'a dyn Fn(u64) -> Result<()>;

impl Device {
    /// Whether the second of two ways is the faster; no where nothing is to be measured, or can be kept. `question` is all that the
    /// answer depends on besides the device. Both must leave things as they were, done once or many times; what they must not touch
    /// they can put into `bytes` of memory while they are measured.
    ///
    /// # Errors
    /// Those of the ways.
    pub(super) fn second_is_faster(&self, question: &str, bytes: usize, ways: [Way<'_>; 2]) -> Result<bool> {
        let _claim = self.claim();
        if let Some(&second) = self.ways.lock().unwrap_or_else(PoisonError::into_inner).get(question) {
            return Ok(second);
        }
        // Asked again where it can be measured.
        if !self.options().measure || !self.can_record() || self.is_recording()? {
            return Ok(false);
        }
        let entry = Entry::new(self, "ways", HEAD, question);
        let found = entry.find_or_measure(
            |&[way]: &[u64; 1]| way < 2,
            || Ok(self.untimed(|| self.measure_ways(bytes, ways))?.map(|way| [way as u64])),
        )?;
        let second = found == Some([1]);
        if found.is_none() {
            entry.keep_for_run(&[0]);
        }
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).insert(question.to_owned(), second);
        Ok(second)
    }

    /// None where there is no room to measure.
    fn measure_ways(&self, bytes: usize, ways: [Way<'_>; 2]) -> Result<Option<usize>> {
        let Ok(room) = self.allocate(bytes.max(1)) else { return Ok(None) };
        let measured = self.times_of(room, ways);
        // After the work that uses it, whatever came of it.
        let finished = self.synchronize();
        self.release(room);
        finished?;
        Ok(fastest(&measured?))
    }

    fn times_of(&self, room: u64, ways: [Way<'_>; 2]) -> Result<Vec<Option<f32>>> {
        let mut graphs = Vec::new();
        for way in ways {
            // As it is: kernels are loaded, algorithms chosen and scratch is taken, none of which can be recorded.
            way(room)?;
            graphs.push(record(self, || (0..REPEATS).try_for_each(|_| way(room)))?);
        }
        times(self, graphs.len(), |which| graphs[which].launch(self).is_ok())
    }
}
