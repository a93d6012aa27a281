//! The update alone on memory that the caller owns, in a context and on a stream of the caller's: the CPU's bits.

#[path = "common/device.rs"]
mod device;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use half::bf16;
use warpstep::backend::cpu;
use warpstep::backend::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use warpstep::backend::cuda::update::{Arrays, Prepared};
use warpstep::backend::cuda::{Device, DeviceOptions};
use warpstep::optim::{Clip, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};

const STEPS: u64 = 3;

/// A plan over tensors of odd sizes, values for them, and a device whose context and stream are this test's.
struct Place {
    plan: UpdatePlan,
    layout: ParamLayout,
    seed: u64,
    stream: Arc<CudaStream>,
    prepared: Prepared,
}

impl Place {
    fn new() -> Option<Self> {
        // Says why where there is no device to test on.
        device::device()?;
        let spec = |name: &str, shape: &[usize]| ParamSpec { name: name.into(), shape: shape.into() };
        let layout = ParamLayout::new(&[spec("a", &[3, 43]), spec("b", &[1]), spec("c", &[16, 129])]).unwrap();
        let mut options = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 }, 0.01);
        options.weight_decay = 0.1;
        options.clip = Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } };
        let plan = UpdatePlan::new(&options, &layout).unwrap();
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        println!("seed {seed}");
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let device = Device::on_stream(&stream, DeviceOptions::default()).unwrap();
        let prepared = Prepared::new(&device, &plan).unwrap();
        Some(Place { plan, layout, seed, stream, prepared })
    }

    /// Normal values, zeros in the padding.
    fn draw(&self, stream: u32) -> Vec<f32> {
        let random = Philox::new(self.seed, Purpose::Initialization, stream);
        let mut values = vec![0.0; self.layout.padded_len()];
        for entry in self.layout.entries() {
            entry.range().for_each(|i| values[i] = random.normal(i as u64) as f32);
        }
        values
    }

    fn on_the_cpu(&self, gradient: impl Fn(u32) -> Vec<f32>) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut parameters = self.draw(0);
        let mut slots = vec![vec![0.0f32; parameters.len()]; self.plan.slots.len()];
        for step in 1..=STEPS {
            let mut views: Vec<&mut [f32]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
            let mut gradient = gradient(step as u32);
            cpu::update(&mut parameters, &mut gradient, &mut views, &self.plan, &params(step)).unwrap();
        }
        (parameters, slots)
    }

    fn zeros(&self) -> CudaSlice<f32> {
        self.stream.alloc_zeros(self.layout.padded_len()).unwrap()
    }

    fn slots(&self) -> Vec<CudaSlice<f32>> {
        self.plan.slots.iter().map(|_| self.zeros()).collect()
    }

    fn read(&self, slice: &CudaSlice<f32>) -> Vec<u32> {
        bits(&self.stream.clone_dtoh(slice).unwrap())
    }
}

fn params(step: u64) -> StepParams {
    StepParams { learning_rate: 0.01, step, divisor: 2.0, zero_gradients: false }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn slices_of_cudarc_s_are_updated_to_the_cpu_s_bits() {
    let Some(mut place) = Place::new() else { return };
    let (expected, expected_slots) = place.on_the_cpu(|step| place.draw(step));
    let mut parameters = place.stream.clone_htod(&place.draw(0)).unwrap();
    let mut slots = place.slots();
    for step in 1..=STEPS {
        // Another stream of the same context fills the gradients: nobody waits for it here.
        let other = place.stream.context().new_stream().unwrap();
        let mut gradients = other.clone_htod(&place.draw(step as u32)).unwrap();
        let mut views: Vec<&mut CudaSlice<f32>> = slots.iter_mut().collect();
        let found = place.prepared.update(&mut parameters, &mut gradients, &mut views, &params(step)).unwrap();
        assert!(!found.skipped && found.grad_norm > 1.0 && found.clip_coefficient < 1.0);
    }
    assert!(place.read(&parameters) == bits(&expected), "other parameters than the CPU's");
    for (slot, expected) in slots.iter().zip(&expected_slots) {
        assert!(place.read(slot) == bits(expected), "another slot than the CPU's");
    }
}

#[test]
fn gradients_in_bf16_and_a_copy_in_bf16_go_with_parameters_in_f32() {
    let Some(mut place) = Place::new() else { return };
    let rounded = |step: u32| -> Vec<bf16> { place.draw(step).into_iter().map(bf16::from_f32).collect() };
    let drawn: Vec<Vec<bf16>> = (1..=STEPS as u32).map(rounded).collect();
    let (expected, _) = place.on_the_cpu(|step| drawn[step as usize - 1].iter().map(|value| value.to_f32()).collect());
    let mut parameters = place.stream.clone_htod(&place.draw(0)).unwrap();
    let mut copy: CudaSlice<bf16> = place.stream.alloc_zeros(parameters.len()).unwrap();
    let mut slots = place.slots();
    for step in 1..=STEPS {
        let mut gradients = place.stream.clone_htod(&drawn[step as usize - 1]).unwrap();
        let mut views: Vec<&mut CudaSlice<f32>> = slots.iter_mut().collect();
        let prepared = &mut place.prepared;
        prepared.update_with_copy(&mut parameters, &mut gradients, &mut copy, &mut views, &params(step)).unwrap();
    }
    assert!(place.read(&parameters) == bits(&expected));
    let copy = place.stream.clone_dtoh(&copy).unwrap();
    assert!(copy.iter().zip(&expected).all(|(copy, master)| copy.to_bits() == bf16::from_f32(*master).to_bits()));
}

#[test]
fn slices_of_bf16_alone_are_updated_to_the_cpu_s_bits() {
    let Some(mut place) = Place::new() else { return };
    let rounded = |stream: u32| -> Vec<bf16> { place.draw(stream).into_iter().map(bf16::from_f32).collect() };
    let drawn: Vec<Vec<bf16>> = (0..=STEPS as u32).map(rounded).collect();
    let mut parameters = place.stream.clone_htod(&drawn[0]).unwrap();
    let mut slots = place.slots();
    // Without the seed of the rounding nothing is done.
    let mut gradients = place.stream.clone_htod(&drawn[1]).unwrap();
    let mut views: Vec<&mut CudaSlice<f32>> = slots.iter_mut().collect();
    let error = place.prepared.update_bf16(&mut parameters, &mut gradients, &mut views, &params(1)).unwrap_err();
    assert!(error.to_string().contains("a seed of the rounding"), "{error}");
    let plan = UpdatePlan { rounding: Some(7), ..place.plan.clone() };
    let device = Device::on_stream(&place.stream, DeviceOptions::default()).unwrap();
    let mut prepared = Prepared::new(&device, &plan).unwrap();
    let (mut expected, mut expected_slots) = (drawn[0].clone(), vec![vec![0.0f32; place.layout.padded_len()]; 2]);
    for step in 1..=STEPS {
        let drawn = &drawn[step as usize];
        let mut gradients = place.stream.clone_htod(drawn).unwrap();
        let mut views: Vec<&mut CudaSlice<f32>> = slots.iter_mut().collect();
        let found = prepared.update_bf16(&mut parameters, &mut gradients, &mut views, &params(step)).unwrap();
        let mut gradients: Vec<f32> = drawn.iter().map(|value| value.to_f32()).collect();
        let mut views: Vec<&mut [f32]> = expected_slots.iter_mut().map(Vec::as_mut_slice).collect();
        let wanted = cpu::update_bf16(&mut expected, &mut gradients, &mut views, &plan, &params(step), 7).unwrap();
        assert_eq!(found, wanted);
    }
    assert!(place.stream.clone_dtoh(&parameters).unwrap() == expected, "other parameters than the CPU's");
    assert!(slots.iter().zip(&expected_slots).all(|(slot, expected)| place.read(slot) == bits(expected)));
}

#[test]
fn addresses_are_updated_as_slices_are() {
    let Some(mut place) = Place::new() else { return };
    let (expected, _) = place.on_the_cpu(|step| place.draw(step));
    let parameters = place.stream.clone_htod(&place.draw(0)).unwrap();
    let slots = place.slots();
    let stream = place.stream.clone();
    let address = |slice: &CudaSlice<f32>| slice.device_ptr(&stream).0;
    for step in 1..=STEPS {
        let gradients = place.stream.clone_htod(&place.draw(step as u32)).unwrap();
        let arrays = Arrays {
            parameters: address(&parameters),
            gradients: address(&gradients),
            copy: 0,
            slots: [address(&slots[0]), address(&slots[1])],
            types: ["f32"; 3],
        };
        // SAFETY: five slices of the plan's length, which nothing else uses, on the stream of the device.
        unsafe { place.prepared.update_at(&arrays, &params(step)).unwrap() };
    }
    assert!(place.read(&parameters) == bits(&expected));
}

#[test]
fn arrays_that_do_not_fit_are_refused_and_left_as_they_were() {
    let Some(mut place) = Place::new() else { return };
    let mut parameters = place.stream.clone_htod(&place.draw(0)).unwrap();
    let mut gradients = place.stream.clone_htod(&place.draw(1)).unwrap();
    let [mut first, mut second] = [place.zeros(), place.zeros()];
    let mut short: CudaSlice<f32> = place.stream.alloc_zeros(128).unwrap();
    let before = place.read(&parameters);
    let prepared = &mut place.prepared;
    let mut refused = |gradients: &mut CudaSlice<f32>, slots: &mut [&mut CudaSlice<f32>], expected: &str| {
        let error = prepared.update(&mut parameters, gradients, slots, &params(1)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(&mut gradients, &mut [&mut first], "2 slots");
    refused(&mut short, &mut [&mut first, &mut second], "gradients of");
    refused(&mut gradients, &mut [&mut first, &mut short], "a slot of");
    let arrays = Arrays { parameters: 16, gradients: 24, copy: 0, slots: [32, 48], types: ["f32"; 3] };
    for (arrays, expected) in [
        (arrays, "multiples of 16"),
        (Arrays { gradients: 0, ..arrays }, "an address of 0"),
        (Arrays { gradients: 32, types: ["f32", "bf16", "f32"], ..arrays }, "bf16"),
    ] {
        // SAFETY: it is refused before any address is used.
        let error = unsafe { place.prepared.update_at(&arrays, &params(1)) }.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(place.read(&parameters) == before);
}
