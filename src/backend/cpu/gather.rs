//! Batches gathered from a table: each sample is read straight into its place.

use std::any::TypeId;

use super::Cpu;
use crate::backend::step::{Gather, Room};
use crate::backend::{Activations, disjoint};
use crate::data::{InputMut, Table, TargetMut, TargetSpec};
use crate::error::Result;
use crate::real::Real;

/// Values that one thread reads at a time.
const AT_ONCE: usize = 1 << 15;

/// One side of a batch.
enum Side<'a, R> {
    Real(&'a mut [R]),
    Whole(&'a mut [i32]),
    /// The program takes none.
    Nowhere,
}

impl<R> Side<'_, R> {
    /// The first `len` values, and the rest.
    fn split(self, len: usize) -> (Self, Self) {
        match self {
            Side::Real(values) => {
                let (first, rest) = values.split_at_mut(len);
                (Side::Real(first), Side::Real(rest))
            }
            Side::Whole(values) => {
                let (first, rest) = values.split_at_mut(len);
                (Side::Whole(first), Side::Whole(rest))
            }
            Side::Nowhere => (Side::Nowhere, Side::Nowhere),
        }
    }
}

/// [`crate::backend::Backend::gather`] on the CPU.
pub(super) fn gather<R: Real>(activations: &mut Activations<Cpu<R>>, gather: &Gather<'_>) -> Result<()> {
    gather.check(activations)?;
    let (input, target) = sides(activations, gather)?;
    read(gather.picked.table(), gather.picked.rows(), input, target)
}

/// Reads the rows, large batches by several threads.
fn read<R: Real>(table: &Table, rows: &[u32], input: Side<'_, R>, target: Side<'_, R>) -> Result<()> {
    let [inputs, targets] = table.each();
    let half = rows.len() / 2;
    if half == 0 || rows.len() * inputs <= AT_ONCE {
        return read_part(table, rows, input, target);
    }
    let ((first_rows, other_rows), (first_input, other_input)) = (rows.split_at(half), input.split(half * inputs));
    let (first_target, other_target) = target.split(half * targets);
    let (first, other) = rayon::join(
        || read(table, first_rows, first_input, first_target),
        || read(table, other_rows, other_input, other_target),
    );
    first.and(other)
}

fn read_part<R: Real>(table: &Table, rows: &[u32], mut input: Side<'_, R>, mut target: Side<'_, R>) -> Result<()> {
    let [inputs, targets] = table.each();
    let whole_targets = !matches!(table.target(), TargetSpec::Real { .. });
    // What is read in another type than it is kept in.
    let (mut real_input, mut real_target) = (vec![0f32; inputs], vec![0f32; targets]);
    let mut whole_target = vec![0i32; targets];
    for (sample, &row) in rows.iter().enumerate() {
        let (of_input, of_target) = (sample * inputs..(sample + 1) * inputs, sample * targets..(sample + 1) * targets);
        let input_to = match &mut input {
            Side::Real(values) => InputMut::Real(direct(&mut values[of_input.clone()]).unwrap_or(&mut real_input)),
            Side::Whole(values) => InputMut::Tokens(&mut values[of_input.clone()]),
            Side::Nowhere => InputMut::Real(&mut real_input),
        };
        let target_to = match (&mut target, whole_targets) {
            (Side::Whole(values), true) => TargetMut::Index(&mut values[of_target.clone()]),
            (_, true) => TargetMut::Index(&mut whole_target),
            (Side::Real(values), false) => {
                TargetMut::Real(direct(&mut values[of_target.clone()]).unwrap_or(&mut real_target))
            }
            (_, false) => TargetMut::Real(&mut real_target),
        };
        table.read(row, input_to, target_to)?;
        if let Side::Real(values) = &mut input
            && !is_f32::<R>()
        {
            values[of_input].iter_mut().zip(&real_input).for_each(|(to, &from)| *to = R::from_f32(from));
        }
        if let Side::Real(values) = &mut target {
            let values = values[of_target].iter_mut();
            if whole_targets {
                values.zip(&whole_target).for_each(|(to, &from)| *to = R::from_f32(from as f32));
            } else if !is_f32::<R>() {
                values.zip(&real_target).for_each(|(to, &from)| *to = R::from_f32(from));
            }
        }
    }
    Ok(())
}

/// The places of inputs and targets.
fn sides<'a, R: Real>(
    activations: &'a mut Activations<Cpu<R>>,
    gather: &Gather<'_>,
) -> Result<(Side<'a, R>, Side<'a, R>)> {
    let of_input = gather.input.range(activations);
    let of_target = gather.target.map_or(0..0, |room| room.range(activations));
    let Activations { values, indices, .. } = activations;
    Ok(match (gather.input, gather.target) {
        (Room::Real(_), None) => (Side::Real(&mut values[of_input]), Side::Nowhere),
        (Room::Whole(_), None) => (Side::Whole(&mut indices[of_input]), Side::Nowhere),
        (Room::Real(_), Some(Room::Whole(_))) => {
            (Side::Real(&mut values[of_input]), Side::Whole(&mut indices[of_target]))
        }
        (Room::Whole(_), Some(Room::Real(_))) => {
            (Side::Whole(&mut indices[of_input]), Side::Real(&mut values[of_target]))
        }
        (Room::Real(_), Some(Room::Real(_))) => {
            let [input, target] = disjoint(values, [of_input, of_target], "batch")?;
            (Side::Real(input), Side::Real(target))
        }
        (Room::Whole(_), Some(Room::Whole(_))) => {
            let [input, target] = disjoint(indices, [of_input, of_target], "batch")?;
            (Side::Whole(input), Side::Whole(target))
        }
    })
}

fn is_f32<R: 'static>() -> bool {
    TypeId::of::<R>() == TypeId::of::<f32>()
}

/// The values themselves, where they are f32.
fn direct<R: Real>(values: &mut [R]) -> Option<&mut [f32]> {
    is_f32::<R>().then(|| bytemuck::cast_slice_mut(values))
}
