//! A rank that fails ends all, with one sentence.

use std::process::Command;
use std::time::{Duration, Instant};

use super::common::{free_port, fresh_seed, warpstep};
use super::rank::{HOST, STEP};
use super::team::{End, Team};
use warpstep::parallel::world::host_name;
use warpstep::random::{Philox, Purpose};

/// Tries of each trouble.
const TRIES: u64 = 10;
/// At the same time.
const ABREAST: u64 = 5;
const SIZE: usize = 4;

/// Ten tries with a victim drawn anew.
fn each_try(trouble: &'static str, timeout: f64, check: impl Fn(usize, &[End]) + Copy + Send) {
    let draw = Philox::new(fresh_seed(), Purpose::Sampling, 0);
    let tries: Vec<u64> = (0..TRIES).collect();
    for some in tries.chunks(ABREAST as usize) {
        std::thread::scope(|scope| {
            for &number in some {
                let victim = draw.below(number, SIZE as u64) as usize;
                scope.spawn(move || check(victim, &one_try(trouble, victim, timeout)));
            }
        });
    }
}

/// A team on this machine, or as if on these.
fn start(trouble: &str, victim: usize, timeout: f64, hosts: &[&str]) -> Team {
    let mut team = Team::new(trouble, victim);
    let port = free_port();
    for rank in 0..SIZE {
        let mut command = team.command(&[]);
        command.env("WARPSTEP_TIMEOUT", timeout.to_string());
        if let Some(host) = hosts.get(rank) {
            command.env(HOST, host);
        }
        team.start(command, SIZE, "127.0.0.1", port);
    }
    team
}

fn one_try(trouble: &str, victim: usize, timeout: f64) -> Vec<End> {
    let team = start(trouble, victim, timeout, &[]);
    let began = Instant::now();
    let ends = team.ends();
    println!("{trouble}, rank {victim}: all ended {:?} after the last was started", began.elapsed());
    ends
}

/// All others ended with 1 after their handlers were called; one of them, the lowest, said this; all have it in their logs.
fn others_stopped(ends: &[End], victim: usize, sentence: &str) {
    let speaker = usize::from(victim == 0);
    for (rank, end) in ends.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        let expected = if rank == speaker { format!("error: {sentence}\n") } else { String::new() };
        assert_eq!((end.code, end.stderr.as_str()), (Some(1), expected.as_str()), "rank {rank}: {ends:#?}");
        assert_eq!(end.log, format!("error: {sentence}\n"), "rank {rank}");
        assert!(end.aborted.is_some(), "the handler of rank {rank} was not called");
    }
}

#[test]
fn a_killed_rank_ends_all_with_one_sentence_ten_times_of_ten() {
    each_try("killed", 60.0, |victim, ends| {
        let sentence = format!(
            "rank {victim} on host {} died after step {STEP}; 3 other ranks stopped; go on with --resume",
            host_name()
        );
        others_stopped(ends, victim, &sentence);
        assert_eq!(ends[victim].code, None);
    });
}

#[test]
fn a_rank_that_panics_is_told_as_one_that_died() {
    let ends = one_try("panics", 2, 60.0);
    let sentence =
        format!("rank 2 on host {} died after step {STEP}; 3 other ranks stopped; go on with --resume", host_name());
    others_stopped(&ends, 2, &sentence);
}

#[test]
fn a_stopped_rank_ends_all_within_the_timeout_ten_times_of_ten() {
    each_try("stopped", 1.6, |victim, ends| {
        let sentence = format!(
            "rank {victim} on host {} gave no sign of life for 1.2 s after step {STEP}: it hangs, or its network is cut; \
             3 other ranks stopped; go on with --resume",
            host_name()
        );
        others_stopped(ends, victim, &sentence);
    });
}

#[test]
fn where_rank_0_falls_silent_a_rank_of_another_machine_speaks_and_where_it_died_the_lowest_does() {
    let hosts = ["first", "first", "second", "second"];
    for (trouble, timeout, speaker) in [("stopped", 1.6, 2), ("killed", 60.0, 1)] {
        let ends = start(trouble, 0, timeout, &hosts).ends();
        for (rank, end) in ends.iter().enumerate().skip(1) {
            assert_eq!(
                (end.code, end.stderr.is_empty()),
                (Some(1), rank != speaker),
                "{trouble} rank {rank}: {ends:#?}"
            );
            assert!(end.log.contains("rank 0 on host first"), "{ends:#?}");
        }
    }
}

#[test]
fn who_speaks_of_a_silent_rank_0_is_heard_before_a_launcher_ends_all() {
    let mut team = start("stopped and aborted at once", 0, 4.0, &[]);
    team.wait_until_ready();
    // Rank 1, which is to speak, comes to it later than the others, and they do not end before.
    std::thread::sleep(Duration::from_millis(2650));
    team.signal_one(1, libc::SIGSTOP);
    assert!(!team.one_ends_within(Duration::from_millis(600)));
    team.signal_one(1, libc::SIGCONT);
    // As mpirun does when the first has ended.
    assert!(team.one_ends_within(Duration::from_secs(10)));
    team.signal_one(0, libc::SIGCONT);
    let ends = team.ends();
    let sentence = format!("error: rank 0 on host {} gave no sign of life for 3 s after step {STEP}: ", host_name());
    for (rank, end) in ends.iter().enumerate().skip(1) {
        let told = if rank == 1 { end.stderr.starts_with(&sentence) } else { end.stderr.is_empty() };
        assert!(told && end.code == Some(1) && end.log.starts_with(&sentence), "rank {rank}: {ends:#?}");
    }
}

#[test]
fn a_death_is_the_cause_where_others_fail_by_it_ten_times_of_ten() {
    each_try("killed and missed", 60.0, |victim, ends| {
        let sentence = format!("error: rank {victim} on host {} died after step {STEP}; 3 other ranks", host_name());
        for (rank, end) in ends.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let spoke = end.stderr.starts_with(&sentence) && end.stderr.lines().count() == 1;
            let told = if rank == usize::from(victim == 0) { spoke } else { end.stderr.is_empty() };
            assert!(end.code == Some(1) && told && end.log.starts_with(&sentence), "rank {rank}: {ends:#?}");
        }
    });
}

#[test]
fn a_job_that_is_suspended_as_a_whole_goes_on() {
    let team = start("late", 3, 1.0, &[]);
    team.wait_until_ready();
    team.signal(libc::SIGSTOP);
    std::thread::sleep(Duration::from_millis(1500));
    team.signal(libc::SIGCONT);
    let ends = team.ends();
    assert!(ends.iter().all(|end| end.code == Some(0) && end.stderr.is_empty()), "{ends:#?}");
}

#[test]
fn a_stuck_rank_is_named_by_those_that_wait_for_it_ten_times_of_ten() {
    each_try("stuck", 1.0, |victim, ends| {
        let sentence = format!(
            "rank {victim} on host {} is stuck after step {STEP}: others have waited for it for 1 s; 3 other ranks stopped; go \
             on with --resume",
            host_name()
        );
        // Its thread lives, so that it stops as all do, and rank 0 speaks even of itself.
        for (rank, end) in ends.iter().enumerate() {
            let expected = if rank == 0 { format!("error: {sentence}\n") } else { String::new() };
            assert_eq!((end.code, end.stderr.as_str()), (Some(1), expected.as_str()), "rank {rank}: {ends:#?}");
            assert_eq!(end.log, format!("error: {sentence}\n"));
        }
    });
}

#[test]
fn ranks_that_all_wait_for_each_other_stop() {
    let ends = one_try("nothing", 2, 1.0);
    for (rank, end) in ends.iter().enumerate() {
        assert_eq!(end.code, Some(1), "{ends:#?}");
        assert_eq!(end.stderr.contains("have waited for each other for 1 s after step 7"), rank == 0, "{ends:#?}");
    }
}

#[test]
fn a_rank_s_own_error_is_the_cause_that_is_told() {
    each_try("fails", 60.0, |victim, ends| {
        let cause = "the loss is not finite";
        let host = host_name();
        let sentence = format!(
            "rank {victim} on host {host} failed after step {STEP}: {cause}; 3 other ranks stopped; go on with --resume"
        );
        // Once in all: by rank 0, in its own words where the error is its own.
        for (rank, end) in ends.iter().enumerate() {
            let expected = match (rank, victim) {
                (0, 0) => format!("error: {cause}\n"),
                (0, _) => format!("error: {sentence}\n"),
                _ => String::new(),
            };
            let code = if rank == victim { 3 } else { 1 };
            assert_eq!((end.code, end.stderr.as_str()), (Some(code), expected.as_str()), "rank {rank}: {ends:#?}");
            if rank != victim {
                assert_eq!(end.log, format!("error: {sentence}\n"));
            }
        }
    });
}

#[test]
fn ranks_may_end_at_other_times_and_one_that_moves_is_left_alone() {
    for victim in [0, 3] {
        let ends = one_try("late", victim, 1.0);
        assert!(ends.iter().all(|end| end.code == Some(0) && end.stderr.is_empty()), "{ends:#?}");
        assert!(ends.iter().all(|end| end.log.is_empty() && end.aborted.is_none()), "{ends:#?}");
    }
}

/// The lines of one try under a launcher, each rank's death of which it hears by itself as well.
fn under(launcher: &[&str], victim: usize) -> (Option<i32>, Vec<String>) {
    let team = Team::new("killed", victim);
    let mut command = team.command(launcher);
    let output = command.current_dir(team.folder.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    (output.status.code(), stderr.lines().map(str::to_owned).collect())
}

fn has_mpirun() -> bool {
    let has = Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has {
        println!("skipped: no mpirun here");
    }
    has
}

#[test]
fn under_mpirun_the_sentence_is_out_before_its_signals_and_they_are_not_the_user_s() {
    let open_mpi = Command::new("mpirun")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success() && String::from_utf8_lossy(&output.stdout).contains("Open MPI"));
    if !open_mpi {
        println!("skipped: no mpirun of Open MPI here");
        return;
    }
    let draw = Philox::new(fresh_seed(), Purpose::Sampling, 1);
    for number in 0..5 {
        let victim = draw.below(number, SIZE as u64) as usize;
        let options =
            ["mpirun", "--allow-run-as-root", "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none", "-np", "4"];
        let (code, lines) = under(&options, victim);
        let errors: Vec<&String> = lines.iter().filter(|line| line.starts_with("error:")).collect();
        let sentence =
            format!("error: rank {victim} on host {} died after step {STEP}; 3 other ranks stopped", host_name());
        assert!(matches!(errors.as_slice(), [line] if line.starts_with(&sentence)), "{lines:#?}");
        assert_ne!(code, Some(0));
    }
}

#[test]
fn under_launch_the_sentence_comes_first_and_then_the_signal_that_ended_the_rank() {
    let warpstep = warpstep().get_program().to_str().unwrap().to_owned();
    for kind in ["--gpus", "--cpus"] {
        if kind == "--cpus" && !has_mpirun() {
            continue;
        }
        for victim in [0, 2, 3] {
            let (code, lines) = under(&[&warpstep, "launch", kind, "4", "--program"], victim);
            let sentence =
                format!("rank {victim} on host {} died after step {STEP}; 3 other ranks stopped", host_name());
            let mut lines = lines.iter();
            // Rank 0 speaks here; where it is the one, the next speaks into its file, which the launcher then shows.
            if victim > 0 {
                assert!(lines.next().is_some_and(|line| line.starts_with(&format!("error: {sentence}"))), "{lines:?}");
            }
            let ended = format!("error: rank {victim} was ended by SIGKILL");
            assert!(lines.any(|line| line.starts_with(&ended)), "{lines:?}");
            assert_eq!(code, Some(137), "{kind}, rank {victim}");
        }
    }
}
