use super::*;

const EPSILON: f64 = 1e-5;

/// A normalization of rows, with or without mean and bias, a sum before it and a residual's gradient after it.
#[derive(Clone, Copy)]
struct Rows {
    size: [usize; 2],
    with_mean: bool,
    with_sum: bool,
    accumulate: bool,
}

impl Rows {
    /// What a normalization leaves: y, the sum where there is one, the statistics.
    fn forward<B: Backend>(&self, bed: &mut Bed<B>, x: Act, weight: Param, bias: Option<Param>) -> Vec<Vec<f64>> {
        let [rows, width] = self.size;
        let (y, total) = (bed.empty(rows * width), bed.empty(rows * width));
        let other = bed.real(&vec![0.75; rows * width]);
        let sum = self.with_sum.then_some(RowSum { other, sum: total });
        let (mean, scale) = (bed.empty_statistic(rows), bed.empty_statistic(rows));
        let (reciprocal_std, reciprocal_rms, epsilon) = (scale, scale, EPSILON);
        let ran = if self.with_mean {
            bed.run(&LayerNormForward { x, sum, weight, bias, y, mean, reciprocal_std, rows, width, epsilon })
        } else {
            bed.run(&RmsNormForward { x, sum, weight, y, reciprocal_rms, rows, width, epsilon })
        };
        let ran = ran.unwrap();
        let mut found = vec![ran.get(y), ran.get_statistic(scale)];
        found.extend(self.with_mean.then(|| ran.get_statistic(mean)));
        found.extend(self.with_sum.then(|| ran.get(total)));
        found
    }

    /// What its backward leaves: the gradients of the weight, of the bias, and of x.
    fn backward<B: Backend>(
        &self,
        bed: &mut Bed<B>,
        x: &[f64],
        draw: &Draw,
        [weight, bias]: [Param; 2],
    ) -> Vec<Vec<f64>> {
        let [rows, width] = self.size;
        let (mean, scale): (Vec<f64>, Vec<f64>) = x.chunks(width).map(|row| self.statistics(row)).unzip();
        let (mean, scale) = (bed.statistic(&mean), bed.statistic(&scale));
        let (dy, past) = (bed.real(&draw.normal(4, rows * width)), bed.real(&draw.normal(5, rows * width)));
        let (x, gradient) = (bed.real(x), bed.empty(rows * width));
        let residual = self.with_sum.then_some(past);
        // A single value's gradient through a root mean square is nothing but rounding errors.
        let dx = (self.with_mean || width > 1).then_some(gradient);
        let (dweight, dbias) = (first(weight), self.with_sum.then_some(first(bias)));
        let (reciprocal_std, reciprocal_rms) = (scale, scale);
        let ran = if self.with_mean {
            bed.run(&LayerNormBackward {
                x,
                dy,
                weight,
                mean,
                reciprocal_std,
                residual,
                dx,
                dweight,
                dbias,
                rows,
                width,
            })
        } else {
            bed.run(&RmsNormBackward { x, dy, weight, reciprocal_rms, residual, dx, dweight, rows, width })
        };
        let ran = ran.unwrap();
        // The bias too where it has no part: it stays as it was.
        let mut found = vec![ran.gradient(weight), ran.gradient(bias)];
        found.extend(dx.map(|dx| ran.get(dx)));
        found
    }

    /// Mean (0 for a root mean square) and scale of a row.
    fn statistics(&self, row: &[f64]) -> (f64, f64) {
        let mean = if self.with_mean { row.iter().sum::<f64>() / row.len() as f64 } else { 0.0 };
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
        (mean, 1.0 / (variance + EPSILON).sqrt())
    }
}

impl Case for Rows {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let [rows, width] = self.size;
        bed.step.accumulate = self.accumulate;
        let values: Vec<f64> = draw.normal(0, rows * width).iter().map(|x| (draw.round)(1.5 * x + 0.5)).collect();
        let x = bed.real(&values);
        let (weight, bias) = (bed.parameter(&draw.normal(1, width)), bed.parameter(&draw.normal(2, width)));
        let mut found = self.forward(&mut bed, x, weight, self.with_sum.then_some(bias));
        found.extend(self.backward(&mut bed, &values, draw, [weight, bias]));
        found
    }
}

/// Widths around a warp's lanes, accesses of 16 bytes and what a warp or a block keeps in registers; a row alone, and more rows
/// than a block takes at once.
const SIZES: [[usize; 2]; 13] = [
    [1, 1],
    [3, 31],
    [1, 32],
    [9, 33],
    [19, 64],
    [5, 768],
    [3, 1023],
    [1, 1024],
    [3, 1025],
    [5, 1032],
    [1, 4096],
    [3, 4099],
    [3, 4104],
];

fn cases(with_mean: bool) -> Vec<Rows> {
    let forms = [[false, false], [true, true], [true, false]];
    let case = |(number, size)| {
        let [with_sum, accumulate] = forms[number % forms.len()];
        [Rows { size, with_mean, with_sum, accumulate }, Rows { size, with_mean, with_sum: !with_sum, accumulate }]
    };
    SIZES.into_iter().enumerate().flat_map(case).collect()
}

#[test]
fn layer_norm_of_rows_and_of_sums() {
    in_all_types("layer norm", &cases(true));
}

#[test]
fn rms_norm_of_rows_and_of_sums() {
    in_all_types("rms norm", &cases(false));
}
