use super::*;

struct Batch {
    batch: usize,
    channels: usize,
    spatial: usize,
    accumulate: bool,
    /// What follows: a residual sum, ReLU.
    adds: bool,
    relu: bool,
}

impl Case for Batch {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Batch { batch, channels, spatial, accumulate, adds, relu } = *self;
        bed.step.accumulate = accumulate;
        let len = batch * channels * spatial;
        // Channels far from 0: what is left after the mean is taken away is small.
        let shifted = draw.normal(0, len).into_iter().enumerate().map(|(i, x)| x + (i / spatial % channels) as f64);
        // Quarters, by weights of halves and biases of odd thirty-seconds: none near 0, where devices might differ in a sign.
        let quarters = shifted.map(|x| (x * 4.0).round() / 4.0);
        let x = bed.real(&quarters.map(draw.round).collect::<Vec<_>>());
        let (dy, other) = (bed.real(&draw.normal(1, len)), bed.real(&draw.normal(5, len)));
        let epilogue = Epilogue { residual: adds.then_some(other), relu };
        let halves: Vec<f64> =
            draw.normal(2, channels).iter().map(|w| ((w * 2.0).trunc() + w.signum()) / 2.0).collect();
        let odd: Vec<f64> = draw.normal(3, channels).iter().map(|b| ((b * 16.0).floor() * 2.0 + 1.0) / 32.0).collect();
        let (weight, bias) = (bed.parameter(&halves), bed.parameter(&odd));
        let (running_mean, running_var) = (bed.state(&normal(draw.seed, 4, channels)), bed.state(&vec![1.5; channels]));
        let (y, dx) = (bed.empty(len), bed.empty(len));
        let (mean, reciprocal_std) = (bed.empty_statistic(channels), bed.empty_statistic(channels));
        let (epsilon, momentum) = (1e-5, 0.1);
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
            epsilon,
            momentum,
        };
        let ran = bed.run(&forward).unwrap();
        let statistics = [mean, reciprocal_std].map(|act| ran.get_statistic(act)[..channels].to_vec());
        let states = [running_mean, running_var].map(|state| ran.state(state));
        let mut found = vec![ran.get(y)];
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
            epsilon,
        };
        found.push(bed.run(&inference).unwrap().get(y));
        // Statistics by which ReLU's side of a value is beyond doubt.
        let of_channels: Vec<f64> = (0..channels).map(|channel| channel as f64).collect();
        let (exact_mean, exact_std) = (bed.statistic(&of_channels), bed.statistic(&vec![0.5; channels]));
        let by_normalized = Rectified { output: None, gradient: None };
        // Any values do for what ReLU gave.
        let by_output = Rectified { output: Some(other), gradient: Some(bed.empty(len)) };
        let (dweight, dbias) = (first(weight), first(bias));
        let backward = BatchNormBackward {
            x,
            dy,
            rectified: relu.then_some(if adds { by_output } else { by_normalized }),
            weight,
            bias,
            mean: exact_mean,
            reciprocal_std: exact_std,
            dx: Some(dx),
            dweight,
            dbias,
            batch,
            channels,
            spatial,
        };
        let ran = bed.run(&backward).unwrap();
        let alone = bed.run(&BatchNormBackward { dx: None, ..backward.clone() }).unwrap();
        assert_eq!([ran.gradient(weight), ran.gradient(bias)], [alone.gradient(weight), alone.gradient(bias)]);
        if let Some(gradient) = backward.rectified.and_then(|relu| relu.gradient) {
            assert_eq!(ran.get(gradient), alone.get(gradient));
            found.push(ran.get(gradient));
        }
        let gradients = [ran.get(dx), ran.gradient(weight), ran.gradient(bias)];
        if relu && !adds {
            // By the forward's own statistics, the side is the one that the forward took.
            let [mean, reciprocal_std] = [0, 1].map(|i| bed.statistic(&statistics[i]));
            let own = BatchNormBackward { mean, reciprocal_std, ..backward };
            let output = Some(bed.real(&found[0]));
            let sides = [by_normalized, Rectified { output, ..by_normalized }].map(|rectified| {
                let ran = bed.run(&BatchNormBackward { rectified: Some(rectified), ..own.clone() }).unwrap();
                [ran.get(dx), ran.gradient(weight), ran.gradient(bias)]
            });
            assert_eq!(sides[0], sides[1]);
        }
        found.extend(statistics.into_iter().chain(states).chain(gradients));
        found
    }
}

#[test]
fn batch_norm_its_statistics_and_gradients_and_what_follows_it() {
    // Rows of every width of access, one part and several. Large sums in several channels: one alone may come out near 0.
    let sizes = [[5, 3, 1], [33, 7, 2], [3, 4, 4], [9, 5, 12], [6, 3, 49], [4, 2, 64], [17, 4, 500], [3, 4, 2801]];
    let cases: Vec<_> = sizes
        .into_iter()
        .flat_map(|[batch, channels, spatial]| {
            [(false, false, false), (true, false, true), (false, true, false), (true, true, true)]
                .map(|(accumulate, adds, relu)| Batch { batch, channels, spatial, accumulate, adds, relu })
        })
        .collect();
    in_all_types("batch norm", &cases);
}
