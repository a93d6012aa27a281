//! Handles and descriptions: what they hold, how they are made, set and destroyed.
#![allow(
    non_snake_case,
    clippy::missing_safety_doc,
    clippy::too_many_arguments,
    reason = "the library's own names and lists; its documentation says what each asks"
)]

use std::ffi::c_int;

pub(super) mod status {
    pub const SUCCESS: i32 = 0;
    pub const BAD_PARAM: i32 = 2000;
    pub const NOT_SUPPORTED: i32 = 3000;
    pub const INTERNAL_ERROR: i32 = 4000;
    pub const EXECUTION_FAILED: i32 = 5000;
}

pub(super) const FORMAT_NCHW: i32 = 0;
pub(super) const CROSS_CORRELATION: i32 = 1;
pub(super) const DATA_FLOAT: i32 = 0;
/// Default, tensor cores, tensor cores with conversion, fused multiply-add.
pub(super) const MATH: std::ops::RangeInclusive<i32> = 0..=3;
pub(super) const MATH_DEFAULT: i32 = 0;
pub(super) const MATH_TENSOR: i32 = 1;
pub(super) const MATH_FMA: i32 = 3;

/// A library handle.
#[derive(Debug, Default)]
pub struct Handle {
    pub(super) stream: usize,
}

/// A tensor, or a filter: its type and `[n, c, h, w]`, once set.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tensor {
    pub(super) set: Option<(i32, [usize; 4])>,
}

/// A convolution, once set.
#[derive(Clone, Copy, Debug)]
pub struct Convolution {
    pub(super) set: bool,
    pub(super) padding: [usize; 2],
    pub(super) stride: [usize; 2],
    pub(super) dilation: [usize; 2],
    pub(super) groups: usize,
    pub(super) math: i32,
    pub(super) compute: i32,
}

pub(super) fn call(body: impl FnOnce() -> Result<(), i32>) -> c_int {
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

pub(super) unsafe fn get<'a, T>(object: *const T) -> Result<&'a T, i32> {
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
