//! Everything before the first step: the folder, the trainer, the checkpoint to go on from, the data.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::{Loop, model_input};
use crate::backend::Backend;
use crate::backend::ops::Update;
use crate::data::{InputSpec, Preprocess, SamplerOptions, TargetSpec};
use crate::error::{Error, Result};
use crate::optim::NormClip;
use crate::parallel::{Collective, GradientsOptions, Shard, agree, broadcast};
use crate::train::checkpoint::{self, RunState, Which};
use crate::train::files;
use crate::train::memory::{evaluated, of_the_last_batch};
use crate::train::metrics::MetricsWriter;
use crate::train::resident::{self, Source};
use crate::train::run::{Run, Start, steps_of};
use crate::train::sharing::{check_sharding, exchange};
use crate::train::step::{Trainer, TrainerParts};

impl<B: Backend<Real = f32> + Update> Loop<B> {
    /// Everything before the first step. What processes do together in it, all do, or none.
    pub(super) fn prepare(run: Run<B>) -> Result<Self> {
        let collective = Arc::clone(&run.collective);
        let (rank, world) = (collective.rank(), collective.world());
        let checkpoints = run.folder.join("checkpoints");
        let hash = blake3::hash(run.identity.as_bytes()).to_hex().to_string();
        let share = run.options.validate().and_then(|()| run.parallel.validate());
        let share = share.and_then(|()| run.parallel.share(rank, world, run.options.batch_size));
        let share = share.and_then(|share| check_sharding(&run).map(|()| share));
        let share = agree(&*collective, share)?;
        the_same_everywhere(&*collective, &run)?;
        // One process looks at the folder, and all go on from the checkpoint that it found.
        let found = if rank == 0 { look_at_folder(&run, &checkpoints, &hash) } else { Ok((None, None)) };
        let (mut lock, latest) = agree(&*collective, found)?;
        let latest = the_same_latest(&*collective, latest, &checkpoints)?;
        let sampler_options = SamplerOptions {
            batch_size: run.options.batch_size,
            accumulate: run.options.accumulate,
            seed: run.options.seed,
            sampling: run.sampling,
            drop_last: run.drop_last,
            share,
        };
        let input = run.splits.train.input();
        let make = || {
            let schedule = (&run.schedule, run.optimizer.learning_rate);
            let sampler = sampler_options.clone();
            let (steps, steps_per_epoch) = steps_of(&*run.splits.train, sampler, run.options.length, schedule)?;
            let sharding = run.parallel.sharding((rank, world), &share, run.options.accumulate);
            let sharding = Some(sharding).filter(|options| world > 1 && options.shard != Shard::None);
            let parts = TrainerParts {
                backend: run.backend,
                model: run.model,
                input: model_input(&input),
                batch_size: run.options.batch_size / share.of,
                accumulate: run.options.accumulate,
                optimizer: &run.optimizer,
                ema: run.options.ema,
                seed: run.options.seed,
            };
            let mut trainer = Trainer::sharded(parts, sharding)?;
            if let Some(left) = sampler_options.left(run.splits.train.len()) {
                trainer.plan_smaller(left).map_err(|e| of_the_last_batch(left, &e))?;
            }
            trainer.plan_evaluations(&evaluated(&run.splits, run.options.batch_size / share.of))?;
            if share.of > 1 || collective.is_queued() {
                let options = GradientsOptions { share, wire: run.parallel.wire, overlap: run.parallel.overlap };
                let exchange = exchange(&trainer, options, &collective, run.parallel.bucket_elements())?;
                trainer = trainer.sharing(share, exchange);
            }
            if let (Some(weights), None) = (&run.weights, &latest) {
                let (backend, arena) = trainer.parts_mut();
                checkpoint::load_weights(weights, backend, arena)?;
                trainer.restart_average()?;
            }
            let mut state = match &latest {
                Some(path) => {
                    let read = checkpoint::load(path, &mut trainer);
                    read.map_err(|error| checkpoint::or_before(error, &checkpoints, path))?
                }
                None => RunState::new(run.options.seed, hash, format!("{:?}", run.schedule)),
            };
            // Another was better later on, and this one removed, before the run went back to this step.
            state.best = state.best.filter(|best| checkpoint::is_there(&checkpoints, best.step));
            let first_pass = state.step * share.passes(run.options.accumulate);
            let table = resident::table(trainer.backend(), &run.splits.train, run.resident)?;
            let source = Source::new(&run.splits.train, table, sampler_options, first_pass, run.prefetch)?;
            Ok((trainer, state, source, steps, steps_per_epoch))
        };
        // Of several processes one may lack the memory or a file, and another has not read what is about to be removed.
        let (trainer, state, source, steps, steps_per_epoch) = agree(&*collective, make())?;
        // Nothing of an older run is touched until all of this one is known to be as it should.
        if rank == 0 {
            if run.start == Start::Overwrite {
                clear_folder(&run.folder)?;
            }
            fs::create_dir_all(&run.folder).map_err(|e| Error::io("create", &run.folder, e))?;
            lock = lock.map_or_else(|| lock_folder(&run.folder), |lock| Ok(Some(lock)))?;
            checkpoint::sweep(&checkpoints, state.step)?;
            if latest.is_some() {
                checkpoint::point_best(&checkpoints, state.best.map(|best| best.step))?;
            }
            files::write_whole(&run.folder.join("config.toml"), run.config.as_bytes())?;
            files::write_whole(&run.folder.join("preprocess.json"), run.preprocess.as_bytes())?;
        }
        // Nothing was chosen for this run yet: its first step does, in all processes when they are here.
        trainer.backend().keep_choices_in(&run.folder.join(CHOICES));
        let tokens_per_sample = match (&input, run.splits.train.target()) {
            (InputSpec::Tokens { context, .. }, TargetSpec::NextToken) => Some(*context),
            _ => None,
        };
        let program = trainer.program();
        let flops_of_sample = program.model_flops() as f64 / (run.options.batch_size / share.of) as f64;
        let utilization_of_sample = trainer.backend().peak_arithmetic().map(|peak| flops_of_sample / peak);
        let metrics = run.folder.join("metrics.jsonl");
        let metrics = (rank == 0).then(|| MetricsWriter::resume(&metrics, |record| state.keeps(record))).transpose()?;
        let seconds_before = state.seconds;
        Ok(Loop {
            collective,
            watch: run.watch,
            compare_every: run.parallel.check_every_steps,
            trainer,
            source,
            parts: share.of,
            options: run.options,
            peak: run.optimizer.learning_rate,
            clips: run.optimizer.clip.norm != NormClip::Off,
            clamps: run.optimizer.clip.value.is_some(),
            schedule: run.schedule,
            splits: run.splits,
            prefetch: run.prefetch,
            folder: run.folder,
            _lock: lock,
            checkpoints,
            interrupt: run.interrupt,
            abandon_at: run.abandon_at,
            state,
            metrics,
            steps,
            steps_per_epoch,
            tokens_per_sample,
            utilization_of_sample,
            began: Instant::now(),
            seconds_before,
            stopwatch: None,
            last_validation: None,
            ends_after: None,
        })
    }
}

/// The checkpoint that process 0 goes on from, in every process.
fn the_same_latest(
    collective: &dyn Collective,
    latest: Option<PathBuf>,
    checkpoints: &Path,
) -> Result<Option<PathBuf>> {
    let name = latest.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let mut bytes = name.unwrap_or_default().into_bytes();
    broadcast(collective, 0, &mut bytes)?;
    let name = String::from_utf8_lossy(&bytes).into_owned();
    Ok((!name.is_empty()).then(|| checkpoints.join(name)))
}

/// What of a run folder is a run's. Not `logs`: a launcher opens them before there is a run, and adds to what is there.
const OURS: [&str; 9] = [
    "config.toml",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "preprocess.json",
    "tensorboard",
    "checkpoints",
    "profile.json",
    CHOICES,
];

/// Where a device keeps what it chose by measuring.
const CHOICES: &str = "choices";

/// Whether the run may go on in its folder: a hold of it, where it is there, and the checkpoint to go on from.
fn look_at_folder<B: Backend>(run: &Run<B>, checkpoints: &Path, hash: &str) -> Result<(Option<File>, Option<PathBuf>)> {
    let folder = &run.folder;
    if run.start == Start::New && OURS.iter().any(|name| folder.join(name).exists()) {
        return Err(Error::config(
            folder.display().to_string(),
            "holds a run already; choose another folder with --out, go on with it by --resume, or replace it by --overwrite",
        ));
    }
    let lock = lock_folder(folder)?;
    if run.start != Start::Resume {
        return Ok((lock, None));
    }
    let kept = fs::read_to_string(folder.join("config.toml")).ok();
    let other = kept.as_ref().and_then(|kept| difference(kept, &run.config, &run.identity));
    let Some(latest) = checkpoint::find(checkpoints, Which::Latest)? else {
        // A run that ended before its first checkpoint begins again. What is not of this run is not written over.
        let is_this_run = kept.is_some() && other.is_none();
        if !is_this_run && OURS.iter().any(|name| folder.join(name).exists()) {
            let other =
                other.map_or_else(String::new, |[key, was, is]| format!(" ({key}: found {was}, expected {is})"));
            return Err(Error::config(
                folder.display().to_string(),
                format!(
                    "holds no checkpoint to go on from, and files that are not this run's{other}; choose another folder with --out, \
                     or replace what is there by --overwrite"
                ),
            ));
        }
        return Ok((lock, None));
    };
    let read = checkpoint::read_state(&latest);
    let state = read.map_err(|error| checkpoint::or_before(error, checkpoints, &latest))?;
    if state.config_hash != hash {
        let other = other.map_or_else(
            || "was made by another configuration than this run file's".to_owned(),
            |[key, was, is]| format!("was made with {key} = {was}, found {is}"),
        );
        return Err(Error::checkpoint(
            latest,
            format!(
                "{other}; resume with the run file and the --set options it was made with (its config.toml lies in the run folder), or \
                 train on in a new run whose model.weights names the old one's model.safetensors"
            ),
        ));
    }
    the_same_data(run)?;
    Ok((lock, Some(latest)))
}

/// A key that makes another run of this one, what a folder's config.toml says of it, and what this run does. `config` is the whole
/// of this run's, `identity` what of it makes it this run.
fn difference(kept: &str, config: &str, identity: &str) -> Option<[String; 3]> {
    let [kept, config, identity] = [kept, config, identity].map(keys);
    let more = kept.iter().filter(|(key, _)| !config.iter().any(|(other, _)| other == key));
    other_value(identity.iter().chain(more), [&kept, &config])
}

/// The first of some keys that has another value in the second of two lists than in the first, with both.
fn other_value<'k>(
    names: impl Iterator<Item = &'k (String, String)>,
    lists: [&[(String, String)]; 2],
) -> Option<[String; 3]> {
    let mut both = names.map(|(key, _)| (key, lists.map(|list| value_of(list, key))));
    both.find(|(_, [was, is])| was != is).map(|(key, [was, is])| [key.clone(), was, is])
}

/// The value of a key, or a word for none.
fn value_of(keys: &[(String, String)], wanted: &str) -> String {
    let found = keys.iter().find(|(key, _)| key == wanted);
    found.map_or_else(|| "nothing".to_owned(), |(_, value)| value.clone())
}

/// Keys with their sections, and values, of a file that is written a line a key.
fn keys(text: &str) -> Vec<(String, String)> {
    let mut section = String::new();
    let mut keys: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if let (true, Some((_, value))) = (line.starts_with([' ', ']']), keys.last_mut()) {
            // A value of several lines.
            *value += line.trim();
        } else if let Some(name) = line.strip_prefix('[') {
            section = name.trim_matches(['[', ']']).to_owned();
        } else if let Some((key, value)) = line.split_once(" = ") {
            keys.push((format!("{section}.{key}"), value.to_owned()));
        }
    }
    keys
}

/// Whether the data give what they gave when the run began, as far as `preprocess.json` tells: the position in the data, and the
/// numbers that samples become, hang on it.
fn the_same_data<B: Backend>(run: &Run<B>) -> Result<()> {
    let file = run.folder.join("preprocess.json");
    if !file.is_file() {
        return Ok(());
    }
    let text = fs::read_to_string(&file).map_err(|e| Error::io("read", &file, e))?;
    let saved = Preprocess::from_json(&text).map_err(|e| Error::data(&file, format!("cannot be used: {e}")))?;
    match saved.changed(&Preprocess::from_json(&run.preprocess)?) {
        None => Ok(()),
        Some(change) => Err(change.refused(
            &run.source,
            "put the data back as they were when the run began, or begin a new run by another --out",
        )),
    }
}

/// Whether all processes train the same: one whose machine holds an older copy of the run file or of the data would go its own way, and
/// nobody would say so. Where the files lie may differ.
fn the_same_everywhere<B: Backend>(collective: &dyn Collective, run: &Run<B>) -> Result<()> {
    if collective.world() == 1 {
        return Ok(());
    }
    let [config, preprocess] = [&run.config, &run.preprocess].map(|text| -> Result<String> {
        let mut bytes = text.clone().into_bytes();
        broadcast(collective, 0, &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    });
    let (config, preprocess) = (config?, preprocess?);
    let rank = collective.rank();
    let own = || -> Result<()> {
        let [first, own, identity] = [&config, &run.config, &run.identity].map(|text| keys(text));
        let is_in = |keys: &[(String, String)], wanted: &str| keys.iter().any(|(key, _)| key == wanted);
        // Of a run's own keys some are a process's; of others that this one lacks none is.
        let counts = |key: &str| {
            let section = key.split('.').next().unwrap_or(key);
            let is_shared = match section {
                "parallel" | "checkpoint" => true,
                "run" => is_in(&identity, key),
                _ => is_in(&identity, key) || !is_in(&own, key),
            };
            is_shared && !PLACES.contains(&key)
        };
        let names = own.iter().chain(&first).filter(|(key, _)| counts(key));
        if let Some([key, expected, is]) = other_value(names, [&first, &own]) {
            let found = format!(
                "found {is} in process {rank}, expected {expected}, as in process 0: give all the same run file"
            );
            return Err(Error::config(key, found));
        }
        let first = Preprocess::from_json(&preprocess)?;
        first
            .changed(&Preprocess::from_json(&run.preprocess)?)
            .map_or(Ok(()), |change| Err(change.of_process(&run.source)))
    };
    agree(collective, own())
}

/// Keys of where files lie.
const PLACES: [&str; 9] = [
    "data.path",
    "data.images",
    "data.labels",
    "data.test_images",
    "data.test_labels",
    "data.validation",
    "data.test",
    "data.classes",
    "model.weights",
];

/// Removes the run that a folder holds.
fn clear_folder(folder: &Path) -> Result<()> {
    for name in OURS {
        let path = folder.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path, e)),
            _ => {}
        }
    }
    Ok(())
}

/// A hold of the folder that ends with the process; none where it is not there, or its file system has no locks.
///
/// # Errors
/// Another process holds it.
fn lock_folder(folder: &Path) -> Result<Option<File>> {
    let Ok(file) = File::open(folder) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(Error::config(
            folder.display().to_string(),
            "another process trains in this folder; wait for its end, or choose another folder with --out",
        )),
        Err(TryLockError::Error(_)) => Ok(None),
    }
}
