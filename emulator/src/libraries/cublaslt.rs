//! cuBLASLt: `cublasLtMatmul` with the descriptions and epilogues that Warpstep uses. Column-major, sums in f32.
//!
//! Statuses of wrong use are those that the library's documentation gives; where it gives none, those that a card was reported
//! to answer.
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    reason = "the library's own names; its documentation says what each asks"
)]

mod algorithm;
pub(super) mod multiply;
mod plan;

use std::ffi::{c_int, c_void};

pub use algorithm::Algorithm;
use algorithm::{ALGORITHMS, Limits};
use plan::Plan;

use crate::driver::queue_task;

mod status {
    pub const SUCCESS: i32 = 0;
    pub const INVALID_VALUE: i32 = 7;
    pub const EXECUTION_FAILED: i32 = 13;
    pub const INTERNAL_ERROR: i32 = 14;
    pub const NOT_SUPPORTED: i32 = 15;
}

/// What a product does.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    compute: i32,
    scale: i32,
    transposed: [bool; 2],
    epilogue: i32,
    /// Vector and matrix of the epilogue: addresses, and types where they were set.
    bias: u64,
    bias_type: i32,
    aux: u64,
    aux_type: i32,
    aux_stride: i64,
}

/// A type that was not set: that of the output.
const AS_OUTPUT: i32 = -1;
/// `CUBLASLT_EPILOGUE_DEFAULT`.
const EPILOGUE_DEFAULT: i32 = 1;

/// A matrix's shape.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    ty: i32,
    rows: usize,
    columns: usize,
    stride: usize,
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

/// What a handle points to.
const MARK: u64 = 0x5741_5250;

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
    let made = Operation {
        compute,
        scale,
        transposed: [false; 2],
        epilogue: EPILOGUE_DEFAULT,
        bias: 0,
        bias_type: AS_OUTPUT,
        aux: 0,
        aux_type: AS_OUTPUT,
        aux_stride: 0,
    };
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
            // SAFETY: as above.
            11 => operation.aux = unsafe { attribute(from, bytes)? },
            // SAFETY: as above.
            12 => operation.aux_stride = unsafe { attribute(from, bytes)? },
            22 => operation.aux_type = whole()?,
            26 => operation.bias_type = whole()?,
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
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(to: *mut *mut Limits) -> c_int {
    // SAFETY: as the library's callers promise.
    call(|| unsafe { make(to, Limits::default()) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(preference: *mut Limits) -> c_int {
    // SAFETY: as the library's callers promise.
    unsafe { destroy(preference) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    preference: *mut Limits,
    number: c_int,
    from: *const c_void,
    bytes: usize,
) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let preference = unsafe { preference.as_mut() }.ok_or(status::INVALID_VALUE)?;
        // SAFETY: as above.
        let word = || unsafe { attribute::<u32>(from, bytes) };
        match number {
            // SAFETY: as above.
            1 => preference.workspace = unsafe { attribute(from, bytes)? },
            3 => preference.schemes = word()?,
            5..=8 => preference.alignments[number as usize - 5] = word()?,
            _ => return Err(status::NOT_SUPPORTED),
        }
        Ok(())
    })
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
    preference: *const Limits,
    asked: c_int,
    results: *mut Candidate,
    count: *mut c_int,
) -> c_int {
    call(|| {
        if asked < 1 || results.is_null() || count.is_null() {
            return Err(status::INVALID_VALUE);
        }
        // SAFETY: as the library's callers promise.
        let (limits, plan) =
            unsafe { (get(preference)?, Plan::new(get(operation)?, [get(a)?, get(b)?, get(c)?, get(d)?])?) };
        let fitting = ALGORITHMS.iter().filter(|algorithm| algorithm.fits(&plan, &limits)).take(asked as usize);
        let mut found = 0;
        for algorithm in fitting {
            // SAFETY: `asked` results have room, as the library's callers promise.
            unsafe { results.add(found).write(algorithm.candidate(&plan, status::SUCCESS)) };
            found += 1;
        }
        // SAFETY: as above.
        unsafe { count.write(found as c_int) };
        if found == 0 { Err(status::NOT_SUPPORTED) } else { Ok(()) }
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the library's own list")]
pub unsafe extern "C" fn cublasLtMatmulAlgoCheck(
    _handle: *const u64,
    operation: *const Operation,
    a: *const Layout,
    b: *const Layout,
    c: *const Layout,
    d: *const Layout,
    algorithm: *const Algorithm,
    result: *mut Candidate,
) -> c_int {
    call(|| {
        if result.is_null() {
            return Err(status::INVALID_VALUE);
        }
        // SAFETY: as the library's callers promise.
        let (plan, algorithm) =
            unsafe { (Plan::new(get(operation)?, [get(a)?, get(b)?, get(c)?, get(d)?])?, get(algorithm)?) };
        let kind = algorithm.kind()?;
        if !kind.rows_fit(&plan) {
            return Err(status::NOT_SUPPORTED);
        }
        // The library leaves the algorithm of the result as it was.
        let checked = kind.candidate(&plan, status::SUCCESS);
        // SAFETY: as above.
        unsafe {
            (*result).workspace = checked.workspace;
            (*result).state = checked.state;
            (*result).waves = checked.waves;
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
    workspace: u64,
    workspace_bytes: usize,
    stream: usize,
) -> c_int {
    call(|| {
        // SAFETY: as the library's callers promise.
        let (plan, alpha, beta, algorithm) = unsafe {
            let layouts = [get(a_layout)?, get(b_layout)?, get(c_layout)?, get(d_layout)?];
            (Plan::new(get(operation)?, layouts)?, get(alpha)?, get(beta)?, algorithm.as_ref())
        };
        plan.check_addresses([a, b, c, d])?;
        let kind = match algorithm {
            Some(algorithm) => algorithm.kind()?,
            None => ALGORITHMS
                .iter()
                .find(|kind| kind.rows_fit(&plan) && kind.addresses_fit([a, b, c, d]) && kind.workspace(&plan) == 0)
                .ok_or(status::NOT_SUPPORTED)?,
        };
        if kind.workspace(&plan) > workspace_bytes || !workspace.is_multiple_of(256) {
            return Err(status::INVALID_VALUE);
        }
        if !kind.rows_fit(&plan) || !kind.addresses_fit([a, b, c, d]) {
            return Err(status::NOT_SUPPORTED);
        }
        let parts = kind.parts;
        queue_task(stream, move || multiply::multiply(&plan, [a, b, c, d], [alpha, beta], parts))
            .map_err(|_| status::EXECUTION_FAILED)
    })
}
