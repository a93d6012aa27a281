//! How a run is spread over processes.

use super::gradients::Wire;
use super::sharding::ShardingOptions;
use crate::error::{Error, Result};
use crate::plan::Share;

/// What each of several processes keeps for its own part of the parameters alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shard {
    /// Nothing.
    #[default]
    None,
    /// The optimizer's slots and the average of weights (ZeRO 1).
    Optimizer,
    /// Gradients besides (ZeRO 2).
    Gradients,
    /// Parameters besides (ZeRO 3).
    Parameters,
}

/// Options of the run file's section `[parallel]`. Its key stands in the text of each field.
#[derive(Clone, Debug, PartialEq)]
pub struct ParallelOptions {
    /// `run.reproducible`: sums in an order that does not depend on the number of processes.
    pub reproducible: bool,
    /// `parallel.parts`: with `reproducible`, the parts of a batch whose gradients are computed one by one; where not given the
    /// largest power of two up to 8 that divides the batch.
    pub parts: Option<usize>,
    /// `parallel.reduce`: what gradients are sent as.
    pub wire: Wire,
    /// `parallel.shard`: what processes share out instead of keeping all of it.
    pub shard: Shard,
    /// `parallel.overlap`: whether gradients are summed over processes while the backward goes on.
    pub overlap: bool,
    /// `parallel.bucket_mb`: megabytes of gradients that are summed together.
    pub bucket_mb: f64,
    /// `parallel.timeout`: seconds without a sign of another process after which a run ends.
    pub timeout: f64,
    /// `parallel.check_every_steps`: steps between two comparisons of all processes' parameters.
    pub check_every_steps: u64,
}

impl Default for ParallelOptions {
    fn default() -> Self {
        ParallelOptions {
            reproducible: false,
            parts: None,
            wire: Wire::F32,
            shard: Shard::None,
            overlap: true,
            bucket_mb: 16.0,
            timeout: 60.0,
            check_every_steps: 1000,
        }
    }
}

impl ParallelOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// The run file's key, what was found, what was expected.
    pub fn validate(&self) -> Result<()> {
        let wrong = |key: &str, found: String, expected: &str| {
            Err(Error::config(format!("parallel.{key}"), format!("found {found}, expected {expected}")))
        };
        if let Some(parts) = self.parts.filter(|parts| !parts.is_power_of_two()) {
            return wrong("parts", parts.to_string(), "a power of two");
        }
        if self.parts.is_some() && !self.reproducible {
            return wrong("parts", "it without run.reproducible = true".into(), "it with that alone");
        }
        if self.reproducible && self.wire != Wire::F32 {
            return wrong("reduce", "\"bf16\" with run.reproducible = true".into(), "\"f32\"");
        }
        if !(self.bucket_mb > 0.0 && self.bucket_mb.is_finite()) {
            return wrong("bucket_mb", self.bucket_mb.to_string(), "a number above 0");
        }
        if !(0.1..=1e9).contains(&self.timeout) {
            return wrong("timeout", self.timeout.to_string(), "seconds, 0.1 to 1e9");
        }
        if self.check_every_steps == 0 {
            return wrong("check_every_steps", "0".into(), "1 or more");
        }
        Ok(())
    }

    /// The share of a process of batches of `batch_size` samples, those of all processes.
    ///
    /// # Errors
    /// A batch that cannot be shared out so, with the run file's key.
    pub fn share(&self, rank: usize, world: usize, batch_size: usize) -> Result<Share> {
        if !self.reproducible {
            let why =
                format!("{world}: it is the batch of all processes together, and each takes as many samples of it");
            return in_parts(batch_size, Share::of_rank(rank, world), &why);
        }
        let most = 1usize << batch_size.trailing_zeros().min(3);
        let parts = self.parts.unwrap_or(most);
        // Gradients that are not kept are summed over processes part by part.
        let share = if self.shard >= Shard::Gradients {
            Share::side_by_side(rank, world, parts)
        } else {
            Share::reproducible(rank, world, parts)
        };
        let share = share.ok_or_else(|| {
            Error::config(
                "parallel.parts",
                format!(
                    "a batch of {batch_size} in {parts} parts is not for {world} processes: with run.reproducible = true \
                     expected a power of two of processes, {parts} at most, or more parts (a power of two that divides data.batch_size)"
                ),
            )
        })?;
        in_parts(batch_size, share, &format!("parallel.parts = {parts}"))
    }

    /// How the memory of a process that has this share is shared out, `rank` of `world`.
    pub fn sharding(&self, (rank, world): (usize, usize), share: &Share, accumulate: u32) -> ShardingOptions {
        let adds_up = share.reproducible && accumulate > 1;
        let (shard, bucket, wire) = (self.shard, self.bucket_elements(), self.wire);
        ShardingOptions { shard, rank, world, bucket, adds_up, wire }
    }

    /// Elements of a bucket.
    pub fn bucket_elements(&self) -> usize {
        ((self.bucket_mb * 1e6 / 4.0) as usize).max(1)
    }
}

/// The share, where a batch of so many samples can be cut into its parts; else what it should be a multiple of.
fn in_parts(batch_size: usize, share: Share, of: &str) -> Result<Share> {
    if batch_size.is_multiple_of(share.of) {
        return Ok(share);
    }
    Err(Error::config("data.batch_size", format!("found {batch_size}, expected a multiple of {of}")))
}
