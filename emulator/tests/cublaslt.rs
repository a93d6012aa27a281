//! The emulated cuBLASLt, called as a program calls the library, against plain loops in f64.

use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};

use half::{bf16, f16};
// The library's and the driver's symbols come with it.
use warpstep_emulator as _;

type Handle = *mut c_void;

unsafe extern "C" {
    fn cuInit(flags: u32) -> c_int;
    fn cuDevicePrimaryCtxRetain(context: *mut usize, ordinal: c_int) -> c_int;
    fn cuCtxSetCurrent(context: usize) -> c_int;
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int;
    fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) -> c_int;
    fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) -> c_int;
    fn cuStreamCreate(to: *mut usize, flags: u32) -> c_int;
    fn cuStreamBeginCapture_v2(stream: usize, mode: u32) -> c_int;
    fn cuStreamEndCapture(stream: usize, to: *mut usize) -> c_int;
    fn cuGraphInstantiateWithFlags(to: *mut usize, graph: usize, flags: u64) -> c_int;
    fn cuGraphLaunch(graph: usize, stream: usize) -> c_int;
    fn cublasLtGetVersion() -> usize;
    fn cublasLtMatmulDescCreate(to: *mut Handle, compute: c_int, scale: c_int) -> c_int;
    fn cublasLtMatmulDescSetAttribute(operation: Handle, number: c_int, from: *const c_void, bytes: usize) -> c_int;
    fn cublasLtMatmulDescDestroy(operation: Handle) -> c_int;
    fn cublasLtMatrixLayoutCreate(to: *mut Handle, ty: c_int, rows: u64, columns: u64, stride: i64) -> c_int;
    fn cublasLtMatrixLayoutDestroy(layout: Handle) -> c_int;
    fn cublasLtMatmulPreferenceCreate(to: *mut Handle) -> c_int;
    fn cublasLtMatmulPreferenceSetAttribute(limits: Handle, number: c_int, from: *const c_void, bytes: usize) -> c_int;
    fn cublasLtMatmulPreferenceDestroy(limits: Handle) -> c_int;
    fn cublasLtMatmulAlgoGetHeuristic(
        handle: Handle,
        operation: Handle,
        a: Handle,
        b: Handle,
        c: Handle,
        d: Handle,
        limits: Handle,
        asked: c_int,
        results: *mut Candidate,
        count: *mut c_int,
    ) -> c_int;
    fn cublasLtMatmulAlgoCheck(
        handle: Handle,
        operation: Handle,
        a: Handle,
        b: Handle,
        c: Handle,
        d: Handle,
        algorithm: *const [u64; 8],
        result: *mut Candidate,
    ) -> c_int;
    fn cublasLtMatmul(
        handle: Handle,
        operation: Handle,
        alpha: *const f32,
        a: u64,
        a_layout: Handle,
        b: u64,
        b_layout: Handle,
        beta: *const f32,
        c: u64,
        c_layout: Handle,
        d: u64,
        d_layout: Handle,
        algorithm: *const [u64; 8],
        workspace: u64,
        workspace_bytes: usize,
        stream: usize,
    ) -> c_int;
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Candidate {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const NOT_SUPPORTED: c_int = 15;

const RELU: i32 = 2;
const BIAS: i32 = 4;
const RELU_BIAS: i32 = 6;
const GELU: i32 = 32;
const GELU_BIAS: i32 = 36;
const GELU_AUX: i32 = 160;
const GELU_AUX_BIAS: i32 = 164;
const DGELU: i32 = 192;
const DGELU_BGRAD: i32 = 208;
const BGRADA: i32 = 256;
const BGRADB: i32 = 512;

/// Types of stored values: `cudaDataType`, bytes, and rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Type {
    F32,
    F16,
    Bf16,
}

impl Type {
    fn number(self) -> c_int {
        match self {
            Type::F32 => 0,
            Type::F16 => 2,
            Type::Bf16 => 14,
        }
    }

    fn bytes(self) -> usize {
        if self == Type::F32 { 4 } else { 2 }
    }

    /// Half the distance of neighbours at 1.
    fn rounding(self) -> f64 {
        match self {
            Type::F32 => f64::from(f32::EPSILON) / 2.0,
            Type::F16 => f16::EPSILON.to_f64() / 2.0,
            Type::Bf16 => bf16::EPSILON.to_f64() / 2.0,
        }
    }

    fn store(self, values: &[f64]) -> Vec<u8> {
        let bytes = |&v: &f64| match self {
            Type::F32 => (v as f32).to_le_bytes().to_vec(),
            Type::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
            Type::Bf16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        };
        values.iter().flat_map(bytes).collect()
    }

    fn load(self, bytes: &[u8]) -> Vec<f64> {
        let value = |b: &[u8]| match self {
            Type::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Type::F16 => f16::from_le_bytes([b[0], b[1]]).to_f64(),
            Type::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        };
        bytes.chunks_exact(self.bytes()).map(value).collect()
    }
}

/// Values in device memory.
#[derive(Clone, Copy)]
struct Placed {
    address: u64,
    ty: Type,
    len: usize,
}

fn place(ty: Type, values: &[f64]) -> Placed {
    start();
    let bytes = ty.store(values);
    let mut address = 0;
    // SAFETY: a context is current; the address has room, the bytes are as many as are copied.
    unsafe {
        assert_eq!(cuMemAlloc_v2(&mut address, bytes.len() + 16), SUCCESS);
        assert_eq!(cuMemcpyHtoD_v2(address, bytes.as_ptr(), bytes.len()), SUCCESS);
    }
    Placed { address, ty, len: values.len() }
}

impl Placed {
    fn get(self) -> Vec<f64> {
        let mut bytes = vec![0u8; self.len * self.ty.bytes()];
        // SAFETY: as many bytes as are copied.
        assert_eq!(unsafe { cuMemcpyDtoH_v2(bytes.as_mut_ptr(), self.address, bytes.len()) }, SUCCESS);
        self.ty.load(&bytes)
    }
}

/// Makes the device's context this thread's.
fn start() {
    let mut context = 0;
    // SAFETY: there is room for the handle.
    unsafe {
        assert_eq!(cuInit(0), SUCCESS);
        assert_eq!(cuDevicePrimaryCtxRetain(&mut context, 0), SUCCESS);
        assert_eq!(cuCtxSetCurrent(context), SUCCESS);
    }
}

/// Values of a fixed sequence that starts anywhere; small, so that f16 holds their products.
fn draw(seed: &mut u64, ty: Type, len: usize) -> Vec<f64> {
    let values = (0..len).map(|_| {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 33) as f64 / f64::from(1u32 << 30) - 1.0
    });
    let values: Vec<f64> = values.collect();
    ty.load(&ty.store(&values))
}

fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = now.map_or(0, |now| now.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

/// A product as it is described to the library.
#[derive(Clone, Copy)]
struct Case {
    types: [Type; 2],
    /// m, k, n.
    size: [usize; 3],
    transposed: [bool; 2],
    tf32: bool,
    epilogue: i32,
    bias: u64,
    aux: u64,
    aux_stride: i64,
    aux_type: Option<c_int>,
    bias_type: Option<c_int>,
}

impl Case {
    fn new(types: [Type; 2], size: [usize; 3], epilogue: i32) -> Self {
        let transposed = [false, epilogue == BGRADB];
        Case {
            types,
            size,
            transposed,
            tf32: false,
            epilogue,
            bias: 0,
            aux: 0,
            aux_stride: 0,
            aux_type: None,
            bias_type: None,
        }
    }
}

/// Its descriptions, destroyed with it.
struct Described {
    operation: Handle,
    layouts: [Handle; 3],
    limits: Handle,
}

/// Bytes of workspace that algorithms may take.
const WORKSPACE: usize = 1 << 16;

impl Described {
    fn new(case: &Case) -> Self {
        let [m, k, n] = case.size;
        let mut made = Described { operation: null_mut(), layouts: [null_mut(); 3], limits: null_mut() };
        // SAFETY: there is room for each handle; attributes are of the types that the library asks for.
        unsafe {
            assert_eq!(cublasLtMatmulDescCreate(&mut made.operation, if case.tf32 { 77 } else { 68 }, 0), SUCCESS);
            let stored = |(rows, columns): (usize, usize), transposed| {
                if transposed { (columns, rows) } else { (rows, columns) }
            };
            let [a, b] = [stored((m, k), case.transposed[0]), stored((k, n), case.transposed[1])];
            let shapes = [(case.types[0], a), (case.types[0], b), (case.types[1], (m, n))];
            for (layout, (ty, (rows, columns))) in made.layouts.iter_mut().zip(shapes) {
                let status = cublasLtMatrixLayoutCreate(layout, ty.number(), rows as u64, columns as u64, rows as i64);
                assert_eq!(status, SUCCESS);
            }
            assert_eq!(cublasLtMatmulPreferenceCreate(&mut made.limits), SUCCESS);
            assert_eq!(made.limit(1, &WORKSPACE), SUCCESS);
        }
        for (number, transposed) in [(3, case.transposed[0]), (4, case.transposed[1])] {
            assert_eq!(made.set(number, &i32::from(transposed)), SUCCESS);
        }
        assert_eq!(made.set(7, &case.epilogue), SUCCESS);
        assert_eq!(made.set(8, &case.bias), SUCCESS);
        assert_eq!(made.set(11, &case.aux), SUCCESS);
        assert_eq!(made.set(12, &case.aux_stride), SUCCESS);
        for (number, ty) in [(22, case.aux_type), (26, case.bias_type)] {
            if let Some(ty) = ty {
                assert_eq!(made.set(number, &ty), SUCCESS);
            }
        }
        made
    }

    fn set<T>(&self, number: c_int, value: &T) -> c_int {
        let from = std::ptr::from_ref(value).cast();
        // SAFETY: the description lives, and as many bytes as are named.
        unsafe { cublasLtMatmulDescSetAttribute(self.operation, number, from, size_of::<T>()) }
    }

    fn limit<T>(&self, number: c_int, value: &T) -> c_int {
        let from = std::ptr::from_ref(value).cast();
        // SAFETY: as above.
        unsafe { cublasLtMatmulPreferenceSetAttribute(self.limits, number, from, size_of::<T>()) }
    }

    /// What the heuristic proposes.
    fn candidates(&self) -> Result<Vec<Candidate>, c_int> {
        let mut found = [Candidate::default(); 8];
        let mut count = 0;
        let [a, b, d] = self.layouts;
        // SAFETY: everything lives; there is room for 8 results.
        let status = unsafe {
            cublasLtMatmulAlgoGetHeuristic(
                null_mut(),
                self.operation,
                a,
                b,
                d,
                d,
                self.limits,
                8,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        if status == SUCCESS { Ok(found[..count as usize].to_vec()) } else { Err(status) }
    }

    fn check(&self, algorithm: &[u64; 8]) -> Result<Candidate, c_int> {
        let mut result = Candidate::default();
        let [a, b, d] = self.layouts;
        // SAFETY: everything lives; there is room for a result.
        let status = unsafe { cublasLtMatmulAlgoCheck(null_mut(), self.operation, a, b, d, d, algorithm, &mut result) };
        if status == SUCCESS { Ok(result) } else { Err(status) }
    }

    fn multiply(&self, given: Given, algorithm: Option<&[u64; 8]>, workspace_bytes: usize, stream: usize) -> c_int {
        let [a, b, d] = self.layouts;
        let Given { a: left, b: right, c, d: out, alpha, beta } = given;
        // SAFETY: everything lives; the library checks addresses.
        unsafe {
            cublasLtMatmul(
                null_mut(),
                self.operation,
                &alpha,
                left,
                a,
                right,
                b,
                &beta,
                c,
                d,
                out,
                d,
                algorithm.map_or(null(), std::ptr::from_ref),
                0,
                workspace_bytes,
                stream,
            )
        }
    }
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            self.layouts.iter().for_each(|&layout| assert_eq!(cublasLtMatrixLayoutDestroy(layout), SUCCESS));
            cublasLtMatmulDescDestroy(self.operation);
            cublasLtMatmulPreferenceDestroy(self.limits);
        }
    }
}

/// Addresses and scalars of a call.
#[derive(Clone, Copy)]
struct Given {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    alpha: f32,
    beta: f32,
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// By finite differences, so that no formula is shared.
fn gelu_slope(x: f64) -> f64 {
    let h = 1e-5;
    (gelu(x + h) - gelu(x - h)) / (2.0 * h)
}

/// Runs a case with random values and every algorithm, and compares all that it writes with plain loops.
fn judge(mut case: Case, seed: &mut u64) {
    let [m, k, n] = case.size;
    let [input, output] = case.types;
    let what = format!("{:?} {:?} epilogue {} transposed {:?}", case.types, case.size, case.epilogue, case.transposed);
    let (a, b) = (draw(seed, input, m * k), draw(seed, input, k * n));
    let (old, vector) = (draw(seed, output, m * n), draw(seed, output, m.max(n)));
    let stride = m.next_multiple_of(8);
    let before = draw(seed, output, stride * n);
    let vector_placed = place(output, &vector);
    let aux = place(output, &before);
    (case.bias, case.aux, case.aux_stride) = (vector_placed.address, aux.address, stride as i64);
    let (alpha, beta) = (0.5f32, 2.0f32);
    let at = |transposed: bool, row: usize, column: usize, rows: usize, columns: usize| {
        if transposed { row * columns + column } else { column * rows + row }
    };
    let left = |i: usize, p: usize| a[at(case.transposed[0], i, p, m, k)];
    let right = |p: usize, j: usize| b[at(case.transposed[1], p, j, k, n)];
    let with_bias = [BIAS, RELU_BIAS, GELU_BIAS, GELU_AUX_BIAS].contains(&case.epilogue);
    let value = |i: usize, j: usize| {
        let sum: f64 = (0..k).map(|p| left(i, p) * right(p, j)).sum();
        0.5 * sum + 2.0 * old[j * m + i] + if with_bias { vector[i] } else { 0.0 }
    };
    let out = |i: usize, j: usize| match case.epilogue {
        RELU | RELU_BIAS => value(i, j).max(0.0),
        GELU | GELU_BIAS | GELU_AUX | GELU_AUX_BIAS => gelu(value(i, j)),
        DGELU | DGELU_BGRAD => value(i, j) * gelu_slope(before[j * stride + i]),
        _ => value(i, j),
    };
    let described = Described::new(&case);
    let candidates = described.candidates().unwrap_or_else(|status| panic!("{what}: {status}"));
    assert!(!candidates.is_empty(), "{what}");
    let (a, b) = (place(input, &a), place(input, &b));
    let near = |found: f64, expected: f64, terms: usize, of: &str| {
        let size = expected.abs().max((terms as f64).sqrt());
        let allowed = size * (4.0 * f64::from(f32::EPSILON) * (terms as f64).sqrt() + 2.0 * output.rounding()) + 1e-9;
        assert!((found - expected).abs() <= allowed, "{what}: {of}: {found} for {expected}");
    };
    for candidate in candidates {
        // What is added lies elsewhere, and stays as it is.
        let (c, d) = (place(output, &old), place(output, &vec![f64::NAN; m * n]));
        let given = Given { a: a.address, b: b.address, c: c.address, d: d.address, alpha, beta };
        assert_eq!(described.multiply(given, Some(&candidate.algorithm), WORKSPACE, 0), SUCCESS, "{what}");
        assert_eq!(c.get(), old, "{what}");
        let (found, vector_found, aux_found) = (d.get(), vector_placed.get(), aux.get());
        for (i, j) in (0..n).flat_map(|j| (0..m).map(move |i| (i, j))) {
            near(found[j * m + i], out(i, j), k, "D");
            let expected =
                if [GELU_AUX, GELU_AUX_BIAS].contains(&case.epilogue) { value(i, j) } else { before[j * stride + i] };
            near(aux_found[j * stride + i], expected, k, "aux");
        }
        let sums: Option<Vec<f64>> = match case.epilogue {
            BGRADA => Some((0..m).map(|i| (0..k).map(|p| left(i, p)).sum()).collect()),
            BGRADB => Some((0..n).map(|j| (0..k).map(|p| right(p, j)).sum()).collect()),
            DGELU_BGRAD => Some((0..m).map(|i| (0..n).map(|j| out(i, j)).sum()).collect()),
            _ => None,
        };
        let written = sums.as_ref().map_or(0, Vec::len);
        sums.iter().flatten().zip(&vector_found).for_each(|(sum, found)| near(*found, *sum, k * n, "vector"));
        assert_eq!(vector_found[written..], vector[written..], "{what}: past the vector's end");
        // Between the columns of the auxiliary matrix nothing is written.
        for j in 0..n {
            assert_eq!(aux_found[j * stride + m..(j + 1) * stride], before[j * stride + m..(j + 1) * stride], "{what}");
        }
    }
}

#[test]
fn every_epilogue_gives_what_plain_loops_give_with_every_algorithm() {
    let mut seed = fresh_seed();
    let types = [
        [Type::F32, Type::F32],
        [Type::Bf16, Type::Bf16],
        [Type::F16, Type::F16],
        [Type::Bf16, Type::F32],
        [Type::F16, Type::F32],
    ];
    let epilogues =
        [1, RELU, BIAS, RELU_BIAS, GELU, GELU_BIAS, GELU_AUX, GELU_AUX_BIAS, DGELU, DGELU_BGRAD, BGRADA, BGRADB];
    for types in types {
        for epilogue in epilogues {
            for size in [[8, 16, 8], [5, 7, 3], [1, 1, 1], [16, 9, 2]] {
                judge(Case::new(types, size, epilogue), &mut seed);
            }
        }
    }
    for transposed in [[false, false], [true, false], [false, true], [true, true]] {
        judge(Case { transposed, ..Case::new([Type::F32; 2], [9, 6, 4], GELU_AUX_BIAS) }, &mut seed);
    }
}

#[test]
fn wrong_use_is_answered_with_the_librarys_statuses() {
    let buffer = place(Type::Bf16, &[0.0; 512]);
    let at = buffer.address;
    let new = |epilogue| Case { aux_stride: 8, aux: at, bias: at, ..Case::new([Type::Bf16; 2], [8, 4, 4], epilogue) };
    // (what, case, status of the heuristic, status of the product)
    let wrong = [
        ("a matrix's stride below its rows", Case { aux_stride: 0, ..new(GELU_AUX) }, INVALID_VALUE, INVALID_VALUE),
        ("a matrix's stride of no multiple of 8", Case { aux_stride: 12, ..new(DGELU) }, INVALID_VALUE, INVALID_VALUE),
        ("a matrix of another type", Case { aux_type: Some(0), ..new(GELU_AUX) }, INVALID_VALUE, INVALID_VALUE),
        ("a matrix that is not aligned", Case { aux: at + 2, ..new(GELU_AUX) }, NOT_SUPPORTED, NOT_SUPPORTED),
        ("no matrix to write", Case { aux: 0, ..new(GELU_AUX) }, SUCCESS, NOT_SUPPORTED),
        ("no matrix to read", Case { aux: 0, ..new(DGELU) }, SUCCESS, INVALID_VALUE),
        ("no bias", Case { bias: 0, ..new(BIAS) }, SUCCESS, INVALID_VALUE),
        ("no vector for sums", Case { bias: 0, ..new(BGRADB) }, SUCCESS, INVALID_VALUE),
        ("a bias between two values", Case { bias: at + 1, ..new(BIAS) }, SUCCESS, NOT_SUPPORTED),
        ("a bias of another type", Case { bias_type: Some(0), ..new(BIAS) }, NOT_SUPPORTED, NOT_SUPPORTED),
        ("sums of an A transposed", Case { transposed: [true, false], ..new(BGRADA) }, NOT_SUPPORTED, NOT_SUPPORTED),
        ("sums of a B not transposed", Case { transposed: [false; 2], ..new(BGRADB) }, NOT_SUPPORTED, NOT_SUPPORTED),
        ("tf32 of 16 bits", Case { tf32: true, ..new(1) }, NOT_SUPPORTED, NOT_SUPPORTED),
        (
            "types that do not go together",
            Case { types: [Type::Bf16, Type::F16], ..new(1) },
            NOT_SUPPORTED,
            NOT_SUPPORTED,
        ),
        ("an epilogue that is not emulated", new(130), NOT_SUPPORTED, NOT_SUPPORTED),
    ];
    for (what, case, heuristic, multiplied) in wrong {
        let described = Described::new(&case);
        assert_eq!(described.candidates().map(|_| SUCCESS).unwrap_or_else(|status| status), heuristic, "{what}");
        let given = Given { a: at, b: at + 256, c: at + 512, d: at + 512, alpha: 1.0, beta: 0.0 };
        assert_eq!(described.multiply(given, None, 0, 0), multiplied, "{what}");
    }
    let described = Described::new(&new(1));
    assert_eq!(described.set(8, &0u32), INVALID_VALUE, "an attribute of another size");
    assert_eq!(described.set(99, &0u32), NOT_SUPPORTED, "an attribute that is not emulated");
}

#[test]
fn candidates_keep_to_the_limits_and_are_checked() {
    let described = Described::new(&Case::new([Type::F32; 2], [8, 16, 8], 1));
    let all = described.candidates().unwrap();
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|candidate| candidate.state == SUCCESS && candidate.workspace <= WORKSPACE));
    let split = *all.iter().find(|candidate| candidate.workspace > 0).unwrap();
    // k in one part: no scheme of reduction, or no workspace.
    assert_eq!(described.limit(3, &1u32), SUCCESS);
    assert!(described.candidates().unwrap().iter().all(|candidate| candidate.workspace == 0));
    assert_eq!(described.limit(3, &2u32), SUCCESS);
    assert_eq!(described.limit(1, &0usize), SUCCESS);
    assert!(described.candidates().unwrap().iter().all(|candidate| candidate.workspace == 0));
    // Addresses that are multiples of 4 only: none that reads 16 bytes at once.
    assert_eq!(described.limit(5, &4u32), SUCCESS);
    let unaligned = described.candidates().unwrap();
    assert_eq!(unaligned.len(), 1);
    let checked = described.check(&split.algorithm).unwrap();
    assert_eq!((checked.workspace, checked.state), (split.workspace, SUCCESS));
    assert_eq!(described.check(&[0; 8]).unwrap_err(), INVALID_VALUE);
    let mut foreign = split.algorithm;
    foreign[1] = 1000;
    assert_eq!(described.check(&foreign).unwrap_err(), INVALID_VALUE);
    // Columns of 5 values of 4 bytes: the algorithm that wants 16 does not fit.
    let odd = Described::new(&Case::new([Type::F32; 2], [5, 16, 8], 1));
    assert_eq!(odd.check(&all[0].algorithm).unwrap_err(), NOT_SUPPORTED);
    let values = place(Type::F32, &[1.0; 300]);
    let at = |bytes| values.address + bytes;
    let given = Given { a: at(0), b: at(0), c: at(512), d: at(512), alpha: 1.0, beta: 0.0 };
    assert_eq!(described.multiply(given, Some(&split.algorithm), 0, 0), INVALID_VALUE, "too little workspace");
    let given = Given { a: at(4), ..given };
    assert_eq!(
        described.multiply(given, Some(&all[0].algorithm), WORKSPACE, 0),
        NOT_SUPPORTED,
        "an address it cannot read"
    );
    assert_eq!(described.multiply(given, Some(&unaligned[0].algorithm), WORKSPACE, 0), SUCCESS);
    // SAFETY: asks for a number.
    assert!(unsafe { cublasLtGetVersion() } >= 130_000);
}

#[test]
fn algorithms_that_split_k_add_in_another_order() {
    // 1 is lost beside 2^24 where it is added to it, and kept where it is added to its like first.
    let big = f64::from(1u32 << 24);
    let (a, b) = (place(Type::F32, &[big, 1.0, 1.0, 1.0]), place(Type::F32, &[1.0; 4]));
    let d = place(Type::F32, &[0.0]);
    let described = Described::new(&Case::new([Type::F32; 2], [1, 4, 1], 1));
    let given = Given { a: a.address, b: b.address, c: d.address, d: d.address, alpha: 1.0, beta: 0.0 };
    let results: Vec<f64> = (described.candidates().unwrap().iter())
        .map(|candidate| {
            assert_eq!(described.multiply(given, Some(&candidate.algorithm), WORKSPACE, 0), SUCCESS);
            d.get()[0]
        })
        .collect();
    assert!(results.iter().any(|result| *result != results[0]), "{results:?}");
}

#[test]
fn a_captured_product_is_done_at_each_replay_and_reads_what_is_there_then() {
    let case = Case::new([Type::F32; 2], [8, 4, 4], DGELU_BGRAD);
    let (aux, sums) = (place(Type::F32, &[0.0; 32]), place(Type::F32, &[7.0; 8]));
    let described = Described::new(&Case { aux: aux.address, aux_stride: 8, bias: sums.address, ..case });
    let (a, b) = (place(Type::F32, &[1.0; 32]), place(Type::F32, &[1.0; 16]));
    let d = place(Type::F32, &[0.0; 32]);
    let given = Given { a: a.address, b: b.address, c: d.address, d: d.address, alpha: 1.0, beta: 0.0 };
    let (mut stream, mut graph, mut executable) = (0, 0, 0);
    // SAFETY: there is room for each handle.
    unsafe {
        assert_eq!(cuStreamCreate(&mut stream, 0), SUCCESS);
        assert_eq!(cuStreamBeginCapture_v2(stream, 1), SUCCESS);
        assert_eq!(described.multiply(given, None, 0, stream), SUCCESS);
        assert_eq!(cuStreamEndCapture(stream, &mut graph), SUCCESS);
        assert_eq!(cuGraphInstantiateWithFlags(&mut executable, graph, 0), SUCCESS);
    }
    assert_eq!((d.get()[0], sums.get()[0]), (0.0, 7.0), "nothing is done while it is recorded");
    for of in [0.0, 1.0] {
        let bytes = Type::F32.store(&[of; 32]);
        // SAFETY: as many bytes as are copied.
        unsafe {
            assert_eq!(cuMemcpyHtoD_v2(aux.address, bytes.as_ptr(), bytes.len()), SUCCESS);
            assert_eq!(cuGraphLaunch(executable, stream), SUCCESS);
        }
        let expected = 4.0 * gelu_slope(of);
        assert!((d.get()[31] - expected).abs() < 1e-5, "{} for {expected}", d.get()[31]);
        assert!((sums.get()[7] - 4.0 * expected).abs() < 1e-4);
    }
}
