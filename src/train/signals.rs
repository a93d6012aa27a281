//! SIGINT and SIGTERM, as numbers to be looked at where it is time to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// From now on each of the two sets `caught` to its number. A second signal ends the process at once.
///
/// # Errors
/// What the operating system refuses.
pub fn listen(caught: &Arc<AtomicUsize>) -> Result<()> {
    let second = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&second))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&second)))
            .and_then(|_| signal_hook::flag::register_usize(signal, Arc::clone(caught), signal as usize))
            .map_err(|e| Error::io("listen to", "signals", e))?;
    }
    Ok(())
}
