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
