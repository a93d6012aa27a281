use super::*;
use crate::conv::case;

struct Kernels {
    geometry: Conv2dGeometry,
    accumulate: bool,
}

impl Case for Kernels {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Kernels { geometry, accumulate } = *self;
        bed.step.accumulate = accumulate;
        let Conv2dGeometry { batch, channels, filters, input: [height, width], .. } = geometry;
        let [oh, ow] = geometry.output().unwrap();
        let (inputs, outputs) = (batch * channels * height * width, batch * filters * oh * ow);
        let (x, dy) = (bed.real(&draw.normal(0, inputs)), bed.real(&draw.normal(1, outputs)));
        let weight = bed.parameter(&draw.normal(2, geometry.weights()));
        let bias = bed.parameter(&draw.normal(3, filters));
        let (y, dx) = (bed.empty(outputs), bed.empty(inputs));
        let [forward, backward] = [false, true].map(|backward| bed.empty(B::conv2d_workspace(&geometry, backward)));
        let op = Conv2dForward { x, weight, bias: Some(bias), y, workspace: forward, geometry };
        let mut found = vec![bed.run(&op).unwrap().get(y)];
        found.push(bed.run(&Conv2dForward { bias: None, ..op }).unwrap().get(y));
        let (dweight, dbias) = (first(weight), Some(first(bias)));
        let op = Conv2dBackward { x, dy, weight, dx: Some(dx), workspace: backward, dweight, dbias, geometry };
        let ran = bed.run(&op).unwrap();
        found.extend([ran.get(dx), ran.gradient(weight), ran.gradient(bias)]);
        let ran = bed.run(&Conv2dBackward { dx: None, dbias: None, ..op }).unwrap();
        found.push(ran.gradient(weight));
        found
    }
}

fn cases() -> Vec<Kernels> {
    [
        // One position; several filters, since what is added to a bias may come out near 0.
        case(1, [5, 7, 1], [1, 1], [1, 1], [1, 1], [0, 0]),
        case(3, [3, 5, 1], [7, 9], [3, 3], [1, 1], [1, 1]),
        case(2, [4, 6, 2], [8, 5], [3, 2], [2, 1], [0, 1]),
        // Each channel by itself, with one filter and with two.
        case(2, [5, 5, 5], [6, 6], [3, 3], [1, 1], [1, 1]),
        case(3, [3, 6, 3], [9, 8], [5, 3], [2, 3], [2, 0]),
        // Pointwise, with steps that leave the last rows out.
        case(5, [8, 3, 1], [6, 7], [1, 1], [1, 1], [0, 0]),
        case(4, [2, 4, 1], [8, 8], [1, 1], [2, 2], [0, 0]),
        // A kernel as large as the padded picture; more padding than picture.
        case(2, [3, 2, 1], [4, 5], [6, 7], [1, 1], [1, 1]),
        case(1, [2, 3, 1], [2, 1], [3, 3], [2, 2], [3, 3]),
    ]
    .into_iter()
    .flat_map(|geometry| [false, true].map(|accumulate| Kernels { geometry, accumulate }))
    .collect()
}

#[test]
fn kernels_strides_paddings_and_groups() {
    in_all_types("convolution", &cases());
}

#[test]
fn tf32_rounds_what_goes_in_and_nothing_else() {
    let Some(device) = device_with(DeviceOptions { tf32: true, ..DeviceOptions::default() }) else { return };
    let draw = Draw { seed: fresh_seed(), round: |x| x };
    let mut rounded = false;
    // One that is worth a tensor core's while: a library takes others where they are faster.
    let large = Kernels { geometry: case(8, [32, 64, 1], [14, 14], [3, 3], [1, 1], [1, 1]), accumulate: false };
    for (number, case) in cases().iter().chain([&large]).enumerate() {
        let found = case.run(Bed::new(Cuda::<f32>::new(device.clone())), &draw);
        let expected = case.run(Bed::<Cpu<f32>>::cpu(), &draw);
        for (found, expected) in found.iter().zip(&expected) {
            let size = expected.iter().map(|x| x.abs()).fold(0.0, f64::max);
            for (found, expected) in found.iter().zip(expected) {
                let error = (found - expected).abs();
                // Two inputs of 10 bits of fraction a product, and sums that are smaller than what is added up.
                assert!(error <= 8.0 / 1024.0 * size.max(1.0), "{number}: {found} for {expected}, values up to {size}");
                rounded |= error > 1e-5 * size;
            }
        }
    }
    assert!(rounded, "no result shows that tf32 was used");
}
