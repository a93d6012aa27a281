//! The activation buffer: an offset for each activation, so that those that are never alive together share memory.

/// When an activation is alive, in positions of the step's program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// First operation that touches it.
    pub first: usize,
    /// Last operation that touches it.
    pub last: usize,
    /// Elements it takes.
    pub len: usize,
}

impl Lifetime {
    fn overlaps(&self, other: &Lifetime) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// An offset for each activation, and the size of the buffer that holds them all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Offset of each activation, in elements, in the order of the lifetimes.
    pub offsets: Vec<usize>,
    /// Elements of the buffer.
    pub peak: usize,
}

impl MemoryPlan {
    /// Alignment of every activation, in elements (a cache line of f32 is 16; 32 serves bf16 too).
    pub const ALIGNMENT: usize = 32;

    /// Places activations by size, largest first, each at the lowest offset where no activation that is alive with it lies
    /// (greedy by size; Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020).
    pub fn new(lifetimes: &[Lifetime]) -> Self {
        let mut order: Vec<usize> = (0..lifetimes.len()).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(lifetimes[i].len), lifetimes[i].first, i));
        let mut offsets = vec![0; lifetimes.len()];
        let mut placed: Vec<usize> = Vec::new(); // sorted by offset
        let mut peak = 0;
        for i in order {
            let len = lifetimes[i].len.next_multiple_of(Self::ALIGNMENT);
            let mut offset = 0;
            for &j in placed.iter().filter(|&&j| lifetimes[i].overlaps(&lifetimes[j])) {
                if offset + len <= offsets[j] {
                    break;
                }
                offset = offset.max(offsets[j] + lifetimes[j].len.next_multiple_of(Self::ALIGNMENT));
            }
            offsets[i] = offset;
            peak = peak.max(offset + len);
            let at = placed.partition_point(|&j| offsets[j] <= offset);
            placed.insert(at, i);
        }
        MemoryPlan { offsets, peak }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn activations_that_never_live_together_share_memory() {
        let plan = MemoryPlan::new(&[
            Lifetime { first: 0, last: 1, len: 100 },
            Lifetime { first: 1, last: 2, len: 100 },
            Lifetime { first: 2, last: 3, len: 100 },
        ]);
        assert_eq!(plan.peak, 256);
    }

    proptest! {
        #[test]
        fn activations_alive_together_never_overlap(
            raw in prop::collection::vec((0usize..40, 0usize..20, 0usize..500), 0..40)
        ) {
            let lifetimes: Vec<Lifetime> =
                raw.iter().map(|&(first, span, len)| Lifetime { first, last: first + span, len }).collect();
            let plan = MemoryPlan::new(&lifetimes);
            for i in 0..lifetimes.len() {
                prop_assert!(plan.offsets[i] + lifetimes[i].len <= plan.peak);
                for j in 0..i {
                    let apart = plan.offsets[i] + lifetimes[i].len <= plan.offsets[j]
                        || plan.offsets[j] + lifetimes[j].len <= plan.offsets[i];
                    prop_assert!(apart || !lifetimes[i].overlaps(&lifetimes[j]));
                }
            }
        }
    }
}
