//! Token files: nanoGPT's (little-endian `u16`, no header) and llm.c's (a header of 256 `i32`: magic, version, number of
//! tokens; then `u16` under magic 20240520, `u32` under magic 20240801).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::Splits;
use super::super::dataset::{TokenFile, TokenStore};
use super::super::options::{SplitOptions, TokensOptions};
use super::super::preprocess::Recipe;
use super::super::source::{self, Ahead, Lookup, PlacedFile};
use super::super::tokenizer::{GPT2_VOCABULARY, Tokenizer};
use super::text::Windows;
use crate::error::{Error, Result};
use crate::host;

const HEADER_BYTES: usize = 1024;
const MAGIC_U16: u32 = 20_240_520;
const MAGIC_U32: u32 = 20_240_801;

/// The splits of token files and what `generate` needs.
pub(crate) fn open(
    options: &TokensOptions,
    splits: &SplitOptions,
    lookup: &Lookup,
) -> Result<(PathBuf, Splits, Recipe)> {
    /// Tokens are `i32`.
    const MOST: usize = i32::MAX as usize;
    if !(2..=MOST).contains(&options.vocabulary) {
        let problem = format!("found {}, expected 2 to {MOST}", options.vocabulary);
        return Err(Error::config("data.vocabulary", problem));
    }
    let mut train = lookup.find_all("data.path", &options.path)?;
    let mut validation = options.validation.as_deref().map(|p| lookup.find_all("data.validation", p)).transpose()?;
    let test = options.test.as_deref().map(|p| lookup.find_all("data.test", p)).transpose()?;
    let place = train.first().cloned().unwrap_or_else(|| options.path.clone());
    if place.is_dir() {
        let (found, held) = by_name(&place)?;
        train = found;
        validation = validation.or((!held.is_empty()).then_some(held));
    }
    let own = |files: Option<Vec<PathBuf>>| -> Result<Option<(PathBuf, Arc<TokenStore>)>> {
        let Some(files) = files else { return Ok(None) };
        let first = files.first().cloned().unwrap_or_default();
        Ok(Some((first, store(&files)?)))
    };
    let windows = Windows { context: options.context, vocabulary: options.vocabulary };
    let splits = windows.split(&place, store(&train)?, own(validation)?, own(test)?, splits)?;
    let tokenizer = (options.vocabulary == GPT2_VOCABULARY).then_some(Tokenizer::Gpt2);
    Ok((place, splits, Recipe::Tokens { vocabulary: options.vocabulary, tokenizer }))
}

/// The files of a folder to train on, and those to validate on.
fn by_name(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let files = source::files_with(folder, &["bin"])?;
    let is = |path: &Path, what: &str| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        stem == what || stem.contains(&format!("_{what}_")) || stem.ends_with(&format!("_{what}"))
    };
    let (validation, rest): (Vec<PathBuf>, Vec<PathBuf>) = files.into_iter().partition(|p| is(p, "val"));
    let train: Vec<PathBuf> = rest.into_iter().filter(|p| is(p, "train")).collect();
    if train.is_empty() {
        return Err(Error::data(
            folder,
            "found no token file to train on: expected train.bin or names with _train_, such as fineweb_train_000001.bin; \
             or let data.path name the files",
        ));
    }
    Ok((train, validation))
}

/// The share of the free memory that files of tokens are read into ahead.
const AHEAD: usize = 4;

fn store(paths: &[PathBuf]) -> Result<Arc<TokenStore>> {
    let mut files = Vec::with_capacity(paths.len());
    let mut first = 0;
    for path in paths {
        let file = open_file(path, first)?;
        first += file.len;
        files.push(file);
    }
    read_ahead(&files);
    Ok(Arc::new(TokenStore::Files(files)))
}

/// Has files that fit into memory well read beside what is done meanwhile: their windows are then in memory long before each has been
/// drawn.
fn read_ahead(files: &[TokenFile]) {
    let bytes = files.iter().fold(0u64, |sum, file| sum.saturating_add(file.file.len()));
    if host::free_bytes().is_some_and(|free| bytes <= (free / AHEAD) as u64) {
        let files: Vec<Ahead> = files.iter().map(|file| file.file.ahead()).collect();
        let ahead = move || files.iter().for_each(Ahead::read);
        // Where no thread can be started, they are read when they are needed.
        let _ = std::thread::Builder::new().name("data-ahead".to_owned()).spawn(ahead);
    }
}

fn open_file(path: &Path, first: usize) -> Result<TokenFile> {
    let file = PlacedFile::open(path)?;
    let bytes = usize::try_from(file.len()).unwrap_or(usize::MAX);
    let mut header = [0; 12];
    let head = bytes.min(header.len());
    file.read_at(0, &mut header[..head])?;
    let word = |i: usize| u32::from_le_bytes([header[4 * i], header[4 * i + 1], header[4 * i + 2], header[4 * i + 3]]);
    let magic = word(0);
    let wrong = |problem: String| Err(Error::data(path, problem));
    let (offset, width, len) = match magic {
        MAGIC_U16 | MAGIC_U32 => {
            if bytes < HEADER_BYTES {
                return wrong(format!("holds {bytes} bytes, expected a header of {HEADER_BYTES}"));
            }
            let (width, versions): (usize, &[u32]) = if magic == MAGIC_U16 { (2, &[1]) } else { (4, &[1, 7]) };
            if !versions.contains(&word(1)) {
                return wrong(format!("has version {} of llm.c's token format, expected {versions:?}", word(1)));
            }
            let (told, held) = (word(2) as usize, (bytes - HEADER_BYTES) / width);
            if bytes - HEADER_BYTES != told * width {
                return wrong(format!("holds {held} tokens, but its header tells of {told}; fetch the file again"));
            }
            (HEADER_BYTES, width, told)
        }
        _ if bytes % 2 == 1 => {
            return wrong(format!("holds {bytes} bytes, expected an even number: two bytes a token"));
        }
        _ => (0, 2, bytes / 2),
    };
    super::not_empty(path, "token", len)?;
    Ok(TokenFile { file, offset, width, first, len })
}
