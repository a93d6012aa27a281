//! `[optimizer]` and `[schedule]`.

use regex::Regex;

use super::section::Section;
use super::tree::Node;
use crate::error::Result;
use crate::optim::{Clip, Decay, GroupPattern, MomentumForm, MuonScale, NormClip, OptimizerOptions, Rule, Schedule};

/// What `[optimizer]` says: the update, accumulation, the average of weights.
pub struct OptimizerSection {
    /// Rule, clip, decay, groups.
    pub optimizer: OptimizerOptions,
    /// Micro-batches an update.
    pub accumulate: u32,
    /// Decay of the average of weights.
    pub ema: Option<f64>,
}

const RULES: [(&str, RuleName); 9] = [
    ("sgd", RuleName::Sgd),
    ("momentum", RuleName::Momentum),
    ("adam", RuleName::Adam),
    ("adamw", RuleName::AdamW),
    ("lion", RuleName::Lion),
    ("lamb", RuleName::Lamb),
    ("lars", RuleName::Lars),
    ("muon", RuleName::Muon),
    ("nesterov", RuleName::Nesterov),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum RuleName {
    Sgd,
    Momentum,
    Nesterov,
    Adam,
    AdamW,
    Lion,
    Lamb,
    Lars,
    Muon,
}

/// Reads `[optimizer]`. `matrices_only`: whether decay leaves norms and biases out where the file does not say.
///
/// # Errors
/// A key that is unknown, of another type, or out of its range.
pub fn optimizer(section: &mut Section, matrices_only: bool) -> Result<OptimizerSection> {
    let (rule, name) = rule(section, "momentum")?;
    let learning_rate = section.optional("learning_rate")?;
    let decoupled = name == RuleName::AdamW || rule.decouples_decay();
    let decoupled = section.choice_or(
        "decay",
        &[("coupled", false), ("decoupled", true)],
        if decoupled { "decoupled" } else { "coupled" },
    )?;
    let default_decay = if name == RuleName::AdamW { 0.01 } else { 0.0 };
    let weight_decay = section.or("weight_decay", default_decay)?;
    let decay_matrices_only = section.choice_or(
        "decay_on",
        &[("all", false), ("matrices", true)],
        if matrices_only { "matrices" } else { "all" },
    )?;
    let clip = clip(section)?;
    let groups = groups(section)?;
    let accumulate = section.or("accumulate", 1u32)?;
    let ema = section.optional("ema")?;
    let master = section.or("master", true)?;
    if !master && ema.is_some() {
        return Err(section.error("ema", "an average of weights needs them in f32; leave ema out, or master = false"));
    }
    let learning_rate =
        learning_rate.ok_or_else(|| section.missing_of_all("learning_rate", "a number above 0, as in 1e-3"))?;
    let optimizer =
        OptimizerOptions { rule, learning_rate, weight_decay, decoupled, decay_matrices_only, clip, groups, master };
    Ok(OptimizerSection { optimizer, accumulate, ema })
}

/// What a run file calls one of these.
fn name_of<T: PartialEq>(names: &[(&'static str, T)], of: T) -> &'static str {
    names.iter().find(|(_, other)| *other == of).map_or("", |(name, _)| *name)
}

fn rule(section: &mut Section, default: &str) -> Result<(Rule, RuleName)> {
    let name = section.choice_or("rule", &RULES, default)?;
    let betas = |section: &mut Section, default: [f64; 2]| section.or("betas", default);
    let mut with = format!("rule = \"{}\"", name_of(&RULES, name));
    let rule = match name {
        RuleName::Sgd => Rule::Sgd,
        RuleName::Momentum | RuleName::Nesterov => {
            let form = section.choice_or(
                "form",
                &[("pytorch", MomentumForm::Pytorch), ("polyak", MomentumForm::Polyak)],
                "pytorch",
            )?;
            with += match form {
                MomentumForm::Pytorch => ", form = \"pytorch\"",
                MomentumForm::Polyak => ", form = \"polyak\"",
            };
            let momentum = section.or("momentum", 0.9)?;
            if (name, form) == (RuleName::Nesterov, MomentumForm::Polyak) {
                return Err(section.error("form", "found \"polyak\", expected \"pytorch\" with rule = \"nesterov\""));
            }
            if name == RuleName::Nesterov && matches!(section.node("nesterov"), Some(Node::Boolean(false))) {
                return Err(section.error(
                    "nesterov",
                    "found false with rule = \"nesterov\", expected rule = \"momentum\" without it",
                ));
            }
            match form {
                MomentumForm::Pytorch => Rule::Momentum {
                    form,
                    momentum,
                    dampening: section.or("dampening", 0.0)?,
                    nesterov: section.or("nesterov", name == RuleName::Nesterov)?,
                    gamma: 1.0,
                },
                MomentumForm::Polyak => {
                    Rule::Momentum { form, momentum, dampening: 0.0, nesterov: false, gamma: section.or("gamma", 1.0)? }
                }
            }
        }
        RuleName::Adam | RuleName::AdamW => {
            Rule::Adam { betas: betas(section, [0.9, 0.999])?, epsilon: section.or("epsilon", 1e-8)? }
        }
        RuleName::Lion => Rule::Lion { betas: betas(section, [0.9, 0.99])? },
        RuleName::Lamb => Rule::Lamb { betas: betas(section, [0.9, 0.999])?, epsilon: section.or("epsilon", 1e-6)? },
        RuleName::Lars => Rule::Lars { momentum: section.or("momentum", 0.9)?, trust: section.or("trust", 0.001)? },
        RuleName::Muon => Rule::Muon {
            momentum: section.or("momentum", 0.95)?,
            nesterov: section.or("nesterov", true)?,
            steps: section.or("iterations", 5u32)?,
            scale: section.choice_or(
                "scale",
                &[("original", MuonScale::Original), ("match_rms_adamw", MuonScale::MatchRmsAdamw)],
                "match_rms_adamw",
            )?,
        },
    };
    section.reject(&RULE_KEYS, &format!("does not go with {with}"))?;
    Ok((rule, name))
}

/// Keys that some rules have.
const RULE_KEYS: [&str; 10] =
    ["form", "momentum", "dampening", "nesterov", "gamma", "betas", "epsilon", "trust", "iterations", "scale"];

fn clip(section: &mut Section) -> Result<Clip> {
    let mut table = section.section_such_as("clip", "global_norm = 1.0")?;
    let value = table.optional("value")?;
    let global = table.optional::<f64>("global_norm")?;
    let tensor = table.optional::<f64>("tensor_norm")?;
    let adaptive = table.optional::<f64>("adaptive")?;
    let norm = match (global, tensor, adaptive) {
        (None, None, None) => NormClip::Off,
        (Some(max_norm), None, None) => NormClip::Global { max_norm },
        (None, Some(max_norm), None) => NormClip::Tensor { max_norm },
        (None, None, Some(clipping)) => NormClip::Adaptive { clipping, epsilon: table.or("adaptive_epsilon", 1e-3)? },
        _ => {
            return Err(section.error(
                "clip",
                "found more than one norm clip, expected at most one of global_norm, tensor_norm, adaptive",
            ));
        }
    };
    table.reject(&["adaptive_epsilon"], "goes with clip.adaptive alone")?;
    section.close("clip", table, true)?;
    Ok(Clip { value, norm })
}

fn groups(section: &mut Section) -> Result<Vec<GroupPattern>> {
    let Some(mut tables) = section.sections("groups")? else { return Ok(Vec::new()) };
    let mut groups = Vec::new();
    for table in &mut tables {
        let pattern: String = table.required("pattern")?;
        let pattern = Regex::new(&pattern).map_err(|e| {
            let why = e.to_string().lines().last().unwrap_or_default().trim().to_owned();
            table.error("pattern", format!("found {pattern:?}, expected a regular expression ({why})"))
        })?;
        let own = if table.has("rule") { Some(rule(table, "momentum")?) } else { None };
        groups.push(GroupPattern {
            pattern,
            learning_rate_scale: table.or("learning_rate_scale", 1.0)?,
            weight_decay: table.optional("weight_decay")?,
            rule: own.map(|(rule, _)| rule),
            decoupled: own.map(|(rule, name)| name == RuleName::AdamW || rule.decouples_decay()),
        });
    }
    section.close_all("groups", tables)?;
    Ok(groups)
}

/// Reads `[schedule]`.
///
/// # Errors
/// A key that is unknown or of another type.
pub fn schedule(section: &mut Section) -> Result<Schedule> {
    let kind = section.choice_or("kind", &KINDS, "constant")?;
    let decay = match kind {
        Kind::Constant => Decay::Constant,
        Kind::Polynomial => Decay::Polynomial { power: section.or("power", 1.0)? },
        Kind::Linear => Decay::Linear,
        Kind::Cosine => Decay::Cosine,
        Kind::Step => {
            let milestones = section.or("milestones", Vec::<u64>::new())?;
            let every = match section.optional("every_steps")? {
                Some(_) if !milestones.is_empty() => {
                    return Err(
                        section.error("every_steps", "found both every_steps and milestones, expected one of them")
                    );
                }
                Some(every) => every,
                None if milestones.is_empty() => {
                    return Err(
                        section.missing("every_steps", "a whole number of 1 or more, or milestones in its place")
                    );
                }
                None => 0,
            };
            Decay::Step { every, milestones, gamma: section.or("gamma", 0.1)? }
        }
        Kind::Exponential => Decay::Exponential { gamma: section.required("gamma")? },
        Kind::Wsd => Decay::Wsd { decay_steps: section.required("decay_steps")? },
        Kind::OneCycle => Decay::OneCycle {
            rise: section.or("rise", 0.3)?,
            initial_divisor: section.or("initial_divisor", 25.0)?,
            final_divisor: section.or("final_divisor", 1e4)?,
        },
        Kind::InverseSqrt => Decay::InverseSqrt,
    };
    // What each kind asked for is its own; the rest of these belongs to others.
    let why = format!("does not go with kind = \"{}\"", name_of(&KINDS, kind));
    if kind == Kind::OneCycle {
        section.reject(&SCHEDULE_KEYS, &why)?;
        return Ok(Schedule { decay, ..Schedule::default() });
    }
    let schedule =
        Schedule { decay, warmup_steps: section.or("warmup_steps", 0u64)?, floor: section.or("floor", 0.0)? };
    section.reject(&SCHEDULE_KEYS, &why)?;
    Ok(schedule)
}

/// Keys that some schedules have.
const SCHEDULE_KEYS: [&str; 10] = [
    "power",
    "milestones",
    "every_steps",
    "gamma",
    "decay_steps",
    "rise",
    "initial_divisor",
    "final_divisor",
    "warmup_steps",
    "floor",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Constant,
    Polynomial,
    Linear,
    Cosine,
    Step,
    Exponential,
    Wsd,
    OneCycle,
    InverseSqrt,
}

const KINDS: [(&str, Kind); 9] = [
    ("constant", Kind::Constant),
    ("polynomial", Kind::Polynomial),
    ("linear", Kind::Linear),
    ("cosine", Kind::Cosine),
    ("step", Kind::Step),
    ("exponential", Kind::Exponential),
    ("wsd", Kind::Wsd),
    ("one_cycle", Kind::OneCycle),
    ("inverse_sqrt", Kind::InverseSqrt),
];
