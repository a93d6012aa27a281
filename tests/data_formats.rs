//! Every data format gives the samples that its files hold, and says clearly what is wrong with those that do not.

use std::error::Error as StdError;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use warpstep::data::augment::AugmentOptions;
use warpstep::data::options::{
    AudioFeatures, AudioOptions, Column, CsvOptions, IdxOptions, ImagesOptions, InlineOptions, InlineTargets,
    LinesOptions, Normalize, Part, Sampling, SplitOptions, TargetKind, TextOptions, TokensOptions,
};
use warpstep::data::{
    Batch, DataOptions, Dataset, FormatOptions, InputSpec, Inputs, Loader, OpenedData, Pick, Prefetch, Preprocess,
    Share, TargetSpec, Targets, TokenizerKind, inspect, open, read_batch,
};

type TestResult = Result<(), Box<dyn StdError>>;

/// Where the shared data sets are, or none.
fn shared(name: &str) -> Option<PathBuf> {
    let places = [std::env::var_os("WARPSTEP_DATA").map(PathBuf::from), Some("../shared/data".into())];
    let found = places.into_iter().flatten().map(|p| p.join(name)).find(|p| p.exists());
    if found.is_none() {
        println!("skipped: no {name} in $WARPSTEP_DATA or ../shared/data");
    }
    found
}

fn read(dataset: &dyn Dataset, picks: &[Pick]) -> warpstep::Result<Batch> {
    let mut batch = Batch::zeros(&dataset.input(), &dataset.target(), 0);
    read_batch(dataset, picks, None, &mut batch)?;
    Ok(batch)
}

fn reals(inputs: &Inputs) -> &[f32] {
    match inputs {
        Inputs::Real(values) => values,
        Inputs::Tokens(_) => panic!("expected real inputs"),
    }
}

fn tokens(inputs: &Inputs) -> &[i32] {
    match inputs {
        Inputs::Tokens(values) => values,
        Inputs::Real(_) => panic!("expected tokens"),
    }
}

fn labels(targets: &Targets) -> &[i32] {
    match targets {
        Targets::Index(values) => values,
        Targets::Real(_) => panic!("expected whole-number targets"),
    }
}

fn sizes(data: &OpenedData) -> [usize; 3] {
    let len = |split: &Option<Arc<dyn Dataset>>| split.as_ref().map_or(0, |s| s.len());
    [data.splits.train.len(), len(&data.splits.validation), len(&data.splits.test)]
}

fn split(validation: Option<Part>, test: Option<Part>) -> SplitOptions {
    SplitOptions { validation, test, ..SplitOptions::default() }
}

/// The message of an error that must come, which must be the user's and have all of `parts`.
fn refused(options: &DataOptions, parts: &[&str]) {
    let error = match open(options, None, 1) {
        Ok(data) => match read(&*data.splits.train, &[Pick::Sample(0)]) {
            Ok(_) => panic!("expected an error that tells of {parts:?}"),
            Err(error) => error,
        },
        Err(error) => error,
    };
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    assert!(!text.contains('\n'), "{text}");
    for part in parts {
        assert!(text.contains(part), "expected {part:?} in: {text}");
    }
}

#[test]
fn digits_need_no_file_and_hold_out_a_fifth() -> TestResult {
    let data = open(&DataOptions::new(FormatOptions::Digits), None, 1)?;
    assert_eq!(sizes(&data), [1438, 0, 359]);
    assert_eq!(*data.input(), InputSpec::Real { shape: vec![1, 8, 8] });
    let batch = read(&*data.splits.train, &(0..1438).map(Pick::Sample).collect::<Vec<_>>())?;
    let values = reals(&batch.inputs);
    assert!(values.iter().all(|v| (0.0..=1.0).contains(v)) && values.contains(&1.0));
    let counts = data.splits.train.class_counts().ok_or("no counts")?;
    assert!(counts.iter().all(|c| (138..150).contains(c)), "{counts:?}");
    let page = inspect(&data)?;
    assert!(page.contains("train 1,438, test 359") && page.contains("[1, 8, 8]"), "{page}");
    Ok(())
}

#[test]
fn mnist_has_its_counts_and_its_published_mean_and_deviation() -> TestResult {
    let Some(path) = shared("mnist") else { return Ok(()) };
    let mut options = DataOptions::new(FormatOptions::Idx(IdxOptions { path: Some(path), ..Default::default() }));
    options.normalize = Some(Normalize::Dataset);
    let data = open(&options, None, 1)?;
    assert_eq!(sizes(&data), [60_000, 0, 10_000]);
    assert_eq!(*data.input(), InputSpec::Real { shape: vec![1, 28, 28] });
    // The first labels of the two files.
    let first: Vec<Pick> = (0..5).map(Pick::Sample).collect();
    assert_eq!(labels(&read(&*data.splits.train, &first)?.targets), [5, 0, 4, 1, 9]);
    let test = data.splits.test.as_ref().ok_or("no test split")?;
    assert_eq!(labels(&read(&**test, &first)?.targets), [7, 2, 1, 0, 4]);
    // Published: mean 0.1307, deviation 0.3081.
    let affine = data.preprocess.affine.as_ref().ok_or("no normalization")?;
    let std = 1.0 / (affine.scale[0] * 255.0);
    let mean = -affine.shift[0] * std;
    assert!((mean - 0.1307).abs() < 5e-5 && (std - 0.3081).abs() < 5e-5, "{mean} {std}");
    let mut held = options.clone();
    held.split = split(Some(Part::Count(5000)), None);
    assert_eq!(sizes(&open(&held, None, 1)?), [55_000, 5_000, 10_000]);
    held.split = split(None, Some(Part::Fraction(0.1)));
    refused(&held, &["data.split.test", "10000"]);
    Ok(())
}

#[test]
fn tinyshakespeare_has_its_counts_and_windows_are_followed_by_the_next_token() -> TestResult {
    let Some(path) = shared("tinyshakespeare/input.txt") else { return Ok(()) };
    let text = std::fs::read_to_string(&path)?;
    let mut options = DataOptions::new(FormatOptions::Text(TextOptions { path, ..Default::default() }));
    options.split = split(Some(Part::Fraction(0.1)), None);
    let data = open(&options, None, 1)?;
    assert_eq!(*data.input(), InputSpec::Tokens { context: 64, vocabulary: 65 });
    assert_eq!(data.splits.train.starts(), Some(1_003_854 - 64));
    assert_eq!(sizes(&data), [1_003_853 / 64, 111_539 / 64, 0]);
    let tokenizer = data.preprocess.tokenizer().ok_or("no tokenizer")?;
    let batch = read(&*data.splits.train, &[Pick::Window(1000), Pick::Sample(3)])?;
    let (inputs, targets) = (tokens(&batch.inputs), labels(&batch.targets));
    assert_eq!(tokenizer.decode(&inputs[..64]), text[1000..1064]);
    assert_eq!(tokenizer.decode(&targets[..64]), text[1001..1065]);
    assert_eq!(tokenizer.decode(&inputs[64..]), text[192..256]);
    let validation = data.splits.validation.as_ref().ok_or("no validation split")?;
    let batch = read(&**validation, &[Pick::Sample(0)])?;
    assert_eq!(tokenizer.decode(tokens(&batch.inputs)), text[1_003_854..1_003_918]);
    assert!(inspect(&data)?.contains("First Citizen"));
    Ok(())
}

#[test]
fn rt_polarity_has_its_counts_and_every_tenth_line_is_test() -> TestResult {
    let Some(path) = shared("rt-polarity") else { return Ok(()) };
    let mut options = DataOptions::new(FormatOptions::Lines(LinesOptions { path, ..Default::default() }));
    options.split = split(None, Some(Part::Every(10)));
    let data = open(&options, None, 1)?;
    assert_eq!(sizes(&data), [2 * (5331 - 533), 0, 2 * 533]);
    assert_eq!(*data.target(), TargetSpec::Class { names: vec!["neg".into(), "pos".into()] });
    assert_eq!(data.splits.train.class_counts(), Some(vec![4798, 4798]));
    assert!(inspect(&data)?.contains("simplistic , silly and tedious"));
    let sample = data.preprocess.text("a thoughtful film that wins you over", Path::new("line"))?;
    assert_eq!(tokens(&sample[0].input).len(), data.input().elements());
    Ok(())
}

#[test]
fn fsdd_has_its_counts_and_the_test_is_told_by_the_index() -> TestResult {
    let Some(path) = shared("fsdd") else { return Ok(()) };
    let pattern = Some(r"(?P<class>\d)_(?P<speaker>\w+)_(?P<index>\d+)".to_string());
    let mut options =
        DataOptions::new(FormatOptions::Audio(AudioOptions { path: path.clone(), pattern, ..Default::default() }));
    options.split = split(None, Some(Part::Range { field: "index".into(), from: 0, to: 4 }));
    let data = open(&options, None, 1)?;
    assert_eq!(sizes(&data), [2700, 0, 300]);
    assert_eq!(*data.input(), InputSpec::Real { shape: vec![1, 40, 101] });
    assert_eq!(data.splits.train.class_counts(), Some(vec![270; 10]));
    // `predict` sees a file as the evaluation does.
    let test = data.splits.test.as_ref().ok_or("no test split")?;
    let batch = read(&**test, &[Pick::Sample(0)])?;
    let user = Preprocess::from_json(&data.preprocess.to_json()?)?.file(&path.join("0_george_0.wav"))?;
    assert_eq!(reals(&user[0].input), reals(&batch.inputs));
    assert!(inspect(&data)?.contains("class 0"));
    Ok(())
}

/// An IDX file of bytes.
fn idx(dims: &[u32], values: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, dims.len() as u8];
    dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    bytes.extend(values);
    bytes
}

fn idx_options(folder: &Path) -> DataOptions {
    DataOptions::new(FormatOptions::Idx(IdxOptions { path: Some(folder.into()), ..Default::default() }))
}

#[test]
fn idx_files_that_disagree_are_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes);
    let options = idx_options(folder.path());
    refused(&options, &["train", "images"]);
    write("train-images-idx3-ubyte", &idx(&[3, 2, 2], &[7; 12]))?;
    refused(&options, &["data.labels"]);
    write("train-labels-idx1-ubyte", &idx(&[2], &[0, 1]))?;
    refused(&options, &["holds 2 labels", "3 samples"]);
    write("train-labels-idx1-ubyte", &idx(&[3], &[0, 1, 2]))?;
    assert_eq!(sizes(&open(&options, None, 1)?), [3, 0, 0]);
    write("t10k-images-idx3-ubyte", &idx(&[1, 2, 2], &[7; 4]))?;
    write("t10k-labels-idx1-ubyte", &idx(&[1], &[3]))?;
    refused(&options, &["t10k-labels", "label 0 is 3", "0 to 2"]);
    write("train-images-idx3-ubyte", &idx(&[3, 2, 2], &[7; 11]))?;
    refused(&options, &["holds 27 bytes", "expected 28"]);
    write("train-images-idx3-ubyte", b"\x89PNG....")?;
    refused(&options, &["expected an IDX file"]);
    write("train-images-idx3-ubyte", &idx(&[u32::MAX, u32::MAX, u32::MAX, u32::MAX], &[]))?;
    refused(&options, &["expected far more"]);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&idx(&[3, 2, 2], &[7; 12]))?;
    let packed = packed.finish()?;
    write("train-images-idx3-ubyte", &packed[..packed.len() - 9])?;
    refused(&options, &["gzip", "cut short"]);
    let mut wrong = options.clone();
    wrong.format = FormatOptions::Idx(IdxOptions::default());
    refused(&wrong, &["data.images"]);
    Ok(())
}

#[test]
fn idx_gives_its_pixels_and_validation_is_taken_from_the_training_samples() -> TestResult {
    let folder = tempfile::tempdir()?;
    let pixels: Vec<u8> = (0..40).collect();
    std::fs::write(folder.path().join("train-images.idx3-ubyte"), idx(&[10, 2, 2], &pixels))?;
    std::fs::write(folder.path().join("train-labels.idx1-ubyte"), idx(&[10], &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1]))?;
    let mut options = idx_options(folder.path());
    options.normalize = Some(Normalize::Given { mean: vec![0.5], std: vec![0.25] });
    options.split = split(Some(Part::Fraction(0.2)), None);
    let data = open(&options, None, 3)?;
    assert_eq!(sizes(&data), [8, 2, 0]);
    assert_eq!(data.splits.validation.as_ref().and_then(|s| s.class_counts()), Some(vec![1, 1]));
    options.split = SplitOptions::default();
    let batch = read(&*open(&options, None, 3)?.splits.train, &[Pick::Sample(9)])?;
    for (value, pixel) in reals(&batch.inputs).iter().zip(&pixels[36..]) {
        assert!((value - (f32::from(*pixel) / 255.0 - 0.5) / 0.25).abs() < 1e-5);
    }
    Ok(())
}

fn csv_options(path: PathBuf) -> CsvOptions {
    CsvOptions { path, ..CsvOptions::default() }
}

#[test]
fn csv_columns_are_found_by_name_and_by_number() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    std::fs::write(&path, "width,kind,height\n1, big ,2\n3,small,4\n5,big,6.5\n")?;
    let mut csv = csv_options(path.clone());
    csv.target = vec![Column::Name("kind".into())];
    let data = open(&DataOptions::new(FormatOptions::Csv(csv.clone())), None, 1)?;
    let batch = read(&*data.splits.train, &(0..3).map(Pick::Sample).collect::<Vec<_>>())?;
    assert_eq!(reals(&batch.inputs), [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]);
    assert_eq!(labels(&batch.targets), [0, 1, 0]);
    assert_eq!(data.preprocess.class_names(), Some(&["big".to_string(), "small".to_string()][..]));
    // A user's rows, with and without the header, in another order.
    for rows in ["height,width\n2,1\n", "1,2\n", "1,big,2\n"] {
        let user = data.preprocess.text(rows, Path::new("rows"))?;
        assert_eq!(reals(&user[0].input), [1.0, 2.0], "{rows}");
    }
    csv.target = vec![Column::Number(-1)];
    csv.features = Some(vec![Column::Number(0)]);
    let data = open(&DataOptions::new(FormatOptions::Csv(csv.clone())), None, 1)?;
    let batch = read(&*data.splits.train, &[Pick::Sample(2)])?;
    assert_eq!((reals(&batch.inputs), &batch.targets), (&[5.0][..], &Targets::Real(vec![6.5])));
    csv.target_type = Some(TargetKind::Class);
    let data = open(&DataOptions::new(FormatOptions::Csv(csv)), None, 1)?;
    assert_eq!(data.preprocess.class_names().map(<[String]>::len), Some(3));
    Ok(())
}

#[test]
fn csv_cells_that_are_no_numbers_are_told_with_line_and_column() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    let with = |text: &[u8], target: Column, parts: &[&str]| -> TestResult {
        std::fs::write(&path, text)?;
        let csv = CsvOptions { target: vec![target], ..csv_options(path.clone()) };
        refused(&DataOptions::new(FormatOptions::Csv(csv)), parts);
        Ok(())
    };
    let last = || Column::Number(-1);
    with(b"a,b,y\n1,2,3\n4,,6\n", last(), &["line 3", "column 1 (\"b\")", "\"\""])?;
    with(b"a,b,y\n1,2,3\n4,NaN,6\n", last(), &["line 3", "column 1", "NaN"])?;
    with(b"a,b,y\n1,2,3\n4,inf,6\n", last(), &["line 3", "inf"])?;
    with(b"a,b,y\n1,2,3\n4,5\n", last(), &["line 3", "found 2 cells, expected 3"])?;
    with(b"a,b,y\n1,2,3\n4,\xff,6\n", last(), &["line 3", "UTF-8"])?;
    with(b"a,b,y\n1,2,\n", last(), &["line 2", "column 2"])?;
    with(b"a,b,y\n", last(), &["holds no row"])?;
    with(b"", last(), &["holds no row"])?;
    with(b"a;b;y\n1;2;3\n", last(), &["delimiter"])?;
    with(b"a,b,y\n1,2,3\n", Column::Name("z".into()), &["data.target", "a, b, y"])?;
    with(b"a,b,y\n1,2,3\n", Column::Number(7), &["data.target", "0 to 2"])?;
    Ok(())
}

#[test]
fn images_are_found_by_class_and_folders_of_their_own_are_the_other_splits() -> TestResult {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    for (part, class, shade, count) in
        [("train", "cat", 255u8, 3), ("train", "dog", 0, 2), ("test", "cat", 128, 1), ("val", "dog", 64, 1)]
    {
        let place = root.join(part).join(class);
        std::fs::create_dir_all(&place)?;
        for i in 0..count {
            image::GrayImage::from_pixel(5, 4, image::Luma([shade])).save(place.join(format!("{i}.png")))?;
        }
    }
    let images = ImagesOptions { path: root.into(), ..Default::default() };
    for cache in [Some(true), Some(false)] {
        let options = DataOptions::new(FormatOptions::Images(ImagesOptions { cache, ..images.clone() }));
        let data = open(&options, None, 1)?;
        assert_eq!(sizes(&data), [5, 1, 1]);
        assert_eq!(*data.input(), InputSpec::Real { shape: vec![1, 4, 5] });
        let batch = read(&*data.splits.train, &[Pick::Sample(0), Pick::Sample(4)])?;
        assert_eq!(reals(&batch.inputs), [[1.0; 20], [0.0; 20]].concat());
        assert_eq!(labels(&batch.targets), [0, 1]);
        let user = data.preprocess.file(&root.join("val/dog/0.png"))?;
        let validation = data.splits.validation.as_ref().ok_or("no validation split")?;
        assert_eq!(reals(&user[0].input), reals(&read(&**validation, &[Pick::Sample(0)])?.inputs));
    }
    let colored =
        ImagesOptions { resize: Some([2, 2]), color: Some(warpstep::data::options::Color::Rgb), ..images.clone() };
    let data = open(&DataOptions::new(FormatOptions::Images(colored)), None, 1)?;
    assert_eq!(*data.input(), InputSpec::Real { shape: vec![3, 2, 2] });
    image::GrayImage::new(6, 4).save(root.join("train/dog/9.png"))?;
    let options = DataOptions::new(FormatOptions::Images(images));
    refused(&options, &["9.png", "4 high and 6 wide", "data.resize"]);
    std::fs::write(root.join("train/dog/9.png"), b"no picture")?;
    refused(&options, &["9.png", "PNG or JPEG"]);
    std::fs::remove_file(root.join("train/dog/9.png"))?;
    std::fs::create_dir(root.join("train/emu"))?;
    refused(&options, &["emu", "empty"]);
    std::fs::remove_dir(root.join("train/emu"))?;
    std::fs::create_dir(root.join("test/fox"))?;
    refused(&options, &["fox", "training split"]);
    Ok(())
}

fn write_wave(path: &Path, spec: hound::WavSpec, samples: &[i32]) -> TestResult {
    let mut writer = hound::WavWriter::create(path, spec)?;
    for sample in samples {
        match spec.sample_format {
            hound::SampleFormat::Int => writer.write_sample(*sample)?,
            hound::SampleFormat::Float => writer.write_sample(*sample as f32 / 64.0)?,
        }
    }
    writer.finalize()?;
    Ok(())
}

#[test]
fn wave_files_of_every_width_give_the_same_samples() -> TestResult {
    use hound::SampleFormat::{Float, Int};
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    for (i, (bits_per_sample, sample_format)) in
        [(8, Int), (16, Int), (24, Int), (32, Int), (32, Float)].into_iter().enumerate()
    {
        let class = root.join(format!("{}", i % 2));
        std::fs::create_dir_all(&class)?;
        let spec = hound::WavSpec { channels: 2, sample_rate: 8000, bits_per_sample, sample_format };
        let unit = if sample_format == Float { 1 } else { 1 << (bits_per_sample - 7) };
        // Left 32/64, right 16/64, then left -64/64, right 0.
        write_wave(&class.join(format!("{i}.wav")), spec, &[32 * unit, 16 * unit, -64 * unit, 0])?;
    }
    let audio = AudioOptions {
        path: root.into(),
        samples: Some(3),
        features: AudioFeatures::Waveform,
        ..AudioOptions::default()
    };
    let options = DataOptions::new(FormatOptions::Audio(audio));
    let data = open(&options, None, 1)?;
    let batch = read(&*data.splits.train, &(0..5).map(Pick::Sample).collect::<Vec<_>>())?;
    for wave in reals(&batch.inputs).chunks(3) {
        assert_eq!(wave, [0.375, -0.5, 0.0]);
    }
    let spec = hound::WavSpec { channels: 1, sample_rate: 16_000, bits_per_sample: 16, sample_format: Int };
    write_wave(&root.join("1/odd.wav"), spec, &[1, 2, 3])?;
    refused(&options, &["odd.wav", "16000", "8000"]);
    write_wave(&root.join("1/odd.wav"), hound::WavSpec { sample_rate: 8000, ..spec }, &[])?;
    refused(&options, &["odd.wav", "no samples"]);
    Ok(())
}

#[test]
fn a_name_that_the_pattern_does_not_match_is_told() -> TestResult {
    let folder = tempfile::tempdir()?;
    let spec =
        hound::WavSpec { channels: 1, sample_rate: 8000, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
    write_wave(&folder.path().join("3_theo_0.wav"), spec, &[1; 100])?;
    let with = |pattern: &str, parts: &[&str]| {
        let pattern = Some(pattern.to_string());
        let audio = AudioOptions { path: folder.path().into(), pattern, ..AudioOptions::default() };
        refused(&DataOptions::new(FormatOptions::Audio(audio)), parts);
    };
    with(r"(?P<class>[a-z]+)_\d", &["3_theo_0.wav", "does not match"]);
    with(r"(\d)_.*", &["group named class"]);
    with(r"(?P<class>\d", &["data.pattern", "no regular expression"]);
    Ok(())
}

#[test]
fn inline_rows_are_the_samples() -> TestResult {
    let inputs = vec![vec![1.0, 2.0], vec![2.0, 4.0], vec![3.0, 6.0]];
    let targets = InlineTargets::Real(vec![vec![1.0], vec![3.0], vec![5.0]]);
    let inline = |inputs: &[Vec<f32>], targets: &InlineTargets| {
        DataOptions::new(FormatOptions::Inline(InlineOptions { inputs: inputs.to_vec(), targets: targets.clone() }))
    };
    let data = open(&inline(&inputs, &targets), None, 1)?;
    let batch = read(&*data.splits.train, &(0..3).map(Pick::Sample).collect::<Vec<_>>())?;
    assert_eq!(reals(&batch.inputs), [1.0, 2.0, 2.0, 4.0, 3.0, 6.0]);
    assert_eq!(batch.targets, Targets::Real(vec![1.0, 3.0, 5.0]));
    refused(&inline(&inputs[..2], &targets), &["data.targets", "found 3 targets, expected 2"]);
    refused(&inline(&[vec![1.0], vec![2.0, 3.0], vec![1.0]], &targets), &["row 1"]);
    refused(&inline(&[vec![1.0], vec![f32::NAN], vec![1.0]], &targets), &["row 1 has NaN"]);
    refused(&inline(&[], &targets), &["data.inputs"]);
    Ok(())
}

fn text_options(path: &Path, tokenizer: TokenizerKind, context: usize) -> DataOptions {
    DataOptions::new(FormatOptions::Text(TextOptions { path: path.into(), tokenizer, context, ..Default::default() }))
}

#[test]
fn text_that_is_too_short_or_no_utf8_is_refused() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "abcdefghij")?;
    assert_eq!(sizes(&open(&text_options(&path, TokenizerKind::Bytes, 3), None, 1)?), [3, 0, 0]);
    refused(&text_options(&path, TokenizerKind::Characters, 10), &["holds 10 tokens", "at least 11"]);
    refused(&text_options(&path, TokenizerKind::Bytes, 0), &["data.context"]);
    let mut options = text_options(&path, TokenizerKind::Bytes, 3);
    options.split = split(Some(Part::Fraction(0.2)), None);
    refused(&options, &["validation split holds 2 tokens"]);
    options.split = split(Some(Part::Fraction(1.5)), None);
    refused(&options, &["data.split.validation"]);
    std::fs::write(&path, b"abc\n\xff")?;
    refused(&text_options(&path, TokenizerKind::Bytes, 3), &["line 2", "0xff"]);
    std::fs::write(&path, b"")?;
    refused(&text_options(&path, TokenizerKind::Bytes, 3), &["holds no character"]);
    refused(&text_options(Path::new("no/such.txt"), TokenizerKind::Bytes, 3), &["no/such.txt", "WARPSTEP_DATA"]);
    Ok(())
}

fn tokens_options(path: &Path, vocabulary: usize) -> DataOptions {
    let path = path.to_path_buf();
    DataOptions::new(FormatOptions::Tokens(TokensOptions { path, vocabulary, context: 4, ..Default::default() }))
}

fn little_endian(tokens: impl IntoIterator<Item = u16>) -> Vec<u8> {
    tokens.into_iter().flat_map(u16::to_le_bytes).collect()
}

/// llm.c's header.
fn header(magic: i32, version: i32, count: i32) -> Vec<u8> {
    let mut words = [0i32; 256];
    words[..3].copy_from_slice(&[magic, version, count]);
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[test]
fn token_files_of_nanogpt_and_llm_c_are_read_and_shards_are_joined() -> TestResult {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    std::fs::write(root.join("train.bin"), little_endian(0..20))?;
    std::fs::write(root.join("val.bin"), little_endian(20..30))?;
    let data = open(&tokens_options(root, 30), None, 1)?;
    assert_eq!(sizes(&data), [4, 2, 0]);
    let batch = read(&*data.splits.train, &[Pick::Window(15)])?;
    assert_eq!((tokens(&batch.inputs), labels(&batch.targets)), (&[15, 16, 17, 18][..], &[16, 17, 18, 19][..]));
    for shard in 0..3u16 {
        let body = little_endian(shard * 7..shard * 7 + 7);
        std::fs::write(root.join(format!("web_train_{shard}.bin")), [header(20240520, 1, 7), body].concat())?;
    }
    let data = open(&tokens_options(&root.join("web_train_*.bin"), 21), None, 1)?;
    assert_eq!(data.splits.train.starts(), Some(17));
    let batch = read(&*data.splits.train, &[Pick::Window(5), Pick::Window(16)])?;
    assert_eq!(tokens(&batch.inputs), [5, 6, 7, 8, 16, 17, 18, 19]);
    assert_eq!(labels(&batch.targets), [6, 7, 8, 9, 17, 18, 19, 20]);
    let wide: Vec<u8> = (100_000u32..100_010).flat_map(u32::to_le_bytes).collect();
    std::fs::write(root.join("wide.bin"), [header(20240801, 7, 10), wide].concat())?;
    let data = open(&tokens_options(&root.join("wide.bin"), 128_256), None, 1)?;
    assert_eq!(tokens(&read(&*data.splits.train, &[Pick::Sample(1)])?.inputs)[0], 100_004);
    Ok(())
}

#[test]
fn damaged_token_files_are_refused_with_the_place() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.bin");
    let with = |bytes: &[u8], parts: &[&str]| -> TestResult {
        std::fs::write(&path, bytes)?;
        refused(&tokens_options(&path, 100), parts);
        Ok(())
    };
    with(&little_endian([1, 2, 100, 4, 5, 6]), &["a.bin", "token 2 of the file is 100", "vocabulary's 100"])?;
    with(&[1, 0, 2], &["3 bytes", "even number"])?;
    with(&[], &["holds no token"])?;
    with(&header(20240520, 1, 7)[..100], &["header of 1024"])?;
    with(&header(20240520, 2, 0), &["version 2"])?;
    with(&[header(20240520, 1, 7), little_endian(0..6)].concat(), &["holds 6 tokens", "tells of 7"])?;
    with(&little_endian(0..3), &["holds 3 tokens", "at least 5"])?;
    refused(&tokens_options(&folder.path().join("none_*.bin"), 100), &["no file fits"]);
    refused(&tokens_options(folder.path(), 100), &["train.bin"]);
    Ok(())
}

#[test]
fn labelled_lines_are_read_from_a_file_a_class_and_from_tab_separated_files() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (train, test) = (folder.path().join("train.tsv"), folder.path().join("test.tsv"));
    std::fs::write(&train, "good\tA fine film\nbad\tA bad, bad film\ngood\tfine\n\n")?;
    std::fs::write(&test, "bad\tbad stranger\n")?;
    let lines = LinesOptions { path: train.clone(), test: Some(test.clone()), min_count: 1, ..Default::default() };
    let options = DataOptions::new(FormatOptions::Lines(lines));
    let data = open(&options, None, 1)?;
    assert_eq!(sizes(&data), [3, 0, 1]);
    // <pad>, <unk> and the five words of training: bad, film, a, fine and the comma.
    assert_eq!(*data.input(), InputSpec::Tokens { context: 5, vocabulary: 7 });
    let unseen = read(&**data.splits.test.as_ref().ok_or("no test split")?, &[Pick::Sample(0)])?;
    assert_eq!((tokens(&unseen.inputs)[1], tokens(&unseen.inputs)[2]), (1, 0));
    std::fs::write(&test, "ugly\tbad\n")?;
    refused(&options, &["test.tsv", "line 1", "\"ugly\""]);
    std::fs::write(&train, "good\tfine\nno label\n")?;
    refused(&options, &["train.tsv", "line 2", "tab"]);
    std::fs::write(&train, "good\tfine\ngood\tfiner\n")?;
    refused(&options, &["one class"]);
    std::fs::write(&train, b"good\tfine\nbad\tna\xefve\n")?;
    refused(&options, &["line 2", "UTF-8"]);
    let classes = vec![("pos".into(), "test.tsv".into()), ("neg".into(), "other".into())];
    let lines = LinesOptions { path: folder.path().into(), classes, ..Default::default() };
    refused(&DataOptions::new(FormatOptions::Lines(lines)), &["other", "not found"]);
    Ok(())
}

#[test]
fn options_that_do_not_fit_the_data_are_refused() -> TestResult {
    let digits = |change: &dyn Fn(&mut DataOptions)| {
        let mut options = DataOptions::new(FormatOptions::Digits);
        change(&mut options);
        options
    };
    refused(&digits(&|o| o.augment.time_mask = 3), &["data.augment.time_mask"]);
    refused(&digits(&|o| o.augment.crop = 9), &["data.augment.crop", "8 at most"]);
    refused(&digits(&|o| o.normalize = Some(Normalize::Given { mean: vec![0.0], std: vec![0.0] })), &["std above 0"]);
    refused(
        &digits(&|o| o.normalize = Some(Normalize::Given { mean: vec![0.0; 3], std: vec![1.0] })),
        &["3 values of mean"],
    );
    refused(&digits(&|o| o.split.test = Some(Part::Count(1797))), &["data.split.test", "fewer than the 1797"]);
    refused(&digits(&|o| o.split.test = Some(Part::Pattern("x".into()))), &["data.split.test", "no files"]);
    refused(&digits(&|o| o.split.test = Some(Part::Every(0))), &["data.split.test"]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "abcdefghij")?;
    let mut options = text_options(&path, TokenizerKind::Bytes, 3);
    options.augment = AugmentOptions { flip: true, ..Default::default() };
    refused(&options, &["data.augment"]);
    Ok(())
}

#[test]
fn a_batch_larger_than_the_split_is_refused_with_the_size_that_fits() -> TestResult {
    let inputs = vec![vec![1.0]; 3];
    let targets = InlineTargets::Real(inputs.clone());
    let mut options = DataOptions::new(FormatOptions::Inline(InlineOptions { inputs, targets }));
    let data = open(&options, None, 1)?;
    let error = data.train_batches(4, 1, 0).err().ok_or("no error")?;
    assert!(error.to_string().contains("set it to 3 at most"), "{error}");
    options.drop_last = Some(false);
    let batch = open(&options, None, 1)?.train_batches(4, 1, 0)?.next().ok_or("no batch")??;
    assert_eq!(batch.samples, 3);
    let processes = Share { rank: 2, world: 2 };
    let wrong = warpstep::data::SamplerOptions {
        batch_size: 1,
        seed: 1,
        sampling: Sampling::Shuffle,
        drop_last: true,
        share: processes,
    };
    assert!(Loader::train(Arc::clone(&data.splits.train), wrong, 0, Prefetch::default()).is_err());
    Ok(())
}
