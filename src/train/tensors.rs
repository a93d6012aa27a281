//! Named tensors in safetensors files, under the names that their PyTorch twins have.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytemuck::Pod;
use safetensors::tensor::{Dtype, Metadata};

use super::parts;
use super::streamed::{self, Streamed};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::host;
use crate::plan::{ParamEntry, ParamLayout, overlap};
use crate::real::Element;

pub use crate::model::interop::{HostTensor, TensorMap};

/// How the files begin that `torch.save` writes.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

/// Where tensors come from, and what to do where they are of another model.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    path: &'a Path,
    advice: &'static str,
}

impl<'a> Origin<'a> {
    /// A file that a run wrote: it is the run file that has to be the right one.
    pub fn of_run(path: &'a Path) -> Self {
        Origin { path, advice: "use the run file it was made with" }
    }

    /// The weights that a run is to begin with: what has to change is the model that its file describes.
    pub fn of_weights(path: &'a Path) -> Self {
        let advice = "give [model] the keys that the model in model.weights has, or leave model.weights out";
        Origin { path, advice }
    }

    /// The file.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    fn another_model(&self, problem: &str) -> Error {
        Error::checkpoint(self.path, format!("is of another model: {problem}; {}", self.advice))
    }
}

/// Copies tensors into an arena; `prefix` goes before each name. Taken tensors are removed from `tensors`.
///
/// # Errors
/// A tensor that is missing or has another shape: its origin is said to be of another model.
pub fn upload<B: Backend, T: Element>(
    backend: &B,
    buffer: &mut B::Buffer<T>,
    layout: &ParamLayout,
    prefix: &str,
    tensors: &mut TensorMap,
    origin: Origin<'_>,
) -> Result<()> {
    upload_part(backend, (buffer, 0), layout, &(0..layout.padded_len()), prefix, tensors, origin)
}

/// As [`upload`], of the elements of the arena that `buffer` holds from its element `start` on; tensors are taken whole.
///
/// # Errors
/// As [`upload`].
pub fn upload_part<B: Backend, T: Element>(
    backend: &B,
    (buffer, start): (&mut B::Buffer<T>, usize),
    layout: &ParamLayout,
    elements: &Range<usize>,
    prefix: &str,
    tensors: &mut TensorMap,
    origin: Origin<'_>,
) -> Result<()> {
    for entry in layout.entries() {
        let tensor = take_one(entry, layout, prefix, tensors, origin)?;
        let part = overlap(&entry.range(), elements);
        if part.is_empty() {
            continue;
        }
        let values = tensor.values.into_iter().skip(part.start - entry.offset).take(part.len());
        let values: Vec<T> = values.map(T::from_f32).collect();
        backend.upload(buffer, start + (part.start - elements.start), &values)?;
    }
    Ok(())
}

/// Takes the tensors of a layout, as [`upload`] does, and copies them nowhere.
///
/// # Errors
/// As [`upload`].
pub fn take(layout: &ParamLayout, tensors: &mut TensorMap, origin: Origin<'_>) -> Result<()> {
    layout.entries().iter().try_for_each(|entry| take_one(entry, layout, "", tensors, origin).map(drop))
}

fn take_one(
    entry: &ParamEntry,
    layout: &ParamLayout,
    prefix: &str,
    tensors: &mut TensorMap,
    origin: Origin<'_>,
) -> Result<HostTensor> {
    let name = format!("{prefix}{}", entry.name);
    let Some(tensor) = tensors.remove(&name) else {
        if let Some(dtype) = left_out(origin.path, &name) {
            let problem = format!("expected tensor `{name}` in F32, F16, BF16 or F64, found it in {dtype}");
            return Err(Error::checkpoint(origin.path, problem));
        }
        // What has a place of its own is none that was misnamed.
        let placed = |key: &str| key.strip_prefix(prefix).is_some_and(|key| layout.get(key).is_some());
        let near = tensors.keys().filter(|key| !placed(key)).min_by_key(|key| strsim::levenshtein(key, &name));
        let has = near.map_or_else(|| "none".to_owned(), |n| format!("`{n}`"));
        return Err(origin.another_model(&format!("expected tensor `{name}` {:?}, found {has}", entry.shape)));
    };
    if tensor.shape != entry.shape {
        let problem = format!("expected `{name}` of shape {:?}, found {:?}", entry.shape, tensor.shape);
        return Err(origin.another_model(&problem));
    }
    Ok(tensor)
}

/// Says what is wrong when tensors are left that the model has no place for.
///
/// # Errors
/// A tensor is left, other than PyTorch's `num_batches_tracked`.
pub fn nothing_left(tensors: &TensorMap, origin: Origin<'_>) -> Result<()> {
    match tensors.keys().find(|name| !name.ends_with("num_batches_tracked")) {
        None => Ok(()),
        Some(name) => Err(origin.another_model(&format!("found tensor `{name}`, which this one has not"))),
    }
}

/// Writes tensors to a safetensors file and flushes it.
///
/// # Errors
/// What the operating system refuses.
pub fn write(path: &Path, tensors: &TensorMap, metadata: HashMap<String, String>) -> Result<()> {
    let all = tensors.iter();
    let all = all.map(|(name, tensor)| Streamed::of_values(name.clone(), tensor.shape.clone(), &tensor.values));
    streamed::write(path, all.collect(), metadata)
}

/// Whether a safetensors file is there, whole or in [parts].
pub fn exists(path: &Path) -> bool {
    path.is_file() || matches!(parts::find(path), Ok(Some(_)) | Err(_))
}

/// Reads all tensors of a safetensors file, or of a file's [parts] where it is there in parts; f16, bf16 and f64 become f32, other
/// types are left out.
///
/// # Errors
/// A file that cannot be read, or is cut short or damaged.
pub fn read(path: &Path) -> Result<TensorMap> {
    match parts::find(path)? {
        Some(parts) => parts::read(&parts),
        None => Ok(read_file(path)?.0),
    }
}

/// Reads all tensors of one file as [`read`] does, and its metadata: one after the other, each into its place.
///
/// # Errors
/// As [`read`].
pub fn read_file(path: &Path) -> Result<(TensorMap, HashMap<String, String>)> {
    let refused = |e| Error::io("read", path, e);
    let file = File::open(path).map_err(refused)?;
    let (first, header) = read_header(&file, path)?;
    let mut tensors = TensorMap::new();
    for name in header.offset_keys() {
        let Some(info) = header.info(&name) else { continue };
        let elements = info.shape.iter().product();
        let at = first + info.data_offsets.0 as u64;
        let values = match info.dtype {
            Dtype::F32 => {
                let mut values: Vec<f32> = host::zeros(elements)?;
                file.read_exact_at(bytemuck::cast_slice_mut(&mut values), at).map_err(refused)?;
                values
            }
            Dtype::F16 => read_as(&file, at, elements, half::f16::to_f32).map_err(refused)?,
            Dtype::BF16 => read_as(&file, at, elements, half::bf16::to_f32).map_err(refused)?,
            Dtype::F64 => read_as(&file, at, elements, |value: f64| value as f32).map_err(refused)?,
            _ => continue,
        };
        tensors.insert(name, HostTensor { shape: info.shape.clone(), values });
    }
    Ok((tensors, header.metadata().clone().unwrap_or_default()))
}

/// The type of a tensor that [`read`] leaves out for its type; none where there is no such tensor.
fn left_out(path: &Path, name: &str) -> Option<Dtype> {
    let files = parts::find(path).ok()?.unwrap_or_else(|| vec![path.to_owned()]);
    files.iter().find_map(|path| {
        let (_, header) = read_header(&File::open(path).ok()?, path).ok()?;
        let dtype = header.info(name)?.dtype;
        (!matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64)).then_some(dtype)
    })
}

/// Values of another type, from byte `at` of a file on.
fn read_as<T: Pod>(file: &File, at: u64, elements: usize, f32_of: impl Fn(T) -> f32) -> std::io::Result<Vec<f32>> {
    let mut stored = vec![T::zeroed(); elements];
    file.read_exact_at(bytemuck::cast_slice_mut(&mut stored), at)?;
    Ok(stored.into_iter().map(f32_of).collect())
}

/// What a safetensors file says of its tensors, which are all there, and the byte from which on their places count.
fn read_header(file: &File, path: &Path) -> Result<(u64, Metadata)> {
    /// That of the library: no file has more.
    const LONGEST: u64 = 100_000_000;
    let refused = |e| Error::io("read", path, e);
    let damaged = |problem: String| {
        let found = format!("found one that is cut short or damaged, or another kind of file ({problem})");
        Error::checkpoint(path, format!("expected a whole safetensors file, {found}"))
    };
    let bytes = file.metadata().map_err(refused)?.len();
    let mut length = [0; 8];
    let behind = bytes.checked_sub(length.len() as u64).ok_or_else(|| damaged(format!("it has {bytes} bytes")))?;
    file.read_exact_at(&mut length, 0).map_err(refused)?;
    if length.starts_with(ZIP_MAGIC) {
        let problem = "is a file of torch.save, expected safetensors; write it anew by safetensors.torch.save_file";
        return Err(Error::checkpoint(path, problem));
    }
    let told = u64::from_le_bytes(length);
    if told > behind.min(LONGEST) {
        return Err(damaged(format!("its header is said to have {told} bytes")));
    }
    let mut header = vec![0; told as usize];
    file.read_exact_at(&mut header, length.len() as u64).map_err(refused)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| damaged(format!("its header: {e}")))?;
    // That tensors lie one behind the other, each with the bytes of its shape, the library has seen to.
    let end = header.data_len();
    if end as u64 != behind - told {
        return Err(damaged(format!("its tensors have {} bytes, and it tells of {end}", behind - told)));
    }
    Ok((bytes - (behind - told), header))
}

/// The blake3 hash of a tensor's shape and bytes.
pub fn hash(tensor: &HostTensor) -> blake3::Hash {
    let mut hasher = hash_of_shape(&tensor.shape);
    hasher.update(bytemuck::cast_slice(&tensor.values));
    hasher.finalize()
}

/// What the hash of a tensor of this shape begins with.
pub(super) fn hash_of_shape(shape: &[usize]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    for &dimension in shape {
        hasher.update(&(dimension as u64).to_le_bytes());
    }
    hasher
}
