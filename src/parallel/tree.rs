//! A sum over processes in one fixed order: that of a binary tree over their ranks.

use std::ops::Range;

use super::collective::Collective;
use crate::error::{Error, Result};

/// Elements that parts begin at multiples of.
const ALIGNMENT: usize = 16;

/// `values = sum over ranks`, as `((0 + 1) + (2 + 3)) + ((4 + 5) + ..)` for every element, whatever the number of processes is split
/// into: a power of two. `room` is overwritten.
///
/// Halves are swapped with the neighbour at distance 1, quarters with the one at distance 2, and so on, each process summing what it
/// keeps; then back. Each sends and receives `2 (world - 1) / world` of the values, the least that a sum by all takes, and since
/// `a + b` is `b + a` to the bit, all have the same bits.
///
/// # Errors
/// A number of processes that is no power of two; a process or a network that failed.
pub fn tree_sum(collective: &dyn Collective, values: &mut [f32], room: &mut Vec<f32>) -> Result<()> {
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
        room.resize(keep.len().max(room.len()), 0.0);
        let received = &mut room[..keep.len()];
        collective.swap(rank ^ distance, (&mut values[give.clone()]).into(), (&mut *received).into())?;
        values[keep.clone()].iter_mut().zip(&*received).for_each(|(value, &other)| *value += other);
        kept.push((keep.clone(), give));
        own = keep;
        distance *= 2;
    }
    while let Some((keep, give)) = kept.pop() {
        distance /= 2;
        room.resize(give.len().max(room.len()), 0.0);
        let received = &mut room[..give.len()];
        collective.swap(rank ^ distance, (&mut values[keep]).into(), (&mut *received).into())?;
        values[give].copy_from_slice(received);
    }
    Ok(())
}

/// Where a range is cut in two.
fn middle(range: &Range<usize>) -> usize {
    let half = (range.len() / 2).next_multiple_of(ALIGNMENT);
    (range.start + half).min(range.end)
}
