use super::*;

/// Values, and the part of the micro-batch that they are.
struct Dropped(usize, u64);

impl Case for Dropped {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let len = self.0;
        let (x, y) = (bed.real(&draw.normal(0, len)), bed.empty(len));
        bed.step.part = self.1;
        let dropped = |stream| DropoutApply { x, y, probability: 0.25, stream, len };
        [1, 2].map(|stream| bed.run(&dropped(stream)).unwrap().get(y)).into()
    }
}

#[test]
fn dropout_draws_what_the_cpu_draws() {
    in_all_types("dropout", &[1, 3, 4, 1001].map(|len| Dropped(len, 0)));
}

#[test]
fn a_part_of_a_batch_draws_what_it_draws_within_the_whole() {
    // Lengths of every remainder by 4, so that parts begin at every word of a block.
    let parts = [(1001, 1), (1001, 2), (1001, 3), (6, 1), (5, 3), (1024, 7), (3, 1)];
    in_all_types("dropout of a part", &parts.map(|(len, part)| Dropped(len, part)));
    let len = 1001;
    let drawn = |bed: Bed<Cpu<f32>>, len, part| {
        let draw = Draw { seed: 1, round: |_| 1.0 };
        Dropped(len, part).run(bed, &draw).swap_remove(0)
    };
    let whole = drawn(Bed::cpu(), 3 * len, 0);
    for part in 0..3 {
        assert_eq!(whole[part * len..(part + 1) * len], drawn(Bed::cpu(), len, part as u64), "part {part}");
    }
}
