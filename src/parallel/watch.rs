//! Whether the other processes live, beside the way of the data: neither NCCL nor MPI tells in time, and a process that waits in
//! either cannot look.
//!
//! Every process has a thread and a connection to rank 0, on which it says several times in a timeout which step it has done, and
//! whether it computes or waits for others. Rank 0 judges. What it looks for:
//!
//! - a rank that died: its connection closed without a goodbye;
//! - one that hangs, or lost its network: silent for three quarters of the timeout;
//! - one that is stuck: it speaks, but neither its step nor its phase has changed for a timeout, while others wait for it;
//! - one that failed by itself, and says why.
//!
//! Then rank 0 says so in one sentence and tells all others; where rank 0 itself is the one, the others see it, and the lowest of
//! them says it. Each calls the run's handler, which aborts its communicators, and ends its process with exit code 1, by the
//! thread: the main thread may sit in a collective for ever.

mod beat;
mod busy;
mod ending;
mod failure;
mod judge;
mod link;
mod thread;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::rendezvous::Rendezvous;
use crate::error::{Error, Result};
use beat::Shared;
pub use busy::Busy;
pub use failure::{Cause, Failure, Named};

/// How long a rank may be silent or stuck where nobody says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// How long a rank's own error is held back where nobody says otherwise.
const SETTLE: Duration = Duration::from_millis(250);

/// What is done when another rank failed, before this process ends. It may hang: the process ends all the same.
pub type Handler = Box<dyn FnOnce(&Failure) + Send>;

/// How to watch.
pub struct WatchOptions {
    /// How long a rank may be silent or stuck until the others stop.
    pub timeout: Duration,
    /// How long rank 0 holds a rank's own error back, no longer than a share of the timeout: it may be the result of a death that is
    /// seen a moment later.
    pub settle: Duration,
    /// What a user should do after a failure: the end of the sentence. Empty: nothing.
    pub advice: String,
    /// A file of this rank that the sentence is added to.
    pub log: Option<PathBuf>,
    /// Aborts communicators.
    pub on_failure: Handler,
}

impl WatchOptions {
    /// Errors held back for 250 ms, and a handler that does nothing.
    pub fn new(timeout: Duration) -> Self {
        WatchOptions {
            timeout,
            settle: SETTLE,
            advice: "go on with --resume".into(),
            log: None,
            on_failure: Box::new(|_| {}),
        }
    }
}

/// Who tells the user of a failure of this rank's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Rank 0 has printed it, with this rank's name.
    ByRankZero,
    /// Nobody: this is rank 0, or it could not be reached. The caller prints it.
    Nobody,
}

/// The watch of this process. One that is dropped without [`Watch::goodbye`] is dead to the others.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    /// A byte on it wakes the thread.
    bell: UnixStream,
    thread: Mutex<Option<JoinHandle<Told>>>,
}

impl Watch {
    /// Begins to watch, over the connections of a rendezvous, when all ranks have called it. `host`: the name of this machine.
    ///
    /// # Errors
    /// A rank that is gone already, or a thread that the system refuses.
    pub fn start(mut rendezvous: Rendezvous, host: &str, options: WatchOptions) -> Result<Self> {
        let refused = |e: std::io::Error| Error::Network(format!("the watch over other ranks cannot start: {e}"));
        let (rank, size) = (rendezvous.rank(), rendezvous.size());
        let hosts = exchange_hosts(&mut rendezvous, host)?;
        // Clocks start when all are here.
        rendezvous.barrier()?;
        let shared = Arc::new(Shared::default());
        let (bell, hear) = UnixStream::pair().map_err(refused)?;
        bell.set_nonblocking(true).and_then(|()| hear.set_nonblocking(true)).map_err(refused)?;
        let links = rendezvous.into_links();
        let watcher =
            thread::Watcher::new(rank, size, hosts, links, Arc::clone(&shared), hear, options).map_err(refused)?;
        let thread = std::thread::Builder::new()
            .name("warpstep-watch".into())
            .spawn(move || ending::or_exit(|| watcher.run()))
            .map_err(refused)?;
        Ok(Watch { shared, bell, thread: Mutex::new(Some(thread)) })
    }

    /// This many steps are done.
    pub fn step(&self, done: u64) {
        self.shared.step(done);
    }

    /// This rank is alive though its step does not advance: a batch of an evaluation, a part of a checkpoint.
    pub fn progress(&self) {
        self.shared.progress();
    }

    /// This rank waits for others until the returned value is dropped. Several threads may, at the same time.
    pub fn communicating(&self) -> Communicating<'_> {
        self.shared.enter();
        Communicating { shared: &self.shared }
    }

    /// Whether another rank failed, so that this process is about to end. A SIGTERM that comes then is the launcher's.
    pub fn failed(&self) -> bool {
        self.shared.failure().is_some()
    }

    /// Waits for a failure to be seen, at most this long: a launcher, or a collective, may know of a death earlier.
    pub fn failed_within(&self, wait: Duration) -> bool {
        self.shared.failure_until(Instant::now() + wait)
    }

    /// A clean end: the others go on. On rank 0 it returns when all others have ended too, for they are watched till then.
    pub fn goodbye(&self) {
        self.leave(beat::Order::Goodbye);
    }

    /// This rank's own failure: the others stop, and print its text as the cause. The caller then ends the process with its own exit
    /// code. It does not return where another rank's failure came first, of which this one may be the result: the process ends as
    /// the others do.
    pub fn fail(&self, text: &str) -> Told {
        self.leave(beat::Order::Fail(text.to_owned()))
    }

    fn leave(&self, order: beat::Order) -> Told {
        self.shared.order(order);
        self.ring();
        // A thread that panicked has told nobody.
        self.take_thread().map_or(Told::Nobody, |thread| thread.join().unwrap_or(Told::Nobody))
    }

    fn take_thread(&self) -> Option<JoinHandle<Told>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn ring(&self) {
        // A full pipe wakes it as well.
        let _ = std::io::Write::write(&mut &self.bell, &[1]);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(thread) = self.take_thread() {
            self.shared.order(beat::Order::Abandon);
            self.ring();
            let _ = thread.join();
        }
    }
}

/// Waits for others as long as it lives.
#[derive(Debug)]
pub struct Communicating<'a> {
    shared: &'a Shared,
}

impl Drop for Communicating<'_> {
    fn drop(&mut self) {
        self.shared.leave();
    }
}

/// The machine of every rank, in all of them.
fn exchange_hosts(rendezvous: &mut Rendezvous, host: &str) -> Result<Vec<String>> {
    let all = rendezvous.gather(host.as_bytes())?;
    let hosts: Vec<_> = all.iter().map(|host| String::from_utf8_lossy(host)).collect();
    let damaged =
        |e: serde_json::Error| Error::Network(format!("the names of machines were damaged on their way: {e}"));
    let mut bytes = serde_json::to_vec(&hosts).map_err(damaged)?;
    rendezvous.broadcast(&mut bytes)?;
    let hosts: Vec<String> = serde_json::from_slice(&bytes).map_err(damaged)?;
    if hosts.len() == rendezvous.size() {
        return Ok(hosts);
    }
    Err(Error::Network(format!("found the machines of {} ranks, expected {}", hosts.len(), rendezvous.size())))
}
