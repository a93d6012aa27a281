//! Convolutions by cuDNN, the algorithm chosen once a shape.
//!
//! Only deterministic algorithms are taken, in the order in which cuDNN's heuristics expect them to be fast: measured times
//! would choose now this one, now that, and so give other bits.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::cudnn::result::{self, CudnnError};
use cudarc::cudnn::sys::{
    self, cudnnConvolutionBwdDataAlgo_t, cudnnConvolutionBwdDataAlgoPerf_t, cudnnConvolutionBwdFilterAlgo_t,
    cudnnConvolutionBwdFilterAlgoPerf_t, cudnnConvolutionFwdAlgo_t, cudnnConvolutionFwdAlgoPerf_t,
    cudnnConvolutionMode_t, cudnnDataType_t, cudnnDeterminism_t, cudnnMathType_t, cudnnStatus_t, cudnnTensorFormat_t,
};

use super::context::{Device, LESS_MEMORY};
use super::scratch::ALIGNMENT;
use crate::backend::ops::Conv2dGeometry;
use crate::error::{Error, Result};

/// What is computed of a convolution `y = x * w`, and from what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Direction {
    /// y, of x and w.
    Forward,
    /// dx, of w and dy.
    Input,
    /// dw, of x and dy.
    Weight,
}

/// Where the result goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// `=`, or `+=`.
    Memory { address: u64, add: bool },
    /// Scratch memory, until the operation, which has claimed the device, asks for scratch again.
    Scratch,
}

/// One convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Convolution {
    pub direction: Direction,
    pub geometry: Conv2dGeometry,
    /// Type of all tensors: `f32`, `bf16` or `f16`. Sums are f32.
    pub storage: &'static str,
    /// In the order that [`Direction`] names them.
    pub operands: [u64; 2],
    pub target: Target,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    direction: Direction,
    geometry: Conv2dGeometry,
    storage: &'static str,
}

/// cuDNN and what is known of its algorithms.
pub(super) struct Dnn {
    handle: sys::cudnnHandle_t,
    /// The lock is that of the handle too, which one thread may use at a time.
    known: Mutex<Known>,
}

/// What is known of algorithms.
#[derive(Default)]
struct Known {
    /// Those that the heuristics gave for shapes of which none was chosen yet, in their order.
    candidates: HashMap<Shape, Vec<Candidate>>,
    chosen: HashMap<Shape, Plan>,
}

// SAFETY: NVIDIA allows a handle, and descriptors, to be used from any thread, by one at a time: all uses are under the lock.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

/// Workspace that an algorithm may ask for.
pub(super) const WORKSPACE_LIMIT: usize = 512 << 20;
fn dnn_error(what: &str, error: CudnnError) -> Error {
    let told = format!("cuDNN: cannot {what}: {:?}", error.0);
    match error.0 {
        cudnnStatus_t::CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED => {
            Error::Device(format!("{told}: {LESS_MEMORY}"))
        }
        _ => Error::DeviceFailed(told),
    }
}

impl Dnn {
    pub fn open(device: &Device) -> Result<Self> {
        // SAFETY: asks whether a library of this name loads; nothing of it is called.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "cuDNN, which convolutions need, was not found (libcudnn.so.9): `pip install nvidia-cudnn-cu13` and name its \
                 folder in LD_LIBRARY_PATH, or install NVIDIA's cuDNN; `warpstep doctor` tells what is there"
                    .into(),
            ));
        }
        device.bind()?;
        let handle = result::create_handle().map_err(|error| dnn_error("start", error))?;
        let dnn = Dnn { handle, known: Mutex::default() };
        // SAFETY: the handle was just made; the stream lives as long as the device, which closes the handle first.
        unsafe { result::set_stream(handle, device.stream().cu_stream().cast()) }
            .map_err(|error| dnn_error("use the device's stream", error))?;
        Ok(dnn)
    }
}

impl Drop for Dnn {
    fn drop(&mut self) {
        self.known.get_mut().unwrap_or_else(PoisonError::into_inner).chosen.clear();
        // SAFETY: the handle came from `create_handle` and is not used again.
        // A library that does not close leaves nothing to be done.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// An object of cuDNN, destroyed with this.
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> std::result::Result<(), CudnnError>,
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: `destroy` is the one that belongs to what made `raw`, called once.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

/// What cuDNN is told of a convolution.
struct Described {
    x: Owned<sys::cudnnTensorDescriptor_t>,
    y: Owned<sys::cudnnTensorDescriptor_t>,
    w: Owned<sys::cudnnFilterDescriptor_t>,
    operation: Owned<sys::cudnnConvolutionDescriptor_t>,
}

/// An algorithm, by the direction that it is for.
#[derive(Clone, Copy, Debug)]
enum Algorithm {
    Forward(cudnnConvolutionFwdAlgo_t),
    Input(cudnnConvolutionBwdDataAlgo_t),
    Weight(cudnnConvolutionBwdFilterAlgo_t),
}

/// What the heuristics say of an algorithm.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    algorithm: Algorithm,
    status: cudnnStatus_t,
    workspace: usize,
    determinism: cudnnDeterminism_t,
    math: cudnnMathType_t,
}

/// A described convolution with the algorithm that computes it.
struct Plan {
    described: Described,
    algorithm: Algorithm,
    workspace: usize,
}

fn data_type(name: &str) -> cudnnDataType_t {
    match name {
        "bf16" => cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        "f16" => cudnnDataType_t::CUDNN_DATA_HALF,
        _ => cudnnDataType_t::CUDNN_DATA_FLOAT,
    }
}

/// What the algorithm may compute with: tensor cores for 16 bits, and for f32 where tf32 is allowed.
fn math(storage: &str, tf32: bool) -> cudnnMathType_t {
    match (storage, tf32) {
        ("f32", false) => cudnnMathType_t::CUDNN_FMA_MATH,
        ("f32", true) => cudnnMathType_t::CUDNN_DEFAULT_MATH,
        _ => cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
    }
}

impl Device {
    /// Queues a convolution, and tells where its result lies.
    ///
    /// # Safety
    /// The operands and the target hold what the geometry and the type say.
    pub(super) unsafe fn convolve(&self, name: &str, convolution: &Convolution) -> Result<u64> {
        // Before the lock of what is known, which a thread that has claimed the device waits for.
        let _claim = self.claim();
        let dnn = self.dnn()?;
        self.bind()?;
        let Convolution { direction, geometry, storage, .. } = *convolution;
        let shape = Shape { direction, geometry, storage };
        let mut known = dnn.known.lock().unwrap_or_else(PoisonError::into_inner);
        let fail = |error| dnn_error(&format!("compute {shape:?}"), error);
        if let Some(plan) = known.chosen.get(&shape) {
            // SAFETY: as the caller promises.
            return unsafe { self.run_plan(name, dnn, plan, convolution) }.and_then(|done| done.map_err(fail));
        }
        let math = math(storage, self.options().tf32);
        let mut described = describe(&geometry, storage, math)?;
        let candidates = match known.candidates.remove(&shape) {
            Some(candidates) => candidates,
            None => usable(dnn, &described, direction, math).map_err(fail)?,
        };
        for Candidate { algorithm, workspace, math, .. } in candidates {
            // SAFETY: the description lives.
            unsafe { result::set_convolution_math_type(described.operation.raw, math) }.map_err(fail)?;
            let plan = Plan { described, algorithm, workspace };
            // SAFETY: as the caller promises. What is not supported is told before anything is queued.
            match unsafe { self.run_plan(name, dnn, &plan, convolution)? } {
                Ok(target) => {
                    known.chosen.insert(shape, plan);
                    return Ok(target);
                }
                // The heuristics do not know every limit of their algorithms.
                Err(CudnnError(status)) if status as u32 / 1000 == NOT_SUPPORTED => described = plan.described,
                Err(error) => return Err(fail(error)),
            }
        }
        Err(Error::Device(format!(
            "cuDNN has no deterministic algorithm of at most {} MiB of workspace for {shape:?}: use another run.precision, or \
             device = \"cpu\"",
            WORKSPACE_LIMIT >> 20
        )))
    }

    /// Bytes of workspace that the algorithm of a convolution takes: of the one that was chosen, or that the heuristics think fastest.
    pub(super) fn workspace(
        &self,
        direction: Direction,
        geometry: Conv2dGeometry,
        storage: &'static str,
    ) -> Result<usize> {
        let _claim = self.claim();
        let dnn = self.dnn()?;
        self.bind()?;
        let shape = Shape { direction, geometry, storage };
        let mut known = dnn.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = known.chosen.get(&shape) {
            return Ok(plan.workspace);
        }
        let first = |candidates: &Vec<Candidate>| candidates.first().map_or(0, |candidate| candidate.workspace);
        if let Some(candidates) = known.candidates.get(&shape) {
            return Ok(first(candidates));
        }
        let math = math(storage, self.options().tf32);
        let found = usable(dnn, &describe(&geometry, storage, math)?, direction, math)
            .map_err(|error| dnn_error(&format!("find an algorithm for {shape:?}"), error))?;
        // Where there is none, the operation says so.
        Ok(first(known.candidates.entry(shape).or_insert(found)))
    }

    /// Runs a plan: what the device said, then what cuDNN said.
    ///
    /// # Safety
    /// As [`Device::convolve`].
    unsafe fn run_plan(
        &self,
        name: &str,
        dnn: &Dnn,
        plan: &Plan,
        convolution: &Convolution,
    ) -> Result<std::result::Result<u64, CudnnError>> {
        let (target, workspace) = match convolution.target {
            Target::Memory { address, .. } => (address, self.scratch(plan.workspace)?.address()),
            Target::Scratch => {
                let front = convolution.result_bytes().next_multiple_of(ALIGNMENT);
                let scratch = self.scratch(front + plan.workspace)?.address();
                (scratch, scratch + front as u64)
            }
        };
        let mut done = Ok(target);
        self.timed(name, || {
            // SAFETY: as the caller promises; scratch holds the workspace, behind the target where that is there too.
            done = unsafe { execute(dnn, plan, convolution, target, workspace) }.map(|()| target);
            Ok(())
        })?;
        Ok(done)
    }
}

/// Thousands of the statuses that say that something is not supported.
const NOT_SUPPORTED: u32 = cudnnStatus_t::CUDNN_STATUS_NOT_SUPPORTED as u32 / 1000;

impl Convolution {
    /// Bytes of what is computed.
    fn result_bytes(&self) -> usize {
        let g = &self.geometry;
        let values = match self.direction {
            Direction::Forward => g.batch * g.filters * g.output().map_or(0, |[h, w]| h * w),
            Direction::Input => g.batch * g.channels * g.input[0] * g.input[1],
            Direction::Weight => g.weights(),
        };
        values * if self.storage == "f32" { 4 } else { 2 }
    }
}

fn describe(g: &Conv2dGeometry, storage: &str, math: cudnnMathType_t) -> Result<Described> {
    let whole = |values: [usize; 4]| -> Result<[c_int; 4]> {
        let mut out = [0; 4];
        for (out, value) in out.iter_mut().zip(values) {
            *out = c_int::try_from(value)
                .map_err(|_| Error::shape("conv2d", "sizes of fewer than 2^31", format!("{values:?}")))?;
        }
        Ok(out)
    };
    let [out_height, out_width] = g.output().ok_or_else(|| {
        Error::shape("conv2d", "a kernel that fits the padded input", format!("{:?} in {:?}", g.kernel, g.input))
    })?;
    let x = whole([g.batch, g.channels, g.input[0], g.input[1]])?;
    let y = whole([g.batch, g.filters, out_height, out_width])?;
    let w = whole([g.filters, g.channels / g.groups, g.kernel[0], g.kernel[1]])?;
    let steps = whole([g.padding[0], g.padding[1], g.stride[0], g.stride[1]])?;
    let [groups, ..] = whole([g.groups, 0, 0, 0])?;
    describe_raw([x, y, w, steps], groups, data_type(storage), math)
        .map_err(|error| dnn_error(&format!("describe {g:?} in {storage}"), error))
}

/// `sizes` are x, y, w, and paddings with strides.
fn describe_raw(
    [x, y, w, steps]: [[c_int; 4]; 4],
    groups: c_int,
    data: cudnnDataType_t,
    math: cudnnMathType_t,
) -> std::result::Result<Described, CudnnError> {
    let format = cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
    let tensor = || {
        let raw = result::create_tensor_descriptor()?;
        Ok(Owned { raw, destroy: result::destroy_tensor_descriptor })
    };
    let described = Described {
        x: tensor()?,
        y: tensor()?,
        w: Owned { raw: result::create_filter_descriptor()?, destroy: result::destroy_filter_descriptor },
        operation: Owned {
            raw: result::create_convolution_descriptor()?,
            destroy: result::destroy_convolution_descriptor,
        },
    };
    let [pad_height, pad_width, stride_height, stride_width] = steps;
    let operation = described.operation.raw;
    // SAFETY: all four were just made.
    unsafe {
        result::set_tensor4d_descriptor(described.x.raw, format, data, x)?;
        result::set_tensor4d_descriptor(described.y.raw, format, data, y)?;
        result::set_filter4d_descriptor(described.w.raw, data, format, w)?;
        result::set_convolution2d_descriptor(
            operation,
            pad_height,
            pad_width,
            stride_height,
            stride_width,
            1,
            1,
            cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
            cudnnDataType_t::CUDNN_DATA_FLOAT,
        )?;
        result::set_convolution_group_count(operation, groups)?;
        result::set_convolution_math_type(operation, math)?;
    }
    Ok(described)
}

/// The algorithms that may be taken, in the order in which cuDNN thinks them fast.
fn usable(
    dnn: &Dnn,
    described: &Described,
    direction: Direction,
    math: cudnnMathType_t,
) -> std::result::Result<Vec<Candidate>, CudnnError> {
    let (h, c) = (dnn.handle, described.operation.raw);
    let (x, y, w) = (described.x.raw, described.y.raw, described.w.raw);
    macro_rules! ask {
        ($call:path, $perf:ty, $algorithm:path, [$first:expr, $second:expr, $third:expr]) => {
            // SAFETY: handle and descriptions live; there is room for as many results as `heuristics` asks for.
            heuristics(|room, count, to: *mut $perf| unsafe { $call(h, $first, $second, c, $third, room, count, to) })?
                .into_iter()
                .map(|found| Candidate {
                    algorithm: $algorithm(found.algo),
                    status: found.status,
                    workspace: found.memory,
                    determinism: found.determinism,
                    math: found.mathType,
                })
                .collect()
        };
    }
    let mut found: Vec<Candidate> = match direction {
        Direction::Forward => ask!(
            result::get_convolution_forward_algorithm,
            cudnnConvolutionFwdAlgoPerf_t,
            Algorithm::Forward,
            [x, w, y]
        ),
        Direction::Input => ask!(
            result::get_convolution_backward_data_algorithm,
            cudnnConvolutionBwdDataAlgoPerf_t,
            Algorithm::Input,
            [w, y, x]
        ),
        Direction::Weight => ask!(
            result::get_convolution_backward_filter_algorithm,
            cudnnConvolutionBwdFilterAlgoPerf_t,
            Algorithm::Weight,
            [x, y, w]
        ),
    };
    let exact = math == cudnnMathType_t::CUDNN_FMA_MATH;
    found.retain(|candidate| {
        candidate.status == cudnnStatus_t::CUDNN_STATUS_SUCCESS
            && candidate.determinism == cudnnDeterminism_t::CUDNN_DETERMINISTIC
            && candidate.workspace <= WORKSPACE_LIMIT
            && (!exact || candidate.math == math)
    });
    Ok(found)
}

/// More than there are algorithms in any direction.
const CANDIDATES: usize = 16;

/// What one of the heuristics' calls says, given room for `CANDIDATES` results.
fn heuristics<P>(
    ask: impl FnOnce(c_int, *mut c_int, *mut P) -> std::result::Result<(), CudnnError>,
) -> std::result::Result<Vec<P>, CudnnError> {
    let mut found: Vec<P> = Vec::with_capacity(CANDIDATES);
    let mut count = 0;
    ask(CANDIDATES as c_int, &mut count, found.as_mut_ptr())?;
    // SAFETY: the library filled as many results as it says, and no more than it was given room for.
    unsafe { found.set_len(usize::try_from(count).unwrap_or(0).min(CANDIDATES)) };
    Ok(found)
}

/// # Safety
/// As [`Device::convolve`]; `workspace` holds what the plan asks for.
unsafe fn execute(
    dnn: &Dnn,
    plan: &Plan,
    convolution: &Convolution,
    target: u64,
    workspace: u64,
) -> std::result::Result<(), CudnnError> {
    let add = matches!(convolution.target, Target::Memory { add: true, .. });
    let (alpha, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
    let (alpha, beta) = (std::ptr::from_ref(&alpha).cast(), std::ptr::from_ref(&beta).cast());
    let [first, second] = convolution.operands.map(|address| address as *const c_void);
    let (target, space, bytes) = (target as *mut c_void, workspace as *mut c_void, plan.workspace);
    let (handle, operation) = (dnn.handle, plan.described.operation.raw);
    let (x, y, w) = (plan.described.x.raw, plan.described.y.raw, plan.described.w.raw);
    // SAFETY: handle and descriptions live, the scalars are read before a call returns, the tensors are as the caller promises.
    unsafe {
        match plan.algorithm {
            Algorithm::Forward(algorithm) => result::convolution_forward(
                handle, alpha, x, first, w, second, operation, algorithm, space, bytes, beta, y, target,
            ),
            Algorithm::Input(algorithm) => result::convolution_backward_data(
                handle, alpha, w, first, y, second, operation, algorithm, space, bytes, beta, x, target,
            ),
            Algorithm::Weight(algorithm) => result::convolution_backward_filter(
                handle, alpha, x, first, y, second, operation, algorithm, space, bytes, beta, w, target,
            ),
        }
    }
}
