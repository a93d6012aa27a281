//! What the README promises of a run: accuracy, the run folder, memory. Long trainings run on a cut of their steps here;
//! `scripts/accuracy` runs them whole.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{data_set, run, stderr, stdout};
use tempfile::TempDir;
use warpstep::config::RunFile;
use warpstep::train::metrics::{SplitName, read_metrics};
use warpstep::train::summary::Summary;
use warpstep::train::tensors;

/// Trains an example with overrides; returns its folder's summary.
fn train(example: &str, folder: &Path, set: &[&str]) -> Summary {
    let file = format!("examples/{example}.toml");
    let out = folder.display().to_string();
    let mut arguments = vec!["train", &file, "--quiet", "--out", &out];
    set.iter().for_each(|s| arguments.extend(["--set", s]));
    let output = run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    Summary::read(&folder.join("summary.json")).unwrap()
}

#[test]
fn the_quick_start_reaches_97_percent_and_leaves_a_whole_run_folder() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("digits");
    let summary = train("digits", &out, &[]);
    let accuracy = summary.last.test.unwrap().accuracy.unwrap();
    assert!(accuracy >= 0.97, "accuracy {accuracy}");
    assert!(summary.seconds < 60.0);
    for name in ["config.toml", "metrics.jsonl", "summary.json", "report.html", "preprocess.json"] {
        assert!(out.join(name).is_file(), "{name}");
    }
    for name in ["latest", "best"] {
        let target = fs::read_to_string(out.join("checkpoints").join(name)).unwrap();
        assert!(out.join("checkpoints").join(target.trim()).join("model.safetensors").is_file());
    }
    assert_eq!(fs::read_dir(out.join("tensorboard")).unwrap().count(), 1);
    let records = read_metrics(&out.join("metrics.jsonl")).unwrap();
    assert!(records.iter().any(|r| r.split == SplitName::Validation));
    assert_eq!(records.iter().filter(|r| r.split == SplitName::Test).count(), 1);
    let evaluated = run(&["eval", &out.display().to_string(), "--checkpoint", "latest", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&stdout(&evaluated)).unwrap();
    assert_eq!(value["accuracy"].as_f64().unwrap(), accuracy);
}

#[test]
fn least_squares_ends_where_the_same_steps_in_f64_end() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    train("least_squares", &out, &[]);
    let (x, y) = ([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], [1.0, 3.0, 5.0]);
    let mut theta = [0f64; 2];
    for _ in 0..1000 {
        let mut gradient = [0f64; 2];
        for (row, target) in x.iter().zip(y) {
            let residual = row[0] * theta[0] + row[1] * theta[1] - target;
            (0..2).for_each(|i| gradient[i] += 2.0 / 3.0 * row[i] * residual);
        }
        (0..2).for_each(|i| theta[i] -= 0.01 * gradient[i]);
    }
    assert!((theta[0] - 0.314_286).abs() < 1e-6 && (theta[1] - 0.628_571).abs() < 1e-6, "{theta:?}");
    let found = &tensors::read(&out.join("checkpoints/step-00001000/model.safetensors")).unwrap()["weight"];
    for (f, t) in found.values.iter().zip(theta) {
        assert!((f64::from(*f) - t).abs() < 1e-6, "{found:?} {theta:?}");
    }
}

#[test]
fn the_filled_in_configuration_of_every_example_gives_the_same_run() {
    for entry in fs::read_dir("examples").unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let first = RunFile::read(&path, &[]).unwrap();
            let again = RunFile::from_text(&first.resolved, &PathBuf::from("elsewhere/config.toml"), &[]).unwrap();
            assert_eq!(again.resolved, first.resolved, "{}", path.display());
            assert_eq!(again.identity, first.identity);
            assert_eq!((again.train, again.data, again.model), (first.train, first.data, first.model));
        }
    }
}

#[test]
fn memory_does_not_grow_with_the_steps() {
    let folder = TempDir::new().unwrap();
    let quiet = ["evaluate.every_steps=0", "checkpoint.every_steps=0", "run.log_every_steps=1000"];
    let peak = |steps: &str| {
        let set: Vec<String> = quiet.iter().map(|s| s.to_string()).chain([format!("run.steps={steps}")]).collect();
        let text = fs::read_to_string("examples/digits.toml").unwrap();
        let text = text.replace("epochs = 40", "").replace("every_epochs = 2", "");
        let file = folder.path().join("run.toml");
        fs::write(&file, text).unwrap();
        let out = folder.path().join(steps).display().to_string();
        let file = file.display().to_string();
        let mut arguments = vec!["train", &file, "--quiet", "--out", &out];
        set.iter().for_each(|s| arguments.extend(["--set", s]));
        let output = run(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        Summary::read(&Path::new(&out).join("summary.json")).unwrap().peak_memory_bytes
    };
    let (Some(short), Some(long)) = (peak("100"), peak("4000")) else {
        println!("skipped: this system does not tell the peak resident size");
        return;
    };
    assert!(long <= short + (2 << 20), "{short} bytes after 100 steps, {long} after 4,000");
}

#[test]
fn mnist_is_learnt_by_both_networks() {
    if data_set("mnist").is_none() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mlp = train("mnist_mlp", &folder.path().join("mlp"), &["run.epochs=0.5"]);
    assert!(mlp.last.test.unwrap().accuracy.unwrap() > 0.95, "{mlp:?}");
    let out = folder.path().join("cnn");
    let cnn = train("mnist_cnn", &out, &["run.epochs=0.15", "data.split.validation=500"]);
    assert!(cnn.last.test.unwrap().accuracy.unwrap() > 0.93, "{cnn:?}");
}

#[test]
fn shakespeare_is_learnt_and_goes_on_alike_under_the_same_seed() {
    if data_set("tinyshakespeare").is_none() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let summary =
        train("shakespeare_char", &out, &["run.steps=150", "schedule.warmup_steps=20", "evaluate.every_steps=0"]);
    assert!(summary.last.validation.unwrap().loss.unwrap() < 2.7, "{summary:?}");
    let out = out.display().to_string();
    let text = |seed: &str| {
        let output = run(&["generate", &out, "--prompt", "ROMEO:", "--tokens", "100", "--seed", seed]);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let (first, again, other) = (text("1"), text("1"), text("2"));
    assert!(first.starts_with("ROMEO:") && first.len() > 100, "{first}");
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn sentences_are_told_apart_and_predicted() {
    if data_set("rt-polarity").is_none() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let set = ["run.epochs=2", "model.width=64", "model.filters=32", "schedule.warmup_steps=20"];
    let summary = train("sentiment", &out, &set);
    assert!(summary.best.test.unwrap().accuracy.unwrap() > 0.6, "{summary:?}");
    let output =
        run(&["predict", &out.display().to_string(), "--text", "a joy from start to end", "--top", "2", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let value: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let total: f64 = value["classes"].as_array().unwrap().iter().map(|c| c["probability"].as_f64().unwrap()).sum();
    assert!((total - 1.0).abs() < 1e-6, "{value}");
}

#[test]
fn spoken_digits_are_told_apart_and_predicted() {
    let Some(data) = data_set("fsdd") else { return };
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("run");
    let summary = train("spoken_digits", &out, &["run.epochs=2", "schedule.warmup_steps=20"]);
    assert!(summary.last.test.unwrap().accuracy.unwrap() > 0.6, "{summary:?}");
    let wave = data.join("7_jackson_0.wav").display().to_string();
    let output = run(&["predict", &out.display().to_string(), &wave, "--top", "3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).matches('%').count(), 3);
}

#[test]
fn hugging_face_weights_are_trained_on() {
    let folder = TempDir::new().unwrap();
    let text: String = (0..4000u32).map(|i| char::from(b'a' + (i * i % 23) as u8)).collect();
    fs::write(folder.path().join("text.txt"), text).unwrap();
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2/model.safetensors");
    let run_file = |weights: &str| {
        format!(
            "[run]\nsteps = 2\n[data]\nformat = \"text\"\npath = \"text.txt\"\ncontext = 16\nbatch_size = 2\n\
             split = {{ validation = 0.2 }}\n[model]\npreset = \"gpt\"\nlayers = 2\nheads = 4\nwidth = 32\nbias = true\n\
             vocabulary = 61\ncontext = 24\n{weights}\n[optimizer]\nrule = \"sgd\"\nlearning_rate = 1e-12\n"
        )
    };
    let file = folder.path().join("run.toml");
    let out = folder.path().join("out");
    fs::write(&file, run_file(&format!("weights = {:?}", weights.display().to_string()))).unwrap();
    for how in ["--dry-run", "--quiet"] {
        let output = run(&["train", &file.display().to_string(), how, "--out", &out.display().to_string()]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let ours = tensors::read(&out.join("checkpoints/step-00000002/model.safetensors")).unwrap();
    let theirs = tensors::read(&weights).unwrap();
    let table = theirs.iter().find(|(name, _)| name.ends_with("wte.weight")).unwrap().1;
    let found = &ours["transformer.wte.weight"];
    assert_eq!(found.shape, table.shape);
    assert!(found.values.iter().zip(&table.values).all(|(a, b)| (a - b).abs() < 1e-6));
    fs::write(&file, run_file("weights = \"nowhere.safetensors\"")).unwrap();
    let output =
        run(&["train", &file.display().to_string(), "--quiet", "--overwrite", "--out", &out.display().to_string()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("nowhere.safetensors"), "{}", stderr(&output));
}

#[test]
fn a_text_takes_about_twice_its_size_of_memory() {
    let folder = TempDir::new().unwrap();
    let bytes = 96 << 20;
    let line = "First Citizen: before we proceed any further, hear me speak.\n";
    fs::write(folder.path().join("text.txt"), line.repeat(bytes / line.len())).unwrap();
    for tokenizer in ["bytes", "characters"] {
        let (file, out) = (folder.path().join("run.toml"), folder.path().join(tokenizer));
        let run_file = format!(
            "[run]\nsteps = 1\n[data]\nformat = \"text\"\npath = \"text.txt\"\ntokenizer = \"{tokenizer}\"\ncontext = 8\n\
             batch_size = 2\n[model]\npreset = \"gpt\"\nlayers = 1\nheads = 1\nwidth = 8\n[optimizer]\nlearning_rate = 0.1\n"
        );
        fs::write(&file, run_file).unwrap();
        let output = run(&["train", &file.display().to_string(), "--quiet", "--out", &out.display().to_string()]);
        assert!(output.status.success(), "{}", stderr(&output));
        let peak = Summary::read(&out.join("summary.json")).unwrap().peak_memory_bytes.unwrap();
        assert!(peak < 3 * bytes as u64, "{tokenizer}: {} MiB of a text of {}", peak >> 20, bytes >> 20);
    }
}
