//! `warpstep bench compare`: what got faster or slower beyond the noise, what is in one file alone, and the exit code.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use warpstep::bench::compare::{Comparison, Verdict, compare};
use warpstep::bench::results::{FORMAT, Figure, Machine, PeerFigure, Results, Spread, Work};

/// A spread about a median, whose quartiles lie `part` of it to either side.
fn about(median: f64, part: f64) -> Spread {
    Spread {
        count: 9,
        min: median * (1.0 - 2.0 * part),
        lower_quartile: median * (1.0 - part),
        median,
        upper_quartile: median * (1.0 + part),
    }
}

fn figure(name: &str, seconds: Spread) -> Figure {
    let amount = (128.0, "sample".to_owned());
    Figure { suite: "step".into(), name: name.into(), seconds, amount, ..Figure::default() }
}

fn results(figures: Vec<Figure>) -> Results {
    Results {
        format: FORMAT,
        version: "0.1.0".into(),
        command: "bench".into(),
        date: "2026-11-25T00:00:00Z".into(),
        machine: Machine { device: "CPU".into(), ..Machine::default() },
        figures,
        peers: Vec::new(),
    }
}

fn verdicts(found: &Comparison) -> Vec<(&str, Verdict)> {
    found.changes.iter().map(|change| (change.name.as_str(), change.verdict)).collect()
}

#[test]
fn what_is_within_the_noise_is_no_change() {
    let before = results(vec![
        figure("slower", about(1.0, 0.02)),
        figure("faster", about(1.0, 0.02)),
        figure("noisy", about(1.0, 0.2)),
        figure("barely", about(1.0, 0.0)),
    ]);
    let after = results(vec![
        figure("slower", about(1.1, 0.02)),
        figure("faster", about(0.5, 0.02)),
        figure("noisy", about(1.3, 0.2)),
        figure("barely", about(1.009, 0.0)),
    ]);
    let found = compare(&before, &after);
    let expected = [
        ("step/slower", Verdict::Slower),
        ("step/faster", Verdict::Faster),
        ("step/noisy", Verdict::Same),
        ("step/barely", Verdict::Same),
    ];
    assert_eq!(verdicts(&found), expected);
    assert!((found.changes[0].change - 0.1).abs() < 1e-9 && (found.changes[1].change + 0.5).abs() < 1e-9);
    // The other way round, slower is faster.
    let back = compare(&after, &before);
    assert_eq!(verdicts(&back)[..2], [("step/faster", Verdict::Slower), ("step/slower", Verdict::Faster)]);
}

#[test]
fn a_ratio_to_a_peer_that_falls_is_slower() {
    let peer = |median| PeerFigure {
        peer: "PyTorch eager".into(),
        ratio: about(median, 0.01),
        work: Work { name: "mlp".into(), ..Work::default() },
        ..PeerFigure::default()
    };
    let with = |median| Results { peers: vec![peer(median)], ..results(Vec::new()) };
    let found = compare(&with(2.0), &with(1.6));
    assert_eq!(verdicts(&found), [("peers/mlp against PyTorch eager", Verdict::Slower)]);
    assert!((found.changes[0].change - 0.25).abs() < 1e-9);
    assert_eq!(verdicts(&compare(&with(1.6), &with(2.0)))[0].1, Verdict::Faster);
}

#[test]
fn peers_of_several_precisions_and_updates_are_compared_each_with_its_own() {
    let peer = |name: &str, precision: &str, parameters: u64, median| PeerFigure {
        peer: "JAX".into(),
        ratio: about(median, 0.01),
        work: Work {
            name: name.into(),
            precision: precision.into(),
            parameters,
            update: "adamw+global_norm".into(),
            ..Work::default()
        },
        ..PeerFigure::default()
    };
    let with = |tf32, bf16, small, large| Results {
        peers: vec![
            peer("mlp", "tf32", 1000, tf32),
            peer("mlp", "bf16", 1000, bf16),
            peer("update", "f32", 1_000_000, small),
            peer("update", "f32", 50_000_000, large),
        ],
        ..results(Vec::new())
    };
    let found = compare(&with(2.0, 3.0, 2.0, 2.0), &with(2.0, 1.5, 2.0, 4.0));
    let expected = [
        ("peers/mlp/bf16 against JAX", Verdict::Slower),
        ("peers/update/adamw+global_norm/50M/f32 against JAX", Verdict::Faster),
        ("peers/mlp/tf32 against JAX", Verdict::Same),
        ("peers/update/adamw+global_norm/1M/f32 against JAX", Verdict::Same),
    ];
    assert_eq!(verdicts(&found), expected);
}

#[test]
fn a_good_figure_that_is_refused_or_missing_after_is_no_pass() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str| Figure { refused: Some("spread too wide".into()), ..figure(name, about(1.0, 0.0)) };
    let before = vec![figure("a", about(1.0, 0.0)), figure("b", about(1.0, 0.0)), refused("c"), refused("d")];
    let before = written(folder.path(), "before.json", &results(before));
    let after = written(folder.path(), "after.json", &results(vec![refused("a"), figure("c", about(1.0, 0.0))]));
    let threshold = [&before, &after, Path::new("--threshold"), Path::new("5")];
    let (output, out, errors) = called(&threshold);
    assert_eq!(output.status.code(), Some(1), "{out}{errors}");
    assert_eq!(errors, "could be quoted before, and is refused or missing after: step/a, step/b\n");
    // Without a threshold it is told, and no failure.
    assert_eq!(called(&threshold[..2]).0.status.code(), Some(0));
    let (output, _, errors) = called(&[&before, &before, Path::new("--threshold"), Path::new("5")]);
    assert_eq!((output.status.code(), errors.as_str()), (Some(0), ""));
}

#[test]
fn figures_that_are_refused_or_of_other_work_are_not_compared() {
    let work = |parameters| Some(Work { name: "mlp".into(), parameters, ..Work::default() });
    let refused = |name: &str| Figure { refused: Some("spread too wide".into()), ..figure(name, about(1.0, 0.0)) };
    let before = results(vec![
        refused("a"),
        Figure { work: work(1000), ..figure("b", about(1.0, 0.0)) },
        figure("c", about(1.0, 0.0)),
        figure("d", Spread::default()),
    ]);
    let after = results(vec![
        figure("a", about(2.0, 0.0)),
        Figure { work: work(2000), ..figure("b", about(2.0, 0.0)) },
        Figure { amount: (64.0, "sample".into()), ..figure("c", about(2.0, 0.0)) },
        figure("d", about(2.0, 0.0)),
    ]);
    let found = compare(&before, &after);
    assert!(found.changes.iter().all(|c| c.verdict == Verdict::Unlike), "{:?}", verdicts(&found));
    assert_eq!(found.slower_than(0.0).count(), 0);
    let why = |name: &str| found.changes.iter().find(|c| c.name == name).and_then(|c| c.why.clone()).unwrap();
    assert_eq!(why("step/a"), "refused before: spread too wide");
    assert_eq!(why("step/b"), "another number of parameters: 1,000 before, 2,000 after");
    assert_eq!(why("step/c"), "another amount: 128 sample before, 64 sample after");
    assert_eq!(why("step/d"), "no time was taken");
}

#[test]
fn what_stands_in_one_file_and_other_machines_are_told() {
    let mut before = results(vec![figure("both", about(1.0, 0.1)), figure("old", about(1.0, 0.1))]);
    let mut after = results(vec![figure("both", about(1.0, 0.1)), figure("new", about(1.0, 0.1))]);
    before.machine.facts.insert("cores".into(), "2".into());
    after.machine.facts.insert("cores".into(), "8".into());
    after.machine.device = "NVIDIA H100".into();
    after.machine.notes.push("clocks fell".into());
    after.version = "0.2.0".into();
    let found = compare(&before, &after);
    assert_eq!((found.only_before, found.only_after), (vec!["step/old".to_owned()], vec!["step/new".to_owned()]));
    let notes = found.notes.join("\n");
    for told in
        ["CPU before, NVIDIA H100 after", "cores: 2 before, 8 after", "0.1.0 before, 0.2.0 after", "after: clocks fell"]
    {
        assert!(notes.contains(told), "{told}: {notes}");
    }
    assert_eq!(compare(&before, &before).notes, Vec::<String>::new());
}

fn written(folder: &Path, name: &str, results: &Results) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, serde_json::to_vec(results).unwrap()).unwrap();
    path
}

fn called(arguments: &[&Path]) -> (Output, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_warpstep")).args(["bench", "compare"]).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    (output, out, errors)
}

#[test]
fn the_exit_code_is_1_only_beyond_the_threshold() {
    let folder = tempfile::tempdir().unwrap();
    let before = written(folder.path(), "a.json", &results(vec![figure("mlp", about(1.0, 0.01))]));
    let after = written(folder.path(), "b.json", &results(vec![figure("mlp", about(1.2, 0.01))]));
    let threshold = |percent: &str| vec![before.clone(), after.clone(), "--threshold".into(), percent.into()];
    for (arguments, code) in [
        (vec![before.clone(), after.clone()], 0),
        (threshold("25"), 0),
        (threshold("15"), 1),
        (vec![after.clone(), before.clone(), "--threshold".into(), "0".into()], 0),
        (threshold("-1"), 2),
        (threshold("much"), 2),
    ] {
        let given: Vec<&Path> = arguments.iter().map(PathBuf::as_path).collect();
        let (output, out, errors) = called(&given);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {out}{errors}");
    }
    let given = threshold("15");
    let (_, out, errors) = called(&given.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    assert!(out.contains("slower  step/mlp") && out.contains("1.00 s  1.20 s  +20.0 %"), "{out}");
    assert!(out.contains("1 slower, 0 faster, 0 within the noise, 0 not to be compared"), "{out}");
    assert_eq!(errors, "slower by more than 15 %: step/mlp\n");
    let (_, out, _) = called(&[&before, &after, Path::new("--json")]);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(found["changes"][0]["verdict"], "slower");
}

#[test]
fn a_file_that_holds_no_results_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let good = written(folder.path(), "good.json", &results(Vec::new()));
    let newer = written(folder.path(), "newer.json", &Results { format: FORMAT + 1, ..results(Vec::new()) });
    let cut = folder.path().join("cut.json");
    std::fs::write(&cut, "{\"format\": 1, \"version\":").unwrap();
    let other = folder.path().join("other.json");
    std::fs::write(&other, "{\"format\": 1}").unwrap();
    let missing = folder.path().join("missing.json");
    for (path, told) in [
        (&newer, "found 2, expected 1"),
        (&cut, "expected results as `warpstep bench --json` prints them"),
        (&other, "missing field `version`"),
        (&missing, "cannot read"),
    ] {
        let (output, _, errors) = called(&[&good, path]);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(
            errors.starts_with("error: ") && errors.contains(told) && errors.contains(&path.display().to_string()),
            "{errors}"
        );
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}
