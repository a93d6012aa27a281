//! What the device can do at all: traffic through its memory, products of matrices, latencies, copies from and to the host.

use super::measure::{Asked, Ground, Limit, Settings, Task, measure};
use super::place::Bed;
use super::results::{Figure, Floor};
use super::speeds::Speeds;
use crate::backend::profile::{Kind, Probe, Traffic, WRITTEN};
use crate::backend::{Activations, Arena, Memory, StepContext};
use crate::error::Result;
use crate::model::layers::Linear;
use crate::model::{Alone, Input, Mode, Program, Value};
use crate::random::{Philox, Purpose};
use crate::real::Element;

/// Elements that are looked at.
const LOOKS: u64 = 64;
/// What they hold before they are counted up where they are.
const STARTS_AT: f64 = 0.5;
/// Bytes that a repetition within a cache goes through, in rounds.
const ROUNDS_BYTES: usize = 16 << 20;

/// Traffic through two buffers.
pub struct TrafficTask<B: Bed> {
    backend: B,
    traffic: Traffic,
    to: B::Buffer<f32>,
    from: B::Buffer<f32>,
    len: usize,
    rounds: usize,
    looks: u64,
}

impl<B: Bed> TrafficTask<B> {
    /// Through more memory than the caches hold.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn in_memory(backend: &B, traffic: Traffic) -> Result<Self> {
        let beyond = 5 * backend.cache_bytes() / 2 / size_of::<f32>();
        Self::new(backend, traffic, backend.copy_len().max(beyond), 1)
    }

    /// Through so many bytes in all, over and over.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn within(backend: &B, traffic: Traffic, bytes: usize) -> Result<Self> {
        let buffers = if traffic == Traffic::Copy { 2 } else { 1 };
        let most = if backend.kind() == Kind::Emulated { bytes } else { ROUNDS_BYTES };
        Self::new(backend, traffic, bytes / size_of::<f32>() / buffers, (most / bytes.max(1)).max(1))
    }

    fn new(backend: &B, traffic: Traffic, len: usize, rounds: usize) -> Result<Self> {
        let step = 4 * backend.parts();
        let len = (len / step).max(1) * step;
        let (mut to, mut from) = (backend.allocate(len)?, backend.allocate(len)?);
        let stream = Philox::new(1, Purpose::Sampling, 0);
        let tile: Vec<f32> = (0..len.min(1 << 20) as u64).map(|at| stream.uniform(at)).collect();
        // Both: pages that were never written are all the same one.
        for buffer in [&mut to, &mut from] {
            for offset in (0..len).step_by(tile.len()) {
                backend.upload(buffer, offset, &tile[..tile.len().min(len - offset)])?;
            }
        }
        Ok(TrafficTask { backend: backend.clone(), traffic, to, from, len, rounds, looks: 0 })
    }

    /// Bytes of a repetition, those read and those written.
    pub fn bytes(&self) -> f64 {
        let times = if matches!(self.traffic, Traffic::Copy | Traffic::InPlace) { 2 } else { 1 };
        (times * self.len * size_of::<f32>() * self.rounds) as f64
    }

    /// Positions that are looked at.
    fn positions(&self) -> Vec<usize> {
        match self.traffic {
            Traffic::Read => (0..self.backend.parts()).collect(),
            Traffic::Copy | Traffic::Write | Traffic::InPlace => {
                let stream = Philox::new(self.looks, Purpose::Sampling, 1);
                (0..LOOKS).map(|look| stream.below(look, self.len as u64) as usize).collect()
            }
        }
    }

    /// What should stand at a position of `to`.
    fn expected(&self, at: usize) -> Result<f64> {
        let read = |range: std::ops::Range<usize>| {
            let mut values = vec![0f32; range.len()];
            self.backend.download(&self.from, range.start, &mut values).map(|()| values)
        };
        Ok(match self.traffic {
            Traffic::Copy => f64::from(read(at..at + 1)?[0]),
            Traffic::Write => f64::from(WRITTEN),
            Traffic::InPlace => STARTS_AT + self.rounds as f64,
            Traffic::Read => {
                let part = self.len / self.backend.parts();
                read(at * part..(at + 1) * part)?.into_iter().map(f64::from).sum()
            }
        })
    }
}

impl<B: Bed> Task for TrafficTask<B> {
    fn run(&mut self) -> Result<()> {
        self.backend.traffic(self.traffic, &mut self.to, &self.from, self.len, self.rounds)
    }

    fn round_bytes(&self) -> usize {
        let buffers = if self.traffic == Traffic::Copy { 2 } else { 1 };
        buffers * self.len * size_of::<f32>()
    }

    fn prepare(&mut self) -> Result<()> {
        self.looks += 1;
        let start = if self.traffic == Traffic::InPlace { STARTS_AT as f32 } else { f32::NAN };
        for at in self.positions() {
            self.backend.upload(&mut self.to, at, &[start])?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        for at in self.positions() {
            let mut found = [0f32];
            self.backend.download(&self.to, at, &mut found)?;
            let (found, expected) = (f64::from(found[0]), self.expected(at)?);
            // Sums of millions of f32 are not exact, copies are.
            let tolerance = if self.traffic == Traffic::Read { 1e-2 * expected.abs() } else { 0.0 };
            // Written so that a value which is no number is wrong.
            if found.is_nan() || (found - expected).abs() > tolerance {
                return Ok(Some(format!("found {found} at {at}, expected {expected}")));
            }
        }
        Ok(None)
    }
}

/// A product of matrices: `y = x W^T`.
pub struct ProductTask<B: Bed> {
    backend: B,
    program: Program<B>,
    arena: Arena<B>,
    activations: Activations<B>,
    shape: [usize; 3],
    x: usize,
    y: usize,
    looks: u64,
}

impl<B: Bed> ProductTask<B> {
    /// Random matrices of `[rows, inputs]` and `[outputs, inputs]`.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn new(backend: &B, shape: [usize; 3]) -> Result<Self> {
        let [rows, inputs, outputs] = shape;
        let mut layer = Linear::new(outputs).without_bias();
        let Alone { program, parameters, .. } =
            Alone::plan(&mut layer, &Input::Real(vec![inputs]), rows, Mode::Inference)?;
        let (arena, mut activations) = (parameters.arena(backend, 1, 0)?, program.activations(backend)?);
        let mut x = 0;
        if let Value::Real(act) = program.input {
            x = activations.range(act).start;
            let stream = Philox::new(1, Purpose::Sampling, 0);
            let values: Vec<B::Storage> =
                (0..(rows * inputs) as u64).map(|at| B::Storage::from_f32(2.0 * stream.uniform(at) - 1.0)).collect();
            backend.upload(&mut activations.values, x, &values)?;
        }
        let y = activations.range(program.output).start;
        Ok(ProductTask { backend: backend.clone(), program, arena, activations, shape, x, y, looks: 0 })
    }

    /// Floating-point operations of it.
    pub fn flops(&self) -> f64 {
        self.program.flops() as f64
    }

    fn positions(&self) -> Vec<[usize; 2]> {
        let stream = Philox::new(self.looks, Purpose::Sampling, 1);
        let [rows, _, outputs] = self.shape;
        let at = |look, bound: usize| stream.below(look, bound as u64) as usize;
        (0..LOOKS).map(|look| [at(2 * look, rows), at(2 * look + 1, outputs)]).collect()
    }
}

/// How far an element of a product may be from that in f64, over the norms of row and column.
fn tolerance<B: Bed>(backend: &B) -> f64 {
    match B::Storage::NAME {
        "f32" if backend.product_bits() >= 23 => 1e-5,
        "f32" => 2e-3,
        _ => 1e-2,
    }
}

impl<B: Bed> Task for ProductTask<B> {
    fn run(&mut self) -> Result<()> {
        let mut memory = Memory { arena: &mut self.arena, activations: &mut self.activations };
        self.backend.run(&self.program.ops, &mut memory, &StepContext::default())
    }

    fn round_bytes(&self) -> usize {
        let [rows, inputs, outputs] = self.shape;
        (rows * inputs + inputs * outputs + rows * outputs) * size_of::<B::Storage>()
    }

    fn prepare(&mut self) -> Result<()> {
        self.looks += 1;
        let outputs = self.shape[2];
        for [row, column] in self.positions() {
            let nan = [B::Storage::from_f32(f32::NAN)];
            self.backend.upload(&mut self.activations.values, self.y + row * outputs + column, &nan)?;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        let [_, inputs, outputs] = self.shape;
        let within = tolerance(&self.backend);
        for [row, column] in self.positions() {
            let (mut x, mut y) = (vec![B::Storage::default(); inputs], [B::Storage::default()]);
            self.backend.download(&self.activations.values, self.x + row * inputs, &mut x)?;
            self.backend.download(&self.activations.values, self.y + row * outputs + column, &mut y)?;
            let mut w = vec![B::Real::default(); inputs];
            self.backend.download(&self.arena.parameters, column * inputs, &mut w)?;
            let (mut expected, mut xx, mut ww) = (0.0, 0.0, 0.0);
            for (x, w) in x.into_iter().zip(w) {
                // As the product reads it.
                let (x, w) = (x.f64(), B::Storage::from_f64(w.f64()).f64());
                expected += x * w;
                xx += x * x;
                ww += w * w;
            }
            let found = y[0].f64();
            if found.is_nan() || (found - expected).abs() > within * (xx * ww).sqrt() {
                return Ok(Some(format!("found {found} in row {row}, column {column}, expected {expected}")));
            }
        }
        Ok(None)
    }
}

/// A latency, or a copy between host and device.
struct ProbeTask<'a> {
    probe: Probe<'a>,
    expected: u64,
}

impl Task for ProbeTask<'_> {
    fn run(&mut self) -> Result<()> {
        (self.probe.work)()
    }

    fn round_bytes(&self) -> usize {
        self.probe.bytes.unwrap_or(0)
    }

    fn prepare(&mut self) -> Result<()> {
        self.expected = (self.probe.done)()? + 1;
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        let found = (self.probe.done)()?;
        Ok((found != self.expected).then(|| format!("{found} were done, expected {}", self.expected)))
    }
}

/// Products of the models: rows, inputs, outputs.
fn products<B: Bed>(backend: &B) -> Vec<[usize; 3]> {
    let models = [[128, 784, 256], [128, 256, 128], [768, 128, 384], [768, 128, 512], [768, 512, 128]];
    let others: &[[usize; 3]] = match backend.kind() {
        Kind::Host => &[[512; 3], [1024; 3], [2048; 3], [256, 768, 2304], [256, 768, 3072], [256, 3072, 768]],
        Kind::Gpu => &[
            [1024; 3],
            [2048; 3],
            [4096; 3],
            [8192; 3],
            [16_384, 768, 2304],
            [16_384, 768, 3072],
            [16_384, 3072, 768],
            [16_384, 768, 50_304],
        ],
        Kind::Emulated => return vec![[16, 32, 16], [32; 3]],
    };
    models.into_iter().chain(others.iter().copied()).collect()
}

/// A number of bytes as names have it.
fn bytes_text(bytes: usize) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 => format!("{}MiB", bytes >> 20),
        bytes => format!("{}KiB", bytes >> 10),
    }
}

/// Working sets: where they lie, and their bytes; none for the memory.
fn working_sets<B: Bed>(backend: &B) -> Vec<(String, Option<usize>)> {
    let inner = backend.inner_caches();
    let last = format!("L{}", inner.len() + 1);
    let last = if inner.is_empty() { "L2".to_owned() } else { last };
    let caches = inner.into_iter().chain([(last, backend.cache_bytes())]);
    let mut sets: Vec<(String, Option<usize>)> =
        caches.map(|(name, bytes)| (format!("{}_{name}", bytes_text(bytes / 2)), Some(bytes / 2))).collect();
    sets.push(("memory".to_owned(), None));
    sets
}

/// The figures of the suite.
///
/// # Errors
/// What the device reports.
pub fn figures<B: Bed>(
    backend: &B,
    ground: &dyn Ground,
    settings: &Settings,
    speeds: &Speeds,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let figure = |name: String, amount: (f64, &str)| Figure {
        suite: "device".to_owned(),
        name,
        amount: (amount.0, amount.1.to_owned()),
        ..Figure::default()
    };
    let words =
        [(Traffic::Copy, "copy"), (Traffic::Read, "read"), (Traffic::Write, "write"), (Traffic::InPlace, "in_place")];
    for (traffic, word) in words {
        for (place, bytes) in working_sets(backend) {
            let name = format!("{word}/{place}");
            if !wanted(&name) {
                continue;
            }
            let mut task = match bytes {
                Some(bytes) => TrafficTask::within(backend, traffic, bytes)?,
                None => TrafficTask::in_memory(backend, traffic)?,
            };
            let moved = task.bytes();
            let figure = Figure { bytes: Some(moved), ..figure(name, (moved, "byte")) };
            told(measure(ground, settings, &mut task, None, Asked { figure, limit: &|_| None })?)?;
        }
    }
    let precision = speeds.precision.name();
    for shape in products(backend) {
        let [rows, inputs, outputs] = shape;
        let name = format!("product/{rows}x{inputs}x{outputs}/{precision}");
        if !wanted(&name) {
            continue;
        }
        let mut task = ProductTask::new(backend, shape)?;
        let flops = task.flops();
        let limit = |_: Option<&_>| {
            let what = format!("this run's fastest product, {}", speeds.product_text());
            let floor = Floor { seconds: flops / speeds.product, what, doubt: speeds.product_doubt.clone() };
            Some(Limit { floor, passable: 1.0, least: flops / speeds.fastest_product, from_memory: false })
        };
        let figure =
            Figure { flops: Some(flops), bytes: Some(task.round_bytes() as f64), ..figure(name, (flops, "flop")) };
        told(measure(ground, settings, &mut task, None, Asked { figure, limit: &limit })?)?;
    }
    for probe in backend.probes()? {
        if !wanted(&probe.name) {
            continue;
        }
        let amount = probe.bytes.map_or((1.0, "time"), |bytes| (bytes as f64, "byte"));
        let figure = Figure { bytes: probe.bytes.map(|bytes| bytes as f64), ..figure(probe.name.clone(), amount) };
        let mut task = ProbeTask { probe, expected: 0 };
        told(measure(ground, settings, &mut task, None, Asked { figure, limit: &|_| None })?)?;
    }
    Ok(())
}
