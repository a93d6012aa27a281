//! Losses and their gradients.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::*;
use warpstep::real::Real;

use crate::*;

const IGNORE: i32 = -100;

/// Metrics and gradient of the cross-entropy.
fn cross_entropy<R: Real>(logits: &[f64], targets: &[i32], classes: usize, smoothing: f64) -> Vec<Vec<f64>> {
    let logits = cast::<R>(logits);
    let counted = targets.iter().filter(|&&t| t != IGNORE).count();
    let (mut loss, mut right, mut gradient) = (0.0, 0.0, vec![R::zero(); logits.len()]);
    for (row, &target) in targets.iter().enumerate().filter(|(_, t)| **t != IGNORE) {
        let x = &logits[row * classes..(row + 1) * classes];
        let max = x.iter().copied().fold(R::neg_infinity(), R::max);
        let log_sum = x.iter().map(|&x| (x - max).exp()).sum::<R>().ln() + max;
        for (class, &x) in x.iter().enumerate() {
            let own = if class == target as usize { 1.0 - smoothing } else { 0.0 };
            let q = R::from_f64(own + smoothing / classes as f64);
            loss += (-q * (x - log_sum)).f64();
            gradient[row * classes + class] = ((x - log_sum).exp() - q) / R::from_f64(counted as f64);
        }
        let best = x.iter().position(|&x| x == max);
        right += f64::from(u8::from(best == Some(target as usize)));
    }
    vec![vec![loss / counted.max(1) as f64, loss, counted as f64, right], wide(&gradient)]
}

#[test]
fn cross_entropy_is_what_pytorch_s_documentation_says() {
    let seed = fresh_seed();
    for (rows, classes) in [(1, 1), (1, 2), (3, 10), (17, 16), (70, 17), (40, 1003)] {
        for (smoothing, ignored) in [(0.0, false), (0.1, true), (0.0, true)] {
            let logits: Vec<f64> =
                normal(seed, 0, rows * classes).iter().map(|x| f64::from((4.0 * x) as f32)).collect();
            let mut targets = whole(seed, 1, rows, classes as u64);
            if ignored {
                targets.iter_mut().step_by(3).for_each(|t| *t = IGNORE);
            }
            let what = format!("cross-entropy [{rows}, {classes}], smoothing {smoothing}, ignored {ignored}");
            let found = same_bits(&what, || {
                let mut bed = Bed::<Cpu<f32>>::cpu();
                let (at, targets) = (bed.real(&logits), bed.whole(&targets));
                let (metrics, gradient) = (bed.empty(METRICS), bed.empty(rows * classes));
                let op = CrossEntropy {
                    logits: at,
                    targets,
                    metrics,
                    dlogits: Some(gradient),
                    rows,
                    classes,
                    label_smoothing: smoothing,
                    ignore_index: IGNORE,
                };
                let ran = bed.run(&op).unwrap();
                let alone = bed.run(&CrossEntropy { dlogits: None, ..op }).unwrap();
                for (with, without) in ran.get(metrics).iter().zip(alone.get(metrics)) {
                    assert!((with - without).abs() <= 1e-6 * with.abs(), "{what}: {with} and {without}");
                }
                vec![ran.get(metrics), ran.get(gradient)]
            });
            let reference = cross_entropy::<f64>(&logits, &targets, classes, smoothing);
            judge(&what, &found, &cross_entropy::<f32>(&logits, &targets, classes, smoothing), &reference);
            assert_eq!(found[0][2..], reference[0][2..], "{what}: counts");
        }
    }
}

#[test]
fn targets_out_of_range_are_an_error_that_names_them() {
    for wrong in [3, -1] {
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (logits, targets, metrics) = (bed.real(&[0.0; 6]), bed.whole(&[2, wrong]), bed.empty(METRICS));
        let op = CrossEntropy {
            logits,
            targets,
            metrics,
            dlogits: None,
            rows: 2,
            classes: 3,
            label_smoothing: 0.0,
            ignore_index: IGNORE,
        };
        let Err(error) = bed.run(&op) else { panic!("target {wrong} of 3 is refused") };
        let expected = "cross-entropy: expected targets from 0 to 2 (or -100 to leave one out)";
        assert_eq!(error.to_string(), format!("{expected}, found {wrong} in row 1"));
    }
}

#[test]
fn mean_squared_error_is_the_mean_of_squares() {
    let seed = fresh_seed();
    for len in [1, 15, 40_001] {
        let (x, t) = (normal(seed, 0, len), normal(seed, 1, len));
        let found = same_bits("mean squared error", || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (prediction, target) = (bed.real(&x), bed.real(&t));
            let (metrics, d) = (bed.empty(METRICS), bed.empty(len));
            let ran = bed.run(&MeanSquaredError { prediction, target, metrics, dprediction: Some(d), len }).unwrap();
            vec![ran.get(metrics), ran.get(d)]
        });
        fn reference<R: Real>(x: &[f64], t: &[f64]) -> Vec<Vec<f64>> {
            let n = R::from_f64(x.len() as f64);
            let d: Vec<R> = cast::<R>(x).into_iter().zip(cast::<R>(t)).map(|(x, t)| x - t).collect();
            let sum: f64 = d.iter().map(|&d| (d * d).f64()).sum();
            let gradient: Vec<R> = d.iter().map(|&d| (d + d) / n).collect();
            vec![vec![sum / x.len() as f64, sum, x.len() as f64, 0.0], wide(&gradient)]
        }
        judge("mean squared error", &found, &reference::<f32>(&x, &t), &reference::<f64>(&x, &t));
    }
}

#[test]
fn binary_cross_entropy_holds_for_logits_of_any_size() {
    let seed = fresh_seed();
    for len in [1, 15, 20_001] {
        let mut x: Vec<f64> = normal(seed, 0, len).iter().map(|x| f64::from((3.0 * x) as f32)).collect();
        for (x, extreme) in x.iter_mut().skip(1).zip([-1e4, 1e4, -100.0, 100.0, 0.0]) {
            *x = extreme;
        }
        let t: Vec<f64> = whole(seed, 1, len, 5).iter().map(|&t| f64::from(t) / 4.0).collect();
        let found = same_bits("binary cross-entropy", || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (logits, target) = (bed.real(&x), bed.real(&t));
            let (metrics, d) = (bed.empty(METRICS), bed.empty(len));
            let ran = bed.run(&BinaryCrossEntropy { logits, target, metrics, dlogits: Some(d), len }).unwrap();
            vec![ran.get(metrics), ran.get(d)]
        });
        // log(1 + e^x) = x + log(1 + e^-x): in f64 both are exact enough for these sizes.
        let softplus = |x: f64| if x > 0.0 { x + (-x).exp().ln_1p() } else { x.exp().ln_1p() };
        let loss: f64 = x.iter().zip(&t).map(|(&x, &t)| softplus(x) - x * t).sum();
        let right = x.iter().zip(&t).filter(|(x, t)| (**x > 0.0) == (**t > 0.5)).count();
        let n = len as f64;
        let gradient = x.iter().zip(&t).map(|(&x, &t)| (1.0 / (1.0 + (-x).exp()) - t) / n).collect();
        let reference = vec![vec![loss / n, loss, n, right as f64], gradient];
        let plain: Vec<Vec<f64>> = reference
            .iter()
            .map(|r: &Vec<f64>| r.iter().map(|&v| f64::from(v as f32) * (1.0 + 1e-7)).collect())
            .collect();
        judge("binary cross-entropy", &found, &plain, &reference);
    }
}
