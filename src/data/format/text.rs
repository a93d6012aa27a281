//! One long text, of which the next token is to be told.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::dataset::{TokenStore, TokenWindows};
use super::super::options::{SplitOptions, TextOptions};
use super::super::preprocess::Recipe;
use super::super::source::{Lookup, read_text};
use super::super::tokenizer::Tokenizer;
use super::super::{Dataset, Splits, split};
use super::not_empty;
use crate::error::{Error, Result};

/// The splits of a text and what `generate` needs.
pub(crate) fn open(options: &TextOptions, splits: &SplitOptions, lookup: &Lookup) -> Result<(PathBuf, Splits, Recipe)> {
    let path = lookup.file_for("data.path", &options.path)?;
    let text = read_text(&path)?;
    not_empty(&path, "character", text.len())?;
    let other = |key: &str, file: &Option<PathBuf>| -> Result<Option<(PathBuf, String)>> {
        let Some(file) = file else { return Ok(None) };
        let path = lookup.file_for(key, file)?;
        let text = read_text(&path)?;
        Ok(Some((path, text)))
    };
    let (validation, test) = (other("data.validation", &options.validation)?, other("data.test", &options.test)?);
    let mut all: Vec<&str> = vec![&text];
    all.extend([&validation, &test].into_iter().flatten().map(|(_, text)| text.as_str()));
    let tokenizer = Tokenizer::new(options.tokenizer, &all);
    let vocabulary = tokenizer.vocabulary();
    let store = |text: &str| TokenStore::of_text(&tokenizer, text).map(Arc::new);
    let own = |file: &Option<(PathBuf, String)>| -> Result<Option<(PathBuf, Arc<TokenStore>)>> {
        file.as_ref().map(|(path, text)| Ok((path.clone(), store(text)?))).transpose()
    };
    let windows = Windows { context: options.context, vocabulary };
    let splits = windows.split(&path, store(&text)?, own(&validation)?, own(&test)?, splits)?;
    Ok((path, splits, Recipe::Text { tokenizer }))
}

/// A split with a text of its own, `file` by `key`, for a model that knows this tokenizer; `what` it is for errors.
pub(crate) fn own_split(
    key: &str,
    file: &Path,
    lookup: &Lookup,
    (tokenizer, context): (&Tokenizer, usize),
    what: &str,
) -> Result<Arc<dyn Dataset>> {
    let path = lookup.file_for(key, file)?;
    let store = TokenStore::of_text(tokenizer, &read_text(&path)?).map_err(|e| match e {
        Error::Data { problem, .. } => Error::data(&path, problem),
        other => other,
    })?;
    let vocabulary = tokenizer.vocabulary();
    let store = Arc::new(store);
    let all = 0..store.len();
    Windows { context, vocabulary }.windows(&path, store, all, what)
}

/// Makes splits of streams of tokens.
pub(super) struct Windows {
    pub context: usize,
    pub vocabulary: usize,
}

impl Windows {
    /// Divides `store`, except for the splits that have files of their own.
    pub fn split(
        &self,
        path: &Path,
        store: Arc<TokenStore>,
        validation: Option<(PathBuf, Arc<TokenStore>)>,
        test: Option<(PathBuf, Arc<TokenStore>)>,
        options: &SplitOptions,
    ) -> Result<Splits> {
        for (key, own, asked) in [
            ("data.split.validation", validation.is_some(), options.validation.is_some()),
            ("data.split.test", test.is_some(), options.test.is_some()),
        ] {
            if own && asked {
                return Err(Error::config(key, "found it set, but that split has files of its own; remove the key"));
            }
        }
        let [train, validation_range, test_range] = split::divide_text(path, store.len(), options)?;
        let held = |what: &str, own: Option<(PathBuf, Arc<TokenStore>)>, range: std::ops::Range<usize>| match own {
            Some((path, store)) => {
                let all = 0..store.len();
                self.windows(&path, store, all, what).map(Some)
            }
            None if range.is_empty() => Ok(None),
            None => self.windows(path, Arc::clone(&store), range, what).map(Some),
        };
        let (validation, test) = (held("validation", validation, validation_range)?, held("test", test, test_range)?);
        Ok(Splits { train: self.windows(path, store, train, "training")?, validation, test })
    }

    fn windows(
        &self,
        path: &Path,
        store: Arc<TokenStore>,
        range: std::ops::Range<usize>,
        what: &str,
    ) -> Result<Arc<dyn Dataset>> {
        Ok(Arc::new(TokenWindows::new(store, range, self.context, self.vocabulary, what, path)?))
    }
}
