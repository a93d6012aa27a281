//! Pooling.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::{AveragePoolBackward, AveragePoolForward, MaxPoolBackward, MaxPoolForward, PoolGeometry};
use warpstep::real::Real;

use crate::*;

/// The largest values, where they stood, their gradient, the means, their gradient.
fn reference<R: Real>(g: &PoolGeometry, [x, dy]: [&[f64]; 2]) -> Vec<Vec<f64>> {
    let (x, dy) = (cast::<R>(x), cast::<R>(dy));
    let ([oh, ow], [height, width]) = (g.output().unwrap(), g.input);
    let scale = R::one() / R::from_f64((g.kernel[0] * g.kernel[1]) as f64);
    let (mut largest, mut means) = (vec![R::zero(); dy.len()], vec![R::zero(); dy.len()]);
    let mut positions = vec![0.0; dy.len()];
    let (mut from_largest, mut from_means) = (vec![R::zero(); x.len()], vec![R::zero(); x.len()]);
    for at in 0..dy.len() {
        let (plane, oy, ox) = (at / (oh * ow), at / ow % oh, at % ow);
        let inside: Vec<usize> = (0..g.kernel[0] * g.kernel[1])
            .filter_map(|tap| {
                let iy = (oy * g.stride[0] + tap / g.kernel[1]).wrapping_sub(g.padding[0]);
                let ix = (ox * g.stride[1] + tap % g.kernel[1]).wrapping_sub(g.padding[1]);
                (iy < height && ix < width).then(|| iy * width + ix)
            })
            .collect();
        let start = plane * height * width;
        let best = inside.iter().copied().reduce(|a, b| if x[start + b] > x[start + a] { b } else { a }).unwrap();
        (largest[at], positions[at]) = (x[start + best], best as f64);
        from_largest[start + best] += dy[at];
        for i in inside {
            means[at] += x[start + i] * scale;
            from_means[start + i] += dy[at] * scale;
        }
    }
    vec![wide(&largest), positions, wide(&from_largest), wide(&means), wide(&from_means)]
}

#[test]
fn pooling_is_its_definition_for_any_number_of_threads() {
    let seed = fresh_seed();
    let case = |planes, input, kernel, stride, padding| PoolGeometry { planes, input, kernel, stride, padding };
    let cases = [
        case(1, [1, 1], [1, 1], [1, 1], [0, 0]),
        case(70, [7, 9], [2, 2], [2, 2], [0, 0]),
        case(33, [7, 5], [3, 3], [2, 2], [1, 1]),
        case(3, [6, 11], [3, 2], [1, 1], [1, 1]),
        case(2, [8, 8], [1, 2], [3, 3], [0, 0]),
        case(17, [7, 7], [7, 7], [1, 1], [0, 0]),
        // Outputs a row on either side of 8, which the CPU works on side by side where nothing is padded.
        case(18, [28, 28], [2, 2], [2, 2], [0, 0]),
        case(5, [4, 16], [2, 2], [2, 2], [0, 0]),
        case(5, [4, 15], [3, 2], [1, 2], [0, 0]),
        case(4, [5, 13], [2, 3], [2, 1], [0, 0]),
        case(4, [9, 40], [3, 4], [2, 4], [0, 0]),
    ];
    for geometry in cases {
        let [oh, ow] = geometry.output().unwrap();
        let (inputs, outputs) = (geometry.planes * geometry.input[0] * geometry.input[1], geometry.planes * oh * ow);
        // Few different values: many windows hold their largest one more than once.
        let x: Vec<f64> = whole(seed, 0, inputs, 7).iter().map(|&x| f64::from(x) / 8.0).collect();
        let dy = normal(seed, 1, outputs);
        let what = format!("{geometry:?}");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&x), bed.real(&dy));
            let (y, dx, positions) = (bed.empty(outputs), bed.empty(inputs), bed.whole(&vec![-1; outputs]));
            let ran = bed.run(&MaxPoolForward { x, y, positions, geometry }).unwrap();
            let at = ran.get_whole(positions);
            let mut found = vec![ran.get(y), at.iter().map(|&at| f64::from(at)).collect()];
            let positions = bed.whole(&at);
            found.push(bed.run(&MaxPoolBackward { dy, positions, dx, geometry }).unwrap().get(dx));
            found.push(bed.run(&AveragePoolForward { x, y, geometry }).unwrap().get(y));
            found.push(bed.run(&AveragePoolBackward { dy, dx, geometry }).unwrap().get(dx));
            found
        });
        let given = [&x[..], &dy[..]];
        let (plain, exact) = (reference::<f32>(&geometry, given), reference::<f64>(&geometry, given));
        assert_eq!(found[..2], exact[..2], "{what}");
        judge(&what, &found, &plain, &exact);
    }
}

#[test]
fn the_first_of_equal_values_and_the_first_that_is_no_number_is_the_largest() {
    let geometry = PoolGeometry { planes: 1, input: [2, 20], kernel: [2, 2], stride: [2, 2], padding: [0, 0] };
    // Windows, their upper and their lower row: ties in every order, one and two that are no numbers, infinities, zeros of both signs.
    let (none, least) = (f64::NAN, f64::NEG_INFINITY);
    let windows = [
        [[1., 1.], [1., 1.]],
        [[0., 2.], [2., 0.]],
        [[3., 1.], [1., 3.]],
        [[none, 1.], [2., 3.]],
        [[1., none], [none, 2.]],
        [[none, none], [7., 8.]],
        [[5., 6.], [none, 7.]],
        [[least, least], [least, least]],
        [[-0., 0.], [0., -0.]],
        [[4., 4.], [5., 5.]],
    ];
    let x: Vec<f64> =
        [0, 1].into_iter().flat_map(|row| windows.into_iter().flat_map(move |window| window[row])).collect();
    let largest = [1., 2., 3., none, none, none, none, least, -0., 5.];
    let places = [0, 3, 4, 6, 9, 10, 32, 14, 16, 38];
    let found = same_bits("pooling of what is no number", || {
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (x, y, positions) = (bed.real(&x), bed.empty(largest.len()), bed.whole(&[-1; 10]));
        let ran = bed.run(&MaxPoolForward { x, y, positions, geometry }).unwrap();
        assert_eq!(ran.get_whole(positions), places);
        vec![ran.get(y).iter().map(|&y| if y.is_nan() { -99.0 } else { y }).collect::<Vec<f64>>()]
    });
    assert_eq!(found[0], largest.map(|y| if y.is_nan() { -99.0 } else { y }));
}
