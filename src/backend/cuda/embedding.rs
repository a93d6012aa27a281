//! Tables of vectors (kernels/embedding.cu).

use super::launch::{Grid, args};
use super::linear::sums_scratch;
use super::{Cuda, Storage};
use crate::backend::ops::{Embedding, EmbeddingBackward, EmbeddingForward, PositionBackward, PositionForward};
use crate::backend::{Grad, Memory, StepContext};
use crate::error::{Error, Result};

const FILE: &str = "embedding";
/// Positions that a block sorts (`TILE` in the kernels).
const TILE: usize = 2048;
/// Values of a digit of the sort.
const DIGITS: usize = 256;
/// Bits of a digit.
const DIGIT_BITS: u32 = 8;
/// Sorted positions that a warp sums (`CHUNK` in the kernels).
const CHUNK: usize = 32;
/// Bytes of a position with its token (`Place` in the kernels).
const PLACE: usize = 8;

/// Bytes of what sums over tokens leave between their kernels: sums of pieces of sorted positions, the positions twice, and counts of
/// digits.
fn sizes([len, width]: [usize; 2]) -> [usize; 4] {
    let (chunks, tiles) = (len.div_ceil(CHUNK), len.div_ceil(TILE));
    let sizes = [2 * chunks * width * size_of::<f32>(), PLACE * len, PLACE * len, DIGITS * tiles * size_of::<u32>()];
    sizes.map(|bytes| bytes.next_multiple_of(16))
}

/// Bytes that a backward leaves between its kernels.
pub(super) fn scratch(args: &EmbeddingBackward) -> usize {
    let EmbeddingBackward { batch, time, width, .. } = *args;
    let positions = args.dpositions.map_or(0, |_| sums_scratch([batch, time * width]));
    sizes([batch * time, width]).iter().sum::<usize>().max(positions)
}

impl<S: Storage> Embedding for Cuda<S> {
    /// A token out of range gives a vector of no numbers: the device cannot return an error.
    fn embedding_forward(&self, memory: &mut Memory<'_, Self>, args: &EmbeddingForward, _: &StepContext) -> Result<()> {
        let EmbeddingForward { batch, time, width, vocabulary, .. } = *args;
        let (tokens, y) = (Self::indices(memory, args.tokens), Self::act(memory, args.y));
        let (weight, positions) = (Self::param(memory, args.weight), Self::param_or_null(memory, args.positions));
        let grid = Grid::elements(self.device(), batch * time * width, 16 / size_of::<S>());
        let list = args![tokens, weight, positions, y, batch * time, time, width, vocabulary];
        // SAFETY: tokens hold `batch * time` numbers, y as many rows, the tables `vocabulary` rows and `time` or more.
        unsafe { self.launch(FILE, "embedding", grid, list) }
    }

    fn embedding_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &EmbeddingBackward,
        step: &StepContext,
    ) -> Result<()> {
        let EmbeddingBackward { batch, time, width, vocabulary, .. } = *args;
        let (tokens, dy) = (Self::indices(memory, args.tokens), Self::act(memory, args.dy));
        if let Some(dpositions) = args.dpositions {
            self.sum_positions(memory, dy, dpositions, [batch, time, width], step)?;
        }
        let add = !step.overwrites(args.dweight);
        let dweight = Self::grad(memory, args.dweight);
        if !add {
            // Rows that no token names.
            self.device().fill_zero(dweight, vocabulary * width * size_of::<f32>())?;
        }
        self.sum_tokens([tokens, dy, dweight], [batch * time, width], vocabulary, add)
    }

    fn position_forward(&self, memory: &mut Memory<'_, Self>, args: &PositionForward, _: &StepContext) -> Result<()> {
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let (weight, sample) = (Self::param(memory, args.weight), args.time * args.width);
        let len = args.batch * sample;
        let grid = Grid::elements(self.device(), len, 16 / size_of::<S>());
        // SAFETY: x and y hold `len` values, weight a sample's or more.
        unsafe { self.launch(FILE, "positions", grid, args![x, weight, y, len, sample]) }
    }

    fn position_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &PositionBackward,
        step: &StepContext,
    ) -> Result<()> {
        let dy = Self::act(memory, args.dy);
        self.sum_positions(memory, dy, args.dweight, [args.batch, args.time, args.width], step)
    }
}

impl<S: Storage> Cuda<S> {
    /// The gradient of a table of positions: sums over samples, and 0 beyond `time` where the write is `=`.
    fn sum_positions(
        &self,
        memory: &Memory<'_, Self>,
        dy: u64,
        grad: Grad,
        [batch, time, width]: [usize; 3],
        step: &StepContext,
    ) -> Result<()> {
        let (table, sample) = (Self::grad(memory, grad), time * width);
        let add = !step.overwrites(grad);
        let beyond = memory.arena.gradient_range(grad.param).len().saturating_sub(sample);
        if !add {
            self.device().fill_zero(table + (sample * size_of::<f32>()) as u64, beyond * size_of::<f32>())?;
        }
        self.sum_rows(dy, table, [batch, sample], add)
    }

    /// `dweight[token] (+)= sum of the rows of dy that stand at the token`, in order; rows of no token stay as they are.
    /// Addresses of tokens `[len]`, dy `[len, width]` and dweight `[vocabulary, width]`.
    fn sum_tokens(
        &self,
        [tokens, dy, dweight]: [u64; 3],
        [len, width]: [usize; 2],
        vocabulary: usize,
        add: bool,
    ) -> Result<()> {
        let device = self.device();
        let rows = u32::try_from(vocabulary).ok().filter(|_| u32::try_from(len).is_ok()).ok_or_else(|| {
            let found = format!("{vocabulary} rows and {len} positions");
            Error::shape("embedding", "fewer than 2^32 rows and positions", found)
        })?;
        let (chunks, tiles) = (len.div_ceil(CHUNK), len.div_ceil(TILE));
        let sizes = sizes([len, width]);
        let scratch = device.scratch(sizes.iter().sum())?;
        let parts = scratch.address();
        let mut places = [parts + sizes[0] as u64, parts + (sizes[0] + sizes[1]) as u64];
        let counts = places[1] + sizes[2] as u64;
        // The number of rows stands for tokens out of range.
        let bits = u32::BITS - rows.leading_zeros();
        // SAFETY: scratch was carved up by the sizes that the kernels' heads give; tokens and dy hold `len` rows.
        unsafe {
            if tiles <= 1 {
                device.launch(FILE, "sort_tile", Grid::new(1, 256), args![tokens, places[0], len, rows, bits])?;
            } else {
                let mut from = 0;
                for shift in (0..bits).step_by(DIGIT_BITS as usize) {
                    let grid = Grid::new(tiles, 256);
                    device.launch(FILE, "count_digits", grid, args![tokens, from, counts, len, rows, shift])?;
                    device.launch(FILE, "sum_counts", Grid::new(1, 1024), args![counts, DIGITS * tiles])?;
                    let list = args![tokens, from, counts, places[0], len, rows, shift];
                    device.launch(FILE, "sort_digit", grid, list)?;
                    from = places[0];
                    places.swap(0, 1);
                }
                places.swap(0, 1);
            }
            let warps = |columns: usize| Grid::new((chunks * width.div_ceil(32 * columns)).div_ceil(8), 256);
            let access = 16 / size_of::<S>();
            let (kernel, columns) =
                if width.is_multiple_of(access) { ("sum_runs", access) } else { ("sum_runs_odd", 1) };
            let list = args![places[0], dy, dweight, parts, len, width, rows, add];
            self.launch(FILE, kernel, warps(columns), list)?;
            let columns = if width.is_multiple_of(4) { 4 } else { 1 };
            let list = args![places[0], parts, dweight, len, width, rows, add];
            device.launch(FILE, "sum_parts", warps(columns), list)
        }
    }
}
