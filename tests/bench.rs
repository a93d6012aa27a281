//! `warpstep bench`: figures, the table, the JSON; on the CPU, and on the emulated device, whose figures are never to be quoted.

mod common;

use common::{run, stderr, stdout};
use tempfile::TempDir;
use warpstep::backend::cuda::{emulated, is_embedded};
use warpstep::backend::profile::Kind;
use warpstep::bench::layers::cases;
use warpstep::bench::place::Place;
use warpstep::bench::results::{FORMAT, Figure, Machine, Results};
use warpstep::bench::run::{Observer, Pattern, Request, run as take};
use warpstep::bench::speeds::Speeds;

/// Calls `bench` and reads what it found.
fn bench(arguments: &[&str]) -> Results {
    let mut all = vec!["bench"];
    all.extend(arguments);
    all.extend(["--json", "-"]);
    let ran = run(&all);
    assert!(ran.status.success(), "{}", stderr(&ran));
    serde_json::from_str(&stdout(&ran)).unwrap_or_else(|error| panic!("{error} in {}", stdout(&ran)))
}

fn figure<'a>(results: &'a Results, name: &str) -> &'a Figure {
    let found = results.figures.iter().find(|figure| format!("{}/{}", figure.suite, figure.name) == name);
    found.unwrap_or_else(|| panic!("no {name} in {:?}", results.figures))
}

#[test]
fn every_suite_names_its_figures_and_what_means_none_is_refused() {
    let listed = run(&["bench", "--list", "--device", "cpu", "device", "update", "kernel", "step", "data"]);
    assert!(listed.status.success(), "{}", stderr(&listed));
    let text = stdout(&listed);
    for name in [
        "device/copy/memory",
        "device/product/128x784x256/f32",
        "device/fork_join",
        "update/momentum+global_norm/50M/f32",
        "update/lamb+adaptive/50M/f32",
        "update/adamw+global_norm/1558M/f32",
        "kernel/attention/12x64x384_4of4_heads/backward/f32",
        "kernel/rotary/4x256x1280_16of20_heads/backward/f32",
        "kernel/log_mel/128x8000/forward/f32",
        "step/mlp",
        "step/resnet18",
        "step/gpt2",
        "data/open/images",
        "data/feed/tokens/2_threads",
    ] {
        assert!(text.lines().any(|line| line == name), "{name} in {text}");
    }
    for family in ["kernel/cross_entropy/", "kernel/mean_squared_error/", "kernel/add/", "kernel/log_mel/"] {
        assert!(!text.lines().any(|line| line.starts_with(family) && line.contains("backward")), "{family} in {text}");
    }
    let mut names: Vec<&str> = text.lines().collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), text.lines().count(), "a name stands twice");
    let all = run(&["bench", "--list", "--device", "cpu"]);
    assert_eq!(stdout(&all), text, "without a suite, all are named");
    for (arguments, expected) in [
        (vec!["stop"], "expected device, update, kernel, step, data"),
        (vec!["step/nothing"], "step/nothing, which means no figure; `warpstep bench --list step` names those of step"),
        (vec!["--device", "cpu", "--list", "kernel/cross_entropy*backward"], "which means no figure"),
        (vec!["--device", "cpu", "step/mlp", "update/nothing"], "update/nothing, which means no figure"),
        (vec!["--device", "tpu"], "found \"tpu\", expected auto, cpu, cuda, cuda:N or emulated"),
        (vec!["--precision", "f8"], "found \"f8\", expected f32, tf32, bf16 or f16"),
        (vec!["--device", "cpu", "--precision", "bf16"], "the CPU computes in f32"),
        (vec!["--seconds", "0"], "--seconds: found 0, expected a number above 0"),
        (vec!["--device", "cpu", "--threads", "100000"], "--threads: found 100000, expected 1 to 4096"),
        (vec!["--json", "/nowhere/at/all.json", "step/mlp"], "/nowhere/at/all.json"),
    ] {
        let refused = run(&[&["bench"][..], &arguments].concat());
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {}", stderr(&refused));
        assert!(stderr(&refused).contains(expected), "{arguments:?}: {}", stderr(&refused));
        assert_eq!(stderr(&refused).lines().count(), 1, "{}", stderr(&refused));
    }
}

#[test]
fn figures_of_the_cpu_tell_what_was_done_on_what_and_against_which_floor() {
    let results = bench(&["--device", "cpu", "--seconds", "0.02", "step/mlp", "kernel/relu", "data/feed/tokens"]);
    assert_eq!((results.format, results.version.as_str()), (FORMAT, env!("CARGO_PKG_VERSION")));
    assert!(results.command.ends_with("data/feed/tokens --json -") && results.date.ends_with('Z'));
    assert!(results.machine.device.starts_with("CPU, ") && results.machine.facts.contains_key("caches"));
    assert_eq!(results.figures.len(), 5);
    let step = figure(&results, "step/mlp");
    let work = step.work.as_ref().unwrap();
    assert_eq!((work.parameters, work.inputs.as_slice()), (235_146, &[128, 784][..]));
    assert_eq!((work.precision.as_str(), work.update.as_str()), ("f32", "momentum+global_norm"));
    assert!(work.threads > 0 && step.amount == (128.0, "sample".to_owned()));
    let shares: f64 = step.parts.values().sum();
    assert!(step.parts.len() == 4 && (shares - 1.0).abs() < 1e-9, "{:?}", step.parts);
    assert!(step.memory_bytes.is_some_and(|bytes| bytes > 3 * 4 * 235_146));
    // Forward, and backward without the input's gradient: two products of the first layer, three of the others.
    let products = 2 * 128 * (2 * 784 * 256 + 3 * (256 * 128 + 128 * 10));
    let flops = step.flops.unwrap();
    assert!(flops >= f64::from(products) && flops < 1.05 * f64::from(products), "{flops}");
    let relu = figure(&results, "kernel/relu/4096x768/forward/f32");
    assert_eq!(relu.bytes, Some(f64::from(2 * 4 * 4096 * 768)));
    assert!(
        relu.floor.as_ref().is_some_and(|floor| floor.seconds > 0.0 && floor.what.contains("MB at the speed of a "))
    );
    for figure in &results.figures {
        let spread = &figure.seconds;
        let ordered = [spread.min, spread.lower_quartile, spread.median, spread.upper_quartile];
        assert!(ordered.is_sorted() && spread.min > 0.0, "{figure:?}");
        // Whatever else runs here, the outcomes are right.
        let wrong = figure.refused.as_deref().is_some_and(|why| why.starts_with("wrong outcome"));
        assert!(!wrong, "{figure:?}");
    }
}

#[test]
fn the_table_explains_itself_and_the_file_holds_what_it_shows() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("found.json");
    // What is there already stays until there is something to write.
    std::fs::write(&file, "an earlier result").unwrap();
    let json = ["--json", file.to_str().unwrap()];
    let refused = run(&[&["bench", "--device", "cpu", "device/nothing"][..], &json].concat());
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "an earlier result");
    let ran = run(&[
        "bench",
        "--device",
        "cpu",
        "--seconds",
        "0.02",
        "device/fork_join",
        "device/product/128x784x256",
        "--json",
        file.to_str().unwrap(),
    ]);
    assert!(ran.status.success(), "{}", stderr(&ran));
    let text = stdout(&ran);
    for part in
        ["CPU, ", "This run's limits in f32: a copy", "device: what the device can do", "of floor", "How to read this:"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let results: Results = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for figure in &results.figures {
        assert!(text.lines().any(|line| line.starts_with(&figure.name)), "{} in {text}", figure.name);
    }
}

#[test]
fn what_several_processes_cannot_do_is_refused_by_the_first_of_them() {
    for (arguments, expected) in [
        (vec!["--peer", "jax"], "--peers: found it in 2 processes, expected one: no peer is run in several"),
        (vec!["--precision", "bf16"], "--precision: found bf16, but the CPU computes in f32"),
        (
            vec!["--device", "cuda:1", "--precision", "bf16", "--precision", "f16"],
            "--precision: found 2 of them, expected one where several processes train",
        ),
        (
            vec!["all_reduce/1GiB"],
            "found all_reduce/1GiB, which means no figure; `bench --list all_reduce`, started as 2 processes, names those of all_reduce",
        ),
        (vec!["step/mlp/bf16"], "found step/mlp/bf16, which means no figure"),
        (vec!["kernel"], "found the suite \"kernel\", expected all_reduce, step"),
    ] {
        for rank in ["0", "1"] {
            let mut command = common::warpstep();
            command.arg("bench").args(&arguments);
            if !arguments.contains(&"--device") {
                command.args(["--device", "cpu"]);
            }
            for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")]
            {
                command.env(name, value);
            }
            let refused = command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", "29500").output().unwrap();
            let told = stderr(&refused);
            assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {told}");
            assert_eq!(told.contains(expected), rank == "0", "{arguments:?}: {told}");
        }
    }
}

/// Notes behind each figure what was found so far; fails behind the second.
#[derive(Default)]
struct Witness(Vec<Results>);

impl Observer for Witness {
    fn begins(&mut self, _: &Machine, _: &Speeds) -> warpstep::Result<()> {
        Ok(())
    }

    fn figure(&mut self, _: &Figure, so_far: &Results) -> warpstep::Result<()> {
        self.0.push(so_far.clone());
        if self.0.len() < 2 { Ok(()) } else { Err(warpstep::Error::Device("the machine is gone".to_owned())) }
    }
}

#[test]
fn what_was_found_is_told_after_each_figure() {
    let patterns = ["kernel/relu", "data/open/tokens"].map(|text| Pattern::parse(text).unwrap());
    let (patterns, command) = (patterns.to_vec(), "warpstep bench".to_owned());
    let request = Request { patterns, place: Place::Cpu, precisions: Vec::new(), seconds: Some(0.001), command };
    let mut witness = Witness::default();
    let failed = take(&request, &mut witness).unwrap_err().to_string();
    assert_eq!(failed, "the machine is gone");
    fn suites(results: &Results) -> Vec<&str> {
        results.figures.iter().map(|figure| figure.suite.as_str()).collect()
    }
    let [first, second] = witness.0.as_slice() else { panic!("{} figures", witness.0.len()) };
    assert_eq!((suites(first), suites(second)), (vec!["kernel"], vec!["kernel", "kernel"]));
    assert!(first.machine.device.starts_with("CPU, ") && first.command == "warpstep bench");
}

/// The program with a folder of its own for what is temporary, and its results asked for.
#[cfg(unix)]
fn started(folder: &TempDir, arguments: &[&str]) -> std::process::Child {
    std::fs::create_dir(folder.path().join("tmp")).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::process::Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["bench", "--device", "cpu"])
        .args(arguments)
        .args(["--json", &path("found.json"), "--html", &path("found.html")])
        .env("TMPDIR", folder.path().join("tmp"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

#[cfg(unix)]
#[test]
fn a_signal_ends_the_figure_that_runs_and_all_that_was_found_is_written() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let folder = TempDir::new().unwrap();
        let mut bench = started(&folder, &["--seconds", "0.01", "data/open/tokens", "data/feed/text", "data/open"]);
        let json = folder.path().join("found.json");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while !json.exists() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // SAFETY: kill takes no pointer, and the process was started here and is not asked for yet.
        assert_eq!(unsafe { libc::kill(bench.id() as i32, signal) }, 0);
        assert_eq!(bench.wait().unwrap().code(), Some(128 + signal));
        let results = warpstep::bench::compare::read(&json).unwrap();
        assert!(!results.figures.is_empty(), "{results:?}");
        assert!(results.machine.notes.iter().any(|note| note == warpstep::bench::output::UNFINISHED), "{results:?}");
        assert!(std::fs::read_to_string(folder.path().join("found.html")).unwrap().contains(&results.figures[0].name));
        assert_eq!(std::fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0, "files were left behind");
    }
}

#[cfg(unix)]
#[test]
fn a_reader_of_the_table_that_goes_does_not_take_the_results_along() {
    let folder = TempDir::new().unwrap();
    let mut bench = started(&folder, &["--seconds", "0.01", "device/fork_join"]);
    drop(bench.stdout.take());
    assert!(bench.wait().unwrap().success());
    let results = warpstep::bench::compare::read(&folder.path().join("found.json")).unwrap();
    assert_eq!(results.figures.iter().map(|figure| figure.name.as_str()).collect::<Vec<_>>(), ["fork_join"]);
    assert!(!results.machine.notes.iter().any(|note| note == warpstep::bench::output::UNFINISHED), "{results:?}");
    assert!(folder.path().join("found.html").exists());
}

#[test]
fn a_precision_that_no_figure_is_asked_for_in_is_not_measured() {
    if !is_embedded() || emulated::find_library().is_none() {
        println!("skipped: no emulated device: it needs nvcc when Warpstep is built, and the emulator beside it");
        return;
    }
    let ran = run(&["bench", "--device", "emulated", "--seconds", "0.001", "step/mlp/bf16", "device/launch"]);
    assert!(ran.status.success(), "{}", stderr(&ran));
    let text = stdout(&ran);
    let precisions: Vec<&str> = text.lines().filter(|line| line.starts_with("This run's limits in ")).collect();
    // What is of no precision is taken in the first.
    assert_eq!(precisions.len(), 2, "{text}");
    assert!(precisions[0].contains(" in f32:") && precisions[1].contains(" in bf16:"), "{text}");
}

#[test]
fn on_the_emulated_device_every_operation_is_right_in_16_bits() {
    if !is_embedded() || emulated::find_library().is_none() {
        println!("skipped: no emulated device: it needs nvcc when Warpstep is built, and the emulator beside it");
        return;
    }
    // f16 scales losses.
    let precisions = ["--precision", "bf16", "--precision", "f16"];
    let results = bench(&[&["--device", "emulated", "--seconds", "0.001", "kernel"][..], &precisions].concat());
    let ways: usize = cases(Kind::Emulated).iter().map(|case| 1 + usize::from(case.has_backward())).sum();
    assert_eq!(results.figures.len(), 2 * ways);
    for figure in &results.figures {
        let why = figure.refused.as_deref().unwrap_or_default();
        assert!(!why.starts_with("wrong outcome"), "{}: {why}", figure.name);
    }
}

#[test]
fn on_the_emulated_device_everything_runs_and_nothing_is_to_be_quoted() {
    if !is_embedded() || emulated::find_library().is_none() {
        println!("skipped: no emulated device: it needs nvcc when Warpstep is built, and the emulator beside it");
        return;
    }
    let patterns = [
        "device/*L2",
        "device/launch",
        "device/graph",
        "device/*pinned",
        "device/product/32",
        "update/momentum+global_norm",
        "kernel/linear_gelu",
        "kernel/layer_norm",
        "kernel/cross_entropy",
        "step/mlp",
        "step/cnn",
    ];
    let options = ["--device", "emulated", "--precision", "tf32", "--precision", "bf16", "--seconds", "0.001"];
    let results = bench(&[&options[..], &patterns].concat());
    assert!(results.machine.notes.iter().any(|note| note.contains("emulated device")));
    assert!(results.machine.facts["device before"].contains("no clocks"));
    for figure in &results.figures {
        let why = figure.refused.as_deref().unwrap_or_default();
        assert!(why.starts_with("emulated device"), "{}/{}: {why}", figure.suite, figure.name);
    }
    for name in ["step/mlp/bf16", "step/cnn/tf32", "update/momentum+global_norm/0.004096M/bf16_alone"] {
        assert!(figure(&results, name).work.is_some());
    }
    for name in ["host_to_device/pinned/4KiB", "device_to_host/pinned/4KiB"] {
        // Its memory is filled, counted and taken in turn: what arrived is right.
        let seconds = figure(&results, &format!("device/{name}")).seconds;
        assert!(seconds.count >= 5, "{name}: {seconds:?}");
    }
    // What does not depend on the precision is taken once.
    let launches = results.figures.iter().filter(|figure| figure.name == "launch").count();
    assert_eq!(launches, 1);
}
