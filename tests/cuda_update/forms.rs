//! One launch or several, and what both have in common.

use std::sync::Arc;

use regex::Regex;
use warpstep::backend::cuda::{Cuda, Device};
use warpstep::backend::ops::Update;
use warpstep::optim::{Clip, GroupPattern, NormClip, Rule};

use super::bed::{ADAM, Case, LAMB, LARS, LION, MOMENTUM, RULES, SMALL, clips, fresh_seed, options};
use super::devices;

#[test]
fn a_first_step_skipped_leaves_slots_as_if_it_had_never_happened() {
    let seed = fresh_seed();
    for device in devices() {
        for (at, rule) in RULES.into_iter().enumerate() {
            let clip = clips()[at % clips().len()];
            let mut case = Case::of(&SMALL, &options(rule, clip), seed, &[0, 1]);
            let (broken, _) = case.on_the_device(&Cuda::<f32>::new(device.clone()));
            assert_eq!(broken.outcomes.iter().map(|found| found.3).collect::<Vec<_>>(), [true, true, false, false]);
            case.gradients.drain(..2);
            let (whole, _) = case.on_the_device(&Cuda::<f32>::new(device.clone()));
            assert!(broken.parameters == whole.parameters && broken.slots == whole.slots, "{rule:?} under {clip:?}");
            assert_eq!(broken.outcomes[2..], whole.outcomes[..], "{rule:?} under {clip:?}");
        }
    }
}

#[test]
fn groups_of_several_rules_have_the_cpu_s_bits_in_one_launch_too() {
    let seed = fresh_seed();
    let mut options = options(ADAM, Clip { value: Some(0.5), norm: NormClip::Tensor { max_norm: 0.5 } });
    for (pattern, rule) in [("^[ab]", MOMENTUM), ("^c", LION), ("^d", Rule::Sgd)] {
        options.groups.push(GroupPattern {
            pattern: Regex::new(pattern).unwrap(),
            learning_rate_scale: 0.5,
            weight_decay: Some(0.01),
            rule: Some(rule),
            decoupled: None,
        });
    }
    let case = Case::new(&options, seed, &[0]);
    let expected = case.on_the_cpu();
    for device in devices() {
        let (found, _) = case.on_the_device(&Cuda::<f32>::new(device.clone()));
        assert!(found == expected, "{:?}", device.options());
    }
}

/// More pieces than one, and more blocks of the arena than the emulated device has multiprocessors.
#[test]
fn several_pieces_a_tensor_have_the_cpu_s_bits() {
    let seed = fresh_seed();
    let tensors: [(&str, &[usize]); 2] = [("long", &[(1 << 15) + 77]), ("short.weight", &[3, 700])];
    for (at, rule) in [MOMENTUM, LARS, LAMB].into_iter().enumerate() {
        let mut case = Case::of(&tensors, &options(rule, clips()[[5, 4, 2][at]]), seed, &[]);
        case.gradients.truncate(1);
        let expected = case.on_the_cpu();
        for device in devices() {
            let (found, _) = case.on_the_device(&Cuda::<f32>::new(device.clone()));
            assert!(found == expected, "{rule:?}, {:?}", device.options());
        }
    }
}

/// How many kernels an update is.
fn kernels(case: &Case, device: &Arc<Device>) -> Vec<String> {
    let backend = Cuda::<f32>::new(device.clone());
    let mut arena = case.arena(&backend);
    device.start_timing();
    backend.update(&mut arena, &case.plan, &case.step(0, 0)).unwrap();
    device.finish_timing().unwrap().into_iter().map(|time| time.name).collect()
}

#[test]
fn small_arenas_are_updated_in_one_launch_and_others_in_three() {
    let [several, one] = &devices()[..] else { return };
    let case = Case::of(&SMALL, &options(MOMENTUM, clips()[2]), 1, &[]);
    let three = ["norm_pieces_f32", "norm_finish", "update_momentum_f32_f32_f32"];
    assert_eq!(kernels(&case, several), three);
    assert_eq!(kernels(&case, one), ["persistent_momentum_f32_f32_f32"]);
    // A rule or a clip that needs further norms, or too many tensors, is not for one launch.
    for (rule, clip) in [(LARS, clips()[2]), (MOMENTUM, clips()[4])] {
        assert!(kernels(&Case::of(&SMALL, &options(rule, clip), 1, &[]), one).len() > 3);
    }
    let names: Vec<String> = (0..513).map(|i| format!("t{i}")).collect();
    let tensors: Vec<(&str, &[usize])> = names.iter().map(|name| (name.as_str(), &[2][..])).collect();
    assert_eq!(kernels(&Case::of(&tensors, &options(MOMENTUM, clips()[2]), 1, &[]), one), three);
}
