//! How much of a model's memory a process takes that trains with others.

use super::buckets::Bucket;
use super::gradients::levels;
use super::options::Shard;
use super::sharding::Sharding;
use super::windowed::IN_FLIGHT;
use crate::plan::{Share, Window};

/// Elements that a process keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Parameters.
    pub parameters: usize,
    /// The window through which it sees the others'.
    pub parameter_window: usize,
    /// Gradients that it keeps for the update.
    pub gradients: usize,
    /// The window in which a backward leaves gradients.
    pub gradient_window: usize,
    /// Parameters that it updates: as many in each slot, and in the average of weights.
    pub updated: usize,
    /// Sums of the parts of a batch that wait for others, and kept tensors as they were.
    pub sums: usize,
    /// Values between processes, in the host's memory.
    pub on_their_way: usize,
}

impl Footprint {
    /// Of a process that trains alone: an arena of `len` elements.
    pub fn alone(len: usize) -> Self {
        Footprint { parameters: len, gradients: len, updated: len, ..Footprint::default() }
    }

    /// Of one of `world` processes: its share of batches, the `buckets` of its training program, the arena's elements `len`, those of
    /// kept tensors `state`, how memory is shared out, and the largest window of its programs where that is so.
    pub fn new(
        (share, world): (Share, usize),
        buckets: &[Bucket],
        [len, state]: [usize; 2],
        sharding: Option<&Sharding>,
        window: Option<&Window>,
    ) -> Self {
        let levels = levels(share.count);
        let kept = if share.of > 1 { (levels + 1) * state } else { 0 };
        let bucket = buckets.iter().map(|bucket| bucket.elements.len()).max().unwrap_or(0);
        let Some(sharding) = sharding else {
            // Every bucket waits for its sum, and one is being summed.
            let on_their_way = if world > 1 { len + bucket } else { 0 };
            return Footprint { sums: levels * len + kept, on_their_way, ..Footprint::alone(len) };
        };
        let own = sharding.own().len();
        let Some((_, gradient_window)) = sharding.gradients else {
            let on_their_way = len + 2 * bucket;
            return Footprint { updated: own, sums: levels * len + kept, on_their_way, ..Footprint::alone(len) };
        };
        let gathered = |window: &Window| {
            let of = |gather: &crate::plan::Gather| gather.tensors.iter().map(|(_, place)| place.len()).sum::<usize>();
            2 * window.gathers.iter().map(of).max().unwrap_or(0)
        };
        let all = sharding.options.shard < Shard::Parameters;
        Footprint {
            parameters: if all { len } else { own },
            parameter_window: window.map_or(0, |window| window.len),
            gradients: own,
            gradient_window,
            updated: own,
            sums: levels * own + kept,
            on_their_way: (IN_FLIGHT + 1) * bucket + window.map_or(bucket, gathered),
        }
    }
}
