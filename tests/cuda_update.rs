//! The fused update on the CUDA device against the CPU's: the same bits in f32, for every rule, clip and order of skipped steps.

#[path = "common/device.rs"]
mod device;

use std::time::{SystemTime, UNIX_EPOCH};

use half::bf16;
use regex::Regex;
use warpstep::backend::cpu;
use warpstep::backend::cuda::{Cuda, Storage};
use warpstep::backend::ops::Update;
use warpstep::backend::{Arena, Backend};
use warpstep::optim::{
    Clip, GroupPattern, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule, StepOutcome, StepParams, UpdatePlan,
};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};

const MOMENTUM: Rule =
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.5, nesterov: false, gamma: 1.0 };
const POLYAK: Rule =
    Rule::Momentum { form: MomentumForm::Polyak, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
const NESTEROV: Rule =
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: true, gamma: 1.0 };
const ADAM: Rule = Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 };
const LION: Rule = Rule::Lion { betas: [0.9, 0.99] };
const LAMB: Rule = Rule::Lamb { betas: [0.9, 0.999], epsilon: 1e-6 };
const LARS: Rule = Rule::Lars { momentum: 0.9, trust: 0.01 };
const MUON: Rule = Rule::Muon { momentum: 0.95, nesterov: true, steps: 5, scale: MuonScale::Original };

/// Tensors around every edge: of a block of the arena, of an access, of a piece of the norm.
const EDGES: [(&str, &[usize]); 8] = [
    ("none", &[0, 5]),
    ("one", &[1]),
    ("a.weight", &[127]),
    ("b.weight", &[2, 64]),
    ("c.weight", &[3, 43]),
    ("scalar", &[]),
    ("d.weight", &[61, 33]),
    ("piece", &[(1 << 12) + 3]),
];

fn clips() -> [Clip; 6] {
    let value = Some(0.5);
    [
        Clip { value: None, norm: NormClip::Off },
        Clip { value, norm: NormClip::Off },
        Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        Clip { value: None, norm: NormClip::Tensor { max_norm: 0.5 } },
        Clip { value: None, norm: NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 } },
        Clip { value, norm: NormClip::Global { max_norm: 1.0 } },
    ]
}

fn options(rule: Rule, clip: Clip) -> OptimizerOptions {
    let mut options = OptimizerOptions::new(rule, 0.01);
    options.clip = clip;
    options.weight_decay = 0.1;
    options
}

/// Parameters or gradients: normal values, zeros in the padding.
fn draw(layout: &ParamLayout, seed: u64, stream: u32) -> Vec<f32> {
    let random = Philox::new(seed, Purpose::Initialization, stream);
    let mut values = vec![0.0; layout.padded_len()];
    for entry in layout.entries() {
        entry.range().for_each(|i| values[i] = random.normal(i as u64) as f32);
    }
    values
}

/// What a run of updates leaves.
#[derive(Debug, PartialEq)]
struct Left {
    parameters: Vec<u32>,
    slots: Vec<Vec<u32>>,
    gradients: Vec<u32>,
    outcomes: Vec<(u64, u64, bool)>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn outcome(outcome: &StepOutcome) -> (u64, u64, bool) {
    // A skipped step has no norm to compare: not a number, or infinite.
    let norm = if outcome.skipped { 0 } else { outcome.grad_norm.to_bits() };
    (norm, (outcome.clip_coefficient as f32).to_bits().into(), outcome.skipped)
}

/// Gradients of each step; in some a value that is not finite.
struct Case {
    layout: ParamLayout,
    plan: UpdatePlan,
    parameters: Vec<f32>,
    gradients: Vec<Vec<f32>>,
    divisor: f64,
    zero_gradients: bool,
}

impl Case {
    fn new(options: &OptimizerOptions, seed: u64, broken: &[usize]) -> Self {
        let specs: Vec<_> =
            EDGES.iter().map(|&(name, shape)| ParamSpec { name: name.into(), shape: shape.into() }).collect();
        let layout = ParamLayout::new(&specs).unwrap();
        let plan = UpdatePlan::new(options, &layout).unwrap();
        let mut gradients: Vec<_> = (0..4).map(|step| draw(&layout, seed, step + 1)).collect();
        for &step in broken {
            let at = layout.entries().iter().rev().find(|entry| !entry.range().is_empty()).unwrap().range().end - 1;
            gradients[step][at] = if step % 2 == 0 { f32::INFINITY } else { f32::NAN };
        }
        let parameters = draw(&layout, seed, 0);
        Case { layout, plan, parameters, gradients, divisor: 4.0, zero_gradients: seed.is_multiple_of(2) }
    }

    fn step(&self, applied: u64) -> StepParams {
        StepParams {
            learning_rate: 0.01,
            step: applied + 1,
            divisor: self.divisor,
            zero_gradients: self.zero_gradients,
        }
    }

    fn on_the_cpu(&self) -> Left {
        let mut theta = self.parameters.clone();
        let mut slots = vec![vec![0.0f32; theta.len()]; self.plan.slots.len()];
        let (mut outcomes, mut gradient, mut applied) = (Vec::new(), Vec::new(), 0);
        for drawn in &self.gradients {
            gradient = drawn.clone();
            let mut parts: Vec<&mut [f32]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
            let found = cpu::update(&mut theta, &mut gradient, &mut parts, &self.plan, &self.step(applied)).unwrap();
            applied += u64::from(!found.skipped);
            outcomes.push(outcome(&found));
        }
        let slots = slots.iter().map(|slot| bits(slot)).collect();
        Left { parameters: bits(&theta), slots, gradients: bits(&gradient), outcomes }
    }

    /// The same on the device, and the low-precision copy where there is one.
    fn on_the_device<S: Storage>(&self, backend: &Cuda<S>) -> (Left, Vec<S>) {
        let len = self.layout.padded_len();
        let kept = if S::HAS_MASTER { len } else { 0 };
        let zeros = || backend.allocate::<f32>(len).unwrap();
        let mut arena: Arena<Cuda<S>> = Arena {
            layout: self.layout.clone(),
            ranges: self.layout.entries().iter().map(|entry| entry.range()).collect(),
            parameters: zeros(),
            stored: backend.allocate(kept).unwrap(),
            gradients: zeros(),
            slots: self.plan.slots.iter().map(|_| zeros()).collect(),
            state_layout: ParamLayout::new(&[]).unwrap(),
            state: backend.allocate(0).unwrap(),
            prepared: None,
        };
        backend.upload(&mut arena.parameters, 0, &self.parameters).unwrap();
        backend.parameters_changed(&mut arena).unwrap();
        let (mut outcomes, mut applied) = (Vec::new(), 0);
        for gradient in &self.gradients {
            backend.upload(&mut arena.gradients, 0, gradient).unwrap();
            let found = backend.update(&mut arena, &self.plan, &self.step(applied)).unwrap();
            applied += u64::from(!found.skipped);
            outcomes.push(outcome(&found));
        }
        let read = |buffer| {
            let mut values = vec![0.0f32; len];
            backend.download(buffer, 0, &mut values).unwrap();
            bits(&values)
        };
        let left = Left {
            parameters: read(&arena.parameters),
            slots: arena.slots.iter().map(read).collect(),
            gradients: read(&arena.gradients),
            outcomes,
        };
        let mut copy = vec![S::from_f32(0.0); kept];
        backend.download(&arena.stored, 0, &mut copy).unwrap();
        (left, copy)
    }
}

fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

fn same_bits(rules: &[Rule]) {
    let Some(device) = device::device() else { return };
    let seed = fresh_seed();
    for (at, rule) in rules.iter().enumerate() {
        for (number, clip) in clips().into_iter().enumerate() {
            // The first step skipped, one in the middle, two in a row.
            let broken: &[usize] = [&[][..], &[0], &[1], &[0, 1], &[2]][(at + number) % 5];
            let case = Case::new(&options(*rule, clip), seed + number as u64, broken);
            let backend = Cuda::<f32>::new(device.clone());
            let (expected, (found, _)) = (case.on_the_cpu(), case.on_the_device(&backend));
            assert_eq!(found.outcomes, expected.outcomes, "{rule:?}, {clip:?}, broken {broken:?}");
            assert!(found == expected, "{rule:?}, {clip:?}, broken {broken:?}: other bits than the CPU's");
        }
    }
}

#[test]
fn sgd_and_momentum_have_the_cpu_s_bits() {
    same_bits(&[Rule::Sgd, MOMENTUM, NESTEROV, POLYAK]);
}

#[test]
fn adam_and_lion_have_the_cpu_s_bits() {
    same_bits(&[ADAM, LION]);
}

#[test]
fn lars_and_lamb_have_the_cpu_s_bits() {
    same_bits(&[LARS, LAMB]);
}

#[test]
fn groups_of_several_rules_have_the_cpu_s_bits() {
    let Some(device) = device::device() else { return };
    let seed = fresh_seed();
    let mut options = options(ADAM, Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } });
    options.groups.push(GroupPattern {
        pattern: Regex::new("^[ab]").unwrap(),
        learning_rate_scale: 0.5,
        weight_decay: Some(0.0),
        rule: Some(MOMENTUM),
        decoupled: None,
    });
    let case = Case::new(&options, seed, &[1]);
    let (found, _) = case.on_the_device(&Cuda::<f32>::new(device));
    assert!(found == case.on_the_cpu());
}

#[test]
fn the_copy_in_sixteen_bits_is_the_rounded_master() {
    let Some(device) = device::device() else { return };
    let case = Case::new(&options(ADAM, clips()[2]), fresh_seed(), &[0]);
    let (found, copy) = case.on_the_device(&Cuda::<bf16>::new(device));
    let expected = case.on_the_cpu();
    assert!(found.parameters == expected.parameters && found.slots == expected.slots);
    for (copy, master) in copy.iter().zip(&expected.parameters) {
        assert_eq!(copy.to_bits(), bf16::from_f32(f32::from_bits(*master)).to_bits());
    }
}

#[test]
fn muon_is_the_cpu_s_up_to_the_rounding_of_its_products() {
    let Some(device) = device::device() else { return };
    let case = Case::new(&options(MUON, clips()[2]), fresh_seed(), &[1]);
    let (found, _) = case.on_the_device(&Cuda::<f32>::new(device));
    let expected = case.on_the_cpu();
    for (found, expected) in found.parameters.iter().zip(&expected.parameters) {
        let [found, expected] = [found, expected].map(|bits| f32::from_bits(*bits));
        assert!((found - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{found} for {expected}");
    }
}
