//! Modules, functions and launches.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::{call, current, outside_capture, own_stream, put};
use crate::driver::{Call, Function, KernelLaunch, Work, fail, lock, queue, state, status};
use crate::exec::{SHARED_LIMIT, STATIC_SHARED_LIMIT};
use crate::memory::Memory;
use crate::ptx::Module;
use crate::tell::tell;

/// The PTX of an image: a fatbin's, or the text itself.
unsafe fn image_text(image: *const c_void) -> Call<String> {
    if image.is_null() {
        return Err(status::INVALID_VALUE);
    }
    // SAFETY: an image is a fatbin, whose header of 16 bytes says its length, or text that ends with a 0, which is longer than
    // the 4 bytes that tell the two apart.
    unsafe {
        let head = std::slice::from_raw_parts(image.cast::<u8>(), 4);
        if !crate::fatbin::is_fatbin(head) {
            return CStr::from_ptr(image.cast()).to_str().map(str::to_owned).map_err(|_| status::INVALID_IMAGE);
        }
        let header = std::slice::from_raw_parts(image.cast::<u8>(), 16);
        let length = crate::fatbin::length(header).map_err(|_| status::INVALID_IMAGE)?;
        crate::fatbin::ptx(std::slice::from_raw_parts(image.cast::<u8>(), length)).map_err(|error| {
            tell(format_args!("emulated device: {error}"));
            status::NO_BINARY_FOR_GPU
        })
    }
}

/// Modules that were read once are not read again: tests open many devices.
fn parsed(text: &str) -> Call<Arc<Module>> {
    use std::collections::HashMap;
    use std::hash::{DefaultHasher, Hash, Hasher};
    static READ: Mutex<Option<HashMap<u64, Arc<Module>>>> = Mutex::new(None);
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let mut read = lock(&READ);
    let read = read.get_or_insert_default();
    if let Some(module) = read.get(&hasher.finish()) {
        return Ok(Arc::clone(module));
    }
    let module = Module::parse(text).map_err(|error| {
        tell(format_args!("emulated device: {error}"));
        status::INVALID_PTX
    })?;
    let module = Arc::new(module);
    read.insert(hasher.finish(), Arc::clone(&module));
    Ok(module)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(to: *mut usize, image: *const c_void) -> c_int {
    call(|| {
        let device = current()?;
        outside_capture()?;
        // SAFETY: as the driver's callers promise.
        let text = unsafe { image_text(image)? };
        let loaded = parsed(&text)?.instantiate(Memory::global(), device).map_err(fail)?;
        let handle = state().modules.insert(Arc::new(loaded));
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, handle) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: usize) -> c_int {
    call(|| {
        let loaded = state().modules.remove(module)?;
        loaded.unload(Memory::global()).map_err(fail)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(to: *mut usize, module: usize, name: *const c_char) -> c_int {
    call(|| {
        if name.is_null() {
            return Err(status::INVALID_VALUE);
        }
        // SAFETY: a C string, as the driver's callers promise.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        let loaded = state().modules.get(module)?;
        if loaded.module.kernel(&name).is_none() {
            return Err(status::NOT_FOUND);
        }
        let function = Function { loaded, name, shared_limit: AtomicU32::new(STATIC_SHARED_LIMIT as u32) };
        let handle = state().functions.insert(Arc::new(function));
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, handle) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetGlobal_v2(
    address: *mut u64,
    bytes: *mut usize,
    module: usize,
    name: *const c_char,
) -> c_int {
    call(|| {
        if name.is_null() {
            return Err(status::INVALID_VALUE);
        }
        // SAFETY: a C string, as the driver's callers promise.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let loaded = state().modules.get(module)?;
        let (start, length) = loaded.global(&name).ok_or(status::NOT_FOUND)?;
        // SAFETY: as the driver's callers promise; both may be null.
        unsafe {
            if !address.is_null() {
                address.write(start);
            }
            if !bytes.is_null() {
                bytes.write(length);
            }
        }
        Ok(())
    })
}

/// `CU_FUNC_ATTRIBUTE_..`: the numbers that are used.
const MAX_THREADS: c_int = 0;
const STATIC_SHARED_BYTES: c_int = 1;
const LOCAL_BYTES: c_int = 3;
const REGISTERS: c_int = 4;
const MAX_DYNAMIC_SHARED: c_int = 8;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(to: *mut c_int, attribute: c_int, function: usize) -> c_int {
    call(|| {
        let function = state().functions.get(function)?;
        let kernel = function.loaded.module.kernel(&function.name).ok_or(status::NOT_FOUND)?;
        let value = match attribute {
            MAX_THREADS => kernel.max_threads as c_int,
            STATIC_SHARED_BYTES => kernel.static_shared as c_int,
            LOCAL_BYTES => kernel.local as c_int,
            // What the assembler will need is not known from PTX.
            REGISTERS => 32,
            MAX_DYNAMIC_SHARED => function.shared_limit.load(Ordering::Relaxed) as c_int,
            _ => return Err(status::INVALID_VALUE),
        };
        // SAFETY: as the driver's callers promise.
        unsafe { put(to, value) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: usize, attribute: c_int, value: c_int) -> c_int {
    call(|| {
        let function = state().functions.get(function)?;
        let fixed = function.loaded.module.kernel(&function.name).map_or(0, |kernel| kernel.static_shared);
        if attribute != MAX_DYNAMIC_SHARED || value < 0 || fixed as u64 + value as u64 > SHARED_LIMIT {
            return Err(status::INVALID_VALUE);
        }
        function.shared_limit.store(value as u32, Ordering::Relaxed);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    function: usize,
    threads: c_int,
    shared: usize,
) -> c_int {
    call(|| {
        let function = state().functions.get(function)?;
        let kernel = function.loaded.module.kernel(&function.name).ok_or(status::NOT_FOUND)?;
        if threads <= 0 || threads as u32 > kernel.max_threads {
            return Err(status::INVALID_VALUE);
        }
        let by_shared = (SHARED_LIMIT as usize + 1024) / (kernel.static_shared + shared + 1024);
        // SAFETY: as the driver's callers promise.
        unsafe { put(blocks, (2048 / threads).min(32).min(by_shared as c_int)) }
    })
}

/// A launch: its arguments are read now, as the driver does.
unsafe fn launch(
    function: usize,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    stream: usize,
    params: *mut *mut c_void,
    cooperative: bool,
) -> Call<()> {
    let device = current()?;
    let function = state().functions.get(function)?;
    // A kernel belongs to the context that its module was loaded in, and so does the stream.
    if function.loaded.device != device {
        return Err(status::INVALID_HANDLE);
    }
    if stream != 0 {
        own_stream(stream)?;
    }
    let kernel = function.loaded.module.kernel(&function.name).ok_or(status::NOT_FOUND)?;
    let allowed = function.shared_limit.load(Ordering::Relaxed);
    if dynamic_shared > allowed || params.is_null() && !kernel.params.is_empty() {
        return Err(status::INVALID_VALUE);
    }
    let blocks: u64 = grid.iter().map(|&n| u64::from(n)).product();
    if cooperative && blocks > crate::exec::COOPERATIVE_LIMIT {
        return Err(status::COOPERATIVE_LAUNCH_TOO_LARGE);
    }
    let mut bytes = vec![0; kernel.param_bytes()];
    for (index, param) in kernel.params.iter().enumerate() {
        // SAFETY: `params` names an argument for each parameter, each of the parameter's size.
        unsafe {
            let from = params.add(index).read().cast::<u8>();
            std::ptr::copy_nonoverlapping(from, bytes[param.offset..].as_mut_ptr(), param.size);
        }
    }
    let launch =
        KernelLaunch { function: Arc::clone(&function), grid, block, dynamic_shared, params: bytes, cooperative };
    queue(stream, Work::Kernel(Arc::new(launch)))
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the driver's own list")]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    shared: c_uint,
    stream: usize,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> c_int {
    call(|| {
        if !extra.is_null() {
            return Err(status::INVALID_VALUE);
        }
        // SAFETY: as the driver's callers promise.
        unsafe { launch(function, [gx, gy, gz], [bx, by, bz], shared, stream, params, false) }
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "the driver's own list")]
pub unsafe extern "C" fn cuLaunchCooperativeKernel(
    function: usize,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    shared: c_uint,
    stream: usize,
    params: *mut *mut c_void,
) -> c_int {
    // SAFETY: as the driver's callers promise.
    call(|| unsafe { launch(function, [gx, gy, gz], [bx, by, bz], shared, stream, params, true) })
}
