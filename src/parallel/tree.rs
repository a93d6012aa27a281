//! A sum over processes in one fixed order: that of a binary tree over their ranks.

use std::ops::Range;

use super::collective::Collective;
use crate::backend::Slice;
use crate::error::{Error, Result};

/// Elements that parts begin at multiples of.
const ALIGNMENT: usize = 16;

/// `values = sum over ranks`, as `((0 + 1) + (2 + 3)) + ((4 + 5) + ..)` for every element, whatever the number of processes is split
/// into: a power of two. Both in f32; `room` has [`room_of_tree`] elements and is overwritten.
///
/// Halves are swapped with the neighbour at distance 1, quarters with the one at distance 2, and so on, each process summing what it
/// keeps; then back. Each sends and receives `2 (world - 1) / world` of the values, the least that a sum by all takes, and since
/// `a + b` is `b + a` to the bit, all have the same bits, on a host or a device.
///
/// # Errors
/// A number of processes that is no power of two; a process or a network that failed.
pub fn tree_sum(collective: &dyn Collective, mut values: Slice<'_>, mut room: Slice<'_>) -> Result<()> {
    let (rank, world) = (collective.rank(), collective.world());
    if !world.is_power_of_two() {
        return Err(Error::shape("tree sum", "a power of two of processes", world.to_string()));
    }
    let mut kept: Vec<(Range<usize>, Range<usize>)> = Vec::new();
    let mut own = 0..values.len();
    let mut distance = 1;
    while distance < world {
        let middle = middle(&own);
        let (keep, give) = if rank & distance == 0 {
            (own.start..middle, middle..own.end)
        } else {
            (middle..own.end, own.start..middle)
        };
        collective.swap(rank ^ distance, values.part(give.clone())?, room.part(0..keep.len())?)?;
        collective.add(values.part(keep.clone())?, room.part(0..keep.len())?)?;
        kept.push((keep.clone(), give));
        own = keep;
        distance *= 2;
    }
    while let Some((keep, give)) = kept.pop() {
        distance /= 2;
        let [send, receive] = values.parts([keep, give])?;
        collective.swap(rank ^ distance, send, receive)?;
    }
    Ok(())
}

/// As [`tree_sum`], but only of `values[shards[rank]]`; what becomes of the other elements is open. A shard a rank. `room` has as
/// many elements as the longest shard.
///
/// At distance 1 each process gives its neighbour what those ranks will keep whose last bit is the neighbour's, at distance 2 what
/// those will keep whose last two bits are, and so on: every element goes the way that it goes in a sum by all.
///
/// # Errors
/// As [`tree_sum`].
pub fn tree_reduce_scatter(
    collective: &dyn Collective,
    mut values: Slice<'_>,
    shards: &[Range<usize>],
    mut room: Slice<'_>,
) -> Result<()> {
    let (rank, world) = (collective.rank(), collective.world());
    if !world.is_power_of_two() || shards.len() != world {
        let found = format!("{} shards of {world} processes", shards.len());
        return Err(Error::shape("tree sum", "a power of two of processes, a shard each", found));
    }
    let mut distance = 1;
    while distance < world {
        // The ranks that agree with this one in the bits so far; the partner keeps for those that differ from them in the last.
        for kept in (0..world).filter(|other| (rank ^ other) & (2 * distance - 1) == 0) {
            let (keep, give) = (shards[kept].clone(), shards[kept ^ distance].clone());
            let len = keep.len();
            if len + give.len() > 0 {
                collective.swap(rank ^ distance, values.part(give)?, room.part(0..len)?)?;
                collective.add(values.part(keep)?, room.part(0..len)?)?;
            }
        }
        distance *= 2;
    }
    Ok(())
}

/// Elements that [`tree_sum`] of so many needs besides.
pub fn room_of_tree(len: usize) -> usize {
    let middle = middle(&(0..len));
    middle.max(len - middle)
}

/// Where a range is cut in two.
fn middle(range: &Range<usize>) -> usize {
    let half = (range.len() / 2).next_multiple_of(ALIGNMENT);
    (range.start + half).min(range.end)
}
