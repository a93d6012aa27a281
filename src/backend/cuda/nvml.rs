//! Clocks, and what holds them back, as NVIDIA's management library tells them (`libnvidia-ml.so.1`, part of the driver).

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use cudarc::driver::sys;
use libloading::os::unix::Library;

use super::context::driver_version;
use super::{Device, emulated};

/// What a device's clocks are at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clocks {
    /// MHz of the multiprocessors.
    pub multiprocessor_mhz: Option<u32>,
    /// MHz of the memory.
    pub memory_mhz: Option<u32>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Milliwatts.
    pub power_mw: Option<u32>,
    /// What holds the clocks back, in words; idleness is none of it.
    pub held_back: Vec<&'static str>,
}

/// Bits of `nvmlClocksEventReasons`.
const REASONS: [(u64, &str); 7] = [
    (0x2, "clocks set by an application"),
    (0x4, "power cap"),
    (0x8, "hardware slowdown"),
    (0x20, "heat (software)"),
    (0x40, "heat (hardware)"),
    (0x80, "power brake"),
    (0x10, "kept in step with other devices"),
];

type Handle = *mut c_void;

/// The library, started.
struct Nvml(Library);

impl Nvml {
    fn open() -> Option<Self> {
        // SAFETY: NVIDIA's library runs nothing that concerns this program when it is loaded.
        let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
        let nvml = Nvml(library);
        // SAFETY: `nvmlReturn_t nvmlInit_v2(void)`.
        let status = unsafe { nvml.0.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2").ok()?() };
        (status == 0).then_some(nvml)
    }

    fn handle(&self, bus: &[c_char]) -> Option<Handle> {
        type ByBus = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *, nvmlDevice_t *)`; the name ends with a 0.
        let status =
            unsafe { self.0.get::<ByBus>(b"nvmlDeviceGetHandleByPciBusId_v2").ok()?(bus.as_ptr(), &mut handle) };
        (status == 0).then_some(handle)
    }

    /// A number of a device by a function that takes a kind.
    fn of_kind(&self, function: &[u8], handle: Handle, kind: c_uint) -> Option<u32> {
        type OfKind = unsafe extern "C" fn(Handle, c_uint, *mut c_uint) -> c_int;
        let mut value = 0;
        // SAFETY: the callers name functions `nvmlReturn_t (nvmlDevice_t, enum, unsigned int *)`, and the handle is this library's.
        let status = unsafe { self.0.get::<OfKind>(function).ok()?(handle, kind, &mut value) };
        (status == 0).then_some(value)
    }

    fn power(&self, handle: Handle) -> Option<u32> {
        type Power = unsafe extern "C" fn(Handle, *mut c_uint) -> c_int;
        let mut value = 0;
        // SAFETY: `nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t, unsigned int *)`.
        let status = unsafe { self.0.get::<Power>(b"nvmlDeviceGetPowerUsage").ok()?(handle, &mut value) };
        (status == 0).then_some(value)
    }

    fn reasons(&self, handle: Handle) -> u64 {
        type Reasons = unsafe extern "C" fn(Handle, *mut c_ulonglong) -> c_int;
        let mut value = 0;
        let name = b"nvmlDeviceGetCurrentClocksThrottleReasons";
        // SAFETY: `nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t, unsigned long long *)`.
        let status = unsafe { self.0.get::<Reasons>(name).map(|ask| ask(handle, &mut value)) };
        if status.is_ok_and(|status| status == 0) { value } else { 0 }
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: `nvmlReturn_t nvmlShutdown(void)`; nothing of the library is used afterwards.
        if let Ok(shutdown) = unsafe { self.0.get::<unsafe extern "C" fn() -> c_int>(b"nvmlShutdown") } {
            // SAFETY: as above.
            unsafe { shutdown() };
        }
    }
}

impl Device {
    /// Its clocks now; none on the emulated device, or where the library is missing.
    pub fn clocks(&self) -> Option<Clocks> {
        if emulated::is_active() {
            return None;
        }
        let mut bus = [0 as c_char; 32];
        // SAFETY: room for the name and its 0.
        let status =
            unsafe { sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as c_int, self.context().cu_device()) };
        if status != sys::CUresult::CUDA_SUCCESS {
            return None;
        }
        let nvml = Nvml::open()?;
        let handle = nvml.handle(&bus)?;
        let reasons = nvml.reasons(handle);
        Some(Clocks {
            multiprocessor_mhz: nvml.of_kind(b"nvmlDeviceGetClockInfo", handle, 1),
            memory_mhz: nvml.of_kind(b"nvmlDeviceGetClockInfo", handle, 2),
            temperature: nvml.of_kind(b"nvmlDeviceGetTemperature", handle, 0),
            power_mw: nvml.power(handle),
            held_back: REASONS.into_iter().filter_map(|(bit, what)| (reasons & bit != 0).then_some(what)).collect(),
        })
    }

    /// What is known of it, by name: for those who take its times.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let (major, minor) = self.compute_capability();
        let mut facts = vec![
            ("gpu", self.name().to_owned()),
            ("compute capability", format!("{major}.{minor}")),
            ("multiprocessors", self.multiprocessors().to_string()),
            ("CUDA version of the driver", version(driver_version())),
        ];
        if let Ok((_, total)) = self.memory() {
            facts.push(("gpu memory", format!("{:.1} GiB", total as f64 / f64::from(1 << 30))));
        }
        if let Ok(release) = std::fs::read_to_string("/sys/module/nvidia/version") {
            facts.push(("driver", release.trim().to_owned()));
        }
        for library in super::libraries::Library::ALL {
            if let Some(version) = library.find().and_then(|found| found.version) {
                facts.push((library.title(), version));
            }
        }
        if let Some(nvcc) = super::module::NVCC {
            facts.push(("nvcc of the kernels", nvcc.to_owned()));
        }
        facts
    }
}

/// `13000` as `13.0`.
fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}
