//! Lines on standard error.

use std::fmt::Display;

/// Prints a line by one write, which `eprintln!` of several parts is not: the program that calls the device writes there too, and a
/// line of one must not begin within another's.
pub(crate) fn tell(line: impl Display) {
    let line = format!("{line}\n");
    eprint!("{line}");
}
