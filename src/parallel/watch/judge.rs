//! From what was heard of each rank and when, to whose fault it is: no sockets, no clock of its own.

use std::time::{Duration, Instant};

use super::beat::Beat;
use super::failure::Cause;
use crate::parallel::rendezvous::seconds;

/// What is known of a rank.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// What it said last.
    pub beat: Beat,
    /// When it said anything.
    pub heard: Instant,
    /// Since when it has not moved.
    pub unmoved: Instant,
    /// Whether it said goodbye.
    pub ended: bool,
}

impl Seen {
    pub fn new(now: Instant) -> Self {
        Seen { beat: Beat::default(), heard: now, unmoved: now, ended: false }
    }

    /// A word of it.
    pub fn hear(&mut self, beat: Beat, now: Instant) {
        self.heard = now;
        if beat != self.beat {
            self.unmoved = now;
            self.beat = beat;
        }
    }

    /// Time that this process itself was not running does not count against others.
    pub fn forgive(&mut self, time: Duration, now: Instant) {
        self.heard = (self.heard + time).min(now);
        self.unmoved = (self.unmoved + time).min(now);
    }
}

/// How long what may last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub silent: Duration,
    pub stuck: Duration,
}

impl Limits {
    /// Silence is seen early enough that all have stopped when the timeout is over.
    pub fn new(timeout: Duration) -> Self {
        Limits { silent: timeout * 3 / 4, stuck: timeout }
    }
}

/// Ranks that have been silent for too long.
pub(super) fn silent<'a>(ranks: impl Iterator<Item = (usize, &'a Seen)>, limits: Limits, now: Instant) -> Vec<usize> {
    ranks.filter(|(_, seen)| !seen.ended && now - seen.heard >= limits.silent).map(|(rank, _)| rank).collect()
}

/// Ranks that others have waited for too long: stuck ones; those that said goodbye so long ago, where all others wait; all, where all
/// wait for each other. None while a rank is so quiet that it may be found silent: that would tell more.
pub(super) fn stuck(ranks: &[(usize, &Seen)], limits: Limits, now: Instant) -> Option<(Vec<usize>, Cause)> {
    let running: Vec<_> = ranks.iter().filter(|(_, seen)| !seen.ended).collect();
    if running.iter().any(|(_, seen)| now - seen.heard >= limits.silent / 3) {
        return None;
    }
    let unmoved = |seen: &Seen| now - seen.unmoved >= limits.stuck;
    let waits = running.iter().any(|(_, seen)| seen.beat.communicating && unmoved(seen));
    if !waits {
        return None;
    }
    let computing: Vec<_> = running.iter().filter(|(_, seen)| !seen.beat.communicating).collect();
    // Whoever moved lately may still come.
    let named: Vec<usize> = computing.iter().filter(|(_, seen)| unmoved(seen)).map(|(rank, _)| *rank).collect();
    if !named.is_empty() {
        return Some((named, Cause::Stuck(limits.stuck)));
    }
    let all = computing.is_empty() && running.iter().all(|(_, seen)| unmoved(seen));
    // Rank 0 too waits at its end, for those that run: it leaves when the last of them has ended.
    let ended: Vec<_> = ranks.iter().filter(|(_, seen)| seen.ended).collect();
    if all && !ended.is_empty() && ended.iter().all(|(_, seen)| now - seen.heard >= limits.stuck) {
        let (they, them) = if ended.len() > 1 { ("they", "them") } else { ("it", "it") };
        let cause = format!("{they} ended, but others have waited for {them} for {}", seconds(limits.stuck));
        return Some((ended.iter().map(|(rank, _)| *rank).collect(), Cause::Error(cause)));
    }
    (all && running.len() > 1).then(|| (running.iter().map(|(rank, _)| *rank).collect(), Cause::Deadlock(limits.stuck)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { silent: Duration::from_secs(45), stuck: Duration::from_secs(60) };

    /// Of ranks that were heard `heard` and moved `unmoved` seconds ago: whether they wait, and the times.
    fn verdict(ranks: &[(bool, u64, u64)]) -> (Vec<usize>, Option<(Vec<usize>, Cause)>) {
        let start = Instant::now();
        let now = start + Duration::from_secs(1000);
        let seen: Vec<Seen> = ranks
            .iter()
            .map(|&(communicating, heard, unmoved)| Seen {
                beat: Beat { communicating, ..Beat::default() },
                heard: now - Duration::from_secs(heard),
                unmoved: now - Duration::from_secs(unmoved),
                ended: false,
            })
            .collect();
        let ranks: Vec<(usize, &Seen)> = seen.iter().enumerate().collect();
        (silent(ranks.iter().copied(), LIMITS, now), stuck(&ranks, LIMITS, now))
    }

    #[test]
    fn whoever_is_waited_for_is_named_and_nobody_else() {
        assert_eq!(verdict(&[(true, 1, 59), (false, 1, 500)]), (vec![], None), "nobody has waited for long");
        let stuck = Some((vec![1, 3], Cause::Stuck(LIMITS.stuck)));
        assert_eq!(verdict(&[(true, 1, 60), (false, 1, 61), (false, 1, 3), (false, 1, 60)]), (vec![], stuck));
        assert_eq!(verdict(&[(false, 1, 500), (false, 1, 500)]), (vec![], None), "long steps are no failure");
        assert_eq!(verdict(&[(true, 1, 500), (false, 1, 3)]), (vec![], None), "the other one moves");
        let deadlock = Some((vec![0, 1], Cause::Deadlock(LIMITS.stuck)));
        assert_eq!(verdict(&[(true, 1, 60), (true, 1, 70)]), (vec![], deadlock));
        assert_eq!(verdict(&[(true, 1, 60), (true, 1, 7)]), (vec![], None), "one has come just now");
        assert_eq!(verdict(&[(true, 1, 7), (false, 45, 50), (false, 44, 50)]).0, vec![1]);
        assert_eq!(verdict(&[(true, 1, 99), (true, 15, 99), (true, 14, 99)]), (vec![], None), "it may be silence");
    }

    #[test]
    fn who_ended_is_not_missed_and_own_sleep_is_not_held_against_others() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1000);
        let mut seen = Seen::new(now);
        assert_eq!(silent([(4, &seen)].into_iter(), LIMITS, later), vec![4]);
        seen.forgive(Duration::from_secs(990), later);
        assert_eq!(silent([(4, &seen)].into_iter(), LIMITS, later), Vec::<usize>::new());
        let mut ended = Seen::new(now);
        ended.ended = true;
        let waiting = Seen { beat: Beat { communicating: true, ..Beat::default() }, heard: later, ..Seen::new(now) };
        assert_eq!(silent([(4, &ended)].into_iter(), LIMITS, later), Vec::<usize>::new());
        ended.heard = later - Duration::from_secs(59);
        assert_eq!(stuck(&[(0, &waiting), (1, &ended)], LIMITS, later), None, "rank 0 may be at its end too");
        let long_ago = Seen { ended: true, ..Seen::new(now) };
        assert_eq!(
            stuck(&[(0, &waiting), (1, &ended), (2, &long_ago)], LIMITS, later),
            None,
            "nor are all at the same time"
        );
        ended.heard = later - Duration::from_secs(60);
        let cause = Cause::Error("it ended, but others have waited for it for 60 s".into());
        assert_eq!(stuck(&[(0, &waiting), (1, &ended)], LIMITS, later), Some((vec![1], cause)));
        let moves = Seen { unmoved: later, ..waiting.clone() };
        assert_eq!(stuck(&[(0, &waiting), (1, &ended), (2, &moves)], LIMITS, later), None, "one has come just now");
        let computes = Seen { beat: Beat::default(), ..waiting.clone() };
        let named = Some((vec![2], Cause::Stuck(LIMITS.stuck)));
        assert_eq!(stuck(&[(0, &waiting), (1, &ended), (2, &computes)], LIMITS, later), named);
    }
}
