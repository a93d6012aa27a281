use super::*;

struct SingleValues {
    kind: ActivationKind,
    len: usize,
}

impl Case for SingleValues {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let SingleValues { kind, len } = *self;
        let (x, dy) = (bed.real(&draw.normal(0, len)), bed.real(&draw.normal(1, len)));
        let (y, dx) = (bed.empty(len), bed.empty(len));
        let forward = bed.run(&ActivationForward { x, y, kind, len }).unwrap().get(y);
        vec![forward, bed.run(&ActivationBackward { x, dy, dx, kind, len }).unwrap().get(dx)]
    }
}

#[test]
fn functions_of_single_values() {
    use ActivationKind::*;
    let cases: Vec<_> = [Relu, GeluTanh, Gelu, Silu, Sigmoid, Tanh]
        .into_iter()
        .flat_map(|kind| [1, 7, 8, 9, 2049].map(|len| SingleValues { kind, len }))
        .collect();
    // A slope of one value may lie near its zero, where what is left of terms of size 1 has their rounding.
    compare::<f32>("activation", &cases, [1e-5, 1e-7]);
    compare::<bf16>("activation", &cases, BF16);
    compare::<f16>("activation", &cases, F16);
}

struct Gated([usize; 2]);

impl Case for Gated {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let [rows, width] = self.0;
        let (x, dy) = (bed.real(&draw.normal(0, 2 * rows * width)), bed.real(&draw.normal(1, rows * width)));
        let (y, dx) = (bed.empty(rows * width), bed.empty(2 * rows * width));
        let forward = bed.run(&SwigluForward { x, y, rows, width }).unwrap().get(y);
        vec![forward, bed.run(&SwigluBackward { x, dy, dx, rows, width }).unwrap().get(dx)]
    }
}

#[test]
fn gated_halves() {
    in_all_types("swiglu", &[[1, 1], [3, 5], [33, 129]].map(Gated));
}
