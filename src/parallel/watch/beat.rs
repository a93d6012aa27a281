//! What the trainer's threads tell the watch's, and what it tells them.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::failure::Failure;

/// Where a rank is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Beat {
    /// Steps done.
    pub step: u64,
    /// Whether it waits for others.
    pub communicating: bool,
    /// Grows with every sign that the trainer moves.
    pub progress: u64,
}

/// What the trainer asks of the watch's thread.
#[derive(Debug)]
pub(super) enum Order {
    /// Leave in peace.
    Goodbye,
    /// Tell the others of this error, then leave.
    Fail(String),
    /// Leave without a word.
    Abandon,
}

/// What both sides see. Numbers are read one by one: a heartbeat may mix two moments, which the next one sets right.
#[derive(Debug, Default)]
pub(super) struct Shared {
    step: AtomicU64,
    progress: AtomicU64,
    /// How many threads wait for others.
    waiting: AtomicUsize,
    order: Mutex<Option<Order>>,
    failure: Mutex<Option<Failure>>,
    failed: Condvar,
}

impl Shared {
    pub fn step(&self, done: u64) {
        self.step.store(done, Ordering::Relaxed);
        self.progress();
    }

    pub fn progress(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    pub fn enter(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.progress();
    }

    pub fn leave(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.progress();
    }

    pub fn beat(&self) -> Beat {
        Beat {
            step: self.step.load(Ordering::Relaxed),
            communicating: self.waiting.load(Ordering::Relaxed) > 0,
            progress: self.progress.load(Ordering::Relaxed),
        }
    }

    pub fn order(&self, order: Order) {
        *unpoisoned(&self.order) = Some(order);
    }

    pub fn take_order(&self) -> Option<Order> {
        unpoisoned(&self.order).take()
    }

    pub fn set_failure(&self, failure: &Failure) {
        *unpoisoned(&self.failure) = Some(failure.clone());
        self.failed.notify_all();
    }

    pub fn failure(&self) -> Option<Failure> {
        unpoisoned(&self.failure).clone()
    }

    /// Whether there is one at this time at the latest.
    pub fn failure_until(&self, deadline: Instant) -> bool {
        let mut failure = unpoisoned(&self.failure);
        while failure.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            failure = self.failed.wait_timeout(failure, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// No value is left half written under these locks.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
