//! Pooling (kernels/pool.cu).

use super::launch::{Arg, Grid, args};
use super::{Cuda, Storage};
use crate::backend::ops::{
    AveragePoolBackward, AveragePoolForward, MaxPoolBackward, MaxPoolForward, Pool, PoolGeometry,
};
use crate::backend::{Memory, StepContext};
use crate::error::{Error, Result};

const FILE: &str = "pool";

/// `PoolShape` of the kernels.
#[derive(Clone, Copy, Debug, bytemuck::NoUninit)]
#[repr(C)]
struct PoolShape {
    input: [i32; 2],
    output: [i32; 2],
    kernel: [i32; 2],
    stride: [i32; 2],
    padding: [i32; 2],
}

const _: () = assert!(size_of::<PoolShape>() == 40, "as the kernels'");

impl From<PoolShape> for Arg {
    fn from(shape: PoolShape) -> Self {
        Arg::of(&shape)
    }
}

impl PoolShape {
    fn new(g: &PoolGeometry) -> Result<Self> {
        let wrong = |expected: &str| Error::shape("pooling", expected, format!("{:?} in {:?}", g.kernel, g.input));
        let output = g.output().ok_or_else(|| wrong("a window that fits the padded input"))?;
        // Within the kernels, a plane's positions are whole numbers of 32 bits, and so is an end of a window past it.
        let sides = [g.input, g.kernel, g.stride, g.padding].into_iter().flatten();
        let fits = g.input[0].saturating_mul(g.input[1]) < 1 << 31 && sides.max() < Some(1 << 28);
        if !fits {
            return Err(wrong("planes of fewer than 2^31 values"));
        }
        let pair = |[h, w]: [usize; 2]| [h as i32, w as i32];
        Ok(PoolShape {
            input: pair(g.input),
            output: pair(output),
            kernel: pair(g.kernel),
            stride: pair(g.stride),
            padding: pair(g.padding),
        })
    }

    /// Blocks of 256 threads for planes of as many values, a thread a value where a plane has so few.
    fn grid(planes: usize, [height, width]: [i32; 2]) -> Grid {
        let values = height as usize * width as usize;
        let threads = values.min(256).next_power_of_two() as u32;
        let planes_a_block = 256 / threads;
        Grid { threads: [threads, planes_a_block, 1], ..Grid::new(planes.div_ceil(planes_a_block as usize), 256) }
    }
}

/// One over the values of a whole window, padding too.
fn scale(g: &PoolGeometry) -> f32 {
    (1.0 / (g.kernel[0] * g.kernel[1]) as f64) as f32
}

impl<S: Storage> Pool for Cuda<S> {
    fn max_pool_forward(&self, memory: &mut Memory<'_, Self>, args: &MaxPoolForward, _: &StepContext) -> Result<()> {
        let shape = PoolShape::new(&args.geometry)?;
        let planes = args.geometry.planes;
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let list = args![x, y, Self::indices(memory, args.positions), planes, shape];
        // SAFETY: activations and positions of the sizes that the geometry says.
        unsafe { self.launch(FILE, "max_pool", PoolShape::grid(planes, shape.output), list) }
    }

    fn max_pool_backward(&self, memory: &mut Memory<'_, Self>, args: &MaxPoolBackward, _: &StepContext) -> Result<()> {
        let shape = PoolShape::new(&args.geometry)?;
        let planes = args.geometry.planes;
        let [dy, dx] = [args.dy, args.dx].map(|act| Self::act(memory, act));
        let list = args![dy, Self::indices(memory, args.positions), dx, planes, shape];
        // SAFETY: as in the forward.
        unsafe { self.launch(FILE, "max_pool_backward", PoolShape::grid(planes, shape.input), list) }
    }

    fn average_pool_forward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AveragePoolForward,
        _: &StepContext,
    ) -> Result<()> {
        let shape = PoolShape::new(&args.geometry)?;
        let planes = args.geometry.planes;
        let [x, y] = [args.x, args.y].map(|act| Self::act(memory, act));
        let scale = scale(&args.geometry);
        if shape.kernel == shape.input && shape.padding == [0, 0] {
            let [height, width] = shape.input;
            let grid = Grid { threads: [32, 8, 1], ..Grid::new(planes.div_ceil(8), 256) };
            // SAFETY: as in the forward of the maximum.
            return unsafe { self.launch(FILE, "average_plane", grid, args![x, y, scale, planes, height * width]) };
        }
        let list = args![x, y, scale, planes, shape];
        // SAFETY: as in the forward of the maximum.
        unsafe { self.launch(FILE, "average_pool", PoolShape::grid(planes, shape.output), list) }
    }

    fn average_pool_backward(
        &self,
        memory: &mut Memory<'_, Self>,
        args: &AveragePoolBackward,
        _: &StepContext,
    ) -> Result<()> {
        let shape = PoolShape::new(&args.geometry)?;
        let planes = args.geometry.planes;
        let [dy, dx] = [args.dy, args.dx].map(|act| Self::act(memory, act));
        let list = args![dy, dx, scale(&args.geometry), planes, shape];
        // SAFETY: as in the forward of the maximum.
        unsafe { self.launch(FILE, "average_pool_backward", PoolShape::grid(planes, shape.input), list) }
    }
}
