//! Lines of text as words of a vocabulary.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};

/// `data.words`: how a line becomes words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cleaning {
    /// `clean`: letters and digits of every script and `(),!?'` are kept, contractions and punctuation become words of their own
    /// (the preparation of Kim 2014, which keeps those of ASCII alone).
    Clean,
    /// `whitespace`: words are what stands between blanks.
    Whitespace,
}

/// The number that fills a line up.
pub const PAD: i32 = 0;
/// The number of words that the vocabulary does not have.
pub const UNKNOWN: i32 = 1;

/// A vocabulary, and how lines are brought to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Words {
    written: Written,
    numbers: HashMap<String, i32>,
}

/// What is kept of [`Words`] in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Written {
    words: Vec<String>,
    cleaning: Cleaning,
    lowercase: bool,
    length: usize,
}

impl From<Written> for Words {
    fn from(written: Written) -> Self {
        let numbers = written.words.iter().enumerate().map(|(i, w)| (w.clone(), i as i32)).collect();
        Words { written, numbers }
    }
}

impl From<Words> for Written {
    fn from(words: Words) -> Self {
        words.written
    }
}

impl Words {
    /// The vocabulary of `lines`: words that they have `min_count` times and more, the most frequent first. Without a
    /// `length`, the longest line gives it.
    pub fn build<'a>(
        lines: impl Iterator<Item = &'a str>,
        cleaning: Cleaning,
        lowercase: bool,
        min_count: usize,
        length: Option<usize>,
    ) -> Self {
        let mut counts: HashMap<String, usize> = HashMap::new();
        let mut longest = 1;
        for line in lines {
            let words = split(line, cleaning, lowercase);
            longest = longest.max(words.len());
            for word in words {
                *counts.entry(word).or_default() += 1;
            }
        }
        let mut known: Vec<(String, usize)> = counts.into_iter().filter(|(_, count)| *count >= min_count).collect();
        known.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let mut words = vec!["<pad>".to_string(), "<unk>".to_string()];
        words.extend(known.into_iter().map(|(word, _)| word));
        Words::from(Written { words, cleaning, lowercase, length: length.unwrap_or(longest) })
    }

    /// Number of words, with [`PAD`] and [`UNKNOWN`].
    pub fn vocabulary(&self) -> usize {
        self.written.words.len()
    }

    /// Words to which every line is cut or padded.
    pub fn length(&self) -> usize {
        self.written.length
    }

    /// `line` as numbers: `[length]`.
    pub fn encode(&self, line: &str) -> Vec<i32> {
        let words = split(line, self.written.cleaning, self.written.lowercase);
        let mut numbers: Vec<i32> = words
            .iter()
            .take(self.written.length)
            .map(|word| self.numbers.get(word).copied().unwrap_or(UNKNOWN))
            .collect();
        numbers.resize(self.written.length, PAD);
        numbers
    }

    /// The words that `numbers` stand for, without the padding.
    pub fn decode(&self, numbers: &[i32]) -> String {
        let word = |n: &i32| usize::try_from(*n).ok().and_then(|n| self.written.words.get(n)).map(String::as_str);
        numbers.iter().filter(|n| **n != PAD).filter_map(word).collect::<Vec<_>>().join(" ")
    }
}

/// The words of a line.
fn split(line: &str, cleaning: Cleaning, lowercase: bool) -> Vec<String> {
    let mut text = match cleaning {
        Cleaning::Whitespace => line.to_string(),
        Cleaning::Clean => clean(line),
    };
    if lowercase {
        text = text.to_lowercase();
    }
    text.split_whitespace().map(str::to_string).collect()
}

fn clean(line: &str) -> String {
    // Marks are parts of letters: an accent that stands by itself, a vowel sign.
    static LEFT_OUT: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[^\p{L}\p{M}\p{N}(),!?'`]").expect("a regular expression"));
    let mut text = LEFT_OUT.replace_all(line, " ").into_owned();
    for ending in ["'s", "'ve", "n't", "'re", "'d", "'ll"] {
        text = text.replace(ending, &format!(" {ending}"));
    }
    for mark in [",", "!", "(", ")", "?"] {
        text = text.replace(mark, &format!(" {mark} "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cleaned_as_kim_does() {
        let line = "It's a film you don't -- and won't -- forget, \"ever\" (really)!";
        let expected = "it 's a film you do n't and wo n't forget , ever ( really ) !";
        assert_eq!(split(line, Cleaning::Clean, true).join(" "), expected);
    }

    #[test]
    fn letters_of_every_script_are_kept() {
        for (line, expected) in [
            ("Das Gefühl, daß … Ärger!", "das gefühl , daß ärger !"),
            ("«Très déjà-vu» — cafe\u{301}s", "très déjà vu cafe\u{301}s"),
            ("Хороший фильм; 10/10", "хороший фильм 10 10"),
            ("यह फ़िल्म अच्छी है।", "यह फ़िल्म अच्छी है"),
            ("良い映画、最高★", "良い映画 最高"),
        ] {
            assert_eq!(split(line, Cleaning::Clean, true).join(" "), expected);
        }
    }

    #[test]
    fn rare_words_are_unknown_and_short_lines_are_padded() -> Result<(), serde_json::Error> {
        let lines = ["a b b", "b a c d", "a"];
        let words = Words::build(lines.into_iter(), Cleaning::Whitespace, true, 2, None);
        assert_eq!(words.vocabulary(), 4);
        assert_eq!(words.length(), 4);
        assert_eq!(words.encode("A c b"), [2, UNKNOWN, 3, PAD]);
        assert_eq!(words.encode("b b b b b b"), [3; 4]);
        assert_eq!(words.decode(&[2, 1, 3, 0]), "a <unk> b");
        let again: Words = serde_json::from_str(&serde_json::to_string(&words)?)?;
        assert_eq!(again, words);
        Ok(())
    }
}
