//! Every rule under every clip.

use half::bf16;
use regex::Regex;
use warpstep::backend::cuda::Cuda;
use warpstep::optim::{Clip, GroupPattern, NormClip, Rule};

use super::bed::{ADAM, Case, LAMB, LARS, LION, MOMENTUM, MUON, NESTEROV, POLYAK, clips, fresh_seed, options};
use super::{device, devices};

fn same_bits(rules: &[Rule]) {
    let devices = devices();
    let seed = fresh_seed();
    for (at, rule) in rules.iter().enumerate() {
        for (number, clip) in clips().into_iter().enumerate() {
            // The first step skipped, one in the middle, two in a row.
            let broken: &[usize] = [&[][..], &[0], &[1], &[0, 1], &[2]][(at + number) % 5];
            let case = Case::new(&options(*rule, clip), seed + number as u64, broken);
            let expected = case.on_the_cpu();
            for device in &devices {
                let (found, _) = case.on_the_device(&Cuda::<f32>::new(device.clone()));
                let of = format!("{rule:?}, {clip:?}, broken {broken:?}, {:?}", device.options());
                assert_eq!(found.outcomes, expected.outcomes, "{of}");
                assert!(found == expected, "{of}: other bits than the CPU's");
            }
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
fn pieces_of_whole_units_may_begin_anywhere_and_have_the_cpu_s_bits() {
    let seed = fresh_seed();
    // The second piece begins on an odd element, or on an even one that is no multiple of four.
    let tensors: [(&str, &[usize]); 2] = [("odd.weight", &[330, 51]), ("even.weight", &[331, 50])];
    let clip = Clip { value: Some(0.5), norm: NormClip::Adaptive { clipping: 0.1, epsilon: 1e-3 } };
    for rule in [Rule::Sgd, LARS, LAMB] {
        let case = Case::of(&tensors, &options(rule, clip), seed, &[]);
        let starts: Vec<usize> =
            case.plan.pieces(&(0..case.layout.padded_len())).map(|(_, piece)| piece.start % 4).collect();
        assert_eq!(starts, [0, 3, 0, 2]);
        let expected = case.on_the_cpu();
        for device in devices() {
            let (found, _) = case.on_the_device(&Cuda::<f32>::new(device.clone()));
            assert!(found == expected, "{rule:?}, {:?}: other bits than the CPU's", device.options());
            let (found, _) = case.on_the_device(&Cuda::<bf16>::new(device));
            assert!(found.parameters == expected.parameters, "{rule:?}: other bits than the CPU's");
        }
    }
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
