//! The `warpstep` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    warpstep::cli::main()
}
