//! Windows over one long stream of tokens.

use std::ops::Range;
use std::sync::Arc;

use super::super::source::PlacedFile;
use super::super::tokenizer::Tokenizer;
use super::super::{Dataset, Draw, InputMut, InputSpec, Pick, TargetMut, TargetSpec};
use crate::error::{Error, Result};

/// A file of little-endian tokens, two or four bytes each.
pub(crate) struct TokenFile {
    pub file: PlacedFile,
    /// Byte at which the tokens start.
    pub offset: usize,
    /// Bytes a token: 2 or 4.
    pub width: usize,
    /// Number of this file's first token in the stream.
    pub first: usize,
    /// Tokens in this file.
    pub len: usize,
}

/// Where the tokens of a stream are.
pub(crate) enum TokenStore {
    Bytes(Vec<u8>),
    Short(Vec<u16>),
    Long(Vec<u32>),
    Files(Vec<TokenFile>),
}

impl TokenStore {
    /// The tokens of a text, as small as those of the tokenizer can be kept.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn of_text(tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        Ok(match tokenizer.vocabulary() {
            0..=0x100 => TokenStore::Bytes(tokenizer.encode_as(text, |token| token as u8)?),
            0x101..=0x1_0000 => TokenStore::Short(tokenizer.encode_as(text, |token| token as u16)?),
            _ => TokenStore::Long(tokenizer.encode_as(text, |token| token)?),
        })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            TokenStore::Bytes(tokens) => tokens.len(),
            TokenStore::Short(tokens) => tokens.len(),
            TokenStore::Long(tokens) => tokens.len(),
            TokenStore::Files(files) => files.last().map_or(0, |f| f.first + f.len),
        }
    }

    /// Tokens `start ..` (`=`), as many as `out` holds.
    ///
    /// # Errors
    /// A file that cannot be read; a token of it that is not below `vocabulary`, with its place.
    pub fn read(&self, start: usize, out: &mut [i32], vocabulary: usize) -> Result<()> {
        let range = start..start + out.len();
        match self {
            TokenStore::Bytes(tokens) => out.iter_mut().zip(&tokens[range]).for_each(|(o, t)| *o = i32::from(*t)),
            TokenStore::Short(tokens) => out.iter_mut().zip(&tokens[range]).for_each(|(o, t)| *o = i32::from(*t)),
            TokenStore::Long(tokens) => out.iter_mut().zip(&tokens[range]).for_each(|(o, t)| *o = *t as i32),
            TokenStore::Files(files) => {
                let mut done = 0;
                let mut file = files.partition_point(|f| f.first + f.len <= start);
                while done < out.len() {
                    let at = start + done - files[file].first;
                    let count = (files[file].len - at).min(out.len() - done);
                    files[file].read(at, &mut out[done..done + count], vocabulary)?;
                    done += count;
                    file += 1;
                }
            }
        }
        Ok(())
    }

    /// Tokens `start ..` (`=`), and for each the one after it (`=`); `input` and `target` are of one length, 1 at least.
    ///
    /// # Errors
    /// As [`TokenStore::read`].
    fn window(&self, start: usize, input: &mut [i32], target: &mut [i32], vocabulary: usize) -> Result<()> {
        let last = input.len() - 1;
        match self {
            // One read, not two: each may be a way to a server and back.
            TokenStore::Files(_) => {
                let mut tokens = vec![0; input.len() + 1];
                self.read(start, &mut tokens, vocabulary)?;
                input.copy_from_slice(&tokens[..=last]);
                target.copy_from_slice(&tokens[1..]);
                Ok(())
            }
            TokenStore::Bytes(_) | TokenStore::Short(_) | TokenStore::Long(_) => {
                self.read(start, input, vocabulary)?;
                target[..last].copy_from_slice(&input[1..]);
                self.read(start + input.len(), &mut target[last..], vocabulary)
            }
        }
    }
}

impl TokenFile {
    fn read(&self, start: usize, out: &mut [i32], vocabulary: usize) -> Result<()> {
        let mut bytes = vec![0; out.len() * self.width];
        self.file.read_at((self.offset + start * self.width) as u64, &mut bytes)?;
        let mut largest = 0u32;
        if self.width == 2 {
            for (out, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                let token = u32::from(u16::from_le_bytes([pair[0], pair[1]]));
                largest = largest.max(token);
                *out = token as i32;
            }
        } else {
            for (out, word) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                let token = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                largest = largest.max(token);
                *out = token as i32;
            }
        }
        if largest as usize >= vocabulary {
            let place = out.iter().position(|t| *t as u32 as usize >= vocabulary).unwrap_or(0);
            return Err(Error::data(
                self.file.path(),
                format!(
                    "token {} of the file is {}, expected a number below the vocabulary's {vocabulary}; \
                     correct data.vocabulary or the file",
                    start + place,
                    out[place] as u32
                ),
            ));
        }
        Ok(())
    }
}

/// One split of a stream: windows of `context` tokens, each with the token after it as its target.
pub(crate) struct TokenWindows {
    store: Arc<TokenStore>,
    range: Range<usize>,
    context: usize,
    vocabulary: usize,
}

impl TokenWindows {
    /// Windows over `range` of the stream.
    ///
    /// # Errors
    /// A range that does not hold one window.
    pub fn new(
        store: Arc<TokenStore>,
        range: Range<usize>,
        context: usize,
        vocabulary: usize,
        what: &str,
        place: &std::path::Path,
    ) -> Result<Self> {
        if context == 0 {
            return Err(Error::config("data.context", "found 0, expected 1 or more"));
        }
        if range.len() <= context {
            return Err(Error::data(
                place,
                format!(
                    "the {what} split holds {} tokens, expected at least {}: data.context = {context} and one more; \
                     give more text, a smaller context, or another data.split",
                    range.len(),
                    context + 1
                ),
            ));
        }
        Ok(TokenWindows { store, range, context, vocabulary })
    }
}

impl Dataset for TokenWindows {
    fn len(&self) -> usize {
        (self.range.len() - 1) / self.context
    }

    fn starts(&self) -> Option<usize> {
        Some(self.range.len() - self.context)
    }

    fn input(&self) -> InputSpec {
        InputSpec::Tokens { context: self.context, vocabulary: self.vocabulary }
    }

    fn target(&self) -> TargetSpec {
        TargetSpec::NextToken
    }

    /// Tokens in files are checked as they are read, and may be more than any memory holds.
    fn is_plain(&self) -> bool {
        !matches!(&*self.store, TokenStore::Files(_))
    }

    fn read(&self, pick: Pick, _draw: Option<Draw>, input: InputMut<'_>, target: TargetMut<'_>) -> Result<()> {
        let start = match pick {
            Pick::Sample(_) => super::sample(pick, self.len())? * self.context,
            Pick::Window(start) if start + self.context < self.range.len() => start,
            Pick::Window(_) => {
                let most = self.range.len() - self.context;
                return Err(Error::shape("data", format!("a window that starts below {most}"), format!("{pick:?}")));
            }
        };
        let (input, target) = (input.tokens()?, target.index()?);
        let (context, first) = (self.context, self.range.start + start);
        self.store.window(first, &mut input[..context], &mut target[..context], self.vocabulary)
    }
}
