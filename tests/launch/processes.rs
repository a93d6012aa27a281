//! `warpstep launch` with shell scripts as ranks.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::common::{stderr, stdout, warpstep};

/// Longer than anything here should take.
const PATIENCE: Duration = Duration::from_secs(60);

/// `warpstep launch` with these options, of ranks that run this script in the folder.
fn launch(folder: &Path, options: &[&str], script: &str) -> Command {
    let mut command = warpstep();
    command.arg("launch").args(options).args(["--program", "/bin/sh", "--", "-c", script]);
    command.current_dir(folder);
    command
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// `--gpus 3`, and `--cpus 3` where there is an mpirun.
fn three() -> Vec<[&'static str; 2]> {
    if Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return vec![["--gpus", "3"], ["--cpus", "3"]];
    }
    println!("skipped: launch --cpus: no mpirun here");
    vec![["--gpus", "3"]]
}

/// A script's rank, under both.
const RANK: &str = "r=${WARPSTEP_RANK:-$OMPI_COMM_WORLD_RANK}; r=${r:-$PMI_RANK};";

fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn lives(pid: &str) -> bool {
    // A process that ended and was not waited for still has a folder.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// What every rank wrote into `pid-N`.
fn pids(folder: &Path) -> Vec<String> {
    (0..3).map(|rank| read(&folder.join(format!("pid-{rank}"))).trim().to_owned()).collect()
}

fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: a child that was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

/// Nothing of an attempt but logs is left in the folder of logs.
fn only_logs(folder: &Path) {
    let names = std::fs::read_dir(folder.join("logs")).unwrap().map(|entry| entry.unwrap().file_name());
    for name in names {
        assert!(name.to_string_lossy().ends_with(".log"), "{name:?}");
    }
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

#[test]
fn outputs_are_kept_apart_and_every_rank_knows_its_place() {
    for kind in three() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "{RANK} echo out $r; echo err $r >&2; echo $r $WARPSTEP_TIMEOUT $WARPSTEP_EMULATOR_DEVICES > env-$r"
        );
        let output = output(&mut launch(folder.path(), &[&kind[..], &["--timeout", "90"]].concat(), &script));
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), ("out 0\n", "err 0\n"));
        for rank in 1..3 {
            let log = read(&folder.path().join(format!("logs/rank-{rank}.log")));
            assert_eq!(log, format!("warpstep launch: rank {rank} of 3\nout {rank}\nerr {rank}\n"));
        }
        for rank in 0..3 {
            assert_eq!(read(&folder.path().join(format!("env-{rank}"))), format!("{rank} 90 3\n"));
        }
        only_logs(folder.path());
    }
}

#[test]
fn ranks_on_gpus_get_numbers_an_address_and_a_share_of_the_cores() {
    let folder = tempfile::tempdir().unwrap();
    let script = "echo $WARPSTEP_RANK/$WARPSTEP_WORLD_SIZE $WARPSTEP_LOCAL_RANK/$WARPSTEP_LOCAL_WORLD_SIZE \
                  $WARPSTEP_ADDRESS:$WARPSTEP_PORT $WARPSTEP_RUN $RAYON_NUM_THREADS > env-$WARPSTEP_RANK";
    let mut command = launch(folder.path(), &["--gpus", "2", "--log-dir", "there/deep"], script);
    assert!(output(command.env("RAYON_NUM_THREADS", "5")).status.success());
    let told: Vec<Vec<String>> = (0..2)
        .map(|rank| read(&folder.path().join(format!("env-{rank}"))).split_whitespace().map(str::to_owned).collect())
        .collect();
    assert_eq!([&told[0][0], &told[0][1], &told[1][0], &told[1][1]], ["0/2", "0/2", "1/2", "1/2"]);
    assert!(told[0][2].starts_with("127.0.0.1:"));
    assert_eq!(told[0][2..], told[1][2..], "one address, one name");
    assert_eq!(told[0][4], "5", "what a user set stands");
    assert!(folder.path().join("there/deep/rank-1.log").is_file());
}

#[test]
fn the_first_failure_ends_all_and_its_own_error_is_shown() {
    for kind in three() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "{RANK} echo $$ > pid-$r; if [ $r = 2 ]; then echo 'error: data.csv:7: no number' >&2; exit 7; fi; exec sleep 3600"
        );
        let output = output(&mut launch(folder.path(), &kind, &script));
        assert_eq!(output.status.code(), Some(7), "{kind:?}: {}", stderr(&output));
        let log = folder.path().canonicalize().unwrap().join("logs/rank-2.log");
        let expected = format!(
            "error: rank 2 exited with code 7; {} ends with:\n    error: data.csv:7: no number\n",
            log.display()
        );
        assert_eq!(stderr(&output), expected, "{kind:?}");
        assert!(pids(folder.path()).iter().all(|pid| !lives(pid)), "{kind:?}");
        only_logs(folder.path());
    }
}

#[test]
fn of_ranks_that_all_end_with_one_code_the_one_that_says_why_is_shown() {
    for kind in three() {
        let folder = tempfile::tempdir().unwrap();
        // As where one process of several finds wrong input: all know its code, and it alone says what it is.
        let script = format!(
            "{RANK} [ $r = 2 ] && echo 'error: data.path: there is no such file' >&2; echo $$ > pid-$r; \
             while ! [ -e pid-0 -a -e pid-1 -a -e pid-2 ]; do sleep 0.01; done; [ $r = 2 ] || sleep 0.2; exit 2"
        );
        let output = output(&mut launch(folder.path(), &kind, &script));
        assert_eq!(output.status.code(), Some(2), "{kind:?}: {}", stderr(&output));
        let told = stderr(&output);
        assert!(told.contains("error: rank 2 exited with code 2; "), "{kind:?}: {told}");
        assert!(told.ends_with("    error: data.path: there is no such file\n"), "{kind:?}: {told}");
    }
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed_with_all_that_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let script = "trap '' TERM; sleep 3600 & echo $! > pid-$WARPSTEP_RANK; if [ $WARPSTEP_RANK = 0 ]; then sleep 0.3; kill -9 $$; fi; wait";
    let output = output(&mut launch(folder.path(), &["--gpus", "3"], script));
    assert_eq!(output.status.code(), Some(137));
    assert_eq!(stderr(&output), "error: rank 0 was ended by SIGKILL\n");
    assert!(pids(folder.path())[1..].iter().all(|pid| !lives(pid)));
}

#[test]
fn signals_of_the_user_reach_all_and_every_rank_ends_in_its_own_time() {
    for kind in three() {
        for (number, name, code) in [(libc::SIGINT, "INT", 130), (libc::SIGTERM, "TERM", 143)] {
            let folder = tempfile::tempdir().unwrap();
            // All end together, as ranks that wrote a checkpoint together do; under `--gpus` they need not.
            let pause = if kind[0] == "--gpus" { "sleep 0.$r;" } else { "" };
            let script = format!(
                "{RANK} trap '{pause} echo saved > saved-$r; exit {code}' {name}; echo $$ > pid-$r; while :; do sleep 0.01; done"
            );
            let mut child = start(&mut launch(folder.path(), &kind, &script));
            wait_for("ranks that begin", || pids(folder.path()).iter().all(|pid| !pid.is_empty()));
            signal(&child, number);
            let status = child.wait().unwrap();
            assert_eq!(status.code(), Some(code), "{kind:?} {name}");
            for rank in 0..3 {
                assert_eq!(
                    read(&folder.path().join(format!("saved-{rank}"))),
                    "saved\n",
                    "{kind:?} {name} rank {rank}"
                );
            }
        }
    }
}

#[test]
fn the_user_s_third_signal_ends_even_those_that_hear_none() {
    for kind in three() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!("{RANK} trap '' TERM INT; echo $$ > pid-$r; while :; do sleep 0.05; done");
        let mut child = start(&mut launch(folder.path(), &kind, &script));
        wait_for("ranks that begin", || pids(folder.path()).iter().all(|pid| !pid.is_empty()));
        for _ in 0..3 {
            signal(&child, libc::SIGINT);
            // Two that come together are one.
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(child.wait().unwrap().code(), Some(130), "{kind:?}");
        assert!(pids(folder.path()).iter().all(|pid| !lives(pid)), "{kind:?}");
    }
}

#[test]
fn a_rank_that_the_user_told_to_end_is_no_failure() {
    for kind in three() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!("{RANK} echo $r >> tries-$r; exit 143");
        let output = output(&mut launch(folder.path(), &[&kind[..], &["--restarts", "2"]].concat(), &script));
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(143), ""), "{kind:?}");
        assert!(
            (0..3).all(|rank| read(&folder.path().join(format!("tries-{rank}"))) == format!("{rank}\n")),
            "{kind:?}"
        );
    }
}

#[test]
fn under_mpirun_ranks_draw_no_line_into_a_pipe() {
    let Some(kind) = three().into_iter().find(|kind| kind[0] == "--cpus") else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = output(&mut launch(folder.path(), &kind, &format!("{RANK} [ $r = 0 ] && echo $TERM; exit 0")));
    assert_eq!((output.status.code(), stdout(&output).trim()), (Some(0), "dumb"));
}

#[test]
fn the_end_of_its_terminal_ends_a_launch_but_not_one_under_nohup() {
    for (ignored, code) in [(false, 129), (true, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let script = "echo $$ > pid-$WARPSTEP_RANK; while ! [ -e end ]; do sleep 0.01; done";
        let mut command = launch(folder.path(), &["--gpus", "3"], script);
        let action = if ignored { libc::SIG_IGN } else { libc::SIG_DFL };
        // SAFETY: between fork and exec only a system call is made.
        unsafe {
            command.pre_exec(move || {
                libc::signal(libc::SIGHUP, action);
                Ok(())
            });
        }
        let mut child = start(&mut command);
        wait_for("ranks that begin", || pids(folder.path()).iter().all(|pid| !pid.is_empty()));
        signal(&child, libc::SIGHUP);
        std::thread::sleep(Duration::from_millis(100));
        std::fs::write(folder.path().join("end"), "").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "ignored: {ignored}");
    }
}

#[test]
fn a_killed_launcher_leaves_no_rank_behind() {
    for kind in three() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!("{RANK} trap '' TERM INT; echo $$ > pid-$r; while :; do sleep 0.05; done");
        // What a launcher leaves that is killed goes with the folder.
        let mut child = start(launch(folder.path(), &kind, &script).env("TMPDIR", folder.path()));
        wait_for("ranks that begin", || pids(folder.path()).iter().all(|pid| !pid.is_empty()));
        signal(&child, libc::SIGKILL);
        child.wait().unwrap();
        wait_for("ranks that end", || pids(folder.path()).iter().all(|pid| !lives(pid)));
    }
}

#[test]
fn all_start_again_as_often_as_asked_but_not_with_wrong_input() {
    let script = "echo $WARPSTEP_RESTART >> tries-$WARPSTEP_RANK; if [ $WARPSTEP_RANK = 1 ] && [ $WARPSTEP_RESTART -lt 2 ]; then kill -9 $$; fi";
    for (restarts, code, tries) in [("2", 0, "0\n1\n2\n"), ("1", 137, "0\n1\n")] {
        let folder = tempfile::tempdir().unwrap();
        let output = output(&mut launch(folder.path(), &["--gpus", "2", "--restarts", restarts], script));
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert_eq!(read(&folder.path().join("tries-1")), tries);
        let told = stderr(&output);
        assert!(told.contains("error: rank 1 was ended by SIGKILL"), "{told}");
        assert!(told.contains(&format!("restart 1 of {restarts}, from the last checkpoint\n")), "{told}");
    }
    let folder = tempfile::tempdir().unwrap();
    let wrong = "echo $WARPSTEP_RESTART >> tries; exit 2";
    let output = output(&mut launch(folder.path(), &["--gpus", "1", "--restarts", "3"], wrong));
    assert_eq!((output.status.code(), read(&folder.path().join("tries")).as_str()), (Some(2), "0\n"));
}

#[test]
fn what_cannot_be_started_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let one_sentence = |output: &Output, text: &str| {
        assert_eq!(output.status.code(), Some(2), "{}", stderr(output));
        assert_eq!(stderr(output).lines().count(), 1, "{}", stderr(output));
        assert!(stderr(output).contains(text), "{}", stderr(output));
    };
    let run = |arguments: &[&str]| output(warpstep().arg("launch").args(arguments).current_dir(folder.path()));
    one_sentence(
        &run(&["--gpus", "2", "--", "eval", "runs/mnist"]),
        "launch: found \"eval\", expected `train RUN.toml`",
    );
    one_sentence(&run(&["--gpus", "2", "--", "train", "missing.toml"]), "missing.toml");
    one_sentence(&run(&["--gpus", "2", "--program", "./missing"]), "cannot start ./missing");
    let digits = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/digits.toml");
    one_sentence(
        &run(&["--gpus", "2", "--", "train", digits, "--device", "cuda:1"]),
        "run.device: found \"cuda:1\" for 2 processes, expected \"cuda\"",
    );
    for wrong in [
        &["--gpus", "0", "--", "train", "run.toml"][..],
        &["--", "train", "run.toml"],
        &["--gpus", "2", "--cpus", "2", "--", "train", "run.toml"],
        &["--gpus", "2", "--timeout", "never", "--", "train", "run.toml"],
        &["--gpus", "2", "--", "train", "run.toml", "--no-such-option"],
    ] {
        assert_eq!(run(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let nowhere = output(launch(folder.path(), &["--cpus", "2"], "true").env("PATH", folder.path()));
    one_sentence(&nowhere, "launch --cpus: found no mpirun on the path; install Open MPI");
}
