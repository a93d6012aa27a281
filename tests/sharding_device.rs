//! Devices that share a model's memory out over NCCL: what tests/sharding.rs says of CPUs holds of emulated devices, in every
//! precision. A process each, joined by the emulated NCCL.

mod common;
#[path = "common/devices.rs"]
mod devices;
#[path = "common/mpi.rs"]
mod mpi;
#[path = "common/sharded.rs"]
mod sharded;

use std::fs;

use common::{run, stderr, stdout, tensor_hashes};
use sharded::{
    ADAMW, ADAPTIVE, BATCH_NORM, Bed, LAMB, LEVELS, MUON, On, digits, gives_the_bits_of_one_process, gpt, losses,
    skips_alike, stays_within_a_millionth,
};
use tempfile::TempDir;

/// The run with activations in another type.
fn in_precision(text: &str, precision: &str) -> String {
    text.replacen("[run]\n", &format!("[run]\nprecision = \"{precision}\"\n"), 1)
}

#[test]
fn adamw_with_a_global_norm_accumulation_and_an_average_has_the_bits_of_one_device() {
    gives_the_bits_of_one_process(On::Devices, &digits(ADAMW, true), &[2, 4], &LEVELS);
}

#[test]
fn momentum_with_an_adaptive_clip_has_the_bits_of_one_device() {
    gives_the_bits_of_one_process(On::Devices, &digits(ADAPTIVE, true), &[2, 4], &LEVELS);
}

#[test]
fn lamb_has_the_bits_of_one_device() {
    gives_the_bits_of_one_process(On::Devices, &digits(LAMB, true), &[2, 4], &LEVELS);
}

#[test]
fn lars_under_an_adaptive_clip_has_the_bits_of_one_device() {
    let optimizer = r#"rule = "lars"
learning_rate = 1.0
weight_decay = 1e-4
clip = { adaptive = 0.02 }"#;
    gives_the_bits_of_one_process(On::Devices, &digits(optimizer, true), &[2], &LEVELS);
}

#[test]
fn muon_whose_matrices_stay_whole_has_the_bits_of_one_device() {
    gives_the_bits_of_one_process(On::Devices, &digits(MUON, true), &[2, 4], &LEVELS);
}

#[test]
fn running_statistics_of_batch_norm_have_the_bits_of_one_device() {
    gives_the_bits_of_one_process(On::Devices, BATCH_NORM, &[2, 4], &["gradients", "parameters"]);
}

#[test]
fn a_small_gpt_with_dropout_and_a_shared_table_has_the_bits_of_one_device() {
    let prose = TempDir::new().unwrap();
    gives_the_bits_of_one_process(On::Devices, &gpt(prose.path()), &[2, 4], &["gradients", "parameters"]);
}

#[test]
fn activations_of_16_bits_have_the_bits_of_one_device() {
    let prose = TempDir::new().unwrap();
    for precision in ["bf16", "f16"] {
        let text = in_precision(&gpt(prose.path()), precision);
        gives_the_bits_of_one_process(On::Devices, &text, &[2], &LEVELS);
    }
}

#[test]
fn steps_whose_gradients_are_not_finite_are_skipped_by_all_alike() {
    skips_alike(On::Devices);
}

#[test]
fn without_an_order_of_sums_the_curves_stay_within_a_millionth_of_one_that_shares_nothing() {
    stays_within_a_millionth(On::Devices);
}

#[test]
fn gradients_sent_as_bf16_stay_near() {
    if !On::Devices.is_there() {
        return;
    }
    let bed = Bed::new(On::Devices, &digits("rule = \"sgd\"\nlearning_rate = 0.05\naccumulate = 2", false));
    bed.together(2, "none", "exact", &[]);
    let exact = losses(&bed.path("exact"));
    for shard in LEVELS {
        bed.together(2, shard, shard, &["--set", "parallel.reduce=\"bf16\""]);
        let rounded = losses(&bed.path(shard));
        assert_ne!(rounded, exact, "{shard}: nothing was rounded");
        for (found, exact) in rounded.iter().zip(&exact) {
            assert!((found.1 - exact.1).abs() <= 1e-2 * exact.1, "{shard}: {found:?}, not {exact:?}");
        }
    }
}

#[test]
fn a_run_moved_from_4_devices_to_2_and_to_1_ends_with_the_bits_of_one_never_moved() {
    if !On::Devices.is_there() {
        return;
    }
    let optimizer = r#"rule = "adamw"
learning_rate = 2e-3
clip = { global_norm = 0.2 }
ema = 0.9"#;
    let text =
        digits(optimizer, true).replace("steps = 4", "steps = 7") + "\n[checkpoint]\nevery_steps = 2\nkeep = 9\n";
    for precision in ["f32", "bf16"] {
        let bed = Bed::new(On::Devices, &in_precision(&text, precision));
        bed.alone("alone", &[]);
        bed.together(4, "parameters", "moved", &[]);
        let parts = fs::read_dir(bed.path("moved/checkpoints/step-00000002")).unwrap();
        let mut names: Vec<String> = parts.map(|part| part.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        let of = |stem: &str| (1..=4).map(|n| format!("{stem}-{n:05}-of-00004.safetensors")).collect::<Vec<_>>();
        assert_eq!(names, [of("ema"), of("model"), of("optimizer"), vec!["state.json".into()]].concat());
        bed.rewind("moved", 2);
        bed.together(2, "gradients", "moved", &["--resume"]);
        bed.rewind("moved", 4);
        bed.together(2, "optimizer", "moved", &["--resume"]);
        bed.rewind("moved", 6);
        bed.alone("moved", &["--resume"]);
        assert_eq!(tensor_hashes(&bed.path("moved")), tensor_hashes(&bed.path("alone")), "{precision}");
        assert_eq!(losses(&bed.path("moved")), losses(&bed.path("alone")), "{precision}");
    }
}

#[test]
fn a_model_in_parts_is_evaluated_as_one_in_a_single_file() {
    if !On::Devices.is_there() {
        return;
    }
    let bed = Bed::new(On::Devices, &digits("rule = \"adamw\"\nlearning_rate = 2e-3\nema = 0.8", true));
    bed.alone("alone", &[]);
    bed.together(2, "parameters", "parts", &[]);
    let evaluated = |out: &str| {
        let folder = bed.path(out).display().to_string();
        let output = run(&["eval", &folder, "--checkpoint", "latest", "--json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let mut value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        value.as_object_mut().unwrap().remove("checkpoint");
        value
    };
    assert_eq!(evaluated("parts"), evaluated("alone"));
}
