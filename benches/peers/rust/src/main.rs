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
        let seconds = line.strip_prefix("run ").and_then(|seconds| seconds.trim().parse().ok());
        let seconds: f64 = seconds.with_context(|| format!("found the line {line:?}, expected `run SECONDS`"))?;
        let times = turn(step.as_mut(), seconds, if cold { 5 } else { 1 })?;
        cold = false;
        writeln!(out, "{}", json!({"times": times}))?;
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

/// Seconds of each repetition, for about so long after a warm-up of a tenth of it.
fn turn(step: &mut dyn Step, seconds: f64, warm_up: usize) -> Result<Vec<f64>> {
    let (began, mut done) = (Instant::now(), 0);
    while done < warm_up || began.elapsed().as_secs_f64() < seconds / 10.0 {
        step.step()?;
        done += 1;
    }
    let (mut times, began) = (Vec::new(), Instant::now());
    while began.elapsed().as_secs_f64() < seconds || times.len() < 5 {
        let one = Instant::now();
        step.step()?;
        times.push(one.elapsed().as_secs_f64());
    }
    Ok(times)
}
