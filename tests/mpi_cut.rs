//! A network that is cut in the middle of a training over MPI. Two machines, as far as Open MPI can tell: namespaces with a network
//! and a name of their own, on one of which mpirun and rank 0 run, and on the other its daemon and rank 1.

mod common;
#[path = "common/mpi.rs"]
mod mpi;
#[path = "common/network.rs"]
mod network;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::warpstep;
use network::{BOTH, FAR, NEAR, Network};
use warpstep::train::checkpoint::{Which, find};

/// Without an end of its own.
const DIGITS: &str = r#"
[run]
steps = 100000000
log_every_steps = 1

[data]
format = "digits"
batch_size = 32
split = { validation = 0.1, test = 0.1 }

[model]
preset = "mlp"
hidden = [32, 16]

[optimizer]
rule = "momentum"
learning_rate = 0.1
clip = { global_norm = 0.5 }

[checkpoint]
every_steps = 10
keep = 2

[evaluate]
every_steps = 0
"#;

/// Steps that are told of before the network is cut.
const STEPS: usize = 25;
/// Longer than anything here should take, on however slow a machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two processes that train over the network until it is cut.
struct Training {
    network: Network,
    folder: tempfile::TempDir,
    mpirun: Running,
}

impl Training {
    fn start(network: Network, timeout: f64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("run.toml");
        std::fs::write(&file, DIGITS).unwrap();
        // What ssh is to other clusters. Its first argument is the machine, the others the command.
        let agent = folder.path().join("agent.sh");
        let machine = format!("ip netns exec {} unshare --uts", network.far);
        std::fs::write(&agent, format!("shift\nexec {machine} sh -c 'hostname far && eval \"$0\"' \"$*\"\n")).unwrap();
        let agent = format!("sh {}", agent.display());
        let hosts = format!("{NEAR}:1,{FAR}:1");
        let address = format!("WARPSTEP_ADDRESS={NEAR}");
        let timeout = format!("parallel.timeout={timeout}");
        let out = folder.path().join("out");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &network.near, "unshare", "--uts"]);
        command.args(["sh", "-c", "hostname near && exec \"$0\" \"$@\"", "mpirun"]).args(mpi::options());
        command.args(["-n", "2", "--map-by", "node", "--host", &hosts, "--mca", "plm_rsh_agent", &agent]);
        command.args(["--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", BOTH]);
        command.args(["--mca", "oob_tcp_if_include", BOTH, "-x", &address, "-x", "WARPSTEP_PORT=29501"]);
        command.arg(warpstep().get_program()).arg("train").arg(&file).arg("--out").arg(&out);
        command.args(["--threads", "1", "--quiet", "--set", &timeout]);
        let stderr = File::create(folder.path().join("stderr")).unwrap();
        command.env("OMPI_MCA_mpi_yield_when_idle", "1").env("TMPDIR", folder.path());
        let mpirun = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let training = Training { network, folder, mpirun: Running(mpirun) };
        training.wait_for("steps", || training.metrics().lines().count() >= STEPS);
        assert_eq!(training.ranks().len(), 2, "{}", training.words());
        training
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn metrics(&self) -> String {
        std::fs::read_to_string(self.out().join("metrics.jsonl")).unwrap_or_default()
    }

    /// None where the last line is not whole.
    fn last_step(&self) -> Option<u64> {
        let metrics = self.metrics();
        let last: serde_json::Value = serde_json::from_str(metrics.lines().last()?).ok()?;
        last["step"].as_u64()
    }

    fn log(&self, rank: usize) -> String {
        std::fs::read_to_string(self.out().join(format!("logs/rank-{rank}.log"))).unwrap_or_default()
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr")).unwrap()
    }

    /// What the processes said.
    fn words(&self) -> String {
        format!("mpirun: {}\nlog of rank 0: {}\nlog of rank 1: {}", self.stderr(), self.log(0), self.log(1))
    }

    /// The processes on both sides that are Warpstep.
    fn ranks(&self) -> Vec<i32> {
        let program = Path::new(warpstep().get_program()).canonicalize().unwrap();
        let is_rank = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
        self.network.processes().into_iter().filter(is_rank).collect()
    }

    fn wait_for(&self, what: &str, come: impl Fn() -> bool) {
        let began = Instant::now();
        while !come() {
            assert!(began.elapsed() < PATIENCE, "waited for {what} in vain: {}", self.words());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Cuts one side off. Gives how long it then took until both ranks were gone.
    fn cut(&self, side: &str) -> Duration {
        self.network.cut(side);
        let cut = Instant::now();
        self.wait_for("the end of both ranks", || self.ranks().is_empty());
        cut.elapsed()
    }

    /// Waits until nothing runs on either side: mpirun and its daemon give each other up. Gives the exit code.
    fn end(&mut self) -> Option<i32> {
        self.wait_for("the end of mpirun and its daemon", || {
            // One that has ended is not in its namespace any more, though nobody has waited for it.
            self.network.processes().is_empty()
        });
        self.mpirun.0.wait().unwrap().code()
    }

    /// The time and the step that a sentence of this rank tells.
    fn sentence(&self, line: &str, rank: usize, host: &str) -> (f64, u64) {
        let found = line
            .strip_prefix(&format!("error: rank {rank} on host {host} gave no sign of life for "))
            .and_then(|rest| {
                rest.strip_suffix(": it hangs, or its network is cut; 1 other rank stopped; go on with --resume")
            })
            .and_then(|rest| rest.split_once(" s after step "));
        let (seconds, step) = found.unwrap_or_else(|| panic!("{line:?} of {}", self.words()));
        (seconds.parse().unwrap(), step.parse().unwrap())
    }

    /// One sentence for the user, one in the other rank's log, of the step that was the last. Gives the times that they tell.
    fn told(&self) -> [f64; 2] {
        let stderr = self.stderr();
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
        assert_eq!(errors.len(), 1, "{}", self.words());
        let (near, step) = self.sentence(errors[0], 1, "far");
        let log = self.log(1);
        let (far, far_step) = self.sentence(log.lines().last().unwrap_or_default(), 0, "near");
        // One of them may have had all it needed for one step more.
        assert!(step.abs_diff(far_step) <= 1, "{}", self.words());
        let last = self.last_step().expect("a whole last line");
        assert!(last <= step && step <= last + 1, "{last} steps in the metrics: {}", self.words());
        [near, far]
    }

    /// Nothing is half written, and one process goes on with what there is.
    fn goes_on(&self) {
        let checkpoints = self.out().join("checkpoints");
        for folder in [self.out(), checkpoints.clone()] {
            for entry in std::fs::read_dir(folder).unwrap() {
                let name = entry.unwrap().file_name();
                assert!(!name.to_string_lossy().ends_with(".tmp"), "{name:?} was left");
            }
        }
        assert!(!common::tensor_hashes(&self.out()).is_empty());
        let latest = find(&checkpoints, Which::Latest).unwrap().expect("a checkpoint");
        let step: u64 = latest.file_name().unwrap().to_str().unwrap().strip_prefix("step-").unwrap().parse().unwrap();
        let mut command = warpstep();
        command.arg("train").arg(self.folder.path().join("run.toml")).arg("--out").arg(self.out());
        let mut resumed = Running(command.args(["--resume", "--quiet", "--threads", "1"]).spawn().unwrap());
        self.wait_for("steps of the run that goes on", || self.last_step() > Some(step + 15));
        // SAFETY: a signal to a child that was not waited for.
        assert_eq!(unsafe { libc::kill(resumed.0.id() as i32, libc::SIGTERM) }, 0);
        assert_eq!(resumed.0.wait().unwrap().code(), Some(128 + libc::SIGTERM));
    }
}

/// Whether this machine has what it takes; where not, a line says what is missing.
fn is_there() -> bool {
    if !mpi::is_there() {
        return false;
    }
    let unshare = Command::new("unshare").args(["--uts", "true"]).output().is_ok_and(|output| output.status.success());
    if !mpi::is_open_mpi() {
        println!("skipped: the mpirun here is not Open MPI's");
    } else if !unshare {
        println!("skipped: machines cannot be given names here (root, and the `unshare` command, can)");
    }
    mpi::is_open_mpi() && unshare
}

/// The watch sees the silence, before Open MPI and the system do.
fn silent(number: u32) -> Option<()> {
    const TIMEOUT: f64 = 4.0;
    let network = Network::new(number)?;
    // As clusters set it, where a quarter of an hour is too long for mpirun to find out.
    network.send_again(4);
    // No process can tell which side it was, and none has to.
    let side = if number.is_multiple_of(2) { network.far.clone() } else { network.near.clone() };
    let mut training = Training::start(network, TIMEOUT);
    let time = training.cut(&side);
    assert!(time.as_secs_f64() <= TIMEOUT, "both had ended only {time:?} after the cut: {}", training.words());
    assert_eq!(training.end(), Some(1), "{}", training.words());
    assert_eq!(training.told(), [0.75 * TIMEOUT; 2], "{}", training.words());
    training.goes_on();
    println!("try {number}: both ranks had ended {:.1} s after the cut: {}", time.as_secs_f64(), training.stderr());
    Some(())
}

#[test]
fn a_network_that_is_cut_ends_both_ranks_with_one_sentence_ten_times_of_ten() {
    if !is_there() {
        return;
    }
    // Two at a time; each lane cuts one of the sides.
    std::thread::scope(|scope| {
        for lane in 0..2 {
            scope.spawn(move || (lane..10).step_by(2).try_for_each(silent));
        }
    });
}

#[test]
fn where_the_system_gives_a_connection_up_first_the_sentence_tells_the_time_that_it_took() {
    const TIMEOUT: f64 = 40.0;
    if !is_there() {
        return;
    }
    for number in 10..12 {
        let Some(network) = Network::new(number) else { return };
        // Three tries take some two seconds.
        network.send_again(2);
        let side = if number.is_multiple_of(2) { network.far.clone() } else { network.near.clone() };
        let mut training = Training::start(network, TIMEOUT);
        let time = training.cut(&side);
        assert_eq!(training.end(), Some(1), "{}", training.words());
        let told = training.told();
        // It was heard before the cut, at most a heartbeat of a second, and said to be gone before this was.
        let most = time.as_secs_f64() + 1.5;
        assert!(
            told.iter().all(|&told| told > 0.5 && told < most && told < 0.7 * TIMEOUT),
            "{told:?}: {}",
            training.words()
        );
        training.goes_on();
    }
}
