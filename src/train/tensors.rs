//! Named tensors in safetensors files, under the names that their PyTorch twins have.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{files, parts};
use crate::backend::{Arena, Backend};
use crate::error::{Error, Result};
use crate::host;
use crate::plan::{ParamLayout, overlap};
use crate::real::Element;

pub use crate::model::interop::{HostTensor, TensorMap};

/// How an error about a file of another model begins, and what it says to do.
const ANOTHER: &str = "is of another model";
const ITS_RUN_FILE: &str = "use the run file it was made with";

/// How the files begin that `torch.save` writes.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

/// The error about weights that a run is to begin with: what has to change is the model that its file describes.
pub fn of_weights(error: Error) -> Error {
    let Error::Checkpoint { path, problem } = error else { return error };
    let advice = "give [model] the keys that the model in model.weights has, or leave model.weights out";
    Error::checkpoint(path, problem.replace(ITS_RUN_FILE, advice))
}

/// Copies the tensors of an arena to the host; `prefix` goes before each name.
///
/// # Errors
/// A device that failed.
pub fn download<B: Backend, T: Element>(
    backend: &B,
    buffer: &B::Buffer<T>,
    layout: &ParamLayout,
    prefix: &str,
    into: &mut TensorMap,
) -> Result<()> {
    for entry in layout.entries() {
        let mut values: Vec<T> = host::zeros(entry.len)?;
        backend.download(buffer, entry.offset, &mut values)?;
        let values = values.into_iter().map(Element::f32).collect();
        into.insert(format!("{prefix}{}", entry.name), HostTensor { shape: entry.shape.clone(), values });
    }
    Ok(())
}

/// Copies an arena's parameters to the host, from where the device keeps all of them.
///
/// # Errors
/// A device that failed.
pub fn download_parameters<B: Backend>(backend: &B, arena: &Arena<B>, into: &mut TensorMap) -> Result<()> {
    if backend.stores_alone(arena) || arena.shares_out_masters() {
        download(backend, &arena.stored, &arena.layout, "", into)
    } else {
        download(backend, &arena.parameters, &arena.layout, "", into)
    }
}

/// Copies tensors into an arena; `prefix` goes before each name. Taken tensors are removed from `tensors`.
///
/// # Errors
/// A tensor that is missing or has another shape: `path` is said to be of another model.
pub fn upload<B: Backend, T: Element>(
    backend: &B,
    buffer: &mut B::Buffer<T>,
    layout: &ParamLayout,
    prefix: &str,
    tensors: &mut TensorMap,
    path: &Path,
) -> Result<()> {
    upload_part(backend, (buffer, 0), layout, &(0..layout.padded_len()), prefix, tensors, path)
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
    path: &Path,
) -> Result<()> {
    for entry in layout.entries() {
        let name = format!("{prefix}{}", entry.name);
        let Some(tensor) = tensors.remove(&name) else {
            // What has a place of its own is none that was misnamed.
            let placed = |key: &str| key.strip_prefix(prefix).is_some_and(|key| layout.get(key).is_some());
            let near = tensors.keys().filter(|key| !placed(key)).min_by_key(|key| strsim::levenshtein(key, &name));
            let has = near.map_or_else(|| "none".to_owned(), |n| format!("`{n}`"));
            let problem = format!("{ANOTHER}: expected tensor `{name}` {:?}, found {has}; {ITS_RUN_FILE}", entry.shape);
            return Err(Error::checkpoint(path, problem));
        };
        if tensor.shape != entry.shape {
            let problem = format!(
                "{ANOTHER}: expected `{name}` of shape {:?}, found {:?}; {ITS_RUN_FILE}",
                entry.shape, tensor.shape
            );
            return Err(Error::checkpoint(path, problem));
        }
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

/// Says what is wrong when tensors are left that the model has no place for.
///
/// # Errors
/// A tensor is left, other than PyTorch's `num_batches_tracked`.
pub fn nothing_left(tensors: &TensorMap, path: &Path) -> Result<()> {
    match tensors.keys().find(|name| !name.ends_with("num_batches_tracked")) {
        None => Ok(()),
        Some(name) => {
            let problem = format!("{ANOTHER}: found tensor `{name}`, which this one has not; {ITS_RUN_FILE}");
            Err(Error::checkpoint(path, problem))
        }
    }
}

/// Writes tensors to a safetensors file and flushes it.
///
/// # Errors
/// What the operating system refuses.
pub fn write(path: &Path, tensors: &TensorMap, metadata: HashMap<String, String>) -> Result<()> {
    let refused = |e: safetensors::SafeTensorError| Error::io("write", path, std::io::Error::other(e.to_string()));
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let bytes: &[u8] = bytemuck::cast_slice(&tensor.values);
            TensorView::new(Dtype::F32, tensor.shape.clone(), bytes).map(|view| (name.as_str(), view))
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(refused)?;
    // The library's file is for its owner alone, whatever a file of this process is for.
    let made = File::create(path).and_then(|file| file.metadata()).map_err(|e| Error::io("create", path, e))?;
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(refused)?;
    std::fs::set_permissions(path, made.permissions()).map_err(|e| Error::io("give permissions to", path, e))?;
    sort_metadata(path).map_err(|e| Error::io("write", path, e))?;
    files::sync(path)
}

/// Puts the metadata of a file that the library wrote, which has them first and in any order, in order of their keys, so that the same
/// tensors make the same file.
fn sort_metadata(path: &Path) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = vec![0; usize::try_from(u64::from_le_bytes(length)).map_err(std::io::Error::other)?];
    file.read_exact(&mut header)?;
    let Some(rest) = header.strip_prefix(METADATA) else { return Ok(()) };
    let mut sorted = serde_json::Deserializer::from_slice(rest).into_iter::<BTreeMap<String, String>>();
    let Some(Ok(metadata)) = sorted.next() else { return Ok(()) };
    let text = serde_json::to_vec(&metadata)?;
    if text.len() == sorted.byte_offset() {
        file.seek(SeekFrom::Start((length.len() + METADATA.len()) as u64))?;
        file.write_all(&text)?;
    }
    Ok(())
}

/// How a header begins.
const METADATA: &[u8] = br#"{"__metadata__":"#;

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

/// Reads all tensors of one file as [`read`] does, and its metadata.
///
/// # Errors
/// As [`read`].
pub fn read_file(path: &Path) -> Result<(TensorMap, HashMap<String, String>)> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    if bytes.starts_with(ZIP_MAGIC) {
        let problem = "is a file of torch.save, expected safetensors; write it anew by safetensors.torch.save_file";
        return Err(Error::checkpoint(path, problem));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| {
        let problem = format!(
            "expected a whole safetensors file, found one that is cut short or damaged, or another kind of file ({e})"
        );
        Error::checkpoint(path, problem)
    })?;
    let mut tensors = TensorMap::new();
    for (name, view) in file.iter() {
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F64 => data
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
                .collect(),
            _ => continue,
        };
        tensors.insert(name.to_owned(), HostTensor { shape: view.shape().to_vec(), values });
    }
    let metadata = SafeTensors::read_metadata(&bytes).ok().and_then(|(_, header)| header.metadata().clone());
    Ok((tensors, metadata.unwrap_or_default()))
}

/// The blake3 hash of a tensor's shape and bytes.
pub fn hash(tensor: &HostTensor) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for &dimension in &tensor.shape {
        hasher.update(&(dimension as u64).to_le_bytes());
    }
    hasher.update(bytemuck::cast_slice(&tensor.values));
    hasher.finalize()
}
