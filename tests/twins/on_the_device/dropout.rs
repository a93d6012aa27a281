use super::*;

struct Dropped(usize);

impl Case for Dropped {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let len = self.0;
        let (x, y) = (bed.real(&draw.normal(0, len)), bed.empty(len));
        // The device reads the micro-step of its own memory, which programs write; an operation alone finds 0 there.
        bed.step.micro_step = 0;
        let dropped = |stream| DropoutApply { x, y, probability: 0.25, stream, len };
        [1, 2].map(|stream| bed.run(&dropped(stream)).unwrap().get(y)).into()
    }
}

#[test]
fn dropout_draws_what_the_cpu_draws() {
    in_all_types("dropout", &[1, 3, 4, 1001].map(Dropped));
}
