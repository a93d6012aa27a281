//! Wrong input gets one clear sentence and the right exit code: never a panic, never a partial file.

mod common;

use std::fs;
use std::path::Path;

use common::{run, stderr};
use proptest::test_runner::{Config, TestRunner};
use tempfile::TempDir;

const GOOD: &str = r#"
[run]
steps = 4
[data]
format = "digits"
batch_size = 8
[model]
preset = "mlp"
hidden = [8]
[optimizer]
rule = "momentum"
learning_rate = 0.1
[schedule]
kind = "cosine"
"#;

/// Runs a run file and checks that it is refused: one line that holds every word of `expected`, exit code `code`, nothing
/// left behind.
fn refused(folder: &Path, text: &str, more: &[&str], code: i32, expected: &[&str]) {
    let file = folder.join("run.toml");
    fs::write(&file, text).unwrap();
    let out = folder.join("out");
    let (file_name, out_name) = (file.display().to_string(), out.display().to_string());
    let arguments = [&["train", &file_name, "--quiet", "--out", &out_name][..], more];
    let output = run(&arguments.concat());
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{text}\n{more:?}\n{error}");
    assert!(!error.contains("panicked"), "{error}");
    assert_eq!(error.trim_end().lines().count(), 1, "not one sentence: {error}");
    for word in expected {
        assert!(error.contains(word), "expected {word:?} in {error:?}");
    }
    assert!(
        !out.join("checkpoints").exists() && !out.join("summary.json").exists(),
        "{text}: something was left behind"
    );
}

/// `GOOD` with one part replaced.
fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replacen(from, to, 1)
}

#[test]
fn the_good_run_file_is_good() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("run.toml");
    fs::write(&file, GOOD).unwrap();
    let out = folder.path().join("out").display().to_string();
    let output = run(&["train", &file.display().to_string(), "--quiet", "--out", &out]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn wrong_run_files_are_refused_with_line_and_key() {
    let folder = TempDir::new().unwrap();
    let cases: Vec<(String, &[&str])> = vec![
        (with("steps = 4", "stepz = 4"), &["run.toml:3", "run.stepz", "unknown key", "did you mean steps?"]),
        (with("steps = 4", ""), &["run.steps", "missing"]),
        (with("steps = 4", "steps = 4\nepochs = 1"), &["run.epochs", "both"]),
        (with("steps = 4", "steps = 0"), &["run.toml:3", "run.steps", "found 0"]),
        (with("steps = 4", "steps = -4"), &["run.toml:3", "run.steps", "found -4", "whole number"]),
        (with("steps = 4", "steps = \"many\""), &["run.steps", "\"many\" (a string)"]),
        (with("steps = 4", "steps = 4.5"), &["run.steps", "4.5"]),
        (with("steps = 4", "epochs = 0.0"), &["run.epochs", "found 0"]),
        (with("steps = 4", "epochs = nan"), &["run.epochs", "finite"]),
        (with("steps = 4", "steps = 4\nthreads = 0"), &["run.threads", "found 0"]),
        (with("steps = 4", "steps = 4\nthreads = 100000"), &["run.threads", "found 100000, expected 1 to 4096"]),
        (with("steps = 4", "steps = 4\ndevice = \"gpu\""), &["run.device", "\"gpu\"", "cuda:N"]),
        (with("steps = 4", "steps = 4\ndevice = \"cuda:99\""), &["device = \"cpu\""]),
        (with("steps = 4", "steps = 4\nprecision = \"bf16\""), &["run.precision", "f32"]),
        (with("steps = 4", "steps = 4\nprecision = \"f23\""), &["run.precision", "did you mean f32?"]),
        (with("steps = 4", "steps = 4\nlog_every_steps = 0"), &["run.log_every_steps", "found 0"]),
        (with("steps = 4", "steps = 4\nmax_skipped_steps = 0"), &["run.toml:4", "run.max_skipped_steps", "found 0"]),
        (with("steps = 4", "length = 4"), &["run.steps", "missing", "found the unknown key length"]),
        (format!("{GOOD}[parallel]\ntimeout = 1e20\n"), &["parallel.timeout", "0.1 to 1e9"]),
        (format!("{GOOD}[parallel]\ntimeout = 0.01\n"), &["parallel.timeout", "found 0.01"]),
        (with("steps = 4", "steps = 4 oops"), &["run.toml:3: not valid TOML", ", in `steps = 4 oops`"]),
        (with("[run]", "[run"), &["run.toml:2", "not valid TOML"]),
        (with("[run]", "[rum]"), &["rum", "unknown key", "did you mean run?"]),
        (with("[model]", "[model]\n[model]"), &["not valid TOML"]),
        (with("format = \"digits\"", ""), &["data.format", "missing", "digits"]),
        (with("format = \"digits\"", "format = \"digit\""), &["data.format", "did you mean digits?"]),
        (with("format = \"digits\"", "format = 3"), &["data.format", "found 3"]),
        (with("batch_size = 8", "batch_size = 0"), &["run.toml:6", "data.batch_size", "found 0"]),
        (with("batch_size = 8", "batch_size = 100000"), &["data.batch_size", "100000", "training split"]),
        (with("batch_size = 8", "batch_sise = 8"), &["data.batch_sise", "did you mean batch_size?"]),
        (with("batch_size = 8", "split = { validation = 1.5 }"), &["data.split", "1.5"]),
        (with("batch_size = 8", "split = { validation = true }"), &["data.split.validation", "true"]),
        (with("batch_size = 8", "split = { validaton = 0.1 }"), &["data.split.validaton", "did you mean validation?"]),
        (with("batch_size = 8", "split = 3"), &["data.split = { validation = 0.1 })"]),
        (with("batch_size = 8", "normalize = \"datset\""), &["data.normalize", "did you mean dataset?"]),
        (with("batch_size = 8", "augment = { flop = true }"), &["data.augment.flop", "did you mean flip?"]),
        (
            with("batch_size = 8", "threads = 2000"),
            &["run.toml:6", "data.threads", "found 2000, expected 1024 at most"],
        ),
        (
            with("batch_size = 8", "prefetch = 70000"),
            &["run.toml:6", "data.prefetch", "found 70000, expected 65536 at most"],
        ),
        (
            with("format = \"digits\"", "format = \"inline\"\ninputs = [[1], [1e300]]\ntargets = [1, 2]"),
            &["run.toml:6", "data.inputs", "the range of f32"],
        ),
        (
            with(
                "preset = \"mlp\"\nhidden = [8]",
                "layers = [{ kind = \"conv2d\", filters = 2, kernel = 2, padding = 2147483648 }]",
            ),
            &["run.toml:6: data.batch_size: found 8, of which the output of 0 would be [8, 2, 4294967303, 4294967303]"],
        ),
        (
            with(
                "preset = \"mlp\"\nhidden = [8]",
                "layers = [{ kind = \"conv2d\", filters = 2, kernel = 2, padding = 9223372036854775807 }]",
            ),
            &["run.toml:8: model.layers[0]: conv2d takes a picture that a [2, 2] kernel at stride [1, 1] fits"],
        ),
        (
            with(
                "preset = \"mlp\"\nhidden = [8]",
                "layers = [{ kind = \"attention\", heads = 4, kv_heads = 9223372036854775807 }]",
            ),
            &["run.toml:8: model.layers[0].kv_heads: found 9223372036854775807, expected a divisor of heads (4)"],
        ),
        (
            with("preset = \"mlp\"\nhidden = [8]", "layers = [{ kind = \"attention\", heads = 4, kv_heads = 3 }]"),
            &["model.layers[0].kv_heads: found 3, expected a divisor of heads (4)"],
        ),
        (with("preset = \"mlp\"", ""), &["model.preset", "missing", "mlp"]),
        (with("preset = \"mlp\"", "preset = \"mpl\""), &["model.preset", "did you mean mlp?"]),
        (with("preset = \"mlp\"", "preset = \"gpt\""), &["model"]),
        (with("preset = \"mlp\"\nhidden = [8]", "preset = \"text_cnn\""), &["text_cnn", "tokens"]),
        (with("hidden = [8]", "hidden = [8, 0]"), &["run.toml:9", "model.hidden", "found 0"]),
        (with("hidden = [8]", "hidden = 8"), &["model.hidden", "found 8, expected an array, as in [8]"]),
        (
            with("hidden = [8]", "hidden = [8, \"a\"]"),
            &["model.hidden: item 1: found \"a\" (a string), expected a whole number of 0 or more"],
        ),
        (
            with("preset = \"mlp\"", "preset = \"resnet\""),
            &["run.toml:9: model.hidden: unknown key with preset = \"resnet\"; expected one of blocks, channels"],
        ),
        (
            with("batch_size = 8", "path = \"x.csv\""),
            &["data.path: unknown key with format = \"digits\"; expected one of"],
        ),
        (
            with("preset = \"mlp\"\nhidden = [8]", "layers = [{ kind = \"linear\", units = 8 }]"),
            &["model.layers[0].units: unknown key with kind = \"linear\"; expected one of bias, kind, outputs"],
        ),
        (
            with("batch_size = 8", "normalize = true"),
            &["data.normalize: found true, expected one of \"none\", \"unit\", \"dataset\""],
        ),
        (with("hidden = [8]", "hiden = [8]"), &["model.hiden", "did you mean hidden?"]),
        (with("hidden = [8]", "dropout = 1.0"), &["model.dropout", "found 1"]),
        (with("hidden = [8]", "activation = \"rellu\""), &["model.activation", "did you mean relu?"]),
        (with("hidden = [8]", "loss = \"mean_squared_error\""), &["model.loss", "does not fit"]),
        (with("hidden = [8]", "label_smoothing = 2"), &["model.label_smoothing", "found 2"]),
        (with("preset = \"mlp\"\nhidden = [8]", "preset = \"resnet\"\ndepth = 19"), &["model.depth", "found 19"]),
        (
            with("preset = \"mlp\"\nhidden = [8]", "layers = [{ kind = \"conv2d\", filters = 4, kernel = 99 }]"),
            &["conv2d", "99", "8 x 8"],
        ),
        (
            with("preset = \"mlp\"\nhidden = [8]", "layers = [{ kind = \"lineer\" }]"),
            &["model.layers[0].kind", "did you mean linear?"],
        ),
        (with("preset = \"mlp\"\nhidden = [8]", "layers = [{ kind = \"embedding\", width = 4 }]"), &["tokens"]),
        (with("rule = \"momentum\"", "rule = \"momentun\""), &["optimizer.rule", "did you mean momentum?"]),
        (with("learning_rate = 0.1", ""), &["optimizer.learning_rate", "missing", "a number above 0, as in 1e-3"]),
        (with("learning_rate = 0.1", "lr = 0.1"), &["optimizer.learning_rate", "missing", "the unknown key lr"]),
        (
            with("learning_rate = 0.1", "learning_rat = 0.1"),
            &["optimizer.learning_rat:", "did you mean learning_rate?"],
        ),
        (with("learning_rate = 0.1", "lr = 0.1\nwd = 0.1"), &["the unknown keys lr, wd"]),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\nbetas = [0.9, 0.9]"),
            &["run.toml:13", "does not go with rule = \"momentum\", form = \"pytorch\", which takes"],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\ngamma = 2"),
            &["does not go with rule = \"momentum\", form = \"pytorch\""],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\nclip.adaptive_epsilon = 2"),
            &["goes with clip.adaptive alone"],
        ),
        (
            with("rule = \"momentum\"", "rule = \"nesterov\"\nmomentum = 0"),
            &["run.toml:12", "optimizer.momentum", "a number above 0"],
        ),
        (
            with("rule = \"momentum\"", "rule = \"nesterov\"\nform = \"polyak\""),
            &["optimizer.form", "expected \"pytorch\""],
        ),
        (with("rule = \"momentum\"", "rule = \"nesterov\"\nnesterov = false"), &["optimizer.nesterov", "found false"]),
        (
            with(
                "learning_rate = 0.1",
                "learning_rate = 0.1\ngroups = [{ pattern = \"a\" }, { pattern = \"b\", weight_decay = -1 }]",
            ),
            &["optimizer.groups[1].weight_decay", "found -1"],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\naccumulate = 5000000000"),
            &["found 5000000000", "from 0 to 4294967295"],
        ),
        (format!("{GOOD}gamma = 2\n"), &["schedule.gamma", "does not go with kind = \"cosine\""]),
        (
            with("kind = \"cosine\"", "kind = \"one_cycle\"\nwarmup_steps = 2"),
            &["does not go with kind = \"one_cycle\""],
        ),
        (with("steps = 4", "steps = 4\nname = \"../up\""), &["run.name", "without a /"]),
        (with("steps = 4", "steps = 4\nname = \"\""), &["run.name", "found \"\""]),
        (
            with("preset = \"mlp\"\nhidden = [8]", "preset = \"cnn\"\nconvolutions = 9223372036854775807"),
            &["model.convolutions", "at most 10000"],
        ),
        (
            with("preset = \"mlp\"\nhidden = [8]", "preset = \"gpt\"\nrotary_base = 2"),
            &["goes with positions = \"rotary\" alone"],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = \"fast\""),
            &["run.toml:12", "\"fast\"", "expected a finite number"],
        ),
        (with("learning_rate = 0.1", "learning_rate = -0.1"), &["run.toml:12", "optimizer.learning_rate", "-0.1"]),
        (with("learning_rate = 0.1", "learning_rate = inf"), &["optimizer.learning_rate"]),
        (with("learning_rate = 0.1", "learning_rate = 0.1\nmomentum = 1.5"), &["optimizer.momentum", "1.5"]),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\nclip = { global_norm = 0 }"),
            &["optimizer.clip.global_norm", "found 0"],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\nclip = { global_norm = 1, tensor_norm = 1 }"),
            &["optimizer.clip", "more than one"],
        ),
        (with("learning_rate = 0.1", "learning_rate = 0.1\nclip = 1.0"), &["optimizer.clip = { global_norm = 1.0 })"]),
        (with("learning_rate = 0.1", "learning_rate = 0.1\naccumulate = 0"), &["optimizer.accumulate", "found 0"]),
        (with("learning_rate = 0.1", "learning_rate = 0.1\nema = 1.0"), &["optimizer.ema", "found 1"]),
        (with("learning_rate = 0.1", "learning_rate = 0.1\nweight_decay = -1"), &["optimizer.weight_decay", "-1"]),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\ngroups = [{ pattern = \"(\" }]"),
            &["optimizer.groups[0].pattern", "regular expression"],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\ngroups = { pattern = \"nothing\" }"),
            &["expected an array of tables ([[optimizer.groups]], or optimizer.groups = [{ .. }])"],
        ),
        (
            with("learning_rate = 0.1", "learning_rate = 0.1\ngroups = [{ pattern = \"nothing\" }]"),
            &["optimizer.groups", "names no parameter"],
        ),
        (with("kind = \"cosine\"", "kind = \"cosin\""), &["schedule.kind", "did you mean cosine?"]),
        (with("kind = \"cosine\"", "warmup_steps = 9"), &["schedule.warmup_steps", "found 9", "4 steps"]),
        (with("kind = \"cosine\"", "floor = 3"), &["schedule.floor", "found 3"]),
        (with("kind = \"cosine\"", "kind = \"exponential\"\ngamma = 2.0"), &["schedule.gamma", "found 2"]),
        (with("kind = \"cosine\"", "kind = \"wsd\""), &["schedule.decay_steps", "missing"]),
        (
            with("kind = \"cosine\"", "kind = \"step\""),
            &["schedule.every_steps", "missing; expected a whole number of 1 or more, or milestones in its place"],
        ),
        (
            with("kind = \"cosine\"", "kind = \"step\"\nevery_steps = 2\nmilestones = [3]"),
            &["run.toml:15: schedule.every_steps: found both every_steps and milestones, expected one of them"],
        ),
        (format!("{GOOD}[checkpoint]\nkeep = 0\n"), &["checkpoint.keep", "found 0"]),
        (format!("{GOOD}[evaluate]\nbatches = 0\n"), &["evaluate.batches", "found 0"]),
        (format!("{GOOD}[evaluate]\nevery_steps = 1\nevery_epochs = 1\n"), &["evaluate.every_epochs", "both"]),
        (
            format!("{GOOD}[evaluate]\nevery_epochs = -1\n"),
            &["run.toml:16", "evaluate.every_epochs", "found -1, expected a number above 0, or 0"],
        ),
        (
            format!("{GOOD}[checkpoint]\nevery_epochs = -0.5\n"),
            &["run.toml:16", "checkpoint.every_epochs", "found -0.5"],
        ),
        (
            with("rule = \"momentum\"", "rule = \"adam\"\nepsilon = 1e-60"),
            &["optimizer.epsilon", "a number above 0 in f32 too"],
        ),
        (
            with("kind = \"cosine\"", "kind = \"one_cycle\"\nfinal_divisor = 0.5"),
            &["run.toml:15", "schedule.final_divisor", "found 0.5, expected a number of 1 or more"],
        ),
        (format!("{GOOD}[early_stopping]\n"), &["early_stopping.patience", "missing"]),
    ];
    assert!(cases.len() >= 60, "{}", cases.len());
    for (text, expected) in &cases {
        refused(folder.path(), text, &[], 2, expected);
    }
}

#[test]
fn wrong_flags_are_refused() {
    let folder = TempDir::new().unwrap();
    let cases: [(&[&str], &[&str]); 6] = [
        (&["--set", "optimizer.learning_rate"], &["--set", "no `=`"]),
        (&["--set", "=3"], &["--set", "names joined by points"]),
        (&["--set", "optimizer.lerning_rate=3"], &["--set optimizer.lerning_rate=3", "did you mean learning_rate?"]),
        (&["--set", "run.steps.more=3"], &["--set", "`run.steps` is 4"]),
        (&["--device", "cuda:99"], &["device = \"cpu\""]),
        (&["--threads", "0"], &["run.threads", "found 0"]),
    ];
    for (flags, expected) in cases {
        refused(folder.path(), GOOD, flags, 2, expected);
    }
    for arguments in [
        &["train"][..],
        &["trane", "run.toml"],
        &["train", "run.toml", "--resume", "--overwrite"],
        &["generate", "nowhere", "--tokens", "many"],
        &["predict", "nowhere"],
        &["completions", "klingon"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(!stderr(&output).contains("panicked"));
    }
    for (arguments, expected) in [
        (&["train", "no/such/run.toml"][..], "no/such/run.toml"),
        (&["eval", "no/such/run"], "no/such/run"),
        (&["predict", "no/such/run", "x.png"], "no/such/run"),
        (&["generate", "no/such/run"], "no/such/run"),
        (&["plot", "runs", "no/such/run"], "no/such/run"),
        (&["bench", "warp"], "found the suite \"warp\", expected device, update, kernel, step, data"),
        (&["generate", "no/such/run", "--temperature=-1"], "--temperature"),
    ] {
        let output = run(arguments);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(expected) && error.trim_end().lines().count() == 1, "{error}");
    }
}

#[test]
fn damaged_checkpoints_are_refused() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("run.toml");
    fs::write(&file, GOOD).unwrap();
    let out = folder.path().join("out");
    let (file, out_name) = (file.display().to_string(), out.display().to_string());
    let output = run(&["train", &file, "--quiet", "--out", &out_name]);
    assert!(output.status.success(), "{}", stderr(&output));
    let checkpoint = out.join("checkpoints/step-00000004");
    let damage = |name: &str, bytes: &[u8], expected: &str| {
        let path = checkpoint.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        for arguments in [&["eval", &out_name][..], &["train", &file, "--quiet", "--resume", "--out", &out_name]] {
            if arguments[0] == "eval" && name != "model.safetensors" {
                continue;
            }
            let output = run(arguments);
            let error = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{name}: {error}");
            assert!(error.contains(name) && error.contains(expected), "{error}");
            assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        }
        fs::write(&path, whole).unwrap();
    };
    let model = fs::read(checkpoint.join("model.safetensors")).unwrap();
    damage("model.safetensors", &model[..model.len() - 7], "cut short");
    damage("model.safetensors", b"", "cut short");
    damage("model.safetensors", &[0xff; 64], "damaged");
    damage("optimizer.safetensors", &model, "another model");
    damage("state.json", b"{}", "damaged");
    damage("state.json", b"not json", "damaged");
    let latest = out.join("checkpoints/latest");
    fs::write(&latest, "step-99999999\n").unwrap();
    let output = run(&["train", &file, "--quiet", "--resume", "--out", &out_name]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("step-99999999"));
    fs::write(&latest, "step-00000004\n").unwrap();
    fs::write(out.join("config.toml"), GOOD.replace("hidden = [8]", "hidden = [9]")).unwrap();
    let output = run(&["eval", &out_name]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("another model"), "{}", stderr(&output));
}

#[test]
fn a_training_that_diverges_fails_with_advice() {
    let folder = TempDir::new().unwrap();
    let text = GOOD
        .replace("steps = 4", "steps = 400\nmax_skipped_steps = 5")
        .replace("learning_rate = 0.1", "learning_rate = 1e30");
    refused(folder.path(), &text, &[], 1, &["not finite", "learning_rate"]);
}

#[test]
fn any_bytes_in_a_run_file_are_read_or_refused() {
    let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
    let strategy = proptest::collection::vec((0..GOOD.len(), proptest::num::u8::ANY), 0..6);
    runner
        .run(&(strategy, 0..GOOD.len() + 1), |(flips, cut)| {
            let mut bytes = GOOD.as_bytes().to_vec();
            for (at, value) in flips {
                bytes[at] = value;
            }
            bytes.truncate(cut.max(1));
            // Read or refused: what must not happen is a panic.
            if let Ok(text) = String::from_utf8(bytes) {
                let _ = warpstep::config::RunFile::from_text(&text, Path::new("run.toml"), &[]);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn any_bytes_in_a_checkpoint_or_a_record_are_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("run.toml");
    fs::write(&file, GOOD).unwrap();
    let out = folder.path().join("out");
    let output = run(&["train", &file.display().to_string(), "--quiet", "--out", &out.display().to_string()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let checkpoint = out.join("checkpoints/step-00000004");
    let files = [
        checkpoint.join("model.safetensors"),
        checkpoint.join("state.json"),
        out.join("metrics.jsonl"),
        out.join("summary.json"),
        out.join("preprocess.json"),
    ];
    let whole: Vec<Vec<u8>> = files.iter().map(|f| fs::read(f).unwrap()).collect();
    let mut runner = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
    // Most flips fall into the first bytes, where the structure is.
    let strategy = proptest::collection::vec((0usize..600, proptest::num::u8::ANY), 0..6);
    runner
        .run(&(0..files.len(), strategy, 0usize..4000), |(which, flips, cut)| {
            let mut bytes = whole[which].clone();
            for (at, value) in flips {
                let len = bytes.len();
                bytes[at % len] = value;
            }
            if cut % 2 == 0 {
                bytes.truncate(cut);
            }
            fs::write(&files[which], &bytes).unwrap();
            // Read or refused: what must not happen is a panic or an endless allocation.
            match which {
                0 => drop(warpstep::train::tensors::read(&files[0])),
                1 => drop(warpstep::train::checkpoint::read_state(&checkpoint)),
                2 => drop(warpstep::train::metrics::read_metrics(&files[2])),
                3 => drop(warpstep::train::summary::Summary::read(&files[3])),
                _ => drop(String::from_utf8(bytes).map(|text| warpstep::data::Preprocess::from_json(&text))),
            }
            fs::write(&files[which], &whole[which]).unwrap();
            Ok(())
        })
        .unwrap();
}
