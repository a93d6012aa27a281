//! Peers of the benchmark are held to our own work: what is not the same, not there, or not true is refused.

use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

use warpstep::Result;
use warpstep::backend::cpu::Cpu;
use warpstep::bench::peers::{NAMES, Peer, Places, Scripts, Settings, Start, difference, run, visible_device};
use warpstep::bench::place::{Place, Precision};
use warpstep::bench::results::{PeerFigure, Work};
use warpstep::bench::run::{Pattern, Request};
use warpstep::bench::unit::{self, Unit};
use warpstep::bench::works::{self, training};
use warpstep::model::Mode;

/// Our side: repetitions of a microsecond, as it says.
struct Ours {
    work: Work,
    turns: usize,
    looks: usize,
    wrong: Option<String>,
    ordinal: Option<usize>,
}

impl Ours {
    fn new(work: Work) -> Self {
        Ours { work, turns: 0, looks: 0, wrong: None, ordinal: None }
    }
}

impl Unit for Ours {
    fn work(&self) -> Work {
        self.work.clone()
    }

    fn run_for(&mut self, _: f64) -> Result<Vec<f64>> {
        self.turns += 1;
        Ok(vec![1e-6; 4])
    }

    fn verify(&mut self) -> Result<Option<String>> {
        self.looks += 1;
        Ok(self.wrong.clone())
    }

    fn ordinal(&self) -> Option<usize> {
        self.ordinal
    }
}

fn work() -> Work {
    Work {
        name: "mlp".into(),
        parameters: 235_146,
        inputs: vec![128, 784],
        samples: 21_376,
        precision: "f32".into(),
        update: "momentum+global_norm".into(),
        threads: 2,
    }
}

fn settings() -> Settings {
    Settings {
        turns: 3,
        seconds: 0.0,
        start: Duration::from_secs(20),
        patience: Duration::from_secs(20),
        ..Settings::new(1.0)
    }
}

/// A peer that a shell plays.
fn shell(script: &str) -> Peer {
    let arguments = vec![OsString::from("-c"), OsString::from(script)];
    Peer { label: "fake".into(), start: Start::Command("sh".into(), arguments) }
}

/// A line that prints what a peer declares.
fn declaring(work: &Work) -> String {
    let declared = serde_json::json!({"peer": "fake", "version": "1.2", "work": work});
    format!("printf '%s\\n' '{declared}'\n")
}

/// Lines that answer each turn with these times, and the question behind the last with that.
fn answering_both(times: &str, check: &str) -> String {
    format!(
        "while read -r line; do case $line in check) printf '%s\\n' '{check}';; *) printf '%s\\n' '{{\"times\": {times}}}';; \
         esac; done"
    )
}

fn answering(times: &str) -> String {
    answering_both(times, r#"{"finite": true}"#)
}

fn against(peer: &Peer, settings: &Settings) -> (PeerFigure, usize) {
    let mut ours = Ours::new(work());
    let figure = run(peer, &mut ours, settings).expect("our own side cannot fail");
    (figure, ours.turns)
}

fn refusal(script: &str) -> String {
    let (figure, _) = against(&shell(script), &settings());
    assert_eq!(figure.ratio.count, 0, "{figure:?}");
    figure.refused.expect("to be refused")
}

#[test]
fn a_peer_on_the_same_work_is_timed_turn_by_turn() {
    let (figure, turns) = against(&shell(&(declaring(&work()) + &answering("[2e-6, 3e-6, 9e-6]"))), &settings());
    assert_eq!(figure.refused, None);
    assert_eq!((figure.version.as_str(), &figure.work, turns), ("1.2", &work(), 3));
    assert_eq!((figure.ours.count, figure.theirs.count, figure.ratio.count), (12, 9, 3));
    assert!((figure.ratio.median - 3.0).abs() < 1e-9, "{:?}", figure.ratio);
}

#[test]
fn a_peer_on_other_work_is_refused_by_the_field_that_differs_before_any_turn() {
    let planted = [
        ("work", Work { name: "cnn".into(), ..work() }, "cnn"),
        ("number of parameters", Work { parameters: 235_145, ..work() }, "235,145"),
        ("shape of the inputs", Work { inputs: vec![64, 784], ..work() }, "[64, 784]"),
        ("number of samples to take batches from", Work { samples: 128, ..work() }, "128"),
        ("precision", Work { precision: "bf16".into(), ..work() }, "bf16"),
        ("update", Work { update: "momentum".into(), ..work() }, "momentum"),
        ("number of threads", Work { threads: 1, ..work() }, "1"),
    ];
    for (field, theirs, value) in planted {
        let (figure, turns) = against(&shell(&(declaring(&theirs) + &answering("[1e-6]"))), &settings());
        let refused = figure.refused.expect(field);
        assert!(refused.starts_with(&format!("another {field}: ")), "{refused}");
        assert!(refused.contains(&format!(" here, {value} there;")), "{refused}");
        assert_eq!((turns, figure.ratio.count), (0, 0), "{field}");
    }
    assert_eq!(difference(&work(), &work(), ["here", "there"]), None);
}

#[test]
fn a_peer_that_is_not_there_is_named_as_missing() {
    assert_eq!(
        refusal(r#"printf '%s\n' '{"missing": "x is not installed: pip install x"}'"#),
        "x is not installed: pip install x"
    );
    let nobody = Peer { label: "fake".into(), start: Start::Command("warpstep-no-such-program".into(), Vec::new()) };
    let (figure, _) = against(&nobody, &settings());
    assert_eq!((figure.peer.as_str(), figure.work.name.as_str()), ("fake", "mlp"));
    assert_eq!(figure.refused.as_deref(), Some("warpstep-no-such-program was not found"));
}

#[test]
fn a_peer_that_dies_gives_its_last_words() {
    for script in [
        "echo warning >&2; echo 'no more memory' >&2; exit 3".to_owned(),
        declaring(&work()) + "read -r line; echo 'no more memory' >&2; exit 3",
    ] {
        let refused = refusal(&script);
        assert!(refused.contains("exit status: 3") && refused.ends_with(": no more memory"), "{refused}");
    }
}

#[test]
fn times_that_cannot_be_are_refused() {
    for (times, why) in [
        ("[]", "not all numbers above 0"),
        ("[1e-6, 0.0]", "not all numbers above 0"),
        ("[-1e-6]", "not all numbers above 0"),
        ("[1000.0]", "add up to 1000.000 s"),
        ("[NaN]", "expected a line of JSON"),
        ("\"fast\"", "does not answer with times"),
    ] {
        let refused = refusal(&(declaring(&work()) + &answering(times)));
        assert!(refused.contains(why), "{times}: {refused}");
    }
    let refused = refusal("echo hello; cat");
    assert!(refused.contains("\"hello\"") && refused.contains("expected a line of JSON"), "{refused}");
    let refused = refusal("echo '{\"peer\": \"fake\", \"version\": \"1\", \"work\": {\"name\": \"mlp\"}}'");
    assert!(refused.contains("missing field `parameters`"), "{refused}");
}

#[test]
fn a_peer_whose_numbers_are_not_finite_or_that_does_not_say_is_refused() {
    for (check, why) in [
        (r#"{"finite": false}"#, "its loss or its parameters are not finite: its times tell nothing"),
        (r#"{"times": [1e-6]}"#, "it does not say whether its loss and parameters are finite: missing field `finite`"),
        (r#"{"finite": "NaN"}"#, "it does not say whether its loss and parameters are finite: invalid type"),
        ("yes", "found the line \"yes\", expected a line of JSON"),
    ] {
        let refused = refusal(&(declaring(&work()) + &answering_both("[1e-6]", check)));
        assert!(refused.starts_with(why), "{check}: {refused}");
    }
    let dying = r#"while read -r line; do case $line in check) echo 'no such line' >&2; exit 3;; *) echo '{"times": [1e-6]}';; esac; done"#;
    let refused = refusal(&(declaring(&work()) + dying));
    assert!(refused.contains("exit status: 3") && refused.ends_with(": no such line"), "{refused}");
}

#[test]
fn our_own_outcome_is_looked_at_once_behind_the_last_turn() {
    let peer = shell(&(declaring(&work()) + &answering("[2e-6]")));
    let mut ours = Ours::new(work());
    assert_eq!(run(&peer, &mut ours, &settings()).unwrap().refused, None);
    assert_eq!((ours.turns, ours.looks), (3, 1));
    ours.wrong = Some("loss NaN, its twin in f64 2.3".to_owned());
    let figure = run(&peer, &mut ours, &settings()).unwrap();
    let refused = figure.refused.as_deref();
    assert_eq!(refused, Some("our own outcome is wrong: loss NaN, its twin in f64 2.3"));
    assert_eq!(figure.ratio.count, 0);
}

#[test]
fn a_peer_sees_the_device_that_we_run_on_and_no_other() {
    for (ours, ordinal, expected) in [
        (None, 0, "0"),
        (None, 3, "3"),
        (Some("5"), 0, "5"),
        (Some("4,2, 7"), 2, "7"),
        (Some("GPU-8932f937,MIG-1f2a"), 1, "MIG-1f2a"),
        (Some("4,2"), 2, ""),
        (Some(""), 0, ""),
    ] {
        assert_eq!(visible_device(ours, ordinal), expected, "{ours:?}, {ordinal}");
    }
    let name = r#"printf '{"missing": "sees %s of %s"}\n' "${CUDA_VISIBLE_DEVICES-none}" "${CUDA_DEVICE_ORDER-none}""#;
    let seen = |ordinal| {
        let mut ours = Ours { ordinal, ..Ours::new(work()) };
        run(&shell(name), &mut ours, &settings()).unwrap().refused.unwrap()
    };
    let given = |name, otherwise: &str| std::env::var(name).unwrap_or_else(|_| otherwise.to_owned());
    let list = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let order = given("CUDA_DEVICE_ORDER", "FASTEST_FIRST");
    assert_eq!(seen(Some(1)), format!("sees {} of {order}", visible_device(list.as_deref(), 1)));
    // On the CPU it is left as it is.
    assert_eq!(
        seen(None),
        format!("sees {} of {}", given("CUDA_VISIBLE_DEVICES", "none"), given("CUDA_DEVICE_ORDER", "none"))
    );
}

#[test]
fn a_ratio_that_wanders_is_not_quoted() {
    let script = declaring(&work())
        + r#"n=1; while read -r line; do case $line in check) echo '{"finite": true}';; *) printf '{"times": [%se-6]}\n' $n; n=$((n * 3));; esac; done"#;
    let (figure, _) = against(&shell(&script), &settings());
    assert_eq!(figure.ratio.count, 3);
    assert!(figure.refused.as_deref().is_some_and(|r| r.starts_with("spread too wide")), "{figure:?}");
}

/// Whether a process of this number still runs.
#[cfg(target_os = "linux")]
fn runs(process: &str) -> bool {
    // A process that has ended and that nobody has asked for yet is in state Z.
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

#[cfg(target_os = "linux")]
#[test]
fn a_peer_that_hangs_is_ended_with_all_that_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let note = folder.path().join("processes");
    let hanging = format!("sleep 1000 & echo $$ $! > {}; ", note.display());
    let silent = Settings { start: Duration::from_millis(600), patience: Duration::from_millis(600), ..settings() };
    for script in [hanging.clone() + "wait", declaring(&work()) + &hanging + "wait"] {
        let (figure, _) = against(&shell(&script), &silent);
        assert!(
            figure.refused.as_deref().is_some_and(|r| r.starts_with("it was ended: no answer within")),
            "{figure:?}"
        );
        let noted = std::fs::read_to_string(&note).unwrap();
        let processes: Vec<&str> = noted.split_whitespace().collect();
        assert_eq!(processes.len(), 2);
        assert!(end_soon(&processes), "{noted}");
    }
}

/// Whether none of them runs a moment later: ending is asked for at once, the system may take its time.
#[cfg(target_os = "linux")]
fn end_soon(processes: &[&str]) -> bool {
    for _ in 0..500 {
        if !processes.iter().any(|process| runs(process)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

/// What there is once `look` finds it, within a minute.
#[cfg(target_os = "linux")]
fn awaited<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3000 {
        if let Some(found) = look() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{what} did not come");
}

/// The command beside a peer in Python's place that answers one turn and then hangs, deaf to the end of its input. Gives what the
/// signal ended it with, once the peer and what it started are gone, and the folder that it ran in.
#[cfg(target_os = "linux")]
fn killed_by(signal: i32, hangs: &str) -> (std::process::ExitStatus, tempfile::TempDir) {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let [python, note, json] = ["python", "processes", "out.json"].map(|name| folder.path().join(name));
    let turn = "read -r line; echo '{\"times\": [1e-6]}'\n";
    let script = format!("#!/bin/sh\n{}{turn}{}\n", declaring(&work()), hangs.replace("NOTE", note.to_str().unwrap()));
    std::fs::write(&python, script).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(folder.path().join("tmp")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["bench", "--device", "cpu", "--threads", "2", "--seconds", "0.01", "step/mlp", "--json"])
        .arg(&json)
        .args(["--peer", "candle", "--peer", "pytorch-eager", "--peer", "jax"])
        .env("WARPSTEP_PYTHON", &python)
        .env("TMPDIR", folder.path().join("tmp"))
        .env_remove("WARPSTEP_RUST_PEERS")
        .current_dir(folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let noted = awaited("the peer", || std::fs::read_to_string(&note).ok().filter(|noted| noted.ends_with('\n')));
    // SAFETY: kill takes no pointer, and the process was started here and is not asked for yet.
    assert_eq!(unsafe { libc::kill(command.id() as i32, signal) }, 0);
    let status = command.wait().unwrap();
    let processes: Vec<&str> = noted.split_whitespace().collect();
    assert!(!processes.is_empty() && end_soon(&processes), "{noted}");
    (status, folder)
}

/// What an interrupted run left, which says that it was.
#[cfg(target_os = "linux")]
fn left(folder: &tempfile::TempDir) -> warpstep::bench::results::Results {
    let results = warpstep::bench::compare::read(&folder.path().join("out.json")).unwrap();
    assert_eq!(results.figures.iter().map(|figure| figure.name.as_str()).collect::<Vec<_>>(), ["mlp"]);
    assert!(results.machine.notes.iter().any(|note| note == warpstep::bench::output::UNFINISHED), "{results:?}");
    results
}

#[cfg(target_os = "linux")]
#[test]
fn a_benchmark_that_is_asked_to_end_ends_its_peer_and_keeps_what_it_found() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let (status, folder) = killed_by(signal, "sleep 1000 & echo $$ $! > NOTE; wait");
        assert_eq!(status.code(), Some(128 + signal));
        let results = left(&folder);
        let refused = |peer: usize| results.peers[peer].refused.as_deref().unwrap();
        assert_eq!(results.peers.len(), 3);
        assert!(refused(0).starts_with("not built"), "{}", refused(0));
        assert_eq!(refused(1), "it was ended: the benchmark was interrupted");
        assert_eq!(refused(2), "the benchmark was interrupted before");
        assert_eq!(std::fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0, "the scripts stayed behind");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_benchmark_that_is_killed_leaves_no_peer_behind() {
    use std::os::unix::process::ExitStatusExt;
    let (status, folder) = killed_by(libc::SIGKILL, "echo $$ > NOTE; exec sleep 1000");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    assert_eq!(left(&folder).peers, Vec::new());
}

fn python() -> Option<String> {
    let python = std::env::var("WARPSTEP_PYTHON").unwrap_or_else(|_| "python3".into());
    let there = Command::new(&python).arg("--version").output().is_ok_and(|out| out.status.success());
    if !there {
        println!("skipped: needs Python");
    }
    there.then_some(python)
}

#[test]
fn the_scripts_speak_the_protocol() {
    let Some(python) = python() else { return };
    let scripts = Scripts::write().unwrap();
    let fake = scripts.path("fake.py");
    std::fs::write(
        &fake,
        "import sys, time, common\n\
         asked = common.arguments(['eager', 'NaN'])\n\
         print('noise of a library')\n\
         work = dict(name=asked.work, parameters=235146, inputs=[asked.batch, 784], samples=asked.samples,\n\
         \x20           precision=asked.precision, update=asked.update, threads=asked.threads)\n\
         common.serve('fake', '1', work, lambda: time.sleep(1e-3), lambda: sys.argv[-1] != 'NaN')\n",
    )
    .unwrap();
    let peer = |last: &str| {
        let asked = ["--work", "mlp", "--threads", "2", "--samples", "21376", "--form", last].map(OsString::from);
        let arguments = [fake.clone().into_os_string()].into_iter().chain(asked).collect();
        Peer { label: "fake".into(), start: Start::Command(python.clone().into(), arguments) }
    };
    let (figure, _) = against(&peer("NaN"), &settings());
    let refused = figure.refused.as_deref();
    assert_eq!(refused, Some("its loss or its parameters are not finite: its times tell nothing"));
    let (figure, turns) = against(&peer("eager"), &settings());
    assert_eq!((figure.refused.as_deref().filter(|r| !r.starts_with("spread too wide")), turns), (None, 3));
    assert!(figure.theirs.min >= 1e-3 && figure.theirs.count >= 15, "{figure:?}");
    let folder = scripts.folder().to_owned();
    drop(scripts);
    assert!(!folder.exists());
}

#[test]
fn the_scripts_take_the_fastest_repetition_to_tell_how_many_make_a_span() {
    let Some(python) = python() else { return };
    let scripts = Scripts::write().unwrap();
    let head = format!("import sys; sys.path.insert(0, {:?}); import common\n", scripts.folder());
    // Of five repetitions alone, the first and the last are slow.
    let program = head
        + "clock, runs = [0.0], []\n\
           common.time.perf_counter = lambda: clock[0]\n\
           def step():\n\
           \x20   runs.append(None)\n\
           \x20   clock[0] += 4e-3 if len(runs) in (1, 5) else 1.1e-4\n\
           times = common.turn(step, lambda: None, 0.0, 1, 2e-3)\n\
           assert len(times) == 5 and len(runs) == 5 + 5 * 19, (times, len(runs))\n";
    let output = Command::new(python).args(["-B", "-c", &program]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn packages_that_are_not_installed_are_named() {
    let Some(python) = python() else { return };
    let scripts = Scripts::write().unwrap();
    for (script, named) in [("pytorch.py", "torch is not installed"), ("jax_optax.py", "jax is not installed")] {
        // -S leaves installed packages out, -E a path to them.
        let arguments =
            ["-S".into(), "-E".into(), scripts.path(script).into_os_string(), "--work".into(), "mlp".into()];
        let peer = Peer { label: script.into(), start: Start::Command(python.clone().into(), arguments.to_vec()) };
        let (figure, _) = against(&peer, &settings());
        assert!(figure.refused.as_deref().is_some_and(|r| r.starts_with(named)), "{figure:?}");
    }
}

/// What our own step of this name does on the CPU.
fn own_work(name: &str) -> Work {
    let cpu = Cpu::<f32>::new();
    let training = training(&cpu, name).unwrap();
    let mut model = training.model::<Cpu<f32>>().unwrap();
    model.plan(&training.input, training.batch, Mode::Training).unwrap();
    let parameters = model.parameters().layout().unwrap().0.parameters();
    training.work(parameters, "f32", works::threads(&cpu))
}

/// What a script declares where it is asked for this work and its input ends at once; nothing where a package is missing.
fn declared(peer: &str, asked: &Work, scripts: &Scripts, python: &str) -> Option<Work> {
    let places = Places { python: python.into(), rust: None, llm_c: None };
    let Start::Command(program, arguments) = places.peer(peer, asked, scripts).unwrap().start else { return None };
    let mut command = Command::new(program);
    command.args(arguments).env("PYTHONDONTWRITEBYTECODE", "1").stdin(std::process::Stdio::null());
    let output = command.output().unwrap();
    let line: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{peer}: {error}: {}", String::from_utf8_lossy(&output.stderr)));
    if let Some(missing) = line["missing"].as_str() {
        println!("skipped: {}: {missing}", asked.name);
        return None;
    }
    Some(serde_json::from_value(line["work"].clone()).unwrap())
}

#[test]
fn the_scripts_declare_exactly_our_steps() {
    assert_eq!(own_work("resnet18").parameters, 11_689_512, "torchvision's own");
    let Some(python) = python() else { return };
    let scripts = Scripts::write().unwrap();
    for name in unit::STEPS.into_iter().filter(|name| *name != "gpt2") {
        let ours = own_work(name);
        for peer in ["pytorch-eager", "jax"] {
            if let Some(theirs) = declared(peer, &ours, &scripts, &python) {
                assert_eq!(difference(&ours, &theirs, ["here", "there"]), None, "{peer}: {name}");
            }
        }
    }
}

#[test]
fn a_resnet_of_other_classes_or_pictures_declares_other_work() {
    let Some(python) = python() else { return };
    let scripts = Scripts::write().unwrap();
    let (ours, common) = (own_work("resnet18"), scripts.path("common.py"));
    let text = std::fs::read_to_string(&common).unwrap();
    for (other, expected) in [
        ("((3, 224, 224), 10)", "another number of parameters: 11,689,512 here, 11,181,642 there"),
        ("((3, 96, 96), 1000)", "another shape of the inputs: [4, 3, 224, 224] here, [4, 3, 96, 96] there"),
    ] {
        let changed = text.replace("((3, 224, 224), 1000)", other);
        assert_ne!(changed, text);
        std::fs::write(&common, changed).unwrap();
        for peer in ["pytorch-eager", "jax"] {
            if let Some(theirs) = declared(peer, &ours, &scripts, &python) {
                assert_eq!(difference(&ours, &theirs, ["here", "there"]).as_deref(), Some(expected), "{peer}");
            }
        }
    }
}

#[test]
fn peers_are_asked_for_exactly_our_work() {
    let scripts = Scripts::write().unwrap();
    let places = Places { python: "python3".into(), rust: None, llm_c: None };
    let asked = |work: &Work| match places.peer("pytorch-eager", work, &scripts).unwrap().start {
        Start::Command(_, arguments) => arguments[1..].join(OsString::from(" ").as_os_str()).into_string().unwrap(),
        Start::Missing(reason) => reason,
    };
    let common = "--threads 2 --precision f32 --update momentum+global_norm";
    assert_eq!(asked(&work()), format!("--form eager --work mlp --device cpu {common} --batch 128 --samples 21376"));
    let update = Work { name: "update".into(), inputs: vec![50_000_000], samples: 0, ..work() };
    assert_eq!(asked(&update), format!("--form eager --work update --device cpu {common} --parameters 50000000"));
    let pictures = Work { name: "resnet18".into(), inputs: vec![4, 3, 224, 224], samples: 108, ..work() };
    let wanted = format!("--form eager --work resnet18 --device cpu {common} --batch 4 --samples 108");
    assert_eq!(asked(&pictures), wanted);
    let gpt = Work { name: "gpt_cpu".into(), inputs: vec![12, 64], samples: 3_072, ..work() };
    let wanted = format!("--form eager --work gpt_cpu --device cpu {common} --batch 12 --context 64 --samples 3072");
    assert_eq!(asked(&gpt), wanted);
    for name in NAMES {
        places.peer(name, &work(), &scripts).unwrap();
    }
    let wrong = places.peer("torch", &work(), &scripts).unwrap_err().to_string();
    assert!(wrong.contains("\"torch\"") && wrong.contains("pytorch-eager"), "{wrong}");
    for name in ["pytorch-graphed", "candle", "burn", "llm.c"] {
        assert!(matches!(places.peer(name, &work(), &scripts).unwrap().start, Start::Missing(_)), "{name}");
    }
}

#[test]
fn the_patterns_choose_the_works_that_peers_do() {
    let works = |patterns: &[&str], place| {
        let patterns = patterns.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        Request { patterns, place, precisions: Vec::new(), seconds: None, command: String::new() }.works()
    };
    let usual = "update/momentum+global_norm/50M";
    assert_eq!(works(&[], Place::Cpu), ["mlp", "cnn", "audio_cnn", "gpt_cpu", usual]);
    assert_eq!(works(&["step/mlp"], Place::Cpu), ["mlp"]);
    assert_eq!(works(&["step/mlp/bf16", "step/gpt2"], Place::Cuda(0)), ["mlp", "gpt2"]);
    assert_eq!(works(&["step/resnet18"], Place::Cpu), ["resnet18"]);
    assert_eq!(works(&["step"], Place::Cpu), ["mlp", "cnn", "audio_cnn", "resnet18", "gpt_cpu", "gpt2"]);
    assert_eq!(works(&["update/momentum+global_norm"], Place::Cpu), [usual]);
    assert_eq!(works(&["update"], Place::Cuda(0)), ["update/momentum+global_norm/124M"]);
    assert_eq!(works(&["update/sgd", "data", "device/copy"], Place::Cpu), Vec::<&str>::new());
}

#[test]
fn an_update_is_compared_by_the_rule_and_the_size_that_its_pattern_names() {
    let request = |patterns: &[&str], place| {
        let patterns = patterns.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        Request { patterns, place, precisions: Vec::new(), seconds: None, command: String::new() }
    };
    for (pattern, place, expected) in [
        ("update/adamw", Place::Cpu, "update/adamw+global_norm/50M"),
        ("update/adamw", Place::Cuda(0), "update/adamw+global_norm/124M"),
        ("update/adamw+global_norm/10M", Place::Cuda(0), "update/adamw+global_norm/10M"),
        ("update/adamw+global_norm/355M/bf16", Place::Cuda(0), "update/adamw+global_norm/355M"),
        ("update/*/1M", Place::Cpu, "update/momentum+global_norm/1M"),
    ] {
        let request = request(&[pattern, "step/mlp"], place);
        assert_eq!(request.works(), ["mlp", expected], "{pattern}");
        assert_eq!(request.without_peers(), Vec::<String>::new());
    }
    let without = request(&["update/lion", "step", "kernel", "update/adamw+none"], Place::Cpu).without_peers();
    assert_eq!(without, ["update/lion", "kernel", "update/adamw+none"]);
    // What we do ourselves, and what is asked of the others.
    let work = unit::unit("update/adamw+global_norm/1M", Place::Cpu, Precision::F32).unwrap().work();
    assert_eq!((work.update.as_str(), work.inputs.as_slice()), ("adamw+global_norm", &[1_000_000][..]));
    assert_eq!(work.title(), "update/adamw+global_norm/1M/f32");
}

#[test]
fn patterns_without_a_work_of_peers_are_told_in_a_line() {
    let ran = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["bench", "--device", "cpu", "--seconds", "0.001", "--peers", "device/fork_join"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success() && told.lines().count() == 1, "{told}");
    assert!(told.starts_with("peers: none does the work of device/fork_join; they do step/mlp, step/cnn"), "{told}");
}

#[cfg(unix)]
#[test]
fn the_command_tells_table_json_and_page_why_a_peer_was_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let [python, json, html] = ["python", "out.json", "out.html"].map(|name| folder.path().join(name));
    let theirs = Work { inputs: vec![64, 784], ..work() };
    std::fs::write(&python, format!("#!/bin/sh\n{}{}\n", declaring(&theirs), answering("[1e-6]"))).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args([
            "bench",
            "--device",
            "cpu",
            "--threads",
            "2",
            "--seconds",
            "0.01",
            "--peer",
            "pytorch-eager",
            "--peer",
            "candle",
        ])
        .args(["step/mlp", "--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()])
        .env("WARPSTEP_PYTHON", &python)
        .env_remove("WARPSTEP_RUST_PEERS")
        .current_dir(folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let reason = "another shape of the inputs: [128, 784] here, [64, 784] there; times of different work tell nothing";
    let page = std::fs::read_to_string(&html).unwrap();
    let results = warpstep::bench::compare::read(&json).unwrap();
    assert!(text.contains(&format!("not compared: {reason}")), "{text}");
    assert!(text.contains("candle            not compared: not built: run benches/peers/build-rust"), "{text}");
    assert!(page.contains(&format!("refused: {reason}")));
    assert_eq!(results.peers.iter().map(|p| p.peer.as_str()).collect::<Vec<_>>(), ["PyTorch eager", "candle"]);
    assert_eq!(results.peers[0].refused.as_deref(), Some(reason));
}

#[cfg(unix)]
#[test]
fn the_binary_of_llm_c_is_held_to_what_it_prints() {
    use std::os::unix::fs::PermissionsExt;
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("train_gpt2cu");
    let script = "#!/bin/sh\n\
        while [ $# -gt 0 ]; do case $1 in -i) data=$2;; -b) batch=$2;; -t) context=$2;; -x) steps=$2;; esac; shift 2; done\n\
        [ $(wc -c < $data) -eq $((1024 + 2 * (8 * context + 1))) ] || { echo 'bad tokens' >&2; exit 1; }\n\
        printf '| %-21s | %-50s |\\n' 'micro batch size B' $batch 'sequence length T' $context precision BF16 num_parameters 124475904\n\
        for i in $(seq $steps); do echo \"step $i/$steps | loss LOSS (+nanz)| norm 1.0 (+nanz)| lr 3.00e-04 | 0.0$i ms | 1.0% bf16 MFU | 9 tok/s\"; done\n";
    std::fs::write(&binary, script.replace("LOSS", "4.1")).unwrap();
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
    let scripts = Scripts::write().unwrap();
    let places = Places { python: python.into(), rust: None, llm_c: Some(binary.clone()) };
    let gpt2 = Work {
        name: "gpt2".into(),
        parameters: 124_475_904,
        inputs: vec![2, 16],
        samples: 8,
        precision: "bf16".into(),
        update: "adamw+global_norm".into(),
        threads: 0,
    };
    let peer = places.peer("llm.c", &gpt2, &scripts).unwrap();
    let figure = run(&peer, &mut Ours::new(gpt2.clone()), &settings()).unwrap();
    assert_eq!((figure.refused, figure.work), (None, gpt2.clone()));
    // Five steps a turn behind the two that are left out: 0.03 ms to 0.07 ms.
    assert_eq!(figure.theirs.count, 15);
    assert!((figure.theirs.min - 0.03e-3).abs() < 1e-12, "{:?}", figure.theirs);
    for value in ["nan", "-nan", "inf"] {
        std::fs::write(&binary, script.replace("LOSS", value)).unwrap();
        let figure = run(&peer, &mut Ours::new(gpt2.clone()), &settings()).unwrap();
        let refused = figure.refused.as_deref();
        assert_eq!(refused, Some("its loss or its parameters are not finite: its times tell nothing"), "{value}");
    }
    let smaller = Work { parameters: 124_439_808, ..gpt2 };
    let figure = run(&peer, &mut Ours::new(smaller), &settings()).unwrap();
    assert!(
        figure
            .refused
            .is_some_and(|r| r.starts_with("another number of parameters: 124,439,808 here, 124,475,904 there"))
    );
}
