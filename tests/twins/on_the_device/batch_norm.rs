use super::*;

struct Batch {
    batch: usize,
    channels: usize,
    spatial: usize,
    accumulate: bool,
}

impl Case for Batch {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Batch { batch, channels, spatial, accumulate } = *self;
        bed.step.accumulate = accumulate;
        let len = batch * channels * spatial;
        // Channels far from 0: what is left after the mean is taken away is small.
        let shifted = draw.normal(0, len).into_iter().enumerate().map(|(i, x)| x + (i / spatial % channels) as f64);
        let x = bed.real(&shifted.map(draw.round).collect::<Vec<_>>());
        let dy = bed.real(&draw.normal(1, len));
        let (weight, bias) = (bed.parameter(&draw.normal(2, channels)), bed.parameter(&draw.normal(3, channels)));
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
        let inference =
            BatchNormInference { x, weight, bias, running_mean, running_var, y, batch, channels, spatial, epsilon };
        found.push(bed.run(&inference).unwrap().get(y));
        let [mean, reciprocal_std] = [0, 1].map(|i| bed.statistic(&statistics[i]));
        found.extend(statistics.into_iter().chain(states));
        let (dweight, dbias) = (first(weight), first(bias));
        let backward = BatchNormBackward {
            x,
            dy,
            weight,
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
        let alone = bed.run(&BatchNormBackward { dx: None, ..backward }).unwrap();
        assert_eq!([ran.gradient(weight), ran.gradient(bias)], [alone.gradient(weight), alone.gradient(bias)]);
        found.extend([ran.get(dx), ran.gradient(weight), ran.gradient(bias)]);
        found
    }
}

#[test]
fn batch_norm_its_statistics_and_gradients() {
    // Rows of every width of access, one part and several. Large sums in several channels: one alone may come out near 0.
    let sizes = [[5, 3, 1], [33, 7, 2], [3, 4, 4], [9, 5, 12], [6, 3, 49], [4, 2, 64], [17, 4, 500], [3, 4, 2801]];
    let cases: Vec<_> = sizes
        .into_iter()
        .flat_map(|[batch, channels, spatial]| {
            [false, true].map(|accumulate| Batch { batch, channels, spatial, accumulate })
        })
        .collect();
    in_all_types("batch norm", &cases);
}
