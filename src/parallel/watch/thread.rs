//! The watch's thread: hears, speaks, judges, and ends the process.

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::beat::{Order, Shared};
use super::ending;
use super::failure::{Cause, Failure, Named};
use super::judge::{Limits, Seen, silent, stuck};
use super::link::{Link, Loss, Message, wait};
use super::{Told, WatchOptions};

/// How long a rank that woke from a long pause is thought to be ended for it.
const AFTER_WAKING: Duration = Duration::from_secs(5);

pub(super) struct Watcher {
    rank: usize,
    hosts: Vec<String>,
    /// By rank: this one's too. On ranks other than 0 only that of rank 0, and whether others ended, is kept up.
    seen: Vec<Seen>,
    /// By rank: rank 0 has all, the others that to rank 0.
    links: Vec<Option<Link>>,
    shared: Arc<Shared>,
    bell: UnixStream,
    options: WatchOptions,
    limits: Limits,
    /// Between two heartbeats.
    period: Duration,
    /// An error of a rank's own, and when it is told to all.
    pending: Option<(Failure, Instant)>,
    leaving: Option<Leaving>,
    /// When it went on after a pause so long that the others have taken it for lost.
    woke: Option<Instant>,
}

/// What the thread ends by.
enum Verdict {
    /// This rank leaves.
    Leave,
    /// All stop.
    Stop(Failure),
}

/// What this process does once its trainer is done.
enum Leaving {
    /// It said goodbye; waits no longer than until then for the answer (rank 0: for the others).
    Goodbye(Option<Instant>),
    /// It failed; waits no longer than until then for rank 0's word.
    Failed(Instant),
}

impl Watcher {
    pub fn new(
        rank: usize,
        size: usize,
        hosts: Vec<String>,
        links: Vec<Option<TcpStream>>,
        shared: Arc<Shared>,
        bell: UnixStream,
        options: WatchOptions,
    ) -> io::Result<Self> {
        let now = Instant::now();
        let links = links.into_iter().map(|link| link.map(Link::new).transpose()).collect::<io::Result<_>>()?;
        Ok(Watcher {
            rank,
            hosts,
            seen: vec![Seen::new(now); size],
            links,
            shared,
            bell,
            limits: Limits::new(options.timeout),
            period: (options.timeout / 20).clamp(Duration::from_millis(20), Duration::from_secs(1)),
            options,
            pending: None,
            leaving: None,
            woke: None,
        })
    }

    /// Until this rank leaves; where another fails, the process ends within.
    pub fn run(mut self) -> Told {
        let mut beaten = Instant::now();
        let mut looked = beaten;
        self.beat();
        loop {
            self.wait();
            let now = Instant::now();
            self.forgive(now - looked, now);
            looked = now;
            if now - beaten >= self.period {
                self.beat();
                beaten = now;
            }
            let verdict = self.obey(now).or_else(|| self.hear(now)).or_else(|| self.judge(now));
            match verdict.or_else(|| self.left(now)) {
                Some(Verdict::Leave) => return Told::Nobody,
                Some(Verdict::Stop(failure)) => return self.stop(failure),
                None => {}
            }
        }
    }

    fn wait(&mut self) {
        let bell = libc::pollfd { fd: self.bell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut interests = vec![bell];
        interests.extend(self.links.iter().flatten().map(Link::interest));
        let time = if self.pending.is_some() { self.options.settle / 10 } else { self.period };
        wait(&mut interests, time.min(self.period));
        // However often it rang, once is enough.
        while matches!(self.bell.read(&mut [0; 64]), Ok(bytes) if bytes > 0) {}
        self.links.iter_mut().flatten().for_each(Link::flush);
    }

    /// A process that was stopped, or a machine that slept, has not listened meanwhile.
    fn forgive(&mut self, pause: Duration, now: Instant) {
        if pause > self.options.timeout / 2 {
            self.woke = Some(now);
        }
        if pause > 4 * self.period {
            self.seen.iter_mut().for_each(|seen| seen.forgive(pause, now));
        }
    }

    fn beat(&mut self) {
        let mut beat = self.shared.beat();
        // Rank 0 at its end waits for the others.
        beat.communicating |= self.leaving.is_some();
        self.seen[self.rank].hear(beat, Instant::now());
        for link in self.links.iter_mut().flatten() {
            link.send(&Message::Beat(beat));
        }
    }

    /// What the trainer ordered.
    fn obey(&mut self, now: Instant) -> Option<Verdict> {
        let order = self.shared.take_order()?;
        let patience = ending::grace(self.options.timeout);
        match order {
            Order::Abandon => return Some(Verdict::Leave),
            Order::Goodbye if self.rank == 0 => {
                self.seen[0].ended = self.seen.len() == 1;
                self.leaving = Some(Leaving::Goodbye(None));
                self.beat();
            }
            Order::Goodbye => {
                self.send(0, &Message::Goodbye);
                self.leaving = Some(Leaving::Goodbye(Some(now + patience)));
            }
            Order::Fail(text) if self.rank == 0 => {
                let failure = self.failure(vec![0], Cause::Error(text));
                self.pending.get_or_insert((failure, now + self.settle()));
                self.leaving = Some(Leaving::Failed(now + self.options.timeout));
            }
            Order::Fail(text) => {
                let step = self.shared.beat().step;
                self.send(0, &Message::Error { text, step });
                self.leaving = Some(Leaving::Failed(now + patience + self.options.settle));
            }
        }
        None
    }

    /// Reads every connection.
    fn hear(&mut self, now: Instant) -> Option<Verdict> {
        let mut dead = Vec::new();
        let mut cut = Vec::new();
        for at in 0..self.links.len() {
            let Some(link) = &mut self.links[at] else { continue };
            let (messages, loss) = link.receive();
            let from = if self.rank == 0 { at } else { 0 };
            for message in messages {
                if let Some(verdict) = self.take(from, message, now) {
                    return Some(verdict);
                }
            }
            if loss.is_some() {
                self.links[at] = None;
            }
            match loss {
                Some(_) if self.seen[from].ended => {}
                Some(Loss::Closed) => dead.push(from),
                Some(Loss::Cut) => cut.push(from),
                None => {}
            }
        }
        if dead.is_empty() && cut.is_empty() {
            return None;
        }
        if self.rank > 0 && matches!(self.leaving, Some(Leaving::Goodbye(_))) {
            // It is done, and has nobody to tell. One that failed would have heard from a rank 0 that lives: it failed by this death.
            return Some(Verdict::Leave);
        }
        let (ranks, cause) = if dead.is_empty() {
            let silence = self.silence(&cut, now);
            (cut, Cause::Silent(silence))
        } else {
            (dead, Cause::Died)
        };
        Some(Verdict::Stop(self.failure(ranks, cause)))
    }

    /// For how long none of these ranks was heard: the system may give a connection up before the watch does.
    fn silence(&self, ranks: &[usize], now: Instant) -> Duration {
        ranks.iter().map(|&rank| now - self.seen[rank].heard).min().unwrap_or_default()
    }

    fn take(&mut self, from: usize, message: Message, now: Instant) -> Option<Verdict> {
        self.seen[from].heard = now;
        match message {
            Message::Beat(beat) => self.seen[from].hear(beat, now),
            Message::Ended(rank) => {
                if let Some(seen) = self.seen.get_mut(rank) {
                    seen.ended = true;
                }
            }
            Message::Goodbye => {
                self.seen[from].ended = true;
                if self.rank > 0 {
                    return self.leaving.is_some().then_some(Verdict::Leave);
                }
                self.send(from, &Message::Goodbye);
                for rank in 1..self.links.len() {
                    if !self.seen[rank].ended {
                        self.send(rank, &Message::Ended(from));
                    }
                }
            }
            Message::Error { text, step } => {
                self.seen[from].beat.step = step;
                let failure = self.failure(vec![from], Cause::Error(text));
                self.pending.get_or_insert((failure, now + self.settle()));
            }
            Message::Failed(failure) => return Some(Verdict::Stop(failure)),
        }
        None
    }

    /// Whether something is wrong by now.
    fn judge(&mut self, now: Instant) -> Option<Verdict> {
        if let Some((failure, _)) = self.pending.take_if(|(_, when)| now >= *when) {
            return Some(Verdict::Stop(failure));
        }
        let others = self.seen.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        // Ranks other than 0 hear rank 0 alone.
        let heard = if self.rank == 0 { self.seen.len() } else { 1 };
        let gone = silent(others.take(heard), self.limits, now);
        if !gone.is_empty() {
            return Some(Verdict::Stop(self.failure(gone, Cause::Silent(self.limits.silent))));
        }
        if self.rank > 0 {
            return None;
        }
        let all: Vec<(usize, &Seen)> = self.seen.iter().enumerate().collect();
        stuck(&all, self.limits, now).map(|(ranks, cause)| Verdict::Stop(self.failure(ranks, cause)))
    }

    /// Whether this process has left.
    fn left(&self, now: Instant) -> Option<Verdict> {
        let over = match self.leaving.as_ref()? {
            Leaving::Goodbye(None) => self.seen[1..].iter().all(|seen| seen.ended),
            Leaving::Goodbye(Some(deadline)) | Leaving::Failed(deadline) => now >= *deadline,
        };
        over.then_some(Verdict::Leave)
    }

    fn settle(&self) -> Duration {
        self.options.settle.min(self.limits.silent / 4)
    }

    fn send(&mut self, rank: usize, message: &Message) {
        if let Some(Some(link)) = self.links.get_mut(rank) {
            link.send(message);
        }
    }

    /// The failure of these ranks. What this rank has done needed their part of it, and their own last word may be a period old.
    fn failure(&self, ranks: Vec<usize>, cause: Cause) -> Failure {
        let own = self.shared.beat().step;
        let step = ranks.iter().map(|&rank| self.seen[rank].beat.step).fold(own, u64::max);
        let gone = |rank: &usize| ranks.contains(rank) || self.seen[*rank].ended;
        let others = (0..self.seen.len()).filter(|rank| !gone(rank)).count();
        let ranks = ranks.iter().map(|&rank| Named { rank, host: self.hosts[rank].clone() }).collect();
        Failure { ranks, cause, step, others }
    }

    /// Tells all, and ends the process; comes back only where the failure is this rank's own error, which its trainer ends by.
    fn stop(mut self, failure: Failure) -> Told {
        let own = matches!(failure.cause, Cause::Error(_)) && failure.ranks.iter().all(|named| named.rank == self.rank);
        self.shared.set_failure(&failure);
        if self.rank == 0 {
            for link in self.links.iter_mut().flatten() {
                link.send(&Message::Failed(failure.clone()));
            }
        }
        if let Cause::Silent(_) = failure.cause {
            // Nobody waits for their answer.
            for named in &failure.ranks {
                self.links.get_mut(named.rank).map(Option::take);
            }
        }
        let patience = ending::grace(self.options.timeout);
        if own {
            let told = if self.rank == 0 { Told::Nobody } else { Told::ByRankZero };
            linger(self.links, patience);
            return told;
        }
        let aloud = self.speaks(&failure);
        let waits = !aloud && self.awaits_speaker(&failure);
        let deadline = Instant::now() + patience;
        let left = || deadline.saturating_duration_since(Instant::now());
        let finished = ending::begin(&failure, aloud, self.options);
        linger(self.links, patience);
        let _ = finished.recv_timeout(left());
        if waits {
            std::thread::sleep(left());
        }
        ending::exit()
    }

    /// Whether this rank ends later than the one that speaks. Where rank 0 fell silent each rank finds that out by itself, some of them
    /// before the speaker does, and a launcher wakes a stopped rank 0 to end it as soon as any rank has ended: the speaker would
    /// hear of it again, and have nothing to say.
    fn awaits_speaker(&self, failure: &Failure) -> bool {
        matches!(failure.cause, Cause::Silent(_)) && failure.ranks.iter().any(|named| named.rank == 0)
    }

    /// Whether this rank says it for all. Rank 0 does; where rank 0 is gone, the lowest that is left does. Where it fell silent its
    /// whole machine may have, so that one of another machine goes before. A rank that the others have taken for lost does not speak of
    /// those who ended for its sake, when a launcher wakes it to end it too.
    fn speaks(&self, failure: &Failure) -> bool {
        if self.woke.is_some_and(|woke| woke.elapsed() < AFTER_WAKING) {
            return false;
        }
        if self.rank == 0 {
            return true;
        }
        let running = |rank: &usize| !self.seen[*rank].ended;
        let elsewhere = |rank: &usize| running(rank) && self.hosts[*rank] != self.hosts[0];
        let lowest = match failure.cause {
            _ if failure.ranks.iter().all(|named| named.rank > 0) => return false,
            Cause::Silent(_) => (1..self.seen.len()).find(elsewhere),
            Cause::Died => None,
            // Of these rank 0 tells itself.
            Cause::Stuck(_) | Cause::Deadlock(_) | Cause::Error(_) => return false,
        };
        lowest.or_else(|| (1..self.seen.len()).find(running)) == Some(self.rank)
    }
}

/// Hears the others out until they hang up: what was sent to them is lost where a connection with unread bytes is closed.
fn linger(mut links: Vec<Option<Link>>, patience: Duration) {
    let deadline = Instant::now() + patience;
    links.iter_mut().flatten().for_each(Link::finish);
    while links.iter().any(Option::is_some) && Instant::now() < deadline {
        let mut interests: Vec<_> = links.iter().flatten().map(Link::interest).collect();
        wait(&mut interests, deadline.saturating_duration_since(Instant::now()));
        for link in &mut links {
            link.take_if(|link| link.receive().1.is_some());
        }
    }
}
