//! The end of the process after another rank's failure.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::failure::Failure;
use super::{Handler, WatchOptions};
use crate::tell::tell;

/// How long handler and output may take at most.
const GRACE: Duration = Duration::from_secs(5);

/// A share of the timeout, so that the end still lies within it.
pub(super) fn grace(timeout: Duration) -> Duration {
    (timeout / 5).min(GRACE)
}

/// Says what happened (where `aloud` on standard error, always in the log), calls the handler and flushes what is printed, on a
/// thread of its own: each may block. The receiver hears when that is done.
pub(super) fn begin(failure: &Failure, aloud: bool, options: WatchOptions) -> Receiver<()> {
    let (done, finished) = channel();
    let sentence = failure.sentence(&options.advice);
    let WatchOptions { log, on_failure, .. } = options;
    let failure = failure.clone();
    let last_words = move || {
        speak(&sentence, aloud, log.as_deref());
        call(on_failure, &failure);
        let _ = std::io::stdout().flush();
        let _ = done.send(());
    };
    // Without a thread the channel closes, and the process ends at once.
    let _ = std::thread::Builder::new().name("warpstep-end".into()).spawn(last_words);
    finished
}

fn speak(sentence: &str, aloud: bool, log: Option<&Path>) {
    let line = format!("error: {sentence}");
    if aloud {
        tell(&line);
    }
    if let Some(log) = log
        && let Ok(mut file) = OpenOptions::new().create(true).append(true).open(log)
    {
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}

/// A handler that panics has said so itself; standard output is flushed all the same.
fn call(handler: Handler, failure: &Failure) {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handler(failure)));
}

/// A watch that panics has said so, and closed its connections, which the others see. Its process goes on no more than theirs.
pub(super) fn or_exit<T>(watch: impl FnOnce() -> T) -> T {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(watch)).unwrap_or_else(|_| exit())
}

/// Ends the process without what libraries do at its end: they may wait for the rank that failed.
pub(super) fn exit() -> ! {
    // SAFETY: it takes any number, and does not come back.
    unsafe { libc::_exit(1) }
}
