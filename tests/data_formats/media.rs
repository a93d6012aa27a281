//! Pictures and recordings.

use super::*;

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

/// What a user is told who gives `predict` a folder.
fn data_error(images: &ImagesOptions, folder: &Path) -> Result<String, Box<dyn StdError>> {
    let data = open(&DataOptions::new(FormatOptions::Images(images.clone())), None, 1)?;
    Ok(data.preprocess.file(folder).err().ok_or("no error")?.to_string())
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
    write("train-images-idx3-ubyte", &idx(&[3, 2, 2], &[7; 12]))?;
    write("t10k-labels-idx1-ubyte", &idx(&[1], &[1]))?;
    write("train-labels-idx1-ubyte", &idx(&[3], &[1; 3]))?;
    refused(&options, &["train-images", "the one class \"1\""]);
    let classes = |classes: usize| {
        let path = Some(folder.path().into());
        DataOptions::new(FormatOptions::Idx(IdxOptions { path, classes: Some(classes), ..Default::default() }))
    };
    for wrong in [0, 1, 65_537, 1_000_000_000] {
        refused(&classes(wrong), &["data.classes", &format!("found {wrong}"), "2 to 65536"]);
    }
    let labels: Vec<u8> = [0i32, 1, 70_000].iter().flat_map(|label| label.to_be_bytes()).collect();
    write("train-labels-idx1-ubyte", &[&[0, 0, 0x0c, 1, 0, 0, 0, 3][..], &labels].concat())?;
    refused(&options, &["label 2 is 70000", "0 to 65535"]);
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

/// Pictures of 2 x 2 with these values, as an IDX file of another type than bytes.
fn idx_of_type(kind: u8, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0, 0, kind, 3];
    [values.len() as u32 / 4, 2, 2].iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    for value in values {
        match kind {
            0x0b => bytes.extend((*value as i16).to_be_bytes()),
            0x0c => bytes.extend((*value as i32).to_be_bytes()),
            0x0d => bytes.extend(value.to_be_bytes()),
            _ => bytes.extend(f64::from(*value).to_be_bytes()),
        }
    }
    bytes
}

#[test]
fn a_png_becomes_what_the_same_picture_is_in_an_idx_file_of_any_type() -> TestResult {
    let folder = tempfile::tempdir()?;
    let pixels: [u8; 8] = [0, 51, 102, 255, 10, 20, 30, 40];
    std::fs::write(folder.path().join("train-labels-idx1-ubyte"), idx(&[2], &[0, 1]))?;
    let png = folder.path().join("0.png");
    image::GrayImage::from_raw(2, 2, pixels[..4].to_vec()).ok_or("no picture")?.save(&png)?;
    let images = folder.path().join("train-images-idx3-ubyte");
    let whole: Vec<f32> = pixels.iter().map(|p| f32::from(*p)).collect();
    let shares: Vec<f32> = whole.iter().map(|p| p / 255.0).collect();
    let types =
        [0x0b, 0x0c, 0x0d, 0x0e].map(|kind| (kind, &whole)).into_iter().chain([(0x0d, &shares), (0x0e, &shares)]);
    for (kind, values) in types {
        std::fs::write(&images, idx_of_type(kind, values))?;
        for how in [Normalize::None, Normalize::Unit, Normalize::Dataset] {
            let data = open(&DataOptions { normalize: Some(how.clone()), ..idx_options(folder.path()) }, None, 1)?;
            let batch = read(&*data.splits.train, &[Pick::Sample(0)])?;
            let user = data.preprocess.file(&png)?;
            for (user, trained) in reals(&user[0].input).iter().zip(reals(&batch.inputs)) {
                assert!((user - trained).abs() <= 1e-6 * (1.0 + trained.abs()), "{kind:#x} {how:?}: {user} {trained}");
            }
        }
    }
    let mut large = idx_of_type(0x0e, &whole);
    let third = large.len() - 6 * 8;
    large[third..third + 8].copy_from_slice(&1e300f64.to_be_bytes());
    std::fs::write(&images, large)?;
    refused(&idx_options(folder.path()), &["value 2 is 1e300", "expected a number within the range of f32"]);
    // What white is cannot be known: rows of numbers are taken in place of pictures.
    std::fs::write(&images, idx_of_type(0x0d, &[-1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0]))?;
    let data = open(&idx_options(folder.path()), None, 1)?;
    assert!(data.preprocess.file(&png).is_err());
    assert_eq!(reals(&data.preprocess.text("-1,0,0.5,1", Path::new("row"))?[0].input), [-1.0, 0.0, 0.5, 1.0]);
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
    let sides = ImagesOptions { resize: Some([0, 2]), ..images.clone() };
    refused(&DataOptions::new(FormatOptions::Images(sides)), &["data.resize", "found [0, 2], expected"]);
    let file = ImagesOptions { path: root.join("val/dog/0.png"), ..Default::default() };
    refused(&DataOptions::new(FormatOptions::Images(file)), &["0.png", "is a file, expected a folder", "data.path"]);
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
    let error = data_error(&images, root)?;
    assert!(error.contains("is a folder, expected a file"), "{error}");
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

#[test]
fn files_in_folders_within_a_class_folder_are_of_that_class_in_one_order() -> TestResult {
    let folder = tempfile::tempdir()?;
    let root = folder.path().join("pictures");
    let picture = |name: &str, shade: u8| -> TestResult {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().ok_or("no folder")?)?;
        Ok(image::GrayImage::from_pixel(1, 1, image::Luma([shade])).save(path)?)
    };
    // Before `z.png` by their names, after it as they lie deeper.
    for (name, shade) in [("cat/b/2/c.png", 4), ("cat/z.png", 1), ("cat/b/y.png", 2), ("cat/b/1/a.png", 3)] {
        picture(name, shade)?;
    }
    picture("dog/only/deeper.PNG", 5)?;
    picture("dog/.hidden/left_out.png", 9)?;
    std::fs::write(root.join("dog/only/notes.txt"), "no picture")?;
    let options = |path: &Path| {
        let images = ImagesOptions { path: path.into(), ..Default::default() };
        DataOptions { normalize: Some(Normalize::None), ..DataOptions::new(FormatOptions::Images(images)) }
    };
    let shades = |options: &DataOptions| -> Result<(Vec<f32>, Vec<i32>), Box<dyn StdError>> {
        let data = open(options, None, 1)?;
        let all: Vec<Pick> = (0..data.splits.train.len()).map(Pick::Sample).collect();
        let batch = read(&*data.splits.train, &all)?;
        Ok((reals(&batch.inputs).to_vec(), labels(&batch.targets).to_vec()))
    };
    assert_eq!(shades(&options(&root))?, (vec![1.0, 2.0, 3.0, 4.0, 5.0], vec![0, 0, 0, 0, 1]));
    // Rules on names see the folders.
    let held = DataOptions { split: split(None, Some(Part::Pattern("^cat/b/".into()))), ..options(&root) };
    assert_eq!(sizes(&open(&held, None, 1)?), [2, 0, 3]);
    // A model knows the data that it was trained on by more than what lies in the class folders themselves.
    let before = open(&options(&root), None, 1)?.preprocess;
    picture("dog/only/more/6.png", 6)?;
    assert!(before.changed(&open(&options(&root), None, 1)?.preprocess).is_some());
    // What used to be an empty class folder is not taken for a class in silence.
    for (name, shade) in [("splits/Train/cat/1.png", 1), ("splits/Train/dog/1.png", 2), ("splits/Test/cat/1.png", 3)] {
        picture(name, shade)?;
    }
    refused(
        &options(&root.join("splits")),
        &["Test: found class folders in it", "no folder beside it that is called train"],
    );
    std::fs::rename(root.join("splits/Train"), root.join("splits/train"))?;
    std::fs::rename(root.join("splits/Test"), root.join("splits/test"))?;
    picture("splits/test/wolf/1.png", 4)?;
    let advice = "which the training split does not have; give it samples there, or remove the folder";
    refused(&options(&root.join("splits")), &["wolf: found the class \"wolf\"", advice]);
    Ok(())
}

#[test]
fn links_are_followed_and_one_that_leads_nowhere_or_back_is_told() -> TestResult {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir()?;
    let root = folder.path().join("pictures");
    for class in ["cat", "dog"] {
        std::fs::create_dir_all(root.join(class))?;
        image::GrayImage::new(1, 1).save(root.join(class).join("1.png"))?;
    }
    let elsewhere = folder.path().join("elsewhere");
    std::fs::create_dir(&elsewhere)?;
    image::GrayImage::new(1, 1).save(elsewhere.join("2.png"))?;
    symlink(&elsewhere, root.join("cat/linked"))?;
    symlink(elsewhere.join("2.png"), root.join("dog/2.png"))?;
    let images = ImagesOptions { path: root.clone(), ..Default::default() };
    let options = DataOptions::new(FormatOptions::Images(images));
    assert_eq!(sizes(&open(&options, None, 1)?), [4, 0, 0]);
    for (name, target, told) in [
        (
            "cat/3.png",
            "/no/such/3.png",
            "cat/3.png: is a link to /no/such/3.png, which cannot be followed (No such file",
        ),
        ("cat/linked_too", "/no/such/folder", "linked_too: is a link to /no/such/folder"),
        ("emu", "/no/such/class", "emu: is a link to /no/such/class"),
        ("train", "/no/such/split", "train: is a link to /no/such/split"),
        ("dog/around", "../../pictures", "is a link to a folder that it lies in"),
        ("dog/self", "self", "dog/self: is a link to self, which cannot be followed (Too many levels"),
    ] {
        symlink(target, root.join(name))?;
        refused(&options, &[told]);
        std::fs::remove_file(root.join(name))?;
    }
    // Of other formats, where the name fits.
    let texts = folder.path().join("texts");
    std::fs::create_dir(&texts)?;
    for (name, text) in [("neg.txt", "one\ntwo\n"), ("pos.txt", "three\nfour\n")] {
        std::fs::write(texts.join(name), text)?;
    }
    let lines = DataOptions::new(FormatOptions::Lines(LinesOptions { path: texts.clone(), ..Default::default() }));
    assert_eq!(sizes(&open(&lines, None, 1)?), [4, 0, 0]);
    symlink("gone.txt", texts.join("neutral.txt"))?;
    refused(&lines, &["neutral.txt: is a link to gone.txt, which cannot be followed"]);
    Ok(())
}

/// 16 bits of one channel.
pub const MONO: hound::WavSpec =
    hound::WavSpec { channels: 1, sample_rate: 8000, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };

pub fn write_wave(path: &Path, spec: hound::WavSpec, samples: &[i32]) -> TestResult {
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
        features: AudioFeatures::Waveform(None),
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

/// A WAV file of these samples, with chunks of other kinds before them: their names and contents.
fn wave_with_chunks(chunks: &[(&[u8; 4], &[u8])], pad: bool, format: &[u8], data: &[u8]) -> Vec<u8> {
    let mut body = b"WAVE".to_vec();
    for (name, content) in chunks.iter().copied().chain([(b"fmt ", format), (b"data", data)]) {
        body.extend(name);
        body.extend((content.len() as u32).to_le_bytes());
        body.extend(content);
        if pad && content.len() % 2 == 1 {
            body.push(0);
        }
    }
    [&b"RIFF"[..], &(body.len() as u32).to_le_bytes(), &body].concat()
}

/// The format of one channel at 8 kHz.
fn wave_format(tag: u16, bits: u16) -> Vec<u8> {
    let bytes = bits / 8;
    let mut format = [tag, 1].map(u16::to_le_bytes).concat();
    format.extend(8000u32.to_le_bytes());
    format.extend((8000 * u32::from(bytes)).to_le_bytes());
    format.extend([bytes, bits].map(u16::to_le_bytes).concat());
    format
}

#[test]
fn chunks_of_odd_sizes_before_the_samples_are_skipped_and_samples_of_other_kinds_named() -> TestResult {
    let folder = tempfile::tempdir()?;
    let root = folder.path();
    let pcm: Vec<u8> = [0i16, 16384, -32768, 8192].iter().flat_map(|s| s.to_le_bytes()).collect();
    for class in ["a", "b"] {
        std::fs::create_dir(root.join(class))?;
        std::fs::write(root.join(class).join("0.wav"), wave_with_chunks(&[], true, &wave_format(1, 16), &pcm))?;
    }
    let audio = AudioOptions {
        path: root.into(),
        samples: Some(4),
        features: AudioFeatures::Waveform(None),
        ..AudioOptions::default()
    };
    let options = DataOptions::new(FormatOptions::Audio(audio));
    for (pad, chunks) in [
        (true, &[(b"LIST", &b"abcde"[..])][..]),
        (true, &[(b"LIST", b"abcde"), (b"fact", b"abcd"), (b"junk", b"x")]),
        (false, &[(b"LIST", b"abcde")]),
    ] {
        std::fs::write(root.join("a/0.wav"), wave_with_chunks(chunks, pad, &wave_format(1, 16), &pcm))?;
        let batch = read(&*open(&options, None, 1)?.splits.train, &[Pick::Sample(0)])?;
        assert_eq!(reals(&batch.inputs), [0.0, 0.5, -1.0, 0.25], "{chunks:?}");
    }
    let expected = "expected integers of 8, 16, 24 or 32 bits, or floats of 32";
    for (tag, bits, kind) in [(3, 64, "floats of 64 bits"), (7, 8, "mu-law"), (1, 64, "integers of 64 bits")] {
        std::fs::write(root.join("a/0.wav"), wave_with_chunks(&[], true, &wave_format(tag, bits), &[0; 64]))?;
        refused(&options, &["0.wav", kind, expected]);
    }
    Ok(())
}

#[test]
fn a_name_that_the_pattern_does_not_match_is_told() -> TestResult {
    let folder = tempfile::tempdir()?;
    write_wave(&folder.path().join("3_theo_0.wav"), MONO, &[1; 100])?;
    let with = |pattern: &str, parts: &[&str]| {
        let pattern = Some(pattern.to_string());
        let audio = AudioOptions { path: folder.path().into(), pattern, ..AudioOptions::default() };
        refused(&DataOptions::new(FormatOptions::Audio(audio)), parts);
    };
    with(r"(?P<class>[a-z]+)_\d", &["3_theo_0.wav", "does not match"]);
    with(r"(\d)_.*", &["group named class"]);
    with(r"(?P<class>\d", &["data.pattern", "no regular expression"]);
    // Where folders tell the classes, a pattern finds nothing.
    std::fs::create_dir(folder.path().join("three"))?;
    std::fs::rename(folder.path().join("3_theo_0.wav"), folder.path().join("three/3_theo_0.wav"))?;
    with(r"(?P<class>\d)_.*", &["holds no WAV file", "with data.pattern none is looked for in folders within it"]);
    Ok(())
}
