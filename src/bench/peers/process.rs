//! A peer as a process: lines of JSON go back and forth, and nobody waits for ever.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::super::interrupt;
use super::super::results::Work;

/// What a peer says of itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Declared {
    pub peer: String,
    pub version: String,
    pub work: Work,
}

/// Letters of a peer's own words that are repeated at most.
const LETTERS: usize = 300;
/// How long a peer may take to end once its input has ended.
const GOODBYE: Duration = Duration::from_secs(5);
/// How often somebody who waits for a peer looks whether a signal came.
const LOOK: Duration = Duration::from_millis(100);

/// A peer that runs. Dropped, it and all that it started are ended.
pub(super) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    last_words: Receiver<String>,
}

impl Process {
    /// Starts a command as a group of processes of its own, so that all it starts can be ended with it. On Linux it does not
    /// outlive the thread that calls this, which is the one that waits for it, however that ends.
    pub fn start(command: &mut Command) -> Result<Self, String> {
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        #[cfg(target_os = "linux")]
        end_with_us(command);
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => format!("{} was not found", piped.get_program().display()),
            _ => format!("cannot start {}: {e}", piped.get_program().display()),
        })?;
        let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (said, lines) = channel();
        let (ended, last_words) = channel();
        // Neither thread is waited for: a process that the peer left behind could hold its pipes open.
        std::thread::spawn(move || {
            for line in lines_of(output) {
                if said.send(line).is_err() {
                    break;
                }
            }
        });
        std::thread::spawn(move || {
            let last = lines_of(errors).filter(|line| !line.trim().is_empty()).last();
            let _ = ended.send(last.unwrap_or_default());
        });
        Ok(Process { child, input, lines, last_words })
    }

    /// What the peer declares: what it does, or `Err` with why there is nothing to compare.
    pub fn declaration(&mut self, patience: Duration) -> Result<Declared, String> {
        let value = self.hear(patience)?;
        if let Some(reason) = value.get("missing").and_then(Value::as_str) {
            return Err(reason.to_owned());
        }
        serde_json::from_value(value).map_err(|e| format!("it does not declare its work: {e}"))
    }

    /// Lets it repeat its work for so many seconds: seconds of each repetition.
    pub fn run(&mut self, seconds: f64, patience: Duration) -> Result<Vec<f64>, String> {
        #[derive(Deserialize)]
        struct Answer {
            times: Vec<f64>,
        }
        let began = Instant::now();
        let answer = self.ask(&format!("run {seconds}"), patience + Duration::from_secs_f64(seconds))?;
        let wall = began.elapsed().as_secs_f64();
        let Answer { times } =
            serde_json::from_value(answer).map_err(|e| format!("it does not answer with times: {e}"))?;
        check_times(&times, wall)?;
        Ok(times)
    }

    /// Asks whether its last loss and its parameters are finite, and refuses it where it does not say that they are.
    pub fn check(&mut self, patience: Duration) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Answer {
            finite: bool,
        }
        let Answer { finite } = serde_json::from_value(self.ask("check", patience)?)
            .map_err(|e| format!("it does not say whether its loss and parameters are finite: {e}"))?;
        let refused = "its loss or its parameters are not finite: its times tell nothing";
        if finite { Ok(()) } else { Err(refused.to_owned()) }
    }

    fn ask(&mut self, line: &str, patience: Duration) -> Result<Value, String> {
        let asked = self.input.as_mut().map(|input| writeln!(input, "{line}").and_then(|()| input.flush()));
        if !matches!(asked, Some(Ok(()))) {
            return Err(self.died());
        }
        self.hear(patience)
    }

    fn hear(&mut self, patience: Duration) -> Result<Value, String> {
        let until = Instant::now() + patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(LOOK)) {
                Ok(line) => {
                    return serde_json::from_str(&line)
                        .map_err(|_| format!("found the line {:?}, expected a line of JSON", shortened(&line)));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.died()),
                Err(RecvTimeoutError::Timeout) if interrupt::caught().is_some() => {
                    self.end();
                    return Err("it was ended: the benchmark was interrupted".to_owned());
                }
                Err(RecvTimeoutError::Timeout) if left > LOOK => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.end();
                    return Err(format!("it was ended: no answer within {:.0} s", patience.as_secs_f64().max(1.0)));
                }
            }
        }
    }

    /// Why it is no longer there, in its own last words.
    fn died(&mut self) -> String {
        self.input = None;
        let status =
            self.wait(GOODBYE).map_or_else(|| "it fell silent".to_owned(), |status| format!("it died ({status})"));
        self.end();
        match self.last_words.recv_timeout(Duration::from_secs(1)) {
            Ok(words) if !words.is_empty() => format!("{status}: {}", shortened(words.trim())),
            _ => status,
        }
    }

    fn wait(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Ends the peer and what it started.
    fn end(&mut self) {
        #[cfg(unix)]
        if let Ok(group) = i32::try_from(self.child.id()) {
            // SAFETY: kill takes no pointer. The child was made the leader of a group of its own, and its number stays taken
            // while processes of the group are left; where none is, the call finds none.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The end of its input lets it end by itself.
        self.input = None;
        let _ = self.wait(GOODBYE);
        self.end();
    }
}

/// Has the system end the command's process when the thread that started it ends: a benchmark that is killed leaves nobody who
/// could.
#[cfg(target_os = "linux")]
fn end_with_us(command: &mut Command) {
    let us = std::process::id();
    let ask = move || {
        // SAFETY: prctl and getppid take no pointer here.
        let (asked, parent) =
            unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong), libc::getppid()) };
        match (asked, u32::try_from(parent)) {
            (0, Ok(parent)) if parent == us => Ok(()),
            // Who ended before it was asked for tells nobody: then this ends itself.
            (0, _) => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes two system calls, and neither allocates nor locks.
    unsafe { std::os::unix::process::CommandExt::pre_exec(command, ask) };
}

/// Whether these can be the times of repetitions one after the other within `wall` seconds.
fn check_times(times: &[f64], wall: f64) -> Result<(), String> {
    if times.is_empty() || times.iter().any(|time| !(time.is_finite() && *time > 0.0)) {
        return Err("its times are not all numbers above 0".to_owned());
    }
    let told: f64 = times.iter().sum();
    if told > 1.01 * wall {
        return Err(format!("its times add up to {told:.3} s, but it ran for {wall:.3} s"));
    }
    Ok(())
}

/// The lines of a pipe until it ends, whatever bytes they hold.
fn lines_of(pipe: Option<impl Read>) -> impl Iterator<Item = String> {
    let mut reader = pipe.map(BufReader::new);
    std::iter::from_fn(move || {
        let mut bytes = Vec::new();
        match reader.as_mut()?.read_until(b'\n', &mut bytes) {
            Ok(read) if read > 0 => Some(String::from_utf8_lossy(&bytes).into_owned()),
            _ => None,
        }
    })
}

fn shortened(text: &str) -> String {
    let text = text.trim_end();
    match text.char_indices().nth(LETTERS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}
