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

mod describe;

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use describe::{Convolution, DATA_FLOAT, Handle, MATH_DEFAULT, MATH_FMA, MATH_TENSOR, Tensor, call, get, status};

use super::convolution::{Direction, Geometry, convolve};
use super::cublaslt::multiply::tf32;
use super::values::{Type, read, write};
use crate::driver::{self, queue_task};
use crate::fault::Fault;
use crate::memory::Memory;

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
    driver::count(|host| host.heuristics += 1);
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
