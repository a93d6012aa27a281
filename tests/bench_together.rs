//! `warpstep bench` of several processes: steps that they make together are held to a twin that makes them alone, and what of their
//! time is communication adds up with the rest.

mod common;
#[path = "common/devices.rs"]
mod devices;
#[path = "common/mpi.rs"]
mod mpi;
#[path = "common/threads.rs"]
mod threads;

use std::path::Path;
use std::process::Output;
use std::sync::Arc;

use common::{has_emulated_device, stderr, stdout};
use tempfile::TempDir;
use threads::OnHost;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::profile::Kind;
use warpstep::bench::measure::Settings;
use warpstep::bench::place::Precision;
use warpstep::bench::results::{Figure, Results};
use warpstep::bench::speeds::Speeds;
use warpstep::bench::together::{COMMUNICATION, name, steps};
use warpstep::parallel::Collective;

/// What one of some processes, which is a thread here, finds of a model's step.
fn found_by(process: OnHost, model: &str) -> Figure {
    let name = name(model, Kind::Host, Precision::F32, process.world());
    // A process has a pool of its own.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (cpu, team) = (Cpu::<f32>::new(), Arc::new(process) as Arc<dyn Collective>);
    let settings = Settings { tries: 1, ..Settings::new(0.02) };
    let speeds = Speeds {
        precision: Precision::F32,
        copy: 1e10,
        in_place: 1e10,
        alone: [1e10; 2],
        fastest_memory: 1e12,
        product: 1e11,
        fastest_product: 1e12,
        memory_doubt: None,
        alone_doubts: [None, None],
        product_doubt: None,
    };
    let mut figures = Vec::new();
    pool.install(|| {
        let mut told = |figure| {
            figures.push(figure);
            Ok(())
        };
        steps(&cpu, &team, &settings, &speeds, &|asked| asked == name, &mut told).unwrap();
    });
    let [figure] = <[Figure; 1]>::try_from(figures).unwrap();
    figure
}

/// What each of some processes finds.
fn found(model: &str, processes: Vec<OnHost>) -> Vec<Figure> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            processes.into_iter().map(|process| scope.spawn(move || found_by(process, model))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What steps of several processes must tell, however slow the machine.
fn is_whole(figure: &Figure) {
    let sum: f64 = figure.parts.values().sum();
    assert!((sum - 1.0).abs() < 1e-9, "{:?}", figure.parts);
    let names: Vec<&str> = figure.parts.keys().map(String::as_str).collect();
    assert_eq!(names, ["backward", COMMUNICATION, "data", "forward", "update"]);
    assert!(figure.parts.values().all(|share| (0.0..=1.0).contains(share)), "{:?}", figure.parts);
    let wrong = figure.refused.as_deref().is_some_and(|why| why.starts_with("wrong outcome"));
    assert!(!wrong && figure.memory_bytes.is_some_and(|bytes| bytes > 0), "{figure:?}");
}

#[test]
fn a_step_of_several_processes_is_that_of_one_with_all_their_batches() {
    let figures = found("mlp", OnHost::all(3));
    for figure in &figures {
        is_whole(figure);
        assert_eq!((figure.suite.as_str(), figure.name.as_str()), ("step", "mlp/3_processes"));
        // A batch each.
        assert_eq!(figure.amount, (3.0 * 128.0, "sample".to_owned()));
        assert_eq!(figure.seconds, figures[0].seconds, "all go by one clock");
    }
}

#[test]
fn steps_whose_gradients_are_not_summed_are_refused_by_all() {
    for figure in found("mlp", OnHost::all(2).into_iter().map(OnHost::that_forgets).collect()) {
        let why = figure.refused.unwrap_or_default();
        assert!(why.starts_with("wrong outcome, as if work were skipped: rank 0: loss "), "{why}");
    }
}

fn results(ran: &Output, json: &Path) -> Results {
    assert!(ran.status.success(), "{}", stderr(ran));
    serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap()
}

#[test]
fn processes_over_mpi_tell_of_their_steps_once() {
    if !mpi::is_there() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let [json, html] = ["found.json", "found.html"].map(|name| folder.path().join(name));
    let files = ["--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()];
    let asked = ["bench", "step/mlp", "all_reduce/4KiB", "--device", "cpu", "--threads", "1", "--seconds", "0.05"];
    let ran = mpi::output(&mut mpi::mpirun(2, &[&asked[..], &files].concat()));
    let found = results(&ran, &json);
    let text = stdout(&ran);
    assert_eq!(text.matches("mlp/2_processes").count(), 1, "{text}");
    // Wherever lines are broken.
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("communication ") && words.contains("a scaling efficiency of 90 %"), "{text}");
    let names: Vec<&str> = found.figures.iter().map(|figure| figure.name.as_str()).collect();
    assert_eq!(names, ["4KiB/2_processes", "mlp/2_processes"]);
    is_whole(&found.figures[1]);
    assert_eq!(found.machine.limits.len(), 1);
    assert!(std::fs::read_to_string(html).unwrap().contains("mlp/2_processes"));
}

#[test]
fn processes_on_emulated_devices_make_their_steps_by_nccl() {
    if !has_emulated_device() {
        return;
    }
    let folder = TempDir::new().unwrap();
    for precision in ["bf16", "tf32"] {
        let json = folder.path().join(precision);
        let ran = devices::run(2, || {
            let mut command = common::warpstep();
            // The second leaves values out by chance, other ones in each process.
            command.args([
                "bench",
                "step/mlp",
                "step/audio_cnn",
                "--seconds",
                "0.01",
                "--precision",
                precision,
                "--json",
            ]);
            command.arg(&json);
            command
        });
        let found = results(&ran[0], &json);
        assert!(ran[1].status.success() && stdout(&ran[1]).is_empty(), "{}", stderr(&ran[1]));
        let names: Vec<&str> = found.figures.iter().map(|figure| figure.name.as_str()).collect();
        assert_eq!(names, ["mlp", "audio_cnn"].map(|model| format!("{model}/{precision}/2_processes")));
        for figure in &found.figures {
            is_whole(figure);
            assert!(figure.refused.is_some(), "times of an emulated device say nothing");
        }
    }
}

#[test]
fn the_launcher_starts_them() {
    if !has_emulated_device() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let [json, logs] = ["found.json", "logs"].map(|name| folder.path().join(name));
    let launch = |restarts: &str| {
        let mut command = common::warpstep();
        command.args(["launch", "--gpus", "2", "--restarts", restarts, "--log-dir"]).arg(&logs);
        command
            .args(["--", "bench", "all_reduce/4KiB", "--device", "emulated", "--seconds", "0.01", "--json"])
            .arg(&json);
        command.env("WARPSTEP_EMULATOR_CHECKS", "off").output().unwrap()
    };
    let refused = launch("1");
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("--restarts: found 1 with bench"), "{}", stderr(&refused));
    let ran = launch("0");
    let found = results(&ran, &json);
    assert_eq!(found.figures.iter().map(|figure| figure.name.as_str()).collect::<Vec<_>>(), ["4KiB/2_processes"]);
    assert!(stdout(&ran).contains("4KiB/2_processes") && logs.join("rank-1.log").is_file(), "{}", stdout(&ran));
}
