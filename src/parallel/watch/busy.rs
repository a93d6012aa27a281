//! A rank that is at work though nothing else shows it.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Watch;

/// How often it is said: several times in the shortest timeout that makes sense.
const EACH: Duration = Duration::from_millis(100);
/// What writing to a slow disk over a slow network still comes to, in bytes a second.
const SLOWEST: u64 = 4 << 20;
/// What a write of nothing may take.
const LEAST: Duration = Duration::from_secs(10);

/// Says that this rank is alive while it writes a checkpoint, until it is dropped, or for as long as the slowest disk would take: one
/// that does not answer at all is not waited for without end.
#[derive(Debug)]
pub struct Busy {
    /// Closed to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    /// Begins to say so, for a write of this many bytes.
    pub fn new(watch: Arc<Watch>, bytes: u64) -> Self {
        let (end, ended) = channel();
        let until = Instant::now() + LEAST + Duration::from_secs(bytes / SLOWEST);
        let watcher = Arc::clone(&watch);
        let say = move || {
            while Instant::now() < until && ended.recv_timeout(EACH) == Err(RecvTimeoutError::Timeout) {
                watcher.progress();
            }
        };
        watch.progress();
        // Without a thread, which the system may refuse, a long write is judged as if nothing went on.
        let thread = std::thread::Builder::new().name("warpstep-busy".into()).spawn(say).ok();
        Busy { end: Some(end), thread }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}
