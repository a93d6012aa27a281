//! Tensors that come to the host a piece at a time, to be written or hashed: what they take there does not grow with the model.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorInfo};

use super::tensors::hash_of_shape;
use crate::backend::{Arena, Backend};
use crate::error::{Error, Result};
use crate::host;
use crate::plan::{ParamEntry, ParamLayout};
use crate::real::Element;

/// Elements of a piece: 4 MiB, of which a bus and a disk take one as fast as they take many.
const PIECE: usize = 1 << 20;

/// Writes elements of a tensor, from number `first` on (`=`).
type Fetch<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + 'a;

/// A tensor that is somewhere else.
pub struct Streamed<'a> {
    name: String,
    shape: Vec<usize>,
    fetch: Box<Fetch<'a>>,
}

impl<'a> Streamed<'a> {
    /// Of values on the host, as many as the shape says.
    pub fn of_values(name: String, shape: Vec<usize>, values: &'a [f32]) -> Self {
        let fetch = move |first: usize, out: &mut [f32]| {
            out.copy_from_slice(&values[first..][..out.len()]);
            Ok(())
        };
        Streamed { name, shape, fetch: Box::new(fetch) }
    }

    /// Of what `buffer` holds from its element `start` on.
    pub fn of_buffer<B: Backend, T: Element>(
        name: String,
        shape: Vec<usize>,
        backend: &'a B,
        (buffer, start): (&'a B::Buffer<T>, usize),
    ) -> Self {
        let fetch = move |first: usize, out: &mut [f32]| {
            let mut values: Vec<T> = host::zeros(out.len())?;
            backend.download(buffer, start + first, &mut values)?;
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value.f32());
            Ok(())
        };
        Streamed { name, shape, fetch: Box::new(fetch) }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Hands over all values in their order.
    ///
    /// # Errors
    /// A device that failed, or what `take` gives.
    fn pieces(&self, mut take: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let elements = self.elements();
        let mut room = host::zeros(elements.min(PIECE))?;
        for first in (0..elements).step_by(PIECE) {
            let piece = &mut room[..PIECE.min(elements - first)];
            (self.fetch)(first, piece)?;
            take(piece)?;
        }
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The blake3 hash of its shape and values.
    ///
    /// # Errors
    /// A device that failed.
    pub fn hash(&self) -> Result<blake3::Hash> {
        let mut hasher = hash_of_shape(&self.shape);
        self.pieces(|piece| {
            hasher.update(bytemuck::cast_slice(piece));
            Ok(())
        })?;
        Ok(hasher.finalize())
    }
}

/// The tensors of a buffer of this layout; `prefix` goes before each name.
pub fn of_layout<'a, B: Backend, T: Element>(
    backend: &'a B,
    buffer: &'a B::Buffer<T>,
    layout: &ParamLayout,
    prefix: &str,
) -> Vec<Streamed<'a>> {
    let of = |entry: &ParamEntry| {
        let name = format!("{prefix}{}", entry.name);
        Streamed::of_buffer(name, entry.shape.clone(), backend, (buffer, entry.offset))
    };
    layout.entries().iter().map(of).collect()
}

/// An arena's parameters, from where the device keeps all of them.
pub fn parameters<'a, B: Backend>(backend: &'a B, arena: &'a Arena<B>) -> Vec<Streamed<'a>> {
    if backend.stores_alone(arena) || arena.shares_out_masters() {
        of_layout(backend, &arena.stored, &arena.layout, "")
    } else {
        of_layout(backend, &arena.parameters, &arena.layout, "")
    }
}

/// Writes tensors to a safetensors file and flushes it: in the order of their names, so that the same tensors make the same file.
///
/// # Errors
/// What the operating system or the device refuses.
pub fn write(path: &Path, mut tensors: Vec<Streamed<'_>>, metadata: HashMap<String, String>) -> Result<()> {
    let refused = |e| Error::io("write", path, e);
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let header = header(&tensors, metadata).map_err(|e| refused(e.into()))?;
    let mut file = File::create(path).map_err(|e| Error::io("create", path, e))?;
    file.write_all(&header).map_err(refused)?;
    for tensor in &tensors {
        tensor.pieces(|piece| file.write_all(bytemuck::cast_slice(piece)).map_err(refused))?;
    }
    file.sync_all().map_err(|e| Error::io("flush", path, e))
}

/// What a safetensors file has before the values.
fn header(tensors: &[Streamed<'_>], metadata: HashMap<String, String>) -> serde_json::Result<Vec<u8>> {
    let metadata: BTreeMap<String, String> = metadata.into_iter().collect();
    let mut text = br#"{"__metadata__":"#.to_vec();
    serde_json::to_writer(&mut text, &metadata)?;
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.elements() * size_of::<f32>();
        text.push(b',');
        serde_json::to_writer(&mut text, &tensor.name)?;
        text.push(b':');
        let info = TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets: (start, end) };
        serde_json::to_writer(&mut text, &info)?;
        start = end;
    }
    text.push(b'}');
    // Values begin where they are aligned.
    text.resize(text.len().next_multiple_of(size_of::<u64>()), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn a_file_has_the_bytes_that_the_library_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let (a, b, none) = ([1.5f32, -2.0, 3.0], [0.25f32; 6], [0f32; 0]);
        let named: [(&str, Vec<usize>, &[f32]); 4] = [
            ("b.weight", vec![2, 3], &b),
            ("a \"quoted\"", vec![3], &a),
            ("one", vec![], &a[..1]),
            ("0", vec![0, 2], &none),
        ];
        let streamed = named.iter().map(|(name, shape, v)| Streamed::of_values((*name).into(), shape.clone(), v));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        write(&path, streamed.collect(), metadata.clone()).unwrap();
        let view = |v: &&[f32]| bytemuck::cast_slice(v).to_vec();
        let bytes: Vec<Vec<u8>> = named.iter().map(|(_, _, v)| view(v)).collect();
        let views = named.iter().zip(&bytes);
        let views = views.map(|((name, shape, _), v)| (*name, TensorView::new(Dtype::F32, shape.clone(), v).unwrap()));
        assert_eq!(std::fs::read(&path).unwrap(), safetensors::serialize(views, Some(metadata)).unwrap());
    }

    #[test]
    fn of_a_tensor_one_piece_at_a_time_is_on_the_host_and_those_before_it_are_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let elements = 2 * PIECE + 5;
        let fetch = |first: usize, out: &mut [f32]| {
            assert!(out.len() <= PIECE);
            let written = std::fs::metadata(&path).unwrap().len();
            assert!(written > first as u64 * 4 && written < first as u64 * 4 + 1000, "{first}: {written}");
            out.iter_mut().zip(first..).for_each(|(out, i)| *out = i as f32);
            Ok(())
        };
        let tensor = Streamed { name: "a".into(), shape: vec![elements], fetch: Box::new(fetch) };
        write(&path, vec![tensor], HashMap::new()).unwrap();
        let read = crate::train::tensors::read(&path).unwrap();
        assert!(read["a"].values.iter().zip(0..).all(|(value, i)| *value == i as f32));
        assert_eq!(read["a"].shape, [elements]);
    }
}
