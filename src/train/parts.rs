//! Checkpoints that several processes write together, each what it holds.
//!
//! `model-00002-of-00004.safetensors` holds what the second of four processes has of the tensors: of each, at most one piece, as a
//! vector called `NAME:FIRST`, whose elements are those of the tensor from number FIRST on. The file's metadata tells the tensors'
//! whole shapes. So a file can be read by any reader of safetensors, and the whole by any number of processes.
//!
//! Hugging Face gives the files of large models the same names; theirs tell no shapes, and each holds some tensors whole.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::checkpoint::{self, RunState, Which};
use super::step::Trainer;
use super::streamed::{self, Streamed};
use super::tensors::{self, HostTensor, TensorMap};
use crate::backend::ops::Update;
use crate::backend::{Arena, Backend};
use crate::error::{Error, Result};
use crate::parallel::{Collective, agree, broadcast};
use crate::plan::{ParamLayout, overlap};
use crate::real::Element;

/// Where a file's metadata tells the shapes of its tensors, as a JSON object.
const SHAPES: &str = "shapes";

/// Pieces of tensors, and the shapes of the whole.
#[derive(Default)]
struct Pieces<'a> {
    values: Vec<Streamed<'a>>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl<'a> Pieces<'a> {
    /// Adds the tensors' elements within `elements`; `buffer` holds them from its element `start` on.
    fn add<B: Backend, T: Element>(
        &mut self,
        backend: &'a B,
        (buffer, start): (&'a B::Buffer<T>, usize),
        layout: &ParamLayout,
        elements: &Range<usize>,
        prefix: &str,
    ) {
        for entry in layout.entries() {
            let (of, part) = (entry.range(), overlap(&entry.range(), elements));
            if part.is_empty() {
                continue;
            }
            let name = format!("{prefix}{}", entry.name);
            let piece = format!("{name}:{}", part.start - of.start);
            let place = (buffer, start + (part.start - elements.start));
            self.values.push(Streamed::of_buffer(piece, vec![part.len()], backend, place));
            self.shapes.insert(name, entry.shape.clone());
        }
    }

    fn write(self, path: &Path, mut metadata: HashMap<String, String>) -> Result<()> {
        let shapes = serde_json::to_string(&self.shapes).map_err(|e| Error::io("write", path, e.into()))?;
        metadata.insert(SHAPES.to_owned(), shapes);
        streamed::write(path, self.values, metadata)
    }
}

/// The name of a process's part of a file: `STEM-00001-of-00004.safetensors`.
fn part_name(stem: &str, rank: usize, world: usize) -> String {
    format!("{stem}-{:05}-of-{world:05}.safetensors", rank + 1)
}

/// As [`checkpoint::save`], by all processes together: each writes its part, and the folder gets its name when all are there.
///
/// # Errors
/// What the operating system or the device refuses to any process; what was there before stays whole.
pub fn save<B: Backend<Real = f32> + Update>(
    folder: &Path,
    trainer: &Trainer<B>,
    state: &RunState,
    collective: &dyn Collective,
) -> Result<PathBuf> {
    let state = &checkpoint::at(trainer, state);
    let path = folder.join(checkpoint::folder_name(state.step));
    let first = collective.rank() == 0;
    let begun = if first { checkpoint::begin(folder, &path) } else { Ok(None) };
    let aside = agree(collective, begun)?;
    // The first process's name for it, since each would choose its own; none where the checkpoint is there already.
    let name = aside.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let mut name = name.unwrap_or_default().into_bytes();
    broadcast(collective, 0, &mut name)?;
    if !name.is_empty() {
        let aside = folder.join(String::from_utf8_lossy(&name).as_ref());
        let written = agree(collective, write_part(&aside, trainer, state, collective));
        let ended = match written {
            Ok(()) if first => agree(collective, checkpoint::end(&aside, &path, trainer, state)),
            Ok(()) => agree(collective, Ok(())),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            if first {
                // The run ends by the error that came first; a next run sweeps what could not be removed.
                let _ = std::fs::remove_dir_all(&aside);
            }
            return Err(error);
        }
    }
    let pointed =
        if first { checkpoint::point(folder, Which::Latest, &checkpoint::folder_name(state.step)) } else { Ok(()) };
    agree(collective, pointed)?;
    Ok(path)
}

/// Writes what this process holds, and in the first one what all have alike.
fn write_part<B: Backend<Real = f32> + Update>(
    aside: &Path,
    trainer: &Trainer<B>,
    state: &RunState,
    collective: &dyn Collective,
) -> Result<()> {
    let (rank, world) = (collective.rank(), collective.world());
    let (arena, backend) = (trainer.arena(), trainer.backend());
    let elements = arena.own_elements();
    let metadata = checkpoint::metadata(state);
    let file = |stem: &str| aside.join(part_name(stem, rank, world));
    let (parameters, of) = arena.own_parameters();
    if arena.held.as_ref().is_some_and(|held| held.parameters.is_some()) {
        let mut model = Pieces::default();
        model.add(backend, (parameters, of.start), &arena.layout, &elements, "");
        kept(backend, arena, rank, &mut model);
        model.write(&file("model"), metadata.clone())?;
    } else if rank == 0 {
        streamed::write(&aside.join("model.safetensors"), checkpoint::model_tensors(trainer), metadata.clone())?;
    }
    let mut optimizer = Pieces::default();
    for (slot, name) in arena.slots.iter().zip(trainer.update_plan().slots) {
        optimizer.add(backend, (slot, 0), &arena.layout, &elements, &format!("{name}."));
    }
    optimizer.write(&file("optimizer"), metadata.clone())?;
    if let Some(average) = trainer.average() {
        let mut ema = Pieces::default();
        ema.add(backend, (average, 0), &arena.layout, &elements, "");
        kept(backend, arena, rank, &mut ema);
        ema.write(&file("ema"), metadata)?;
    }
    Ok(())
}

/// What is kept but not trained, which all processes have alike, goes into the first one's part.
fn kept<'a, B: Backend<Real = f32>>(backend: &'a B, arena: &'a Arena<B>, rank: usize, into: &mut Pieces<'a>) {
    if rank == 0 {
        let all = 0..arena.state_layout.padded_len();
        into.add(backend, (&arena.state, 0), &arena.state_layout, &all, "");
    }
}

/// The parts of a file that is there in parts: `path` is its whole's name, or that of any part. None where it is there whole, or
/// not at all.
///
/// # Errors
/// A part that is missing, or parts of several numbers of processes.
pub fn find(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) else { return Ok(None) };
    let stem = split(stem).map_or(stem, |(stem, _, _)| stem);
    if path.is_file() && split_path(path).is_none() {
        return Ok(None);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(None) };
    let mut found: Vec<(usize, usize)> = Vec::new();
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let parsed = name.strip_suffix(".safetensors").and_then(split);
        found.extend(parsed.filter(|(of, _, _)| *of == stem).map(|(_, rank, world)| (world, rank)));
    }
    let Some(&(world, _)) = found.first() else { return Ok(None) };
    found.sort_unstable();
    if found != (0..world).map(|rank| (world, rank)).collect::<Vec<_>>() {
        let expected = format!("{}, .. {}", part_name(stem, 0, world), part_name(stem, world - 1, world));
        let names: Vec<String> = found.iter().map(|&(world, rank)| part_name(stem, rank, world)).collect();
        return Err(Error::checkpoint(folder, format!("expected {expected}, found {} alone", names.join(", "))));
    }
    Ok(Some((0..world).map(|rank| folder.join(part_name(stem, rank, world))).collect()))
}

fn split_path(path: &Path) -> Option<(&str, usize, usize)> {
    split(path.file_stem()?.to_str()?)
}

/// `STEM-00002-of-00004` as stem, rank and number of processes.
fn split(stem: &str) -> Option<(&str, usize, usize)> {
    let (rest, world) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let (number, world): (usize, usize) = (number.parse().ok()?, world.parse().ok()?);
    (1..=world).contains(&number).then_some((stem, number - 1, world))
}

/// The whole tensors of a file's parts.
///
/// # Errors
/// A part that cannot be read or is damaged, or pieces that do not make up their tensors.
pub fn read(parts: &[PathBuf]) -> Result<TensorMap> {
    let mut whole = TensorMap::new();
    let mut pieces: BTreeMap<String, Vec<(usize, Vec<f32>)>> = BTreeMap::new();
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for path in parts {
        let (tensors, metadata) = tensors::read_file(path)?;
        let Some(told) = metadata.get(SHAPES) else {
            whole.extend(tensors);
            continue;
        };
        let told: BTreeMap<String, Vec<usize>> = serde_json::from_str(told).map_err(|e| {
            let expected = format!("expected the shapes of its tensors in metadata `{SHAPES}`");
            Error::checkpoint(path, format!("{expected}, found a damaged list ({e})"))
        })?;
        shapes.extend(told);
        for (name, tensor) in tensors {
            let piece = name.rsplit_once(':').and_then(|(name, first)| Some((name, first.parse::<usize>().ok()?)));
            let (of, first) = piece
                .ok_or_else(|| Error::checkpoint(path, format!("expected pieces called NAME:FIRST, found `{name}`")))?;
            pieces.entry(of.to_owned()).or_default().push((first, tensor.values));
        }
    }
    for (name, mut of) in pieces {
        of.sort_by_key(|(first, _)| *first);
        let shape = shapes.remove(&name).unwrap_or_default();
        let len = shape.iter().try_fold(1usize, |len, &d| len.checked_mul(d));
        let mut values = Vec::new();
        for (first, piece) in of {
            if first != values.len() {
                break;
            }
            values.extend(piece);
        }
        if len != Some(values.len()) {
            let folder = parts.first().and_then(|part| part.parent()).unwrap_or(Path::new("."));
            let problem = format!("expected pieces that make up `{name}` {shape:?}, found {} elements", values.len());
            return Err(Error::checkpoint(folder, format!("{problem} in a row; a part is of another checkpoint")));
        }
        whole.insert(name, HostTensor { shape, values });
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece<'a>(name: &str, first: usize, values: &'a [f32], shape: &[usize]) -> Pieces<'a> {
        Pieces {
            values: vec![Streamed::of_values(format!("{name}:{first}"), vec![values.len()], values)],
            shapes: BTreeMap::from([(name.to_owned(), shape.to_vec())]),
        }
    }

    #[test]
    fn a_large_model_of_hugging_face_is_read_from_any_of_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = |rank| folder.path().join(part_name("model", rank, 2));
        let tensor = |value| HostTensor { shape: vec![1, 1], values: vec![value] };
        for (rank, name) in ["a", "b"].into_iter().enumerate() {
            let tensors = TensorMap::from([(name.to_owned(), tensor(rank as f32))]);
            tensors::write(&path(rank), &tensors, HashMap::new()).unwrap();
        }
        let read = tensors::read(&path(1)).unwrap();
        assert_eq!(read, TensorMap::from([("a".to_owned(), tensor(0.0)), ("b".to_owned(), tensor(1.0))]));
    }

    #[test]
    fn pieces_make_up_their_tensor_and_what_is_missing_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = |rank| folder.path().join(part_name("model", rank, 2));
        piece("a.weight", 0, &[1.0, 2.0, 3.0, 4.0], &[2, 3]).write(&path(0), HashMap::new()).unwrap();
        let whole = folder.path().join("model.safetensors");
        let error = find(&whole).unwrap_err().to_string();
        assert!(error.contains("model-00001-of-00002.safetensors alone"), "{error}");
        piece("a.weight", 4, &[5.0, 6.0], &[2, 3]).write(&path(1), HashMap::new()).unwrap();
        for named in [whole, path(1)] {
            let read = tensors::read(&named).unwrap();
            assert_eq!(read["a.weight"].shape, [2, 3]);
            assert_eq!(read["a.weight"].values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        }
        piece("a.weight", 5, &[5.0], &[2, 3]).write(&path(1), HashMap::new()).unwrap();
        let error = tensors::read(&path(0)).unwrap_err().to_string();
        assert!(error.contains("`a.weight` [2, 3]") && error.contains("4 elements"), "{error}");
    }
}
