//! Text to tokens and back: characters, bytes, GPT-2's byte pairs.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tiktoken_rs::r50k_base_singleton;

use crate::error::{Error, Result};

/// Number of GPT-2's tokens, the end of text included.
pub const GPT2_VOCABULARY: usize = 50257;
/// GPT-2's `<|endoftext|>`.
pub const GPT2_END_OF_TEXT: i32 = 50256;

/// `data.tokenizer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// `characters`: the distinct characters of the text.
    Characters,
    /// `bytes`: 256 tokens.
    Bytes,
    /// `gpt2`: GPT-2's 50,257 byte pairs.
    Gpt2,
}

/// Turns text into tokens and back; kept with a checkpoint as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Tokenizer {
    /// Token `i` is the character `characters[i]`; they stand in the order of their code points.
    Characters {
        /// The known characters.
        characters: Vec<char>,
    },
    /// A token a byte.
    Bytes,
    /// GPT-2's byte pairs.
    Gpt2,
}

impl Tokenizer {
    /// A tokenizer that knows `texts`.
    pub fn new(kind: TokenizerKind, texts: &[&str]) -> Self {
        match kind {
            TokenizerKind::Characters => {
                let mut seen = std::collections::BTreeSet::new();
                let mut ascii = [false; 128];
                for c in texts.iter().flat_map(|t| t.chars()) {
                    match ascii.get_mut(c as usize) {
                        Some(seen) => *seen = true,
                        None => {
                            seen.insert(c);
                        }
                    }
                }
                let low = (0..128u8).filter(|c| ascii[*c as usize]).map(char::from);
                Tokenizer::Characters { characters: low.chain(seen).collect() }
            }
            TokenizerKind::Bytes => Tokenizer::Bytes,
            TokenizerKind::Gpt2 => Tokenizer::Gpt2,
        }
    }

    /// Number of distinct tokens.
    pub fn vocabulary(&self) -> usize {
        match self {
            Tokenizer::Characters { characters } => characters.len(),
            Tokenizer::Bytes => 256,
            Tokenizer::Gpt2 => GPT2_VOCABULARY,
        }
    }

    /// The tokens of `text`.
    ///
    /// # Errors
    /// A character that the tokenizer does not know, with its line.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        self.encode_as(text, |token| token as i32)
    }

    /// The tokens of `text` as `of` gives their numbers: those of a text that takes much of the memory are no wider than they must be.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn encode_as<T: Copy + Send>(&self, text: &str, of: impl Fn(u32) -> T + Sync) -> Result<Vec<T>> {
        match self {
            Tokenizer::Characters { characters } => {
                let mut ascii = [-1i32; 128];
                for (i, c) in characters.iter().enumerate() {
                    if let Some(token) = ascii.get_mut(*c as usize) {
                        *token = i as i32;
                    }
                }
                let token = |c: char| match ascii.get(c as usize) {
                    Some(token) => usize::try_from(*token).ok(),
                    None => characters.binary_search(&c).ok(),
                };
                let mut tokens = Vec::with_capacity(text.len());
                for (at, c) in text.char_indices() {
                    let Some(token) = token(c) else {
                        let line = text[..at].matches('\n').count() + 1;
                        return Err(Error::data(
                            "text",
                            format!(
                                "line {line} has the character {c:?}, which is none of the {} that the model was \
                                 trained on; leave it out",
                                characters.len()
                            ),
                        ));
                    };
                    tokens.push(of(token as u32));
                }
                Ok(tokens)
            }
            Tokenizer::Bytes => Ok(text.bytes().map(|byte| of(u32::from(byte))).collect()),
            Tokenizer::Gpt2 => {
                let encoder = r50k_base_singleton();
                let encode = |piece: &&str| -> Vec<T> { encoder.encode_ordinary(piece).into_iter().map(&of).collect() };
                Ok(pieces(text).par_iter().map(encode).collect::<Vec<_>>().concat())
            }
        }
    }

    /// The bytes that `tokens` stand for; unknown tokens stand for nothing.
    pub fn decode_bytes(&self, tokens: &[i32]) -> Vec<u8> {
        match self {
            Tokenizer::Characters { characters } => {
                let known = tokens.iter().filter_map(|t| usize::try_from(*t).ok().and_then(|t| characters.get(t)));
                known.collect::<String>().into_bytes()
            }
            Tokenizer::Bytes => tokens.iter().filter_map(|t| u8::try_from(*t).ok()).collect(),
            Tokenizer::Gpt2 => {
                let known: Vec<u32> =
                    tokens.iter().filter(|t| (0..GPT2_VOCABULARY as i32).contains(t)).map(|t| *t as u32).collect();
                r50k_base_singleton().decode_bytes(&known).unwrap_or_default()
            }
        }
    }

    /// The text that `tokens` stand for; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[i32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(tokens)).into_owned()
    }

    /// As JSON.
    ///
    /// # Errors
    /// None in practice; the encoder's own.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::data("tokenizer", format!("cannot be written as JSON: {e}")))
    }

    /// From JSON.
    ///
    /// # Errors
    /// Text that [`Tokenizer::to_json`] did not write.
    pub fn from_json(json: &str) -> Result<Self> {
        serde_json::from_str(json).map_err(|e| Error::data("tokenizer", format!("is not a tokenizer's JSON: {e}")))
    }
}

/// `text` in pieces that GPT-2's own rule never joins: it cuts at single line breaks between other characters.
fn pieces(text: &str) -> Vec<&str> {
    const LEAST: usize = 1 << 16;
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > LEAST {
        let bytes = rest.as_bytes();
        let cut = (LEAST..bytes.len() - 1)
            .find(|i| bytes[*i] == b'\n' && bytes[i - 1].is_ascii_graphic() && bytes[i + 1].is_ascii_graphic());
        let Some(cut) = cut else { break };
        let (piece, after) = rest.split_at(cut + 1);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_every_tokenizer_and_its_json() -> Result<()> {
        let text = "First Citizen:\nBefore we proceed any further, hear me speak. Ünïcode ✓\n\n  two  spaces\n";
        for kind in [TokenizerKind::Characters, TokenizerKind::Bytes, TokenizerKind::Gpt2] {
            let tokenizer = Tokenizer::new(kind, &[text]);
            let tokens = tokenizer.encode(text)?;
            assert!(tokens.iter().all(|t| (0..tokenizer.vocabulary() as i32).contains(t)));
            assert_eq!(tokenizer.decode(&tokens), text, "{kind:?}");
            assert_eq!(Tokenizer::from_json(&tokenizer.to_json()?)?, tokenizer);
        }
        Ok(())
    }

    /// Known tokens of GPT-2's own encoder.
    #[test]
    fn gpt2_gives_the_published_tokens() -> Result<()> {
        assert_eq!(Tokenizer::Gpt2.encode("Hello, world!")?, [15496, 11, 995, 0]);
        assert_eq!(Tokenizer::Gpt2.decode(&[15496, 11, 995, 0]), "Hello, world!");
        assert_eq!(Tokenizer::Gpt2.decode(&[GPT2_END_OF_TEXT]), "<|endoftext|>");
        Ok(())
    }

    #[test]
    fn a_long_text_has_the_same_tokens_in_pieces_and_whole() -> Result<()> {
        let text = "Some words, 1234 numbers;\nand lines\n\n  of 'em don't\n \nEnd.\n".repeat(4000);
        assert!(pieces(&text).len() > 2);
        let whole: Vec<i32> = r50k_base_singleton().encode_ordinary(&text).into_iter().map(|t| t as i32).collect();
        assert_eq!(Tokenizer::Gpt2.encode(&text)?, whole);
        Ok(())
    }

    #[test]
    fn an_unknown_character_is_told_with_its_line() {
        let error = Tokenizer::new(TokenizerKind::Characters, &["ab\n"]).encode("a\nbé").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("'é'"), "{error}");
    }

    #[test]
    fn characters_are_numbered_by_code_point() -> Result<()> {
        let tokenizer = Tokenizer::new(TokenizerKind::Characters, &["zäa", "✓Z"]);
        assert_eq!(tokenizer.encode("Zazä✓")?, [0, 1, 2, 3, 4]);
        Ok(())
    }
}
