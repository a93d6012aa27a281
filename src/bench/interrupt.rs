//! SIGINT and SIGTERM while peers run: the one that runs is ended with all that it started, no other is begun, and what was found
//! is written.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use crate::error::Result;
use crate::train::signals;

static CAUGHT: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Listens from now on. A second signal ends the process at once.
///
/// # Errors
/// What the operating system refuses.
pub fn listen() -> Result<()> {
    signals::listen(&CAUGHT)
}

/// The signal that came, if one did.
pub fn caught() -> Option<u8> {
    u8::try_from(CAUGHT.load(Ordering::Relaxed)).ok().filter(|&signal| signal > 0)
}
