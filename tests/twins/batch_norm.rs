//! Batch normalization.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::{BatchNormBackward, BatchNormForward, BatchNormInference, Epilogue, Rectified};
use warpstep::real::Real;

use crate::*;

const EPSILON: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

/// What goes in: x, dy, what is added, weight, bias, running mean, running variance; then a value above 0 for each dy that passes
/// through ReLU.
type Given<'a> = [&'a [f64]; 8];

/// y, mean, 1 / std, running mean, running variance, y by these, dx, dweight, dbias.
fn reference<R: Real>(given: Given<'_>, [batch, channels, spatial]: [usize; 3], relu: bool) -> Vec<Vec<f64>> {
    let [x, dy, other, weight, bias, running_mean, running_var, passes] = given.map(|values| cast::<R>(values));
    let (epsilon, momentum) = (R::from_f64(EPSILON), R::from_f64(MOMENTUM));
    let count = R::from_f64((batch * spatial) as f64);
    let end = |value: R| if relu && value < R::zero() { R::zero() } else { value };
    let dy: Vec<R> =
        dy.iter().zip(passes).map(|(&dy, passes)| if passes > R::zero() { dy } else { R::zero() }).collect();
    let mut found = vec![vec![R::zero(); x.len()]];
    found.extend(vec![vec![R::zero(); channels]; 4]);
    found.extend(vec![vec![R::zero(); x.len()]; 2]);
    found.extend(vec![vec![R::zero(); channels]; 2]);
    for c in 0..channels {
        let of: Vec<usize> =
            (0..batch * spatial).map(|i| (i / spatial * channels + c) * spatial + i % spatial).collect();
        let mean = of.iter().map(|&i| x[i]).fold(R::zero(), |a, b| a + b) / count;
        let squares = of.iter().map(|&i| (x[i] - mean) * (x[i] - mean)).fold(R::zero(), |a, b| a + b);
        let std = R::one() / (squares / count + epsilon).sqrt();
        let keep = R::one() - momentum;
        let moved = [
            running_mean[c] * keep + momentum * mean,
            running_var[c] * keep + momentum * (squares / (count - R::one())),
        ];
        let level = of.iter().map(|&i| dy[i]).fold(R::zero(), |a, b| a + b);
        let slope = of.iter().map(|&i| dy[i] * ((x[i] - mean) * std)).fold(R::zero(), |a, b| a + b);
        for &i in &of {
            let normal = (x[i] - mean) * std;
            let by_running = (x[i] - running_mean[c]) / (running_var[c] + epsilon).sqrt();
            found[0][i] = end(normal * weight[c] + bias[c] + other[i]);
            found[5][i] = end(by_running * weight[c] + bias[c] + other[i]);
            found[6][i] = weight[c] * std * (dy[i] - level / count - normal * (slope / count));
        }
        let alone = [mean, std, moved[0], moved[1], slope, level];
        [1, 2, 3, 4, 7, 8].into_iter().zip(alone).for_each(|(at, value)| found[at][c] = value);
    }
    found.iter().map(|values| wide(values)).collect()
}

#[test]
fn batch_norm_is_what_the_paper_says_for_any_number_of_threads_whatever_follows_it() {
    let seed = fresh_seed();
    let sizes = [[3, 1, 1], [5, 3, 1], [9, 130, 1], [33, 7, 2], [9, 5, 49], [17, 2, 1000]];
    for (size, adds, relu) in sizes
        .into_iter()
        .flat_map(|size| [(size, false, false), (size, false, true), (size, true, false), (size, true, true)])
    {
        let [batch, channels, spatial] = size;
        let len = batch * channels * spatial;
        let (x, dy, other) = (normal(seed, 0, len), normal(seed, 1, len), normal(seed, 5, len));
        let (weight, bias) = (normal(seed, 2, channels), normal(seed, 3, channels));
        let (level, spread) = (normal(seed, 4, channels), vec![1.5; channels]);
        let what = format!("batch norm {size:?}, a sum: {adds}, ReLU: {relu}");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (x, dy) = (bed.real(&x), bed.real(&dy));
            let epilogue = Epilogue { residual: adds.then(|| bed.real(&other)), relu };
            let (weight, bias) = (bed.parameter(&weight), bed.parameter(&bias));
            let (running_mean, running_var) = (bed.state(&level), bed.state(&spread));
            let (y, dx, behind) = (bed.empty(len), bed.empty(len), bed.empty(len));
            let (mean, reciprocal_std) = (bed.empty_statistic(channels), bed.empty_statistic(channels));
            let forward = BatchNormForward {
                x,
                weight,
                bias,
                running_mean,
                running_var,
                y,
                epilogue,
                mean,
                reciprocal_std,
                batch,
                channels,
                spatial,
                epsilon: EPSILON,
                momentum: MOMENTUM,
            };
            let ran = bed.run(&forward).unwrap();
            let mut found = vec![ran.get(y), ran.get_statistic(mean), ran.get_statistic(reciprocal_std)];
            found.extend([ran.state(running_mean), ran.state(running_var)]);
            let inference = BatchNormInference {
                x,
                weight,
                bias,
                running_mean,
                running_var,
                y,
                epilogue,
                batch,
                channels,
                spatial,
                epsilon: EPSILON,
            };
            found.push(bed.run(&inference).unwrap().get(y));
            let (mean, reciprocal_std) = (bed.statistic(&found[1]), bed.statistic(&found[2]));
            let output = bed.real(&found[0]);
            let (dweight, dbias) = (first(weight), first(bias));
            let by_output = Rectified { output: Some(output), gradient: None };
            let backward = BatchNormBackward {
                x,
                dy,
                rectified: relu.then_some(by_output),
                weight,
                bias,
                mean,
                reciprocal_std,
                dx: Some(dx),
                dweight,
                dbias,
                batch,
                channels,
                spatial,
            };
            let ran = bed.run(&backward).unwrap();
            found.extend([ran.get(dx), ran.gradient(weight), ran.gradient(bias)]);
            if relu {
                // The gradient behind ReLU is left where others need it; and of what was not added to, nothing is read.
                let mut others = vec![Rectified { gradient: Some(behind), ..by_output }];
                others.extend((!adds).then_some(Rectified { output: None, gradient: None }));
                others.extend((!adds).then_some(Rectified { output: None, gradient: Some(behind) }));
                for rectified in others {
                    let ran = bed.run(&BatchNormBackward { rectified: Some(rectified), ..backward.clone() }).unwrap();
                    let again = [ran.get(dx), ran.gradient(weight), ran.gradient(bias)];
                    assert!(again.iter().eq(&found[6..]), "{what}: other bits by {rectified:?}");
                    if rectified.gradient.is_some() {
                        let masked = ran.get(dy).into_iter().zip(&found[0]);
                        let masked = masked.map(|(dy, &y)| if y > 0.0 { dy } else { 0.0 });
                        assert!(masked.eq(ran.get(behind)), "{what}: the gradient behind ReLU");
                    }
                }
            }
            found
        });
        let zeros = vec![0.0; len];
        let other = if adds { &other[..] } else { &zeros[..] };
        let ones = vec![1.0; len];
        let passes = if relu { &found[0][..] } else { &ones[..] };
        let given = [&x[..], &dy[..], other, &weight[..], &bias[..], &level[..], &spread[..], passes];
        judge(&what, &found, &reference::<f32>(given, size, relu), &reference::<f64>(given, size, relu));
    }
}
