//! Which thread queues work on a device.
//!
//! A device has one stream, one scratch memory and one place for the scalars of a step. What one thread queues is in order by itself;
//! what several queue must not come between two kernels of which one leaves something for the other, nor into a recording. So a thread
//! claims the device for as long as what it queues belongs together: a kernel, an operation, a step.

use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// Lets one thread at a time queue work.
#[derive(Debug, Default)]
pub(super) struct Claims {
    claimed: Mutex<Claimed>,
    given_up: Condvar,
}

#[derive(Debug, Default)]
struct Claimed {
    by: Option<ThreadId>,
    /// How often that thread did: what is claimed for a step is claimed again by its operations.
    times: usize,
    /// Threads that wait: without any, giving up is no call of the system.
    waiting: usize,
}

/// Keeps other threads from queueing until it is dropped, by the thread that made it.
#[derive(Debug)]
#[must_use = "it is given up at once"]
pub(super) struct Claim<'c> {
    claims: &'c Claims,
    of_this_thread: PhantomData<*const ()>,
}

impl Claims {
    fn claimed(&self) -> MutexGuard<'_, Claimed> {
        // A thread that panicked gave up what it had claimed as it unwound.
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no other thread has a claim.
    pub fn claim(&self) -> Claim<'_> {
        let (own, mut claimed) = (thread::current().id(), self.claimed());
        while claimed.by.is_some_and(|by| by != own) {
            claimed.waiting += 1;
            claimed = self.given_up.wait(claimed).unwrap_or_else(PoisonError::into_inner);
            claimed.waiting -= 1;
        }
        claimed.by = Some(own);
        claimed.times += 1;
        Claim { claims: self, of_this_thread: PhantomData }
    }

    /// Whether this thread has one.
    pub fn are_own(&self) -> bool {
        self.claimed().by == Some(thread::current().id())
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut claimed = self.claims.claimed();
        claimed.times -= 1;
        if claimed.times == 0 {
            claimed.by = None;
            if claimed.waiting > 0 {
                self.claims.given_up.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_claim_keeps_other_threads_out_until_the_last_of_its_own_thread_is_dropped() {
        let (claims, inside) = (Claims::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let first = claims.claim();
                        assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                        let again = claims.claim();
                        drop(first);
                        thread::yield_now();
                        assert!(claims.are_own());
                        assert_eq!(inside.fetch_sub(1, Ordering::Relaxed), 1);
                        drop(again);
                    }
                });
            }
        });
        assert!(!claims.are_own());
    }
}
