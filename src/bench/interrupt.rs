//! SIGINT and SIGTERM while peers run: the one that runs is ended with all that it started, no other is begun, and what was found
//! is written.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

static CAUGHT: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Listens from now on. A second signal ends the process at once.
///
/// # Errors
/// What the operating system refuses.
pub fn listen() -> Result<()> {
    let second = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&second))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&second)))
            .and_then(|_| signal_hook::flag::register_usize(signal, Arc::clone(&CAUGHT), signal as usize))
            .map_err(|e| Error::io("listen to", "signals", e))?;
    }
    Ok(())
}

/// The signal that came, if one did.
pub fn caught() -> Option<u8> {
    u8::try_from(CAUGHT.load(Ordering::Relaxed)).ok().filter(|&signal| signal > 0)
}
