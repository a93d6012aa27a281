//! Convolution by cuDNN; the bias and the f32 gradients by kernels/conv.cu.

use super::channel::Channels;
use super::context::Device;
use super::convolution::{Convolution, Direction, Target, WORKSPACE_LIMIT};
use super::launch::{Grid, args};
use super::scratch::ALIGNMENT;
use super::{Cuda, Storage};
use crate::backend::ops::{Conv, Conv2dBackward, Conv2dForward, Conv2dGeometry};
use crate::backend::{Memory, StepContext, Workspace};
use crate::error::{Error, Result};

const FILE: &str = "conv";

/// The output, cut by filter.
fn filters(g: &Conv2dGeometry) -> Result<Channels> {
    let [height, width] = g.output().ok_or_else(|| {
        Error::shape("conv2d", "a kernel that fits the padded input", format!("{:?} in {:?}", g.kernel, g.input))
    })?;
    Channels::new("conv2d", [g.batch, g.filters, height * width])
}

/// Bytes of the sums of a bias's gradient, a value a filter and part.
fn bias_scratch(g: &Conv2dGeometry, filters: &Channels) -> usize {
    size_of::<f32>() * filters.parts * g.filters
}

impl<S: Storage> Cuda<S> {
    /// Bytes of workspace that cuDNN takes for a direction, or the most that it may where no device is there to ask it on.
    fn convolution(geometry: Conv2dGeometry, direction: Direction, device: Option<&Device>) -> Result<usize> {
        device.map_or(Ok(WORKSPACE_LIMIT), |device| device.workspace(direction, geometry, S::NAME))
    }

    /// What a forward takes of the device's memory.
    pub(super) fn forward_workspace(args: &Conv2dForward, device: Option<&Device>) -> Result<Workspace> {
        let scratch = Self::convolution(args.geometry, Direction::Forward, device)?;
        Ok(Workspace { scratch, is_bound: device.is_none(), libraries: 0 })
    }

    /// What a backward takes.
    pub(super) fn backward_workspace(args: &Conv2dBackward, device: Option<&Device>) -> Result<Workspace> {
        let g = &args.geometry;
        let of_weight = Self::convolution(*g, Direction::Weight, device)?;
        let of_input = args.dx.map_or(Ok(0), |_| Self::convolution(*g, Direction::Input, device))?;
        let gradient = if S::HAS_MASTER { (g.weights() * size_of::<S>()).next_multiple_of(ALIGNMENT) } else { 0 };
        let of_bias = args.dbias.map_or(Ok(0), |_| Ok(bias_scratch(g, &filters(g)?)))?;
        let scratch = (gradient + of_weight).max(of_bias).max(of_input);
        Ok(Workspace { scratch, is_bound: device.is_none(), libraries: 0 })
    }
}

impl<S: Storage> Conv for Cuda<S> {
    /// None: cuDNN works in the device's scratch memory, of a size that it tells once the algorithm is chosen.
    fn conv2d_workspace(_: &Conv2dGeometry, _: bool) -> usize {
        0
    }

    fn conv2d_forward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dForward, _: &StepContext) -> Result<()> {
        let (x, y) = (Self::act(memory, args.x), Self::act(memory, args.y));
        let convolution = Convolution {
            direction: Direction::Forward,
            geometry: args.geometry,
            storage: S::NAME,
            operands: [x, Self::param(memory, args.weight)],
            target: Target::Memory { address: y, add: false },
        };
        // SAFETY: activations and parameters of the sizes that the geometry says.
        unsafe { self.device().convolve("conv2d_forward", &convolution)? };
        let Some(bias) = args.bias else { return Ok(()) };
        let filters = filters(&args.geometry)?;
        let kernel = filters.kernel("conv_add_bias", size_of::<S>());
        // SAFETY: as above; the bias holds a value a filter.
        unsafe { self.launch(FILE, &kernel, filters.grid(), args![y, Self::param(memory, bias), filters.shape]) }
    }

    fn conv2d_backward(&self, memory: &mut Memory<'_, Self>, args: &Conv2dBackward, step: &StepContext) -> Result<()> {
        let (device, geometry) = (self.device(), args.geometry);
        // What one launch leaves in scratch memory, the next reads.
        let _claim = device.claim();
        let [x, dy] = [args.x, args.dy].map(|act| Self::act(memory, act));
        let convolution =
            |direction, operands, target| Convolution { direction, geometry, storage: S::NAME, operands, target };
        if let Some(dx) = args.dx {
            let target = Target::Memory { address: Self::act(memory, dx), add: false };
            let convolution = convolution(Direction::Input, [Self::param(memory, args.weight), dy], target);
            // SAFETY: activations and parameters of the sizes that the geometry says.
            unsafe { device.convolve("conv2d_backward_input", &convolution)? };
        }
        let (dweight, add) = (Self::grad(memory, args.dweight), !step.overwrites(args.dweight));
        // cuDNN leaves a gradient in the type of what it is made of.
        let target = if S::HAS_MASTER { Target::Scratch } else { Target::Memory { address: dweight, add } };
        let convolution = convolution(Direction::Weight, [x, dy], target);
        // SAFETY: as above; in f32, the gradient is of the type that cuDNN writes.
        let found = unsafe { device.convolve("conv2d_backward_weight", &convolution)? };
        if S::HAS_MASTER {
            let len = geometry.weights();
            let grid = Grid::elements(device, len, 4);
            // SAFETY: scratch holds the gradient, as the convolution left it; nothing has used it since.
            unsafe { self.launch(FILE, "conv_widen_gradient", grid, args![found, dweight, len, add])? };
        }
        let Some(dbias) = args.dbias else { return Ok(()) };
        let (filters, width) = (filters(&geometry)?, geometry.filters);
        let partial = device.scratch(bias_scratch(&geometry, &filters))?.address();
        let kernel = filters.kernel("conv_sum_filters_partial", size_of::<S>());
        // SAFETY: dy as the geometry says, scratch for a value a filter and part.
        unsafe { self.launch(FILE, &kernel, filters.grid(), args![dy, partial, filters.shape])? };
        self.finish_sums(partial, Self::grad(memory, dbias), [filters.parts, width], !step.overwrites(dbias))
    }
}
