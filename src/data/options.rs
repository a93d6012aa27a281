//! What a run file's `[data]` table can say. The key of each field stands at the head of its text.

use std::fmt;
use std::path::PathBuf;

use super::augment::AugmentOptions;
use super::tokenizer::TokenizerKind;
use super::words::Cleaning;
use crate::log_mel::LogMelOptions;

/// The `[data]` table, apart from `data.batch_size`.
#[derive(Clone, Debug, PartialEq)]
pub struct DataOptions {
    /// `data.format`, and the keys that belong to it.
    pub format: FormatOptions,
    /// `data.split`: what is held out.
    pub split: SplitOptions,
    /// `data.normalize`; the format's own default where not given: `unit` for pixels, `dataset` for log-mel pictures
    /// (whoever makes them), `none` for the rest.
    pub normalize: Option<Normalize>,
    /// `data.augment`: random changes to the samples of the training split.
    pub augment: AugmentOptions,
    /// `data.sampling`: the order of training samples; `random` for `text` and `tokens`, `shuffle` for the rest, where not
    /// given.
    pub sampling: Option<Sampling>,
    /// `data.drop_last`: whether the last batch of a pass is left out when it is not full (default true).
    pub drop_last: Option<bool>,
    /// `data.prefetch`: batches read ahead (default 4).
    pub prefetch: usize,
    /// `data.threads`: threads that read ahead (default 1).
    pub threads: usize,
    /// `data.resident`: whether the training split lies on the device, which then gathers batches itself (default `"auto"`).
    pub resident: Resident,
}

/// `data.resident`: results have the same bits whatever it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resident {
    /// `"auto"`: where the samples are plain, lying in memory with nothing drawn for any, and a device has room for them in a
    /// quarter of what is free once the model is there.
    #[default]
    Auto,
    /// `true`: always; an error where samples are not plain.
    Always,
    /// `false`: never; batches are read ahead and copied.
    Never,
}

impl DataOptions {
    /// The defaults for a format.
    pub fn new(format: FormatOptions) -> Self {
        DataOptions {
            format,
            split: SplitOptions::default(),
            normalize: None,
            augment: AugmentOptions::default(),
            sampling: None,
            drop_last: None,
            prefetch: 4,
            threads: 1,
            resident: Resident::Auto,
        }
    }
}

/// `data.format` with the keys of each format.
#[derive(Clone, Debug, PartialEq)]
pub enum FormatOptions {
    /// `digits`: 1,797 handwritten digits of 8x8 pixels, part of the program (default split: `test = 0.2`).
    Digits,
    /// `idx`: MNIST's format, also gzip.
    Idx(IdxOptions),
    /// `csv`: a table of numbers.
    Csv(CsvOptions),
    /// `images`: folders of PNG or JPEG, one a class.
    Images(ImagesOptions),
    /// `audio`: WAV files, by class folder or by a pattern on their names.
    Audio(AudioOptions),
    /// `text`: one long text, of which the next token is to be told.
    Text(TextOptions),
    /// `tokens`: nanoGPT's and llm.c's `.bin` files.
    Tokens(TokensOptions),
    /// `lines`: one labelled text a line.
    Lines(LinesOptions),
    /// `inline`: a few numbers in the run file itself.
    Inline(InlineOptions),
}

impl FormatOptions {
    /// The name as `data.format` has it.
    pub fn name(&self) -> &'static str {
        match self {
            FormatOptions::Digits => "digits",
            FormatOptions::Idx(_) => "idx",
            FormatOptions::Csv(_) => "csv",
            FormatOptions::Images(_) => "images",
            FormatOptions::Audio(_) => "audio",
            FormatOptions::Text(_) => "text",
            FormatOptions::Tokens(_) => "tokens",
            FormatOptions::Lines(_) => "lines",
            FormatOptions::Inline(_) => "inline",
        }
    }
}

/// Keys of `format = "idx"`. The four files are found in `path` by their usual names, or given one by one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IdxOptions {
    /// `data.path`: the folder.
    pub path: Option<PathBuf>,
    /// `data.images`: values of the training samples.
    pub images: Option<PathBuf>,
    /// `data.labels`: their classes.
    pub labels: Option<PathBuf>,
    /// `data.test_images`.
    pub test_images: Option<PathBuf>,
    /// `data.test_labels`.
    pub test_labels: Option<PathBuf>,
    /// `data.classes`: number of classes; one more than the largest label where not given.
    pub classes: Option<usize>,
}

/// A column of a CSV table.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// By its name in the header.
    Name(String),
    /// By its number, from 0; -1 is the last.
    Number(i64),
}

/// `data.target_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// `class`: each distinct cell is a class.
    Class,
    /// `real`: numbers.
    Real,
}

/// Keys of `format = "csv"`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CsvOptions {
    /// `data.path`: the file, also gzip.
    pub path: PathBuf,
    /// `data.validation`: a file of its own for the validation split.
    pub validation: Option<PathBuf>,
    /// `data.test`: a file of its own for the test split.
    pub test: Option<PathBuf>,
    /// `data.header`: whether the first line names the columns; where not given, it does when no cell of it is a number.
    pub header: Option<bool>,
    /// `data.delimiter`: one character (default `,`; tab for a name that ends in `.tsv`).
    pub delimiter: Option<char>,
    /// `data.target`: one or more columns (default: the last).
    pub target: Vec<Column>,
    /// `data.target_type`; where not given, `class` when a cell of the one target column is not a number, else `real`.
    pub target_type: Option<TargetKind>,
    /// `data.features`: the input columns (default: all that are not targets).
    pub features: Option<Vec<Column>>,
    /// `data.shape`: the shape of an input, such as `[1, 8, 8]` (default `[columns]`).
    pub shape: Option<Vec<usize>>,
}

/// `data.color`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    /// `grey`: one channel.
    Grey,
    /// `rgb`: three channels.
    Rgb,
}

/// Keys of `format = "images"`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImagesOptions {
    /// `data.path`: a folder with a folder a class, or with `train`, `validation` (or `val`) and `test` folders of those. Files of
    /// folders within a class folder are of the class too.
    pub path: PathBuf,
    /// `data.resize`: `[height, width]` to which every picture is brought (bilinear, averaging when it shrinks).
    pub resize: Option<[usize; 2]>,
    /// `data.color`; that of the first picture where not given.
    pub color: Option<Color>,
    /// `data.cache`: keep the decoded pictures in memory; where not given, when they need at most 1 GiB.
    pub cache: Option<bool>,
}

/// `data.features` of `format = "audio"`.
#[derive(Clone, Debug, PartialEq)]
pub enum AudioFeatures {
    /// `waveform`: the samples themselves, `[samples]`. With `data.mel`, the model makes pictures of them within the step, as
    /// `log_mel` does while data is read; `data.normalize` is then that of the pictures.
    Waveform(Option<LogMelOptions>),
    /// `log_mel`: `[1, mels, frames]`, with `data.mel = { n_fft, hop, mels, scale, min_hz, max_hz }`.
    LogMel(LogMelOptions),
}

/// Keys of `format = "audio"`.
#[derive(Clone, Debug, PartialEq)]
pub struct AudioOptions {
    /// `data.path`: a folder of WAV files (with `pattern`), or of class folders as for `images`.
    pub path: PathBuf,
    /// `data.pattern`: a regular expression with a group `class` that file names (without or with `.wav`) match whole; its
    /// other groups can be used by `data.split`.
    pub pattern: Option<String>,
    /// `data.seconds`: length to which every recording is cut, or padded with silence at its end (default 1).
    pub seconds: f64,
    /// `data.samples`: that length in samples; goes before `seconds`.
    pub samples: Option<usize>,
    /// `data.features` (default `log_mel`).
    pub features: AudioFeatures,
}

impl Default for AudioOptions {
    fn default() -> Self {
        AudioOptions {
            path: PathBuf::new(),
            pattern: None,
            seconds: 1.0,
            samples: None,
            features: AudioFeatures::LogMel(LogMelOptions::default()),
        }
    }
}

/// Keys of `format = "text"`.
#[derive(Clone, Debug, PartialEq)]
pub struct TextOptions {
    /// `data.path`: a UTF-8 text, also gzip.
    pub path: PathBuf,
    /// `data.validation`: a text of its own for the validation split.
    pub validation: Option<PathBuf>,
    /// `data.test`: a text of its own for the test split.
    pub test: Option<PathBuf>,
    /// `data.tokenizer`: `characters` (default), `bytes` or `gpt2`.
    pub tokenizer: TokenizerKind,
    /// `data.context`: tokens a sample (default 64).
    pub context: usize,
}

impl Default for TextOptions {
    fn default() -> Self {
        TextOptions {
            path: PathBuf::new(),
            validation: None,
            test: None,
            tokenizer: TokenizerKind::Characters,
            context: 64,
        }
    }
}

/// Keys of `format = "tokens"`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokensOptions {
    /// `data.path`: a `.bin` file, a name with `*` for several, or a folder with `train.bin` and `val.bin` (nanoGPT) or
    /// `*_train_*.bin` and `*_val_*.bin` (llm.c).
    pub path: PathBuf,
    /// `data.validation`: a file or a name with `*` for the validation split.
    pub validation: Option<PathBuf>,
    /// `data.test`: the same for the test split.
    pub test: Option<PathBuf>,
    /// `data.vocabulary`: number of distinct tokens (default 50257, GPT-2's).
    pub vocabulary: usize,
    /// `data.context`: tokens a sample (default 1024).
    pub context: usize,
}

impl Default for TokensOptions {
    fn default() -> Self {
        TokensOptions { path: PathBuf::new(), validation: None, test: None, vocabulary: 50257, context: 1024 }
    }
}

/// Keys of `format = "lines"`.
#[derive(Clone, Debug, PartialEq)]
pub struct LinesOptions {
    /// `data.path`: a folder with one text file a class (named by the file's stem, or by its ending where the stems are all
    /// the same, as in `rt-polarity.pos`), or one file of `label<TAB>text` lines.
    pub path: PathBuf,
    /// `data.validation`: a file of `label<TAB>text` lines for the validation split.
    pub validation: Option<PathBuf>,
    /// `data.test`: the same for the test split.
    pub test: Option<PathBuf>,
    /// `data.classes`: the class of each file, as `{ neg = "a.txt", pos = "b.txt" }`, relative to `path`.
    pub classes: Vec<(String, PathBuf)>,
    /// `data.words`: how a line becomes words: `clean` (Kim 2014, default) or `whitespace`.
    pub words: Cleaning,
    /// `data.lowercase` (default true).
    pub lowercase: bool,
    /// `data.min_count`: a word that the training split has less often is unknown (default 2).
    pub min_count: usize,
    /// `data.length`: words to which every line is cut or padded; the longest of the training split where not given.
    pub length: Option<usize>,
}

impl Default for LinesOptions {
    fn default() -> Self {
        LinesOptions {
            path: PathBuf::new(),
            validation: None,
            test: None,
            classes: Vec::new(),
            words: Cleaning::Clean,
            lowercase: true,
            min_count: 2,
            length: None,
        }
    }
}

/// `data.targets` of `format = "inline"`.
#[derive(Clone, Debug, PartialEq)]
pub enum InlineTargets {
    /// Numbers: one row a sample.
    Real(Vec<Vec<f32>>),
    /// Strings: the class of each sample.
    Class(Vec<String>),
}

/// Keys of `format = "inline"`.
#[derive(Clone, Debug, PartialEq)]
pub struct InlineOptions {
    /// `data.inputs`: one row a sample.
    pub inputs: Vec<Vec<f32>>,
    /// `data.targets`: one number, row of numbers or class name a sample.
    pub targets: InlineTargets,
}

/// `data.normalize`. Pixels are first divided by their full scale (255; 16 for `digits`), except with `none`.
#[derive(Clone, Debug, PartialEq)]
pub enum Normalize {
    /// `"none"`: values as they stand in the file.
    None,
    /// `"unit"`: divided by the full scale alone.
    Unit,
    /// `"dataset"`: then less the mean and over the standard deviation of the training split, a channel (or column).
    Dataset,
    /// `{ mean = [..], std = [..] }`: then less this mean and over this standard deviation, a channel, or one for all.
    Given {
        /// One value, or one a channel.
        mean: Vec<f64>,
        /// One value, or one a channel.
        std: Vec<f64>,
    },
}

/// `data.sampling`: the order in which training samples come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// `shuffle`: every sample once a pass, in an order drawn anew for each pass.
    Shuffle,
    /// `random`: drawn with replacement; windows of text start anywhere (nanoGPT).
    Random,
    /// `sequential`: as the files have them.
    Sequential,
}

/// Which samples belong to a split: a value of `data.split.validation` or `data.split.test`.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// `0.1`: this share of all samples that the files do not hold out themselves.
    Fraction(f64),
    /// `5000`: this many samples (tokens, for text).
    Count(usize),
    /// `{ every = 10 }`: the tenth, twentieth, .. sample of each file.
    Every(usize),
    /// `{ pattern = "_[0-4]$" }`: samples of files whose name, with the folders below `path`, has a match.
    Pattern(String),
    /// `{ field = "speaker", values = ["theo"] }`: samples whose group of `data.pattern` is one of these.
    Values {
        /// Name of the group.
        field: String,
        /// Its values.
        values: Vec<String>,
    },
    /// `{ field = "index", from = 0, to = 4 }`: samples whose group of `data.pattern` is a number in this range.
    Range {
        /// Name of the group.
        field: String,
        /// The first number.
        from: i64,
        /// The last number.
        to: i64,
    },
}

/// As the run file has it.
impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Fraction(share) => write!(f, "{share}"),
            Part::Count(count) => write!(f, "{count}"),
            Part::Every(every) => write!(f, "{{ every = {every} }}"),
            Part::Pattern(pattern) => write!(f, "{{ pattern = {pattern:?} }}"),
            Part::Values { field, values } => write!(f, "{{ field = {field:?}, values = {values:?} }}"),
            Part::Range { field, from, to } => write!(f, "{{ field = {field:?}, from = {from}, to = {to} }}"),
        }
    }
}

/// `data.split`. What is left is trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SplitOptions {
    /// `data.split.validation`.
    pub validation: Option<Part>,
    /// `data.split.test`.
    pub test: Option<Part>,
    /// `data.split.stratify`: give each split the same shares of the classes (default true where targets are classes).
    pub stratify: Option<bool>,
    /// `data.split.seed`: the key of the choice (default: the run's seed). Text is never shuffled: training comes first,
    /// then validation, then test.
    pub seed: Option<u64>,
}
