//! Every combination of types, and bf16 parameters alone; scale, clip and skip in every order.

use std::sync::Arc;

use half::{bf16, f16};
use warpstep::backend::cpu;
use warpstep::backend::cuda::update::{ArenaArrays, Prepared};
use warpstep::backend::cuda::{Buffer, Device};
use warpstep::optim::{Clip, NormClip, OptimizerOptions, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::real::Element;

use super::bed::{ADAM, Case, Found, MOMENTUM, MUON, RULES, SMALL, bits, clips, fresh_seed, options, outcome};
use super::devices;

/// What a step of an order is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    /// Its norm lies below the clip's bound.
    Small,
    /// Its norm lies above it.
    Clipped,
    /// A gradient is not finite.
    Skipped,
}

/// Every order of three steps, each with a loss scale of its own.
fn orders() -> Vec<[Step; 3]> {
    let kinds = [Step::Small, Step::Clipped, Step::Skipped];
    let three = |i: usize| [kinds[i / 9], kinds[i / 3 % 3], kinds[i % 3]];
    (0..27).map(three).collect()
}

/// A case of these steps whose gradients are multiplied by loss scales that are powers of two, as gradients of type `G` hold them.
fn scaled_case<G: Element>(options: &OptimizerOptions, seed: u64, order: [Step; 3], scales: [f64; 3]) -> Case {
    let mut case = Case::of(&SMALL, options, seed, &[]);
    case.gradients.truncate(3);
    case.divisors = scales.to_vec();
    for ((gradient, step), scale) in case.gradients.iter_mut().zip(order).zip(scales) {
        let size = if step == Step::Clipped { 0.5 } else { 1.0 / 64.0 };
        gradient.iter_mut().for_each(|g| *g = G::from_f64(f64::from(*g) * size * scale).f32());
        if step == Step::Skipped {
            gradient[0] = f32::INFINITY;
        }
    }
    case
}

/// What a run in these types leaves, as bits.
#[derive(Debug, PartialEq)]
struct Left {
    parameters: Vec<u32>,
    copy: Vec<u32>,
    slots: Vec<Vec<u32>>,
    gradients: Vec<u32>,
    outcomes: Vec<Found>,
}

fn wide<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.f32().to_bits()).collect()
}

fn filled<T: Element>(device: &Arc<Device>, values: &[f32]) -> Buffer<T> {
    let mut buffer = Buffer::zeros(device, values.len()).unwrap();
    buffer.write(0, &values.iter().map(|&value| T::from_f32(value)).collect::<Vec<_>>()).unwrap();
    buffer
}

fn read<T: Element>(buffer: &Buffer<T>) -> Vec<u32> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.read(0, &mut values).unwrap();
    wide(&values)
}

/// A run of updates of arrays of these types.
fn typed<P: Element, G: Element, S: Element>(case: &Case, device: &Arc<Device>) -> Left {
    let len = case.layout.padded_len();
    let mut parameters = filled::<P>(device, &case.parameters);
    let mut copy = (P::NAME == "f32" && S::NAME != "f32").then(|| Buffer::<S>::zeros(device, len).unwrap());
    let mut gradients = filled::<G>(device, &vec![0.0; len]);
    let mut slots: Vec<_> = case.plan.slots.iter().map(|_| Buffer::<f32>::zeros(device, len).unwrap()).collect();
    let mut prepared = Prepared::new(device, &case.plan).unwrap();
    let (mut outcomes, mut applied) = (Vec::new(), 0);
    for (number, drawn) in case.gradients.iter().enumerate() {
        gradients.write(0, &drawn.iter().map(|&g| G::from_f32(g)).collect::<Vec<_>>()).unwrap();
        let arrays = ArenaArrays {
            parameters: &mut parameters,
            gradients: &mut gradients,
            copy: copy.as_mut(),
            slots: &mut slots,
        };
        let found = prepared.update_buffers(arrays, &case.step(number, applied)).unwrap();
        applied += u64::from(!found.skipped);
        outcomes.push(outcome(&found));
    }
    Left {
        parameters: read(&parameters),
        copy: copy.as_ref().map(read).unwrap_or_default(),
        slots: slots.iter().map(read).collect(),
        gradients: read(&gradients),
        outcomes,
    }
}

/// The same on the CPU.
fn typed_on_the_cpu<P: Element, S: Element>(case: &Case) -> Left {
    let mut theta: Vec<f32> = case.parameters.iter().map(|&p| P::from_f32(p).f32()).collect();
    let mut slots = vec![vec![0.0f32; theta.len()]; case.plan.slots.len()];
    let (mut outcomes, mut gradient, mut applied) = (Vec::new(), Vec::new(), 0);
    for (number, drawn) in case.gradients.iter().enumerate() {
        gradient = drawn.clone();
        let mut parts: Vec<&mut [f32]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
        let step = case.step(number, applied);
        let found = match case.plan.rounding {
            None => cpu::update(&mut theta, &mut gradient, &mut parts, &case.plan, &step).unwrap(),
            Some(seed) => {
                let mut low: Vec<bf16> = theta.iter().map(|&t| bf16::from_f32(t)).collect();
                let found = cpu::update_bf16(&mut low, &mut gradient, &mut parts, &case.plan, &step, seed).unwrap();
                theta = low.iter().map(|t| t.to_f32()).collect();
                found
            }
        };
        applied += u64::from(!found.skipped);
        outcomes.push(outcome(&found));
    }
    let copied = P::NAME == "f32" && S::NAME != "f32" && applied > 0;
    let copy = if copied { theta.iter().map(|&t| S::from_f32(t).f32().to_bits()).collect() } else { Vec::new() };
    Left {
        parameters: bits(&theta),
        copy,
        slots: slots.iter().map(|slot| bits(slot)).collect(),
        gradients: bits(&gradient),
        outcomes,
    }
}

fn compare<P: Element, G: Element, S: Element>(case: &Case, what: &str) {
    let mut expected = typed_on_the_cpu::<P, S>(case);
    for device in devices() {
        let mut found = typed::<P, G, S>(case, &device);
        if case.gradients.len() == found.outcomes.iter().filter(|outcome| outcome.3).count() {
            // Nothing was applied, so the copy was never written.
            assert!(found.copy.iter().all(|&bits| bits == 0));
            (found.copy, expected.copy) = (Vec::new(), Vec::new());
        }
        let types = [P::NAME, G::NAME, S::NAME];
        let of = format!("{what}, {types:?}, {:?}", device.options());
        assert_eq!(found.outcomes, expected.outcomes, "{of}");
        assert!(found == expected, "{of}: other bits than the CPU's");
    }
}

#[test]
fn scale_clip_and_skip_have_the_cpu_s_bits_in_every_order_and_type() {
    let seed = fresh_seed();
    let clips = [
        Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } },
        Clip { value: Some(0.25), norm: NormClip::Global { max_norm: 1.0 } },
    ];
    for (number, order) in orders().into_iter().enumerate() {
        let (rule, clip) = ([MOMENTUM, ADAM][number % 2], clips[number / 2 % 2]);
        let options = options(rule, clip);
        let what = format!("{rule:?}, {clip:?}, {order:?}");
        let own = seed + number as u64;
        compare::<f32, f32, f32>(&scaled_case::<f32>(&options, own, order, [65536.0, 1.0, 1024.0]), &what);
        match number % 3 {
            0 => compare::<f32, f32, bf16>(&scaled_case::<f32>(&options, own, order, [4.0, 0.5, 4.0]), &what),
            1 => compare::<f32, bf16, bf16>(&scaled_case::<bf16>(&options, own, order, [1.0, 65536.0, 8.0]), &what),
            // The largest of f16 is 65504: a scale that leaves room, then others after a skip.
            _ => compare::<f32, f16, f16>(&scaled_case::<f16>(&options, own, order, [4096.0, 2048.0, 1024.0]), &what),
        }
    }
}

#[test]
fn every_rule_has_the_cpu_s_bits_in_every_type() {
    let seed = fresh_seed();
    let order = [Step::Clipped, Step::Skipped, Step::Small];
    for (at, rule) in RULES.into_iter().enumerate() {
        let clip = clips()[(at + 2) % clips().len()];
        let options = options(rule, clip);
        let what = format!("{rule:?}, {clip:?}");
        let own = seed + at as u64;
        compare::<f32, f32, f16>(&scaled_case::<f32>(&options, own, order, [4096.0, 2.0, 1.0]), &what);
        compare::<f32, f16, f16>(&scaled_case::<f16>(&options, own, order, [4096.0, 2048.0, 2048.0]), &what);
        compare::<f32, bf16, bf16>(&scaled_case::<bf16>(&options, own, order, [1.0, 1.0, 4.0]), &what);
        let mut alone = scaled_case::<f32>(&options, own, order, [1.0, 2.0, 8.0]);
        alone.plan.rounding = Some(own);
        compare::<bf16, f32, bf16>(&alone, &what);
        let mut alone = scaled_case::<bf16>(&options, own, order, [8.0, 2.0, 1.0]);
        alone.plan.rounding = Some(own);
        compare::<bf16, bf16, bf16>(&alone, &what);
    }
}

#[test]
fn bf16_parameters_alone_are_rounded_by_seed_and_step_over_every_edge() {
    let seed = fresh_seed();
    let mut case = Case::new(&options(ADAM, clips()[2]), seed, &[1]);
    case.plan.rounding = Some(seed);
    compare::<bf16, f32, bf16>(&case, "Adam over every edge");
    let Some(device) = devices().pop() else { return };
    let first = typed::<bf16, f32, bf16>(&case, &device);
    assert!(first == typed::<bf16, f32, bf16>(&case, &device), "other bits the second time");
    case.plan.rounding = Some(seed + 1);
    let other = typed::<bf16, f32, bf16>(&case, &device);
    assert!(other.parameters != first.parameters, "another seed rounds alike");
    // Neighbours in bf16 at most one update apart: the mean does not drift.
    let mean = |left: &Left| left.parameters.iter().map(|&p| f64::from(f32::from_bits(p))).sum::<f64>();
    assert!((mean(&first) - mean(&other)).abs() < 0.02 * first.parameters.len() as f64);
}

#[test]
fn muon_rounds_bf16_parameters_alone_to_neighbours_of_the_cpu_s() {
    let seed = fresh_seed();
    let Some(device) = devices().pop() else { return };
    let mut case = Case::of(&[("m.weight", &[5, 9]), ("b", &[3])], &options(MUON, clips()[2]), seed, &[]);
    case.gradients.truncate(1);
    case.plan.rounding = Some(seed);
    let found = typed::<bf16, f32, bf16>(&case, &device);
    let expected = typed_on_the_cpu::<bf16, bf16>(&case);
    assert_eq!(found.outcomes, expected.outcomes);
    for (found, expected) in found.parameters.iter().zip(&expected.parameters) {
        let [found, expected] = [found, expected].map(|bits| f32::from_bits(*bits));
        assert!((found - expected).abs() <= expected.abs() / 128.0, "{found} for {expected}");
    }
}

#[test]
fn arrays_that_do_not_fit_the_plan_are_refused() {
    let Some(device) = devices().pop() else { return };
    let layout = ParamLayout::new(&[ParamSpec { name: "a".into(), shape: vec![5] }]).unwrap();
    let plan = UpdatePlan::new(&options(MOMENTUM, Clip::default()), &layout).unwrap();
    let mut prepared = Prepared::new(&device, &plan).unwrap();
    let case = Case::of(&SMALL, &options(MOMENTUM, Clip::default()), 1, &[]);
    let step = case.step(0, 0);
    let mut update = |len: usize, slots: usize| {
        let mut slots: Vec<_> = (0..slots).map(|_| filled::<f32>(&device, &[0.0; 128])).collect();
        let arrays = ArenaArrays {
            parameters: &mut filled::<f32>(&device, &[0.0; 128]),
            gradients: &mut filled::<f32>(&device, &vec![0.0; len]),
            copy: None::<&mut Buffer<f32>>,
            slots: &mut slots,
        };
        prepared.update_buffers(arrays, &step).map_err(|error| error.to_string())
    };
    assert!(update(256, 1).unwrap_err().contains("128 elements"));
    assert!(update(128, 0).unwrap_err().contains("1 slots"));
    assert!(update(128, 1).is_ok());
    let arrays = ArenaArrays {
        parameters: &mut filled::<bf16>(&device, &[0.0; 128]),
        gradients: &mut filled::<f32>(&device, &[0.0; 128]),
        copy: None::<&mut Buffer<bf16>>,
        slots: &mut [filled::<f32>(&device, &[0.0; 128])],
    };
    assert!(prepared.update_buffers(arrays, &step).unwrap_err().to_string().contains("seed"));
}
