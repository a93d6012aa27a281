//! The norm gathered before the rest of the update.

use warpstep::backend::cuda::Cuda;
use warpstep::backend::cuda::update::EarlyNorm;
use warpstep::backend::ops::{ActivationKind, Update};
use warpstep::backend::{Backend, Memory, StepContext};
use warpstep::model::layers::{Activation, Linear, Sequential};
use warpstep::model::{Input, Loss, Mode, Model, Value};
use warpstep::optim::{StepParams, UpdatePlan};
use warpstep::random::{Philox, Purpose};

use super::bed::{ADAM, Case, LARS, MOMENTUM, bits, clips, fresh_seed, options, outcome};
use super::devices;

#[test]
fn the_norm_gathered_tensor_by_tensor_in_any_order_has_the_same_bits() {
    let seed = fresh_seed();
    let Some(device) = devices().into_iter().next() else { return };
    for (rule, clip) in [(MOMENTUM, clips()[5]), (LARS, clips()[4]), (ADAM, clips()[3])] {
        let case = Case::new(&options(rule, clip), seed, &[1]);
        let backend = Cuda::<f32>::new(device.clone());
        let (expected, _) = case.on_the_device(&backend);
        let mut arena = case.arena(&backend);
        let tensors = case.plan.tensors.len();
        let found = case.run_by(&backend, &mut arena, |arena, step| {
            backend.begin_update(arena, &case.plan, step).unwrap();
            let middle = 1 + (seed % (tensors as u64 - 1)) as usize;
            for part in [middle..tensors, 0..1, 1..middle] {
                backend.gather_norm(arena, &case.plan, part).unwrap();
            }
            backend.finish_update(arena, &case.plan, step).unwrap()
        });
        assert!(found == expected, "{rule:?} under {clip:?}");
        let too_many = backend.gather_norm(&mut arena, &case.plan, 0..tensors + 1).unwrap_err().to_string();
        assert!(too_many.contains("gather_norm"), "{too_many}");
    }
}

#[test]
fn a_program_s_norm_is_gathered_as_backward_finishes_with_the_same_bits() {
    let seed = fresh_seed();
    let Some(device) = devices().into_iter().next() else { return };
    let backend = Cuda::<f32>::new(device);
    let layers = Sequential::new()
        .then("a", Linear::new(24))
        .then("b", Activation::new(ActivationKind::Relu))
        .then("c", Linear::new(9))
        .then("d", Linear::new(3));
    let mut model: Model<Cuda<f32>> = Model::new(Box::new(layers), Loss::MeanSquaredError);
    let program = model.plan(&Input::Real(vec![7]), 5, Mode::Training).unwrap();
    let (layout, ranges) = model.parameters().layout().unwrap();
    let plan = UpdatePlan::new(&options(ADAM, clips()[2]), &layout).unwrap();
    let early = EarlyNorm::new(&program.ops, &ranges, &plan, 200).unwrap();
    // All tensors once, in the arena's order, in several parts, the last with the last operation.
    let parts: Vec<_> = early.after.iter().map(|(_, tensors)| tensors.clone()).collect();
    assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..plan.tensors.len()).collect::<Vec<_>>());
    assert!(parts.len() > 1 && early.after.is_sorted_by(|a, b| a.0 < b.0), "{early:?}");
    assert_eq!(EarlyNorm::new(&program.ops, &ranges, &plan, usize::MAX).unwrap().after.len(), 1);
    let step = StepParams { learning_rate: 0.01, step: 1, divisor: 1.0, zero_gradients: false };
    let values = |stream: u32, len: usize| -> Vec<f32> {
        let random = Philox::new(seed, Purpose::Augmentation, stream);
        (0..len as u64).map(|i| random.normal(i) as f32).collect()
    };
    let run = |gather: bool| {
        let mut activations = program.activations(&backend).unwrap();
        for (stream, value) in [(1, program.input), (2, program.target.unwrap())] {
            let Value::Real(act) = value else { panic!("real values") };
            let range = activations.range(act);
            backend.upload(&mut activations.values, range.start, &values(stream, range.len())).unwrap();
        }
        let mut arena = model.arena(&backend, seed, plan.slots.len()).unwrap();
        backend.begin_update(&mut arena, &plan, &step).unwrap();
        for (index, op) in program.ops.iter().enumerate() {
            let mut memory = Memory { arena: &mut arena, activations: &mut activations };
            op.run(&backend, &mut memory, &StepContext::default()).unwrap();
            if let Some(tensors) = early.tensors_after(index).filter(|_| gather) {
                backend.gather_norm(&mut arena, &plan, tensors).unwrap();
            }
        }
        let found = if gather {
            backend.finish_update(&mut arena, &plan, &step).unwrap()
        } else {
            backend.update(&mut arena, &plan, &step).unwrap()
        };
        let mut parameters = vec![0.0f32; layout.padded_len()];
        backend.download(&arena.parameters, 0, &mut parameters).unwrap();
        (bits(&parameters), outcome(&found))
    };
    let expected = run(false);
    assert!(f64::from_bits(expected.1.0) > 0.0);
    assert!(run(true) == expected);
}
