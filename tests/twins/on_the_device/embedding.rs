use super::*;

/// Lookups of tokens and positions, and the tables' gradients. Every second token is the vocabulary's last, the others are
/// drawn, so that some come often and some never.
#[derive(Clone, Copy, Debug)]
struct Tables {
    batch: usize,
    time: usize,
    width: usize,
    vocabulary: usize,
    accumulate: bool,
}

impl Case for Tables {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let Tables { batch, time, width, vocabulary, accumulate } = *self;
        bed.step.accumulate = accumulate;
        let mut tokens = whole(draw.seed, 0, batch * time, vocabulary as u64);
        tokens.iter_mut().step_by(2).for_each(|token| *token = vocabulary as i32 - 1);
        let tokens = bed.whole(&tokens);
        let weight = bed.parameter(&draw.normal(1, vocabulary * width));
        let table = bed.parameter(&draw.normal(2, (time + 2) * width));
        let (y, dy) = (bed.empty(batch * time * width), bed.real(&draw.normal(3, batch * time * width)));
        let (dweight, dpositions) = (first(weight), Some(first(table)));
        let mut found = Vec::new();
        for positions in [None, Some(table)] {
            let op = EmbeddingForward { tokens, weight, positions, y, batch, time, width, vocabulary };
            found.push(bed.run(&op).unwrap().get(y));
        }
        for dpositions in [None, dpositions] {
            let op = EmbeddingBackward { tokens, dy, dweight, dpositions, batch, time, width, vocabulary };
            let ran = bed.run(&op).unwrap();
            found.extend([ran.gradient(weight), ran.gradient(table)]);
        }
        let ran = bed.run(&PositionForward { x: dy, weight: table, y, batch, time, width }).unwrap();
        found.push(ran.get(y));
        let ran = bed.run(&PositionBackward { dy, dweight: first(table), batch, time, width }).unwrap();
        found.push(ran.gradient(table));
        found
    }
}

fn both(sizes: &[[usize; 4]]) -> Vec<Tables> {
    let case = |&[batch, time, width, vocabulary]: &[usize; 4]| {
        [false, true].map(|accumulate| Tables { batch, time, width, vocabulary, accumulate })
    };
    sizes.iter().flat_map(case).collect()
}

#[test]
fn lookups_and_gradients_of_tables() {
    let sizes = [[1, 1, 1, 1], [3, 11, 31, 4], [1, 32, 32, 7], [5, 13, 33, 300], [1, 9, 768, 12], [1, 3, 1023, 2]];
    in_all_types("embedding", &both(&sizes));
    in_all_types("embedding", &both(&[[1, 5, 1025, 3], [1, 3, 4099, 5]]));
}

/// Tiles of 2,048 positions and digits of 8 bits: one tile to its end and one past it, one digit, two and three.
#[test]
fn gradients_of_tables_over_many_positions() {
    let sizes = [[1, 2047, 1, 3], [2, 1024, 8, 300], [1, 2049, 8, 255], [3, 700, 3, 256], [1, 4099, 1, 70_001]];
    in_all_types("embedding", &both(&sizes));
}

/// The sum over 2,100 positions of one token has the value of that in f64, within what f32 sums of chunks can have lost.
#[test]
fn a_token_that_stands_everywhere_gets_the_whole_sum() {
    let Some(device) = device() else { return };
    let seed = fresh_seed();
    let (time, width) = (2_100, 4);
    let mut bed = Bed::new(Cuda::<f32>::new(device));
    let tokens = bed.whole(&vec![1; time]);
    let values = normal(seed, 0, time * width);
    let dy = bed.real(&values);
    let weight = bed.parameter(&vec![0.0; 3 * width]);
    let dweight = first(weight);
    let op = EmbeddingBackward { tokens, dy, dweight, dpositions: None, batch: 1, time, width, vocabulary: 3 };
    let found = bed.run(&op).unwrap().gradient(weight);
    for (column, &found) in found.iter().enumerate() {
        let expected: f64 =
            if column / width == 1 { values.iter().skip(column % width).step_by(width).sum() } else { 0.0 };
        assert!((found - expected).abs() <= 2e-4, "column {column}: {found} for {expected}");
    }
}

#[test]
fn a_token_out_of_range_gives_no_number_and_touches_no_row() {
    let Some(device) = device() else { return };
    for wrong in [5, -1, i32::MAX, i32::MIN] {
        let mut bed = Bed::new(Cuda::<f32>::new(device.clone()));
        let tokens = bed.whole(&[0, wrong, 2, wrong]);
        let weight = bed.parameter(&[1.0; 10]);
        let (y, dy) = (bed.empty(8), bed.real(&[2.0; 8]));
        let op = EmbeddingForward { tokens, weight, positions: None, y, batch: 2, time: 2, width: 2, vocabulary: 5 };
        let found = bed.run(&op).unwrap().get(y);
        let missing: Vec<bool> = found.iter().map(|value| value.is_nan()).collect();
        assert_eq!(missing, [false, false, true, true, false, false, true, true], "token {wrong} of 5");
        let dweight = first(weight);
        let op =
            EmbeddingBackward { tokens, dy, dweight, dpositions: None, batch: 2, time: 2, width: 2, vocabulary: 5 };
        let found = bed.run(&op).unwrap().gradient(weight);
        assert_eq!(found, [2.0, 2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0], "token {wrong} of 5");
    }
}
