//! Whether this machine has the GPUs that processes are to be started on: said once, before any of them starts.

use crate::backend::cuda::auto::{Choice, Machine, choose};
use crate::backend::cuda::{device_count, is_driver_present};
use crate::config::DeviceChoice;
use crate::error::{Error, Result};

/// Names how many devices an emulated driver has.
pub(super) const EMULATED: &str = "WARPSTEP_EMULATOR_DEVICES";

/// Fails where `wanted` processes on this device would not find a GPU each, with `convolutions` or without. One alone looks for its
/// device as it does without a launcher.
pub(super) fn are_there(device: DeviceChoice, convolutions: bool, wanted: usize) -> Result<()> {
    if wanted == 1 {
        return Ok(());
    }
    let no_driver = || "no NVIDIA driver was found".to_owned();
    if let DeviceChoice::Cuda(Some(ordinal)) = device {
        let found =
            format!("found \"cuda:{ordinal}\" for {wanted} processes, expected \"cuda\", of which each takes its own");
        return Err(Error::config("run.device", found));
    }
    let found = match device {
        DeviceChoice::Cpu => Err("the device is the CPU".to_owned()),
        // Unless a user says otherwise, the launcher gives each process one.
        DeviceChoice::Emulated => Ok(std::env::var(EMULATED).map_or(wanted, |set| set.parse().unwrap_or(1))),
        DeviceChoice::Auto => match choose(&Machine::look(), convolutions) {
            Choice::Cuda(_) => Ok(device_count()),
            Choice::Cpu(why) => Err(why.unwrap_or_else(no_driver)),
        },
        DeviceChoice::Cuda(_) => match Machine::look().old_driver {
            Some(old) => Err(old),
            None if is_driver_present() => Ok(device_count()),
            None => Err(no_driver()),
        },
    };
    let problem = match found {
        Ok(count) if count >= wanted => return Ok(()),
        Ok(0) => "there is a driver, but it knows no device".to_owned(),
        Ok(count) => {
            let gpus = if count == 1 { "is 1 GPU".to_owned() } else { format!("are {count} GPUs") };
            let named = if device == DeviceChoice::Emulated { EMULATED } else { "CUDA_VISIBLE_DEVICES" };
            let by = std::env::var(named).map_or_else(|_| String::new(), |set| format!(" by {named}={set}"));
            return Err(Error::Device(format!(
                "launch --gpus {wanted}: there {gpus}{by}; expected --gpus {count} at most"
            )));
        }
        Err(why) => why,
    };
    Err(Error::Device(format!(
        "launch --gpus {wanted}: {problem}; `warpstep launch --cpus {wanted}` starts processes on CPUs"
    )))
}
