//! Files of every data format, with bytes flipped, cut off, doubled or blanked at random: the program neither panics nor
//! hangs; it reads them, or says in one sentence what is wrong with which file.
//!
//! Every run draws anew from a printed seed; `WARPSTEP_TEST_SEED=n` runs seed `n` again, `WARPSTEP_TEST_CASES=n` more
//! cases.

use std::error::Error as StdError;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use warpstep::data::options::{
    AudioFeatures, AudioOptions, CsvOptions, IdxOptions, ImagesOptions, LinesOptions, TextOptions, TokensOptions,
};
use warpstep::data::{
    Batch, DataOptions, Dataset, FormatOptions, Pick, Preprocess, TokenizerKind, inspect, open, read_batch,
};
use warpstep::random::{Philox, Purpose};
use warpstep::{Error, Result};

type TestResult = std::result::Result<(), Box<dyn StdError>>;

/// A case that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Damaged versions of each set of files.
fn cases() -> u64 {
    std::env::var("WARPSTEP_TEST_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(150)
}

fn seed() -> u64 {
    let given = std::env::var("WARPSTEP_TEST_SEED").ok().and_then(|s| s.parse().ok());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    given.unwrap_or(now % 1_000_000)
}

/// `bytes` with one to three damages, a pure function of the case.
fn damaged(mut bytes: Vec<u8>, random: &Philox, case: u64) -> Vec<u8> {
    let base = case * 256;
    let mut drawn = 0;
    let mut below = |bound: usize| {
        drawn += 1;
        random.below(base + drawn, bound.max(1) as u64) as usize
    };
    for _ in 0..=below(3) {
        if bytes.is_empty() {
            break;
        }
        // Half of the damages hit the head of the file, where its header is.
        let len = bytes.len();
        let at = if below(2) == 0 { below(len.min(64)) } else { below(len) };
        let end = (at + 1 + below(16)).min(len);
        match below(6) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << below(8),
            2 => bytes[at] = below(256) as u8,
            3 => bytes[at..end].fill(if below(2) == 0 { 0 } else { 0xff }),
            4 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                bytes.drain(at..end);
            }
        }
    }
    bytes
}

fn read_all(split: &dyn Dataset) -> Result<()> {
    let mut batch = Batch::zeros(&split.input(), &split.target(), 0);
    for index in 0..split.len().min(50) {
        read_batch(split, &[Pick::Sample(index)], None, &mut batch)?;
    }
    Ok(())
}

/// Opens, reads and shows all that a run would, and the file that a user gives to `predict`.
fn use_data(options: &DataOptions, user_file: Option<&Path>) -> Result<()> {
    let data = open(options, None, 1)?;
    read_all(&*data.splits.train)?;
    for split in [&data.splits.validation, &data.splits.test].into_iter().flatten() {
        read_all(&**split)?;
    }
    inspect(&data)?;
    if let Some(file) = user_file {
        data.preprocess.file(file)?;
    }
    Ok(())
}

/// Runs `work` on a thread of its own: its result, or what went wrong besides an error.
fn guarded(work: impl FnOnce() -> Result<()> + Send + 'static) -> std::result::Result<Result<()>, String> {
    let (done, result) = channel();
    std::thread::spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        let _ = done.send(outcome.map_err(|_| "it panicked".to_string()));
    });
    result.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(format!("no end after {PATIENCE:?}")))
}

fn is_clear(error: &Error) -> bool {
    let text = error.to_string();
    matches!(error, Error::Data { .. } | Error::Io { .. } | Error::Config { .. })
        && text.len() > 20
        && !text.contains('\n')
}

/// Damages each of `files` in turn, uses the data, and puts the file back.
fn survives(name: &str, files: &[PathBuf], user_file: Option<&Path>, format: FormatOptions) -> TestResult {
    let seed = seed();
    println!("{name}: seed {seed}");
    let random = Philox::new(seed, Purpose::Sampling, 1);
    let options = Arc::new(DataOptions::new(format));
    let user_file = user_file.map(Path::to_path_buf);
    // Sound files must be read, or the damage would prove nothing.
    use_data(&options, user_file.as_deref())?;
    let mut refused = 0;
    for (i, file) in files.iter().enumerate() {
        let sound = std::fs::read(file)?;
        for case in 0..cases().div_ceil(files.len() as u64) {
            std::fs::write(file, damaged(sound.clone(), &random, case * files.len() as u64 + i as u64))?;
            let (options, user_file) = (Arc::clone(&options), user_file.clone());
            match guarded(move || use_data(&options, user_file.as_deref())) {
                Ok(Ok(())) => {}
                Ok(Err(error)) if is_clear(&error) => refused += 1,
                Ok(Err(error)) => return Err(format!("{name}, seed {seed}, case {case}: unclear: {error}").into()),
                Err(problem) => {
                    let kept = std::env::temp_dir().join(format!("damaged_{name}_{seed}_{case}"));
                    std::fs::copy(file, &kept)?;
                    return Err(format!("{name}, seed {seed}, case {case}: {problem}; see {}", kept.display()).into());
                }
            }
        }
        std::fs::write(file, sound)?;
    }
    println!("{name}: {refused} of {} refused", cases());
    Ok(())
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<PathBuf> {
    let path = folder.join(name);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(&path, bytes)?;
    Ok(path)
}

fn idx_file(kind: u8, dims: &[u32], values: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, kind, dims.len() as u8];
    dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    bytes.extend(values);
    bytes
}

#[test]
fn damaged_idx_is_read_or_refused() -> TestResult {
    let floats: Vec<u8> = (0..72).flat_map(|v| (v as f32).to_be_bytes()).collect();
    let doubles: Vec<u8> = (0..8).flat_map(|v| f64::from(v % 3).to_be_bytes()).collect();
    let pixels: Vec<u8> = (0..72).collect();
    let images = [idx_file(8, &[8, 3, 3], &pixels), idx_file(0x0d, &[8, 3, 3], &floats)];
    let labels = [idx_file(8, &[8], &[0, 1, 2, 0, 1, 2, 0, 1]), idx_file(0x0e, &[8], &doubles)];
    for ((images, labels), packed) in images.into_iter().zip(labels).zip([true, false]) {
        let folder = tempfile::tempdir()?;
        let pack = |bytes: Vec<u8>| -> std::io::Result<Vec<u8>> {
            if !packed {
                return Ok(bytes);
            }
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(&bytes)?;
            encoder.finish()
        };
        let images = write(folder.path(), "train-images-idx3-ubyte", &pack(images)?)?;
        let labels = write(folder.path(), "train-labels-idx1-ubyte", &pack(labels)?)?;
        let idx = IdxOptions { path: Some(folder.path().into()), ..Default::default() };
        let name = if packed { "idx of bytes, packed" } else { "idx of floats" };
        let picture = folder.path().join("user.png");
        image::GrayImage::new(4, 4).save(&picture)?;
        survives(name, &[images, labels, picture.clone()], Some(&picture), FormatOptions::Idx(idx))?;
    }
    Ok(())
}

#[test]
fn damaged_csv_is_read_or_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let text = "width,height,\"kind, of\"\n1.5,2,big\n3,4e-2,small\n-5,6.25,\"quite big\"\n7,8,small\n";
    let file = write(folder.path(), "a.csv", text.as_bytes())?;
    survives(
        "csv",
        std::slice::from_ref(&file),
        Some(&file),
        FormatOptions::Csv(CsvOptions { path: file.clone(), ..Default::default() }),
    )
}

#[test]
fn damaged_images_are_read_or_refused() -> TestResult {
    for ending in ["png", "jpg"] {
        let folder = tempfile::tempdir()?;
        let mut files = Vec::new();
        for (class, shade) in [("a", 10u8), ("b", 200)] {
            let file = write(folder.path(), &format!("{class}/0.{ending}"), b"")?;
            let pixel = |x: u32, y: u32| image::Rgb([shade, (x * 20) as u8, (y * 30) as u8]);
            image::RgbImage::from_fn(9, 7, pixel).save(&file)?;
            files.push(file);
        }
        let images = ImagesOptions { path: folder.path().into(), ..Default::default() };
        survives(&format!("images of {ending}"), &files, Some(&files[0]), FormatOptions::Images(images))?;
    }
    Ok(())
}

#[test]
fn damaged_audio_is_read_or_refused() -> TestResult {
    for (bits_per_sample, sample_format) in [(16, hound::SampleFormat::Int), (32, hound::SampleFormat::Float)] {
        let folder = tempfile::tempdir()?;
        let mut files = Vec::new();
        for class in ["a", "b"] {
            let file = write(folder.path(), &format!("{class}/0.wav"), b"")?;
            let spec = hound::WavSpec { channels: 2, sample_rate: 8000, bits_per_sample, sample_format };
            let mut writer = hound::WavWriter::create(&file, spec)?;
            for i in 0..600 {
                match sample_format {
                    hound::SampleFormat::Int => writer.write_sample(i * 7 % 3000)?,
                    hound::SampleFormat::Float => writer.write_sample((i as f32 * 0.1).sin())?,
                }
            }
            writer.finalize()?;
            files.push(file);
        }
        for features in [AudioOptions::default().features, AudioFeatures::Waveform(None)] {
            let audio = AudioOptions { path: folder.path().into(), seconds: 0.05, features, ..Default::default() };
            survives(
                &format!("audio of {bits_per_sample} bits"),
                &files,
                Some(&files[0]),
                FormatOptions::Audio(audio),
            )?;
        }
    }
    Ok(())
}

#[test]
fn damaged_text_is_read_or_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let text = "Ünder the café's roof, 12 birds\n\n  sang ✓ all day.\n".repeat(5);
    let file = write(folder.path(), "a.txt", text.as_bytes())?;
    for tokenizer in [TokenizerKind::Characters, TokenizerKind::Bytes, TokenizerKind::Gpt2] {
        let text = TextOptions { path: file.clone(), tokenizer, context: 8, ..Default::default() };
        survives("text", std::slice::from_ref(&file), None, FormatOptions::Text(text))?;
    }
    Ok(())
}

#[test]
fn damaged_tokens_are_read_or_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let plain: Vec<u8> = (0..100u16).flat_map(u16::to_le_bytes).collect();
    let mut header = [0i32; 256];
    header[..3].copy_from_slice(&[20240520, 1, 100]);
    let headed: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).chain(plain.iter().copied()).collect();
    for (name, bytes) in [("nanogpt.bin", plain), ("llmc.bin", headed)] {
        let file = write(folder.path(), name, &bytes)?;
        let tokens = TokensOptions { path: file.clone(), context: 8, vocabulary: 100, ..Default::default() };
        survives(name, std::slice::from_ref(&file), None, FormatOptions::Tokens(tokens))?;
    }
    Ok(())
}

#[test]
fn damaged_lines_are_read_or_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let one =
        write(folder.path(), "all.tsv", "good\tA fine film ✓\nbad\tIt's not\ngood\tfine, fine\nbad\tno\n".as_bytes())?;
    let lines = |path: &Path| FormatOptions::Lines(LinesOptions { path: path.into(), ..Default::default() });
    survives("labelled lines", std::slice::from_ref(&one), Some(&one), lines(&one))?;
    let (a, b) = (
        write(folder.path(), "set/x.neg", b"it's bad\nso bad\n")?,
        write(folder.path(), "set/x.pos", b"fine\nso fine\n")?,
    );
    survives("a file a class", &[a.clone(), b], Some(&a), lines(&folder.path().join("set")))
}

#[test]
fn damaged_preprocessing_of_a_checkpoint_is_read_or_refused() -> TestResult {
    let seed = seed();
    println!("preprocessing: seed {seed}");
    let folder = tempfile::tempdir()?;
    let file = write(folder.path(), "all.tsv", b"good\tfine film\nbad\tbad film\ngood\tfine\nbad\tbad film\n")?;
    let table = write(folder.path(), "a.csv", b"a,b,c\n1,2,3\n4,5,6\n")?;
    let picture = folder.path().join("user.png");
    image::GrayImage::new(4, 4).save(&picture)?;
    let random = Philox::new(seed, Purpose::Sampling, 2);
    let formats = [
        (FormatOptions::Lines(LinesOptions { path: file.clone(), ..Default::default() }), file),
        (FormatOptions::Csv(CsvOptions { path: table.clone(), ..Default::default() }), table),
        (FormatOptions::Digits, picture),
    ];
    for (format, user_file) in formats {
        let json = open(&DataOptions::new(format), None, 1)?.preprocess.to_json()?;
        Preprocess::from_json(&json)?.file(&user_file)?;
        for case in 0..cases() {
            let bytes = damaged(json.clone().into_bytes(), &random, case);
            let user_file = user_file.clone();
            let used = guarded(move || {
                let preprocess = Preprocess::from_json(&String::from_utf8_lossy(&bytes))?;
                preprocess.file(&user_file).map(|_| ())
            });
            match used {
                Ok(Ok(())) => {}
                Ok(Err(error)) => assert!(is_clear(&error), "seed {seed}, case {case}: {error}"),
                Err(problem) => return Err(format!("seed {seed}, case {case}: {problem}").into()),
            }
        }
    }
    Ok(())
}
