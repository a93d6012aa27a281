//! How much of a model's memory a process takes that trains with others.

use super::buckets::Bucket;
use super::gradients::levels;
use super::options::Shard;
use super::reducer::{Place, room_on_device};
use super::sharding::{Sharding, ShardingOptions};
use crate::backend::IN_FLIGHT;
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
    /// Values between processes, in the host's memory or the device's.
    pub on_their_way: usize,
}

impl Footprint {
    /// Of a process that trains alone: an arena of `len` elements.
    pub fn alone(len: usize) -> Self {
        Footprint { parameters: len, gradients: len, updated: len, ..Footprint::default() }
    }

    /// Of one of several processes: its share of batches, how memory is shared out, the `buckets` of its training program, the
    /// arena's elements `len`, those of kept tensors `state`, the plan of what is shared out, where that is so, and the largest window
    /// of its programs. `queued`: whether values between processes stay on the device.
    pub fn new(
        (share, options): (Share, ShardingOptions),
        buckets: &[Bucket],
        [len, state]: [usize; 2],
        sharding: Option<&Sharding>,
        window: Option<&Window>,
        queued: bool,
    ) -> Self {
        let held = Self::of_process((share, options), buckets, [len, state], sharding, window);
        if !queued || options.world == 1 {
            return held;
        }
        let shards = sharding.map_or(&[][..], |sharding| &sharding.shards);
        let places = buckets.iter().map(|bucket| Place::of_bucket(bucket, shards));
        let [wide, narrow] = room_on_device(share.reproducible, places, options.wire, state);
        let bucket = buckets.iter().map(|bucket| bucket.elements.len()).max().unwrap_or(0);
        let leaving =
            if sharding.is_some_and(|sharding| sharding.gradients.is_some()) { IN_FLIGHT * bucket } else { 0 };
        // Two values in bf16 take as much as one in f32.
        Footprint { on_their_way: wide + narrow.div_ceil(2) + leaving, ..held }
    }

    /// As [`Footprint::new`], where values pass through the host's memory.
    fn of_process(
        (share, options): (Share, ShardingOptions),
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
            let on_their_way = if options.world > 1 { len + bucket } else { 0 };
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
