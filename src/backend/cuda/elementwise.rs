//! Sums, joins, means and conversions (kernels/elementwise.cu).

use super::launch::{Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{Add, Concatenate, Elementwise, MeanTimeBackward, MeanTimeForward, Padding, Split};
use crate::backend::{Act, Memory, StepContext};
use crate::error::Result;

const FILE: &str = "elementwise";

impl<S: Storage> Elementwise for Cuda<S> {
    fn add(&self, memory: &mut Memory<'_, Self>, args: &Add, _: &StepContext) -> Result<()> {
        let [a, b, y] = [args.a, args.b, args.y].map(|act| Self::act(memory, act));
        let grid = Grid::elements(self.device(), args.len, 16 / size_of::<S>());
        // SAFETY: three activations of `len` values each, as the operation says.
        unsafe { self.launch(FILE, "add", grid, args![a, b, y, args.len]) }
    }

    fn concatenate(&self, memory: &mut Memory<'_, Self>, args: &Concatenate, _: &StepContext) -> Result<()> {
        self.copy_columns(memory, &args.parts, &args.widths, args.y, args.rows, false)
    }

    fn split(&self, memory: &mut Memory<'_, Self>, args: &Split, _: &StepContext) -> Result<()> {
        self.copy_columns(memory, &args.parts, &args.widths, args.x, args.rows, true)
    }

    fn mean_time_forward(&self, memory: &mut Memory<'_, Self>, args: &MeanTimeForward, _: &StepContext) -> Result<()> {
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let (tokens, pad) = Self::padding(memory, args.padding);
        let grid = Grid::new(args.batch * args.width.div_ceil(256), 256);
        // SAFETY: x holds `batch * time * width` values, y `batch * width`, tokens `batch * time` where they are given.
        unsafe { self.launch(FILE, "mean_time", grid, args![x, y, tokens, pad, args.batch, args.time, args.width]) }
    }

    fn mean_time_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &MeanTimeBackward,
        _: &StepContext,
    ) -> Result<()> {
        let [dy, dx] = [args.dy, args.dx].map(|act| Self::act(memory, act));
        let (tokens, pad) = Self::padding(memory, args.padding);
        let grid = Grid::new(args.batch * args.width.div_ceil(256), 256);
        let args = args![dy, dx, tokens, pad, args.batch, args.time, args.width];
        // SAFETY: as in the forward, with x and y in each other's place.
        unsafe { self.launch(FILE, "mean_time_backward", grid, args) }
    }
}

impl<S: Storage> Cuda<S> {
    /// Address of the tokens and the token that is padding; a null address where nothing is.
    pub(super) fn padding(memory: &Memory<'_, Self>, padding: Option<Padding>) -> (u64, i32) {
        padding.map_or((0, 0), |padding| (Self::indices(memory, padding.tokens), padding.pad))
    }

    /// Copies the columns of `whole` from or to the `parts` side by side.
    fn copy_columns(
        &self,
        memory: &Memory<'_, Self>,
        parts: &[Act],
        widths: &[usize],
        whole: Act,
        rows: usize,
        apart: bool,
    ) -> Result<()> {
        let total: usize = widths.iter().sum();
        let mut whole = Self::act(memory, whole);
        for (&part, &width) in parts.iter().zip(widths) {
            let part = Self::act(memory, part);
            let (from, to) = if apart { (whole, part) } else { (part, whole) };
            let (from_stride, to_stride) = if apart { (total, width) } else { (width, total) };
            let grid = Grid::elements(self.device(), rows * width, 1);
            // SAFETY: the part holds `rows * width` values, the whole `rows * total`, of which the part's columns are copied.
            unsafe {
                self.launch(FILE, "copy_columns", grid, args![from, to, rows, width, from_stride, to_stride])?;
            }
            whole += (width * size_of::<S>()) as u64;
        }
        Ok(())
    }

    /// `to = from`, `len` values from f32 to `S`.
    pub(super) fn convert(&self, from: u64, to: u64, len: usize) -> Result<()> {
        let grid = Grid::elements(self.device(), len, 4);
        // SAFETY: the callers hand on buffers of `len` values.
        unsafe { self.launch(FILE, "convert", grid, args![from, to, len]) }
    }
}
