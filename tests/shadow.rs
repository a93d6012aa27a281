//! Shadow checks: what is right replays to the bit, on every device; what is wrong is found, and named.

#[allow(dead_code, reason = "the tests of the update use the rest")]
#[path = "cuda_update/bed.rs"]
mod bed;
mod common;
#[path = "common/device.rs"]
mod device;

use std::path::Path;

use half::bf16;
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::Cuda;
use warpstep::backend::ops::Update;
use warpstep::backend::{Arena, Backend};
use warpstep::optim::{Clip, NormClip, Rule, StepOutcome, StepParams, UpdatePlan};
use warpstep::train::metrics::{Record, SplitName, read_metrics};
use warpstep::train::shadow::{Replayed, Shadow, muon_ulp};

use bed::{ADAM, Case, LAMB, LARS, LION, MOMENTUM, MUON, NESTEROV, POLYAK, clips, fresh_seed, options};

const RULES: [Rule; 9] = [Rule::Sgd, MOMENTUM, NESTEROV, POLYAK, ADAM, LION, LARS, LAMB, MUON];

/// Runs a case with a replay of every update; returns the largest error.
fn watched<B: Backend<Real = f32> + Update>(backend: &B, case: &Case, seed: u64) -> f64 {
    let mut arena = case.arena(backend);
    let shadow = Shadow::new(seed);
    let (mut largest, mut compared) = (0f64, 0);
    case.run_by(backend, &mut arena, |arena, step| {
        let watched = shadow.before(backend, arena, &case.plan, step).unwrap();
        let outcome = backend.update(arena, &case.plan, step).unwrap();
        let found = watched.after(backend, arena, &case.plan, step, &outcome).unwrap();
        (largest, compared) = (largest.max(found.ulp), compared + found.compared);
        outcome
    });
    assert!(compared > 1000, "{compared} parameters compared");
    largest
}

#[test]
fn every_rule_under_every_clip_replays_to_the_bit() {
    let seed = fresh_seed();
    let device = device::device();
    for (at, rule) in RULES.into_iter().enumerate() {
        for (number, clip) in clips().into_iter().enumerate() {
            // An even seed sets gradients to 0 in the pass, an odd one leaves them.
            let own = seed + (at + number) as u64;
            let case = Case::new(&options(rule, clip), own, &[(at + number) % 4]);
            let allowed = if let Rule::Muon { steps, .. } = rule { muon_ulp(steps) } else { 0.0 };
            let found = watched(&Cpu::<f32>::new(), &case, own);
            assert!(found <= allowed, "CPU, {rule:?}, {clip:?}: {found} ulp");
            // The device's rules have the CPU's bits in tests of their own; here, that a replay knows it.
            if let Some(device) = &device
                && (at + number) % 3 == 0
            {
                let found = watched(&Cuda::<f32>::new(device.clone()), &case, own);
                assert!(found <= allowed, "device, {rule:?}, {clip:?}: {found} ulp");
            }
        }
    }
    if let Some(device) = device {
        let case = Case::new(&options(ADAM, clips()[2]), seed, &[1]);
        assert_eq!(watched(&Cuda::<bf16>::new(device), &case, seed), 0.0);
    }
}

/// What happens in the place of an update.
type Faulty<'a, B> = &'a dyn Fn(&B, &mut Arena<B>, &UpdatePlan, &StepParams) -> StepOutcome;

/// The second update of a case, done by `faulty`.
fn second<B: Backend<Real = f32> + Update>(
    backend: &B,
    case: &Case,
    faulty: Faulty<'_, B>,
) -> Result<Replayed, warpstep::Error> {
    let mut arena = case.arena(backend);
    backend.upload(&mut arena.gradients, 0, &case.gradients[0]).unwrap();
    backend.update(&mut arena, &case.plan, &case.step(0, 0)).unwrap();
    backend.upload(&mut arena.gradients, 0, &case.gradients[1]).unwrap();
    let step = case.step(1, 1);
    let watched = Shadow::new(7).before(backend, &arena, &case.plan, &step).unwrap();
    let outcome = faulty(backend, &mut arena, &case.plan, &step);
    watched.after(backend, &arena, &case.plan, &step, &outcome)
}

/// Plants a fault on the CPU and on the device; gives what each says.
macro_rules! plant {
    ($case:expr, $faulty:expr) => {{
        let case: &Case = $case;
        let mut told = vec![second(&Cpu::<f32>::new(), case, &$faulty).map_err(|error| error.to_string())];
        if let Some(device) = device::device() {
            told.push(second(&Cuda::<f32>::new(device), case, &$faulty).map_err(|error| error.to_string()));
        }
        told
    }};
}

fn assert_found(told: Vec<Result<Replayed, String>>, words: &[&str]) {
    for told in told {
        let told = told.expect_err("a planted fault was not found");
        for word in words {
            assert!(told.contains(word), "{word:?} is not in: {told}");
        }
    }
}

fn clipped_case(rule: Rule) -> Case {
    Case::new(&options(rule, clips()[2]), 2 * (fresh_seed() / 2) + 1, &[])
}

#[test]
fn without_a_fault_nothing_is_found() {
    for told in plant!(&clipped_case(MOMENTUM), |b, a, plan, step| b.update(a, plan, step).unwrap()) {
        assert_eq!(told.unwrap().ulp, 0.0);
    }
}

#[test]
fn a_clip_by_the_squared_norm_is_found() {
    let case = clipped_case(MOMENTUM);
    let told = plant!(&case, |b, a, plan, step| {
        let norm = squared_norm(b, a, step).sqrt();
        assert!(norm > 1.0, "the clip would do nothing");
        let max_norm = 1.0 / norm;
        let wrong = UpdatePlan { clip: Clip { value: None, norm: NormClip::Global { max_norm } }, ..plan.clone() };
        StepOutcome { clip_coefficient: 1.0 / (norm + 1e-6), ..b.update(a, &wrong, step).unwrap() }
    });
    assert_found(told, &["update 2", "the plain rule gives", "units in the last place apart"]);
}

/// The gradient's squared norm after the division.
fn squared_norm<B: Backend<Real = f32>>(backend: &B, arena: &Arena<B>, step: &StepParams) -> f64 {
    let mut gradients = vec![0.0f32; arena.layout.padded_len()];
    backend.download(&arena.gradients, 0, &mut gradients).unwrap();
    gradients.iter().map(|g| (f64::from(*g) / step.divisor).powi(2)).sum()
}

#[test]
fn a_clip_that_is_skipped_is_found_whatever_the_outcome_says() {
    let told = plant!(&clipped_case(ADAM), |b, a, plan, step| {
        let norm = squared_norm(b, a, step).sqrt();
        let outcome = b.update(a, &UpdatePlan { clip: Clip::default(), ..plan.clone() }, step).unwrap();
        StepOutcome { clip_coefficient: 1.0 / (norm + 1e-6), ..outcome }
    });
    assert_found(told, &["the plain rule gives"]);
    let told = plant!(&Case::new(&options(MOMENTUM, clips()[5]), 3, &[]), |b, a, plan, step| {
        let clip = Clip { value: None, ..plan.clip };
        b.update(a, &UpdatePlan { clip, ..plan.clone() }, step).unwrap()
    });
    assert_found(told, &["the plain rule gives"]);
}

#[test]
fn one_wrong_element_is_named_with_what_was_found_and_what_was_expected() {
    let case = clipped_case(NESTEROV);
    let at = case.layout.get("d.weight").unwrap().offset + 7 * 33 + 5;
    let told = plant!(&case, |b, a, plan, step| {
        let outcome = b.update(a, plan, step).unwrap();
        let mut value = [0.0f32];
        b.download(&a.parameters, at, &mut value).unwrap();
        b.upload(&mut a.parameters, at, &[f32::from_bits(value[0].to_bits() + 1)]).unwrap();
        outcome
    });
    assert_found(
        told,
        &["update 2: parameter `d.weight`[7, 5] is ", ": 1 units in the last place apart, 0 are allowed"],
    );
    let told = plant!(&case, |b, a, plan, step| {
        let outcome = b.update(a, plan, step).unwrap();
        b.upload(&mut a.slots[0], at, &[f32::NAN]).unwrap();
        outcome
    });
    assert_found(told, &["momentum_buffer `d.weight`[7, 5] is NaN"]);
}

#[test]
fn a_wrong_count_of_steps_and_a_wrong_scale_are_found() {
    let told = plant!(&clipped_case(ADAM), |b, a, plan, step| {
        b.update(a, plan, &StepParams { step: step.step + 1, ..*step }).unwrap()
    });
    assert_found(told, &["the plain rule gives"]);
    let told = plant!(&clipped_case(POLYAK), |b, a, plan, step| {
        b.update(a, plan, &StepParams { divisor: 2.0 * step.divisor, ..*step }).unwrap()
    });
    assert_found(told, &["the plain rule gives"]);
}

#[test]
fn a_step_that_should_have_been_skipped_is_found_and_so_is_one_that_should_not() {
    let case = clipped_case(LION);
    let told = plant!(&case, |b, a, plan, step| {
        let outcome = b.update(a, plan, step).unwrap();
        b.upload(&mut a.gradients, 0, &[f32::NAN]).unwrap();
        outcome
    });
    assert_found(told, &["decision is to apply, the plain rule gives to skip"]);
    let told = plant!(&case, |_, _, _, _| StepOutcome { skipped: true, ..StepOutcome::default() });
    assert_found(told, &["decision is to skip, the plain rule gives to apply"]);
}

#[test]
fn a_wrong_figure_is_found_where_all_elements_are_right() {
    let case = Case::new(&options(LARS, clips()[5]), 5, &[]);
    let figures: [(&dyn Fn(StepOutcome) -> StepOutcome, &str); 3] = [
        (&|o| StepOutcome { grad_norm: o.grad_norm * o.grad_norm, ..o }, "gradient norm is"),
        (&|o| StepOutcome { clip_coefficient: 1.0, ..o }, "clip coefficient is 1"),
        (&|o| StepOutcome { clamped: o.clamped + 1, ..o }, "count of values that the value clip changed"),
    ];
    for (wrong, words) in figures {
        let told = plant!(&case, |b, a, plan, step| wrong(b.update(a, plan, step).unwrap()));
        assert_found(told, &[words]);
    }
}

#[test]
fn a_copy_in_sixteen_bits_that_is_not_the_rounded_parameter_is_found() {
    let Some(device) = device::device() else { return };
    let told = second(&Cuda::<bf16>::new(device), &clipped_case(MOMENTUM), &|b, a, plan, step| {
        let outcome = b.update(a, plan, step).unwrap();
        b.upload(&mut a.stored, 0, &[bf16::from_f32(1000.0)]).unwrap();
        outcome
    });
    assert!(told.unwrap_err().to_string().contains("copy of `one`[0] is 1000"));
}

/// Gradients of a few samples are of a low rank, outside of which iterations make much of what rounding leaves: the more the more of them.
#[test]
fn muon_is_within_its_bound_whatever_the_rank_and_however_many_iterations() {
    let seed = fresh_seed();
    let tensors: [(&str, &[usize]); 2] = [("classes.weight", &[3, 210]), ("layer.weight", &[40, 30])];
    for iterations in [0, 1, 3, 5, 9] {
        let Rule::Muon { momentum, nesterov, scale, .. } = MUON else { unreachable!("Muon's own options") };
        let rule = Rule::Muon { momentum, nesterov, steps: iterations, scale };
        let mut case = Case::of(&tensors, &options(rule, clips()[2]), seed, &[]);
        for gradients in &mut case.gradients {
            for (name, shape) in tensors {
                let of = &mut gradients[case.layout.get(name).unwrap().range()];
                let (columns, two) = (shape[1], of[..2 * shape[1]].to_vec());
                for (row, of) in of.chunks_mut(columns).enumerate() {
                    let [first, second] = [(row as f32).sin(), (2.0 + row as f32).cos()];
                    of.iter_mut().enumerate().for_each(|(i, g)| *g = first * two[i] + second * two[columns + i]);
                }
            }
        }
        let mut found = vec![watched(&Cpu::<f32>::new(), &case, seed)];
        found.extend(device::device().map(|device| watched(&Cuda::<f32>::new(device), &case, seed)));
        println!("{iterations} iterations: {found:?} of {} ulp", muon_ulp(iterations));
        assert!(found.iter().all(|&ulp| ulp <= muon_ulp(iterations)), "{iterations}: {found:?}");
    }
}

/// A matrix as large as tests can afford, a Muon bound that a wrong iteration cannot keep.
#[test]
fn muon_is_within_its_bound_and_one_iteration_less_is_not() {
    let seed = fresh_seed();
    let tensors: [(&str, &[usize]); 3] =
        [("square.weight", &[48, 48]), ("wide.weight", &[16, 96]), ("tall.weight", &[96, 40])];
    let mut case = Case::of(&tensors, &options(MUON, clips()[2]), seed, &[]);
    case.gradients.truncate(2);
    // The last tensor's first gradient has rank 1, which rounding disturbs most.
    let tall = case.layout.get("tall.weight").unwrap().range();
    let columns: Vec<f32> = case.gradients[1][tall.clone()][..40].to_vec();
    let rows: Vec<f32> = case.gradients[1][tall.clone()][40..136].to_vec();
    let product = rows.iter().flat_map(|row| columns.iter().map(move |column| row * column));
    case.gradients[0][tall].iter_mut().zip(product).for_each(|(g, product)| *g = product);
    let mut found = vec![watched(&Cpu::<f32>::new(), &case, seed)];
    found.extend(device::device().map(|device| watched(&Cuda::<f32>::new(device), &case, seed)));
    println!("{found:?} ulp");
    assert!(found.iter().all(|&ulp| ulp <= muon_ulp(5)), "{found:?}");
    let told = second(&Cpu::<f32>::new(), &case, &|b, a, plan, step| {
        let mut wrong = plan.clone();
        for group in &mut wrong.groups {
            if let Rule::Muon { steps, .. } = &mut group.rule {
                *steps -= 1;
            }
        }
        b.update(a, &wrong, step).unwrap()
    });
    assert!(told.unwrap_err().to_string().contains(".weight`["));
}

const RUN: &str = r#"
[run]
steps = 12
log_every_steps = 1

[data]
format = "digits"
batch_size = 16

[model]
preset = "mlp"
hidden = [24]

[optimizer]
rule = "adamw"
learning_rate = 2e-3
clip = { global_norm = 0.5, value = 0.002 }
accumulate = 2

[checkpoint]
every_steps = 100
"#;

/// The records of a run with a replay of every third update.
fn run(folder: &Path, device: &str) -> Vec<Record> {
    let (file, out) = (folder.join("run.toml"), folder.join(device));
    std::fs::write(&file, RUN).unwrap();
    let ran = common::warpstep()
        .args(["train", "--shadow", "3", "--device", device, "--out"])
        .args([&out, &file])
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(shown.contains("  clipped ") && shown.contains("  clamped "), "{shown}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    for words in ["Share of the squared gradient norm", "values clamped", "off by 0 ulp at most"] {
        assert!(page.contains(words), "{words}");
    }
    read_metrics(&out.join("metrics.jsonl")).unwrap()
}

#[test]
fn a_run_records_its_replays_and_where_its_norm_comes_from() {
    let folder = tempfile::tempdir().unwrap();
    let mut devices = vec!["cpu"];
    if device::device().is_some() {
        devices.push(if std::env::var_os("WARPSTEP_TEST_DEVICE").is_some() { "cuda" } else { "emulated" });
    }
    let mut before: Vec<Vec<(String, f64)>> = Vec::new();
    for device in devices {
        let records = run(folder.path(), device);
        let training: Vec<_> = records.iter().filter(|record| record.split == SplitName::Train).collect();
        assert_eq!(training.len(), 12);
        for (at, record) in training.iter().enumerate() {
            assert_eq!(record.shadow_ulp, (record.step % 3 == 0).then_some(0.0), "{device}, step {}", record.step);
            assert!(record.clipped.is_some_and(|share| (0.0..=1.0).contains(&share)));
            assert!(record.clamped.is_some_and(|share| share > 0.0 && share < 1.0), "{:?}", record.clamped);
            let shares = &record.norm_share.as_ref().unwrap().0;
            assert_eq!(shares.len(), 4);
            assert!((shares.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(shares.is_sorted_by(|a, b| a.1 >= b.1), "{shares:?}");
            // Those of this very step, though a device is steps ahead when it is recorded.
            let Some(before) = before.get(at) else {
                before.push(shares.clone());
                continue;
            };
            for (name, share) in before {
                let found = record.norm_share.as_ref().and_then(|shares| shares.of(name)).unwrap();
                assert!((found - share).abs() < 1e-3, "{device}, step {}, {name}: {found} for {share}", record.step);
            }
        }
    }
}
