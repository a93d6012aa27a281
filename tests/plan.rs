//! `warpstep plan` says what a run would take on many GPUs, without one.

mod common;

use std::process::Output;

use common::{run, stderr, stdout, warpstep};
use serde_json::Value;
use warpstep::bench::results::{FORMAT, Figure, Machine, Results, Spread};

fn plan(file: &str, more: &[&str]) -> Value {
    let output = run(&[&["plan", file, "--json"], more].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    serde_json::from_str(&stdout(&output)).unwrap()
}

fn memory_of(plan: &Value, part: &str) -> f64 {
    let parts = plan["memory"].as_array().unwrap();
    parts.iter().filter(|found| found["name"] == part).map(|found| found["bytes"].as_f64().unwrap()).sum()
}

const DIGITS: &str = "examples/digits.toml";

#[test]
fn what_is_sent_is_what_a_ring_sends() {
    let found = plan(DIGITS, &["--gpus", "8", "--nodes", "2"]);
    let gradients = memory_of(&found, "gradients");
    let sent = found["communication"][0]["bytes"].as_f64().unwrap();
    assert!((sent - 2.0 * 15.0 / 16.0 * gradients).abs() < 1.0, "{sent} of {gradients}");
    let alone = plan(DIGITS, &[]);
    assert_eq!(alone["communication"].as_array().unwrap().len(), 0);
}

#[test]
fn the_largest_batch_fits_and_one_sample_more_does_not() {
    // A wide layer, so that samples take room.
    let wide = ["--gpu", "rtx4090", "--set", "run.precision=\"bf16\"", "--set", "model.hidden=[200000]"];
    let largest = plan(DIGITS, &wide)["largest_batch"].as_u64().unwrap();
    let usable = 0.94 * 24e9;
    let total = |batch: u64| {
        let set = format!("data.batch_size={batch}");
        let found = plan(DIGITS, &[&wide[..], &["--set", &set]].concat());
        found["memory"].as_array().unwrap().iter().map(|part| part["bytes"].as_f64().unwrap()).sum::<f64>()
    };
    assert!(largest > 1000);
    assert!(total(largest) <= usable && total(largest + 1) > usable, "{largest}");
}

#[test]
fn more_processes_are_faster_and_less_than_as_many_times() {
    let found = plan(DIGITS, &["--gpus", "8", "--nodes", "4", "--network", "1", "--set", "data.batch_size=4096"]);
    let rows = found["same_batch"].as_array().unwrap();
    let counts: Vec<u64> = rows.iter().map(|row| row["processes"].as_u64().unwrap()).collect();
    assert_eq!(counts, [1, 2, 4, 8, 16, 32]);
    let efficiency: Vec<f64> = rows.iter().map(|row| row["efficiency"].as_f64().unwrap()).collect();
    assert_eq!(efficiency[0], 1.0);
    assert!(efficiency.windows(2).all(|two| two[1] <= two[0]), "{efficiency:?}");
    // A slow network is waited for.
    let slow = plan(DIGITS, &["--gpus", "1", "--nodes", "2", "--network", "0.001"]);
    let fast = plan(DIGITS, &["--gpus", "1", "--nodes", "2", "--network", "50"]);
    let waits = |plan: &Value| plan["communication"][0]["not_hidden_milliseconds"].as_f64().unwrap();
    assert!(waits(&slow) > 100.0 * waits(&fast));
}

#[test]
fn this_machine_can_be_planned_with_and_the_text_tells_all_parts() {
    let output = run(&["plan", DIGITS, "--gpu", "here", "--gpus", "2"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    for part in [
        "2 processes, each with 16",
        "memory of each",
        "all-reduce of gradients",
        "together",
        "as much in each process",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

/// `train --dry-run` on the CPU as one of so many processes.
fn dry_run(processes: &str, more: &[&str]) -> Output {
    let environment = [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", processes), ("MASTER_ADDR", "localhost")];
    let mut command = warpstep();
    command.args(["train", DIGITS, "--device", "cpu", "--dry-run"]).args(more);
    command.envs(environment).env("MASTER_PORT", "29500").output().unwrap()
}

#[test]
fn memory_is_that_of_a_dry_run_with_evaluations_of_a_process_s_share() {
    let evaluation = ["1", "4"].map(|processes| {
        let found = plan(DIGITS, &["--gpu", "here", "--gpus", processes]);
        let parts = found["memory"].as_array().unwrap();
        let total: f64 = parts.iter().map(|part| part["bytes"].as_f64().unwrap()).sum();
        let told = stdout(&dry_run(processes, &[]));
        let together = format!("{:.3} MiB, besides", total / f64::from(1 << 20));
        assert!(told.contains(&together), "{processes}: {together} in {told}");
        memory_of(&found, "evaluation")
    });
    assert!(evaluation[1] > 0.0 && evaluation[1] <= evaluation[0] / 2.0, "{evaluation:?}");
}

#[test]
fn a_batch_that_cannot_be_shared_out_is_refused_by_a_dry_run_too() {
    let parts = ["--set", "run.reproducible=true", "--set", "parallel.parts=64"];
    for (processes, more, part) in [
        ("3", &[][..], "data.batch_size: found 32, expected a multiple of 3"),
        ("1", &parts[..], "data.batch_size: found 32, expected a multiple of parallel.parts = 64"),
    ] {
        let output = dry_run(processes, more);
        assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
        assert!(stderr(&output).contains(part), "{}", stderr(&output));
    }
}

#[test]
fn parts_of_a_batch_are_computed_and_rows_that_cannot_be_cut_into_them_are_left_out() {
    let parts = ["--set", "run.reproducible=true", "--set", "parallel.parts=8", "--set", "data.batch_size=8"];
    let found = plan(DIGITS, &[&["--gpus", "8"], &parts[..]].concat());
    let counts = |rows: &str| -> Vec<u64> {
        found[rows].as_array().unwrap().iter().map(|row| row["processes"].as_u64().unwrap()).collect()
    };
    assert_eq!((counts("same_batch"), counts("same_share")), (vec![1, 2, 4, 8], vec![8]));
    // Each process makes one pass of one sample, as it does without parts.
    let plain = plan(DIGITS, &["--gpus", "8", "--set", "data.batch_size=8"]);
    assert_eq!(found["same_share"][0]["efficiency"], plain["same_share"][3]["efficiency"]);
}

#[test]
fn sums_that_do_not_overlap_are_waited_for_whole() {
    let sent = |overlap: &str| {
        let overlap = format!("parallel.overlap={overlap}");
        let wide = ["--set", "model.hidden=[4000, 4000]", "--set", "data.batch_size=65536", "--set", &overlap];
        let found = plan(DIGITS, &[&["--gpus", "2"], &wide[..]].concat());
        ["milliseconds", "not_hidden_milliseconds"].map(|of| found["communication"][0][of].as_f64().unwrap())
    };
    let [all, waited] = sent("true");
    assert!(waited < all, "{waited} of {all}");
    let [all, waited] = sent("false");
    assert_eq!(waited, all);
}

#[test]
fn measured_speeds_take_the_place_of_the_data_sheet() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, figures: Vec<Figure>| {
        let (version, command, date) = ("0".to_owned(), "warpstep bench".to_owned(), "2026-01-01T00:00:00Z".to_owned());
        let machine = Machine { device: "a device".into(), ..Machine::default() };
        let results = Results { format: FORMAT, version, command, date, machine, figures, peers: Vec::new() };
        let path = folder.path().join(name);
        std::fs::write(&path, serde_json::to_string(&results).unwrap()).unwrap();
        path.display().to_string()
    };
    // One second each, so that amounts are speeds.
    let seconds = Spread { count: 5, min: 1.0, lower_quartile: 1.0, median: 1.0, upper_quartile: 1.0 };
    let figure = |suite: &str, name: &str, bytes: f64, flops: f64| Figure {
        suite: suite.into(),
        name: name.into(),
        seconds,
        bytes: Some(bytes),
        flops: Some(flops),
        ..Figure::default()
    };
    let refused = Figure { refused: Some("noise".into()), ..figure("device", "copy/memory", 1e15, 0.0) };
    let good = vec![
        refused,
        figure("device", "copy/memory", 2e9, 0.0),
        figure("device", "product/64x64x64/f32", 0.0, 3e9),
        figure("device", "product/64x64x64/bf16", 0.0, 3e15),
        figure("all_reduce", "1MiB/2_processes", 1e6, 0.0),
    ];
    let file = write("good.json", good);
    let found = plan(DIGITS, &["--gpus", "2", "--measured", &file]);
    let update = |plan: &Value| plan["update_milliseconds"].as_f64().unwrap();
    let sheet = plan(DIGITS, &["--gpus", "2"]);
    assert!((update(&found) / update(&sheet) - 0.9 * 3.35e12 / 2e9).abs() < 1.0);
    let sent = &found["communication"][0];
    let at_least = sent["bytes"].as_f64().unwrap() / 1e6 * 1e3;
    assert!(sent["milliseconds"].as_f64().unwrap() >= at_least);
    let empty = write("empty.json", vec![figure("device", "copy/1MiB_L2", 1.0, 0.0)]);
    let output = run(&["plan", DIGITS, "--measured", &empty]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("holds none of device/copy/memory"), "{}", stderr(&output));
}

#[test]
fn what_cannot_be_planned_is_said_in_a_sentence() {
    for (more, part) in [
        (vec!["--gpu", "h1000"], "--gpu: found \"h1000\", expected h100, h200"),
        (vec!["--gpus", "0"], "--gpus: found 0"),
        (vec!["--gpus", "3"], "data.batch_size: found 32, expected a multiple of 3"),
        (vec!["--network=-1"], "--network: found -1"),
        (vec!["--gpu", "here", "--set", "run.precision=\"bf16\""], "the CPU computes in f32"),
        (
            vec!["--set", "run.reproducible=true", "--set", "parallel.parts=64"],
            "data.batch_size: found 32, expected a multiple of parallel.parts = 64",
        ),
        (
            ["run.precision=\"bf16\"", "optimizer.master=false", "parallel.shard=\"optimizer\""]
                .iter()
                .flat_map(|&set| ["--set", set])
                .collect(),
            "optimizer.master: found false with parallel.shard",
        ),
    ] {
        let output = run(&[&["plan", DIGITS][..], &more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(part), "{more:?}: {}", stderr(&output));
    }
}
