//! cuBLASLt: `cublasLtMatmul` with the descriptions and epilogues that Warpstep uses. Column-major, sums in f32.
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    reason = "the library's own names; its documentation says what each asks"
)]

use std::ffi::{c_int, c_void};

use super::values::{Type, product, read, write};
use crate::driver::queue_task;
use crate::fault::Fault;

mod status {
    pub const SUCCESS: i32 = 0;
    pub const INVALID_VALUE: i32 = 7;
    pub const EXECUTION_FAILED: i32 = 13;
    pub const INTERNAL_ERROR: i32 = 14;
    pub const NOT_SUPPORTED: i32 = 15;
}

const COMPUTE_32F: i32 = 68;
const COMPUTE_32F_FAST_TF32: i32 = 77;
const EPILOGUE_DEFAULT: i32 = 1;
const EPILOGUE_BIAS: i32 = 4;

/// What a product does.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    compute: i32,
    scale: i32,
    transposed: [bool; 2],
    epilogue: i32,
    bias: u64,
}

/// A matrix's shape.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    ty: i32,
    rows: usize,
    columns: usize,
    stride: usize,
}

/// Limits of the choice of an algorithm.
#[derive(Clone, Copy, Debug, Default)]
pub struct Preference {
    workspace: usize,
}

/// An algorithm: its number.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Algorithm {
    data: [u64; 8],
}

/// A candidate of the heuristic.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Candidate {
    algorithm: Algorithm,
    workspace: usize,
    state: i32,
    waves: f32,
    reserved: [c_int; 4],
}

/// Marks algorithms that came from here.
const MARK: u64 = 0x5741_5250;
const ALGORITHMS: u64 = 3;

fn call(body: impl FnOnce() -> Result<(), i32>) -> c_int {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => status::SUCCESS,
        Ok(Err(number)) => number,
        Err(_) => status::INTERNAL_ERROR,
    }
}

unsafe fn make<T>(to: *mut *mut T, value: T) -> Result<(), i32> {
    if to.is_null() {
        return Err(status::INVALID_VALUE);
    }
    // SAFETY: room for a pointer, as the library's callers promise.
    unsafe { to.write(Box::into_raw(Box::new(value))) };
    Ok(())
}

unsafe fn destroy<T>(object: *mut T) -> c_int {
    if object.is_null() {
        return status::INVALID_VALUE;
    }
    // SAFETY: made by `make` and destroyed once, as the library's callers promise.
    drop(unsafe { Box::from_raw(object) });
    status::SUCCESS
}

unsafe fn get<T: Copy>(object: *const T) -> Result<T, i32> {
    // SAFETY: null, or made by `make` and not destroyed, as the library's callers promise.
    unsafe { object.as_ref() }.copied().ok_or(status::INVALID_VALUE)
}

/// The value of an attribute, if the caller's buffer is of its size.
unsafe fn attribute<T>(from: *const c_void, bytes: usize) -> Result<T, i32> {
    if from.is_null() || bytes != size_of::<T>() {
        return Err(status::INVALID_VALUE);
    }
    // SAFETY: as many bytes, as the caller says.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(to: *mut *mut u64) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, MARK) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtDestroy(handle: *mut u64) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(handle) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    130_000
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(to: *mut *mut Operation, compute: c_int, scale: c_int) -> c_int {
    let made = Operation { compute, scale, transposed: [false; 2], epilogue: EPILOGUE_DEFAULT, bias: 0 };
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, made) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(operation: *mut Operation) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(operation) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    operation: *mut Operation,
    number: c_int,
    from: *const c_void,
    bytes: usize,
) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let operation = unsafe { operation.as_mut() }.ok_or(status::INVALID_VALUE)?;
        // SAFETY: as above.
        let whole = || unsafe { attribute::<i32>(from, bytes) };
        match number {
            3 | 4 => {
                operation.transposed[number as usize - 3] = match whole()? {
                    0 => false,
                    1 => true,
                    _ => return Err(status::NOT_SUPPORTED),
                }
            }
            7 => operation.epilogue = whole()?,
            // SAFETY: as above.
            8 => operation.bias = unsafe { attribute(from, bytes)? },
            _ => return Err(status::NOT_SUPPORTED),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    to: *mut *mut Layout,
    ty: c_int,
    rows: u64,
    columns: u64,
    stride: i64,
) -> c_int {
    call(|| {
        if stride < rows as i64 {
            return Err(status::INVALID_VALUE);
        }
        let made = Layout { ty, rows: rows as usize, columns: columns as usize, stride: stride as usize };
        // SAFETY: as the library's callers promise.
        unsafe { make(to, made) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut Layout) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(layout) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(to: *mut *mut Preference) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, Preference::default()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(preference: *mut Preference) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(preference) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: *mut Preference,
    number: c_int,
    from: *const c_void,
    bytes: usize,
) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let preference = unsafe { preference.as_mut() }.ok_or(status::INVALID_VALUE)?;
        match number {
            // SAFETY: as above.
            1 => preference.workspace = unsafe { attribute(from, bytes)? },
            _ => return Err(status::NOT_SUPPORTED),
        }
        Ok(())
    })
}

/// A product whose shapes and types fit together.
#[derive(Clone, Copy)]
struct Plan {
    operation: Operation,
    layouts: [Layout; 3],
    types: [Type; 2],
    size: [usize; 3],
}

fn plan(operation: Operation, a: Layout, b: Layout, c: Layout, d: Layout) -> Result<Plan, i32> {
    let shape = |layout: Layout, transposed| {
        if transposed { (layout.columns, layout.rows) } else { (layout.rows, layout.columns) }
    };
    let ((m, k), (inner, n)) = (shape(a, operation.transposed[0]), shape(b, operation.transposed[1]));
    if inner != k || (d.rows, d.columns) != (m, n) || (c.rows, c.columns) != (m, n) {
        return Err(status::INVALID_VALUE);
    }
    let types = [Type::from_cuda(a.ty), Type::from_cuda(b.ty), Type::from_cuda(c.ty), Type::from_cuda(d.ty)];
    let [Some(left), Some(right), Some(added), Some(out)] = types else { return Err(status::NOT_SUPPORTED) };
    let known = left == right
        && added == out
        && (out == left || out == Type::F32)
        && operation.scale == 0
        && matches!(operation.compute, COMPUTE_32F | COMPUTE_32F_FAST_TF32)
        && matches!(operation.epilogue, EPILOGUE_DEFAULT | EPILOGUE_BIAS);
    if !known {
        return Err(status::NOT_SUPPORTED);
    }
    Ok(Plan { operation, layouts: [a, b, d], types: [left, out], size: [m, k, n] })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the library's own list")]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: *const u64,
    operation: *const Operation,
    a: *const Layout,
    b: *const Layout,
    c: *const Layout,
    d: *const Layout,
    preference: *const Preference,
    asked: c_int,
    results: *mut Candidate,
    count: *mut c_int,
) -> c_int {
    call(|| {
        if asked < 1 || results.is_null() || count.is_null() {
            return Err(status::INVALID_VALUE);
        }
        // SAFETY: as the library's callers promise.
        unsafe {
            get(preference)?;
            plan(get(operation)?, get(a)?, get(b)?, get(c)?, get(d)?)?;
            let found = (asked as u64).min(ALGORITHMS);
            for number in 0..found {
                let algorithm = Algorithm { data: [MARK, number, 0, 0, 0, 0, 0, 0] };
                let candidate = Candidate { algorithm, workspace: 0, state: 0, waves: 1.0, reserved: [0; 4] };
                results.add(number as usize).write(candidate);
            }
            count.write(found as c_int);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the library's own list")]
pub unsafe extern "C" fn cublasLtMatmul(
    _handle: *const u64,
    operation: *const Operation,
    alpha: *const f32,
    a: u64,
    a_layout: *const Layout,
    b: u64,
    b_layout: *const Layout,
    beta: *const f32,
    c: u64,
    c_layout: *const Layout,
    d: u64,
    d_layout: *const Layout,
    algorithm: *const Algorithm,
    _workspace: u64,
    _workspace_bytes: usize,
    stream: usize,
) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let (plan, alpha, beta, known) = unsafe {
            let c_layout = get(c_layout)?;
            let plan = plan(get(operation)?, get(a_layout)?, get(b_layout)?, c_layout, get(d_layout)?)?;
            (plan, get(alpha)?, get(beta)?, algorithm.as_ref().is_none_or(|algorithm| algorithm.data[0] == MARK))
        };
        let aligned =
            [a, b, c, d].iter().all(|address| address % 4 == 0 || plan.types[0] != Type::F32 && address % 2 == 0);
        if !known || !aligned || c != d {
            return Err(status::NOT_SUPPORTED);
        }
        queue_task(stream, move || multiply(&plan, [a, b, d], alpha, beta)).map_err(|_| status::EXECUTION_FAILED)
    })
}

/// Values that a matrix spans, from its first to its last.
fn span(layout: &Layout) -> usize {
    if layout.rows * layout.columns == 0 { 0 } else { (layout.columns - 1) * layout.stride + layout.rows }
}

/// Reads a matrix column by column: what lies between the columns need not be written.
fn matrix(ty: Type, address: u64, layout: &Layout) -> Result<Vec<f32>, Fault> {
    if layout.stride == layout.rows {
        return read(ty, address, span(layout));
    }
    let mut out = vec![0.0; span(layout)];
    for column in 0..layout.columns {
        let at = column * layout.stride;
        let values = read(ty, address + (at * ty.bytes()) as u64, layout.rows)?;
        out[at..at + layout.rows].copy_from_slice(&values);
    }
    Ok(out)
}

/// Rounds to tf32: 10 bits of fraction.
pub(super) fn tf32(values: &mut [f32]) {
    for value in values.iter_mut().filter(|value| value.is_finite()) {
        *value = f32::from_bits(value.to_bits().wrapping_add(0x1000) & !0x1fff);
    }
}

fn multiply(plan: &Plan, [a, b, d]: [u64; 3], alpha: f32, beta: f32) -> Result<(), Fault> {
    let [m, _, n] = plan.size;
    let [input, output] = plan.types;
    let [a_layout, b_layout, d_layout] = &plan.layouts;
    let (mut left, mut right) = (matrix(input, a, a_layout)?, matrix(input, b, b_layout)?);
    if plan.operation.compute == COMPUTE_32F_FAST_TF32 {
        tf32(&mut left);
        tf32(&mut right);
    }
    let strides = |layout: &Layout, transposed: bool| {
        if transposed { [layout.stride, 1] } else { [1, layout.stride] }
    };
    let [left_transposed, right_transposed] = plan.operation.transposed;
    let mut out =
        product(plan.size, (&left, strides(a_layout, left_transposed)), (&right, strides(b_layout, right_transposed)));
    out.iter_mut().for_each(|value| *value *= alpha);
    let bias = match plan.operation.epilogue {
        EPILOGUE_BIAS => Some(read(output, plan.operation.bias, m)?),
        _ => None,
    };
    for column in 0..n {
        let address = d + (column * d_layout.stride * output.bytes()) as u64;
        let values = &mut out[column * m..(column + 1) * m];
        if beta != 0.0 {
            let old = read(output, address, m)?;
            values.iter_mut().zip(&old).for_each(|(value, old)| *value += beta * old);
        }
        if let Some(bias) = &bias {
            values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
        write(output, address, values)?;
    }
    Ok(())
}
