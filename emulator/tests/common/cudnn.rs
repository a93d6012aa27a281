//! cuDNN's and the driver's calls as a program that loads them sees them, with what tests of them share.

#![allow(dead_code, reason = "each test program uses its part")]

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;

use warpstep_emulator as _;
use warpstep_emulator::memory::Memory;

pub type Object = *mut c_void;

/// `cudnnConvolution*AlgoPerf_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Performance {
    pub algorithm: c_int,
    pub status: c_int,
    pub time: f32,
    pub memory: usize,
    pub determinism: c_int,
    pub math: c_int,
    pub reserved: [c_int; 3],
}

type Heuristics =
    unsafe extern "C" fn(Object, Object, Object, Object, Object, c_int, *mut c_int, *mut Performance) -> c_int;
type Convolve = unsafe extern "C" fn(
    Object,
    *const f32,
    Object,
    u64,
    Object,
    u64,
    Object,
    c_int,
    u64,
    usize,
    *const f32,
    Object,
    u64,
) -> c_int;

#[rustfmt::skip]
unsafe extern "C" {
    pub fn cudnnCreate(to: *mut Object) -> c_int;
    pub fn cudnnDestroy(handle: Object) -> c_int;
    pub fn cudnnSetStream(handle: Object, stream: usize) -> c_int;
    pub fn cudnnCreateTensorDescriptor(to: *mut Object) -> c_int;
    pub fn cudnnDestroyTensorDescriptor(tensor: Object) -> c_int;
    pub fn cudnnSetTensor4dDescriptor(tensor: Object, format: c_int, ty: c_int, n: c_int, c: c_int, h: c_int, w: c_int) -> c_int;
    pub fn cudnnCreateFilterDescriptor(to: *mut Object) -> c_int;
    pub fn cudnnDestroyFilterDescriptor(filter: Object) -> c_int;
    pub fn cudnnSetFilter4dDescriptor(filter: Object, ty: c_int, format: c_int, k: c_int, c: c_int, h: c_int, w: c_int) -> c_int;
    pub fn cudnnCreateConvolutionDescriptor(to: *mut Object) -> c_int;
    pub fn cudnnDestroyConvolutionDescriptor(convolution: Object) -> c_int;
    pub fn cudnnSetConvolution2dDescriptor(convolution: Object, ph: c_int, pw: c_int, sh: c_int, sw: c_int, dh: c_int, dw: c_int, mode: c_int, compute: c_int) -> c_int;
    pub fn cudnnSetConvolutionGroupCount(convolution: Object, groups: c_int) -> c_int;
    pub fn cudnnSetConvolutionMathType(convolution: Object, math: c_int) -> c_int;
    pub fn cudnnGetConvolutionForwardAlgorithm_v7(h: Object, x: Object, w: Object, c: Object, y: Object, asked: c_int, count: *mut c_int, to: *mut Performance) -> c_int;
    pub fn cudnnGetConvolutionBackwardDataAlgorithm_v7(h: Object, w: Object, dy: Object, c: Object, dx: Object, asked: c_int, count: *mut c_int, to: *mut Performance) -> c_int;
    pub fn cudnnGetConvolutionBackwardFilterAlgorithm_v7(h: Object, x: Object, dy: Object, c: Object, dw: Object, asked: c_int, count: *mut c_int, to: *mut Performance) -> c_int;
    pub fn cudnnConvolutionForward(h: Object, alpha: *const f32, xd: Object, x: u64, wd: Object, w: u64, c: Object, algorithm: c_int, space: u64, bytes: usize, beta: *const f32, yd: Object, y: u64) -> c_int;
    pub fn cudnnConvolutionBackwardData(h: Object, alpha: *const f32, wd: Object, w: u64, dyd: Object, dy: u64, c: Object, algorithm: c_int, space: u64, bytes: usize, beta: *const f32, dxd: Object, dx: u64) -> c_int;
    pub fn cudnnConvolutionBackwardFilter(h: Object, alpha: *const f32, xd: Object, x: u64, dyd: Object, dy: u64, c: Object, algorithm: c_int, space: u64, bytes: usize, beta: *const f32, dwd: Object, dw: u64) -> c_int;
    pub fn cuInit(flags: c_uint) -> c_int;
    pub fn cuDevicePrimaryCtxRetain(context: *mut usize, ordinal: c_int) -> c_int;
    pub fn cuCtxSetCurrent(context: usize) -> c_int;
    pub fn cuStreamCreate(to: *mut usize, flags: c_uint) -> c_int;
    pub fn cuStreamBeginCapture_v2(stream: usize, mode: c_uint) -> c_int;
    pub fn cuStreamEndCapture(stream: usize, to: *mut usize) -> c_int;
    pub fn cuGraphInstantiateWithFlags(to: *mut usize, graph: usize, flags: u64) -> c_int;
    pub fn cuGraphLaunch(graph: usize, stream: usize) -> c_int;
}

pub const SUCCESS: c_int = 0;
pub const BAD_PARAM: c_int = 2000;
pub const NOT_SUPPORTED: c_int = 3000;
pub const EXECUTION_FAILED: c_int = 5000;
pub const FLOAT: c_int = 0;
pub const HALF: c_int = 2;
pub const BFLOAT16: c_int = 9;
pub const DEFAULT_MATH: c_int = 0;
pub const FMA_MATH: c_int = 3;

/// The three directions: heuristics, call, and which of x, w, y each takes and gives.
pub const DIRECTIONS: [(Heuristics, Convolve, [usize; 3]); 3] = [
    (cudnnGetConvolutionForwardAlgorithm_v7, cudnnConvolutionForward, [0, 1, 2]),
    (cudnnGetConvolutionBackwardDataAlgorithm_v7, cudnnConvolutionBackwardData, [1, 2, 0]),
    (cudnnGetConvolutionBackwardFilterAlgorithm_v7, cudnnConvolutionBackwardFilter, [0, 2, 1]),
];

/// Sizes of a convolution. Pairs are (height, width).
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub channels: usize,
    pub input: [usize; 2],
    pub filters: usize,
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub padding: [usize; 2],
    pub groups: usize,
}

impl Sizes {
    pub fn output(&self) -> [usize; 2] {
        [0, 1].map(|i| (self.input[i] + 2 * self.padding[i] - self.kernel[i]) / self.stride[i] + 1)
    }

    /// `[n, c, h, w]` of x, w and y.
    pub fn shapes(&self) -> [[usize; 4]; 3] {
        let [oh, ow] = self.output();
        [
            [self.batch, self.channels, self.input[0], self.input[1]],
            [self.filters, self.channels / self.groups, self.kernel[0], self.kernel[1]],
            [self.batch, self.filters, oh, ow],
        ]
    }

    /// Visits every product of the convolution: where its x, w and y lie.
    pub fn taps(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let [xs, ws, ys] = self.shapes();
        let at = |[_, c, h, w]: [usize; 4], [i, j, k, l]: [usize; 4]| ((i * c + j) * h + k) * w + l;
        for n in 0..self.batch {
            for f in 0..self.filters {
                for (oy, ox) in (0..ys[2]).flat_map(|oy| (0..ys[3]).map(move |ox| (oy, ox))) {
                    for c in 0..ws[1] {
                        for (ky, kx) in (0..ws[2]).flat_map(|ky| (0..ws[3]).map(move |kx| (ky, kx))) {
                            let iy = (oy * self.stride[0] + ky).wrapping_sub(self.padding[0]);
                            let ix = (ox * self.stride[1] + kx).wrapping_sub(self.padding[1]);
                            if iy < self.input[0] && ix < self.input[1] {
                                let channel = f / (self.filters / self.groups) * ws[1] + c;
                                visit(at(xs, [n, channel, iy, ix]), at(ws, [f, c, ky, kx]), at(ys, [n, f, oy, ox]));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A handle with the descriptions of a convolution.
pub struct Described {
    pub handle: Object,
    /// x, w, y.
    pub tensors: [Object; 3],
    pub operation: Object,
}

pub fn created(create: unsafe extern "C" fn(*mut Object) -> c_int) -> Object {
    let mut object = null_mut();
    // SAFETY: room for a pointer.
    assert_eq!(unsafe { create(&mut object) }, SUCCESS);
    object
}

impl Described {
    pub fn new(sizes: &Sizes, ty: c_int, math: c_int) -> Self {
        let (handle, operation) = (created(cudnnCreate), created(cudnnCreateConvolutionDescriptor));
        let creates = [cudnnCreateTensorDescriptor, cudnnCreateFilterDescriptor, cudnnCreateTensorDescriptor];
        let tensors = creates.map(created);
        let [ph, pw, sh, sw, groups] =
            [sizes.padding[0], sizes.padding[1], sizes.stride[0], sizes.stride[1], sizes.groups].map(|x| x as c_int);
        let shapes = sizes.shapes().map(|shape| shape.map(|size| size as c_int));
        // SAFETY: all objects were just made.
        unsafe {
            for (i, [n, c, h, w]) in shapes.into_iter().enumerate() {
                let set = match i {
                    1 => cudnnSetFilter4dDescriptor(tensors[i], ty, 0, n, c, h, w),
                    _ => cudnnSetTensor4dDescriptor(tensors[i], 0, ty, n, c, h, w),
                };
                assert_eq!(set, SUCCESS);
            }
            assert_eq!(cudnnSetConvolution2dDescriptor(operation, ph, pw, sh, sw, 1, 1, 1, FLOAT), SUCCESS);
            assert_eq!(cudnnSetConvolutionGroupCount(operation, groups), SUCCESS);
            assert_eq!(cudnnSetConvolutionMathType(operation, math), SUCCESS);
        }
        Described { handle, tensors, operation }
    }

    /// What the heuristics say of a direction.
    pub fn algorithms(&self, direction: usize) -> Vec<Performance> {
        let (ask, _, [a, b, c]) = DIRECTIONS[direction];
        let (mut found, mut count) = ([Performance::default(); 8], 0);
        let [a, b, c] = [a, b, c].map(|i| self.tensors[i]);
        // SAFETY: handle and descriptions live; there is room for 8 results.
        let said = unsafe { ask(self.handle, a, b, self.operation, c, 8, &mut count, found.as_mut_ptr()) };
        assert_eq!(said, SUCCESS);
        found[..count as usize].to_vec()
    }

    /// Computes a direction: `buffers` are x, w and y.
    pub fn run(
        &self,
        direction: usize,
        algorithm: c_int,
        (space, bytes): (u64, usize),
        buffers: [u64; 3],
        [alpha, beta]: [f32; 2],
    ) -> c_int {
        let (_, call, [a, b, c]) = DIRECTIONS[direction];
        let [x, w, y] = [a, b, c].map(|i| (self.tensors[i], buffers[i]));
        // SAFETY: handle and descriptions live; addresses are checked by the library.
        unsafe {
            call(self.handle, &alpha, x.0, x.1, w.0, w.1, self.operation, algorithm, space, bytes, &beta, y.0, y.1)
        }
    }
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            assert_eq!(cudnnDestroyTensorDescriptor(self.tensors[0]), SUCCESS);
            assert_eq!(cudnnDestroyFilterDescriptor(self.tensors[1]), SUCCESS);
            assert_eq!(cudnnDestroyTensorDescriptor(self.tensors[2]), SUCCESS);
            assert_eq!(cudnnDestroyConvolutionDescriptor(self.operation), SUCCESS);
            assert_eq!(cudnnDestroy(self.handle), SUCCESS);
        }
    }
}

/// Device memory of `bytes` bytes that nothing wrote.
pub fn allocate(bytes: usize) -> u64 {
    Memory::global().allocate(0, bytes).unwrap()
}

/// A stream of device 0.
pub fn stream() -> usize {
    let (mut context, mut stream) = (0, 0);
    // SAFETY: room for what is asked for.
    unsafe {
        assert_eq!(cuInit(0), SUCCESS);
        assert_eq!(cuDevicePrimaryCtxRetain(&mut context, 0), SUCCESS);
        assert_eq!(cuCtxSetCurrent(context), SUCCESS);
        assert_eq!(cuStreamCreate(&mut stream, 1), SUCCESS);
    }
    stream
}
