//! Convolution.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::{Conv, Conv2dBackward, Conv2dForward, Conv2dGeometry};
use warpstep::real::Real;

use crate::*;

/// y, dx, dweight, dbias.
fn reference<R: Real>(g: &Conv2dGeometry, [x, dy, weight, bias]: [&[f64]; 4]) -> Vec<Vec<f64>> {
    let (x, dy, weight, bias) = (cast::<R>(x), cast::<R>(dy), cast::<R>(weight), cast::<R>(bias));
    let [oh, ow] = g.output().unwrap();
    let ([height, width], [kh, kw]) = (g.input, g.kernel);
    let (group_channels, group_filters) = (g.channels / g.groups, g.filters / g.groups);
    let (mut y, mut dx) = (vec![R::zero(); dy.len()], vec![R::zero(); x.len()]);
    let (mut dweight, mut dbias) = (vec![R::zero(); weight.len()], vec![R::zero(); bias.len()]);
    for (at, &d) in dy.iter().enumerate() {
        let (n, f, oy, ox) = (at / (ow * oh * g.filters), at / (ow * oh) % g.filters, at / ow % oh, at % ow);
        dbias[f] += d;
        for tap in 0..group_channels * kh * kw {
            let channel = f / group_filters * group_channels + tap / (kh * kw);
            let iy = (oy * g.stride[0] + tap / kw % kh).wrapping_sub(g.padding[0]);
            let ix = (ox * g.stride[1] + tap % kw).wrapping_sub(g.padding[1]);
            if iy < height && ix < width {
                let from = ((n * g.channels + channel) * height + iy) * width + ix;
                let w = f * group_channels * kh * kw + tap;
                y[at] += x[from] * weight[w];
                dx[from] += d * weight[w];
                dweight[w] += d * x[from];
            }
        }
        y[at] += bias[f];
    }
    vec![wide(&y), wide(&dx), wide(&dweight), wide(&dbias)]
}

/// A convolution, in a line of a table.
pub fn case(
    batch: usize,
    [channels, filters, groups]: [usize; 3],
    input: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
) -> Conv2dGeometry {
    Conv2dGeometry { batch, channels, input, filters, kernel, stride, padding, groups }
}

#[test]
fn a_convolution_is_its_definition_for_any_number_of_threads() {
    let seed = fresh_seed();
    let cases = [
        case(1, [1, 1, 1], [1, 1], [1, 1], [1, 1], [0, 0]),
        case(19, [3, 5, 1], [7, 9], [3, 3], [1, 1], [1, 1]),
        case(17, [4, 6, 2], [8, 5], [3, 2], [2, 1], [0, 1]),
        case(3, [3, 6, 3], [9, 8], [5, 3], [2, 3], [2, 0]),
        case(33, [8, 3, 1], [6, 7], [1, 1], [1, 1], [0, 0]),
        case(4, [2, 4, 1], [8, 8], [1, 1], [2, 2], [0, 0]),
        case(2, [3, 2, 1], [4, 5], [6, 7], [1, 1], [1, 1]),
        case(1, [2, 3, 1], [2, 1], [3, 3], [2, 2], [3, 3]),
        // As many planes as take Winograd's method (a test of its own says so): sides that tiles divide or not, rows shorter and longer than
        // a block of tiles, more filters than are turned at a time, and so many planes that the weights' gradient is taken by columns.
        case(18, [64, 65, 1], [4, 15], [3, 3], [1, 1], [1, 1]),
        case(3, [32, 33, 1], [13, 19], [3, 3], [1, 1], [0, 2]),
        case(2, [34, 70, 1], [9, 33], [3, 3], [1, 1], [2, 0]),
        case(1, [32, 32, 1], [4, 150], [3, 3], [1, 1], [1, 1]),
        case(2, [92, 91, 1], [14, 14], [3, 3], [1, 1], [1, 1]),
        // So many windows that their columns are written a piece at a time, of every stride.
        case(2, [16, 5, 1], [40, 41], [7, 7], [2, 2], [3, 3]),
        case(2, [20, 3, 1], [45, 50], [4, 5], [2, 3], [1, 2]),
        case(2, [40, 3, 1], [30, 31], [3, 3], [1, 1], [1, 1]),
        case(1, [300, 3, 1], [40, 42], [1, 1], [2, 2], [0, 0]),
        // So many weights, and so few positions, that products are of several samples.
        case(20, [256, 257, 1], [5, 6], [3, 3], [2, 2], [1, 1]),
        case(3, [512, 1100, 1], [3, 2], [1, 1], [1, 1], [0, 0]),
        // As wide as the input, a step at a time: taps beyond it on every side, and all of it.
        case(2, [2, 3, 1], [1, 6], [5, 3], [1, 1], [2, 1]),
        case(2, [2, 3, 1], [6, 2], [3, 7], [1, 1], [3, 3]),
        case(2, [4, 4, 2], [5, 7], [2, 5], [1, 1], [0, 2]),
    ];
    for geometry in cases {
        let Conv2dGeometry { batch, channels, filters, input: [height, width], .. } = geometry;
        let [oh, ow] = geometry.output().unwrap();
        let (inputs, outputs) = (batch * channels * height * width, batch * filters * oh * ow);
        let (x, dy) = (normal(seed, 0, inputs), normal(seed, 1, outputs));
        let (weight, bias) = (normal(seed, 2, geometry.weights()), normal(seed, 3, filters));
        let what = format!("{geometry:?}");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&x), bed.real(&dy));
            let (weight, bias) = (bed.parameter(&weight), bed.parameter(&bias));
            let (y, dx) = (bed.empty(outputs), bed.empty(inputs));
            let [ahead, back] =
                [false, true].map(|backward| bed.empty(Cpu::<f32>::conv2d_workspace(&geometry, backward)));
            let forward = Conv2dForward { x, weight, bias: Some(bias), y, workspace: ahead, geometry };
            let forward = bed.run(&forward).unwrap();
            let (dweight, dbias) = (first(weight), Some(first(bias)));
            let backward = Conv2dBackward { x, dy, weight, dx: Some(dx), workspace: back, dweight, dbias, geometry };
            let backward = bed.run(&backward).unwrap();
            vec![forward.get(y), backward.get(dx), backward.gradient(weight), backward.gradient(bias)]
        });
        let given = [&x[..], &dy[..], &weight[..], &bias[..]];
        judge(&what, &found, &reference::<f32>(&geometry, given), &reference::<f64>(&geometry, given));
    }
}
