//! Which parts of each batch a process works on, and in which order it takes them.

use std::ops::Range;

/// A process's share of every batch. A batch is cut into `of` parts of as many consecutive samples each; the process takes `count`
/// of them, every `stride`-th from `first` on.
///
/// Without [`Share::reproducible`] each process takes one part. With it the parts are the same whatever the number of processes,
/// and gradients are computed part by part and summed in one fixed order: a binary tree over the parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The first part.
    pub first: usize,
    /// How many parts.
    pub count: usize,
    /// How far apart they are.
    pub stride: usize,
    /// Parts of a batch.
    pub of: usize,
    /// Whether sums are taken in the order of a tree over the parts.
    pub reproducible: bool,
}

/// What one pass (forward and backward of a part of a micro-batch) is of its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassOf {
    /// The step, from the beginning of the run.
    pub step: u64,
    /// The micro-batch, from the beginning of the run.
    pub micro_batch: u64,
    /// The micro-batch within its step.
    pub within: u64,
    /// The part of the micro-batch.
    pub part: usize,
    /// Its number among the parts of this process.
    pub index: usize,
}

impl Default for Share {
    /// All of it.
    fn default() -> Self {
        Share { first: 0, count: 1, stride: 1, of: 1, reproducible: false }
    }
}

impl Share {
    /// The share of one process of `world`.
    pub fn of_rank(rank: usize, world: usize) -> Self {
        Share { first: rank, count: 1, stride: 1, of: world, reproducible: false }
    }

    /// The share of one process of `world` where batches are cut into `parts`, a power of two that `world` divides; none where it
    /// does not.
    pub fn reproducible(rank: usize, world: usize, parts: usize) -> Option<Self> {
        let fits = parts.is_power_of_two() && world > 0 && parts.is_multiple_of(world) && rank < world;
        let count = parts.checked_div(world)?;
        fits.then_some(Share { first: rank * count, count, stride: 1, of: parts, reproducible: true })
    }

    /// As [`Share::reproducible`], but in each of its turns the processes take parts that lie side by side. Then the lower levels of
    /// the tree are between processes, and sums that are taken after each turn are of the whole of it.
    pub fn side_by_side(rank: usize, world: usize, parts: usize) -> Option<Self> {
        Some(Share { first: rank, stride: world, ..Share::reproducible(rank, world, parts)? })
    }

    /// Passes that this process makes in a step of `accumulate` micro-batches.
    pub fn passes(&self, accumulate: u32) -> u64 {
        u64::from(accumulate) * self.count as u64
    }

    /// The samples of a part within a batch of `batch_size`.
    pub fn samples(&self, batch_size: usize, part: usize) -> Range<usize> {
        let each = batch_size / self.of;
        part * each..(part + 1) * each
    }

    /// What this process's pass number `pass` is: all micro-batches of a step for one part, then for the next.
    pub fn pass(&self, pass: u64, accumulate: u32) -> PassOf {
        let accumulate = u64::from(accumulate);
        let passes = accumulate * self.count as u64;
        let (step, within_step) = (pass / passes, pass % passes);
        let (index, within) = ((within_step / accumulate) as usize, within_step % accumulate);
        PassOf { step, micro_batch: step * accumulate + within, within, part: self.first + index * self.stride, index }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_micro_batch_is_taken_once_at_any_world_size() {
        for (world, accumulate) in [(1, 1), (1, 3), (2, 1), (4, 2), (8, 3)] {
            let mut seen = Vec::new();
            for share in (0..world).map(|rank| Share::side_by_side(rank, world, 8).unwrap()) {
                let parts = (0..share.count).map(|index| share.pass(u64::from(accumulate) * index as u64, accumulate));
                assert!(parts.enumerate().all(|(index, of)| of.index == index && of.part / world == index));
            }
            for rank in 0..world {
                let share = Share::reproducible(rank, world, 8).unwrap();
                for pass in 0..2 * share.passes(accumulate) {
                    let of = share.pass(pass, accumulate);
                    assert_eq!(of.step, of.micro_batch / u64::from(accumulate));
                    seen.push((of.micro_batch, of.part));
                }
            }
            seen.sort_unstable();
            let all: Vec<(u64, usize)> =
                (0..2 * u64::from(accumulate)).flat_map(|m| (0..8).map(move |part| (m, part))).collect();
            assert_eq!(seen, all, "{world} {accumulate}");
        }
    }

    #[test]
    fn a_tree_needs_a_power_of_two_of_parts_that_the_world_divides() {
        assert!(Share::reproducible(0, 3, 8).is_none());
        assert!(Share::reproducible(0, 1, 6).is_none());
        assert!(Share::reproducible(0, 16, 8).is_none());
        assert!(Share::reproducible(2, 2, 8).is_none());
        assert_eq!(Share::reproducible(1, 2, 8).map(|share| (share.first, share.count)), Some((4, 4)));
        assert_eq!(Share::default().samples(12, 0), 0..12);
        assert_eq!(Share::of_rank(2, 3).samples(12, 2), 8..12);
    }
}
