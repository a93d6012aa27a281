//! Options of the update that make no sense name their key; schedules are what their formulas say.

use regex::Regex;
use warpstep::optim::{Clip, Decay, GroupPattern, NormClip, OptimizerOptions, Rule, Schedule, UpdatePlan};
use warpstep::plan::{ParamLayout, ParamSpec};

#[test]
fn a_pattern_that_names_no_parameter_is_an_error_that_says_so() {
    let mut options = OptimizerOptions::new(Rule::Sgd, 0.1);
    let pattern = Regex::new("norrm").unwrap();
    options.groups =
        vec![GroupPattern { pattern, learning_rate_scale: 1.0, weight_decay: None, rule: None, decoupled: None }];
    let layout = ParamLayout::new(&[ParamSpec { name: "norm.weight".into(), shape: vec![3] }]).unwrap();
    let error = UpdatePlan::new(&options, &layout).unwrap_err().to_string();
    assert!(error.contains("norrm") && error.contains("norm.weight"), "{error}");
}

#[test]
fn options_that_make_no_sense_name_their_key() {
    let layout = ParamLayout::new(&[]).unwrap();
    let cases: [(&str, OptimizerOptions); 6] = [
        ("optimizer.learning_rate", OptimizerOptions::new(Rule::Sgd, -1.0)),
        ("optimizer.epsilon", OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.9], epsilon: 0.0 }, 1.0)),
        ("optimizer.betas", OptimizerOptions::new(Rule::Lion { betas: [0.9, 1.0] }, 1.0)),
        ("optimizer.trust", OptimizerOptions::new(Rule::Lars { momentum: 0.9, trust: 0.0 }, 1.0)),
        (
            "optimizer.clip.value",
            OptimizerOptions {
                clip: Clip { value: Some(-1.0), norm: NormClip::Off },
                ..OptimizerOptions::new(Rule::Sgd, 1.0)
            },
        ),
        (
            "optimizer.weight_decay",
            OptimizerOptions { weight_decay: f64::NAN, ..OptimizerOptions::new(Rule::Sgd, 1.0) },
        ),
    ];
    for (key, options) in cases {
        let error = UpdatePlan::new(&options, &layout).unwrap_err().to_string();
        assert!(error.starts_with(key) && error.contains("expected"), "{key}: {error}");
    }
}

#[test]
fn nanogpts_warm_cosine_is_expressible_exactly() {
    let (peak, floor, warmup, total) = (1e-3, 1e-4, 100u64, 2000u64);
    let schedule = Schedule { decay: Decay::Cosine, warmup_steps: warmup, floor };
    for it in 0..=total + 10 {
        let expected = if it < warmup {
            peak * (it + 1) as f64 / (warmup + 1) as f64
        } else if it > total {
            floor
        } else {
            let ratio = (it - warmup) as f64 / (total - warmup) as f64;
            floor + 0.5 * (1.0 + (std::f64::consts::PI * ratio).cos()) * (peak - floor)
        };
        let found = schedule.at(it, total, peak);
        assert!((found - expected).abs() < 1e-18, "step {it}: {found}, expected {expected}");
    }
}

#[test]
fn every_schedule_warms_up_to_the_peak_and_stays_between_floor_and_peak() {
    let decays = [
        Decay::Constant,
        Decay::Polynomial { power: 2.0 },
        Decay::Linear,
        Decay::Cosine,
        Decay::Step { every: 10, milestones: vec![], gamma: 0.1 },
        Decay::Exponential { gamma: 0.9 },
        Decay::Wsd { decay_steps: 20 },
        Decay::InverseSqrt,
    ];
    for decay in decays {
        for warmup_steps in [0, 1, 7] {
            let schedule = Schedule { decay: decay.clone(), warmup_steps, floor: 0.05 };
            schedule.validate(100, 1.0).unwrap();
            let rates: Vec<f64> = (0..=120).map(|t| schedule.at(t, 100, 1.0)).collect();
            let (up, down) = rates.split_at(warmup_steps as usize);
            assert!(
                up.iter().enumerate().all(|(t, r)| *r == (t + 1) as f64 / (warmup_steps + 1) as f64),
                "{schedule:?}"
            );
            assert!((down[0] - 1.0).abs() < 1e-15, "{schedule:?} starts at {}", down[0]);
            assert!(down.windows(2).all(|w| w[1] <= w[0]), "{schedule:?} falls");
            assert!(down.iter().all(|r| (0.05..=1.0).contains(r)), "{schedule:?}");
        }
    }
}
