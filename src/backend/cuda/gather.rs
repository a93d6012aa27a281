//! Batches gathered from a data set that lies on the device (kernels/gather.cu).
//!
//! A table is copied to the device once, in the types that programs read; it is freed with the [`Table`]. A batch then costs a
//! copy of its samples' numbers, four bytes each, and a pass over its values within the device.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::buffer::Buffer;
use super::context::Device;
use super::launch::{Grid, args};
use super::{Cuda, Storage};
use crate::backend::Activations;
use crate::backend::step::{Gather, Room};
use crate::data::{InputMut, InputSpec, Layout, Table, TargetMut, TargetSpec};
use crate::error::{Error, Result};

const FILE: &str = "gather";
/// Values that are read and converted at a time.
const BLOCK: usize = 1 << 20;

/// A table as a device keeps it.
struct Kept<S> {
    device: Arc<Device>,
    /// Whether targets are kept as real values.
    real_targets: bool,
    /// Inputs, in `S` or as whole numbers.
    inputs: Buffer<u8>,
    /// Targets, in `S` or as whole numbers; empty where they are the inputs, one later.
    targets: Buffer<u8>,
    of: PhantomData<S>,
}

/// Bytes of an input and of a target.
fn sizes<S>(table: &Table, real_targets: bool) -> [usize; 2] {
    let size = |real: bool| if real { size_of::<S>() } else { size_of::<i32>() };
    [size(matches!(table.input(), InputSpec::Real { .. })), size(real_targets)]
}

/// Bytes that a table takes on the device.
pub(super) fn table_room<S>(table: &Table) -> usize {
    let sizes = sizes::<S>(table, matches!(table.target(), TargetSpec::Real { .. }));
    let [inputs, targets] = table.len();
    inputs * sizes[0] + targets * sizes[1]
}

/// Values as the device keeps them.
fn bytes_of<S: Storage>(real: bool, values: &[f32], numbers: &[i32]) -> Vec<u8> {
    let stored = |values: &mut dyn Iterator<Item = f32>| -> Vec<u8> {
        bytemuck::cast_slice(&values.map(S::from_f32).collect::<Vec<S>>()).to_vec()
    };
    match (real, values.is_empty()) {
        (true, false) => stored(&mut values.iter().copied()),
        // Classes 0 and 1 as targets of a real output.
        (true, true) => stored(&mut numbers.iter().map(|&number| number as f32)),
        (false, _) => bytemuck::cast_slice(numbers).to_vec(),
    }
}

impl<S: Storage> Kept<S> {
    /// Copies a table to the device, and waits for it: the streams that use it wait for nothing.
    fn new(device: &Arc<Device>, table: &Table, real_targets: bool) -> Result<Self> {
        let (sizes, [inputs, targets]) = (sizes::<S>(table, real_targets), table.len());
        let mut kept = Kept {
            device: device.clone(),
            real_targets,
            inputs: Buffer::zeros(device, inputs * sizes[0])?,
            targets: Buffer::zeros(device, targets * sizes[1])?,
            of: PhantomData,
        };
        match table.layout() {
            Layout::Samples => kept.write_samples(table, sizes)?,
            Layout::Windows => kept.write_stream(table)?,
        }
        device.synchronize()?;
        Ok(kept)
    }

    fn write_samples(&mut self, table: &Table, sizes: [usize; 2]) -> Result<()> {
        let [inputs, targets] = table.each();
        let real_input = matches!(table.input(), InputSpec::Real { .. });
        let whole_target = !matches!(table.target(), TargetSpec::Real { .. });
        let at_once = (BLOCK / inputs.max(targets).max(1)).clamp(1, table.rows());
        let room = |used: bool, len: usize| if used { at_once * len } else { 0 };
        let (mut values, mut tokens) = (vec![0f32; room(real_input, inputs)], vec![0i32; room(!real_input, inputs)]);
        let (mut reals, mut numbers) =
            (vec![0f32; room(!whole_target, targets)], vec![0i32; room(whole_target, targets)]);
        for first in (0..table.rows()).step_by(at_once) {
            let rows = at_once.min(table.rows() - first);
            for row in 0..rows {
                let (of_input, of_target) = (row * inputs..(row + 1) * inputs, row * targets..(row + 1) * targets);
                let input = match real_input {
                    true => InputMut::Real(&mut values[of_input]),
                    false => InputMut::Tokens(&mut tokens[of_input]),
                };
                let target = match whole_target {
                    true => TargetMut::Index(&mut numbers[of_target]),
                    false => TargetMut::Real(&mut reals[of_target]),
                };
                table.read((first + row) as u32, input, target)?;
            }
            let part = |used: bool, len: usize| 0..if used { rows * len } else { 0 };
            let (of_values, of_tokens) = (part(real_input, inputs), part(!real_input, inputs));
            let bytes = bytes_of::<S>(real_input, &values[of_values], &tokens[of_tokens]);
            self.inputs.write(first * inputs * sizes[0], &bytes)?;
            let (of_reals, of_numbers) = (part(!whole_target, targets), part(whole_target, targets));
            let bytes = bytes_of::<S>(self.real_targets, &reals[of_reals], &numbers[of_numbers]);
            self.targets.write(first * targets * sizes[1], &bytes)?;
        }
        Ok(())
    }

    /// The stream that all windows lie in: windows side by side, then the last one and the token after it.
    fn write_stream(&mut self, table: &Table) -> Result<()> {
        let [context, _] = table.each();
        let at_once = (BLOCK / context).max(1) * context;
        let mut targets = vec![0i32; context];
        let mut tokens = Vec::with_capacity(at_once);
        let mut first = 0;
        for start in (0..table.rows()).step_by(context) {
            let from = tokens.len();
            tokens.resize(from + context, 0);
            table.read(start as u32, InputMut::Tokens(&mut tokens[from..]), TargetMut::Index(&mut targets))?;
            if tokens.len() >= at_once {
                self.inputs.write(first * size_of::<i32>(), bytemuck::cast_slice(&tokens))?;
                first += tokens.len();
                tokens.clear();
            }
        }
        self.inputs.write(first * size_of::<i32>(), bytemuck::cast_slice(&tokens))?;
        let last = table.rows() - 1;
        let mut end = vec![0i32; context];
        table.read(last as u32, InputMut::Tokens(&mut end), TargetMut::Index(&mut targets))?;
        end.extend(targets.last());
        self.inputs.write(last * size_of::<i32>(), bytemuck::cast_slice(&end))
    }
}

/// One side of a batch, in bytes: rows of `width`, `stride` apart, from the table to the program's room.
#[derive(Clone, Copy, Debug)]
struct Side {
    from: u64,
    to: u64,
    stride: usize,
    width: usize,
}

impl Side {
    /// Bytes of the widest access that all of it allows.
    fn access(&self) -> usize {
        let all = self.from | self.to | self.stride as u64 | self.width as u64;
        [16, 4].into_iter().find(|&bytes| all.is_multiple_of(bytes as u64)).unwrap_or(2)
    }
}

/// Where inputs and targets come from and go to; the table is copied to the device where it is not there yet.
pub(super) struct Sides {
    samples: usize,
    input: Side,
    target: Side,
}

impl Sides {
    /// The sides of a batch.
    ///
    /// # Errors
    /// Samples that do not fit the program's room, or no memory for the table.
    pub fn new<S: Storage>(
        device: &Arc<Device>,
        activations: &Activations<Cuda<S>>,
        gather: &Gather<'_>,
    ) -> Result<Self> {
        gather.check(activations)?;
        let table = gather.picked.table();
        let real_targets = match gather.target {
            Some(room) => matches!(room, Room::Real(_)),
            None => matches!(table.target(), TargetSpec::Real { .. }),
        };
        let of_this = |kept: &Kept<S>| Arc::ptr_eq(&kept.device, device) && kept.real_targets == real_targets;
        let kept = table.kept(of_this, || Kept::<S>::new(device, table, real_targets))?;
        let (sizes, each) = (sizes::<S>(table, real_targets), table.each());
        let width = [0, 1].map(|side| sizes[side] * each[side]);
        let inputs = kept.inputs.address_of(0);
        let (targets, stride) = match table.layout() {
            Layout::Samples => (kept.targets.address_of(0), width),
            Layout::Windows => (inputs + size_of::<i32>() as u64, [size_of::<i32>(); 2]),
        };
        let room = |room: Room| {
            let start = room.range(activations).start;
            match room {
                Room::Real(_) => activations.values.address_of(start),
                Room::Whole(_) => activations.indices.address_of(start),
            }
        };
        let input = Side { from: inputs, to: room(gather.input), stride: stride[0], width: width[0] };
        let target = match gather.target {
            Some(to) => Side { from: targets, to: room(to), stride: stride[1], width: width[1] },
            None => Side { from: 0, to: 0, stride: 0, width: 0 },
        };
        Ok(Sides { samples: gather.picked.samples(), input, target })
    }

    /// Queues the pass over the values.
    ///
    /// # Errors
    /// A device that failed.
    ///
    /// # Safety
    /// `rows` is the device address of the batch's row numbers, which the table has, and the stream comes to this when nothing
    /// queued before on another reads or writes the room.
    pub unsafe fn queue(&self, device: &Device, stream: &CudaStream, rows: u64) -> Result<()> {
        let Sides { samples, input, target } = *self;
        if samples == 0 {
            return Ok(());
        }
        let (a, b) = (input.access(), target.access());
        let widest = (input.width / a).max(target.width / b).max(1);
        let threads = widest.next_multiple_of(32).min(256);
        let samples = u32::try_from(samples)
            .map_err(|_| Error::shape("batch", format!("at most {} samples", u32::MAX), samples.to_string()))?;
        let grid = Grid {
            blocks: [samples, widest.div_ceil(threads).min(MOST_BLOCKS) as u32, 1],
            ..Grid::new(1, threads as u32)
        };
        let args = args![
            rows,
            input.from,
            input.to,
            input.stride / a,
            input.width / a,
            target.from,
            target.to,
            target.stride / b,
            target.width / b,
        ];
        // SAFETY: rows as the caller says; the table holds each of them, the room as many samples, and all that is a multiple of
        // the accesses.
        unsafe { device.launch_on(stream, FILE, &format!("gather_{a}_{b}"), grid, args) }
    }
}

/// Blocks a sample, which loop.
const MOST_BLOCKS: usize = 1 << 10;

impl<S: Storage> Cuda<S> {
    /// [`crate::backend::Backend::gather`], on the stream of everything else.
    pub(super) fn gather_now(&self, activations: &Activations<Self>, gather: &Gather<'_>) -> Result<()> {
        let device = self.device();
        let sides = Sides::new(device, activations, gather)?;
        let numbers: &[u8] = bytemuck::cast_slice(gather.picked.rows());
        let scratch = device.scratch(numbers.len())?;
        let rows = scratch.address();
        device.write(rows, numbers)?;
        // SAFETY: the numbers were copied before, on the same stream, as whatever uses the room is.
        unsafe { sides.queue(device, device.stream(), rows) }
    }
}
