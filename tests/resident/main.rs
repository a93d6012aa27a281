//! Data sets that lie on the device, which gathers its batches by the numbers of their samples: the bits are those of batches that are
//! read and copied, a step waits for nothing, and what cannot lie there is read and copied.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/device.rs"]
mod device;
#[path = "../common/emulator.rs"]
mod emulator;
mod runs;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use emulator::Emulator;
use half::{bf16, f16};
use warpstep::backend::cpu::Cpu;
use warpstep::backend::cuda::{Cuda, Device, emulated};
use warpstep::backend::ops::Update;
use warpstep::data::options::{
    InlineOptions, InlineTargets, LinesOptions, Part, Resident, Sampling, SplitOptions, TextOptions,
};
use warpstep::data::{
    Batch, DataOptions, Dataset, Draw, FormatOptions, Given, InputMut, InputSpec, Inputs, Layout, Loader, OpenedData,
    Pick, Picked, Table, TargetMut, TargetSpec, Targets, open,
};
use warpstep::model::Input;
use warpstep::model::presets::{
    Fit, Goal, GptOptions, LinearOptions, MlpOptions, ModelOptions, Preset, TextCnnOptions,
};
use warpstep::optim::{OptimizerOptions, Rule};
use warpstep::train::looping::model_input;
use warpstep::train::resident;
use warpstep::train::step::{StepReport, Trainer, TrainerParts};
use warpstep::{Error, Result};

/// Counts and free memory are the process's.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A data set and what is trained on it.
struct Case {
    name: &'static str,
    data: OpenedData,
    preset: Preset,
    fit: Fit,
    batch: usize,
}

/// Rows of `width` numbers, so that every value of a row is its own.
fn rows(count: usize, width: usize) -> Vec<Vec<f32>> {
    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 37.0;
    (0..count).map(|row| (0..width).map(|i| value(row * width + i)).collect()).collect()
}

fn inline(width: usize, targets: InlineTargets) -> OpenedData {
    let options = FormatOptions::Inline(InlineOptions { inputs: rows(29, width), targets });
    open(&DataOptions::new(options), None, 1).unwrap()
}

fn classes(count: usize) -> InlineTargets {
    InlineTargets::Class((0..29).map(|row| format!("class {}", row * 5 % count)).collect())
}

fn fit(goal: Goal, outputs: usize) -> Fit {
    Fit { vocabulary: None, context: None, goal, padding: None, outputs }
}

fn text(folder: &Path, context: usize, sampling: Sampling) -> OpenedData {
    let path = folder.join("text.txt");
    let words: Vec<String> = (0..60).map(|i| format!("{} of the {};", i * i % 17, i % 7)).collect();
    std::fs::write(&path, words.join(" ")).unwrap();
    let options = TextOptions { path, context, ..TextOptions::default() };
    let split = SplitOptions { validation: Some(Part::Fraction(0.2)), ..SplitOptions::default() };
    let options = DataOptions { split, sampling: Some(sampling), ..DataOptions::new(FormatOptions::Text(options)) };
    open(&options, None, 1).unwrap()
}

fn lines(folder: &Path) -> OpenedData {
    let path = folder.join("lines.tsv");
    let line = |i: usize| format!("{}\tthe {} is {} {}\n", ["bad", "good"][i % 2], i % 3, i % 5, ["so", "not"][i % 2]);
    std::fs::write(&path, (0..31).map(line).collect::<String>()).unwrap();
    let options = LinesOptions { path, min_count: 1, ..LinesOptions::default() };
    open(&DataOptions::new(FormatOptions::Lines(options)), None, 1).unwrap()
}

/// Rows that 16 bytes divide and rows that they do not, classes as whole numbers and as real ones, real targets, windows of a stream
/// in any order, lines of words.
fn cases(folder: &Path) -> Vec<Case> {
    let mlp = || Preset::Mlp(MlpOptions { hidden: vec![5], ..MlpOptions::default() });
    let case = |name, data, preset, fit, batch| Case { name, data, preset, fit, batch };
    let mut found = vec![
        case("16 values", inline(16, classes(3)), mlp(), fit(Goal::Classes(3), 3), 8),
        case("7 values", inline(7, classes(3)), mlp(), fit(Goal::Classes(3), 3), 5),
        case("2 values", inline(2, classes(3)), mlp(), fit(Goal::Classes(3), 3), 7),
        case(
            "classes as numbers",
            inline(3, classes(2)),
            Preset::Logistic(LinearOptions { zero_init: false, ..LinearOptions::default() }),
            fit(Goal::Classes(2), 1),
            4,
        ),
        case("real targets", inline(600, InlineTargets::Real(rows(29, 3))), mlp(), fit(Goal::Values(3), 3), 6),
    ];
    for (context, sampling) in [(8, Sampling::Random), (7, Sampling::Shuffle), (8, Sampling::Sequential)] {
        let data = text(folder, context, sampling);
        let InputSpec::Tokens { vocabulary, .. } = *data.input() else { panic!("text is tokens") };
        let preset = Preset::Gpt(GptOptions { layers: 1, heads: 2, width: 8, ..GptOptions::default() });
        let (vocabulary, context) = (Some(vocabulary), Some(context));
        let fit = Fit { vocabulary, context, goal: Goal::NextToken, padding: None, outputs: vocabulary.unwrap() };
        found.push(case("windows", data, preset, fit, 3));
    }
    let data = lines(folder);
    let &InputSpec::Tokens { vocabulary, context } = data.input() else { panic!("lines are tokens") };
    let preset =
        Preset::TextCnn(TextCnnOptions { width: 4, kernels: vec![2], filters: 3, ..TextCnnOptions::default() });
    let (vocabulary, context) = (Some(vocabulary), Some(context));
    let fit = Fit { vocabulary, context, padding: Some(0), ..fit(Goal::Classes(2), 2) };
    found.push(case("lines", data, preset, fit, 4));
    found
}

impl Case {
    fn trainer<B: Update>(&self, backend: B) -> Trainer<B> {
        let model = ModelOptions { preset: self.preset.clone(), loss: None, label_smoothing: 0.0 };
        let optimizer = OptimizerOptions::new(Rule::Adam { betas: [0.9, 0.99], epsilon: 1e-8 }, 0.01);
        Trainer::new(TrainerParts {
            backend,
            model: model.build(&self.fit).unwrap(),
            input: model_input(self.data.input()),
            batch_size: self.batch,
            accumulate: 1,
            optimizer: &optimizer,
            ema: None,
            seed: 5,
        })
        .unwrap()
    }

    fn table(&self) -> Arc<Table> {
        Table::new(Arc::clone(&self.data.splits.train)).expect("plain samples")
    }

    fn picks(&self, table: &Arc<Table>) -> Loader<Picked> {
        Loader::picks(table, self.data.sampler_options(self.batch, 3), 0, self.data.prefetch).unwrap()
    }
}

/// Queues steps, and takes what they found as it comes.
fn steps<B: Update, T>(trainer: &mut Trainer<B>, loader: &mut Loader<T>, count: usize) -> Vec<StepReport>
where
    T: Send + 'static,
    for<'a> &'a T: Into<Given<'a>>,
{
    let mut reports = Vec::new();
    for _ in 0..count {
        let batch = loader.next().unwrap().unwrap();
        trainer.queue(&batch, Some(0.01)).unwrap();
        loader.recycle(batch);
        reports.extend(trainer.finished(false).unwrap());
    }
    while let Some(report) = trainer.finished(true).unwrap() {
        reports.push(report);
    }
    reports
}

fn parameters<B: Update>(trainer: &Trainer<B>) -> Vec<B::Real> {
    let arena = trainer.arena();
    let mut values = vec![B::Real::default(); arena.layout.padded_len()];
    trainer.backend().download(&arena.parameters, 0, &mut values).unwrap();
    values
}

/// Nine steps of every case, over more than one pass, by both ways.
fn the_same_bits<B: Update>(backend: impl Fn() -> B) {
    let folder = tempfile::tempdir().unwrap();
    for case in cases(folder.path()) {
        let mut copied = case.trainer(backend());
        let options = case.data.sampler_options(case.batch, 3);
        let train = Arc::clone(&case.data.splits.train);
        let mut loader = Loader::train(train, options, 0, case.data.prefetch).unwrap();
        let expected = steps(&mut copied, &mut loader, 9);
        let mut gathered = case.trainer(backend());
        let found = steps(&mut gathered, &mut case.picks(&case.table()), 9);
        assert_eq!(found, expected, "{}", case.name);
        assert!(found.windows(2).all(|pair| pair[0].loss != pair[1].loss), "{}: {found:?}", case.name);
        assert!(parameters(&gathered) == parameters(&copied), "{}: other parameters", case.name);
    }
}

#[test]
fn on_the_cpu_samples_are_read_to_the_same_bits() {
    the_same_bits(Cpu::<f32>::new);
    the_same_bits(Cpu::<f64>::new);
}

#[test]
fn on_a_device_samples_are_gathered_to_the_same_bits() {
    let _alone = alone();
    let Some(device) = device::device() else { return };
    the_same_bits(|| Cuda::<f32>::new(device.clone()));
    the_same_bits(|| Cuda::<bf16>::new(device.clone()));
    the_same_bits(|| Cuda::<f16>::new(device.clone()));
}

#[test]
fn a_large_batch_that_several_threads_read_is_the_batch() {
    let data = inline(4000, classes(2));
    let case = Case {
        name: "large",
        data,
        preset: Preset::Mlp(MlpOptions { hidden: vec![2], ..MlpOptions::default() }),
        fit: fit(Goal::Classes(2), 2),
        batch: 29,
    };
    let mut gathered = case.trainer(Cpu::<f32>::new());
    let found = steps(&mut gathered, &mut case.picks(&case.table()), 3);
    let mut copied = case.trainer(Cpu::<f32>::new());
    let mut loader = case.data.train_batches(29, 3, 0).unwrap();
    assert_eq!(found, steps(&mut copied, &mut loader, 3));
}

#[test]
fn picks_name_the_samples_that_batches_hold_the_last_of_a_pass_included() {
    let folder = tempfile::tempdir().unwrap();
    let mut several = false;
    for case in cases(folder.path()) {
        let table = case.table();
        let mut options = case.data.sampler_options(case.batch, 3);
        options.drop_last = false;
        let mut picks = Loader::picks(&table, options.clone(), 2, case.data.prefetch).unwrap();
        let mut batches = Loader::train(Arc::clone(&case.data.splits.train), options, 2, case.data.prefetch).unwrap();
        let mut sizes = std::collections::BTreeSet::new();
        for _ in 0..40 {
            let (picked, batch): (Picked, Batch) = (picks.next().unwrap().unwrap(), batches.next().unwrap().unwrap());
            assert_eq!(picked.samples(), batch.samples);
            sizes.insert(batch.samples);
            let mut found = Batch::zeros(table.input(), table.target(), batch.samples);
            let [inputs, targets] = table.each();
            for (at, &row) in picked.rows().iter().enumerate() {
                let (of_input, of_target) = (at * inputs..(at + 1) * inputs, at * targets..(at + 1) * targets);
                let input = match &mut found.inputs {
                    Inputs::Real(values) => InputMut::Real(&mut values[of_input]),
                    Inputs::Tokens(values) => InputMut::Tokens(&mut values[of_input]),
                };
                let target = match &mut found.targets {
                    Targets::Index(values) => TargetMut::Index(&mut values[of_target]),
                    Targets::Real(values) => TargetMut::Real(&mut values[of_target]),
                };
                table.read(row, input, target).unwrap();
            }
            assert_eq!(found, batch, "{}", case.name);
            picks.recycle(picked);
        }
        let ragged = case.data.sampling != Sampling::Random && !table.dataset().len().is_multiple_of(case.batch);
        assert_eq!(sizes.len() > 1, ragged, "{}: {sizes:?}", case.name);
        several |= ragged && table.layout() == Layout::Windows;
    }
    assert!(several, "no pass over windows ended with a smaller batch");
}

#[test]
fn a_step_copies_numbers_of_samples_alone_waits_for_nothing_and_allocates_nothing() {
    let _alone = alone();
    let Some(device) = device::device() else { return };
    let Some(emulator) = Emulator::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut kernels = std::collections::BTreeSet::new();
    for case in cases(folder.path()) {
        let mut trainer = case.trainer(Cuda::<bf16>::new(device.clone()));
        let mut loader = case.picks(&case.table());
        // Both slots: run once as they are, then recorded.
        steps(&mut trainer, &mut loader, 4);
        emulator.reset();
        steps(&mut trainer, &mut loader, 5);
        let host = emulator.host();
        assert_eq!((host.graph_launches, host.launches), (5, 5), "{}: {host:?}", case.name);
        assert_eq!((host.allocations, host.frees, host.host_allocations), (0, 0, 0), "{}: {host:?}", case.name);
        // Numbers of samples and scalars.
        assert_eq!((host.synchronizations, host.copies_in), (0, 10), "{}: {host:?}", case.name);
        let gathers = emulator.kernels().into_iter().filter(|(name, _)| name.starts_with("gather_"));
        kernels.extend(gathers.map(|(name, _)| name));
    }
    // Rows of 16, 7, 2, 3 and 600 values of 2 bytes; tokens of 4.
    let expected = ["gather_16_4", "gather_2_4", "gather_4_4", "gather_2_2", "gather_16_2"];
    for kernel in expected {
        assert!(kernels.contains(kernel), "{kernel} is not among {kernels:?}");
    }
}

#[test]
fn the_memory_told_is_the_memory_taken_and_is_free_when_the_table_goes() {
    let _alone = alone();
    let Some(device) = device::device() else { return };
    if !emulated::is_active() {
        println!("skipped: only the emulated device tells free memory to the byte");
        return;
    }
    fn check<B: Update>(device: &Device, backend: B, case: &Case) {
        let free = || device.memory().unwrap().0;
        let mut trainer = case.trainer(backend);
        // What a first step takes besides.
        let other = case.table();
        steps(&mut trainer, &mut case.picks(&other), 2);
        let (table, before) = (case.table(), free());
        steps(&mut trainer, &mut case.picks(&table), 1);
        let (taken, told) = (before - free(), B::table_room(&table));
        assert!(taken.abs_diff(told) <= 1, "{}: {taken} bytes, not {told}", case.name);
        drop(table);
        assert_eq!(free(), before, "{}", case.name);
    }
    let folder = tempfile::tempdir().unwrap();
    // A class that is kept as a real value is told as a whole number, which is not smaller.
    for case in cases(folder.path()).iter().filter(|case| case.name != "classes as numbers") {
        check(&device, Cuda::<f32>::new(device.clone()), case);
        check(&device, Cuda::<bf16>::new(device.clone()), case);
    }
}

/// A data set that is only described.
struct Described {
    samples: usize,
    plain: bool,
}

impl Dataset for Described {
    fn len(&self) -> usize {
        self.samples
    }
    fn input(&self) -> InputSpec {
        InputSpec::Real { shape: vec![1000] }
    }
    fn target(&self) -> TargetSpec {
        TargetSpec::Real { width: 1 }
    }
    fn read(&self, _: Pick, _: Option<Draw>, _: InputMut<'_>, _: TargetMut<'_>) -> Result<()> {
        Err(Error::Training("nothing is read".into()))
    }
    fn is_plain(&self) -> bool {
        self.plain
    }
}

#[test]
fn a_data_set_is_kept_unasked_where_a_quarter_of_what_is_free_holds_it() {
    let _alone = alone();
    let cpu = Cpu::<f32>::new();
    let described = |samples, plain| -> Arc<dyn Dataset> { Arc::new(Described { samples, plain }) };
    let kept = |samples, asked| resident::table(&cpu, &described(samples, true), asked).unwrap().is_some();
    assert!(kept(1 << 30, Resident::Auto), "the CPU reads samples where they are");
    assert!(!kept(10, Resident::Never));
    assert!(resident::table(&cpu, &described(10, false), Resident::Auto).unwrap().is_none());
    let Err(Error::Config { .. }) = resident::table(&cpu, &described(10, false), Resident::Always) else {
        panic!("samples that are not plain cannot be kept");
    };
    let Some(device) = device::device() else { return };
    if !emulated::is_active() {
        println!("skipped: only the emulated device tells free memory to the byte");
        return;
    }
    let free = device.memory().unwrap().0;
    let wide = Cuda::<f32>::new(device.clone());
    let most = free / 4 / (4 * 1001);
    let kept = |samples, asked| resident::table(&wide, &described(samples, true), asked).unwrap().is_some();
    assert!(kept(most - 8, Resident::Auto) && !kept(most + 8, Resident::Auto) && kept(most + 8, Resident::Always));
    let far_too_large = described(8 * most, true);
    let Err(Error::Config { .. }) = resident::table(&wide, &far_too_large, Resident::Always) else {
        panic!("more than what is free cannot be kept");
    };
    let narrow = Cuda::<bf16>::new(device);
    assert!(resident::table(&narrow, &described(most + 8, true), Resident::Auto).unwrap().is_some());
}

#[test]
fn a_model_of_another_input_is_refused() {
    let case = Case {
        name: "real",
        data: inline(4, classes(2)),
        preset: Preset::Mlp(MlpOptions { hidden: vec![2], ..MlpOptions::default() }),
        fit: fit(Goal::Classes(2), 2),
        batch: 3,
    };
    let mut trainer = case.trainer(Cpu::<f32>::new());
    assert!(matches!(model_input(case.data.input()), Input::Real(_)));
    let mut picked = Picked::new(&case.table());
    picked.set(&[0, 28, 1, 27].map(Pick::Sample)).unwrap();
    assert!(trainer.queue(&picked, Some(0.1)).is_err(), "four samples for three");
    assert!(picked.set(&[Pick::Sample(29)]).is_err() && picked.set(&[Pick::Window(0)]).is_err());
    let folder = tempfile::tempdir().unwrap();
    let words = Table::new(Arc::clone(&lines(folder.path()).splits.train)).unwrap();
    let mut picked = Picked::new(&words);
    picked.set(&[Pick::Sample(0), Pick::Sample(1), Pick::Sample(2)]).unwrap();
    assert!(trainer.queue(&picked, Some(0.1)).is_err(), "words for real values");
}
