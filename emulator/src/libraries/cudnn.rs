//! cuDNN: the convolutions of its legacy interface, as Warpstep calls them: NCHW, cross-correlation, no dilation, one type for all
//! tensors, sums in f32.
//!
//! The heuristics offer what the real ones may: an algorithm whose sums have no fixed order (first, as if it were fastest), those
//! that want a workspace, and some that cannot do the shape.
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    clippy::too_many_arguments,
    reason = "the library's own names and lists; its documentation says what each asks"
)]

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::convolution::{Direction, Geometry, convolve};
use super::cublaslt::multiply::tf32;
use super::values::{Type, read, write};
use crate::driver::queue_task;
use crate::fault::Fault;
use crate::memory::Memory;

mod status {
    pub const SUCCESS: i32 = 0;
    pub const BAD_PARAM: i32 = 2000;
    pub const NOT_SUPPORTED: i32 = 3000;
    pub const INTERNAL_ERROR: i32 = 4000;
    pub const EXECUTION_FAILED: i32 = 5000;
}

const FORMAT_NCHW: i32 = 0;
const CROSS_CORRELATION: i32 = 1;
const DATA_FLOAT: i32 = 0;
/// Default, tensor cores, tensor cores with conversion, fused multiply-add.
const MATH: std::ops::RangeInclusive<i32> = 0..=3;
const MATH_DEFAULT: i32 = 0;
const MATH_TENSOR: i32 = 1;
const MATH_FMA: i32 = 3;

/// A library handle.
#[derive(Debug, Default)]
pub struct Handle {
    stream: usize,
}

/// A tensor, or a filter: its type and `[n, c, h, w]`, once set.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tensor {
    set: Option<(i32, [usize; 4])>,
}

/// A convolution, once set.
#[derive(Clone, Copy, Debug)]
pub struct Convolution {
    set: bool,
    padding: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    groups: usize,
    math: i32,
    compute: i32,
}

/// What the heuristics say of an algorithm; the same in all directions.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Performance {
    algorithm: i32,
    status: i32,
    time: f32,
    memory: usize,
    determinism: i32,
    math: i32,
    reserved: [c_int; 3],
}

fn call(body: impl FnOnce() -> Result<(), i32>) -> c_int {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => status::SUCCESS,
        Ok(Err(number)) => number,
        Err(_) => status::INTERNAL_ERROR,
    }
}

unsafe fn make<T>(to: *mut *mut T, value: T) -> Result<(), i32> {
    if to.is_null() {
        return Err(status::BAD_PARAM);
    }
    // SAFETY: room for a pointer, as the library's callers promise.
    unsafe { to.write(Box::into_raw(Box::new(value))) };
    Ok(())
}

/// Destroying nothing is allowed.
unsafe fn destroy<T>(object: *mut T) -> c_int {
    if !object.is_null() {
        // SAFETY: made by `make` and destroyed once, as the library's callers promise.
        drop(unsafe { Box::from_raw(object) });
    }
    status::SUCCESS
}

unsafe fn get<'a, T>(object: *const T) -> Result<&'a T, i32> {
    // SAFETY: null, or made by `make` and not destroyed, as the library's callers promise.
    unsafe { object.as_ref() }.ok_or(status::BAD_PARAM)
}

unsafe fn get_mut<'a, T>(object: *mut T) -> Result<&'a mut T, i32> {
    // SAFETY: as for `get`.
    unsafe { object.as_mut() }.ok_or(status::BAD_PARAM)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnCreate(to: *mut *mut Handle) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, Handle::default()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnDestroy(handle: *mut Handle) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(handle) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetVersion() -> usize {
    92_100
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetStream(handle: *mut Handle, stream: usize) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        unsafe { get_mut(handle)? }.stream = stream;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnCreateTensorDescriptor(to: *mut *mut Tensor) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, Tensor::default()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnDestroyTensorDescriptor(tensor: *mut Tensor) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(tensor) }
}

/// Describes a tensor or a filter.
unsafe fn set(tensor: *mut Tensor, format: c_int, ty: c_int, sizes: [c_int; 4]) -> Result<(), i32> {
    // SAFETY: as the library's callers promise.
    let tensor = unsafe { get_mut(tensor)? };
    let mut whole = [0; 4];
    for (whole, size) in whole.iter_mut().zip(sizes) {
        *whole = usize::try_from(size).ok().filter(|&size| size > 0).ok_or(status::BAD_PARAM)?;
    }
    if format != FORMAT_NCHW || whole.iter().map(|&size| size as u128).product::<u128>() >= 1 << 31 {
        return Err(status::NOT_SUPPORTED);
    }
    tensor.set = Some((ty, whole));
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetTensor4dDescriptor(
    tensor: *mut Tensor,
    format: c_int,
    ty: c_int,
    n: c_int,
    c: c_int,
    h: c_int,
    w: c_int,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { set(tensor, format, ty, [n, c, h, w]) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnCreateFilterDescriptor(to: *mut *mut Tensor) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, Tensor::default()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnDestroyFilterDescriptor(filter: *mut Tensor) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(filter) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetFilter4dDescriptor(
    filter: *mut Tensor,
    ty: c_int,
    format: c_int,
    k: c_int,
    c: c_int,
    h: c_int,
    w: c_int,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { set(filter, format, ty, [k, c, h, w]) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnCreateConvolutionDescriptor(to: *mut *mut Convolution) -> c_int {
    let made = Convolution {
        set: false,
        padding: [0; 2],
        stride: [1; 2],
        dilation: [1; 2],
        groups: 1,
        math: MATH_DEFAULT,
        compute: DATA_FLOAT,
    };
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, made) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnDestroyConvolutionDescriptor(convolution: *mut Convolution) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(convolution) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetConvolution2dDescriptor(
    convolution: *mut Convolution,
    pad_height: c_int,
    pad_width: c_int,
    stride_height: c_int,
    stride_width: c_int,
    dilation_height: c_int,
    dilation_width: c_int,
    mode: c_int,
    compute: c_int,
) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let convolution = unsafe { get_mut(convolution)? };
        let pair = |values: [c_int; 2], least: c_int| {
            if values.iter().any(|&value| value < least) {
                return Err(status::BAD_PARAM);
            }
            Ok(values.map(|value| value as usize))
        };
        convolution.padding = pair([pad_height, pad_width], 0)?;
        convolution.stride = pair([stride_height, stride_width], 1)?;
        convolution.dilation = pair([dilation_height, dilation_width], 1)?;
        if !(0..=CROSS_CORRELATION).contains(&mode) {
            return Err(status::BAD_PARAM);
        }
        if mode != CROSS_CORRELATION {
            return Err(status::NOT_SUPPORTED);
        }
        (convolution.compute, convolution.set) = (compute, true);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetConvolutionGroupCount(convolution: *mut Convolution, groups: c_int) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let convolution = unsafe { get_mut(convolution)? };
        convolution.groups = usize::try_from(groups).ok().filter(|&groups| groups > 0).ok_or(status::BAD_PARAM)?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnSetConvolutionMathType(convolution: *mut Convolution, math: c_int) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let convolution = unsafe { get_mut(convolution)? };
        if !MATH.contains(&math) {
            return Err(status::BAD_PARAM);
        }
        convolution.math = math;
        Ok(())
    })
}

/// A convolution whose descriptions fit together.
#[derive(Clone, Copy)]
struct Problem {
    geometry: Geometry,
    ty: Type,
    /// Whether inputs in f32 are rounded to tf32.
    tf32: bool,
    math: i32,
}

unsafe fn problem(
    x: *const Tensor,
    w: *const Tensor,
    y: *const Tensor,
    convolution: *const Convolution,
) -> Result<Problem, i32> {
    // SAFETY: as the library's callers promise.
    let (x, w, y, convolution) = unsafe { (get(x)?, get(w)?, get(y)?, get(convolution)?) };
    let [x, w, y] = [x.set, w.set, y.set].map(|set| set.ok_or(status::BAD_PARAM));
    let ((x_type, x), (w_type, w), (y_type, y)) = (x?, w?, y?);
    if !convolution.set || x_type != w_type || x_type != y_type {
        return Err(status::BAD_PARAM);
    }
    let ty = match x_type {
        0 => Type::F32,
        2 => Type::F16,
        9 => Type::Bf16,
        _ => return Err(status::NOT_SUPPORTED),
    };
    if convolution.compute != DATA_FLOAT || convolution.dilation != [1; 2] {
        return Err(status::NOT_SUPPORTED);
    }
    let Convolution { padding, stride, groups, math, .. } = *convolution;
    let out = |side: usize| {
        let room = (x[2 + side] + 2 * padding[side]).checked_sub(w[2 + side]).ok_or(status::BAD_PARAM)?;
        Ok::<_, i32>(room / stride[side] + 1)
    };
    let output = [out(0)?, out(1)?];
    let fits = x[1] == w[1] * groups && w[0] % groups == 0 && y == [x[0], w[0], output[0], output[1]];
    if !fits {
        return Err(status::BAD_PARAM);
    }
    let geometry = Geometry {
        batch: x[0],
        channels: x[1],
        input: [x[2], x[3]],
        filters: w[0],
        kernel: [w[2], w[3]],
        output,
        stride,
        padding,
        groups,
    };
    Ok(Problem { geometry, ty, tf32: ty == Type::F32 && math != MATH_FMA, math })
}

/// The algorithms of a direction, as they are numbered, fastest first.
fn algorithms(direction: Direction) -> [i32; 4] {
    match direction {
        // Precomputed implicit product, implicit product, FFT, direct (which cuDNN never had).
        Direction::Forward => [1, 0, 4, 3],
        // 0 is the one that adds with atomics.
        Direction::Input | Direction::Weight => [0, 1, 5, 2],
    }
}

fn deterministic(direction: Direction, algorithm: i32) -> bool {
    direction == Direction::Forward || algorithm != 0
}

/// What an algorithm asks for in the way of memory; none where it cannot do the problem.
fn workspace(direction: Direction, algorithm: i32, problem: &Problem) -> Result<usize, i32> {
    let g = &problem.geometry;
    let taps = g.channels / g.groups * g.kernel[0] * g.kernel[1];
    let columns = 4 * taps * g.output[0] * g.output[1];
    match (direction, algorithm) {
        (Direction::Forward, 0) | (Direction::Input | Direction::Weight, 0) => Ok(0),
        (Direction::Forward | Direction::Input, 1) => Ok(columns),
        (Direction::Weight, 1) => Ok(columns + 4 * g.filters * taps),
        _ => Err(status::NOT_SUPPORTED),
    }
}

unsafe fn heuristics(
    handle: *const Handle,
    direction: Direction,
    problem: Result<Problem, i32>,
    asked: c_int,
    count: *mut c_int,
    results: *mut Performance,
) -> Result<(), i32> {
    // SAFETY: as the library's callers promise.
    unsafe { get(handle)? };
    let problem = problem?;
    if asked < 1 || count.is_null() || results.is_null() {
        return Err(status::BAD_PARAM);
    }
    let math = if problem.math == MATH_DEFAULT { MATH_TENSOR } else { problem.math };
    let mut found = 0;
    for algorithm in algorithms(direction).into_iter().take(asked as usize) {
        let (status, memory) = match workspace(direction, algorithm, &problem) {
            Ok(memory) => (status::SUCCESS, memory),
            Err(status) => (status, 0),
        };
        let time = if status == status::SUCCESS { found as f32 } else { -1.0 };
        let determinism = i32::from(deterministic(direction, algorithm));
        let performance = Performance { algorithm, status, time, memory, determinism, math, reserved: [0; 3] };
        // SAFETY: room for as many as were asked for, as the caller says.
        unsafe { results.add(found).write(performance) };
        found += 1;
    }
    // SAFETY: not null; as the library's callers promise.
    unsafe { count.write(found as c_int) };
    Ok(())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnGetConvolutionForwardAlgorithm_v7(
    handle: *const Handle,
    x: *const Tensor,
    w: *const Tensor,
    convolution: *const Convolution,
    y: *const Tensor,
    asked: c_int,
    count: *mut c_int,
    results: *mut Performance,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { heuristics(handle, Direction::Forward, problem(x, w, y, convolution), asked, count, results) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnGetConvolutionBackwardDataAlgorithm_v7(
    handle: *const Handle,
    w: *const Tensor,
    dy: *const Tensor,
    convolution: *const Convolution,
    dx: *const Tensor,
    asked: c_int,
    count: *mut c_int,
    results: *mut Performance,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { heuristics(handle, Direction::Input, problem(dx, w, dy, convolution), asked, count, results) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    handle: *const Handle,
    x: *const Tensor,
    dy: *const Tensor,
    convolution: *const Convolution,
    dw: *const Tensor,
    asked: c_int,
    count: *mut c_int,
    results: *mut Performance,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { heuristics(handle, Direction::Weight, problem(x, dw, dy, convolution), asked, count, results) })
}

/// A convolution as it is queued.
#[derive(Clone, Copy)]
struct Queued {
    direction: Direction,
    problem: Problem,
    /// Whether sums have one order.
    ordered: bool,
    operands: [u64; 2],
    target: u64,
    workspace: (u64, usize),
    alpha: f32,
    beta: f32,
}

unsafe fn execute(
    handle: *const Handle,
    direction: Direction,
    problem: Result<Problem, i32>,
    algorithm: c_int,
    [alpha, beta]: [*const f32; 2],
    operands: [u64; 2],
    target: u64,
    (space, bytes): (u64, usize),
) -> Result<(), i32> {
    // SAFETY: as the library's callers promise.
    let (stream, alpha, beta) = unsafe { (get(handle)?.stream, *get(alpha)?, *get(beta)?) };
    let problem = problem?;
    if target == 0 || operands.contains(&0) {
        return Err(status::BAD_PARAM);
    }
    let wanted = workspace(direction, algorithm, &problem)?;
    if bytes < wanted || (wanted > 0 && space == 0) {
        return Err(status::BAD_PARAM);
    }
    let ordered = deterministic(direction, algorithm);
    let workspace = (space, wanted);
    let queued = Queued { direction, problem, ordered, operands, target, workspace, alpha, beta };
    queue_task(stream, move || run(&queued)).map_err(|_| status::EXECUTION_FAILED)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnConvolutionForward(
    handle: *const Handle,
    alpha: *const f32,
    x: *const Tensor,
    x_data: u64,
    w: *const Tensor,
    w_data: u64,
    convolution: *const Convolution,
    algorithm: c_int,
    space: *mut c_void,
    bytes: usize,
    beta: *const f32,
    y: *const Tensor,
    y_data: u64,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe {
        let (problem, workspace) = (problem(x, w, y, convolution), (space as u64, bytes));
        execute(handle, Direction::Forward, problem, algorithm, [alpha, beta], [x_data, w_data], y_data, workspace)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnConvolutionBackwardData(
    handle: *const Handle,
    alpha: *const f32,
    w: *const Tensor,
    w_data: u64,
    dy: *const Tensor,
    dy_data: u64,
    convolution: *const Convolution,
    algorithm: c_int,
    space: *mut c_void,
    bytes: usize,
    beta: *const f32,
    dx: *const Tensor,
    dx_data: u64,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe {
        let (problem, workspace) = (problem(dx, w, dy, convolution), (space as u64, bytes));
        execute(handle, Direction::Input, problem, algorithm, [alpha, beta], [w_data, dy_data], dx_data, workspace)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudnnConvolutionBackwardFilter(
    handle: *const Handle,
    alpha: *const f32,
    x: *const Tensor,
    x_data: u64,
    dy: *const Tensor,
    dy_data: u64,
    convolution: *const Convolution,
    algorithm: c_int,
    space: *mut c_void,
    bytes: usize,
    beta: *const f32,
    dw: *const Tensor,
    dw_data: u64,
) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe {
        let (problem, workspace) = (problem(x, dw, dy, convolution), (space as u64, bytes));
        execute(handle, Direction::Weight, problem, algorithm, [alpha, beta], [x_data, dy_data], dw_data, workspace)
    })
}

fn run(queued: &Queued) -> Result<(), Fault> {
    let Queued { direction, problem, operands, target, workspace, alpha, beta, .. } = *queued;
    let Problem { geometry, ty, .. } = problem;
    let [first, second] = direction.operands();
    let mut inputs = [read(ty, operands[0], geometry.values(first))?, read(ty, operands[1], geometry.values(second))?];
    if problem.tf32 {
        inputs.iter_mut().for_each(|values| tf32(values));
    }
    // What lay in the workspace is lost: a result or an operand that lies there too shows it.
    Memory::global().fill(workspace.0, &[0xff], workspace.1)?;
    // Without an order of its own, another one each time.
    static TURN: AtomicUsize = AtomicUsize::new(1);
    let turn = if queued.ordered { 0 } else { TURN.fetch_add(1, Ordering::Relaxed) };
    let mut out = convolve(direction, &geometry, [&inputs[0], &inputs[1]], turn);
    out.iter_mut().for_each(|value| *value *= alpha);
    if beta != 0.0 {
        let old = read(ty, target, out.len())?;
        out.iter_mut().zip(&old).for_each(|(value, old)| *value += beta * old);
    }
    write(ty, target, &out)
}
