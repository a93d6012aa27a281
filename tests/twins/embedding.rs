//! Tables of token and position vectors.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::*;
use warpstep::real::Real;

use crate::*;

/// y, dweight, dpositions.
fn reference<R: Real>(tokens: &[i32], [table, places, dy]: [&[f64]; 3], time: usize, width: usize) -> Vec<Vec<f64>> {
    let (table, places, dy) = (cast::<R>(table), cast::<R>(places), cast::<R>(dy));
    let mut y = vec![R::zero(); dy.len()];
    let (mut dtable, mut dplaces) = (vec![R::zero(); table.len()], vec![R::zero(); places.len()]);
    for (row, &token) in tokens.iter().enumerate() {
        for i in 0..width {
            let (t, p, at) = (token as usize * width + i, row % time * width + i, row * width + i);
            y[at] = table[t] + places[p];
            dtable[t] += dy[at];
            dplaces[p] += dy[at];
        }
    }
    vec![wide(&y), wide(&dtable), wide(&dplaces)]
}

#[test]
fn vectors_are_looked_up_and_their_gradients_summed() {
    let seed = fresh_seed();
    for (batch, time, width, vocabulary) in [(1, 1, 1, 1), (3, 5, 7, 4), (2, 33, 64, 11), (9, 64, 130, 65)] {
        let tokens = whole(seed, 0, batch * time, vocabulary as u64);
        let (table, places) = (normal(seed, 1, vocabulary * width), normal(seed, 2, (time + 2) * width));
        let dy = normal(seed, 3, batch * time * width);
        let what = format!("embedding [{batch}, {time}, {width}] of {vocabulary}");
        let found = same_bits(&what, || {
            let mut bed = Bed::<Cpu<f32>>::cpu();
            let (tokens, dy) = (bed.whole(&tokens), bed.real(&dy));
            let (weight, positions) = (bed.parameter(&table), bed.parameter(&places));
            let y = bed.empty(batch * time * width);
            let table_of = Some(positions);
            let forward = EmbeddingForward { tokens, weight, positions: table_of, y, batch, time, width, vocabulary };
            let dweight = first(weight);
            let dpositions = Some(first(positions));
            let backward = EmbeddingBackward { tokens, dy, dweight, dpositions, batch, time, width, vocabulary };
            let backward = bed.run(&backward).unwrap();
            vec![bed.run(&forward).unwrap().get(y), backward.gradient(weight), backward.gradient(positions)]
        });
        let given = [&table[..], &places[..], &dy[..]];
        judge(
            &what,
            &found,
            &reference::<f32>(&tokens, given, time, width),
            &reference::<f64>(&tokens, given, time, width),
        );
    }
}

#[test]
fn tokens_out_of_range_are_an_error_that_names_them() {
    for (wrong, place) in [(7, "token 7 at sample 1, position 2"), (-1, "token -1 at sample 1, position 2")] {
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let tokens = bed.whole(&[0, 1, 2, 3, 4, wrong]);
        let weight = bed.parameter(&[0.0; 10]);
        let y = bed.empty(12);
        let op = EmbeddingForward { tokens, weight, positions: None, y, batch: 2, time: 3, width: 2, vocabulary: 5 };
        let Err(error) = bed.run(&op) else { panic!("token {wrong} of 5 is refused") };
        assert_eq!(error.to_string(), format!("embedding: expected tokens from 0 to 4, found {place}"));
    }
}
