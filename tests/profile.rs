//! `train --profile`: what each operation took beside its floor, and nothing else changed by it.

mod common;

use std::path::{Path, PathBuf};

use common::{run, stderr, tensor_hashes};
use serde_json::Value;
use tempfile::TempDir;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{emulated, is_embedded};
use warpstep::model::layers::{
    Attention, Conv2d, Embedding, Linear, Positions, RotaryOptions, Sequential, TiedLinear, TokenAndPosition,
};
use warpstep::model::{Alone, Input, Layer, Loss, Mode, Model};

const RUN: &str = r#"
[run]
steps = 9

[data]
format = "digits"
batch_size = 16

[model]
preset = "mlp"
hidden = [32]

[optimizer]
rule = "adamw"
learning_rate = 1e-3
clip = { global_norm = 1.0 }
accumulate = 2
"#;

struct Place {
    folder: TempDir,
    file: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, RUN).unwrap();
        Place { folder, file }
    }

    fn train(&self, name: &str, more: &[&str]) -> PathBuf {
        let out = self.folder.path().join(name);
        let mut arguments = vec!["train", self.file.to_str().unwrap(), "--quiet", "--out", out.to_str().unwrap()];
        arguments.extend(more);
        let ran = run(&arguments);
        assert!(ran.status.success(), "{}", stderr(&ran));
        out
    }
}

fn table(run: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(run.join("profile.json")).unwrap()).unwrap()
}

fn entry<'a>(table: &'a Value, name: &str) -> &'a Value {
    let entries = table["entries"].as_array().unwrap();
    entries.iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("no {name} in {table}"))
}

/// Bytes of the first and the second layer's forward in a micro-batch: inputs, weights, bias, outputs in f32.
const FORWARD_BYTES: u64 = 4 * ((16 * 64 + 32 * 64 + 32 + 16 * 32) + (16 * 32 + 10 * 32 + 10 + 16 * 10));
/// Of both products, and of the function that the first takes along.
const FORWARD_FLOPS: u64 = 2 * 16 * (64 * 32 + 32 * 10) + 16 * 32;

fn check_forward(table: &Value, micro_batches: u64) {
    assert_eq!(table["micro_batches"], micro_batches);
    let forward = entry(table, "linear_forward");
    assert_eq!(forward["count"], 2 * micro_batches);
    assert_eq!(forward["bytes"], FORWARD_BYTES * micro_batches);
    assert_eq!(forward["flops"], FORWARD_FLOPS * micro_batches);
    for name in ["linear_forward", "linear_backward", "cross_entropy"] {
        let [time, floor] = ["milliseconds", "floor_ms"].map(|key| entry(table, name)[key].as_f64().unwrap());
        assert!(time > 0.0 && floor > 0.0, "{name}: {time} {floor}");
    }
}

#[test]
fn a_profile_tells_times_bytes_and_floors_and_changes_no_bit() {
    let place = Place::new();
    let profiled = place.train("profiled", &["--device", "cpu", "--profile", "5"]);
    let table = table(&profiled);
    check_forward(&table, 5);
    // The floor is the bytes at the speed of the copy, or the arithmetic at that of the product.
    let forward = entry(&table, "linear_forward");
    let [copy, product] = ["copy_bytes_per_s", "product_flops_per_s"].map(|key| table[key].as_f64().unwrap());
    let least = (5 * FORWARD_BYTES) as f64 / copy * 1e3;
    let most = least + (5 * FORWARD_FLOPS) as f64 / product * 1e3;
    let floor = forward["floor_ms"].as_f64().unwrap();
    assert!(floor >= 0.999 * least && floor <= 1.001 * most, "{least} {floor} {most}");
    // By the clock, all operations take at least what each took.
    let sum: f64 = table["entries"].as_array().unwrap().iter().map(|e| e["milliseconds"].as_f64().unwrap()).sum();
    assert!(table["wall_ms"].as_f64().unwrap() >= 0.999 * sum);
    let plain = place.train("plain", &["--device", "cpu"]);
    assert!(!plain.join("profile.json").exists());
    assert_eq!(tensor_hashes(&profiled), tensor_hashes(&plain));
}

#[test]
fn a_run_shorter_than_asked_is_profiled_as_far_as_it_went() {
    let place = Place::new();
    // 9 steps of 2 micro-batches, of which the first 2 are not counted.
    let out = place.train("short", &["--device", "cpu", "--profile"]);
    check_forward(&table(&out), 16);
}

#[test]
fn on_a_device_operations_are_told_by_kernel_and_the_update_with_them() {
    let real = std::env::var("WARPSTEP_TEST_DEVICE").is_ok_and(|device| device == "cuda");
    if !real && (!is_embedded() || emulated::find_library().is_none()) {
        println!("skipped: no CUDA device: the emulator was not built, or Warpstep was built without nvcc");
        return;
    }
    let device = if real { "cuda" } else { "emulated" };
    let place = Place::new();
    let out = place.train("device", &["--device", device, "--profile", "4"]);
    let table = table(&out);
    check_forward(&table, 4);
    let backward = entry(&table, "linear_backward")["kernels"].as_array().unwrap();
    let names: Vec<_> = backward.iter().map(|kernel| kernel["name"].as_str().unwrap()).collect();
    let weights = ["linear_backward_weight", "linear_backward_parameters"];
    assert!(names.len() > 1 && names.iter().any(|name| weights.contains(name)), "{names:?}");
    let update = entry(&table, "update");
    assert_eq!(update["count"], 2);
    // Of each parameter: the gradient twice, parameter and two slots read and written.
    let parameters = 32 * 64 + 32 + 10 * 32 + 10;
    assert_eq!(update["bytes"], 2 * parameters * 32);
    let plain = place.train("plain", &["--device", device]);
    assert_eq!(tensor_hashes(&out), tensor_hashes(&plain));
}

#[test]
fn costs_count_each_operand_once_and_gradients_that_are_added_to_twice() {
    // One matrix for two layers: the second one's backward comes first and overwrites its gradient, the first one's adds.
    let (batch, width) = (3, 5);
    let layers = Sequential::<Cpu<f64>>::new()
        .then("a", Linear::new(width).without_bias())
        .then("b", TiedLinear::new("a.weight"));
    let mut model = Model::new(Box::new(layers), Loss::MeanSquaredError);
    let program = model.plan(&Input::Real(vec![width]), batch, Mode::Training).unwrap();
    let costs = program.costs(model.parameters()).unwrap();
    assert_eq!(costs.len(), program.ops.len());
    let of = |name: &str| -> Vec<[usize; 2]> {
        let costs = costs.iter().filter(|cost| cost.name == name);
        costs.map(|cost| [cost.bytes as usize / 8, cost.flops as usize]).collect()
    };
    let (rows, matrix, product) = (batch * width, width * width, 2 * batch * width * width);
    assert_eq!(of("linear_forward"), [[2 * rows + matrix, product]; 2]);
    // x, dy, W, dx and the gradient; then x, dy, W and the gradient twice: nothing before it is trained.
    assert_eq!(of("linear_backward"), [[3 * rows + 2 * matrix, 2 * product], [2 * rows + 3 * matrix, product]]);
}

/// Values that each operation of a layer alone must move, forward and backward; whole numbers count as half of one.
fn moved(mut layer: impl Layer<Cpu<f64>>, input: &Input, batch: usize) -> Vec<(&'static str, f64)> {
    let alone = Alone::plan(&mut layer, input, batch, Mode::Training).unwrap();
    let costs = alone.program.costs(&alone.parameters).unwrap();
    costs.iter().map(|cost| (cost.name, cost.bytes as f64 / 8.0)).collect()
}

#[test]
fn costs_count_what_is_turned_in_place_twice_and_of_what_is_touched_in_part_that_part() {
    let (batch, time) = (3, 5);
    // Two query heads, and one of keys and of values: the values are not turned.
    let [heads, kv_heads, size] = [2, 1, 4];
    let attention = Attention::new(heads, true).with_kv_heads(kv_heads).with_rotary(Some(RotaryOptions::default()));
    let costs = moved(attention, &Input::Real(vec![time, (heads + 2 * kv_heads) * size]), batch);
    let turned = ("rotary", (2 * batch * time * (heads + kv_heads) * size) as f64);
    assert_eq!([costs[0], costs[3]], [turned; 2]);

    // Tables that have more rows than the batch has tokens and positions.
    let (vocabulary, positions, width) = (100, 20, 4);
    let [rows, tokens] = [(batch * time * width) as f64, (batch * time) as f64 / 2.0];
    let [table, of_positions] = [vocabulary, positions].map(|rows| (rows * width) as f64);
    let seen = (time * width) as f64;
    let costs = moved(TokenAndPosition::new(vocabulary, positions, width), &Input::Tokens(time), batch);
    assert_eq!(
        costs,
        [
            ("embedding_forward", tokens + 2.0 * rows + seen),
            ("embedding_backward", tokens + rows + table + of_positions)
        ]
    );
    // Of few rows, each once.
    let costs = moved(Embedding::new(2, width), &Input::Tokens(time), batch);
    assert_eq!(costs[0].1, tokens + rows + (2 * width) as f64);
    let costs = moved(Positions::new(positions), &Input::Real(vec![time, width]), batch);
    assert_eq!(costs, [("position_forward", 2.0 * rows + seen), ("position_backward", rows + of_positions)]);

    // A table that the output shares: the embedding adds to the rows of the batch.
    let shared = Sequential::<Cpu<f64>>::new()
        .then("a", Embedding::new(vocabulary, width))
        .then("b", TiedLinear::new("a.weight"));
    let costs = moved(shared, &Input::Tokens(time), batch);
    assert_eq!(costs.last(), Some(&("embedding_backward", tokens + rows + 2.0 * rows)));

    // Of a convolution no room for columns.
    let costs = moved(Conv2d::new(2, [5, 5]).without_bias(), &Input::Real(vec![3, 8, 8]), batch);
    let [x, y, weight] = [batch * 3 * 8 * 8, batch * 2 * 4 * 4, 2 * 3 * 5 * 5].map(|values| values as f64);
    assert_eq!(costs, [("conv2d_forward", x + y + weight), ("conv2d_backward", 2.0 * x + y + 2.0 * weight)]);
}
