//! The processes of one attempt: none outlives the launcher, and the first failure ends all.

use std::mem::MaybeUninit;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGKILL, SIGTERM};
use signal_hook::iterator::Signals;

use super::control::Control;
use super::outputs::Attempt;
use crate::error::{Error, Result};

/// Between two looks.
const GLANCE: Duration = Duration::from_millis(10);
/// How long ranks have, after one failed, to see it themselves and say so.
const SETTLE: Duration = Duration::from_secs(1);
/// How long they have to end after SIGTERM, until they are killed.
const GRACE: Duration = Duration::from_secs(5);
/// The user's third signal means now.
const LAST_SIGNAL: u32 = 3;

/// How an attempt ended.
pub(super) enum End {
    /// Every rank ended with 0.
    Done,
    /// The user's signal, passed on to all, or told to all by the rank that it came to.
    Interrupted(i32),
    /// A rank failed; which, where that is known.
    Failed { rank: Option<usize>, status: ExitStatus },
}

/// Processes, each in a group of its own with all that it starts.
pub(super) struct Job {
    children: Vec<Member>,
    /// What the ranks that mpirun started tell; none where the children are the ranks.
    control: Option<Control>,
}

/// A signal of the user's.
struct Interrupt {
    signal: i32,
    /// How many there were.
    times: u32,
    /// The processes that it was passed on to.
    told: Vec<i32>,
}

struct Member {
    child: Child,
    status: Option<ExitStatus>,
}

impl Job {
    /// A process a rank.
    pub fn of_ranks(size: usize, mut command: impl FnMut(usize) -> Result<Command>) -> Result<Self> {
        let mut job = Job { children: Vec::with_capacity(size), control: None };
        for rank in 0..size {
            // Those that started are ended where one cannot be.
            job.start(command(rank)?, SIGKILL)?;
        }
        Ok(job)
    }

    /// mpirun, which starts the ranks. It hears of the launcher's end in time to end them.
    pub fn through_mpirun(command: Command, control: Control) -> Result<Self> {
        let mut job = Job { children: Vec::new(), control: Some(control) };
        job.start(command, SIGTERM)?;
        Ok(job)
    }

    fn start(&mut self, mut command: Command, at_our_end: i32) -> Result<()> {
        command.process_group(0);
        die_with_parent(&mut command, at_our_end);
        let child = command.spawn().map_err(|e| Error::io("start", command.get_program(), e))?;
        self.children.push(Member { child, status: None });
        Ok(())
    }

    /// Waits for all, and ends them where one fails.
    ///
    /// # Errors
    /// The system's own.
    pub fn wait(mut self, signals: &mut Signals, outputs: &Attempt<'_>) -> Result<End> {
        let mut failed: Option<Instant> = None;
        let mut sent = None;
        let mut interrupted: Option<Interrupt> = None;
        while self.look()? {
            for signal in signals.pending() {
                let times = interrupted.as_ref().map_or(1, |interrupt| interrupt.times + 1);
                interrupted = Some(Interrupt { signal, times, told: Vec::new() });
            }
            if let Some(interrupt) = &mut interrupted {
                self.pass_on(interrupt);
            }
            // mpirun ends the others itself.
            let failure = self.control.is_none() && self.ended().iter().any(|(_, status)| !status.success());
            if failure && interrupted.is_none() {
                let since = failed.get_or_insert_with(Instant::now).elapsed();
                if since > SETTLE + GRACE && sent != Some(SIGKILL) {
                    self.kill();
                    sent = Some(SIGKILL);
                } else if since > SETTLE && sent.is_none() {
                    self.end();
                    sent = Some(SIGTERM);
                }
            }
            std::thread::sleep(GLANCE);
        }
        let interrupted = interrupted.map(|interrupt| interrupt.signal).or_else(|| signals.pending().next());
        if let Some(signal) = interrupted {
            return Ok(End::Interrupted(signal));
        }
        Ok(self.culprit(outputs, sent.is_some()))
    }

    /// Whether any still runs.
    fn look(&mut self) -> Result<bool> {
        let mut running = false;
        for member in &mut self.children {
            if member.status.is_none() && has_ended(&member.child) {
                // What it started and left goes with it. Until it is waited for, the number is its own.
                send(-(member.child.id() as i32), SIGKILL);
                member.status = member.child.try_wait().map_err(|e| Error::io("wait for", "a rank", e))?;
            }
            running |= member.status.is_none();
        }
        Ok(running)
    }

    /// The ranks that have ended, in order where that is known.
    fn ended(&self) -> Vec<(usize, ExitStatus)> {
        match &self.control {
            Some(control) => control.ended(),
            None => {
                self.children.iter().enumerate().filter_map(|(rank, member)| Some((rank, member.status?))).collect()
            }
        }
    }

    /// Whose failure it was: one that a signal ended, or one with another code than those that stop for others have, or any; of these
    /// one that printed an error, rank 0, which every user sees, or any. None before the others that was ended for another's sake.
    fn culprit(&self, outputs: &Attempt<'_>, ended_by_us: bool) -> End {
        let failed: Vec<_> = self.ended().into_iter().filter(|(_, status)| !status.success()).collect();
        // A rank that was told to end tells all others, and none of them failed.
        let told = |(_, status): &(usize, ExitStatus)| {
            [SIGINT, SIGTERM].into_iter().find(|signal| status.code() == Some(128 + signal))
        };
        if let Some(signal) = failed.first().and_then(told)
            && failed.iter().all(|one| told(one).is_some())
        {
            return End::Interrupted(signal);
        }
        let for_others = |status: ExitStatus| {
            let signal = status.signal().or_else(|| status.code().map(|code| code - 128));
            match signal {
                Some(SIGTERM) => ended_by_us || self.control.is_some(),
                Some(SIGKILL) => ended_by_us,
                _ => false,
            }
        };
        let rank_of = |wanted: &dyn Fn(usize, ExitStatus) -> bool| {
            failed.iter().find(|(rank, status)| !for_others(*status) && wanted(*rank, *status))
        };
        let of_kind = |kind: &dyn Fn(ExitStatus) -> bool| {
            rank_of(&|rank, status| kind(status) && rank > 0 && outputs.has_error(rank))
                .or_else(|| rank_of(&|rank, status| kind(status) && rank == 0))
                .or_else(|| rank_of(&|_, status| kind(status)))
        };
        let found = rank_of(&|_, status| status.signal().is_some())
            .or_else(|| of_kind(&|status| status.code() != Some(1)))
            .or_else(|| of_kind(&|_| true))
            .or(failed.first());
        if let Some(&(rank, status)) = found {
            return End::Failed { rank: Some(rank), status };
        }
        // mpirun may fail by itself.
        let status = self.children.iter().filter_map(|member| member.status).find(|status| !status.success());
        status.map_or(End::Done, |status| End::Failed { rank: None, status })
    }

    /// Passes the user's signal on. Ranks under mpirun get it from us, for mpirun would kill them a second later; one that has
    /// just begun, as soon as it is known.
    fn pass_on(&self, interrupt: &mut Interrupt) {
        if interrupt.times >= LAST_SIGNAL {
            return self.kill();
        }
        let running = match &self.control {
            Some(control) => control.pids(),
            None => self.groups().collect(),
        };
        for pid in running {
            if !interrupt.told.contains(&pid) {
                send(pid, interrupt.signal);
                interrupt.told.push(pid);
            }
        }
    }

    /// Asks all to end.
    fn end(&self) {
        self.groups().for_each(|group| send(group, SIGTERM));
    }

    fn kill(&self) {
        let ranks = self.control.as_ref().map(Control::pids).unwrap_or_default();
        ranks.into_iter().chain(self.groups()).for_each(|pid| send(pid, SIGKILL));
    }

    /// The groups of the children that run, as `kill` takes them.
    fn groups(&self) -> impl Iterator<Item = i32> {
        let running = self.children.iter().filter(|member| member.status.is_none());
        running.map(|member| -(member.child.id() as i32))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let running = self.children.iter().any(|member| member.status.is_none());
        if running {
            self.kill();
            for member in &mut self.children {
                let _ = member.child.wait();
            }
        }
    }
}

/// Whether a child has ended, without waiting for it. An error is left to whoever waits.
fn has_ended(child: &Child) -> bool {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the system writes into room of the type that it asks for; zeros, which it leaves where the child runs, are a value of
    // that type.
    unsafe {
        let status = libc::waitid(libc::P_PID, child.id(), info.as_mut_ptr(), options);
        status != 0 || info.assume_init().si_pid() != 0
    }
}

/// A process that is gone already is not missed.
fn send(pid: i32, signal: i32) {
    // SAFETY: it takes any numbers. A child's stays its own until it was waited for, which only follows later.
    unsafe { libc::kill(pid, signal) };
}

/// Has the system send the child a signal when this process ends, by whatever end.
pub(super) fn die_with_parent(command: &mut Command, signal: i32) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only system calls are made, and no memory is taken.
    unsafe {
        command.pre_exec(move || bind_to(parent, signal));
    }
}

/// Binds this process to its parent.
pub(super) fn bind_to(parent: u32, signal: i32) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: these take numbers alone.
        let (bound, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, signal), libc::getppid()) };
        if bound != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // It may have ended before it was bound to.
        if now as u32 != parent {
            return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (parent, signal);
    Ok(())
}
