//! Attention, both forms, and rotary positions.
//!
//! The flash form rounds probabilities and the gradients of scores to 16 bits before they become factors. So in 16 bits both
//! forms are judged as FlashAttention's tests judge: by an f64 reference (the CPU twin), with at most twice the error of the plain
//! computation that rounds every tensor to 16 bits, and two roundings of the largest value besides.

use warpstep::backend::cuda::AttentionProducts;
use warpstep::random::{Philox, Purpose, to_unit};

use super::*;
use crate::device::counts_of;

const STREAM: u32 = 5;

#[derive(Clone, Debug)]
struct Attend {
    geometry: AttentionGeometry,
    dropout: f64,
    pad: bool,
    /// Of the micro-batch.
    part: u64,
}

fn attend(batch: usize, time: usize, [heads, kv_heads]: [usize; 2], head_size: usize, causal: bool) -> Attend {
    let geometry = AttentionGeometry { batch, time, heads, kv_heads, head_size, causal };
    Attend { geometry, dropout: 0.0, pad: false, part: 0 }
}

impl Attend {
    fn with_dropout(self, dropout: f64) -> Self {
        Attend { dropout, ..self }
    }

    fn in_part(self, part: u64) -> Self {
        Attend { part, ..self }
    }

    fn with_padding(self) -> Self {
        Attend { pad: true, ..self }
    }

    fn inputs(&self, draw: &Draw) -> [Vec<f64>; 2] {
        let rows = self.geometry.batch * self.geometry.time;
        [draw.normal(0, rows * self.geometry.packed_width()), draw.normal(1, rows * self.geometry.width())]
    }

    /// Tokens of which 0 is padding; the last sample has nothing else, so that its rows see no key.
    fn tokens(&self, draw: &Draw) -> Option<Vec<i32>> {
        let (batch, time) = (self.geometry.batch, self.geometry.time);
        let mut tokens = whole(draw.seed, 2, batch * time, 3);
        tokens[(batch - 1) * time..].fill(0);
        self.pad.then_some(tokens)
    }

    /// y and dqkv, one query at a time, with every tensor of the computation rounded to the type that the device stores.
    fn rounded(&self, draw: &Draw) -> [Vec<f64>; 2] {
        let (g, round) = (&self.geometry, draw.round);
        let (size, packed, width) = (g.head_size, g.packed_width(), g.width());
        let ([qkv, dy], tokens) = (self.inputs(draw), self.tokens(draw));
        let (mut y, mut dqkv) = (vec![0.0; dy.len()], vec![0.0; qkv.len()]);
        let stream = Philox::new(7, Purpose::Dropout, STREAM);
        // Of the bed's micro-batch.
        let first = (3 << 40) + self.part * (g.batch * g.heads * g.time * g.time) as u64;
        for index in 0..g.batch * g.heads * g.time {
            let (b, h, i) = (index / g.time / g.heads, index / g.time % g.heads, index % g.time);
            let row = b * g.time;
            let column = |t: usize, head: usize| (row + t) * packed + head * size;
            let group = h / (g.heads / g.kv_heads);
            let sees = |&j: &usize| !(g.causal && j > i) && tokens.as_ref().is_none_or(|tokens| tokens[row + j] != 0);
            let keys: Vec<usize> = (0..g.time).filter(sees).collect();
            let (q, out) = (column(i, h), (row + i) * width + h * size);
            let (k, v) = (|j| column(j, g.heads + group), |j| column(j, g.heads + g.kv_heads + group));
            let dot = |a: &[f64], b: usize| -> f64 { a.iter().zip(&qkv[b..]).map(|(a, b)| a * b).sum() };
            let scores: Vec<f64> =
                keys.iter().map(|&j| round(dot(&qkv[q..q + size], k(j)) / (size as f64).sqrt())).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let factor = |j: usize| {
                let word = stream.word(first + (index * g.time + j) as u64);
                if to_unit(word) < self.dropout as f32 { 0.0 } else { 1.0 / (1.0 - self.dropout) }
            };
            let factors: Vec<f64> = keys.iter().map(|&j| factor(j)).collect();
            let p: Vec<f64> = scores.iter().map(|s| round((s - most).exp() / total)).collect();
            let kept: Vec<f64> = p.iter().zip(&factors).map(|(p, f)| round(p * f)).collect();
            for d in 0..size {
                y[out + d] = round(keys.iter().zip(&kept).map(|(&j, p)| p * qkv[v(j) + d]).sum());
            }
            let dy = &dy[out..out + size];
            let delta: f64 = y[out..out + size].iter().zip(dy).map(|(y, dy)| y * dy).sum();
            for (n, &j) in keys.iter().enumerate() {
                let dp = round(dot(dy, v(j)));
                let ds = round(p[n] * (dp * factors[n] - delta) / (size as f64).sqrt());
                for d in 0..size {
                    dqkv[v(j) + d] += kept[n] * dy[d];
                    dqkv[q + d] += ds * qkv[k(j) + d];
                    dqkv[k(j) + d] += ds * qkv[q + d];
                }
            }
        }
        dqkv.iter_mut().for_each(|value| *value = round(*value));
        [y, dqkv]
    }
}

impl Case for Attend {
    /// y, dqkv, log_sum_exp (0 where it is infinite), and where it is infinite.
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let geometry = self.geometry;
        let rows = geometry.batch * geometry.time;
        let [qkv, dy] = self.inputs(draw);
        let (len, statistics) = (qkv.len(), rows * geometry.heads);
        bed.step.part = self.part;
        let [qkv, dy] = [qkv, dy].map(|values| bed.real(&values));
        let (y, log_sum_exp) = (bed.empty(rows * geometry.width()), bed.empty_statistic(statistics));
        let padding = self.tokens(draw).map(|tokens| Padding { tokens: bed.whole(&tokens), pad: 0 });
        let dropout = (self.dropout > 0.0).then_some(AttentionDropout { probability: self.dropout, stream: STREAM });
        let forward = bed.run(&AttentionForward { qkv, y, log_sum_exp, geometry, dropout, padding }).unwrap();
        let (values, sums) = (forward.get(y), forward.get_statistic(log_sum_exp)[..statistics].to_vec());
        let (y, log_sum_exp, dqkv) = (bed.real(&values), bed.statistic(&sums), bed.empty(len));
        let backward = AttentionBackward { qkv, y, dy, log_sum_exp, dqkv, geometry, dropout, padding };
        let gradient = bed.run(&backward).unwrap().get(dqkv);
        let finite = sums.iter().map(|&sum| if sum == f64::INFINITY { 0.0 } else { sum }).collect();
        let blind = sums.iter().map(|&sum| f64::from(u8::from(sum == f64::INFINITY))).collect();
        vec![values, gradient, finite, blind]
    }
}

/// Holds a 16-bit type to the rule at the head of this file, and the statistics, which are f32, to f32's.
fn judge_rounded<S: Storage>(products: AttentionProducts, cases: &[Attend], epsilon: f64) {
    let Some(device) = device_with(by(products)) else { return };
    let draw = Draw { seed: fresh_seed(), round: |x| S::from_f64(x).f64() };
    for case in cases {
        let what = format!("{case:?} in {}", S::NAME);
        let found = case.run(Bed::new(Cuda::<S>::new(device.clone())), &draw);
        let again = case.run(Bed::new(Cuda::<S>::new(device.clone())), &draw);
        let same = found.iter().flatten().zip(again.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{what}: other bits the second time");
        let reference = case.run(Bed::<Cpu<f64>>::cpu(), &draw);
        let plain = case.rounded(&draw);
        let worst = |values: &[f64], tensor: usize| {
            values.iter().zip(&reference[tensor]).map(|(a, b)| (a - b).abs()).fold(0.0, nan_max)
        };
        let size = |tensor: usize| reference[tensor].iter().map(|x| x.abs()).fold(0.0, f64::max);
        for (tensor, name) in ["y", "dqkv"].into_iter().enumerate() {
            let allowed = 2.0 * worst(&plain[tensor], tensor) + epsilon * size(tensor).max(f64::from(f32::EPSILON));
            let error = worst(&found[tensor], tensor);
            assert!(error <= allowed, "{what}: {name}: error {error:e}, allowed {allowed:e}, up to {:e}", size(tensor));
        }
        assert!(worst(&found[2], 2) <= 1e-5 * size(2).max(1.0), "{what}: log_sum_exp");
        assert_eq!(found[3], reference[3], "{what}: rows that see nothing");
    }
}

fn by(attention: AttentionProducts) -> DeviceOptions {
    DeviceOptions { attention, ..DeviceOptions::default() }
}

fn judge_bf16(cases: &[Attend]) {
    judge_rounded::<bf16>(AttentionProducts::Warps, cases, 1.0 / 256.0);
}

fn judge_f16(cases: &[Attend]) {
    judge_rounded::<f16>(AttentionProducts::Warps, cases, 1.0 / 2048.0);
}

const LENGTHS: [usize; 8] = [1, 15, 16, 17, 63, 64, 65, 130];

#[test]
fn attention_in_f32_is_the_cpus_at_every_length() {
    let cases = LENGTHS.map(|time| [true, false].map(|causal| attend(1, time, [1, 1], 8, causal)));
    compare::<f32>("attention", cases.as_flattened(), [1e-5, 0.0]);
}

#[test]
fn attention_in_f32_takes_heads_of_any_size_in_groups_with_dropout_and_padding() {
    let cases = [
        attend(2, 9, [3, 3], 1, false),
        attend(1, 33, [2, 1], 64, true),
        attend(1, 20, [1, 1], 80, false),
        attend(1, 17, [1, 1], 128, true),
        attend(1, 5, [2, 1], 150, true),
        attend(2, 66, [3, 1], 5, true).with_dropout(0.3),
        attend(1, 9, [3, 1], 5, false).with_dropout(0.3).in_part(3),
        attend(2, 21, [2, 2], 4, false).with_padding(),
        attend(2, 21, [4, 2], 4, true).with_padding().with_dropout(0.5),
    ];
    compare::<f32>("attention", &cases, [1e-5, 0.0]);
}

#[test]
fn flash_attention_holds_its_precision_at_every_length() {
    let cases = LENGTHS.map(|time| [true, false].map(|causal| attend(1, time, [1, 1], 64, causal)));
    judge_bf16(cases.as_flattened());
    judge_f16(&[attend(1, 65, [1, 1], 64, true), attend(1, 130, [1, 1], 64, false)]);
}

#[test]
fn flash_attention_of_wide_heads_holds_its_precision() {
    let cases = [1, 17, 64, 65, 130].map(|time| attend(1, time, [1, 1], 128, time % 2 == 0));
    judge_bf16(&cases);
    judge_f16(&cases[2..4]);
}

#[test]
fn flash_attention_shares_keys_in_groups() {
    judge_bf16(&[attend(2, 70, [3, 1], 64, true), attend(1, 40, [4, 2], 128, false)]);
    judge_f16(&[attend(2, 30, [2, 1], 64, false)]);
}

#[test]
fn flash_attention_drops_and_hides_what_the_cpu_does() {
    let with = |time, head_size, causal| attend(2, time, [2, 1], head_size, causal);
    judge_bf16(&[
        with(33, 64, true).with_dropout(0.3),
        with(66, 64, false).with_padding(),
        with(21, 64, true).with_padding().with_dropout(0.5),
        attend(1, 19, [3, 1], 64, true).with_dropout(0.4).in_part(5),
        with(34, 128, false).with_dropout(0.3),
        with(65, 128, true).with_padding(),
    ]);
    judge_f16(&[
        with(19, 64, false).with_dropout(0.3).in_part(1),
        with(30, 128, true).with_padding().with_dropout(0.1),
    ]);
}

/// The same cases as those of a warp's instructions, for heads of 64.
#[test]
fn products_of_four_warps_together_hold_the_precision_of_a_warps() {
    let mut cases = LENGTHS.map(|time| [true, false].map(|causal| attend(1, time, [1, 1], 64, causal))).concat();
    let with = |time, causal| attend(2, time, [2, 1], 64, causal);
    cases.extend([
        attend(2, 70, [3, 1], 64, true),
        attend(1, 200, [1, 1], 64, true),
        with(33, true).with_dropout(0.3),
        with(66, false).with_padding(),
        with(130, true).with_padding().with_dropout(0.5),
    ]);
    judge_rounded::<bf16>(AttentionProducts::Groups, &cases, 1.0 / 256.0);
    let some = [attend(1, 130, [2, 2], 64, true), with(65, false).with_dropout(0.3).in_part(1), with(30, true)];
    judge_rounded::<f16>(AttentionProducts::Groups, &some, 1.0 / 2048.0);
    for part in ["forward", "backward_keys", "backward_queries"] {
        let Some(counts) = counts_of(&format!("group_attention_{part}_64_bf16")) else { return };
        assert!(counts.launches > 0 && counts.local == 0, "{part}: {counts:?}");
    }
}

/// Scores that are all the same and large: what the first keys add is no other than what the last ones do, tile by tile.
#[test]
fn tiles_of_equal_scores_weigh_the_same() {
    let time = 256;
    let geometry = AttentionGeometry { batch: 1, time, heads: 1, kv_heads: 1, head_size: 64, causal: false };
    for products in [AttentionProducts::Warps, AttentionProducts::Groups] {
        let Some(device) = device_with(by(products)) else { return };
        for key in [12.25, 3.5, 7.75] {
            let row = |t: usize| [[8.0; 64], [key; 64], [if t < time / 2 { 1.0 } else { -1.0 }; 64]].concat();
            let mut bed = Bed::new(Cuda::<bf16>::new(device.clone()));
            let qkv = bed.real(&(0..time).flat_map(row).collect::<Vec<f64>>());
            let (y, log_sum_exp) = (bed.empty(time * 64), bed.empty_statistic(time));
            let forward = AttentionForward { qkv, y, log_sum_exp, geometry, dropout: None, padding: None };
            let found = bed.run(&forward).unwrap();
            assert!(found.get(y).iter().all(|&value| value == 0.0), "{products:?}, keys of {key}");
            let expected = 64.0 * key + (time as f64).ln();
            let sums = &found.get_statistic(log_sum_exp)[..time];
            assert!(sums.iter().all(|sum| (sum - expected).abs() <= 2e-7 * expected), "{sums:?}, not {expected}");
        }
    }
}

#[test]
fn flash_attention_reads_and_writes_shared_memory_without_bank_conflicts() {
    let Some(device) = device() else { return };
    let draw = Draw { seed: fresh_seed(), round: |x| bf16::from_f64(x).f64() };
    for head_size in [64, 128] {
        attend(1, 65, [1, 1], head_size, false).run(Bed::new(Cuda::<bf16>::new(device.clone())), &draw);
        for part in ["forward", "backward_keys", "backward_queries"] {
            let kernel = format!("flash_attention_{part}_{head_size}_bf16");
            let Some(counts) = counts_of(&kernel) else {
                println!("skipped: only the emulated device counts bank conflicts");
                return;
            };
            assert!(counts.launches > 0 && counts.shared_read > 0, "{kernel} did not run");
            assert_eq!([counts.bank_conflicts, counts.local], [0, 0], "{kernel}");
        }
    }
}

#[test]
fn attention_in_16_bits_takes_heads_of_any_size() {
    let cases = [
        attend(2, 9, [3, 3], 1, false),
        attend(1, 65, [2, 1], 8, true),
        attend(1, 20, [1, 1], 80, true),
        attend(2, 21, [2, 1], 8, false).with_padding().with_dropout(0.3),
    ];
    judge_bf16(&cases);
    judge_f16(&cases);
}

struct Turn {
    size: [usize; 5],
    interleaved: bool,
    inverse: bool,
}

impl Case for Turn {
    fn run<B: Backend>(&self, mut bed: Bed<B>, draw: &Draw) -> Vec<Vec<f64>> {
        let [batch, time, heads, head_size, row_width] = self.size;
        let x = bed.real(&draw.normal(0, batch * time * row_width));
        let (interleaved, inverse) = (self.interleaved, self.inverse);
        let args = Rotary { x, batch, time, row_width, heads, head_size, base: 1e4, interleaved, inverse };
        vec![bed.run(&args).unwrap().get(x)]
    }
}

#[test]
fn rotary_positions_are_the_cpus() {
    // Rows of whole and of broken accesses of 16 bytes; a late position, whose angles f32 would lose.
    let sizes = [[1, 1, 1, 2, 2], [2, 7, 3, 6, 25], [9, 5, 2, 32, 96], [1, 1031, 1, 16, 16]];
    let cases: Vec<_> = sizes
        .into_iter()
        .flat_map(|size| [(false, false), (false, true), (true, false), (true, true)].map(|(i, d)| (size, i, d)))
        .map(|(size, interleaved, inverse)| Turn { size, interleaved, inverse })
        .collect();
    in_all_types("rotary", &cases);
}
