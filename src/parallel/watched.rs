//! A collective whose calls are known to the watch: a process within one waits for others, and is not the one that is stuck.

use std::ops::Range;
use std::sync::Arc;

use super::collective::Collective;
use super::watch::Watch;
use crate::backend::Slice;
use crate::error::Result;

/// The collective, and the watch that is told of its calls.
pub struct Watched {
    collective: Arc<dyn Collective>,
    watch: Arc<Watch>,
}

impl Watched {
    /// Tells `watch` of the calls of `collective`.
    pub fn new(collective: Arc<dyn Collective>, watch: Arc<Watch>) -> Self {
        Watched { collective, watch }
    }
}

impl Collective for Watched {
    fn name(&self) -> &'static str {
        self.collective.name()
    }

    fn rank(&self) -> usize {
        self.collective.rank()
    }

    fn world(&self) -> usize {
        self.collective.world()
    }

    fn is_queued(&self) -> bool {
        self.collective.is_queued()
    }

    fn is_left_last(&self) -> bool {
        self.collective.is_left_last()
    }

    fn all_reduce_sum(&self, values: Slice<'_>) -> Result<()> {
        let _waits = self.watch.communicating();
        self.collective.all_reduce_sum(values)
    }

    fn reduce_scatter_sum(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()> {
        let _waits = self.watch.communicating();
        self.collective.reduce_scatter_sum(values, shards)
    }

    fn all_gather(&self, values: Slice<'_>, shards: &[Range<usize>]) -> Result<()> {
        let _waits = self.watch.communicating();
        self.collective.all_gather(values, shards)
    }

    fn broadcast(&self, values: Slice<'_>, root: usize) -> Result<()> {
        let _waits = self.watch.communicating();
        self.collective.broadcast(values, root)
    }

    fn swap(&self, partner: usize, send: Slice<'_>, receive: Slice<'_>) -> Result<()> {
        let _waits = self.watch.communicating();
        self.collective.swap(partner, send, receive)
    }

    fn barrier(&self) -> Result<()> {
        let _waits = self.watch.communicating();
        self.collective.barrier()
    }

    fn add(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        self.collective.add(to, from)
    }

    fn convert(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        self.collective.convert(to, from)
    }

    fn copy(&self, to: Slice<'_>, from: Slice<'_>) -> Result<()> {
        self.collective.copy(to, from)
    }

    fn abort(&self) {
        self.collective.abort();
    }

    fn fork(&self) -> Result<()> {
        self.collective.fork()
    }

    fn join(&self) -> Result<()> {
        self.collective.join()
    }

    fn mark(&self, number: usize) -> Result<()> {
        self.collective.mark(number)
    }

    fn join_mark(&self, number: usize) -> Result<()> {
        self.collective.join_mark(number)
    }
}
