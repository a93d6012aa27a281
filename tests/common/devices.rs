//! Several processes on emulated devices, one each, as a launcher starts them.

#![allow(dead_code)] // each test file uses a part of it

use std::process::{Child, Command, Output, Stdio};

use crate::common::free_port;

/// What one process on an emulated device is asked: races and unwritten reads are looked for where kernels themselves are tested.
pub fn on_device(command: &mut Command) -> &mut Command {
    command.args(["--device", "emulated"]).env("WARPSTEP_EMULATOR_CHECKS", "off")
}

/// Starts so many processes of a command, which find each other.
pub fn start(world: usize, command: impl Fn() -> Command) -> Vec<Child> {
    let port = free_port().to_string();
    let process = |rank: usize| {
        let rank = rank.to_string();
        let environment = [
            ("WORLD_SIZE", world.to_string()),
            ("RANK", rank.clone()),
            ("LOCAL_RANK", rank),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("WARPSTEP_PORT", port.clone()),
            ("WARPSTEP_EMULATOR_DEVICES", world.to_string()),
        ];
        let mut command = command();
        on_device(&mut command).envs(environment).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    (0..world).map(process).collect()
}

/// Starts so many processes and waits for their ends.
pub fn run(world: usize, command: impl Fn() -> Command) -> Vec<Output> {
    start(world, command).into_iter().map(|process| process.wait_with_output().unwrap()).collect()
}
