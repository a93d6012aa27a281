//! `warpstep plan`: what a run would take on devices that are not here.

mod measured;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use half::{bf16, f16};
use serde::Serialize;

use super::assemble::{build_model, open_data};
use super::{RunFileArgs, number, say, whole};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::ops::Update;
use crate::config::{Precision, RunFile};
use crate::data::options::Resident;
use crate::data::{InputSpec, OpenedData, SamplerOptions, Table, TargetSpec};
use crate::error::{Error, Result};
use crate::model::{Mode, Model};
use crate::optim::UpdatePlan;
use crate::parallel::scaling::{GPUS, Hardware, Links, Prediction, Step, predict};
use crate::parallel::{Shard, Wire};
use crate::plan::Share;
use crate::real::Element;
use crate::train::looping::model_input;
use crate::train::memory::{Part, RunMemory, Wanted, evaluated};
use crate::train::profile::{Speed, update_bytes};
use crate::train::resident::{candidate, fits};
use crate::train::step::can_be_shared_out;

/// Options of `plan`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  warpstep plan run.toml --gpus 8 --nodes 16 --gpu h100
  warpstep plan run.toml --gpus 8 --gpu a100 --set data.batch_size=512
  warpstep plan run.toml --gpu here --gpus 2     (this machine's CPU, measured first)

The model behind it: docs/scaling.md.")]
pub(crate) struct Options {
    #[command(flatten)]
    run: RunFileArgs,
    /// GPUs of a node, a process each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<usize>, allow_negative_numbers = true)]
    gpus: usize,
    /// Nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole::<usize>, allow_negative_numbers = true)]
    nodes: usize,
    /// What they are: h100, h200, b200, a100, a100-40gb, l40s, rtx4090; here: this machine's CPU
    #[arg(long, value_name = "NAME", default_value = "h100")]
    gpu: String,
    /// GB/s that a process's collectives move within its node (their bus bandwidth); the GPU's usual one where not given
    #[arg(long, value_name = "GB/S", value_parser = number, allow_negative_numbers = true)]
    node_bandwidth: Option<f64>,
    /// GB/s that a process's collectives move between nodes
    #[arg(long, value_name = "GB/S", value_parser = number, default_value_t = 50.0, allow_negative_numbers = true)]
    network: f64,
    /// Microseconds of each step of the way within a node, and between nodes
    #[arg(long, value_name = "US", value_parser = number, num_args = 2, default_values_t = [6.0, 15.0], allow_negative_numbers = true)]
    latency: Vec<f64>,
    /// Share of the data sheet's arithmetic that products reach
    #[arg(long, value_name = "SHARE", value_parser = number, default_value_t = 0.65, allow_negative_numbers = true)]
    efficiency: f64,
    /// Take speeds from what `warpstep bench --json` wrote on such a device: the copy, the products, and the sums over processes
    /// (may be given several times)
    #[arg(long, value_name = "FILE")]
    measured: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a process computes and moves with.
struct Device {
    title: String,
    /// Bytes of memory; none where that is not asked.
    memory: Option<f64>,
    /// Bytes a second, and floating-point operations a second, as they are reached.
    speed: Speed,
    /// Floating-point operations a second of the data sheet, or as measured.
    peak: f64,
    node_bandwidth: f64,
}

/// Of the data sheet's memory bandwidth, what a copy reaches: 3.0 of 3.35 TB/s on an H100.
const REACHED_BANDWIDTH: f64 = 0.9;
/// Of a GPU's memory, what is left for a run beside its context and libraries.
const USABLE_MEMORY: f64 = 0.94;

/// More processes than any cluster has.
const MOST_PROCESSES: usize = 1 << 20;

/// Runs it.
pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let run_file = options.run.read()?;
    let counts = [("--gpus", options.gpus), ("--nodes", options.nodes)];
    if let Some((flag, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return Err(Error::config(*flag, "found 0, expected 1 or more").into());
    }
    let shares = [("--network", options.network), ("--efficiency", options.efficiency)];
    let shares = shares.into_iter().chain(options.node_bandwidth.map(|given| ("--node-bandwidth", given)));
    for (flag, value) in shares.chain(options.latency.iter().map(|&latency| ("--latency", latency))) {
        if !(value > 0.0 && value.is_finite()) {
            return Err(Error::config(flag, format!("found {value}, expected a number above 0")).into());
        }
    }
    if options.efficiency > 1.0 {
        let problem = format!("found {}, expected a share of the peak, above 0 and at most 1", options.efficiency);
        return Err(Error::config("--efficiency", problem).into());
    }
    let data = open_data(&run_file, true)?;
    let mut device = device(&options, run_file.precision)?;
    for path in &options.measured {
        measured::apply(path, run_file.precision, &mut device)?;
    }
    let here = options.gpu == "here";
    let plan = match run_file.precision {
        _ if here => Plan::new::<Cpu<f32>>(&options, &run_file, &data, device)?,
        Precision::F32 | Precision::Tf32 => Plan::new::<Cuda<f32>>(&options, &run_file, &data, device)?,
        Precision::Bf16 => Plan::new::<Cuda<bf16>>(&options, &run_file, &data, device)?,
        Precision::F16 => Plan::new::<Cuda<f16>>(&options, &run_file, &data, device)?,
    };
    if options.json {
        say(&format!("{}\n", serde_json::to_string_pretty(&plan)?))?;
    } else {
        say(&plan.text())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn device(options: &Options, precision: Precision) -> Result<Device> {
    if options.gpu == "here" {
        if precision != Precision::F32 {
            return Err(Error::config("run.precision", "the CPU computes in f32; expected \"f32\" with --gpu here"));
        }
        let speed = Speed::measure(&Cpu::<f32>::new())?;
        return Ok(Device {
            title: "this machine's CPU, as measured".into(),
            memory: None,
            speed,
            peak: speed.product,
            // A process reads what its neighbour wrote, and both write what they read: a quarter of a copy's speed each way.
            node_bandwidth: options.node_bandwidth.map_or(speed.copy / 4.0, |given| given * 1e9),
        });
    }
    let known = |gpu: &&Hardware| gpu.name == options.gpu;
    let Some(gpu) = GPUS.iter().find(known) else {
        let names: Vec<&str> = GPUS.iter().map(|gpu| gpu.name).collect();
        return Err(Error::config("--gpu", format!("found {:?}, expected {} or here", options.gpu, names.join(", "))));
    };
    let peak = match precision {
        Precision::F32 => gpu.single,
        Precision::Tf32 => gpu.tf32,
        Precision::Bf16 | Precision::F16 => gpu.half,
    };
    Ok(Device {
        title: gpu.title.into(),
        memory: Some(gpu.memory),
        speed: Speed { copy: gpu.bandwidth * REACHED_BANDWIDTH, product: peak * options.efficiency },
        peak,
        node_bandwidth: options.node_bandwidth.map_or(gpu.node_bandwidth, |given| given * 1e9),
    })
}

/// A part of the memory of a process.
#[derive(Debug, Serialize)]
struct MemoryPart {
    name: &'static str,
    of: String,
    bytes: usize,
}

/// Something that processes send one another.
#[derive(Debug, Serialize)]
struct Sent {
    what: &'static str,
    times_a_step: f64,
    bytes: f64,
    milliseconds: f64,
    not_hidden_milliseconds: f64,
}

/// A step at some number of processes.
#[derive(Debug, Serialize)]
struct Row {
    processes: usize,
    batch_a_process: usize,
    milliseconds: f64,
    per_second: f64,
    /// Of what as many processes would do that need not wait for one another.
    efficiency: f64,
}

/// What a run takes on many devices.
#[derive(Debug, Serialize)]
struct Plan {
    device: String,
    nodes: usize,
    processes_a_node: usize,
    precision: String,
    /// What speed is counted in: `tokens` or `samples`.
    unit: &'static str,
    batch_size: usize,
    memory: Vec<MemoryPart>,
    memory_of_device: Option<f64>,
    communication: Vec<Sent>,
    compute_milliseconds: f64,
    update_milliseconds: f64,
    step_milliseconds: f64,
    per_second: f64,
    utilization: f64,
    /// This batch, shared out to fewer and more processes.
    same_batch: Vec<Row>,
    /// As large a batch in each process.
    same_share: Vec<Row>,
    /// Samples of a micro-batch that fit in a process.
    largest_batch: Option<usize>,
}

/// What is computed once, and holds for any number of processes.
struct Work<'a, B: Update> {
    options: &'a Options,
    run: &'a RunFile,
    data: &'a OpenedData,
    device: Device,
    model: Model<B>,
    /// The training split, where a device may keep it.
    table: Option<Arc<Table>>,
}

impl<B: Update> Work<'_, B> {
    fn links(&self, processes: usize) -> Links {
        let per_node = processes.min(self.options.gpus);
        Links {
            per_node,
            nodes: processes.div_ceil(per_node),
            node_bandwidth: self.device.node_bandwidth,
            node_latency: self.options.latency[0] * 1e-6,
            network_bandwidth: self.options.network * 1e9,
            network_latency: self.options.latency[1] * 1e-6,
        }
    }

    /// The share of a process of `processes` of a batch of so many samples.
    fn share(&self, processes: usize, batch: usize) -> Result<Share> {
        self.run.parallel.share(0, processes, batch).map_err(|e| self.run.locate(e))
    }

    /// The memory of a process that has this share, and takes so many samples at a time.
    fn memory(&mut self, processes: usize, share: Share, samples: usize) -> Result<RunMemory> {
        let parallel = &self.run.parallel;
        let sharding = parallel.sharding((0, processes), &share, self.run.train.accumulate);
        let sampling = self.data.sampler_options(samples * share.of, self.run.train.seed);
        let wanted = Wanted {
            input: model_input(self.data.input()),
            batch_size: samples,
            share: (share.of > 1).then_some((share, sharding)),
            left: SamplerOptions { share, ..sampling }.left(self.data.splits.train.len()),
            evaluations: evaluated(&self.data.splits, samples),
            optimizer: &self.run.optimizer,
            average: self.run.train.ema.is_some(),
        };
        let (_, memory) = RunMemory::plan(&mut self.model, &wanted).map_err(|e| self.run.locate(e))?;
        let free = |memory: f64| (memory * USABLE_MEMORY) as usize;
        let left = self.device.memory.map(|all| free(all).saturating_sub(memory.total()));
        match &self.table {
            Some(table) if self.data.resident == Resident::Always || fits(B::table_room(table), left) => {
                Ok(memory.with_table::<B>(table))
            }
            _ => Ok(memory),
        }
    }

    /// The step of each of so many processes on a batch, and its floating-point operations.
    fn step(&mut self, processes: usize, batch: usize) -> Result<(Step, f64)> {
        let share = self.share(processes, batch)?;
        let input = model_input(self.data.input());
        let program = self.model.plan(&input, batch / share.of, Mode::Training).map_err(|e| self.run.locate(e))?;
        let costs = program.costs(self.model.parameters())?;
        let floor = |cost: &crate::model::OpCost| self.device.speed.floor_ms(cost.bytes, cost.flops) * 1e-3;
        let (forward, backward) = costs.split_at(program.forward_ops);
        let (layout, _) = self.model.parameters().layout()?;
        let plan = UpdatePlan::new(&self.run.optimizer, &layout)?;
        let len = layout.padded_len();
        let copy = if size_of::<B::Storage>() < size_of::<f32>() { size_of::<B::Storage>() } else { 0 };
        let (parallel, accumulate) = (&self.run.parallel, self.run.train.accumulate);
        let sent = match parallel.wire {
            Wire::F32 => size_of::<f32>(),
            Wire::Bf16 => size_of::<bf16>(),
        };
        let sharding = parallel.sharding((0, processes), &share, accumulate);
        let passes = share.passes(accumulate) as f64;
        // Where parameters are gathered between buckets, the host does one after the other.
        let sums_beside = match parallel.shard {
            Shard::None | Shard::Optimizer => parallel.overlap,
            Shard::Gradients => parallel.overlap || B::QUEUES_SUMS,
            Shard::Parameters => B::QUEUES_SUMS,
        };
        let step = Step {
            forward: forward.iter().map(floor).sum(),
            backward: backward.iter().map(floor).sum(),
            update: update_bytes(&plan, len, copy) as f64 / self.device.speed.copy,
            passes,
            sums: if sharding.adds_up { share.count as f64 } else { passes },
            gradient_bytes: (len * sent) as f64,
            parameter_bytes: (len * size_of::<B::Storage>()) as f64,
            bucket_bytes: (parallel.bucket_elements() * sent) as f64,
            sums_beside,
            gathers_beside: B::QUEUES_SUMS,
        };
        Ok((step, program.flops() as f64 * passes))
    }

    /// A step of so many processes, each with so many samples, beside one that waits for nobody.
    fn row(&mut self, processes: usize, samples: usize, items: f64) -> Result<(Row, Prediction)> {
        let (step, _) = self.step(processes, processes * samples)?;
        let found = predict(&step, self.run.parallel.shard, &self.links(processes));
        let alone = predict(&step, Shard::None, &self.links(1)).seconds;
        let row = Row {
            processes,
            batch_a_process: samples,
            milliseconds: found.seconds * 1e3,
            per_second: (processes * samples) as f64 * f64::from(self.run.train.accumulate) * items / found.seconds,
            efficiency: alone / found.seconds,
        };
        Ok((row, found))
    }

    /// The largest number of samples of a batch that fit into each of so many processes, shared out as `share` is.
    fn largest_batch(&mut self, processes: usize, share: Share) -> Result<Option<usize>> {
        let Some(memory) = self.device.memory else { return Ok(None) };
        let mut fits = |samples: usize| -> Result<bool> {
            Ok(self.memory(processes, share, samples)?.total() as f64 <= memory * USABLE_MEMORY)
        };
        if !fits(1)? {
            return Ok(Some(0));
        }
        let mut most = 1;
        while most < 1 << 20 && fits(2 * most)? {
            most *= 2;
        }
        let (mut fitting, mut too_large) = (most, 2 * most);
        while too_large - fitting > 1 {
            let middle = usize::midpoint(fitting, too_large);
            if fits(middle)? { fitting = middle } else { too_large = middle }
        }
        Ok(Some(fitting * share.count))
    }
}

impl Plan {
    fn new<B: Update>(options: &Options, run: &RunFile, data: &OpenedData, device: Device) -> Result<Self> {
        let world =
            options.gpus.checked_mul(options.nodes).filter(|&world| world <= MOST_PROCESSES).ok_or_else(|| {
                let found = format!("found {} processes on each of {} nodes", options.gpus, options.nodes);
                Error::config("--gpus, --nodes", format!("{found}, expected at most {MOST_PROCESSES} in all"))
            })?;
        let batch = run.train.batch_size;
        if !batch.is_multiple_of(world) {
            return Err(run.locate(Error::config(
                "data.batch_size",
                format!(
                    "found {batch}, expected a multiple of {world}: it is the batch of all processes together; give \
                     --set data.batch_size={}",
                    batch.max(1).next_multiple_of(world)
                ),
            )));
        }
        if run.parallel.shard != Shard::None {
            can_be_shared_out(&run.optimizer).map_err(|e| run.locate(e))?;
        }
        let samples = batch / world;
        let (unit, items) = match (data.input(), data.target()) {
            (InputSpec::Tokens { context, .. }, TargetSpec::NextToken) => ("tokens", *context as f64),
            _ => ("samples", 1.0),
        };
        let (title, memory_of_device, peak) = (device.title.clone(), device.memory, device.peak);
        let table = candidate(&data.splits.train, data.resident).map_err(|e| run.locate(e))?;
        let mut work = Work { options, run, data, device, model: build_model::<B>(run, &data.preprocess)?, table };
        let share = work.share(world, batch)?;
        let memory = work.memory(world, share, batch / share.of)?;
        let (_, flops) = work.step(world, batch)?;
        let (row, found) = work.row(world, samples, items)?;
        let powers = || (0..usize::BITS).map(|power| 1usize << power).take_while(|&count| count < 2 * world);
        let counts: Vec<usize> = powers().filter(|&count| count < world).chain([world]).collect();
        let mut same_batch = Vec::new();
        for &count in counts.iter().filter(|&&count| batch.is_multiple_of(count)) {
            if work.share(count, batch).is_ok() {
                same_batch.push(work.row(count, batch / count, items)?.0);
            }
        }
        if let Some(alone) = same_batch.first().map(|row| row.per_second / row.processes as f64) {
            same_batch.iter_mut().for_each(|row| row.efficiency = row.per_second / (alone * row.processes as f64));
        }
        let mut same_share = Vec::new();
        for &count in &counts {
            // Fewer samples may not come in as many parts.
            if work.share(count, count * samples).is_ok() {
                same_share.push(work.row(count, samples, items)?.0);
            }
        }
        Ok(Plan {
            device: title,
            nodes: options.nodes,
            processes_a_node: options.gpus,
            precision: B::Storage::NAME.to_owned(),
            unit,
            batch_size: batch,
            memory: memory.parts.into_iter().map(|Part { name, of, bytes }| MemoryPart { name, of, bytes }).collect(),
            memory_of_device,
            communication: found
                .traffic
                .iter()
                .map(|traffic| Sent {
                    what: traffic.what,
                    times_a_step: traffic.times,
                    bytes: traffic.bytes,
                    milliseconds: traffic.seconds * 1e3,
                    not_hidden_milliseconds: traffic.exposed * 1e3,
                })
                .collect(),
            compute_milliseconds: found.compute * 1e3,
            update_milliseconds: found.update * 1e3,
            step_milliseconds: found.seconds * 1e3,
            per_second: row.per_second,
            utilization: flops / found.seconds / peak,
            same_batch,
            same_share,
            largest_batch: work.largest_batch(world, share)?,
        })
    }
}
