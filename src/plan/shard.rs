//! What of an arena each of several processes keeps, and the windows through which a program sees what it does not.

use std::ops::Range;

use super::memory::{Lifetime, MemoryPlan};

/// An arena of `len` elements in as many ranges as there are processes, one after the other, without gaps. It is cut at some of
/// `cuts` (sorted), each at the one nearest to where ranges of equal length would end; where cuts are fewer than processes, some
/// ranges are empty.
pub fn shards(len: usize, cuts: &[usize], world: usize) -> Vec<Range<usize>> {
    let nearest = |target: usize| {
        let at = cuts.partition_point(|&cut| cut < target);
        let after = cuts.get(at).copied().unwrap_or(len).min(len);
        let before = if at == 0 { 0 } else { cuts[at - 1] };
        if target - before <= after - target { before } else { after }
    };
    let mut shards = Vec::with_capacity(world);
    let mut start = 0;
    for rank in 0..world {
        // In wider arithmetic: an arena times its processes may be more than `usize` counts.
        let target = (len as u128 * (rank as u128 + 1) / world as u128) as usize;
        let end = if rank + 1 == world { len } else { nearest(target) };
        shards.push(start..end);
        start = end;
    }
    shards
}

/// The elements that two ranges share; empty, at the place nearest to `of`, where they share none.
pub fn overlap(of: &Range<usize>, with: &Range<usize>) -> Range<usize> {
    let start = with.start.clamp(of.start, of.end);
    start..with.end.clamp(start, of.end)
}

/// What a process holds of an arena that is shared out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The elements that it updates.
    pub elements: Range<usize>,
    /// Elements of the window through which it sees all parameters, where it keeps those of `elements` alone.
    pub parameters: Option<usize>,
    /// Where gradients stand in their window, by parameter, and its elements, where it keeps those of `elements` alone.
    pub gradients: Option<(Vec<Range<usize>>, usize)>,
}

/// A buffer that holds tensors while a program needs them, and what is brought into it when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// In the order of the operations that need them first.
    pub gathers: Vec<Gather>,
    /// Elements of the buffer.
    pub len: usize,
}

/// Tensors that are brought into a window together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gather {
    /// It may begin before this operation: what stood there before is not used from then on.
    pub before: usize,
    /// It has to be there before this operation.
    pub needed: usize,
    /// Each tensor and its place in the window from [`Gather::needed`] on, until that of the next gather that names the tensor.
    pub tensors: Vec<(usize, Range<usize>)>,
}

/// While a tensor stays in a window.
struct Stay {
    tensor: usize,
    first: usize,
    last: usize,
}

impl Window {
    /// The window for tensors of `lens` elements, which operations `uses` (sorted, a list for each tensor) read.
    ///
    /// A tensor is dropped between two uses where more than `bucket` elements of other tensors are used between them. Tensors that
    /// come one after the other are gathered together, up to `bucket` elements. `ahead`: whether there is room for each gather to begin
    /// when the one before it is needed, so that it is on its way while the operations between run.
    pub fn new(lens: &[usize], uses: &[Vec<usize>], bucket: usize, ahead: bool) -> Self {
        let mut stays = stays(lens, uses, bucket);
        stays.sort_by_key(|stay| (stay.first, stay.tensor));
        let mut groups: Vec<(usize, usize)> = Vec::new(); // first operation and elements
        for stay in &mut stays {
            let len = lens[stay.tensor];
            match groups.last_mut().filter(|(_, elements)| elements.saturating_add(len) <= bucket) {
                Some((before, elements)) => {
                    stay.first = *before;
                    *elements += len;
                }
                None => groups.push((stay.first, len)),
            }
        }
        let mut needed: Vec<usize> = stays.iter().map(|stay| stay.first).collect();
        needed.dedup();
        let begins = |stay: &Stay| {
            let number = needed.partition_point(|&op| op < stay.first);
            if ahead { needed[number.saturating_sub(1)] } else { stay.first }
        };
        let lives: Vec<Lifetime> = stays
            .iter()
            .map(|stay| Lifetime { first: begins(stay), last: stay.last, len: lens[stay.tensor] })
            .collect();
        let plan = MemoryPlan::new(&lives);
        let mut gathers: Vec<Gather> = Vec::new();
        for (stay, &offset) in stays.iter().zip(&plan.offsets) {
            let place = (stay.tensor, offset..offset + lens[stay.tensor]);
            match gathers.last_mut().filter(|gather| gather.needed == stay.first) {
                Some(gather) => gather.tensors.push(place),
                None => gathers.push(Gather { before: begins(stay), needed: stay.first, tensors: vec![place] }),
            }
        }
        Window { gathers, len: plan.peak }
    }

    /// The numbers of the gathers that begin before an operation.
    pub fn before(&self, op: usize) -> Range<usize> {
        self.numbers(op, |gather| gather.before)
    }

    /// The numbers of the gathers that are needed by an operation.
    pub fn needed(&self, op: usize) -> Range<usize> {
        self.numbers(op, |gather| gather.needed)
    }

    fn numbers(&self, op: usize, of: impl Fn(&Gather) -> usize) -> Range<usize> {
        let first = self.gathers.partition_point(|gather| of(gather) < op);
        first..self.gathers.partition_point(|gather| of(gather) <= op)
    }
}

/// The stays of tensors that are used so, each from a use to the last before it is worth its while to be dropped.
fn stays(lens: &[usize], uses: &[Vec<usize>], bucket: usize) -> Vec<Stay> {
    let between = |of: usize, first: usize, last: usize| {
        let others = uses.iter().zip(lens).enumerate().filter(|(tensor, _)| *tensor != of);
        let used = others.filter(|(_, (uses, _))| {
            let next = uses.partition_point(|&op| op <= first);
            uses.get(next).is_some_and(|&op| op < last)
        });
        used.map(|(_, (_, &len))| len).sum::<usize>()
    };
    let mut stays = Vec::new();
    for (tensor, ops) in uses.iter().enumerate() {
        let mut stay: Option<Stay> = None;
        for &op in ops {
            match &mut stay {
                Some(stay) if between(tensor, stay.last, op) <= bucket => stay.last = op,
                _ => stays.extend(stay.replace(Stay { tensor, first: op, last: op })),
            }
        }
        stays.extend(stay);
    }
    stays
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shards_end_at_the_cuts_nearest_to_equal_parts() {
        assert_eq!(shards(1024, &[0, 256, 384, 640, 896], 4), [0..256, 256..384, 384..640, 640..1024]);
        assert_eq!(shards(1024, &[0], 2), [0..0, 0..1024]);
        assert_eq!(shards(512, &[0, 128], 4), [0..128, 128..128, 128..512, 512..512]);
        assert_eq!(shards(0, &[], 2), [0..0, 0..0]);
    }

    #[test]
    fn a_tensor_used_far_apart_leaves_the_window_and_comes_back() {
        // 0 is used at both ends, 1 and 2 between: a bucket holds one of them.
        let window = Window::new(&[32, 32, 32], &[vec![0, 5], vec![1, 4], vec![2, 3]], 32, false);
        let of: Vec<(usize, Vec<usize>)> =
            window.gathers.iter().map(|g| (g.before, g.tensors.iter().map(|(t, _)| *t).collect())).collect();
        assert_eq!(of, [(0, vec![0]), (1, vec![1]), (2, vec![2]), (5, vec![0])]);
        assert_eq!(window.len, 64);
        assert_eq!(window.before(2).len(), 1);
        assert!(window.before(3).is_empty());
    }

    #[test]
    fn gathers_begin_ahead_where_there_is_room_for_it() {
        let uses = [vec![0], vec![3], vec![5]];
        let of = |ahead| {
            let window = Window::new(&[32, 32, 32], &uses, 32, ahead);
            let times: Vec<[usize; 2]> = window.gathers.iter().map(|g| [g.before, g.needed]).collect();
            (times, window.len)
        };
        assert_eq!(of(false), (vec![[0, 0], [3, 3], [5, 5]], 32));
        assert_eq!(of(true), (vec![[0, 0], [0, 3], [3, 5]], 64));
    }

    #[test]
    fn tensors_that_fit_into_a_bucket_come_together() {
        let window = Window::new(&[32, 32, 32], &[vec![0], vec![1], vec![2]], 64, false);
        let of: Vec<usize> = window.gathers.iter().map(|g| g.tensors.len()).collect();
        assert_eq!((of, window.gathers[1].before), (vec![2, 1], 2));
    }

    proptest! {
        #[test]
        fn shards_cover_the_arena_whatever_the_cuts(
            gaps in prop::collection::vec(1usize..9, 0..30), world in 1usize..9
        ) {
            let mut cuts = vec![0];
            gaps.iter().for_each(|gap| cuts.push(cuts[cuts.len() - 1] + 128 * gap));
            let len = cuts.pop().unwrap_or(0);
            let shards = shards(len, &cuts, world);
            prop_assert_eq!(shards.len(), world);
            let mut end = 0;
            for shard in &shards {
                prop_assert_eq!(shard.start, end);
                prop_assert!(shard.end >= end && (cuts.contains(&shard.end) || shard.end == len));
                end = shard.end;
            }
            prop_assert_eq!(end, len);
            // No shard is further from its equal part than the cuts force it to be.
            let widest = gaps.iter().max().map_or(0, |gap| 128 * gap);
            prop_assert!(shards.iter().all(|shard| shard.len() <= len / world + widest + 1));
        }

        #[test]
        fn every_use_finds_its_tensor_where_no_other_that_is_needed_lies(
            raw in prop::collection::vec((1usize..200, prop::collection::vec(0usize..30, 1..5)), 1..12),
            bucket in 1usize..400,
            ahead: bool
        ) {
            let lens: Vec<usize> = raw.iter().map(|(len, _)| *len).collect();
            let uses: Vec<Vec<usize>> = raw
                .iter()
                .map(|(_, ops)| {
                    let mut ops = ops.clone();
                    ops.sort_unstable();
                    ops.dedup();
                    ops
                })
                .collect();
            let window = Window::new(&lens, &uses, bucket, ahead);
            // Whose values stand in each element of the window, as the gathers overwrite them.
            let mut holds = vec![usize::MAX; window.len];
            let mut places = vec![0..0; lens.len()];
            for op in 0..30 {
                for (tensor, place) in window.gathers[window.before(op)].iter().flat_map(|gather| &gather.tensors) {
                    holds[place.clone()].fill(*tensor);
                }
                for (tensor, place) in window.gathers[window.needed(op)].iter().flat_map(|gather| &gather.tensors) {
                    places[*tensor] = place.clone();
                }
                for (tensor, ops) in uses.iter().enumerate().filter(|(_, ops)| ops.contains(&op)) {
                    let place = places[tensor].clone();
                    prop_assert_eq!(place.len(), lens[tensor], "{:?}", ops);
                    prop_assert!(holds[place].iter().all(|&holder| holder == tensor));
                }
            }
        }
    }
}
