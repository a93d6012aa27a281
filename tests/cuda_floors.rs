//! The update's traffic, counted on the emulated device: no more bytes than the rules ask for.

#[path = "common/device.rs"]
mod device;
#[path = "common/emulator.rs"]
mod emulator;

use std::sync::Mutex;

use half::bf16;
use warpstep::backend::cuda::{Cuda, DeviceOptions, Storage};
use warpstep::backend::ops::Update;
use warpstep::backend::{Arena, Backend};
use warpstep::optim::{Clip, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule, StepParams, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep_emulator::counts::Counts;

use emulator::Emulator;

/// Counts are the process's.
static ALONE: Mutex<()> = Mutex::new(());

const ADAM: Rule = Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 };
const LAMB: Rule = Rule::Lamb { betas: [0.9, 0.999], epsilon: 1e-6 };

fn momentum(form: MomentumForm, nesterov: bool) -> Rule {
    Rule::Momentum { form, momentum: 0.9, dampening: 0.0, nesterov, gamma: 1.0 }
}

/// What one update did: by kernel, and on the host.
fn one_update<S: Storage>(
    rule: Rule,
    norm: NormClip,
    zero_gradients: bool,
    persistent_update: bool,
) -> Option<(usize, Vec<(String, Counts)>)> {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let device = device::device_with(DeviceOptions { persistent_update, ..DeviceOptions::default() })?;
    let emulator = Emulator::find()?;
    let backend = Cuda::<S>::new(device);
    let specs = [("a.weight", vec![512, 500]), ("a.bias", vec![500]), ("b.weight", vec![1000, 256])]
        .map(|(name, shape)| ParamSpec { name: name.into(), shape });
    let layout = ParamLayout::new(&specs).unwrap();
    let len = layout.padded_len();
    let mut options = OptimizerOptions::new(rule, 0.01);
    options.weight_decay = 0.1;
    options.clip = Clip { value: None, norm };
    let plan = UpdatePlan::new(&options, &layout).unwrap();
    let filled = |value: f32| {
        let mut buffer = backend.allocate::<f32>(len).unwrap();
        backend.upload(&mut buffer, 0, &vec![value; len]).unwrap();
        buffer
    };
    let mut arena: Arena<Cuda<S>> = Arena {
        ranges: layout.entries().iter().map(|entry| entry.range()).collect(),
        layout,
        parameters: filled(1.0),
        stored: backend.allocate(if S::HAS_MASTER { len } else { 0 }).unwrap(),
        gradients: filled(0.01),
        slots: plan.slots.iter().map(|_| filled(0.0)).collect(),
        state_layout: ParamLayout::new(&[]).unwrap(),
        state: backend.allocate(0).unwrap(),
        prepared: Default::default(),
        held: None,
    };
    let step = |step| StepParams { learning_rate: 0.01, step, divisor: 1.0, zero_gradients };
    // The first update uploads the plan's tables.
    backend.update(&mut arena, &plan, &step(1)).unwrap();
    emulator.reset();
    let outcome = backend.update(&mut arena, &plan, &step(2)).unwrap();
    assert!(!outcome.skipped);
    let host = emulator.host();
    assert_eq!((host.allocations, host.frees, host.host_allocations), (0, 0, 0), "an update allocates nothing");
    assert!(host.bytes_in + host.bytes_out < 1024, "an update copies its scalars, and no more");
    Some((len, emulator.kernels()))
}

/// Bytes a parameter of the kernels that `of` picks, each byte of memory once a launch.
fn bytes(len: usize, kernels: &[(String, Counts)], of: impl Fn(&str) -> bool) -> f64 {
    let picked = kernels.iter().filter(|(name, _)| of(name));
    picked.map(|(_, counts)| counts.touched_read + counts.touched_written).sum::<u64>() as f64 / len as f64
}

/// The floor of a rule's pass over elements, and of the passes for its norms.
fn check<S: Storage>(rule: Rule, norm: NormClip, zero_gradients: bool, pass: f64, norms: f64) {
    let Some((len, kernels)) = one_update::<S>(rule, norm, zero_gradients, false) else { return };
    let what = format!("{rule:?} under {norm:?}, copy of {}, zeroing {zero_gradients}", S::NAME);
    let passes = |name: &str| name.starts_with("update_") || name.starts_with("lamb_apply");
    let (found_pass, found_norms) = (bytes(len, &kernels, passes), bytes(len, &kernels, |name| !passes(name)));
    println!("{what}: {found_pass:.3} + {found_norms:.3} bytes a parameter, floor {pass} + {norms}");
    for (name, counts) in &kernels {
        assert_eq!(counts.local, 0, "{what}: {name} keeps values in local memory");
    }
    for (kind, found, floor) in [("pass", found_pass, pass), ("norms", found_norms, norms)] {
        assert!(found >= floor * 0.98, "{what}: {found} bytes of its {kind} cannot be right: the floor is {floor}");
        assert!(found <= floor * 1.02, "{what}: {found} bytes a parameter of its {kind}, floor {floor}");
    }
    // Sums, tables and the like are read by single lanes; what is by element goes in whole sectors.
    for (name, counts) in kernels.iter().filter(|(name, _)| passes(name) || name.contains("pieces")) {
        let moved = counts.touched_read + counts.touched_written;
        let excess = counts.sectors - counts.ideal_sectors;
        assert!((excess * 32) as f64 <= moved as f64 * 0.01, "{what}: {name}: {excess} sectors more than needed");
    }
}

const OFF: NormClip = NormClip::Off;
const GLOBAL: NormClip = NormClip::Global { max_norm: 1.0 };

#[test]
fn rules_of_elements_move_the_bytes_of_their_arrays() {
    for (rule, floor) in [
        (Rule::Sgd, 12.0),
        (momentum(MomentumForm::Pytorch, false), 20.0),
        (momentum(MomentumForm::Pytorch, true), 20.0),
        (momentum(MomentumForm::Polyak, false), 20.0),
        (Rule::Lion { betas: [0.9, 0.99] }, 20.0),
        (ADAM, 28.0),
    ] {
        check::<f32>(rule, OFF, false, floor, 4.0);
        check::<f32>(rule, GLOBAL, false, floor, 4.0);
    }
}

#[test]
fn a_copy_and_zeroing_cost_what_they_write() {
    check::<bf16>(ADAM, GLOBAL, false, 30.0, 4.0);
    check::<bf16>(Rule::Sgd, GLOBAL, true, 18.0, 4.0);
    check::<f32>(momentum(MomentumForm::Pytorch, false), GLOBAL, true, 24.0, 4.0);
}

#[test]
fn clips_by_tensor_and_by_unit_cost_a_reading() {
    check::<f32>(Rule::Sgd, NormClip::Tensor { max_norm: 0.5 }, false, 12.0, 4.0);
    check::<f32>(Rule::Sgd, NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 }, false, 12.0, 12.0);
}

#[test]
fn rules_by_tensor_read_what_their_norms_are_of() {
    // LARS: weights and gradients, before its pass.
    check::<f32>(Rule::Lars { momentum: 0.9, trust: 0.01 }, GLOBAL, false, 20.0, 12.0);
    // LAMB: gradient and moments; weights and moments for the norms; weights
    // and moments again, and the weights written.
    check::<f32>(LAMB, GLOBAL, false, 20.0 + 16.0, 4.0 + 12.0);
}

#[test]
fn the_persistent_form_reads_gradients_once_from_memory() {
    for (rule, floor) in [(Rule::Sgd, 12.0), (momentum(MomentumForm::Pytorch, false), 20.0), (ADAM, 28.0)] {
        let Some((len, kernels)) = one_update::<f32>(rule, GLOBAL, false, true) else { return };
        let names: Vec<_> = kernels.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.len() == 1 && names[0].starts_with("persistent"), "{names:?}");
        let found = bytes(len, &kernels, |_| true);
        println!("{rule:?}: {found:.3} bytes a parameter in one launch, floor {floor}");
        assert!((floor * 0.98..=floor * 1.02).contains(&found), "{rule:?}: {found} bytes a parameter, floor {floor}");
    }
}

#[test]
fn muon_moves_its_matrices_between_products_and_no_more() {
    let steps = 5;
    let rule = Rule::Muon { momentum: 0.95, nesterov: true, steps, scale: MuonScale::Original };
    let Some((len, kernels)) = one_update::<f32>(rule, GLOBAL, false, false) else { return };
    // Squares of the shorter sides, of two matrices.
    let gram = (500.0 * 500.0 + 256.0 * 256.0) / len as f64;
    let iterations = f64::from(steps);
    for (kernels_named, floor) in [
        // Weights, gradient and momentum read; momentum and direction written. Then weights and direction read, weights written.
        ("muon_direction", 20.0),
        ("muon_apply", 12.0),
        // The direction read; read and written.
        ("squares", 4.0),
        ("muon_normalize", 8.0),
        // Between the products of each iteration: two arrays read, one written, of the matrix and of its Gram matrix.
        ("combine", 12.0 * iterations * (1.0 + gram)),
    ] {
        let found = bytes(len, &kernels, |name| name.starts_with(kernels_named));
        println!("{kernels_named}: {found:.3} bytes a parameter, floor {floor:.3}");
        assert!((0.98 * floor..=1.02 * floor).contains(&found), "{kernels_named}: {found} bytes, floor {floor}");
    }
    assert!(kernels.iter().all(|(_, counts)| counts.local == 0), "a kernel keeps values in local memory");
}
