//! Attention and rotary positions.

use warpstep::backend::cpu::Cpu;
use warpstep::backend::ops::*;
use warpstep::random::to_unit;
use warpstep::real::Real;

use crate::*;

#[derive(Clone, Debug)]
struct Case {
    geometry: AttentionGeometry,
    dropout: f64,
    pad: Option<Vec<i32>>,
}

const STREAM: u32 = 5;

/// What dropout multiplies probability `[b, h, i, j]` by.
fn factor(case: &Case, [b, h, i, j]: [usize; 4]) -> f64 {
    let g = &case.geometry;
    let position = (3u64 << 40) + (((b * g.heads + h) * g.time + i) * g.time + j) as u64;
    let kept = to_unit(Philox::new(7, Purpose::Dropout, STREAM).word(position)) >= case.dropout as f32;
    if case.dropout == 0.0 { 1.0 } else { f64::from(u8::from(kept)) / (1.0 - case.dropout) }
}

/// y and dqkv, one query at a time.
fn reference<R: Real>(case: &Case, qkv: &[f64], dy: &[f64]) -> Vec<Vec<f64>> {
    let g = &case.geometry;
    let (size, packed, width) = (g.head_size, g.packed_width(), g.width());
    let (qkv, dy) = (cast::<R>(qkv), cast::<R>(dy));
    let (mut y, mut dqkv) = (vec![R::zero(); dy.len()], vec![R::zero(); qkv.len()]);
    let scale = R::from_f64(1.0 / (size as f64).sqrt());
    for b in 0..g.batch {
        for h in 0..g.heads {
            let kv = h / (g.heads / g.kv_heads);
            let at = |t: usize, column: usize| (b * g.time + t) * packed + column * size;
            for i in 0..g.time {
                let sees = |&j: &usize| {
                    !(g.causal && j > i) && case.pad.as_ref().is_none_or(|tokens| tokens[b * g.time + j] != 0)
                };
                let keys: Vec<usize> = (0..g.time).filter(sees).collect();
                let q = at(i, h);
                let dot = |a: usize, other: &[R], b: usize| -> R { (0..size).map(|d| qkv[a + d] * other[b + d]).sum() };
                let scores: Vec<R> = keys.iter().map(|&j| dot(q, &qkv, at(j, g.heads + kv)) * scale).collect();
                let max = scores.iter().copied().fold(R::neg_infinity(), R::max);
                let weights: Vec<R> = scores.iter().map(|&s| (s - max).exp()).collect();
                let total: R = weights.iter().copied().sum();
                let out = (b * g.time + i) * width + h * size;
                let p: Vec<R> = weights.iter().map(|&w| w / total).collect();
                let kept: Vec<R> = keys.iter().map(|&j| R::from_f64(factor(case, [b, h, i, j]))).collect();
                let v = |j: usize| at(j, g.heads + g.kv_heads + kv);
                for (n, &j) in keys.iter().enumerate() {
                    for d in 0..size {
                        y[out + d] += p[n] * kept[n] * qkv[v(j) + d];
                    }
                }
                let dp: Vec<R> = keys.iter().zip(&kept).map(|(&j, &k)| k * dot(v(j), &dy, out)).collect();
                let delta: R = dp.iter().zip(&p).map(|(&dp, &p)| dp * p).sum();
                for (n, &j) in keys.iter().enumerate() {
                    let ds = p[n] * (dp[n] - delta) * scale;
                    let k = at(j, g.heads + kv);
                    for d in 0..size {
                        dqkv[v(j) + d] += p[n] * kept[n] * dy[out + d];
                        dqkv[q + d] += ds * qkv[k + d];
                        dqkv[k + d] += ds * qkv[q + d];
                    }
                }
            }
        }
    }
    vec![wide(&y), wide(&dqkv)]
}

fn check(case: &Case, seed: u64) {
    let geometry = case.geometry;
    let (rows, heads) = (geometry.batch * geometry.time, geometry.heads);
    let qkv = normal(seed, 0, rows * geometry.packed_width());
    let dy = normal(seed, 1, rows * geometry.width());
    let what = format!("{case:?}");
    let found = same_bits(&what, || {
        let mut bed = Bed::<Cpu<f32>>::cpu();
        let (qkv_at, dy) = (bed.real(&qkv), bed.real(&dy));
        let (y, log_sum_exp) = (bed.empty(rows * geometry.width()), bed.empty(rows * heads));
        let padding = case.pad.as_ref().map(|tokens| Padding { tokens: bed.whole(tokens), pad: 0 });
        let dropout = (case.dropout > 0.0).then_some(AttentionDropout { probability: case.dropout, stream: STREAM });
        let forward = AttentionForward { qkv: qkv_at, y, log_sum_exp, geometry, dropout, padding };
        let forward = bed.run(&forward).unwrap();
        let (y_at, log_sum_exp) = (bed.real(&forward.get(y)), bed.real(&forward.get(log_sum_exp)));
        let dqkv = bed.empty(qkv.len());
        let backward = AttentionBackward { qkv: qkv_at, y: y_at, dy, log_sum_exp, dqkv, geometry, dropout, padding };
        vec![forward.get(y), bed.run(&backward).unwrap().get(dqkv)]
    });
    judge(&what, &found, &reference::<f32>(case, &qkv, &dy), &reference::<f64>(case, &qkv, &dy));
}

fn geometry(batch: usize, time: usize, [heads, kv_heads]: [usize; 2], head_size: usize, causal: bool) -> Case {
    let geometry = AttentionGeometry { batch, time, heads, kv_heads, head_size, causal };
    Case { geometry, dropout: 0.0, pad: None }
}

#[test]
fn attention_is_what_the_paper_says_at_every_length() {
    let seed = fresh_seed();
    for time in [1, 2, 15, 16, 17, 63, 64, 65, 130] {
        for causal in [true, false] {
            check(&geometry(2, time, [2, 2], 8, causal), seed);
        }
    }
    check(&geometry(1, 150, [1, 1], 5, true), seed);
    check(&geometry(13, 9, [3, 3], 1, false), seed);
}

#[test]
fn queries_share_keys_in_groups() {
    let seed = fresh_seed();
    for [heads, kv_heads] in [[4, 2], [4, 1], [6, 3]] {
        check(&geometry(2, 70, [heads, kv_heads], 6, true), seed);
    }
}

#[test]
fn padding_is_not_seen() {
    let seed = fresh_seed();
    for causal in [true, false] {
        // Tokens below 1 are padding; the second sample has nothing else, so its rows see no key.
        let mut pad = whole(seed, 2, 2 * 21, 3);
        pad[21..].fill(0);
        let mut case = geometry(2, 21, [2, 2], 4, causal);
        case.pad = Some(pad);
        check(&case, seed);
    }
}

#[test]
fn dropout_follows_its_stream() {
    let seed = fresh_seed();
    for time in [3, 17, 66] {
        for causal in [true, false] {
            let mut case = geometry(2, time, [4, 2], 4, causal);
            case.dropout = 0.3;
            check(&case, seed);
        }
    }
}

fn rotary_reference<R: Real>(args: &Rotary, x: &[f64]) -> Vec<f64> {
    let mut x = cast::<R>(x);
    let half = args.head_size / 2;
    for row in 0..args.batch * args.time {
        for head in 0..args.heads {
            for i in 0..half {
                let angle = (row % args.time) as f64 * args.base.powf(-2.0 * i as f64 / args.head_size as f64);
                let angle = if args.inverse { -angle } else { angle };
                let (sin, cos) = (R::from_f64(angle.sin()), R::from_f64(angle.cos()));
                let start = row * args.row_width + head * args.head_size;
                let (a, b) = if args.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (u, v) = (x[start + a], x[start + b]);
                (x[start + a], x[start + b]) = (u * cos - v * sin, v * cos + u * sin);
            }
        }
    }
    wide(&x)
}

#[test]
fn rotary_positions_turn_and_turn_back() {
    let seed = fresh_seed();
    for interleaved in [false, true] {
        for (batch, time, heads, head_size, row_width) in [(1, 1, 1, 2, 2), (2, 7, 3, 6, 25), (3, 130, 4, 32, 160)] {
            let x = normal(seed, 0, batch * time * row_width);
            let turned = |x: &[f64], inverse: bool| {
                let mut bed = Bed::<Cpu<f32>>::cpu();
                let at = bed.real(x);
                let args = Rotary { x: at, batch, time, row_width, heads, head_size, base: 1e4, interleaved, inverse };
                (bed.run(&args).unwrap().get(at), args)
            };
            let what = format!("rotary, interleaved {interleaved}, [{batch}, {time}, {heads}, {head_size}]");
            let found = same_bits(&what, || vec![turned(&x, false).0]);
            let (there, args) = turned(&x, false);
            let exact = [rotary_reference::<f64>(&args, &x)];
            judge(&what, &found, &[rotary_reference::<f32>(&args, &x)], &exact);
            let (back, _) = turned(&there, true);
            judge(&what, &[back], &[there], &[x]);
        }
    }
}
