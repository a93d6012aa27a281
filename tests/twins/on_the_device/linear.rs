use warpstep::backend::cuda::{Fusion, SmallProducts};

use super::*;

struct Affine {
    rows: usize,
    inputs: usize,
    outputs: usize,
    accumulate: bool,
}

impl Case for Affine {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Affine { rows, inputs, outputs, accumulate } = *self;
        bed.step.accumulate = accumulate;
        let (x, dy) = (bed.real(&draw.normal(0, rows * inputs)), bed.real(&draw.normal(1, rows * outputs)));
        let weight = bed.parameter(&draw.normal(2, outputs * inputs));
        let bias = bed.parameter(&draw.normal(3, outputs));
        let (y, dx) = (bed.empty(rows * outputs), bed.empty(rows * inputs));
        let forward = LinearForward { x, weight, bias: Some(bias), y, rows, inputs, outputs, activation: None };
        let forward = bed.run(&forward).unwrap().get(y);
        let dweight = first(weight);
        let dbias = Some(first(bias));
        let back = LinearBackward { x, weight, dy, dx: Some(dx), dweight, dbias, rows, inputs, outputs, slope: None };
        let back = bed.run(&back).unwrap();
        vec![forward, back.get(dx), back.gradient(weight), back.gradient(bias)]
    }
}

#[test]
fn affine_maps_and_their_gradients() {
    let sizes = [[1, 1, 1], [3, 5, 7], [17, 33, 9], [64, 784, 10]];
    let cases: Vec<_> = sizes
        .into_iter()
        .flat_map(|[rows, inputs, outputs]| {
            [false, true].map(|accumulate| Affine { rows, inputs, outputs, accumulate })
        })
        .collect();
    in_all_types("linear", &cases);
}

/// An affine map with a function of its values, and one whose input is such a function's value.
struct Fused {
    size: [usize; 3],
    kind: ActivationKind,
    bias: bool,
    kept: bool,
    accumulate: bool,
}

impl Case for Fused {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Fused { size: [rows, inputs, outputs], kind, kept, accumulate, .. } = *self;
        bed.step.accumulate = accumulate;
        let (x, dy) = (bed.real(&draw.normal(0, rows * inputs)), bed.real(&draw.normal(1, rows * outputs)));
        let weight = bed.parameter(&draw.normal(2, outputs * inputs));
        let bias = self.bias.then(|| bed.parameter(&draw.normal(3, outputs)));
        let before = bed.real(&draw.normal(4, rows * inputs));
        let (y, u, dx) = (bed.empty(rows * outputs), bed.empty(rows * outputs), bed.empty(rows * inputs));
        let activation = Some(FusedActivation { kind, kept: kept.then_some(u) });
        let forward = bed.run(&LinearForward { x, weight, bias, y, rows, inputs, outputs, activation }).unwrap();
        let mut left = vec![forward.get(y)];
        left.extend(kept.then(|| forward.get(u)));
        // ReLU's slope may be asked of its value, which is then the x of the map.
        let of = if kind == ActivationKind::Relu && !kept { x } else { before };
        let (dweight, dbias, slope) = (first(weight), bias.map(first), Some(FusedSlope { kind, of }));
        let back = LinearBackward { x, weight, dy, dx: Some(dx), dweight, dbias, rows, inputs, outputs, slope };
        let back = bed.run(&back).unwrap();
        left.extend([back.get(dx), back.gradient(weight)]);
        left.extend(bias.map(|bias| back.gradient(bias)));
        left
    }
}

/// Every function, with and without bias, kept values and accumulation; widths around the multiple of 8 that the library's
/// epilogues ask for.
fn fused_cases() -> Vec<Fused> {
    use ActivationKind::*;
    let mut cases = Vec::new();
    for kind in [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh] {
        for (number, size) in [[1, 8, 8], [17, 16, 24], [9, 7, 16], [9, 16, 9], [33, 130, 65]].into_iter().enumerate() {
            // Every pair of the three flags occurs with each function.
            let flags = [0b000, 0b011, 0b101, 0b110, 0b111][number];
            let [bias, kept, accumulate] = [0, 1, 2].map(|bit| flags >> bit & 1 == 1);
            cases.push(Fused { size, kind, bias, kept, accumulate });
        }
    }
    cases
}

#[test]
fn fused_forms_hold_with_epilogues_of_the_library_and_with_passes_of_our_own() {
    let cases = fused_cases();
    for fusion in [Fusion::Always, Fusion::Never] {
        let what = format!("linear with activation, fused {fusion:?}");
        let options = DeviceOptions { fusion, ..DeviceOptions::default() };
        compare_with::<f32>(options, &what, &cases, F32);
        compare_with::<bf16>(options, &what, &cases, BF16);
        compare_with::<f16>(options, &what, &cases, F16);
    }
}

/// A factor loses half a unit of its tenth bit at most, 2^-11 of it; what is lost in a sum of up to 130 products of normal
/// factors deviates by 4e-3, of which five are allowed before a function that may shrink the values but not the error.
#[test]
fn fused_forms_in_tf32_differ_by_its_rounding_alone() {
    let options = DeviceOptions { tf32: true, fusion: Fusion::Always, ..DeviceOptions::default() };
    compare_with::<f32>(options, "linear with activation in tf32", &fused_cases(), [3.0 / 2048.0, 40.0 / 2048.0]);
}

/// A factor in tf32 as above, in sums of up to 800 products.
const TF32: [f64; 2] = [8.0 / 2048.0, 100.0 / 2048.0];

/// Around the sides of the kernels' tiles (16, 32) and what a warp takes at once of the inner dimension (16, and twice that by every
/// warp), and rows that can and cannot be had in accesses of four values.
#[test]
fn small_maps_hold_by_kernels_of_our_own() {
    use ActivationKind::*;
    let sizes = [
        [16, 32, 32],
        [17, 33, 31],
        [15, 36, 33],
        [128, 784, 40],
        [33, 520, 10],
        [300, 20, 68],
        [1, 1100, 1],
        [70, 64, 260],
    ];
    let kinds = [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh];
    let plain = sizes.iter().flat_map(|&[rows, inputs, outputs]| {
        [false, true].map(|accumulate| Affine { rows, inputs, outputs, accumulate })
    });
    let plain: Vec<_> = plain.collect();
    let mut fused = fused_cases();
    fused.extend(sizes.into_iter().zip(kinds.into_iter().cycle()).enumerate().map(|(number, (size, kind))| {
        let [bias, kept, accumulate] = [0, 1, 2].map(|bit| number >> bit & 1 == 1);
        Fused { size, kind, bias, kept, accumulate }
    }));
    let options = DeviceOptions { tf32: true, small_products: SmallProducts::Always, ..DeviceOptions::default() };
    compare_with::<f32>(options, "small linear in tf32", &plain, TF32);
    compare_with::<bf16>(options, "small linear", &plain, BF16);
    compare_with::<f16>(options, "small linear", &plain, F16);
    compare_with::<f32>(options, "small linear with activation in tf32", &fused, TF32);
    compare_with::<bf16>(options, "small linear with activation", &fused, BF16);
    compare_with::<f16>(options, "small linear with activation", &fused, F16);
}

#[test]
fn a_small_map_takes_a_launch_forward_and_one_backward() {
    let options = DeviceOptions { small_products: SmallProducts::Always, ..DeviceOptions::default() };
    let Some(found) = kernels_with(options, [9, 7, 9], true) else { return };
    assert_eq!(found, ["linear_small_bf16", "linear_small_backward_bf16"]);
    // In f32 as it is, they have no arithmetic for it.
    let device = device_with(options).unwrap();
    device.start_timing();
    let draw = Draw { seed: fresh_seed(), round: |x| x };
    let case = Affine { rows: 9, inputs: 7, outputs: 9, accumulate: false };
    case.run(Bed::new(Cuda::<f32>::new(device.clone())), &draw);
    let names: Vec<_> = device.finish_timing().unwrap().into_iter().map(|time| time.name).collect();
    assert!(names.iter().all(|name| !name.starts_with("linear_small")), "{names:?}");
}

/// What kernels ran, by their names.
fn kernels_of(fusion: Fusion, size: [usize; 3], accumulate: bool) -> Option<Vec<String>> {
    kernels_with(DeviceOptions { fusion, ..DeviceOptions::default() }, size, accumulate)
}

fn kernels_with(options: DeviceOptions, size: [usize; 3], accumulate: bool) -> Option<Vec<String>> {
    let device = device_with(options)?;
    let draw = Draw { seed: fresh_seed(), round: |x| bf16::from_f64(x).to_f64() };
    device.start_timing();
    let case = Fused { size, kind: ActivationKind::GeluTanh, bias: true, kept: true, accumulate };
    case.run(Bed::new(Cuda::<bf16>::new(device.clone())), &draw);
    let times = device.finish_timing().unwrap();
    Some(times.into_iter().map(|time| time.name).filter(|name| !name.starts_with("convert")).collect())
}

#[test]
fn what_the_library_does_along_with_a_product_takes_no_pass_of_our_own() {
    let Some(fused) = kernels_of(Fusion::Always, [9, 16, 24], false) else { return };
    let products = ["linear_forward_activation", "linear_backward_input_slope", "linear_backward_parameters"];
    assert_eq!(fused, products);
    // The library writes sums `=`: what is added takes one small kernel.
    let added = kernels_of(Fusion::Always, [9, 16, 24], true).unwrap();
    assert_eq!(added, [&products[..], &["sum_rows_finish"]].concat());
    // Rows of odd width are no rows that the library keeps: inputs 7 in the backward, outputs 9 in the forward.
    let odd = kernels_of(Fusion::Always, [9, 7, 9], false).unwrap();
    let passes =
        ["linear_forward", "activation_bf16", "linear_backward_input", "activation_backward_bf16", products[2]];
    assert_eq!(odd, passes);
    let never = kernels_of(Fusion::Never, [9, 16, 24], false).unwrap();
    // As few rows as these are one part, whose sums need no second pass.
    assert_eq!(never.last().map(String::as_str), Some("sum_rows_partial_bf16"));
    assert!(never.iter().all(|name| !products.contains(&name.as_str())), "{never:?}");
}
