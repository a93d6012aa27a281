//! SIGINT and SIGTERM: the figure or the peer that runs is ended, a peer with all that it started, no other is begun, and what was
//! found is written.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};

use crate::error::Result;
use crate::train::signals;

static CAUGHT: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Listens from now on, however often this is called. A second signal ends the process at once.
///
/// # Errors
/// What the operating system refuses.
pub fn listen() -> Result<()> {
    static LISTENS: OnceLock<()> = OnceLock::new();
    if LISTENS.set(()).is_ok() { signals::listen(&CAUGHT) } else { Ok(()) }
}

/// The signal that came, if one did.
pub fn caught() -> Option<u8> {
    u8::try_from(CAUGHT.load(Ordering::Relaxed)).ok().filter(|&signal| signal > 0)
}
