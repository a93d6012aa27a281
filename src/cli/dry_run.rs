//! `warpstep train --dry-run`: the model's table, its memory and its arithmetic.

use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use super::assemble::{Opened, build_model, open_data, sampler_options, steps};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Device, LESS_MEMORY};
use crate::backend::ops::Update;
use crate::config::{DeviceChoice, Precision, RunFile};
use crate::data::OpenedData;
use crate::data::options::Resident;
use crate::error::Result;
use crate::model::{Model, Program};
use crate::parallel::Shard;
use crate::parallel::world::World;
use crate::text::grouped;
use crate::train::checkpoint::check_weights;
use crate::train::looping::model_input;
use crate::train::memory::{Fullest, RunMemory, Wanted, evaluated};
use crate::train::resident::{candidate, fits};
use crate::train::step::can_be_shared_out;

/// What training would take, on the device that was opened; a GPU that could not be opened is planned for all the same. `weights`: the
/// file that the run begins with.
///
/// # Errors
/// A device that is neither there nor planned for, data that cannot be used, a model that does not fit them, or weights of another.
pub fn dry_run(run: &RunFile, world: &World, device: Result<Opened>, weights: Option<&Path>) -> Result<String> {
    let absent = match (&device, run.device) {
        (Err(error), DeviceChoice::Cuda(_)) => Some(error.to_string()),
        _ => None,
    };
    let device = match device {
        Ok(device) => Some(device),
        Err(_) if absent.is_some() => None,
        Err(error) => return Err(error),
    };
    let data = open_data(run, world.rank == 0)?;
    let asked = Asked { run, data: &data, world, weights };
    let mut text = match (&device, run.precision) {
        (Some(Opened::Cpu(_)), _) => plan::<Cpu<f32>>(&asked, None)?,
        (Some(Opened::Cuda(backend)), _) => plan(&asked, Some((backend, backend.device())))?,
        (Some(Opened::CudaBf16(backend)), _) => plan(&asked, Some((backend, backend.device())))?,
        (Some(Opened::CudaF16(backend)), _) => plan(&asked, Some((backend, backend.device())))?,
        (None, Precision::F32 | Precision::Tf32) => plan::<Cuda<f32>>(&asked, None)?,
        (None, Precision::Bf16) => plan::<Cuda<bf16>>(&asked, None)?,
        (None, Precision::F16) => plan::<Cuda<f16>>(&asked, None)?,
    };
    if let Some(reason) = absent {
        text += &format!("planned without a device: {reason}\n");
    }
    Ok(text)
}

/// What is planned.
struct Asked<'a> {
    run: &'a RunFile,
    data: &'a OpenedData,
    world: &'a World,
    weights: Option<&'a Path>,
}

/// `opened`: the device, as backend and as what tells its memory.
fn plan<B: Update>(asked: &Asked<'_>, opened: Option<(&B, &Arc<Device>)>) -> Result<String> {
    let &Asked { run, data, world, weights } = asked;
    let (backend, device) = opened.unzip();
    let mut model: Model<B> = build_model(run, &data.preprocess)?;
    let (rank, world) = (world.rank, world.size);
    let share = run.parallel.share(rank, world, run.train.batch_size).map_err(|e| run.locate(e))?;
    let sharding = run.parallel.sharding((rank, world), &share, run.train.accumulate);
    if sharding.shard != Shard::None {
        can_be_shared_out(&run.optimizer).map_err(|e| run.locate(e))?;
    }
    let sampler = sampler_options(run, data, share);
    let left = sampler.left(data.splits.train.len());
    steps(run, data, sampler)?;
    let wanted = Wanted {
        input: model_input(data.input()),
        batch_size: run.train.batch_size / share.of,
        share: (share.of > 1).then_some((share, sharding)),
        left,
        evaluations: evaluated(&data.splits, run.train.batch_size / share.of),
        optimizer: &run.optimizer,
        average: run.train.ema.is_some(),
    };
    let (program, mut memory) = RunMemory::plan_on(&mut model, &wanted, backend).map_err(|e| run.locate(e))?;
    if let Some(weights) = weights {
        check_weights(weights, model.parameters())?;
    }
    let free = device.map(|device| device.memory()).transpose()?;
    if let Some(table) = candidate(&data.splits.train, data.resident).map_err(|e| run.locate(e))? {
        let left = free.map(|(free, _)| free.saturating_sub(memory.total()));
        if data.resident == Resident::Always || fits(B::table_room(&table), left) {
            memory = memory.with_table::<B>(&table);
        }
    }
    let mut text = table(&program);
    text += &format!("\n{:<23} {}\n", "parameters", grouped(model.parameters().elements() as u64));
    text += &tell_memory(&memory);
    if let (Some(device), Some((free, total))) = (device, free) {
        text += &format!("{:<23} {:>12} of {} on {}\n", "memory, free", mib(free), mib(total), device.name());
        if memory.total() > free {
            text += &format!("it does not fit: {LESS_MEMORY}\n");
        }
    }
    let flops = program.flops() * share.passes(run.train.accumulate);
    text += &format!(
        "{:<23} {:.3} GFLOP ({} micro-batch{} of {}{})\n",
        "arithmetic a step",
        flops as f64 / 1e9,
        run.train.accumulate,
        if run.train.accumulate == 1 { "" } else { "es" },
        run.train.batch_size,
        if world == 1 { String::new() } else { format!(", the part of one of {world} processes") },
    );
    Ok(text)
}

/// The model's layers.
fn table<B: Update>(program: &Program<B>) -> String {
    let width = program.rows.iter().map(|r| r.name.len()).max().unwrap_or(0).max(5);
    let mut text =
        format!("{:<width$}  {:<16} {:<24} {:>14} {:>12}\n", "layer", "kind", "output", "parameters", "MFLOP");
    for row in &program.rows {
        text += &format!(
            "{:<width$}  {:<16} {:<24} {:>14} {:>12.3}\n",
            row.name,
            row.kind,
            format!("{:?}", row.shape),
            grouped(row.parameters as u64),
            row.flops as f64 / 1e6
        );
    }
    text
}

/// The memory, part by part.
fn tell_memory(memory: &RunMemory) -> String {
    let mut text = String::from("memory of the device\n");
    for part in &memory.parts {
        text += format!("  {:<21} {:>12}  {}", part.name, mib(part.bytes), part.of).trim_end();
        text.push('\n');
    }
    text += &format!(
        "  {:<21} {:>12}, besides what the driver and libraries keep of their own\n",
        "together",
        mib(memory.total())
    );
    if let Some(fullest) = &memory.fullest {
        let Fullest { number, name, bytes } = fullest;
        text += &format!("  most activations at once: {}, at operation {number}, {name}\n", mib(*bytes));
    }
    text
}

/// MiB, to three places where it is less than one.
fn mib(bytes: usize) -> String {
    let places = if bytes < 1 << 20 { 3 } else { 1 };
    format!("{:.places$} MiB", bytes as f64 / (1 << 20) as f64)
}
