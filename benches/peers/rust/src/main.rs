//! The works that `warpstep bench --peers` compares, in candle and in burn. The protocol stands in `../common.py`.
//!
//! Clipping by the global norm, and momentum in candle, are written with the frameworks' own tensors where they have none.

mod candle;
mod framework;
mod in_burn;

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::json;

use framework::{Asked, Step};

fn main() -> Result<()> {
    let asked = Asked::from_arguments(std::env::args().skip(1))?;
    let mut out = std::io::stdout().lock();
    if let Some(reason) = asked.not_here() {
        writeln!(out, "{}", json!({"missing": reason}))?;
        return Ok(());
    }
    let (peer, version, mut step) = match asked.framework.as_str() {
        "candle" => ("candle", version("candle-core"), candle::open(&asked)?),
        "burn" => ("burn", version("burn-flex"), in_burn::open(&asked)?),
        other => bail!("found the framework {other:?}, expected candle or burn"),
    };
    let work = json!({
        "name": asked.work,
        "parameters": step.parameters(),
        "inputs": step.inputs(),
        "samples": step.samples(),
        "precision": "f32",
        "update": asked.update,
        "threads": rayon::current_num_threads(),
    });
    writeln!(out, "{}", json!({"peer": peer, "version": version, "work": work}))?;
    out.flush()?;
    let mut cold = true;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = if line.trim() == "check" {
            json!({"finite": step.finite()?})
        } else {
            let seconds = line.strip_prefix("run ").and_then(|seconds| seconds.trim().parse().ok());
            let seconds =
                seconds.with_context(|| format!("found the line {line:?}, expected `run SECONDS` or `check`"))?;
            let times = turn(step.as_mut(), seconds, if cold { 5 } else { 1 })?;
            cold = false;
            json!({"times": times})
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

/// The version of a package that this was built with.
fn version(package: &str) -> &'static str {
    let lock = include_str!("../Cargo.lock");
    let after = lock.split_once(&format!("name = \"{package}\"\nversion = \"")).map_or("", |(_, after)| after);
    after.split('"').next().unwrap_or_default()
}

/// Seconds that a span has at least, spans of one repetition whose fastest tells how many make one that long, and seconds after which
/// no other of these is begun: as in `../common.py`.
const LEAST_SPAN: f64 = 50e-6;
const SINGLE_SPANS: usize = 5;
const SINGLE_SECONDS: f64 = 0.1;

/// Seconds a repetition, of spans for about so long after a warm-up of a tenth of it, the fastest repetition of which tells how many
/// make a span.
fn turn(step: &mut dyn Step, seconds: f64, warm_up: usize) -> Result<Vec<f64>> {
    let (mut one, mut done, began) = (f64::INFINITY, 0, Instant::now());
    let least = |done| (seconds / 10.0).max(if done < SINGLE_SPANS { SINGLE_SECONDS } else { 0.0 });
    while done < warm_up || began.elapsed().as_secs_f64() < least(done) {
        one = one.min(span(step, 1)?);
        done += 1;
    }
    let count = (LEAST_SPAN / one).ceil().max(1.0) as usize;
    let (mut times, began) = (Vec::new(), Instant::now());
    while began.elapsed().as_secs_f64() < seconds || times.len() < 5 {
        times.push(span(step, count)?);
    }
    Ok(times)
}

/// Seconds a repetition over so many.
fn span(step: &mut dyn Step, count: usize) -> Result<f64> {
    let began = Instant::now();
    for _ in 0..count {
        step.step()?;
    }
    Ok(began.elapsed().as_secs_f64() / count as f64)
}
