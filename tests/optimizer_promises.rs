//! What the update promises besides PyTorch's figures: skipped steps, the same bits for any number of threads, what each
//! clip and group does, and which way Polyak's momentum goes.

use std::time::{SystemTime, UNIX_EPOCH};

use regex::Regex;
use warpstep::Error;
use warpstep::backend::cpu;
use warpstep::optim::{
    Clip, GroupPattern, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule, StepOutcome, StepParams, UpdatePlan,
};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::random::{Philox, Purpose};
use warpstep::real::Real;

const PYTORCH: Rule =
    Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.5, nesterov: false, gamma: 1.0 };
const POLYAK: Rule =
    Rule::Momentum { form: MomentumForm::Polyak, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
const ADAM: Rule = Rule::Adam { betas: [0.9, 0.999], epsilon: 1e-8 };
const LAMB: Rule = Rule::Lamb { betas: [0.9, 0.999], epsilon: 1e-6 };
const MUON: Rule = Rule::Muon { momentum: 0.95, nesterov: true, steps: 5, scale: MuonScale::Original };

fn rules() -> [Rule; 9] {
    let nesterov =
        Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: true, gamma: 1.0 };
    let lars = Rule::Lars { momentum: 0.9, trust: 0.01 };
    [Rule::Sgd, PYTORCH, nesterov, POLYAK, ADAM, Rule::Lion { betas: [0.9, 0.99] }, LAMB, lars, MUON]
}

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

fn fresh_seed() -> u64 {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    seed
}

/// Arenas filled with normal values, and the plan of their update.
#[derive(Clone, Debug, PartialEq)]
struct Arenas<R> {
    layout: ParamLayout,
    plan: UpdatePlan,
    theta: Vec<R>,
    gradients: Vec<R>,
    slots: Vec<Vec<R>>,
}

impl<R: Real> Arenas<R> {
    fn new(options: &OptimizerOptions, shapes: &[(&str, &[usize])], seed: u64) -> Self {
        let specs: Vec<ParamSpec> =
            shapes.iter().map(|&(name, shape)| ParamSpec { name: name.into(), shape: shape.into() }).collect();
        let layout = ParamLayout::new(&specs).unwrap();
        let plan = UpdatePlan::new(options, &layout).unwrap();
        let zeros = vec![R::zero(); layout.padded_len()];
        let slots = vec![zeros.clone(); plan.slots.len()];
        let mut arenas = Arenas { layout, plan, theta: zeros.clone(), gradients: zeros, slots };
        let random = Philox::new(seed, Purpose::Initialization, 0);
        for entry in arenas.layout.entries() {
            for i in entry.range() {
                arenas.theta[i] = R::from_f32(random.normal(i as u64) as f32);
            }
        }
        arenas.draw_gradients(seed, 1);
        arenas
    }

    /// New gradients, values of f32 whatever `R` is.
    fn draw_gradients(&mut self, seed: u64, stream: u32) {
        let random = Philox::new(seed, Purpose::Initialization, stream);
        for entry in self.layout.entries() {
            for i in entry.range() {
                self.gradients[i] = R::from_f32(random.normal(i as u64) as f32);
            }
        }
    }

    fn update(&mut self, step: &StepParams) -> StepOutcome {
        self.try_update(step).unwrap()
    }

    fn try_update(&mut self, step: &StepParams) -> Result<StepOutcome, Error> {
        let mut slots: Vec<&mut [R]> = self.slots.iter_mut().map(Vec::as_mut_slice).collect();
        cpu::update(&mut self.theta, &mut self.gradients, &mut slots, &self.plan, step)
    }

    fn of(&self, values: &[R], name: &str) -> Vec<R> {
        values[self.layout.get(name).unwrap().range()].to_vec()
    }

    fn theta_of(&self, name: &str) -> Vec<R> {
        self.of(&self.theta, name)
    }
}

fn options(rule: Rule, clip: Clip) -> OptimizerOptions {
    let mut options = OptimizerOptions::new(rule, 0.01);
    options.clip = clip;
    options.weight_decay = 0.1;
    options
}

fn step(step: u64) -> StepParams {
    StepParams { learning_rate: 0.01, step, divisor: 1.0, zero_gradients: false }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Tensors around every edge: of a block of the arena, of a vector, of a piece of the update.
const EDGES: [(&str, &[usize]); 9] = [
    ("none", &[0, 5]),
    ("one", &[1]),
    ("a.weight", &[127]),
    ("b.weight", &[2, 64]),
    ("c.weight", &[3, 43]),
    ("scalar", &[]),
    ("d.weight", &[301, 257]),
    ("piece", &[(1 << 14) - 1]),
    ("wide.weight", &[2, (1 << 14) + 1]),
];

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let seed = fresh_seed();
    for rule in rules() {
        for clip in clips() {
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut arenas = Arenas::<f32>::new(&options(rule, clip), &EDGES, seed);
                    let outcomes: Vec<StepOutcome> = (1..3)
                        .map(|t| {
                            arenas.draw_gradients(seed, t as u32);
                            arenas.update(&step(t))
                        })
                        .collect();
                    let kept: Vec<Vec<u32>> = arenas.slots.iter().map(|s| bits(s)).collect();
                    (bits(&arenas.theta), kept, outcomes.iter().map(|o| o.grad_norm.to_bits()).collect::<Vec<u64>>())
                })
            };
            let one = run(1);
            for threads in [2, 3, 8] {
                assert!(run(threads) == one, "{rule:?}, {clip:?}: {threads} threads differ from 1, seed {seed}");
            }
        }
    }
}

#[test]
fn padding_stays_zero_and_gradients_stay_as_they_were_or_become_zero() {
    let seed = fresh_seed();
    for rule in rules() {
        for clip in clips() {
            for zero_gradients in [false, true] {
                let mut arenas = Arenas::<f32>::new(&options(rule, clip), &EDGES, seed);
                let gradients = arenas.gradients.clone();
                (1..4).for_each(|t| {
                    arenas.gradients.copy_from_slice(&gradients);
                    arenas.update(&StepParams { zero_gradients, ..step(t) });
                });
                let wanted = if zero_gradients { vec![0.0; gradients.len()] } else { gradients };
                assert!(arenas.gradients == wanted, "{rule:?}, {clip:?}: gradients");
                let mut padding = vec![true; arenas.theta.len()];
                arenas.layout.entries().iter().for_each(|entry| padding[entry.range()].fill(false));
                for values in arenas.slots.iter().chain([&arenas.theta]) {
                    assert!(values.iter().all(|v| v.is_finite()), "{rule:?}, {clip:?}");
                    let touched = values.iter().zip(&padding).position(|(v, &padding)| padding && v.to_bits() != 0);
                    assert_eq!(touched, None, "{rule:?}, {clip:?}: padding");
                }
            }
        }
    }
}

#[test]
fn a_step_whose_gradients_are_not_finite_changes_nothing_to_the_bit() {
    let seed = fresh_seed();
    for rule in rules() {
        for clip in clips() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut arenas = Arenas::<f32>::new(&options(rule, clip), &EDGES, seed);
                arenas.update(&step(1));
                let at = arenas.layout.get("d.weight").unwrap().range().end - 1;
                arenas.gradients[at] = bad;
                let before = arenas.clone();
                let outcome = arenas.update(&step(2));
                assert!(outcome.skipped && !outcome.grad_norm.is_finite(), "{rule:?}, {clip:?}, {bad}: {outcome:?}");
                assert_eq!(bits(&arenas.theta), bits(&before.theta));
                arenas.slots.iter().zip(&before.slots).for_each(|(a, b)| assert_eq!(bits(a), bits(b)));
                assert_eq!(bits(&arenas.gradients), bits(&before.gradients));
                arenas.update(&StepParams { zero_gradients: true, ..step(2) });
                assert!(
                    arenas.gradients.iter().all(|&g| g == 0.0),
                    "gradients of a skipped step are zeroed where asked"
                );
                assert_eq!(bits(&arenas.theta), bits(&before.theta));
            }
        }
    }
}

#[test]
fn the_step_after_a_skipped_first_one_is_still_the_first() {
    let seed = fresh_seed();
    for rule in [PYTORCH, ADAM] {
        let clean = Arenas::<f32>::new(&options(rule, Clip::default()), &EDGES, seed);
        let (mut straight, mut skipping) = (clean.clone(), clean);
        let gradients = skipping.gradients.clone();
        skipping.gradients[0] = f32::NAN;
        assert!(skipping.update(&step(1)).skipped);
        skipping.gradients = gradients;
        skipping.update(&step(1));
        straight.update(&step(1));
        assert_eq!(bits(&skipping.theta), bits(&straight.theta));
        if rule == PYTORCH {
            // v <- g, not v <- (1 - dampening) g; g has the coupled decay in it, so compare where theta was 0.
            let mut zero = Arenas::<f32>::new(&options(rule, Clip::default()), &EDGES, seed);
            zero.theta.fill(0.0);
            zero.update(&step(1));
            assert_eq!(zero.slots[0], zero.gradients);
        }
    }
}

#[test]
fn large_gradients_whose_squares_overflow_f32_are_clipped_not_skipped() {
    let clip = Clip { value: None, norm: NormClip::Global { max_norm: 1.0 } };
    let mut arenas = Arenas::<f32>::new(&options(Rule::Sgd, clip), &[("w", &[3])], 1);
    arenas.gradients[..3].copy_from_slice(&[3e30, 0.0, -4e30]);
    let outcome = arenas.update(&step(1));
    assert!(!outcome.skipped);
    assert!((outcome.grad_norm / 5e30 - 1.0).abs() < 1e-6, "{outcome:?}");
    assert!(arenas.theta.iter().all(|t| t.is_finite()));
}

#[test]
fn a_learning_rate_of_zero_moves_nothing() {
    for rule in rules() {
        let mut arenas = Arenas::<f32>::new(&options(rule, Clip::default()), &EDGES, 3);
        let before = arenas.theta.clone();
        (1..3).for_each(|t| {
            arenas.update(&StepParams { learning_rate: 0.0, ..step(t) });
        });
        assert!(arenas.theta == before, "{rule:?}");
    }
}

#[test]
fn polyaks_momentum_goes_down_and_its_printed_sign_would_climb() {
    // f(theta) = theta^2 / 2, so g = theta.
    let options = OptimizerOptions::new(POLYAK, 0.1);
    let mut ours = Arenas::<f64>::new(&options, &[("theta", &[1])], 1);
    ours.theta[0] = 1.0;
    let (mut printed, mut v) = (1.0f64, 0.0);
    for t in 1..=100 {
        ours.gradients[0] = ours.theta[0];
        ours.update(&StepParams { learning_rate: 0.1, ..step(t) });
        v = 0.9 * v - 0.1 * printed;
        printed -= v; // as printed: theta - gamma v
    }
    assert!(ours.theta[0].abs() < 0.05, "ours ends at {}", ours.theta[0]);
    assert!(printed > 1e6, "the printed sign ends at {printed}");
}

#[test]
fn both_forms_of_momentum_agree_at_a_constant_learning_rate() {
    let seed = fresh_seed();
    let undamped =
        Rule::Momentum { form: MomentumForm::Pytorch, momentum: 0.9, dampening: 0.0, nesterov: false, gamma: 1.0 };
    let [mut pytorch, mut polyak] =
        [undamped, POLYAK].map(|r| Arenas::<f64>::new(&options(r, Clip::default()), &EDGES, seed));
    for t in 1..20 {
        pytorch.draw_gradients(seed, t as u32);
        polyak.draw_gradients(seed, t as u32);
        pytorch.update(&step(t));
        polyak.update(&step(t));
    }
    let worst = pytorch.theta.iter().zip(&polyak.theta).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-13, "{worst}");
}

#[test]
fn each_clip_does_what_its_definition_says() {
    let seed = fresh_seed();
    let shapes: [(&str, &[usize]); 3] = [("a.weight", &[4, 50]), ("a.bias", &[4]), ("b.weight", &[70, 3])];
    let norm = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
    for clip in clips() {
        let mut options = OptimizerOptions::new(Rule::Sgd, 1.0);
        options.clip = clip;
        let mut arenas = Arenas::<f64>::new(&options, &shapes, seed);
        let before = arenas.clone();
        let outcome = arenas.update(&StepParams { learning_rate: 1.0, divisor: 2.0, ..step(1) });
        let valued: Vec<f64> = before
            .gradients
            .iter()
            .map(|g| (g / 2.0).clamp(-clip.value.unwrap_or(9e9), clip.value.unwrap_or(9e9)))
            .collect();
        let n = norm(&valued);
        assert!((outcome.grad_norm / n - 1.0).abs() < 1e-12, "{clip:?}: the norm after the value clip");
        for entry in arenas.layout.entries() {
            let unit = match clip.norm {
                NormClip::Adaptive { .. } if entry.shape.len() >= 2 => entry.len / entry.shape[0],
                _ => entry.len,
            };
            for start in (entry.offset..entry.offset + entry.len).step_by(unit) {
                let range = start..start + unit;
                let (g, theta) = (&valued[range.clone()], &before.theta[range.clone()]);
                let coefficient = match clip.norm {
                    NormClip::Off => 1.0,
                    NormClip::Global { max_norm } => (max_norm / (n + 1e-6)).min(1.0),
                    NormClip::Tensor { max_norm } => (max_norm / (norm(g) + 1e-6)).min(1.0),
                    NormClip::Adaptive { clipping, epsilon } => {
                        (clipping * norm(theta).max(epsilon) / norm(g).max(1e-6)).min(1.0)
                    }
                };
                for (i, g) in range.zip(g) {
                    let applied = before.theta[i] - arenas.theta[i];
                    assert!((applied - coefficient * g).abs() < 1e-12, "{clip:?}, {}: {applied} of {g}", entry.name);
                }
                assert!(outcome.clip_coefficient <= coefficient * (1.0 + 1e-12), "{clip:?}");
            }
        }
        assert_eq!(outcome.clip_coefficient < 1.0, clip.norm != NormClip::Off, "{clip:?}: {outcome:?}");
    }
}

#[test]
fn the_divisor_makes_a_mean_of_accumulated_gradients() {
    let mut one = Arenas::<f32>::new(&options(ADAM, Clip::default()), &EDGES, 5);
    let mut four = one.clone();
    four.gradients.iter_mut().for_each(|g| *g *= 4.0);
    assert_eq!(four.update(&StepParams { divisor: 4.0, ..step(1) }), one.update(&step(1)));
    assert_eq!(bits(&four.theta), bits(&one.theta));
}

fn group(pattern: &str) -> GroupPattern {
    GroupPattern {
        pattern: Regex::new(pattern).unwrap(),
        learning_rate_scale: 1.0,
        weight_decay: None,
        rule: None,
        decoupled: None,
    }
}

#[test]
fn groups_set_learning_rate_decay_and_rule_by_name_and_the_first_that_fits_counts() {
    let shapes: [(&str, &[usize]); 3] = [("body.weight", &[8, 9]), ("body.bias", &[8]), ("frozen.weight", &[4, 4])];
    let mut options = options(PYTORCH, Clip::default());
    options.decay_matrices_only = true;
    options.groups = vec![
        GroupPattern { learning_rate_scale: 0.0, ..group("^frozen") },
        GroupPattern { rule: Some(Rule::Sgd), ..group(r"weight$") },
    ];
    let mut arenas = Arenas::<f64>::new(&options, &shapes, 8);
    let before = arenas.clone();
    arenas.update(&step(1));
    assert_eq!(arenas.theta_of("frozen.weight"), before.theta_of("frozen.weight"));
    let moved = |name: &str, decay: f64| {
        let (old, g) = (before.theta_of(name), before.of(&before.gradients, name));
        let wanted = old.iter().zip(g).map(|(t, g)| t - 0.01 * (g + decay * t));
        arenas.theta_of(name).iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    assert!(moved("body.weight", 0.1) < 1e-15, "a matrix decays");
    assert!(moved("body.bias", 0.0) < 1e-15, "a bias does not");
    assert!(arenas.of(&arenas.slots[0], "body.weight").iter().all(|&v| v == 0.0), "SGD keeps nothing");
    assert!(arenas.of(&arenas.slots[0], "body.bias").iter().any(|&v| v != 0.0), "momentum does");
}

#[test]
fn muon_leaves_vectors_tables_and_the_output_layer_to_adamw() {
    let shapes: [(&str, &[usize]); 4] =
        [("wte.weight", &[30, 8]), ("h.0.weight", &[8, 8]), ("h.0.bias", &[8]), ("lm_head.weight", &[30, 8])];
    let adamw = Rule::Adam { betas: [0.9, 0.95], epsilon: 1e-8 };
    let mut other = options(adamw, Clip::default());
    other.decoupled = true;
    let mut muon = Arenas::<f32>::new(&options(MUON, Clip::default()), &shapes, 2);
    let mut adamw = Arenas::<f32>::new(&other, &shapes, 2);
    muon.update(&step(1));
    adamw.update(&step(1));
    for name in ["wte.weight", "h.0.bias", "lm_head.weight"] {
        assert_eq!(bits(&muon.theta_of(name)), bits(&adamw.theta_of(name)), "{name}");
    }
    assert_ne!(bits(&muon.theta_of("h.0.weight")), bits(&adamw.theta_of("h.0.weight")));

    let mut asked = options(MUON, Clip::default());
    asked.groups = vec![GroupPattern { rule: Some(MUON), ..group("^wte") }];
    let mut asked = Arenas::<f32>::new(&asked, &shapes, 2);
    asked.update(&step(1));
    assert_ne!(bits(&asked.theta_of("wte.weight")), bits(&adamw.theta_of("wte.weight")), "a group may ask for Muon");
}

#[test]
fn f32_errs_at_most_twice_as_much_as_plain_f32_arithmetic() {
    let seed = fresh_seed();
    let plain_momentum = |t: f32, g: f32, s: &mut [f32; 2], step: u64| {
        let g = g + 0.1 * t;
        s[0] = if step == 1 { g } else { 0.9 * s[0] + 0.5 * g };
        t - 0.01 * s[0]
    };
    let plain_adam = |t: f32, g: f32, s: &mut [f32; 2], step: u64| {
        *s = [0.9 * s[0] + 0.1 * g, 0.999 * s[1] + 0.001 * g * g];
        let (b1, b2) = (1.0 - 0.9f32.powi(step as i32), 1.0 - 0.999f32.powi(step as i32));
        t * (1.0 - 0.01 * 0.1) - 0.01 * (s[0] / b1) / ((s[1] / b2).sqrt() + 1e-8)
    };
    type Plain = fn(f32, f32, &mut [f32; 2], u64) -> f32;
    for (rule, plain) in [(PYTORCH, plain_momentum as Plain), (ADAM, plain_adam as Plain)] {
        let options = OptimizerOptions { decoupled: rule == ADAM, ..options(rule, Clip::default()) };
        let mut exact = Arenas::<f64>::new(&options, &EDGES, seed);
        let mut ours = Arenas::<f32>::new(&options, &EDGES, seed);
        let mut theirs = ours.theta.clone();
        let mut slots = vec![[0.0f32; 2]; theirs.len()];
        for t in 1..=10 {
            exact.draw_gradients(seed, t as u32);
            ours.draw_gradients(seed, t as u32);
            exact.update(&step(t));
            ours.update(&step(t));
            for ((theta, &g), slot) in theirs.iter_mut().zip(&ours.gradients).zip(&mut slots) {
                *theta = plain(*theta, g, slot, t);
            }
        }
        let error = |found: &[f32]| {
            let squares = found.iter().zip(&exact.theta).map(|(&f, e)| (f64::from(f) - e).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let (ours, theirs) = (error(&ours.theta), error(&theirs));
        println!("{rule:?}: error {ours:.2e}, of plain arithmetic {theirs:.2e}");
        assert!(ours > 0.0 && ours <= 2.0 * theirs, "{rule:?}: {ours:e} against {theirs:e}, seed {seed}");
    }
}

#[test]
fn every_rule_in_f32_follows_itself_in_f64() {
    let seed = fresh_seed();
    for rule in rules() {
        for clip in clips() {
            // Decoupled, since gradient and coupled decay can cancel, and Adam divides by what is left.
            let options = OptimizerOptions { decoupled: true, ..options(rule, clip) };
            let mut exact = Arenas::<f64>::new(&options, &EDGES, seed);
            let mut found = Arenas::<f32>::new(&options, &EDGES, seed);
            let (a, b) = (exact.update(&step(1)), found.update(&step(1)));
            assert!((a.grad_norm / b.grad_norm - 1.0).abs() < 1e-6);
            let worst =
                exact.theta.iter().zip(&found.theta).map(|(e, &f)| (e - f64::from(f)).abs()).fold(0.0, f64::max);
            assert!(worst < 2e-5 && worst.is_finite(), "{rule:?}, {clip:?}: {worst:e}, seed {seed}");
        }
    }
}

#[test]
fn the_average_of_weights_follows_its_definition() {
    let weights: Vec<f64> = (0..300).map(f64::from).collect();
    let mut average = vec![1.0f64; 300];
    cpu::average(&mut average, &weights, 0.9).unwrap();
    for (a, w) in average.iter().zip(&weights) {
        assert!((a - (0.9 + 0.1 * w)).abs() < 1e-13);
    }
    assert!(cpu::average(&mut average, &weights[1..], 0.9).is_err());
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let mut arenas = Arenas::<f32>::new(&options(ADAM, Clip::default()), &[("w", &[130])], 1);
    let before = arenas.clone();
    for wrong in [f64::NAN, f64::INFINITY] {
        assert!(arenas.try_update(&StepParams { learning_rate: wrong, ..step(1) }).is_err());
        assert!(arenas.try_update(&StepParams { divisor: wrong, ..step(1) }).is_err());
    }
    assert!(arenas.try_update(&StepParams { divisor: 0.0, ..step(1) }).is_err());
    assert!(arenas.try_update(&step(0)).is_err());
    assert!(arenas == before);
    arenas.slots[1].pop();
    assert!(arenas.try_update(&step(1)).is_err());
    arenas.slots.pop();
    let error = arenas.try_update(&step(1)).unwrap_err().to_string();
    assert!(error.contains("2 slots of 256"), "{error}");
}
