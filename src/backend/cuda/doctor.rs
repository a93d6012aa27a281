//! What `warpstep doctor` finds of CUDA on this machine, and whether the backend works on each device.

use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use serde::Serialize;

use super::context::{driver_error, old_driver};
use super::libraries::{Library, python_folders};
use super::{Cuda, Device, DeviceOptions, device_count, emulated, is_embedded};
use crate::backend::cpu::Cpu;
use crate::backend::ops::{LinearForward, Update};
use crate::backend::{Act, Activations, Arena, Backend, Memory, Op, Param, StepContext};
use crate::error::{Error, Result};
use crate::optim::{Clip, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use crate::plan::{ParamLayout, ParamSpec};
use crate::random::{Philox, Purpose};
use crate::real::Element;

/// A library, as it was found or not.
#[derive(Clone, Debug, Serialize)]
pub struct LibraryReport {
    /// What people call it.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    /// Whether it loads.
    pub found: bool,
    /// The name that it was found under.
    pub found_as: Option<String>,
    /// The file.
    pub path: Option<PathBuf>,
    /// As it tells it.
    pub version: Option<String>,
    /// What to do about it, where something is to be done.
    pub advice: Option<String>,
}

/// A device, and what of the backend works on it.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    /// Its number.
    pub ordinal: usize,
    /// What the driver calls it.
    pub name: String,
    /// Major and minor number.
    pub compute_capability: (i32, i32),
    /// Bytes in all.
    pub memory_bytes: u64,
    /// Number of multiprocessors.
    pub multiprocessors: i32,
    /// What was tried on it.
    pub checks: Vec<CheckReport>,
}

/// Something that was tried.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// What.
    pub name: &'static str,
    /// Whether it gave what the CPU gives.
    pub works: bool,
    /// Why not.
    pub error: Option<String>,
}

/// The kernels of this build.
#[derive(Clone, Debug, Serialize)]
pub struct KernelsReport {
    /// Whether they were compiled when Warpstep was built.
    pub embedded: bool,
    /// The release of nvcc that compiled them.
    pub nvcc: Option<&'static str>,
    /// What to do, where there is no way to any kernel.
    pub advice: Option<String>,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct CudaReport {
    /// Whether the devices are emulated.
    pub emulated: bool,
    /// The release of the kernel's module, where one is loaded.
    pub driver_release: Option<String>,
    /// The driver and the libraries.
    pub libraries: Vec<LibraryReport>,
    /// Why the driver is of no use, where it does not start or is too old.
    pub driver_error: Option<String>,
    /// The kernels.
    pub kernels: KernelsReport,
    /// The devices.
    pub devices: Vec<DeviceReport>,
}

/// Looks for everything, and tries the backend on the devices: all, or the one of this number.
pub fn examine(only: Option<usize>) -> CudaReport {
    let python = python_folders();
    let libraries: Vec<_> = Library::ALL.into_iter().map(|library| look_for(library, &python)).collect();
    let has = |library: Library| libraries.iter().any(|report| report.name == library.title() && report.found);
    let kernels = KernelsReport {
        embedded: is_embedded(),
        nvcc: super::module::NVCC,
        advice: (!is_embedded() && !has(Library::Nvrtc)).then(|| {
            "this build holds no kernels and there is no NVRTC: install NVRTC, or build Warpstep where nvcc is on the path \
             (`scripts/nvcc` brings one)"
                .to_owned()
        }),
    };
    let started = if has(Library::Driver) { result::init() } else { Ok(()) };
    let devices =
        (0..device_count()).filter(|ordinal| only.is_none_or(|only| only == *ordinal)).map(describe).collect();
    CudaReport {
        emulated: emulated::is_active(),
        driver_release: std::fs::read_to_string("/sys/module/nvidia/version").ok().map(|text| text.trim().to_owned()),
        driver_error: started
            .err()
            .map(|error| driver_error("start the driver", error).to_string())
            .or_else(|| if has(Library::Driver) { old_driver() } else { None }),
        libraries,
        kernels,
        devices,
    }
}

fn look_for(library: Library, python: &[PathBuf]) -> LibraryReport {
    let found = library.find();
    let advice = match &found {
        Some(found) if library == Library::Nccl && found.name.ends_with(".so.2") => Some(
            "found under the name that packages install; Warpstep loads it by this name. Other programs may want a link called \
             libnccl.so"
                .to_owned(),
        ),
        Some(_) => None,
        None if library == Library::Nvrtc && is_embedded() => Some("not needed: the kernels are embedded".to_owned()),
        None => Some(match library.beside_python(python) {
            Some(path) => format!(
                "it is here, but the loader does not look there: export LD_LIBRARY_PATH={}:$LD_LIBRARY_PATH",
                path.parent().unwrap_or(&path).display()
            ),
            None => library.install().to_owned(),
        }),
    };
    LibraryReport {
        name: library.title(),
        purpose: library.purpose(),
        found: found.is_some(),
        path: found.as_ref().and_then(|found| found.path.clone()),
        version: found.as_ref().and_then(|found| found.version.clone()),
        found_as: found.map(|found| found.name),
        advice,
    }
}

fn describe(ordinal: usize) -> DeviceReport {
    let facts = facts(ordinal).unwrap_or_default();
    let device = Device::open(DeviceOptions { ordinal, ..DeviceOptions::default() });
    let checks = match device {
        Ok(device) => {
            let backend = Cuda::<f32>::new(device);
            CHECKS.map(|(name, check)| report(name, check(&backend))).into()
        }
        Err(error) => vec![report("opening it", Err(error))],
    };
    DeviceReport {
        ordinal,
        name: facts.name,
        compute_capability: facts.capability,
        memory_bytes: facts.memory,
        multiprocessors: facts.multiprocessors,
        checks,
    }
}

/// Tries something on a device.
type Check = fn(&Cuda<f32>) -> Result<()>;

/// What is tried on a device.
const CHECKS: [(&str, Check); 2] = [("a kernel", check_update), ("a product by cuBLASLt", check_product)];

/// Whether a device does what every training asks of one.
///
/// # Errors
/// What fails.
pub fn check(device: &Arc<Device>) -> Result<()> {
    let backend = Cuda::<f32>::new(Arc::clone(device));
    CHECKS.iter().try_for_each(|(_, check)| check(&backend))
}

fn report(name: &'static str, found: Result<()>) -> CheckReport {
    CheckReport { name, works: found.is_ok(), error: found.err().map(|error| error.to_string()) }
}

/// What the driver says of a device without its being opened.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub name: String,
    pub capability: (i32, i32),
    pub memory: u64,
    pub multiprocessors: i32,
}

/// Asks the driver, which was started.
pub(super) fn facts(ordinal: usize) -> Result<Facts> {
    use sys::CUdevice_attribute as Attribute;
    let fail = |error| driver_error(&format!("describe device {ordinal}"), error);
    let device = result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(fail)?;
    // SAFETY: the device was given by the driver just now.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) }.map_err(fail);
    Ok(Facts {
        name: result::device::get_name(device).map_err(fail)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.map_err(fail)? as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}

/// Sizes that are no multiple of anything that kernels are cut by.
const ROWS: usize = 41;
const INPUTS: usize = 29;
const OUTPUTS: usize = 37;

/// A weight and a bias, drawn from a fixed seed; gradients too; slots of zeros.
fn arena<B: Backend>(backend: &B, slots: usize) -> Result<Arena<B>> {
    let spec = |name: &str, shape: &[usize]| ParamSpec { name: name.into(), shape: shape.into() };
    let layout = ParamLayout::new(&[spec("weight", &[OUTPUTS, INPUTS]), spec("bias", &[OUTPUTS])])?;
    let len = layout.padded_len();
    let drawn = |stream: u32| -> Vec<B::Real> {
        let mut values = vec![B::Real::from_f64(0.0); len];
        for entry in layout.entries() {
            entry.range().zip(draw(stream)).for_each(|(at, value)| values[at] = B::Real::from_f32(value));
        }
        values
    };
    let mut arena = Arena {
        ranges: layout.entries().iter().map(|entry| entry.range()).collect(),
        parameters: backend.allocate(len)?,
        stored: backend.allocate(len)?,
        gradients: backend.allocate(len)?,
        slots: (0..slots).map(|_| backend.allocate(len)).collect::<Result<_>>()?,
        state_layout: ParamLayout::new(&[])?,
        state: backend.allocate(0)?,
        prepared: B::Prepared::default(),
        held: None,
        layout: layout.clone(),
    };
    backend.upload(&mut arena.parameters, 0, &drawn(0))?;
    backend.upload(&mut arena.gradients, 0, &drawn(1))?;
    backend.parameters_changed(&mut arena)?;
    Ok(arena)
}

/// Values of -1 to 1.
fn draw(stream: u32) -> impl Iterator<Item = f32> {
    let random = Philox::new(1, Purpose::Initialization, stream);
    (0..).map(move |at| 2.0 * random.uniform(at) - 1.0)
}

fn parameters<B: Backend>(backend: &B, arena: &Arena<B>) -> Result<Vec<f64>> {
    let mut values = vec![B::Real::from_f64(0.0); arena.layout.padded_len()];
    backend.download(&arena.parameters, 0, &mut values)?;
    Ok(values.into_iter().map(Element::f64).collect())
}

/// Two clipped steps of AdamW: what the parameters are then.
fn updated<B: Update>(backend: &B) -> Result<Vec<f64>> {
    let mut options = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 }, 0.01);
    options.clip = Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } };
    let mut arena = arena(backend, 2)?;
    let plan = UpdatePlan::new(&options, &arena.layout)?;
    for step in 1..=2 {
        let params = StepParams { learning_rate: 0.01, step, divisor: 1.0, zero_gradients: false };
        backend.update(&mut arena, &plan, &params)?;
    }
    parameters(backend, &arena)
}

/// Whether the kernels of the update leave the CPU's bits.
fn check_update(backend: &Cuda<f32>) -> Result<()> {
    let (found, expected) = (updated(backend)?, updated(&Cpu::<f32>::new())?);
    match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => Err(Error::DeviceFailed(format!(
            "the update's kernels leave {:e} where the CPU leaves {:e} (parameter {at}): the device, its driver or its memory \
             is faulty, or this is a bug of Warpstep's",
            found[at], expected[at]
        ))),
    }
}

/// `y = x W^T + b` three times, with another x each time: as it is, while it is recorded, and by replay of the recording.
fn multiplied<B: Backend>(backend: &B) -> Result<Vec<f64>> {
    let mut arena = arena(backend, 0)?;
    let lens = [ROWS * INPUTS, ROWS * OUTPUTS];
    let start = lens[0].next_multiple_of(32);
    let mut activations: Activations<B> = Activations {
        ranges: vec![0..lens[0], start..start + lens[1]],
        index_ranges: Vec::new(),
        values: backend.allocate(start + lens[1])?,
        indices: backend.allocate(0)?,
        slots: Vec::new(),
        recording: B::Recording::default(),
    };
    let (x, y) = (Act(0), Act(1));
    let (weight, bias) = (Param(0), Some(Param(1)));
    let product = LinearForward { x, weight, bias, y, activation: None, rows: ROWS, inputs: INPUTS, outputs: OUTPUTS };
    let program: Vec<Box<dyn Op<B>>> = vec![Box::new(product)];
    let mut all = Vec::new();
    for stream in 2..5 {
        let values: Vec<B::Storage> = draw(stream).take(lens[0]).map(B::Storage::from_f32).collect();
        backend.upload(&mut activations.values, 0, &values)?;
        let mut memory = Memory { arena: &mut arena, activations: &mut activations };
        backend.run(&program, &mut memory, &StepContext::default())?;
        let mut values = vec![B::Storage::from_f32(0.0); lens[1]];
        backend.download(&activations.values, start, &mut values)?;
        all.extend(values.into_iter().map(Element::f64));
    }
    Ok(all)
}

/// Whether products, alone and replayed, are those of f64 up to the rounding of f32.
fn check_product(backend: &Cuda<f32>) -> Result<()> {
    // Sums of 30 values of at most 1 each: their roundings, twice.
    let allowed = 2.0 * 30.0 * 30.0 * f64::from(f32::EPSILON);
    let wrong = |difference: f64| difference.is_nan() || difference.abs() > allowed;
    let (found, expected) = (multiplied(backend)?, multiplied(&Cpu::<f64>::new())?);
    match found.iter().zip(&expected).position(|(found, expected)| wrong(found - expected)) {
        None => Ok(()),
        Some(at) => Err(Error::DeviceFailed(format!(
            "a product by cuBLASLt gives {:e} where the CPU gives {:e} (value {at}): the device, its driver or the library is \
             faulty, or this is a bug of Warpstep's",
            found[at], expected[at]
        ))),
    }
}
