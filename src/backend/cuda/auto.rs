//! What `device = "auto"` takes: a GPU where one works, else the CPU.

use super::context::{device_count, old_driver};
use super::doctor::facts;
use super::libraries::Library;
use super::{emulated, is_driver_present, is_embedded};

/// What the choice depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Whether the driver's library loads.
    pub driver: bool,
    /// Why that driver cannot be used, where it is too old.
    pub old_driver: Option<String>,
    /// Whether the devices are emulated: never taken unasked.
    pub emulated: bool,
    /// Name and compute capability of each device.
    pub devices: Vec<(String, (i32, i32))>,
    /// Whether kernels were embedded when Warpstep was built.
    pub embedded: bool,
    /// Whether NVRTC loads, which makes kernels where none are embedded.
    pub nvrtc: bool,
    /// Whether cuBLASLt loads.
    pub cublaslt: bool,
    /// Whether cuDNN loads.
    pub cudnn: bool,
}

/// What `auto` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The device of this number.
    Cuda(usize),
    /// The CPU, and why not a GPU; none where there is no sign of one.
    Cpu(Option<String>),
}

/// The least compute capability: Ampere, 2020.
const LEAST: (i32, i32) = (8, 0);

impl Machine {
    /// Looks at this machine, no further than the choice needs: without a driver, nothing else is loaded.
    pub fn look() -> Self {
        if emulated::is_active() || !is_driver_present() {
            return Machine { driver: false, emulated: emulated::is_active(), ..Machine::default() };
        }
        let devices = (0..device_count()).filter_map(|ordinal| facts(ordinal).ok());
        Machine {
            driver: true,
            old_driver: old_driver(),
            emulated: false,
            devices: devices.map(|facts| (facts.name, facts.capability)).collect(),
            embedded: is_embedded(),
            nvrtc: is_embedded() || Library::Nvrtc.is_present(),
            cublaslt: Library::CublasLt.is_present(),
            cudnn: Library::Cudnn.is_present(),
        }
    }
}

/// What to take on such a machine, for a model that holds convolutions or does not.
pub fn choose(machine: &Machine, convolutions: bool) -> Choice {
    if machine.emulated || !machine.driver {
        return Choice::Cpu(None);
    }
    if let Some(old) = &machine.old_driver {
        return Choice::Cpu(Some(old.clone()));
    }
    if machine.devices.is_empty() {
        return Choice::Cpu(Some("there is a driver, but it knows no device".to_owned()));
    }
    let Some(ordinal) = machine.devices.iter().position(|(_, capability)| *capability >= LEAST) else {
        let (name, (major, minor)) = &machine.devices[0];
        return Choice::Cpu(Some(format!(
            "{name} has compute capability {major}.{minor}; Warpstep needs {}.{} (Ampere, 2020) or newer",
            LEAST.0, LEAST.1
        )));
    };
    let missing = |library: Library| {
        let name = &machine.devices[ordinal].0;
        Choice::Cpu(Some(format!("{name} is there, but not {}: {}", library.title(), library.install())))
    };
    match (machine.embedded || machine.nvrtc, machine.cublaslt, machine.cudnn || !convolutions) {
        (false, _, _) => missing(Library::Nvrtc),
        (_, false, _) => missing(Library::CublasLt),
        (_, _, false) => missing(Library::Cudnn),
        (true, true, true) => Choice::Cuda(ordinal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> Machine {
        Machine {
            driver: true,
            old_driver: None,
            emulated: false,
            devices: vec![("NVIDIA H100".to_owned(), (9, 0))],
            embedded: true,
            nvrtc: false,
            cublaslt: true,
            cudnn: true,
        }
    }

    fn reason(machine: &Machine, convolutions: bool) -> String {
        match choose(machine, convolutions) {
            Choice::Cpu(Some(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_gpu_that_works_is_taken_and_the_first_that_is_new_enough() {
        assert_eq!(choose(&whole(), true), Choice::Cuda(0));
        let mut two = whole();
        two.devices.insert(0, ("Tesla V100".to_owned(), (7, 0)));
        assert_eq!(choose(&two, true), Choice::Cuda(1));
        two.devices[0].1 = (8, 0);
        assert_eq!(choose(&two, true), Choice::Cuda(0));
    }

    #[test]
    fn without_a_driver_or_on_the_emulated_device_the_cpu_is_taken_without_a_word() {
        assert_eq!(choose(&Machine::default(), true), Choice::Cpu(None));
        assert_eq!(choose(&Machine { driver: false, ..whole() }, true), Choice::Cpu(None));
        assert_eq!(choose(&Machine { emulated: true, ..whole() }, true), Choice::Cpu(None));
    }

    #[test]
    fn what_a_gpu_lacks_is_said_with_what_installs_it() {
        assert!(reason(&Machine { devices: Vec::new(), ..whole() }, false).contains("no device"));
        assert_eq!(reason(&Machine { old_driver: Some("too old".to_owned()), ..whole() }, false), "too old");
        let old = vec![("Tesla V100".to_owned(), (7, 0))];
        assert!(reason(&Machine { devices: old, ..whole() }, false).contains("7.0"));
        assert!(reason(&Machine { embedded: false, ..whole() }, false).contains("nvidia-cuda-nvrtc"));
        assert!(reason(&Machine { cublaslt: false, ..whole() }, false).contains("nvidia-cublas"));
        assert!(reason(&Machine { cudnn: false, ..whole() }, true).contains("nvidia-cudnn"));
    }

    #[test]
    fn nvrtc_stands_in_for_embedded_kernels_and_cudnn_is_for_convolutions_alone() {
        assert_eq!(choose(&Machine { embedded: false, nvrtc: true, ..whole() }, true), Choice::Cuda(0));
        assert_eq!(choose(&Machine { cudnn: false, ..whole() }, false), Choice::Cuda(0));
    }
}
