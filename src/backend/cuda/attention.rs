//! Attention and rotary positions: on tensor cores where storage and head size allow (kernels/flash_attention.cu,
//! flash_attention_backward.cu), else in f32 arithmetic (kernels/attention.cu); kernels/rotary.cu.

use bytemuck::{Pod, Zeroable};

use super::context::{AttentionProducts, Device};
use super::launch::{Arg, Grid, args};
use super::module::is_for;
use super::{Cuda, Storage, emulated};
use crate::backend::ops::{
    Attention, AttentionBackward, AttentionDropout, AttentionForward, AttentionGeometry, Padding, Rotary,
};
use crate::backend::{Memory, StepContext};
use crate::error::{Error, Result};

const FILE: &str = "attention";

/// `struct AttentionShape` of kernels/attention.cuh.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Shape {
    tokens: u64,
    step: u64,
    seed: u64,
    batch: i32,
    time: i32,
    heads: i32,
    kv_heads: i32,
    head_size: i32,
    sharing: i32,
    causal: i32,
    pad: i32,
    stream: u32,
    threshold: u32,
    keep: f32,
    scale: f32,
}
const _: () = assert!(size_of::<Shape>() == 72, "as the kernels'");

impl From<Shape> for Arg {
    fn from(shape: Shape) -> Self {
        Arg::of(&shape)
    }
}

/// A kernel of the flash form: its file and name, rows of a block, and bytes of shared memory.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    file: &'static str,
    name: &'static str,
    rows: usize,
    shared: usize,
}

/// The kernels of the flash form for one head size.
#[derive(Clone, Copy, Debug)]
struct Flash {
    forward: Kernel,
    backward_keys: Kernel,
    backward_queries: Kernel,
}

impl Flash {
    /// As the constants of kernels/flash_attention.cu, flash_attention_backward.cu and flash_attention_hopper.cu have it.
    fn of<S: Storage>(device: &Device, g: &AttentionGeometry) -> Option<Self> {
        // Tiles of 16-bit values, twice, each of keys and values, or of queries and gradients with two statistics a row.
        let tiles = |rows: usize| 2 * 2 * rows * g.head_size * 2;
        let statistics = |rows: usize| 2 * 2 * rows * size_of::<f32>();
        let (forward, backward) = ("flash_attention", "flash_attention_backward");
        let kernel = |file, name, shared| Kernel { file, name, rows: 64, shared };
        match g.head_size {
            _ if size_of::<S>() != 2 => None,
            64 if device.multiplies_by_groups() => Some(Flash {
                forward: kernel(HOPPER, "group_attention_forward", tiles(64)),
                backward_keys: kernel(HOPPER, "group_attention_backward_keys", tiles(64) + statistics(64)),
                backward_queries: kernel(HOPPER, "group_attention_backward_queries", tiles(64)),
            }),
            64 => Some(Flash {
                forward: kernel(forward, "flash_attention_forward", tiles(64)),
                backward_keys: kernel(backward, "flash_attention_backward_keys", tiles(64) + statistics(64)),
                backward_queries: kernel(backward, "flash_attention_backward_queries", tiles(32)),
            }),
            128 => Some(Flash {
                forward: kernel(forward, "flash_attention_forward", tiles(64)),
                // Its own 64 keys and values besides.
                backward_keys: kernel(
                    backward,
                    "flash_attention_backward_keys",
                    tiles(32) + statistics(32) + 2 * 64 * 128 * 2,
                ),
                backward_queries: kernel(backward, "flash_attention_backward_queries", tiles(32)),
            }),
            _ => None,
        }
    }
}

const HOPPER: &str = "flash_attention_hopper";

impl Device {
    fn multiplies_by_groups(&self) -> bool {
        let has_them = is_for(HOPPER, self.compute_capability()) || emulated::is_active();
        has_them && self.options().attention == AttentionProducts::Groups
    }
}

/// Positions that a block of the plain form works on.
const PLAIN_ROWS: usize = 64;

/// Columns of a head that a block of the plain form works on.
fn plain_columns(g: &AttentionGeometry) -> usize {
    match g.head_size {
        ..=32 => 32,
        33..=64 => 64,
        _ => 128,
    }
}

impl<S: Storage> Cuda<S> {
    fn shape(
        &self,
        memory: &Memory<'_, Self>,
        g: &AttentionGeometry,
        dropout: Option<AttentionDropout>,
        padding: Option<Padding>,
        step: &StepContext,
    ) -> Result<Shape> {
        let (tokens, pad) = Self::padding(memory, padding);
        let size = |what: &str, value: usize| {
            i32::try_from(value)
                .map_err(|_| Error::shape("attention", format!("less than 2^31 {what}"), value.to_string()))
        };
        let probability = dropout.map_or(0.0, |dropout| dropout.probability);
        Ok(Shape {
            tokens,
            step: if dropout.is_some() { self.device().step_state() } else { 0 },
            seed: step.seed,
            batch: size("samples", g.batch)?,
            time: size("positions", g.time)?,
            heads: size("heads", g.heads)?,
            kv_heads: size("heads", g.kv_heads)?,
            head_size: size("values of a head", g.head_size)?,
            sharing: size("heads", g.heads / g.kv_heads)?,
            causal: i32::from(g.causal),
            pad,
            stream: dropout.map_or(0, |dropout| dropout.stream),
            // Exact: a word's upper 24 bits, as a fraction of 2^24, lie below the f32 that the CPU compares with.
            threshold: (f64::from(probability as f32) * f64::from(1 << 24)).ceil() as u32,
            keep: (1.0 / (1.0 - probability)) as f32,
            scale: (1.0 / (g.head_size as f64).sqrt()) as f32,
        })
    }

    /// Queues a kernel of the plain form over blocks of positions of `heads` heads in all.
    ///
    /// # Safety
    /// As [`Cuda::launch`].
    unsafe fn plain(&self, kernel: &str, g: &AttentionGeometry, heads: usize, list: &mut [Arg]) -> Result<()> {
        let columns = plain_columns(g);
        let blocks = heads * g.head_size.div_ceil(columns) * g.time.div_ceil(PLAIN_ROWS);
        // SAFETY: as the caller promises.
        unsafe { self.launch(FILE, &format!("{kernel}_{columns}"), Grid::new(blocks, 256), list) }
    }

    /// Queues a kernel of the flash form.
    ///
    /// # Safety
    /// As [`Cuda::launch`].
    unsafe fn flash(
        &self,
        kernel: Kernel,
        (g, heads): (&AttentionGeometry, usize),
        extras: bool,
        list: &mut [Arg],
    ) -> Result<()> {
        let form = if extras { "extras_" } else { "" };
        let grid = Grid::new(heads * g.time.div_ceil(kernel.rows), 128).with_shared(kernel.shared);
        // SAFETY: as the caller promises.
        unsafe { self.launch(kernel.file, &format!("{}_{form}{}", kernel.name, g.head_size), grid, list) }
    }
}

/// Rows of all heads.
fn rows(g: &AttentionGeometry) -> usize {
    g.batch * g.time * g.heads
}

/// Bytes that a backward leaves between its kernels: an f32 for each row of a head.
pub(super) fn scratch(g: &AttentionGeometry) -> usize {
    rows(g) * size_of::<f32>()
}

impl<S: Storage> Attention for Cuda<S> {
    fn attention_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AttentionForward,
        step: &StepContext,
    ) -> Result<()> {
        let g = &args.geometry;
        let shape = self.shape(memory, g, args.dropout, args.padding, step)?;
        let [qkv, y, log_sum_exp] = [args.qkv, args.y, args.log_sum_exp].map(|act| Self::act(memory, act));
        let heads = g.batch * g.heads;
        let list = args![qkv, y, log_sum_exp, shape];
        // SAFETY: activations of the sizes that the operation says, tokens `batch * time` where they are given.
        unsafe {
            match Flash::of::<S>(self.device(), g) {
                Some(flash) => {
                    let extras = args.dropout.is_some() || args.padding.is_some();
                    self.flash(flash.forward, (g, heads), extras, list)
                }
                None => self.plain("attention_forward", g, heads, list),
            }
        }
    }

    fn attention_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AttentionBackward,
        step: &StepContext,
    ) -> Result<()> {
        let g = &args.geometry;
        let shape = self.shape(memory, g, args.dropout, args.padding, step)?;
        let [qkv, y, dy, log_sum_exp, dqkv] =
            [args.qkv, args.y, args.dy, args.log_sum_exp, args.dqkv].map(|act| Self::act(memory, act));
        let (heads, rows) = (g.batch * g.heads, rows(g));
        let scratch = self.device().scratch(scratch(g))?;
        let deltas = scratch.address();
        let list = args![qkv, dy, log_sum_exp, deltas, dqkv, shape];
        // SAFETY: as in the forward; dqkv is as qkv; the scratch holds an f32 for each row of a head.
        unsafe {
            self.launch(FILE, "attention_deltas", Grid::new(rows.div_ceil(32), 256), args![y, dy, deltas, shape])?;
            match Flash::of::<S>(self.device(), g) {
                Some(flash) => {
                    let extras = args.dropout.is_some() || args.padding.is_some();
                    self.flash(flash.backward_keys, (g, g.batch * g.kv_heads), extras, list)?;
                    self.flash(flash.backward_queries, (g, heads), extras, list)
                }
                None => {
                    self.plain("attention_backward_keys", g, g.batch * g.kv_heads, list)?;
                    self.plain("attention_backward_queries", g, heads, list)
                }
            }
        }
    }

    fn rotary(&self, memory: &mut Memory<'_, Self>, args: &Rotary, _: &StepContext) -> Result<()> {
        let Rotary { batch, time, row_width, heads, head_size, .. } = *args;
        let x = Self::act(memory, args.x);
        let half = head_size / 2;
        let together = 16 / size_of::<S>();
        let wide = half.is_multiple_of(together) && row_width.is_multiple_of(together);
        let pairs = if args.interleaved { "interleaved" } else { "halves" };
        let kernel = format!("rotary_{pairs}{}", if wide { "_wide" } else { "" });
        let direction = if args.inverse { -1.0f32 } else { 1.0 };
        let mut grid = Grid::new(time, 256).with_shared(half * 2 * size_of::<f32>());
        // A position's turns cost as much as some samples.
        grid.blocks[1] = batch.div_ceil(8).clamp(1, 65_535) as u32;
        let list = args![x, batch, time, row_width, heads, head_size, args.base.log2(), direction];
        // SAFETY: x holds `batch * time` rows, of which the first `heads * head_size` values are turned.
        unsafe { self.launch("rotary", &kernel, grid, list) }
    }
}
