//! 100 steps of every rule with every clip and three schedules end where PyTorch ends, and every schedule that PyTorch has
//! gives PyTorch's learning rates. The figures are in tests/fixtures/optimizers; scripts/fixtures/optimizers.py makes them.

use regex::Regex;
use serde_json::Value;
use warpstep::backend::cpu;
use warpstep::optim::{
    Clip, Decay, GroupPattern, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule, Schedule, StepParams,
    UpdatePlan,
};
use warpstep::plan::{ParamLayout, ParamSpec};
use warpstep::real::Real;

/// The relative error that the project promises in f32.
const F32_TOLERANCE: f64 = 1e-5;
/// In f64 only the order of operations differs; 100 steps amplify it.
const F64_TOLERANCE: f64 = 1e-12;

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/optimizers/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn steps_at(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

fn options(rule: &Value, clip: &Value) -> OptimizerOptions {
    let kind = rule["rule"].as_str().unwrap();
    let betas = || <[f64; 2]>::try_from(numbers(&rule["betas"])).unwrap();
    let plain = |form, dampening, gamma| Rule::Momentum {
        form,
        momentum: number(rule, "momentum"),
        dampening,
        nesterov: rule["nesterov"].as_bool().unwrap_or(false),
        gamma,
    };
    let chosen = match kind {
        "sgd" => Rule::Sgd,
        "momentum" => plain(MomentumForm::Pytorch, number(rule, "dampening"), 1.0),
        "polyak" => plain(MomentumForm::Polyak, 0.0, number(rule, "gamma")),
        "adam" | "adamw" => Rule::Adam { betas: betas(), epsilon: number(rule, "epsilon") },
        "lion" => Rule::Lion { betas: betas() },
        "lamb" => Rule::Lamb { betas: betas(), epsilon: number(rule, "epsilon") },
        "lars" => Rule::Lars { momentum: number(rule, "momentum"), trust: number(rule, "trust") },
        "muon" => Rule::Muon {
            momentum: number(rule, "momentum"),
            nesterov: rule["nesterov"].as_bool().unwrap(),
            steps: 5,
            scale: match rule["scale"].as_str().unwrap() {
                "original" => MuonScale::Original,
                _ => MuonScale::MatchRmsAdamw,
            },
        },
        other => panic!("no rule {other}"),
    };
    let norm = if let Some(max_norm) = clip["global_norm"].as_f64() {
        NormClip::Global { max_norm }
    } else if let Some(max_norm) = clip["tensor_norm"].as_f64() {
        NormClip::Tensor { max_norm }
    } else if let Some(clipping) = clip["adaptive"].as_f64() {
        NormClip::Adaptive { clipping, epsilon: number(clip, "adaptive_epsilon") }
    } else {
        NormClip::Off
    };
    let mut options = OptimizerOptions::new(chosen, number(rule, "learning_rate"));
    options.weight_decay = number(rule, "weight_decay");
    options.decoupled |= kind == "adamw";
    options.clip = Clip { value: clip["value"].as_f64(), norm };
    options
}

fn schedule(value: &Value) -> Schedule {
    let gamma = || number(value, "gamma");
    let decay = match value["kind"].as_str().unwrap() {
        "constant" => Decay::Constant,
        "linear" => Decay::Linear,
        "cosine" => Decay::Cosine,
        "polynomial" => Decay::Polynomial { power: number(value, "power") },
        "step" => {
            let milestones =
                value["milestones"].as_array().map_or(vec![], |m| m.iter().filter_map(Value::as_u64).collect());
            Decay::Step { every: steps_at(value, "every_steps"), milestones, gamma: gamma() }
        }
        "exponential" => Decay::Exponential { gamma: gamma() },
        "wsd" => Decay::Wsd { decay_steps: steps_at(value, "decay_steps") },
        "one_cycle" => Decay::OneCycle {
            rise: number(value, "rise"),
            initial_divisor: number(value, "initial_divisor"),
            final_divisor: number(value, "final_divisor"),
        },
        "inverse_sqrt" => Decay::InverseSqrt,
        other => panic!("no schedule {other}"),
    };
    let floor = value["floor"].as_f64().unwrap_or(0.0);
    Schedule { decay, warmup_steps: steps_at(value, "warmup_steps"), floor }
}

/// `y = W2 tanh(W1 x + b1) + b2` under the mean squared error, on fixed data.
struct Network<R> {
    layout: ParamLayout,
    initial: Vec<R>,
    x: Vec<R>,
    y: Vec<R>,
}

impl<R: Real> Network<R> {
    fn new(value: &Value) -> Self {
        let parameters = value["parameters"].as_array().unwrap();
        let specs: Vec<ParamSpec> = parameters
            .iter()
            .map(|p| ParamSpec {
                name: p["name"].as_str().unwrap().into(),
                shape: numbers(&p["shape"]).iter().map(|&d| d as usize).collect(),
            })
            .collect();
        let layout = ParamLayout::new(&specs).unwrap();
        let mut initial = vec![R::zero(); layout.padded_len()];
        for (entry, p) in layout.entries().iter().zip(parameters) {
            initial[entry.range()].copy_from_slice(&real(&numbers(&p["values"])));
        }
        Network { layout, initial, x: real(&numbers(&value["x"])), y: real(&numbers(&value["y"])) }
    }

    /// `gradients =` those of the loss at `theta`.
    fn backward(&self, theta: &[R], gradients: &mut [R]) {
        let [w1, b1, w2, b2] = [0, 1, 2, 3].map(|i| self.layout.entries()[i].range());
        let (hidden, inputs, outputs) = (b1.len(), w1.len() / b1.len(), b2.len());
        gradients.fill(R::zero());
        let scale = R::from_f64(2.0 / self.y.len() as f64);
        for (x, y) in self.x.chunks(inputs).zip(self.y.chunks(outputs)) {
            let h: Vec<R> = (0..hidden)
                .map(|j| {
                    let row = &theta[w1.start + j * inputs..][..inputs];
                    let sum: R = row.iter().zip(x).map(|(&w, &x)| w * x).sum();
                    (sum + theta[b1.start + j]).tanh()
                })
                .collect();
            let mut dh = vec![R::zero(); hidden];
            for k in 0..outputs {
                let row = w2.start + k * hidden;
                let sum: R = theta[row..row + hidden].iter().zip(&h).map(|(&w, &h)| w * h).sum();
                let dy = scale * (sum + theta[b2.start + k] - y[k]);
                gradients[b2.start + k] += dy;
                for j in 0..hidden {
                    gradients[row + j] += dy * h[j];
                    dh[j] += dy * theta[row + j];
                }
            }
            for j in 0..hidden {
                let da = dh[j] * (R::one() - h[j] * h[j]);
                gradients[b1.start + j] += da;
                for i in 0..inputs {
                    gradients[w1.start + j * inputs + i] += da * x[i];
                }
            }
        }
    }
}

fn real<R: Real>(values: &[f64]) -> Vec<R> {
    values.iter().map(|&v| R::from_f64(v)).collect()
}

/// The largest difference over the tensor's largest value, the worst of all tensors.
fn relative_error<R: Real>(layout: &ParamLayout, found: &[R], expected: &[Vec<f64>]) -> f64 {
    let error = |(entry, expected): (&warpstep::plan::ParamEntry, &Vec<f64>)| {
        let size = expected.iter().fold(0.0f64, |a, x| a.max(x.abs()));
        let pairs = found[entry.range()].iter().zip(expected);
        pairs.map(|(f, e)| (f.f64() - e).abs()).fold(0.0, |a: f64, d| if d.is_nan() { d } else { a.max(d) }) / size
    };
    let errors: Vec<f64> = layout.entries().iter().zip(expected).map(error).collect();
    errors.into_iter().fold(0.0, |a: f64, e| if e.is_nan() { e } else { a.max(e) })
}

fn train<R: Real>(network: &Network<R>, options: &OptimizerOptions, schedule: &Schedule, steps: u64) -> Vec<R> {
    let plan = UpdatePlan::new(options, &network.layout).unwrap();
    let mut theta = network.initial.clone();
    let mut gradients = vec![R::zero(); theta.len()];
    let mut slots = vec![vec![R::zero(); theta.len()]; plan.slots.len()];
    for t in 0..steps {
        network.backward(&theta, &mut gradients);
        let learning_rate = schedule.at(t, steps, options.learning_rate);
        let step = StepParams { learning_rate, step: t + 1, divisor: 1.0, zero_gradients: false };
        let mut slots: Vec<&mut [R]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
        let outcome = cpu::update(&mut theta, &mut gradients, &mut slots, &plan, &step).unwrap();
        assert!(!outcome.skipped);
    }
    theta
}

fn every_case_ends_where_pytorch_ends<R: Real>(tolerance: f64) {
    let figures = fixture("updates.json");
    let network = Network::<R>::new(&figures["network"]);
    let steps = figures["steps"].as_u64().unwrap();
    let mut worst: Vec<(f64, String)> = Vec::new();
    for case in figures["cases"].as_array().unwrap() {
        let name = |key: &str| case[key].as_str().unwrap();
        let (rule, clip, plan) = (name("rule"), name("clip"), name("schedule"));
        let options = options(&figures["rules"][rule], &figures["clips"][clip]);
        let schedule = schedule(&figures["schedules"][plan]);
        let theta = train(&network, &options, &schedule, steps);
        let expected: Vec<Vec<f64>> = case["final"].as_array().unwrap().iter().map(numbers).collect();
        worst.push((relative_error(&network.layout, &theta, &expected), format!("{rule}, {clip}, {plan}")));
    }
    assert_eq!(worst.len(), 12 * 6 * 3, "cases in updates.json");
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    let torch = figures["torch"].as_str().unwrap();
    println!("{}, against torch {torch}: {} cases, the worst:", R::NAME, worst.len());
    worst.iter().take(8).for_each(|(error, case)| println!("  {error:.1e}  {case}"));
    let beyond: Vec<&(f64, String)> = worst.iter().filter(|(error, _)| error.is_nan() || *error > tolerance).collect();
    assert!(beyond.is_empty(), "{} cases beyond {tolerance:.0e}: {beyond:?}", beyond.len());
}

#[test]
fn a_hundred_steps_in_f64_end_where_pytorch_ends() {
    every_case_ends_where_pytorch_ends::<f64>(F64_TOLERANCE);
}

#[test]
fn a_hundred_steps_in_f32_end_within_1e_5_of_pytorch() {
    every_case_ends_where_pytorch_ends::<f32>(F32_TOLERANCE);
}

#[test]
fn schedules_give_the_learning_rates_of_pytorch() {
    let figures = fixture("schedules.json");
    let table = figures["schedules"].as_array().unwrap();
    assert!(table.len() >= 12, "{} schedules", table.len());
    for case in table {
        let (peak, total) = (number(case, "peak"), case["total"].as_u64().unwrap());
        let schedule = schedule(&case["schedule"]);
        schedule.validate(total, peak).unwrap();
        for (step, expected) in numbers(&case["rates"]).into_iter().enumerate() {
            let found = schedule.at(step as u64, total, peak);
            let error = (found - expected).abs() / peak;
            assert!(error <= 1e-12, "{} at step {step}: {found}, PyTorch {expected}", case["name"]);
        }
    }
}

#[test]
fn a_group_by_pattern_takes_the_rule_that_pytorch_ends_with_for_its_tensors() {
    // A network whose every tensor is in a group of its own rule is that rule's network.
    let figures = fixture("updates.json");
    let network = Network::<f64>::new(&figures["network"]);
    let clip = &figures["clips"]["global_norm"];
    let adamw = options(&figures["rules"]["adamw"], clip);
    let mut grouped = options(&figures["rules"]["momentum"], clip);
    grouped.learning_rate = 1.0;
    grouped.groups = vec![GroupPattern {
        pattern: Regex::new(r"^(first|second)\.").unwrap(),
        learning_rate_scale: adamw.learning_rate,
        weight_decay: Some(adamw.weight_decay),
        rule: Some(adamw.rule),
        decoupled: Some(true),
    }];
    let case = figures["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["rule"] == "adamw" && c["clip"] == "global_norm" && c["schedule"] == "constant");
    let expected: Vec<Vec<f64>> = case.unwrap()["final"].as_array().unwrap().iter().map(numbers).collect();
    let theta = train(&network, &grouped, &Schedule::default(), figures["steps"].as_u64().unwrap());
    let error = relative_error(&network.layout, &theta, &expected);
    assert!(error <= F64_TOLERANCE, "{error:.1e}");
}
