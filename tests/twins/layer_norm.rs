//! Layer normalization and RMS normalization.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::*;
use warpstep::real::Real;

use crate::*;

const EPSILON: f64 = 1e-5;

struct Case {
    rows: usize,
    width: usize,
    x: Vec<f64>,
    dy: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

fn cases(seed: u64) -> impl Iterator<Item = Case> {
    let sizes = [(1, 1), (1, 7), (3, 16), (65, 17), (64, 64), (200, 130)];
    sizes.into_iter().map(move |(rows, width)| Case {
        rows,
        width,
        x: normal(seed, 0, rows * width).iter().map(|v| f64::from((2.0 * v + 0.5) as f32)).collect(),
        dy: normal(seed, 1, rows * width),
        weight: normal(seed, 2, width),
        bias: normal(seed, 3, width),
    })
}

/// y, dx, dweight, dbias, by the formulas; without `mean` for RMS norm.
fn reference<R: Real>(case: &Case, with_mean: bool) -> Vec<Vec<f64>> {
    let Case { rows, width, .. } = *case;
    let (x, dy) = (cast::<R>(&case.x), cast::<R>(&case.dy));
    let (weight, bias) = (cast::<R>(&case.weight), cast::<R>(&case.bias));
    let n = R::from_f64(width as f64);
    let (mut y, mut dx) = (vec![R::zero(); rows * width], vec![R::zero(); rows * width]);
    let (mut dweight, mut dbias) = (vec![R::zero(); width], vec![R::zero(); width]);
    for row in 0..rows {
        let at = row * width..(row + 1) * width;
        let (x, dy) = (&x[at.clone()], &dy[at.clone()]);
        let mean = if with_mean { x.iter().copied().sum::<R>() / n } else { R::zero() };
        let variance = x.iter().map(|&x| (x - mean) * (x - mean)).sum::<R>() / n;
        let s = R::one() / (variance + R::from_f64(EPSILON)).sqrt();
        let normal: Vec<R> = x.iter().map(|&x| (x - mean) * s).collect();
        let scaled: Vec<R> = dy.iter().zip(&weight).map(|(&d, &w)| d * w).collect();
        let a = if with_mean { scaled.iter().copied().sum::<R>() / n } else { R::zero() };
        let b = scaled.iter().zip(&normal).map(|(&d, &v)| d * v).sum::<R>() / n;
        for i in 0..width {
            y[at.start + i] = normal[i] * weight[i] + if with_mean { bias[i] } else { R::zero() };
            dx[at.start + i] = s * (scaled[i] - a - normal[i] * b);
            dweight[i] += dy[i] * normal[i];
            dbias[i] += dy[i];
        }
    }
    vec![wide(&y), wide(&dx), wide(&dweight), wide(&dbias)]
}

#[test]
fn layer_norm_is_what_the_paper_says() {
    for case in cases(fresh_seed()) {
        let Case { rows, width, .. } = case;
        let what = format!("layer norm [{rows}, {width}]");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&case.x), bed.real(&case.dy));
            let (weight, bias) = (bed.parameter(&case.weight), bed.parameter(&case.bias));
            let (y, mean, reciprocal_std) = (bed.empty(rows * width), bed.empty(rows), bed.empty(rows));
            let epsilon = EPSILON;
            let bias_of = Some(bias);
            let forward =
                LayerNormForward { x, sum: None, weight, bias: bias_of, y, mean, reciprocal_std, rows, width, epsilon };
            let forward = bed.run(&forward).unwrap();
            let (mean, reciprocal_std) = (bed.real(&forward.get(mean)), bed.real(&forward.get(reciprocal_std)));
            let input_gradient = bed.empty(rows * width);
            let dx = Some(input_gradient);
            let (dweight, dbias) = (first(weight), Some(first(bias)));
            let residual = None;
            let backward =
                LayerNormBackward { x, dy, weight, mean, reciprocal_std, residual, dx, dweight, dbias, rows, width };
            let backward = bed.run(&backward).unwrap();
            vec![forward.get(y), backward.get(input_gradient), backward.gradient(weight), backward.gradient(bias)]
        });
        judge(&what, &found, &reference::<f32>(&case, true), &reference::<f64>(&case, true));
    }
}

#[test]
fn rms_norm_is_what_the_paper_says() {
    for case in cases(fresh_seed()) {
        let Case { rows, width, .. } = case;
        let what = format!("rms norm [{rows}, {width}]");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&case.x), bed.real(&case.dy));
            let weight = bed.parameter(&case.weight);
            let (y, reciprocal_rms) = (bed.empty(rows * width), bed.empty(rows));
            let epsilon = EPSILON;
            let forward =
                bed.run(&RmsNormForward { x, sum: None, weight, y, reciprocal_rms, rows, width, epsilon }).unwrap();
            let reciprocal_rms = bed.real(&forward.get(reciprocal_rms));
            let input_gradient = bed.empty(rows * width);
            let dx = Some(input_gradient);
            let dweight = first(weight);
            let backward = RmsNormBackward { x, dy, weight, reciprocal_rms, residual: None, dx, dweight, rows, width };
            let backward = bed.run(&backward).unwrap();
            vec![forward.get(y), backward.get(input_gradient), backward.gradient(weight)]
        });
        let cut = |mut reference: Vec<Vec<f64>>| {
            reference.truncate(3);
            reference
        };
        judge(&what, &found, &cut(reference::<f32>(&case, false)), &cut(reference::<f64>(&case, false)));
    }
}

#[test]
fn a_later_write_of_a_gradient_adds() {
    let mut bed = Bed::<Cpu<f32>>::cpu();
    let (x, dy) = (bed.real(&[1.0, -1.0]), bed.real(&[0.5, 0.25]));
    let weight = bed.parameter(&[1.0, 1.0]);
    let (mean, reciprocal_std) = (bed.real(&[0.0]), bed.real(&[1.0]));
    let gradient = |bed: &Bed<Cpu<f32>>, first| {
        let dweight = Grad { param: weight, first };
        let op = LayerNormBackward {
            x,
            dy,
            weight,
            mean,
            reciprocal_std,
            residual: None,
            dx: None,
            dweight,
            dbias: None,
            rows: 1,
            width: 2,
        };
        bed.run(&op).unwrap().gradient(weight)
    };
    assert_eq!(gradient(&bed, true), [0.5, -0.25]);
    assert_eq!(gradient(&bed, false), [1.5, 0.75]);
    bed.step.accumulate = true;
    assert_eq!(gradient(&bed, true), [1.5, 0.75]);
}

#[test]
fn a_norm_that_takes_a_sum_has_the_bits_of_the_sum_and_the_norm() {
    let seed = fresh_seed();
    let draw = |tensor, len| normal(seed, tensor, len);
    for (rows, width) in [(1, 1), (3, 17), (70, 300)] {
        let (len, epsilon) = (rows * width, EPSILON);
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (a, b) = (bed.real(&draw(0, len)), bed.real(&draw(1, len)));
        let weight = bed.parameter(&draw(2, width));
        let [total, y, mean, scale] = [len, len, rows, rows].map(|len| bed.empty(len));
        let added = bed.run(&Add { a, b, y: total, len }).unwrap().get(total);
        let alone = bed.real(&added);
        let sum = Some(RowSum { other: b, sum: total });
        let layer_norm = |x, sum| {
            let (reciprocal_std, bias) = (scale, None);
            let op = LayerNormForward { x, sum, weight, bias, y, mean, reciprocal_std, rows, width, epsilon };
            bed.run(&op).unwrap()
        };
        let rms_norm = |x, sum| {
            let reciprocal_rms = scale;
            bed.run(&RmsNormForward { x, sum, weight, y, reciprocal_rms, rows, width, epsilon }).unwrap()
        };
        for [apart, together] in
            [[layer_norm(alone, None), layer_norm(a, sum)], [rms_norm(alone, None), rms_norm(a, sum)]]
        {
            assert_eq!(together.get(total), added);
            assert_eq!(together.get(y), apart.get(y));
            assert_eq!(together.get(scale), apart.get(scale));
        }
    }
}

#[test]
fn a_norm_s_backward_that_adds_has_the_bits_of_the_backward_and_the_sum() {
    let seed = fresh_seed();
    let draw = |tensor, len| normal(seed, tensor, len);
    for (rows, width) in [(1, 1), (3, 17), (70, 300)] {
        let len = rows * width;
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (x, dy, past) = (bed.real(&draw(0, len)), bed.real(&draw(1, len)), bed.real(&draw(2, len)));
        let weight = bed.parameter(&draw(3, width));
        let (mean, scale) = (bed.real(&draw(4, rows)), bed.real(&draw(5, rows)));
        let [gradient, total] = [len, len].map(|len| bed.empty(len));
        let (dx, dweight) = (Some(gradient), first(weight));
        let layer_norm = |residual| {
            let (reciprocal_std, dbias) = (scale, None);
            let op =
                LayerNormBackward { x, dy, weight, mean, reciprocal_std, residual, dx, dweight, dbias, rows, width };
            bed.run(&op).unwrap()
        };
        let rms_norm = |residual| {
            let reciprocal_rms = scale;
            bed.run(&RmsNormBackward { x, dy, weight, reciprocal_rms, residual, dx, dweight, rows, width }).unwrap()
        };
        let pairs = [[layer_norm(None), layer_norm(Some(past))], [rms_norm(None), rms_norm(Some(past))]];
        for [apart, together] in pairs {
            let alone = bed.real(&apart.get(gradient));
            let added = bed.run(&Add { a: alone, b: past, y: total, len }).unwrap();
            assert_eq!(together.get(gradient), added.get(total));
            assert_eq!(together.gradient(weight), apart.gradient(weight));
        }
    }
}
