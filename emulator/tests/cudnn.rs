//! The stand-in for cuDNN against the definition of a convolution, in f64, and what it answers to wrong calls.

#[path = "common/cudnn.rs"]
mod cudnn;

use std::ptr::{null, null_mut};
use std::time::{SystemTime, UNIX_EPOCH};

use cudnn::*;
use half::{bf16, f16};
use warpstep_emulator::memory::Memory;

const ODD: Sizes = Sizes {
    batch: 3,
    channels: 4,
    input: [7, 5],
    filters: 6,
    kernel: [3, 2],
    stride: [2, 1],
    padding: [1, 1],
    groups: 2,
};

/// Values that every type holds exactly, from a fresh seed that is printed.
struct Draw(u64);

impl Draw {
    fn new() -> Self {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
        println!("seed {seed}");
        Draw(seed | 1)
    }

    fn values(&mut self, len: usize) -> Vec<f64> {
        let mut next = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % 129) as f64 / 32.0 - 2.0
        };
        (0..len).map(|_| next()).collect()
    }
}

fn bytes(ty: i32, values: &[f64]) -> Vec<u8> {
    let one = |&x: &f64| match ty {
        HALF => f16::from_f64(x).to_le_bytes().to_vec(),
        BFLOAT16 => bf16::from_f64(x).to_le_bytes().to_vec(),
        _ => (x as f32).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(one).collect()
}

fn read(ty: i32, address: u64, len: usize) -> Vec<f64> {
    let width = if ty == FLOAT { 4 } else { 2 };
    let mut bytes = vec![0; len * width];
    Memory::global().copy_out(address, &mut bytes).unwrap();
    let one = |b: &[u8]| match ty {
        HALF => f16::from_le_bytes([b[0], b[1]]).to_f64(),
        BFLOAT16 => bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        _ => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
    };
    bytes.chunks_exact(width).map(one).collect()
}

fn upload(ty: i32, values: &[f64]) -> u64 {
    let bytes = bytes(ty, values);
    let address = allocate(bytes.len());
    Memory::global().copy_in(address, &bytes).unwrap();
    address
}

/// The direction's result in f64; `tensors` are x, w and y, of which it takes two.
fn reference(sizes: &Sizes, direction: usize, tensors: &[Vec<f64>; 3]) -> Vec<f64> {
    let [a, b, to] = DIRECTIONS[direction].2;
    let mut out = vec![0.0; tensors[to].len()];
    sizes.taps(|x, w, y| {
        let at = [x, w, y];
        out[at[to]] += tensors[a][at[a]] * tensors[b][at[b]];
    });
    out
}

fn tensors(sizes: &Sizes) -> [Vec<f64>; 3] {
    let mut draw = Draw::new();
    sizes.shapes().map(|shape| draw.values(shape.iter().product()))
}

#[test]
fn every_direction_type_and_shape_is_the_definition() {
    let pointwise = Sizes { kernel: [1, 1], stride: [2, 2], padding: [0, 0], groups: 1, ..ODD };
    let depthwise = Sizes { filters: 8, groups: 4, stride: [1, 3], ..ODD };
    let padded = Sizes { batch: 1, input: [1, 2], kernel: [3, 5], padding: [4, 5], stride: [3, 2], ..ODD };
    for sizes in [ODD, pointwise, depthwise, padded] {
        let tensors = tensors(&sizes);
        for (ty, rounding) in [(FLOAT, 0.0), (BFLOAT16, 1.0 / 256.0), (HALF, 1.0 / 2048.0)] {
            let described = Described::new(&sizes, ty, FMA_MATH);
            let buffers = [0, 1, 2].map(|i| upload(ty, &tensors[i]));
            for (direction, (_, _, [.., to])) in DIRECTIONS.into_iter().enumerate() {
                let exact = reference(&sizes, direction, &tensors);
                for found in described.algorithms(direction).iter().filter(|found| found.status == SUCCESS) {
                    let space = allocate(found.memory.max(1));
                    for scalars in [[1.0, 0.0], [0.5, 2.0]] {
                        let target = upload(ty, &tensors[to]);
                        let mut buffers = buffers;
                        buffers[to] = target;
                        let said = described.run(direction, found.algorithm, (space, found.memory), buffers, scalars);
                        assert_eq!(said, SUCCESS);
                        let result = read(ty, target, exact.len());
                        for (i, (result, exact)) in result.iter().zip(&exact).enumerate() {
                            let [alpha, beta] = scalars.map(f64::from);
                            let exact = alpha * exact + beta * tensors[to][i];
                            // Products and sums of these values are exact in f32: nothing but the store rounds.
                            let allowed = rounding * exact.abs();
                            assert!(
                                (result - exact).abs() <= allowed,
                                "{sizes:?}, type {ty}, direction {direction}, {found:?}: {result} for {exact} at {i}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn tf32_is_used_where_it_is_allowed() {
    let sizes = Sizes {
        batch: 1,
        channels: 1,
        input: [1, 1],
        filters: 1,
        kernel: [1, 1],
        stride: [1, 1],
        padding: [0, 0],
        groups: 1,
    };
    let exact = 1.0 + 1.0 / 4096.0;
    let buffers = [upload(FLOAT, &[exact]), upload(FLOAT, &[1.0]), upload(FLOAT, &[0.0])];
    for (math, expected) in [(FMA_MATH, exact), (DEFAULT_MATH, 1.0)] {
        let described = Described::new(&sizes, FLOAT, math);
        assert_eq!(described.run(0, 0, (0, 0), buffers, [1.0, 0.0]), SUCCESS);
        assert_eq!(read(FLOAT, buffers[2], 1), [expected]);
    }
}

#[test]
fn sums_without_an_order_show_it() {
    // 1 is lost or kept beside 2^24 as it comes last or first.
    let sizes = Sizes {
        batch: 3,
        channels: 1,
        input: [1, 1],
        filters: 1,
        kernel: [1, 1],
        stride: [1, 1],
        padding: [0, 0],
        groups: 1,
    };
    let x = upload(FLOAT, &[16_777_216.0, 1.0, -16_777_216.0]);
    let buffers = [x, upload(FLOAT, &[0.0]), upload(FLOAT, &[1.0; 3])];
    let described = Described::new(&sizes, FLOAT, FMA_MATH);
    let algorithms = described.algorithms(2);
    for deterministic in [0, 1] {
        let usable = |found: &&Performance| found.status == SUCCESS && found.determinism == deterministic;
        let found = algorithms.iter().find(usable).unwrap();
        let space = allocate(found.memory.max(1));
        let mut results: Vec<f64> = (0..3)
            .map(|_| {
                let said = described.run(2, found.algorithm, (space, found.memory), buffers, [1.0, 0.0]);
                assert_eq!(said, SUCCESS);
                read(FLOAT, buffers[1], 1)[0]
            })
            .collect();
        results.dedup();
        assert_eq!(results.len() == 1, deterministic == 1, "{results:?}");
    }
}

#[test]
fn wrong_calls_get_the_status_that_the_library_documents() {
    let described = Described::new(&ODD, FLOAT, FMA_MATH);
    let buffers = tensors(&ODD).map(|values| upload(FLOAT, &values));
    let found = *described.algorithms(0).iter().find(|found| found.memory > 0).unwrap();
    let space = allocate(found.memory);
    let run = |algorithm, space, buffers| described.run(0, algorithm, space, buffers, [1.0, 0.0]);
    let enough = (space, found.memory);
    assert_eq!(run(found.algorithm, enough, buffers), SUCCESS);
    assert_eq!(run(found.algorithm, (space, found.memory - 1), buffers), BAD_PARAM);
    assert_eq!(run(found.algorithm, (0, found.memory), buffers), BAD_PARAM);
    assert_eq!(run(found.algorithm, enough, [buffers[0], 0, buffers[2]]), BAD_PARAM);
    // Algorithms that the heuristics say cannot do this, and ones that there are not.
    let refused = described.algorithms(0).iter().find(|found| found.status == NOT_SUPPORTED).unwrap().algorithm;
    assert_eq!(run(refused, enough, buffers), NOT_SUPPORTED);
    assert_eq!(run(77, enough, buffers), NOT_SUPPORTED);

    let (_, call, _) = DIRECTIONS[0];
    let (ask, ..) = DIRECTIONS[0];
    let Described { handle, tensors: [x, w, y], operation } = described;
    let one = 1.0f32;
    let mut count = 0;
    let mut results = [Performance::default(); 1];
    let mut heuristics = |asked, count| {
        // SAFETY: handle and descriptions live; there is room for the one result that is asked for at most.
        unsafe { ask(handle, x, w, operation, y, asked, count, results.as_mut_ptr()) }
    };
    // SAFETY: what is not null lives; wrong calls are refused before anything is read.
    unsafe {
        let convolve = |handle, alpha, x, operation| {
            call(handle, alpha, x, buffers[0], w, buffers[1], operation, 0, 0, 0, &one, y, buffers[2])
        };
        assert_eq!(convolve(handle, &one, x, operation), SUCCESS);
        assert_eq!(convolve(null_mut(), &one, x, operation), BAD_PARAM);
        assert_eq!(convolve(handle, null(), x, operation), BAD_PARAM);
        assert_eq!(convolve(handle, &one, null_mut(), operation), BAD_PARAM);
        assert_eq!(convolve(handle, &one, x, null_mut()), BAD_PARAM);
        // A tensor that is described nowhere, one of another shape, one of another type.
        let other = created(cudnnCreateTensorDescriptor);
        assert_eq!(convolve(handle, &one, other, operation), BAD_PARAM);
        assert_eq!(cudnnSetTensor4dDescriptor(other, 0, FLOAT, 3, 4, 9, 5), SUCCESS);
        assert_eq!(convolve(handle, &one, other, operation), BAD_PARAM);
        assert_eq!(cudnnSetTensor4dDescriptor(other, 0, HALF, 3, 4, 7, 5), SUCCESS);
        assert_eq!(convolve(handle, &one, other, operation), BAD_PARAM);
        // Descriptions that mean nothing.
        assert_eq!(cudnnSetTensor4dDescriptor(null_mut(), 0, FLOAT, 1, 1, 1, 1), BAD_PARAM);
        assert_eq!(cudnnSetTensor4dDescriptor(other, 0, FLOAT, 1, -1, 1, 1), BAD_PARAM);
        assert_eq!(cudnnSetTensor4dDescriptor(other, 0, FLOAT, 1 << 11, 1 << 10, 1 << 10, 1), NOT_SUPPORTED);
        assert_eq!(cudnnSetConvolution2dDescriptor(operation, -1, 0, 1, 1, 1, 1, 1, FLOAT), BAD_PARAM);
        assert_eq!(cudnnSetConvolution2dDescriptor(operation, 0, 0, 0, 1, 1, 1, 1, FLOAT), BAD_PARAM);
        assert_eq!(cudnnSetConvolution2dDescriptor(operation, 0, 0, 1, 1, 1, 0, 1, FLOAT), BAD_PARAM);
        assert_eq!(cudnnSetConvolution2dDescriptor(operation, 0, 0, 1, 1, 1, 1, 2, FLOAT), BAD_PARAM);
        assert_eq!(cudnnSetConvolutionGroupCount(operation, 0), BAD_PARAM);
        assert_eq!(cudnnSetConvolutionMathType(operation, 9), BAD_PARAM);
        // Another padding, so another output than y's.
        assert_eq!(cudnnSetConvolution2dDescriptor(operation, 0, 0, 2, 1, 1, 1, 1, FLOAT), SUCCESS);
        assert_eq!(convolve(handle, &one, x, operation), BAD_PARAM);
        assert_eq!(heuristics(1, &mut count), BAD_PARAM);
        assert_eq!(cudnnSetConvolution2dDescriptor(operation, 1, 1, 2, 1, 1, 1, 1, FLOAT), SUCCESS);
        assert_eq!(heuristics(0, &mut count), BAD_PARAM);
        assert_eq!(heuristics(1, null_mut()), BAD_PARAM);
        assert_eq!(heuristics(1, &mut count), SUCCESS);
        assert_eq!(count, 1);
        assert_eq!(cudnnSetStream(null_mut(), 0), BAD_PARAM);
        assert_eq!(cudnnCreate(null_mut()), BAD_PARAM);
        assert_eq!(cudnnDestroyTensorDescriptor(other), SUCCESS);
    }
}

#[test]
fn a_recorded_call_is_done_at_each_replay() {
    let sizes = Sizes { groups: 1, ..ODD };
    let tensors = tensors(&sizes);
    let described = Described::new(&sizes, FLOAT, FMA_MATH);
    let buffers = [upload(FLOAT, &tensors[0]), upload(FLOAT, &tensors[1]), upload(FLOAT, &vec![0.0; tensors[2].len()])];
    let exact = reference(&sizes, 0, &tensors);
    let (stream, mut graph, mut ready) = (stream(), 0, 0);
    // SAFETY: the handle and the stream live; there is room for both graphs.
    unsafe {
        assert_eq!(cudnnSetStream(described.handle, stream), SUCCESS);
        assert_eq!(cuStreamBeginCapture_v2(stream, 1), SUCCESS);
        assert_eq!(described.run(0, 0, (0, 0), buffers, [1.0, 1.0]), SUCCESS);
        assert_eq!(cuStreamEndCapture(stream, &mut graph), SUCCESS);
        assert!(read(FLOAT, buffers[2], exact.len()).iter().all(|&y| y == 0.0), "recorded and done");
        assert_eq!(cuGraphInstantiateWithFlags(&mut ready, graph, 0), SUCCESS);
        for replays in 1..=3 {
            assert_eq!(cuGraphLaunch(ready, stream), SUCCESS);
            let expected: Vec<f64> = exact.iter().map(|y| y * f64::from(replays)).collect();
            assert_eq!(read(FLOAT, buffers[2], exact.len()), expected);
        }
    }
}
