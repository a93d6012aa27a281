use super::*;

struct Windows(PoolGeometry);

impl Case for Windows {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let geometry = self.0;
        let [oh, ow] = geometry.output().unwrap();
        let (values, out) = (geometry.planes * geometry.input[0] * geometry.input[1], geometry.planes * oh * ow);
        // Few different values: many windows hold their largest one more than once.
        let few: Vec<f64> = whole(draw.seed, 0, values, 5).iter().map(|&x| f64::from(x) / 4.0).collect();
        let (x, equal, dy) = (bed.real(&draw.normal(0, values)), bed.real(&few), bed.real(&draw.normal(1, out)));
        let (y, dx, positions) = (bed.empty(out), bed.empty(values), bed.whole(&vec![-1; out]));
        let mut found = Vec::new();
        for x in [x, equal] {
            let ran = bed.run(&MaxPoolForward { x, y, positions, geometry }).unwrap();
            let at = ran.get_whole(positions);
            found.extend([ran.get(y), at.iter().map(|&at| f64::from(at)).collect()]);
            let positions = bed.whole(&at);
            found.push(bed.run(&MaxPoolBackward { dy, positions, dx, geometry }).unwrap().get(dx));
        }
        found.push(bed.run(&AveragePoolForward { x, y, geometry }).unwrap().get(y));
        found.push(bed.run(&AveragePoolBackward { dy, dx, geometry }).unwrap().get(dx));
        found
    }
}

#[test]
fn windows_apart_overlapping_and_padded() {
    let case =
        |planes, input, kernel, stride, padding| Windows(PoolGeometry { planes, input, kernel, stride, padding });
    let cases = [
        case(1, [1, 1], [1, 1], [1, 1], [0, 0]),
        case(6, [8, 8], [2, 2], [2, 2], [0, 0]),
        case(5, [7, 9], [2, 2], [2, 2], [0, 0]),
        case(9, [7, 5], [3, 3], [2, 2], [1, 1]),
        case(3, [6, 11], [3, 2], [1, 1], [1, 1]),
        case(2, [9, 4], [2, 3], [3, 1], [0, 1]),
        case(4, [20, 19], [5, 4], [1, 2], [2, 2]),
        // Positions that no window holds.
        case(2, [8, 8], [1, 2], [3, 3], [0, 0]),
        // One window a plane.
        case(17, [7, 7], [7, 7], [1, 1], [0, 0]),
        case(3, [2, 2], [2, 2], [2, 2], [1, 1]),
    ];
    in_all_types("pooling", &cases);
}

/// Values that are no numbers, among others.
struct NotNumbers;

impl Case for NotNumbers {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let geometry = PoolGeometry { planes: 2, input: [4, 6], kernel: [2, 3], stride: [2, 3], padding: [0, 0] };
        let mut values = draw.normal(0, 48);
        // The first window holds two, one of the second plane nothing but the least value.
        (values[1], values[7]) = (f64::NAN, f64::NAN);
        [24, 25, 26, 30, 31, 32].iter().for_each(|&i| values[i] = f64::NEG_INFINITY);
        let (x, y, positions) = (bed.real(&values), bed.empty(8), bed.whole(&[-1; 8]));
        let ran = bed.run(&MaxPoolForward { x, y, positions, geometry }).unwrap();
        let y = ran.get(y);
        assert!(y[0].is_nan() && y[4] == f64::NEG_INFINITY && y[1..4].iter().all(|y| y.is_finite()), "{y:?}");
        vec![ran.get_whole(positions).iter().map(|&at| f64::from(at)).collect()]
    }
}

#[test]
fn the_first_value_that_is_no_number_is_the_largest() {
    in_all_types("pooling", &[NotNumbers]);
}
