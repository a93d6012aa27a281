//! What a user meets at the command line, apart from the training itself: outputs nobody reads, run folders, small mistakes.

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{has_emulated_device, run, stderr, stdout, tensor_hashes, warpstep, warpstep_apart};
use tempfile::TempDir;
use warpstep::backend::cuda::{emulated, is_driver_present};

const RUN: &str = r#"
[run]
steps = 4
device = "cpu"
[data]
format = "digits"
batch_size = 8
[model]
preset = "mlp"
hidden = [8]
[optimizer]
rule = "momentum"
learning_rate = 0.1
"#;

/// A folder with the run file `run.toml`, in which commands run.
struct Place(TempDir);

impl Place {
    fn new(text: &str) -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        place.write("run.toml", text);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn run_in(&self, folder: &str, arguments: &[&str]) -> Output {
        warpstep().args(arguments).current_dir(self.path(folder)).output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.run_in("", arguments)
    }

    /// Runs what must succeed; its output and what it printed as errors.
    fn good(&self, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        (stdout(&output), stderr(&output))
    }

    /// Runs what must be refused, with all of `expected` in it.
    fn refused(&self, arguments: &[&str], expected: &[&str]) -> String {
        let output = self.run(arguments);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        expected.iter().for_each(|word| assert!(error.contains(word), "{arguments:?}: no {word:?} in {error}"));
        error
    }
}

fn trained(text: &str) -> Place {
    let place = Place::new(text);
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    place
}

#[test]
fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one_sentence() {
    let place = trained(RUN);
    for arguments in [
        &["eval", "out", "--split", "train"][..],
        &["eval", "out", "--split", "train", "--json"],
        &["plot", "schedule", "run.toml"],
        &["plan", "run.toml"],
        &["data", "inspect", "run.toml"],
        &["train", "run.toml", "--dry-run"],
        &["verify-resume", "run.toml", "--steps", "3"],
    ] {
        let mut command = warpstep();
        command.args(arguments).current_dir(place.0.path()).stderr(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let gone = child.wait_with_output().unwrap();
        assert!(gone.status.success(), "{arguments:?}: {:?} {}", gone.status.signal(), stderr(&gone));
        let full = command.stdout(fs::File::options().write(true).open("/dev/full").unwrap()).output().unwrap();
        assert_eq!(full.status.code(), Some(1), "{arguments:?}");
        assert!(
            stderr(&full).starts_with("error: cannot write to standard output: No space left"),
            "{}",
            stderr(&full)
        );
        assert_eq!(stderr(&full).lines().count(), 1, "{}", stderr(&full));
    }
}

#[test]
fn the_run_folder_s_own_config_goes_on_with_its_run() {
    let place = Place::new(RUN);
    let train = ["train", "run.toml", "--quiet", "--out", "deep/out"];
    place.good(&train);
    let before = tensor_hashes(&place.path("deep/out"));
    // From where it was started, and from anywhere else.
    for (folder, file) in [("", "deep/out/config.toml"), ("deep/out", "config.toml")] {
        let output = place.run_in(folder, &["train", file, "--quiet", "--resume"]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output), "", "it found its checkpoint");
        assert!(!place.path("runs").exists() && !place.path("deep/out/runs").exists());
        assert!(!place.path("deep/out/deep").exists());
    }
    // A record made before the folder was written down.
    let record = place.path("deep/out/config.toml");
    let text = fs::read_to_string(&record).unwrap();
    let older = text.lines().map(|line| if line.starts_with("out =") { "out = \"runs/run\"" } else { line });
    fs::write(&record, older.collect::<Vec<_>>().join("\n")).unwrap();
    let (_, error) = place.good(&["train", "deep/out/config.toml", "--quiet", "--resume", "--out", "deep/out"]);
    assert_eq!(error, "");
    let (_, error) = place.good(&[&train[..], &["--resume"]].concat());
    assert_eq!(error, "");
    assert_eq!(tensor_hashes(&place.path("deep/out")), before);
}

#[test]
fn a_resume_of_nothing_says_so() {
    let place = Place::new(RUN);
    let (_, error) = place.good(&["train", "run.toml", "--quiet", "--resume", "--out", "new"]);
    assert_eq!(error, "no checkpoint in new: begins at step 0\n");
}

#[test]
fn a_resume_writes_over_nothing_that_is_not_this_run_s() {
    let place = Place::new(RUN);
    let train = ["train", "run.toml", "--quiet", "--resume", "--out", "out"];
    let others = ["config.toml", "report.html", "summary.json"];
    for name in others {
        let _ = fs::remove_dir_all(place.path("out"));
        fs::create_dir(place.path("out")).unwrap();
        place.write(&format!("out/{name}"), "mine");
        place.refused(&train, &["holds no checkpoint to go on from", "--out", "--overwrite"]);
        assert_eq!(fs::read_to_string(place.path("out").join(name)).unwrap(), "mine");
    }
    fs::remove_dir_all(place.path("out")).unwrap();
    place.good(&train);
    let change = |set: &'static str| [&train[..], &["--set", set]].concat();
    // With a checkpoint, and without one as a run leaves it that was killed early.
    let told = ["optimizer.learning_rate", "0.1", "0.2"];
    let error = place.refused(&change("optimizer.learning_rate=0.2"), &told);
    assert!(error.contains("was made with optimizer.learning_rate = 0.1, found 0.2"), "{error}");
    place.refused(&change("run.steps=8"), &["was made with run.steps = 4, found 8", "model.weights"]);
    fs::remove_dir_all(place.path("out/checkpoints")).unwrap();
    place.refused(&change("optimizer.learning_rate=0.2"), &told);
    // What changes no number makes no other run.
    place.good(&change("run.log_every_steps=2"));
}

#[test]
fn the_same_run_leaves_the_same_files() {
    let place = trained(RUN);
    let tensors = |out: &str| {
        let read = |name: &str| fs::read(place.path(out).join("checkpoints/step-00000004").join(name)).unwrap();
        ["model.safetensors", "optimizer.safetensors"].map(read)
    };
    let first = tensors("out");
    for again in ["second", "third", "fourth"] {
        place.good(&["train", "run.toml", "--quiet", "--out", again]);
        assert!(tensors(again) == first, "{again}: other bytes");
    }
}

#[test]
fn a_step_beyond_the_picture_is_one_to_its_end_and_costs_no_memory() {
    let layers = "[[model.layers]]\nkind = \"conv2d\"\nfilters = 3\nkernel = 2\nstride = STRIDE\n[[model.layers]]\nkind = \"flatten\"\n\
                  [[model.layers]]\nkind = \"linear\"";
    let text = RUN.replace("[model]\npreset = \"mlp\"\nhidden = [8]", layers);
    let place = Place::new(&text.replace("STRIDE", "[7, 7]"));
    place.write("far.toml", &text.replace("STRIDE", "[8, 4611686018427387904]"));
    place.good(&["train", "run.toml", "--quiet", "--out", "near"]);
    place.good(&["train", "far.toml", "--quiet", "--out", "far"]);
    assert_eq!(tensor_hashes(&place.path("near")), tensor_hashes(&place.path("far")));
}

#[test]
fn plots_go_where_links_and_pipes_lead() {
    let place = trained(RUN);
    place.write("real.svg", "old");
    std::os::unix::fs::symlink("real.svg", place.path("link.svg")).unwrap();
    place.good(&["plot", "runs", "out", "-o", "link.svg"]);
    assert!(place.path("link.svg").is_symlink());
    assert!(fs::read_to_string(place.path("real.svg")).unwrap().contains("<svg"));
    std::os::unix::fs::symlink("/dev/null", place.path("nothing.svg")).unwrap();
    place.good(&["plot", "runs", "out", "-o", "nothing.svg"]);
    assert!(place.path("nothing.svg").is_symlink() && !Path::new("/dev/null").is_file());
}

#[test]
fn more_processes_than_there_can_be_are_refused() {
    let place = Place::new(RUN);
    let many = ["--gpus", "4294967296", "--nodes", "4294967296"];
    place.refused(&[&["plan", "run.toml"][..], &many].concat(), &["expected at most"]);
    place.refused(&["plan", "run.toml", "--efficiency", "2"], &["--efficiency", "at most 1"]);
}

#[test]
fn weights_that_do_not_fit_name_the_key_and_what_to_write() {
    let place = trained(RUN);
    let weights = "model.weights=out/checkpoints/step-00000004/model.safetensors";
    let refused = |set: &[&'static str], expected: &[&str]| {
        for how in ["--quiet", "--dry-run"] {
            place.refused(&[&["train", "run.toml", how, "--out", "on", "--set"], set].concat(), expected);
        }
    };
    let advice = "give [model] the keys that the model in model.weights has";
    refused(&[weights, "--set", "model.hidden=[9]"], &["expected `2.weight` of shape [10, 9], found [10, 8]", advice]);
    // The nearest name is one that this model has: nothing is there in the place of what is missing.
    refused(&[weights, "--set", "model.hidden=[8, 10]"], &["expected tensor `4.", ", found none", advice]);
    refused(&["model.weights=out"], &["is a folder, expected a file; let model.weights name one"]);
    fs::write(place.path("theirs.bin"), b"PK\x03\x04 and so on").unwrap();
    refused(&["model.weights=theirs.bin"], &["theirs.bin: is a file of torch.save", "save_file"]);
    refused(&["model.weights=run.toml"], &["run.toml: expected a whole safetensors file", "another kind"]);
    let mut bytes = fs::read(place.path("out/checkpoints/step-00000004/model.safetensors")).unwrap();
    let at = bytes.windows(5).position(|bytes| bytes == b"\"F32\"").unwrap();
    bytes[at + 1] = b'I';
    fs::write(place.path("whole.safetensors"), bytes).unwrap();
    refused(&["model.weights=whole.safetensors"], &["in F32, F16, BF16 or F64, found it in I32"]);
    place.good(&["train", "run.toml", "--dry-run", "--set", weights]);
    // What goes on has weights of its own.
    place.good(&["train", "run.toml", "--dry-run", "--out", "out", "--resume", "--set", "model.weights=nowhere"]);
    // Of a checkpoint it is the run file that has to be the right one.
    let config = fs::read_to_string(place.path("out/config.toml")).unwrap();
    place.write("out/config.toml", &config.replace("hidden = [8]", "hidden = [9]"));
    place.refused(&["eval", "out", "--split", "train"], &["use the run file it was made with"]);
}

#[test]
fn folders_for_files_and_files_for_folders_are_told_what_to_name() {
    let place = trained(RUN);
    let own = format!("that of this run is {}", Path::new("out").join("config.toml").display());
    for command in [&["train"][..], &["data", "inspect"], &["plot", "schedule"], &["verify-resume"], &["plan"]] {
        place.refused(&[command, &["out"]].concat(), &["out: is a folder, expected a run file", &own]);
    }
    place.refused(&["train", "."], &["is a folder, expected a run file; name one within it"]);
    let expected = ["run.toml: holds no metrics.jsonl; expected a run folder"];
    place.refused(&["plot", "runs", "run.toml"], &expected);
    let expected = ["run.toml: holds no checkpoint; expected a run folder"];
    for command in [&["eval", "run.toml"][..], &["generate", "run.toml"], &["predict", "run.toml", "-"]] {
        place.refused(command, &expected);
    }
}

#[test]
fn numbers_on_the_command_line_are_refused_in_words() {
    let place = Place::new(RUN);
    for (arguments, expected) in [
        (&["train", "run.toml", "--threads", "two"][..], "a whole number of 0 or more"),
        (&["train", "run.toml", "--threads", "-2"], "a whole number of 0 or more"),
        (&["generate", "out", "--tokens", "ten"], "a whole number of 0 or more"),
        (&["generate", "out", "--tokens", "-1"], "a whole number of 0 or more"),
        (&["generate", "out", "--seed", "x"], "a whole number of 0 or more"),
        (&["generate", "out", "--temperature", "hot"], "a number, as in 0.5"),
        (&["verify-resume", "run.toml", "--steps", "1.5"], "a whole number of 0 or more"),
        (&["plan", "run.toml", "--gpus", "-1"], "a whole number of 0 or more"),
        (&["plan", "run.toml", "--network", "fast"], "a number, as in 0.5"),
    ] {
        let (value, name) = (arguments[arguments.len() - 1], arguments[arguments.len() - 2]);
        place.refused(arguments, &[&format!("invalid value '{value}' for '{name}"), &format!("expected {expected}")]);
    }
}

#[test]
fn tables_of_the_help_keep_a_line_a_row() {
    let place = Place::new(RUN);
    let rows = |arguments: &[&str], first: &str| {
        let told = place.good(arguments).0;
        let table = told.split_once(first).unwrap_or_else(|| panic!("no {first:?} in {told}")).1;
        let lines: Vec<String> = table.lines().skip(1).take_while(|line| !line.is_empty()).map(str::to_owned).collect();
        lines
    };
    for (arguments, first, count) in [
        (&["bench", "--help"][..], "Suites:", 5),
        (&["bench", "--help"], "other suites:", 2),
        (&["plan", "--help"], "Examples:", 3),
    ] {
        let found = rows(arguments, first);
        assert_eq!(found.len(), count, "{found:#?}");
        assert!(found.iter().all(|line| line.starts_with("  ") && line.chars().count() <= 85), "{found:#?}");
    }
}

#[test]
fn predict_reads_a_table_from_standard_input_and_names_the_features_it_expects() {
    let csv = RUN.replace(
        "format = \"digits\"",
        "format = \"csv\"\npath = \"rows.csv\"\ntarget = \"y\"\nfeatures = [\"a\", \"b\"]",
    );
    let place = Place::new(&csv);
    let rows: String = (0..40).map(|i| format!("{i},no number,{},{}\n", i % 5, i % 2)).collect();
    place.write("rows.csv", &format!("a,other,b,y\n{rows}"));
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    place.write("new.csv", "1,2\n3,4\n");
    let from_file = place.good(&["predict", "out", "new.csv", "--json"]).0;
    assert_eq!(from_file.lines().count(), 2);
    let mut command = warpstep();
    command.args(["predict", "out", "-", "--json"]).current_dir(place.0.path());
    let piped = command.stdin(fs::File::open(place.path("new.csv")).unwrap()).output().unwrap();
    assert!(piped.status.success(), "{}", stderr(&piped));
    assert_eq!(stdout(&piped), from_file.replace("new.csv:", "-:"));
    place.write("new.csv", "1,2,3\n");
    let expected = "line 1: found 3 cells, expected the 2 features (a, b), or all 4 columns of the training table";
    place.refused(&["predict", "out", "new.csv"], &[expected]);
}

#[test]
fn a_resume_needs_no_file_of_initial_weights() {
    let place = trained(RUN);
    fs::copy(place.path("out/checkpoints/step-00000004/model.safetensors"), place.path("w.safetensors")).unwrap();
    let train = ["train", "run.toml", "--quiet", "--set", "model.weights=w.safetensors", "--out", "second"];
    place.good(&train);
    fs::remove_file(place.path("w.safetensors")).unwrap();
    place.good(&[&train[..], &["--resume"]].concat());
    place.refused(&[&train[..], &["--overwrite"]].concat(), &["w.safetensors"]);
}

#[test]
fn the_cause_of_a_refused_file_is_told_once() {
    let place = Place::new(RUN);
    let error = place.refused(&["train", "missing.toml"], &["cannot read missing.toml: No such file"]);
    assert_eq!(error.matches("No such file").count(), 1, "{error}");
    place.write("file", "");
    for launch in [&[][..], &["launch", "--gpus", "1", "--"]] {
        let arguments = [launch, &["train", "run.toml", "--out", "file"]].concat();
        let error = place.refused(&arguments, &["--out: file is a file, expected a folder"]);
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn verify_resume_takes_the_first_steps_of_any_run_on_the_device_that_is_asked_for() {
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits.toml").display().to_string();
    let output = run(&["verify-resume", &digits, "--device", "cpu"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.starts_with("CPU, ") && text.lines().next().unwrap().ends_with("f32"), "{text}");
    assert!(
        text.contains("\n30 of 1560 steps; the second run was stopped at micro-batch 20, resumed from step 20"),
        "{text}"
    );
    let place = Place::new(RUN);
    // Shorter than is asked for, in an order that several processes could share, and with steps that make no thirds.
    let parts = ["--set", "run.reproducible=true", "--set", "run.steps=9"];
    for (more, said) in [
        (&[][..], "4 of 4 steps; the second run was stopped at micro-batch 2, resumed from step 2"),
        (&["--steps", "5", parts[0], parts[1], parts[2], parts[3]], "6 of 9 steps"),
    ] {
        let (text, _) = place.good(&[&["verify-resume", "run.toml"][..], more].concat());
        assert!(text.contains(said) && text.contains("tensors have the same bits"), "{text}");
    }
    if has_emulated_device() {
        let mut command = warpstep_apart();
        command.args(["verify-resume", "run.toml", "--steps", "3", "--device", "emulated"]);
        let output = command.args(["--set", "run.precision=bf16"]).current_dir(place.0.path()).output().unwrap();
        let text = stdout(&output);
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(text.lines().next().unwrap().ends_with("bf16") && text.contains("same bits"), "{text}");
    }
}

#[test]
fn eval_reads_a_run_whose_parameters_were_in_bf16_alone() {
    if !has_emulated_device() {
        return;
    }
    let place = Place::new(RUN);
    let bf16 = ["--set", "run.precision=bf16", "--set", "optimizer.master=false"];
    let train = ["train", "run.toml", "--quiet", "--device", "emulated", "--out", "out"];
    let output = warpstep_apart().args(train).args(bf16).current_dir(place.0.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let (text, _) = place.good(&["eval", "out", "--split", "train"]);
    assert!(text.starts_with("train  "), "{text}");
    // By its name alone, where it lies.
    let output = place.run_in("out/checkpoints", &["eval", "step-00000004", "--split", "train"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn one_of_two_keys_overrides_the_other() {
    let place = Place::new(&format!("{}[evaluate]\nevery_epochs = 1\n", RUN.replace("steps = 4", "epochs = 1")));
    let steps = ["--set", "run.steps=2", "--set", "evaluate.every_steps=1"];
    let train = ["train", "run.toml", "--quiet", "--out", "out"];
    place.good(&[&train[..], &steps].concat());
    assert!(place.path("out/checkpoints/step-00000002").is_dir());
    place.refused(&[&train[..], &steps, &["--set", "run.epochs=2"]].concat(), &["both steps and epochs"]);
}

#[test]
fn a_profile_that_saw_too_little_fails_no_run() {
    let place = Place::new(RUN);
    let train = ["train", "run.toml", "--quiet", "--set", "run.steps=2", "--profile", "--out", "out"];
    let (_, error) = place.good(&train);
    assert!(error.starts_with("no profile: ") && error.contains("found 2 micro-batches"), "{error}");
}

#[test]
fn small_mistakes_are_answered_in_kind() {
    let place = trained(RUN);
    place.refused(&["data", "inspect", "run.toml", "--device", "cuda"], &["unexpected argument '--device'"]);
    place.refused(&["plot", "schedule", "run.toml", "--device", "cuda"], &["unexpected argument '--device'"]);
    place.refused(&["predict", "out", "x.png", "--top", "0"], &["expected a whole number of 1 or more"]);
    place.refused(&["train", "run.toml", "--profile", "0"], &["expected a whole number of 1 or more"]);
    place.refused(&["launch", "--gpus", "0", "--", "train", "run.toml"], &["expected a whole number of 1 or more"]);
    for wrong in ["-1", "NaN", "inf"] {
        let told = format!("--temperature: found {wrong}, expected a finite number of 0 or more");
        place.refused(&["generate", "out", "--temperature", wrong], &[&told]);
    }
    place.refused(&["plan", "run.toml", "--network", "-1"], &["--network: found -1, expected a number above 0"]);
    place.refused(&["plan", "run.toml", "--gpus", "16"], &["multiple of 16", "--set data.batch_size=16"]);
    place.refused(
        &["train", "run.toml", "--dry-run", "--set", "data.batch_size=4611686018427387904"],
        &["data.batch_size: found 4611686018427387904, expected 4294967295 samples at most"],
    );
    place.good(&["plot", "schedule", "run.toml", "--set", "run.steps=9000000000000000000"]);
}

#[test]
fn nothing_to_judge_by_and_a_prompt_out_of_the_vocabulary_are_refused() {
    let rows: String = (0..40).map(|i| format!("{i},{},{}\n", i % 5, i % 2)).collect();
    let csv = RUN
        .replace("format = \"digits\"", "format = \"csv\"\npath = \"rows.csv\"\ntarget = \"y\"")
        .replace("hidden = [8]", "hidden = [4]");
    let place = Place::new(&csv);
    place.write("rows.csv", &format!("a,b,y\n{rows}"));
    place.write("empty.csv", "a,b\n");
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    place.refused(&["eval", "out"], &["no test and no validation split", "--split train"]);
    let best = ["eval", "out", "--split", "train", "--checkpoint", "best"];
    place.refused(&best, &["holds no best checkpoint", "a validation split", "--checkpoint latest"]);
    place.refused(&["predict", "out", "--text", ""], &["--text: "]);
    place.refused(&["predict", "out", "empty.csv"], &["empty.csv: "]);
    // Files are read and told of one after the other, so that many of them need no more memory than one.
    place.write("one.csv", "a,b\n1,2\n");
    let output = place.run(&["predict", "out", "one.csv", "empty.csv"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("one.csv") && stdout(&output).lines().count() == 1, "{}", stdout(&output));

    let gpt = RUN
        .replace(
            "format = \"digits\"",
            "format = \"text\"\npath = \"text.txt\"\ntokenizer = \"characters\"\ncontext = 8",
        )
        .replace("preset = \"mlp\"\nhidden = [8]", "preset = \"gpt\"\nlayers = 1\nheads = 1\nwidth = 8");
    let place = Place::new(&gpt);
    place.write("text.txt", &"to be or not to be\n".repeat(30));
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    let at = |temperature: &str| {
        place.good(&["generate", "out", "--prompt", "to", "--tokens", "20", "--temperature", temperature]).0
    };
    // Logits over it are more than f32 has.
    assert_eq!(at("1e-50"), at("0"));
    place.refused(&["generate", "out", "--prompt", "É"], &["error: --prompt: line 1 has the character 'É'"]);
}

#[test]
fn a_model_of_tokens_that_stand_for_no_known_text_says_so_wherever_it_is_asked() {
    let place = Place::new(
        &RUN.replace("format = \"digits\"", "format = \"tokens\"\npath = \"all.bin\"\nvocabulary = 7\ncontext = 4")
            .replace("preset = \"mlp\"\nhidden = [8]", "preset = \"gpt\"\nlayers = 1\nheads = 1\nwidth = 8"),
    );
    let tokens: Vec<u8> = (0..200u16).flat_map(|i| (i * i % 7).to_le_bytes()).collect();
    fs::write(place.path("all.bin"), tokens).unwrap();
    place.write("row.txt", "1 2 3\n");
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    for arguments in [&["generate", "out"][..], &["predict", "out", "row.txt"], &["predict", "out", "--text", "1"]] {
        let error = place.refused(arguments, &["what its 7 tokens stand for is not known", "`warpstep eval`"]);
        assert!(
            !error.contains("generate") && !error.contains("predict`"),
            "another that refuses it is named: {error}"
        );
    }
    place.good(&["eval", "out", "--split", "train"]);
}

#[test]
fn a_gpt_of_any_width_between_its_linear_layers_is_read_as_it_was_written() {
    let gpt = RUN
        .replace("format = \"digits\"", "format = \"text\"\npath = \"text.txt\"\ncontext = 8")
        .replace("preset = \"mlp\"\nhidden = [8]", "preset = \"gpt\"\nlayers = 2\nheads = 2\nwidth = 8");
    for more in
        ["hidden = 8", "hidden = 8\nkv_heads = 1\nbias = true", "hidden = 4\nactivation = \"swiglu\"", "hidden = 24"]
    {
        let place = Place::new(&gpt.replace("width = 8", &format!("width = 8\n{more}")));
        place.write("text.txt", &"to be or not to be\n".repeat(30));
        place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
        place.good(&["eval", "out", "--split", "train"]);
        place.good(&["generate", "out", "--tokens", "3"]);
        let weights = "model.weights=out/checkpoints/step-00000004/model.safetensors";
        place.good(&["train", "run.toml", "--quiet", "--out", "on", "--set", weights]);
    }
}

#[test]
fn layers_that_see_the_token_they_are_to_tell_are_refused() {
    let layers = |attention: &str| {
        let model = format!(
            "[[model.layers]]\nkind = \"embedding\"\nwidth = 8\n[[model.layers]]\nkind = \"residual\"\n\
             layers = [{{ kind = \"layer_norm\" }}, {{ {attention} }}]\n[[model.layers]]\nkind = \"linear\""
        );
        let text = RUN.replace("[model]\npreset = \"mlp\"\nhidden = [8]", &model);
        let place =
            Place::new(&text.replace("format = \"digits\"", "format = \"text\"\npath = \"text.txt\"\ncontext = 8"));
        place.write("text.txt", &"to be or not to be\n".repeat(30));
        place
    };
    let train = ["train", "run.toml", "--quiet", "--out", "out"];
    for attention in ["kind = \"attention\", heads = 2", "kind = \"attention\", heads = 2, causal = false"] {
        let told = "model.layers[1].layers[1].causal: found false, expected true with data of text or tokens";
        layers(attention).refused(&train, &[told]);
    }
    layers("kind = \"attention\", heads = 2, causal = true").good(&train);
}

#[test]
fn outputs_that_are_not_finite_are_no_predictions() {
    let text = RUN
        .replace("format = \"digits\"", "format = \"inline\"\ninputs = [[1000], [2000]]\ntargets = TARGETS")
        .replace("preset = \"mlp\"\nhidden = [8]", "preset = \"linear\"\nzero_init = false\nloss = LOSS")
        .replace("batch_size = 8", "batch_size = 2");
    for (targets, loss) in [("[1, 2]", "mean_squared_error"), ("[\"a\", \"b\"]", "cross_entropy")] {
        let text = text.replace("TARGETS", targets).replace("LOSS", &format!("\"{loss}\""));
        let place = Place::new(&text.replace("learning_rate = 0.1", "learning_rate = 1e38"));
        let output = place.run(&["train", "run.toml", "--quiet", "--out", "out"]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        for more in [&[][..], &["--json"]] {
            let output = place.run(&[&["predict", "out", "--text", "1000"][..], more].concat());
            assert_eq!(output.status.code(), Some(1), "{loss}: {}", stdout(&output));
            assert!(
                stderr(&output).starts_with("error: --text:1: the model's outputs are not finite"),
                "{}",
                stderr(&output)
            );
            assert!(output.stdout.is_empty(), "{}", stdout(&output));
        }
    }
}

#[test]
fn runs_of_one_name_are_told_apart_in_a_plot() {
    let place = trained(RUN);
    place.good(&["train", "run.toml", "--quiet", "--out", "first/out"]);
    place.good(&["train", "run.toml", "--quiet", "--out", "second/other"]);
    place.good(&["plot", "runs", "out", "first/out", "second/other", "second/../out", "-o", "names.svg"]);
    let text = fs::read_to_string(place.path("names.svg")).unwrap();
    for name in ["out, train", "first/out, train", "other, train", "second/../out, train"] {
        assert!(text.contains(&format!("\n{name}\n")), "{name}");
    }
    let within = place.run_in("out", &["plot", "runs", ".", "../first/out", "-o", "here.svg"]);
    assert!(within.status.success(), "{}", stderr(&within));
    assert!(fs::read_to_string(place.path("out/here.svg")).unwrap().contains("\n., train\n"));
}

/// Launches `RUN` on `device`, which must be refused in one sentence before anything is started.
fn not_launched(gpus: &str, device: &str, environment: &[(&str, &std::ffi::OsStr)], expected: &str) {
    let place = Place::new(&RUN.replace("device = \"cpu\"", &format!("device = \"{device}\"")));
    let mut command = warpstep_apart();
    command.args(["launch", "--gpus", gpus, "--", "train", "run.toml", "--out", "out"]).current_dir(place.path(""));
    let output = command.envs(environment.iter().copied()).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert_eq!(stderr(&output), format!("error: launch --gpus {gpus}: {expected}\n"));
    assert!(!place.path("out").exists(), "{device}: there are outputs of processes");
}

#[test]
fn launch_for_gpus_that_are_not_there_says_so_once_and_starts_nothing() {
    let on_cpus = "`warpstep launch --cpus 2` starts processes on CPUs";
    not_launched("2", "cpu", &[], &format!("the device is the CPU; {on_cpus}"));
    let devices = ("WARPSTEP_EMULATOR_DEVICES", "2".as_ref());
    let fewer = "there are 2 GPUs by WARPSTEP_EMULATOR_DEVICES=2; expected --gpus 2 at most";
    not_launched("3", "emulated", &[devices], fewer);
    if is_driver_present() {
        println!("skipped: there is an NVIDIA driver");
        return;
    }
    for device in ["auto", "cuda"] {
        not_launched("2", device, &[], &format!("no NVIDIA driver was found; {on_cpus}"));
    }
    // A driver that knows two devices, of which one is hidden at last.
    let Some(library) = emulated::find_library() else {
        println!("skipped: the emulator was not built");
        return;
    };
    let drivers = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(library.canonicalize().unwrap(), drivers.path().join("libcuda.so")).unwrap();
    let (path, mark) = (drivers.path().as_os_str(), drivers.path().as_os_str());
    let environment = [devices, ("LD_LIBRARY_PATH", path), ("WARPSTEP_EMULATED", mark)];
    not_launched("3", "cuda", &environment, "there are 2 GPUs; expected --gpus 2 at most");
    let fewer = "there is 1 GPU by CUDA_VISIBLE_DEVICES=1; expected --gpus 1 at most";
    let environment = [&environment[..], &[("CUDA_VISIBLE_DEVICES", "1".as_ref())]].concat();
    not_launched("2", "cuda", &environment, fewer);
}

/// A table of two columns whose classes a line divides; `rows` of them from row `first` on.
fn table(first: usize, rows: usize, offset: f64) -> String {
    let row = |i: usize| {
        let (a, b) = ((i * 7 % 11) as f64 - 5.0, (i * 5 % 13) as f64 - 6.0);
        format!("{},{b},{}\n", a + offset, if a + b > 0.0 { "up" } else { "down" })
    };
    (first..first + rows).map(row).collect()
}

/// A run of a format whose splits have files of their own.
fn own_files(data: &str, model: &str) -> String {
    format!(
        "[run]\nsteps = 20\ndevice = \"cpu\"\n[data]\nbatch_size = 4\n{data}\n[model]\n{model}\n[optimizer]\n\
         rule = \"adam\"\nlearning_rate = 0.05\n"
    )
}

#[test]
fn a_split_with_a_file_of_its_own_is_evaluated_as_the_model_was_trained_whatever_became_of_the_training_file() {
    let csv = "format = \"csv\"\npath = \"train.txt\"\ntest = \"test.txt\"\nnormalize = \"dataset\"\nheader = false";
    let lines = "format = \"lines\"\npath = \"train.txt\"\ntest = \"test.txt\"\nmin_count = 1";
    let text = "format = \"text\"\npath = \"train.txt\"\ntest = \"test.txt\"\ncontext = 4";
    let line = |i: usize| if i.is_multiple_of(2) { "pos\ta good good film\n" } else { "neg\tan awful bad film\n" };
    let labelled: String = (0..12).map(line).collect();
    let cases = [
        (csv, "preset = \"linear\"", table(0, 40, 3.0), table(50, 20, 3.0), table(0, 30, 90.0) + "5,5,sideways\n"),
        (
            lines,
            "preset = \"text_cnn\"\nwidth = 4\nfilters = 4\nkernels = [1, 2]",
            labelled.clone(),
            labelled.clone(),
            "pos\tbad bad bad bad bad bad bad\nneutral\tthe film\n".to_owned(),
        ),
        (
            text,
            "preset = \"gpt\"\nlayers = 1\nheads = 1\nwidth = 8",
            "abcabcabcabcabcabcabc\n".repeat(9),
            "abcabc\n".repeat(4),
            "0123 ABC\n".to_owned(),
        ),
    ];
    for (data, model, train, test, more) in cases {
        let place = Place::new(&own_files(data, model));
        place.write("train.txt", &train);
        place.write("test.txt", &test);
        place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
        let (before, _) = place.good(&["eval", "out", "--json"]);
        place.good(&["eval", "out", "--split", "train"]);
        place.write("train.txt", &(train.clone() + &more));
        let (after, _) = place.good(&["eval", "out", "--json"]);
        assert_eq!(after, before, "{data}");
        let expected =
            ["data.path", "train.txt is not what the model was trained on", "in the training split, expected"];
        place.refused(&["eval", "out", "--split", "train"], &expected);
        place.refused(&["train", "run.toml", "--quiet", "--out", "out", "--resume"], &expected);
        place.write("train.txt", &train);
        place.good(&["train", "run.toml", "--quiet", "--out", "out", "--resume"]);
    }
}

#[test]
fn a_split_that_is_taken_from_data_that_changed_is_refused() {
    let data =
        "format = \"csv\"\npath = \"train.txt\"\nnormalize = \"dataset\"\nheader = false\nsplit = { test = 0.25 }";
    let place = Place::new(&own_files(data, "preset = \"linear\""));
    place.write("train.txt", &table(0, 40, 0.0));
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    place.good(&["eval", "out"]);
    place.write("train.txt", &table(0, 44, 0.0));
    place.refused(&["eval", "out"], &["data.path", "found 33 samples in the training split, expected 30"]);
    // As many samples, of other values.
    place.write("train.txt", &table(0, 40, 100.0));
    let changed = ["data.path", "another mean or deviation", "channel 0"];
    place.refused(&["eval", "out"], &changed);
    place.refused(&["train", "run.toml", "--quiet", "--out", "out", "--resume"], &changed);
}

#[test]
fn every_preset_of_texts_learns_two_classes_by_either_loss() {
    let data = "format = \"lines\"\npath = \"train.txt\"\nmin_count = 1";
    for preset in ["text_cnn\"\nfilters = 4\nkernels = [1, 2]", "text_encoder\"\nlayers = 1\nheads = 2"] {
        for loss in ["cross_entropy", "binary_cross_entropy"] {
            let model = format!("preset = \"{preset}\nwidth = 8\ndropout = 0.0\nloss = \"{loss}\"");
            let place = Place::new(&own_files(data, &model).replace("steps = 20", "steps = 150"));
            let line =
                |i: usize| if i.is_multiple_of(2) { "pos\ta good good film\n" } else { "neg\tan awful bad film\n" };
            place.write("train.txt", &(0..8).map(line).collect::<String>());
            place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
            let (scores, _) = place.good(&["eval", "out", "--split", "train", "--json"]);
            assert!(scores.contains("\"accuracy\":1.0"), "{preset} {loss}: {scores}");
            let (told, _) = place.good(&["predict", "out", "--text", "a good film"]);
            assert!(told.contains("pos "), "{preset} {loss}: {told}");
        }
    }
}

#[test]
fn a_run_none_of_whose_steps_counted_fails_and_weights_that_are_not_finite_are_refused() {
    // Squares of these are above all that f32 has.
    let data = "format = \"csv\"\npath = \"train.txt\"\nheader = false\ntarget_type = \"real\"";
    let place = Place::new(&own_files(data, "preset = \"linear\""));
    place.write("train.txt", "1,1e38\n2,-1e38\n3,2e38\n4,1e38\n5,1e38\n");
    let output = place.run(&["train", "run.toml", "--quiet", "--out", "out"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("all 20 steps were not finite"), "{}", stderr(&output));
    assert!(place.path("out/summary.json").is_file());

    let place = trained(RUN);
    let weights = fs::read_dir(place.path("out/checkpoints")).unwrap().find_map(|entry| {
        let file = entry.unwrap().path().join("model.safetensors");
        file.is_file().then_some(file)
    });
    let mut bytes = fs::read(weights.unwrap()).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(place.path("broken.safetensors"), bytes).unwrap();
    for how in ["--quiet", "--dry-run"] {
        let arguments = ["train", "run.toml", how, "--out", "again", "--set", "model.weights=broken.safetensors"];
        place.refused(&arguments, &["broken.safetensors", "of the tensor `", "is NaN, expected finite numbers"]);
    }
}

#[test]
fn a_training_whose_losses_are_not_finite_at_its_end_says_so_and_fails_whenever_it_is_asked() {
    let train = ["train", "run.toml", "--quiet", "--out", "out"];
    let failed = |place: &Place, arguments: &[&str], expected: &str| {
        let output = place.run(arguments);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.starts_with(&format!("error: {expected}")) && error.lines().count() == 1, "{error}");
        error
    };
    let far = |steps: u32| {
        Place::new(&RUN.replace("steps = 4", &format!("steps = {steps}")).replace("rate = 0.1", "rate = 1e30"))
    };
    let place = far(30);
    let error = failed(&place, &train, "the training loss was not finite from step 2 on, to the end at step 30: lower");
    assert!(error.contains("optimizer.clip") && error.contains("run.precision"), "{error}");
    assert!(place.path("out/summary.json").is_file() && place.path("out/report.html").is_file());
    // The run has ended: to go on with it is no success either.
    failed(&place, &[&train[..], &["--resume"]].concat(), "the training loss was not finite from step 2 on");
    // What only the last update did is seen in what is evaluated after it.
    failed(&far(1), &train, "the test loss after the last step, 1, was not finite: lower optimizer.learning_rate");
}

#[test]
fn losses_that_are_not_finite_for_a_while_are_no_failure_and_at_the_end_cost_no_checkpoint_of_before() {
    let place = Place::new(
        "[run]\nsteps = 12\ndevice = \"cpu\"\n[data]\nformat = \"csv\"\npath = \"train.csv\"\nvalidation = \"validation.csv\"\n\
         batch_size = 1\nsampling = \"sequential\"\n[model]\npreset = \"linear\"\n[optimizer]\nrule = \"sgd\"\nlearning_rate = 0.1\n\
         [evaluate]\nevery_steps = 2\n[checkpoint]\nevery_steps = 1\n",
    );
    // The square of such a target is above all that f32 has: these steps are skipped.
    let rows = |wrong: std::ops::Range<usize>| -> String {
        let row = |step: usize| if wrong.contains(&step) { "1,3e38\n" } else { "1,1\n" };
        (1..=12).map(row).collect::<String>()
    };
    place.write("validation.csv", "x,y\n1,1\n");
    place.write("train.csv", &format!("x,y\n{}", rows(4..7)));
    place.good(&["train", "run.toml", "--quiet", "--out", "recovered"]);
    place.write("train.csv", &format!("x,y\n{}", rows(7..13)));
    let output = place.run(&["train", "run.toml", "--quiet", "--out", "out"]);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for expected in ["from step 7 on, to the end at step 12", "the best checkpoint, of step 6, stays"] {
        assert!(error.contains(expected), "{error}");
    }
    let checkpoints = place.path("out/checkpoints");
    assert_eq!(fs::read_to_string(checkpoints.join("best")).unwrap().trim(), "step-00000006");
    assert!(checkpoints.join("step-00000005").is_dir(), "one from before the losses went wrong was removed");
}

#[test]
fn a_model_that_the_host_has_no_memory_for_is_refused_in_one_sentence() {
    let place = Place::new(&RUN.replace("[8]", "[10000, 10000]"));
    // The parameters, 400 MB, find room, as much again for their gradients does not. Arenas of threads would take some of it.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 700000; exec \"$0\" \"$@\""]).arg(warpstep().get_program());
    command.args(["train", "run.toml", "--quiet", "--threads", "1", "--out", "out"]).env("MALLOC_ARENA_MAX", "1");
    let output = command.current_dir(place.0.path()).output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{:?}: {error}", output.status.signal());
    for part in ["not enough memory: 38", "MiB were asked for", "MiB are free", "the model smaller"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn a_group_whose_parameters_all_belong_to_groups_before_it_is_told_so() {
    let group = |pattern: &str| format!("[[optimizer.groups]]\npattern = '{pattern}'\nweight_decay = 0.5\n");
    let place = Place::new(&(RUN.to_owned() + &group("weight|bias") + &group("^0")));
    let told = place.refused(
        &["train", "run.toml", "--out", "out"],
        &["`^0`", "groups before it", "`weight|bias`", "put it before"],
    );
    assert!(!told.contains("names no parameter"), "{told}");
    let place = Place::new(&(RUN.to_owned() + &group("^9")));
    place.refused(&["train", "run.toml", "--out", "out"], &["`^9`, which names no parameter"]);
}

#[test]
fn a_logistic_regression_of_values_says_so_at_the_start() {
    let data = "format = \"csv\"\npath = \"train.txt\"\nheader = false";
    let place = Place::new(&own_files(data, "preset = \"logistic\""));
    place.write("train.txt", "1,0\n2,0\n3,1\n4,1\n5,1\n");
    let (_, told) = place.good(&["train", "run.toml", "--quiet", "--out", "values"]);
    assert!(told.contains("read as values") && told.contains("data.target_type = \"class\""), "{told}");
    let classes = ["train", "run.toml", "--quiet", "--out", "classes", "--set", "data.target_type=class"];
    assert_eq!(place.good(&classes).1, "");
}

#[test]
fn values_of_binary_cross_entropy_are_from_0_to_1_in_the_data_and_in_predictions() {
    let data = "format = \"csv\"\npath = \"train.txt\"\nheader = false\ntest = \"test.txt\"";
    let text = own_files(data, "preset = \"linear\"\nloss = \"binary_cross_entropy\"");
    let place = Place::new(&text.replace("steps = 20", "steps = 2000"));
    place.write("train.txt", "-2,0.1\n-1,0.3\n1,0.7\n2,0.9\n");
    place.write("test.txt", "0,0.5\n");
    place.good(&["train", "run.toml", "--quiet", "--out", "out"]);
    let (told, _) = place.good(&["predict", "out", "--text", "-2\n0\n2", "--json"]);
    let values: Vec<f64> = told
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["values"][0].as_f64().unwrap())
        .collect();
    for (value, expected) in values.iter().zip([0.1, 0.5, 0.9]) {
        assert!((value - expected).abs() < 0.05, "{values:?}");
    }
    place.write("test.txt", "0,0.5\n1,1.5\n");
    let expected = ["test.txt: line 2, column 2", "found the target 1.5", "from 0 to 1", "mean_squared_error"];
    place.refused(&["train", "run.toml", "--quiet", "--out", "again"], &expected);
    let inline = "format = \"inline\"\ninputs = [1, 2, 3, 4]\ntargets = [0, 1, -1, 0]";
    let place = Place::new(&own_files(inline, "preset = \"linear\"\nloss = \"binary_cross_entropy\""));
    place.refused(&["train", "run.toml", "--quiet", "--out", "out"], &["data.targets", "row 2", "found the target -1"]);
}
