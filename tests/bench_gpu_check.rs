//! `scripts/gpu-check`, tried on programs that do nothing: what is refused, what its deadline and a signal leave.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// What stands in for the program: it lists no figure called `nothing`, hangs where it is asked for `hang`, and tells how it was called.
const PROGRAM: &str = r#"#!/bin/sh
case "$* " in
    *--list*nothing*) echo 'error: bench: found step/nothing, which means no figure' >&2; exit 2 ;;
    *--list*) ;;
    *hang*) touch "$TMPDIR/left"; sleep 1000 & echo $$ $! > "$NOTE.aside"; mv "$NOTE.aside" "$NOTE"; wait ;;
    *) echo "called with $*, libraries in $LD_LIBRARY_PATH" ;;
esac
"#;

/// A bundle of such programs, unpacked already.
struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new() -> Self {
        let bundle = Bundle(tempfile::tempdir().unwrap());
        for folder in ["programs/bin", "programs/tests", "programs/benches", "programs/forms", "tmp", "bin"] {
            fs::create_dir_all(bundle.at(folder)).unwrap();
        }
        bundle.program("programs/bin/warpstep", PROGRAM);
        bundle.program("programs/bin/operations", PROGRAM);
        for test in ["first", "second"] {
            bundle.program(&format!("programs/tests/{test}"), "#!/bin/sh\nsleep ${NAP:-0}\n");
        }
        fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/gpu-check"), bundle.at("gpu-check")).unwrap();
        fs::write(bundle.at("programs.tar.xz"), "").unwrap();
        std::thread::sleep(Duration::from_millis(20));
        fs::write(bundle.at("programs/.unpacked"), "").unwrap();
        bundle
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).unwrap();
        fs::set_permissions(self.at(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn check(&self, arguments: &[&str]) -> Command {
        // A shell cannot hear a signal that was ignored when it began, as SIGINT is of what runs in the background.
        let mut command = Command::new("env");
        command
            .args(["--default-signal=INT,TERM", "bash"])
            .arg(self.at("gpu-check"))
            .args(arguments)
            .arg("--out")
            .arg(self.at("out"))
            .current_dir(self.0.path());
        command.env("TMPDIR", self.at("tmp")).env("NOTE", self.at("note")).stdin(Stdio::null());
        command
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn left_behind(&self) -> Vec<PathBuf> {
        fs::read_dir(self.at("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

/// The state of a part by the summary.
fn state<'a>(summary: &'a str, part: &str) -> &'a str {
    let line = summary.lines().find(|line| line.split_whitespace().next() == Some(part));
    line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_else(|| panic!("no {part} in {summary}"))
}

#[test]
fn what_there_is_not_is_refused_before_anything_runs() {
    let bundle = Bundle::new();
    for (arguments, expected) in [
        (
            vec!["bench:nothing"],
            "bench:nothing: found nothing, expected one of tour device update kernel step data cpu together",
        ),
        (vec!["operations:foo"], "operations:foo: found foo, expected one of mlp linear"),
        (vec!["doctor", "tests:nothing"], "tests:nothing: found nothing, expected one of first second nvrtc"),
        (vec!["doctor", "bench:step/nothing"], "bench:step/nothing: bench: found step/nothing, which means no figure"),
        (vec!["--limit", "abc"], "--limit: found abc, expected a whole number of 1 or more"),
        (vec!["--total", "0"], "--total: found 0, expected a whole number of 1 or more"),
        (vec!["--seconds", "0.0"], "--seconds: found 0.0, expected a number above 0"),
        (vec!["--precision", "f8"], "--precision: found f8, expected f32, tf32, bf16 or f16"),
        (vec!["nowhere"], "found nowhere, expected an option or a step; see gpu-check --help"),
    ] {
        let refused = bundle.check(&[&["--emulated"][..], &arguments].concat()).output().unwrap();
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {told}");
        assert!(
            told.starts_with(&format!("gpu-check: {expected}")) && told.lines().count() == 1,
            "{arguments:?}: {told}"
        );
        assert!(!bundle.at("out").exists(), "{arguments:?}");
    }
    assert_eq!(bundle.left_behind(), Vec::<PathBuf>::new());
}

#[test]
fn seconds_and_precisions_go_to_the_figures_that_a_part_names() {
    let bundle = Bundle::new();
    let asked = ["--emulated", "--seconds", "0.5", "--precision", "bf16", "--precision", "f16", "bench:step/gpt2/*"];
    assert!(bundle.check(&asked).output().unwrap().status.success());
    let told = bundle.read("out/logs/bench-step-gpt2--.log");
    assert!(told.contains("--device emulated --seconds 0.5 --precision bf16 --precision f16 step/gpt2/*"), "{told}");
    assert!(bundle.at("out/results.tar.gz").exists() && bundle.read("out/bench.txt").contains("called with bench"));
}

#[test]
fn several_gpus_are_measured_together() {
    let bundle = Bundle::new();
    assert!(bundle.check(&["--emulated", "bench:together"]).output().unwrap().status.success());
    let told = bundle.read("out/logs/bench-together.log");
    let json = bundle.at("out/bench-together.json");
    let bench =
        format!("-- bench --device emulated --json {} --seconds 0.001 all_reduce/4KiB step/mlp", json.display());
    assert!(told.contains("called with launch --gpus 2 ") && told.contains(&bench), "{told}");
    // Of the one GPU that there is, none stands beside.
    bundle.program("bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\n");
    let path = format!("{}:{}", bundle.at("bin").display(), std::env::var("PATH").unwrap());
    assert!(bundle.check(&["bench:together"]).env("PATH", path).output().unwrap().status.success());
    assert!(bundle.read("out/logs/bench-together.log").contains("there is no second GPU here"));
}

#[test]
fn bf16_is_taken_first_and_libraries_are_those_of_the_given_python() {
    let bundle = Bundle::new();
    fs::create_dir_all(bundle.at("nvidia/cublas/lib")).unwrap();
    let found = format!("#!/bin/sh\ncase $* in -) echo {} ;; esac\n", bundle.at("nvidia/cublas").display());
    bundle.program("python", &found);
    let mut check = bundle.check(&["bench:step"]);
    assert!(check.env("WARPSTEP_PYTHON", "./python").env_remove("LD_LIBRARY_PATH").output().unwrap().status.success());
    let told = bundle.read("out/logs/bench-step.log");
    let order = "--precision bf16 --precision tf32 --precision f32 --precision f16 step";
    assert!(
        told.contains(&format!("--device cuda {order}, libraries in {}", bundle.at("nvidia/cublas/lib").display())),
        "{told}"
    );
}

#[test]
fn what_would_begin_after_the_deadline_is_listed_as_not_run() {
    let bundle = Bundle::new();
    let mut check = bundle.check(&["--emulated", "--total", "10", "--jobs", "1", "tests", "operations:mlp"]);
    assert_eq!(check.env("NAP", "60").output().unwrap().status.code(), Some(1));
    let summary = bundle.read("out/summary.txt");
    assert_eq!(state(&summary, "test-first"), "timeout", "{summary}");
    for part in ["test-second", "operations-mlp"] {
        assert_eq!(state(&summary, part), "not-run", "{summary}");
    }
    assert!(summary.contains("1 of 3 parts failed\n2 not run: 10 s were over\n"), "{summary}");
}

/// Whether a process of this number still runs; one that has ended and that nobody has asked for is in state Z.
fn runs(process: &str) -> bool {
    let stat = Command::new("ps").args(["-o", "stat=", "-p", process]).output().unwrap();
    let stat = String::from_utf8_lossy(&stat.stdout).into_owned();
    !stat.trim().is_empty() && !stat.trim().starts_with('Z')
}

/// How a process ends, which takes no minute.
fn ends(process: &mut Child) -> ExitStatus {
    for _ in 0..3000 {
        if let Some(status) = process.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    process.kill().unwrap();
    panic!("it did not end");
}

fn wait_for(path: &Path) -> String {
    for _ in 0..1500 {
        if let Ok(text) = fs::read_to_string(path) {
            return text;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} did not come", path.display());
}

#[test]
fn a_signal_ends_the_part_that_runs_with_all_that_it_started_and_results_are_written() {
    for (signal, part) in [("INT", "bench:step/hang"), ("TERM", "bench:step/hang"), ("TERM", "tests")] {
        let bundle = Bundle::new();
        // Alone, or beside others.
        bundle.program("programs/tests/first", &PROGRAM.replace("*hang*", "*show-output*"));
        let mut check = bundle.check(&["--emulated", "--jobs", "2", part, "operations:mlp"]);
        let mut check = check.env("NAP", "60").stdout(Stdio::null()).spawn().unwrap();
        let noted = wait_for(&bundle.at("note"));
        assert!(Command::new("kill").args(["-s", signal, &check.id().to_string()]).status().unwrap().success());
        let code = if signal == "INT" { 130 } else { 143 };
        assert_eq!(ends(&mut check).code(), Some(code), "{signal} {part}");
        for process in noted.split_whitespace() {
            assert!(!runs(process), "{process} of {noted} was left running by {signal} {part}");
        }
        let summary = bundle.read("out/summary.txt");
        let ended = if part == "tests" { "test-first" } else { "bench-step-hang" };
        assert_eq!(
            (state(&summary, ended), state(&summary, "operations-mlp")),
            ("interrupted", "not-run"),
            "{summary}"
        );
        assert!(bundle.at("out/results.tar.gz").exists());
        assert_eq!(bundle.left_behind(), Vec::<PathBuf>::new());
    }
}
