//! Reading data: files opened and read once, and batches fed by threads that read ahead. The files are made by the bench itself.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::measure::{Asked, Ground, Settings, Task, measure};
use super::results::Figure;
use crate::data::options::{AudioOptions, CsvOptions, IdxOptions, ImagesOptions, TextOptions, TokensOptions};
use crate::data::{Batch, DataOptions, FormatOptions, Inputs, Loader, OpenedData, Prefetch, Targets, open};
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// Samples of a batch.
const BATCH: usize = 64;
/// Batches that are read ahead.
const PREFETCH: usize = 4;
/// Classes of labelled samples.
const CLASSES: usize = 10;
/// Tokens of a sample.
const CONTEXT: usize = 256;

/// Folders of processes of this number that are passed by.
const MOST_FOLDERS: usize = 1000;

/// A folder that goes when this does.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let mut number = 0;
        loop {
            let path = std::env::temp_dir().join(format!("warpstep-bench-{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Folder(path)),
                // Never into a folder that is there already, as one that was killed may leave it: it would go with ours.
                Err(error) if error.kind() == ErrorKind::AlreadyExists && number < MOST_FOLDERS => number += 1,
                Err(error) => return Err(Error::io("create", &path, error)),
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is in the system's folder for such things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| Error::io("create", folder, error))?;
    }
    std::fs::write(path, bytes).map_err(|error| Error::io("write", path, error))
}

fn random_bytes(len: usize, stream: u32) -> Vec<u8> {
    let stream = Philox::new(1, Purpose::Sampling, stream);
    let mut words = vec![0u32; len.div_ceil(4)];
    stream.words(0, &mut words);
    words.into_iter().flat_map(u32::to_le_bytes).take(len).collect()
}

/// Data on disk.
struct Files {
    options: DataOptions,
    /// Bytes of the files.
    bytes: usize,
    samples: usize,
}

/// Formats that are read.
const FORMATS: [&str; 6] = ["idx", "csv", "images", "audio", "text", "tokens"];

/// Makes the files of a format: about as many samples, of random values, at `share` of the usual number.
fn files(format: &str, folder: &Path, share: f64) -> Result<Files> {
    let count = |usual: usize| ((usual as f64 * share) as usize).max(2 * BATCH);
    let (format, bytes, samples) = match format {
        "idx" => idx(folder, count(6000))?,
        "csv" => csv(folder, count(6000))?,
        "images" => images(folder, count(400))?,
        "audio" => audio(folder, count(400))?,
        "text" => text(folder, count(4096))?,
        _ => tokens(folder, count(8192))?,
    };
    Ok(Files { options: DataOptions::new(format), bytes, samples })
}

/// Pictures of 28 x 28 bytes, as MNIST has them.
fn idx(folder: &Path, samples: usize) -> Result<(FormatOptions, usize, usize)> {
    let file = |dims: &[usize], values: Vec<u8>| -> Vec<u8> {
        let head = [0, 0, 8, dims.len() as u8].into_iter();
        let dims = dims.iter().flat_map(|&d| (d as u32).to_be_bytes());
        head.chain(dims).chain(values).collect()
    };
    let images = file(&[samples, 28, 28], random_bytes(samples * 28 * 28, 1));
    let labels = file(&[samples], (0..samples).map(|at| (at % CLASSES) as u8).collect());
    write(&folder.join("train-images-idx3-ubyte"), &images)?;
    write(&folder.join("train-labels-idx1-ubyte"), &labels)?;
    let options = IdxOptions { path: Some(folder.to_owned()), ..IdxOptions::default() };
    Ok((FormatOptions::Idx(options), images.len() + labels.len(), samples))
}

/// Rows of 32 numbers and a class.
fn csv(folder: &Path, samples: usize) -> Result<(FormatOptions, usize, usize)> {
    let stream = Philox::new(1, Purpose::Sampling, 2);
    let mut table: String = (0..32).map(|column| format!("x{column},")).collect();
    table += "class\n";
    for row in 0..samples {
        for column in 0..32 {
            table += &format!("{:.6},", stream.uniform((row * 32 + column) as u64));
        }
        table += &format!("c{}\n", row % CLASSES);
    }
    let path = folder.join("table.csv");
    write(&path, table.as_bytes())?;
    Ok((FormatOptions::Csv(CsvOptions { path, ..CsvOptions::default() }), table.len(), samples))
}

/// Pictures of 64 x 64, PNG, decoded each time that they are read.
fn images(folder: &Path, samples: usize) -> Result<(FormatOptions, usize, usize)> {
    let mut bytes = 0;
    for sample in 0..samples {
        let path = folder.join(format!("{}/{sample}.png", sample % CLASSES));
        write(&path, &[])?;
        let pixels = random_bytes(64 * 64 * 3, 100 + sample as u32);
        image::save_buffer(&path, &pixels, 64, 64, image::ExtendedColorType::Rgb8)
            .map_err(|error| Error::data(&path, format!("cannot be written: {error}")))?;
        bytes += std::fs::metadata(&path).map_or(0, |meta| meta.len() as usize);
    }
    let options = ImagesOptions { path: folder.to_owned(), cache: Some(false), ..ImagesOptions::default() };
    Ok((FormatOptions::Images(options), bytes, samples))
}

/// Half a second of sound at 16 kHz, read as log-mel pictures.
fn audio(folder: &Path, samples: usize) -> Result<(FormatOptions, usize, usize)> {
    const LEN: usize = 8000;
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut bytes = 0;
    for sample in 0..samples {
        let path = folder.join(format!("{}/{sample}.wav", sample % CLASSES));
        write(&path, &[])?;
        let wrong = |error: hound::Error| Error::data(&path, format!("cannot be written: {error}"));
        let mut writer = hound::WavWriter::create(&path, spec).map_err(wrong)?;
        for pair in random_bytes(2 * LEN, 10_000 + sample as u32).chunks_exact(2) {
            writer.write_sample(i16::from_le_bytes([pair[0], pair[1]])).map_err(wrong)?;
        }
        writer.finalize().map_err(wrong)?;
        bytes += 2 * LEN;
    }
    let options = AudioOptions { path: folder.to_owned(), seconds: 0.5, ..AudioOptions::default() };
    Ok((FormatOptions::Audio(options), bytes, samples))
}

/// A text of random letters, which is made tokens of when it is opened.
fn text(folder: &Path, samples: usize) -> Result<(FormatOptions, usize, usize)> {
    const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,;\n";
    let bytes = random_bytes(samples * CONTEXT + 1, 3);
    let text: Vec<u8> = bytes.into_iter().map(|byte| LETTERS[usize::from(byte) % LETTERS.len()]).collect();
    let path = folder.join("text.txt");
    write(&path, &text)?;
    let options = TextOptions { path, context: CONTEXT, ..TextOptions::default() };
    Ok((FormatOptions::Text(options), text.len(), samples))
}

/// Tokens in nanoGPT's form.
fn tokens(folder: &Path, samples: usize) -> Result<(FormatOptions, usize, usize)> {
    let stream = Philox::new(1, Purpose::Sampling, 4);
    let len = samples * CONTEXT + 1;
    let tokens: Vec<u8> = (0..len as u64).flat_map(|at| (stream.below(at, 50_257) as u16).to_le_bytes()).collect();
    let path = folder.join("train.bin");
    write(&path, &tokens)?;
    let options = TokensOptions { path, context: CONTEXT, ..TokensOptions::default() };
    Ok((FormatOptions::Tokens(options), tokens.len(), samples))
}

/// Opens the files and reads every sample once.
struct Opening {
    files: Files,
    /// Samples and the sum of their values, of the last pass.
    found: Option<(usize, f64)>,
    expected: (usize, f64),
}

/// The sum of a batch's values and targets, which takes all of it to be read.
fn sum(batch: &Batch) -> f64 {
    let inputs: f64 = match &batch.inputs {
        Inputs::Real(values) => values.iter().map(|&value| f64::from(value)).sum(),
        Inputs::Tokens(values) => values.iter().map(|&value| f64::from(value)).sum(),
    };
    let targets: f64 = match &batch.targets {
        Targets::Real(values) => values.iter().map(|&value| f64::from(value)).sum(),
        Targets::Index(values) => values.iter().map(|&value| f64::from(value)).sum(),
    };
    inputs + targets
}

/// Every sample of the training split, once.
fn pass(data: &OpenedData, prefetch: Prefetch) -> Result<(usize, f64)> {
    let mut loader = Loader::batches(Arc::clone(&data.splits.train), BATCH, prefetch)?;
    let (mut samples, mut all) = (0, 0.0);
    while let Some(batch) = loader.next() {
        let batch = batch?;
        samples += batch.samples;
        all += sum(&batch);
        loader.recycle(batch);
    }
    Ok((samples, all))
}

impl Opening {
    fn new(files: Files) -> Result<Self> {
        // Another number of threads than is timed.
        let expected = pass(&open(&files.options, None, 1)?, Prefetch { batches: 1, threads: 3 })?;
        if expected.0 != files.samples {
            let found = format!("{} samples, expected {}", expected.0, files.samples);
            return Err(Error::Training(format!(
                "the bench's own files of format {} hold {found}",
                files.options.format.name()
            )));
        }
        Ok(Opening { files, found: None, expected })
    }
}

impl Task for Opening {
    fn run(&mut self) -> Result<()> {
        self.found = Some(pass(&open(&self.files.options, None, 1)?, Prefetch::default())?);
        Ok(())
    }

    fn is_on_device(&self) -> bool {
        false
    }

    fn round_bytes(&self) -> usize {
        self.files.bytes
    }

    fn prepare(&mut self) -> Result<()> {
        self.found = None;
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        Ok((self.found != Some(self.expected))
            .then(|| format!("samples and their sum are {:?}, expected {:?}", self.found, self.expected)))
    }
}

/// Training batches, read ahead.
struct Feeding {
    data: OpenedData,
    loader: Loader,
    /// Batches taken so far.
    taken: u64,
    last: Option<Batch>,
    expected: Option<Batch>,
}

impl Feeding {
    fn new(files: &Files, threads: usize) -> Result<Self> {
        let mut options = files.options.clone();
        options.threads = threads;
        options.prefetch = PREFETCH;
        let data = open(&options, None, 1)?;
        let loader = data.train_batches(BATCH, 1, 0)?;
        Ok(Feeding { data, loader, taken: 0, last: None, expected: None })
    }

    fn bytes(batch: &Batch) -> usize {
        let inputs = match &batch.inputs {
            Inputs::Real(values) => values.len(),
            Inputs::Tokens(values) => values.len(),
        };
        let targets = match &batch.targets {
            Targets::Real(values) => values.len(),
            Targets::Index(values) => values.len(),
        };
        4 * (inputs + targets)
    }
}

fn ended() -> Error {
    Error::Training("the training batches ended, which they never do".to_owned())
}

impl Task for Feeding {
    fn run(&mut self) -> Result<()> {
        if let Some(batch) = self.last.take() {
            self.loader.recycle(batch);
        }
        self.last = Some(self.loader.next().ok_or_else(ended)??);
        self.taken += 1;
        Ok(())
    }

    fn least_runs(&self) -> usize {
        // Those that were read ahead cost nothing, and those behind them are waited for.
        4 * PREFETCH
    }

    fn is_on_device(&self) -> bool {
        false
    }

    fn round_bytes(&self) -> usize {
        self.last.as_ref().map_or(0, Self::bytes)
    }

    fn prepare(&mut self) -> Result<()> {
        self.last = None;
        // A batch is a function of its number: read alone, it must be the same.
        let mut loader = self.data.train_batches(BATCH, 1, self.taken)?;
        self.expected = Some(loader.next().ok_or_else(ended)??);
        Ok(())
    }

    fn verify(&mut self) -> Result<Option<String>> {
        Ok((self.last != self.expected)
            .then(|| format!("batch {} is not what it is when it is read alone", self.taken)))
    }
}

/// The figures of the suite, which no device has to do with.
///
/// # Errors
/// What reading reports.
pub fn figures(
    ground: &dyn Ground,
    settings: &Settings,
    share: f64,
    wanted: &dyn Fn(&str) -> bool,
    told: &mut dyn FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let figure = |name: String, samples: usize, bytes: usize| Figure {
        suite: "data".to_owned(),
        name,
        amount: (samples as f64, "sample".to_owned()),
        bytes: Some(bytes as f64),
        ..Figure::default()
    };
    let folder = Folder::new()?;
    for format in FORMATS {
        let opening = format!("open/{format}");
        let feeding = [1, 2].map(|threads: usize| {
            (threads, format!("feed/{format}/{threads}_thread{}", if threads == 1 { "" } else { "s" }))
        });
        if !wanted(&opening) && !feeding.iter().any(|(_, name)| wanted(name)) {
            continue;
        }
        let files = files(format, &folder.0.join(format), share)?;
        for (threads, name) in feeding.into_iter().filter(|(_, name)| wanted(name)) {
            let mut task = Feeding::new(&files, threads)?;
            task.run()?;
            let bytes = task.round_bytes();
            let asked = Asked { figure: figure(name, BATCH, bytes), limit: &|_| None };
            told(measure(ground, settings, &mut task, None, asked)?)?;
        }
        if wanted(&opening) {
            let (samples, bytes) = (files.samples, files.bytes);
            let mut task = Opening::new(files)?;
            let asked = Asked { figure: figure(opening, samples, bytes), limit: &|_| None };
            told(measure(ground, settings, &mut task, None, asked)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_there_already_is_passed_by_and_stays() {
        let [first, second] = [Folder::new().unwrap(), Folder::new().unwrap()];
        assert_ne!(first.0, second.0);
        std::fs::write(first.0.join("kept"), "").unwrap();
        let gone = second.0.clone();
        drop(second);
        assert!(first.0.join("kept").exists() && !gone.exists());
    }
}
