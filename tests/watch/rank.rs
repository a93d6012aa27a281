//! What this program does as a rank: steps, then the trouble that the test asks for.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use warpstep::parallel::rendezvous::Rendezvous;
use warpstep::parallel::watch::{TIMEOUT, Told, Watch, WatchOptions};
use warpstep::parallel::world::World;

/// What a rank is to do; none in the test itself.
pub const TROUBLE: &str = "WATCH_TEST_TROUBLE";
/// Which rank does it.
pub const VICTIM: &str = "WATCH_TEST_VICTIM";
/// The name of the machine, where not the true one.
pub const HOST: &str = "WATCH_TEST_HOST";
/// A folder for logs.
pub const FOLDER: &str = "WATCH_TEST_FOLDER";
/// The step after which it happens.
pub const STEP: u64 = 7;

#[ctor::ctor]
fn be_a_rank() {
    if let Ok(trouble) = std::env::var(TROUBLE) {
        // What calls this knows no panics.
        let code = std::panic::catch_unwind(|| run(&trouble)).unwrap_or(Ok(101));
        std::process::exit(code.unwrap_or_else(|error| {
            eprintln!("error: {error}");
            i32::from(error.exit_code())
        }));
    }
}

fn run(trouble: &str) -> warpstep::Result<i32> {
    let world = World::detect()?;
    let at = world.rendezvous.clone().expect("an address");
    let victim: usize = std::env::var(VICTIM).expect("a victim").parse().expect("a rank");
    let folder = PathBuf::from(std::env::var_os(FOLDER).expect("a folder"));
    let host = std::env::var(HOST).unwrap_or_else(|_| world.host.clone());
    let term = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&term)).expect("a handler");
    // As an abort in the middle of a collective may.
    let hangs = matches!(trouble, "stopped" | "stuck" | "cut");
    let aborted = folder.join(format!("aborted-{}", world.rank));
    let mut rendezvous = Rendezvous::join(&world, &at, Duration::from_secs(20))?;
    let mut id = if world.rank == 0 { vec![42; 128] } else { Vec::new() };
    rendezvous.broadcast(&mut id)?;
    assert_eq!(id, [42; 128]);
    let usual = WatchOptions::new(world.timeout.unwrap_or(TIMEOUT));
    let watch = Watch::start(
        rendezvous,
        &host,
        WatchOptions {
            // However late a busy machine lets the victim die.
            settle: if trouble == "killed and missed" { Duration::from_secs(10) } else { usual.settle },
            log: Some(folder.join(format!("rank-{}.log", world.rank))),
            on_failure: Box::new(move |failure| {
                let _ = std::fs::write(&aborted, format!("{:?}", failure.cause));
                std::thread::sleep(Duration::from_secs(if hangs { 3600 } else { 0 }));
            }),
            ..usual
        },
    )?;
    for step in 1..=STEP {
        std::thread::sleep(Duration::from_millis(5));
        let waiting = watch.communicating();
        drop(waiting);
        watch.step(step);
    }
    // What makes steps that ranks do together: none is ahead of another.
    let ready = |rank: usize| folder.join(format!("ready-{rank}"));
    let _ = std::fs::write(ready(world.rank), "");
    while !(0..world.size).all(|rank| ready(rank).exists()) {
        std::thread::sleep(Duration::from_millis(1));
    }
    if world.rank != victim {
        return Ok(follow(trouble, watch, &world, &term));
    }
    match trouble {
        "killed" | "killed and missed" => signal_self(libc::SIGKILL),
        "stopped" | "stopped and aborted at once" => signal_self(libc::SIGSTOP),
        "panics" => panic!("a rank's own end"),
        "stuck" => std::thread::sleep(Duration::from_secs(3600)),
        "fails" => return Ok(fail(watch)),
        "late" => {
            for _ in 0..30 {
                // Longer than the timeout in all, but it moves.
                std::thread::sleep(Duration::from_millis(100));
                watch.progress();
            }
            watch.goodbye();
            return Ok(0);
        }
        "cut" => return Ok(follow(trouble, watch, &world, &term)),
        "nothing" => {
            let _waiting = watch.communicating();
            std::thread::sleep(Duration::from_secs(3600));
        }
        other => panic!("no trouble is called {other}"),
    }
    Ok(0)
}

/// All others wait for the victim in a collective that never ends, or end before it.
fn follow(trouble: &str, watch: Watch, world: &World, term: &AtomicBool) -> i32 {
    if trouble == "late" {
        // One after the other.
        std::thread::sleep(Duration::from_millis(20 * world.rank as u64));
        watch.goodbye();
        return 0;
    }
    if trouble == "killed and missed" {
        // As MPI may return an error before the watch has seen why.
        return fail(watch);
    }
    let _waiting = watch.communicating();
    loop {
        std::thread::sleep(Duration::from_millis(1));
        if trouble == "cut" {
            // It goes well until the test cuts the network.
            watch.progress();
        }
        if term.load(Ordering::Relaxed) {
            if watch.failed_within(Duration::from_millis(500)) {
                std::thread::sleep(Duration::from_secs(3600));
            }
            eprintln!("error: rank {} took the launcher's signal for the user's", world.rank);
            return 143;
        }
    }
}

fn fail(watch: Watch) -> i32 {
    let text = "the loss is not finite";
    if watch.fail(text) == Told::Nobody {
        let _ = writeln!(std::io::stderr(), "error: {text}");
    }
    3
}

fn signal_self(signal: i32) {
    // SAFETY: a signal to this process itself.
    unsafe { libc::raise(signal) };
}
