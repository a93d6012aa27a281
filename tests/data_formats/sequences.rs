//! Texts, tokens and labelled lines.

use super::*;

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
    std::fs::write(&path, "abcdefghij")?;
    options.split = split(None, Some(Part::Every(10)));
    refused(&options, &["data.split.test", "found { every = 10 }, expected a share"]);
    std::fs::write(&path, b"")?;
    refused(&text_options(&path, TokenizerKind::Bytes, 3), &["holds no character"]);
    refused(&text_options(folder.path(), TokenizerKind::Bytes, 3), &["is a folder, expected a file", "data.path"]);
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
fn a_token_file_that_is_cut_or_replaced_during_a_run_ends_no_process() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (path, other) = (folder.path().join("a.bin"), folder.path().join("b.bin"));
    std::fs::write(&path, little_endian((0..40_000).map(|i| i % 100)))?;
    let data = open(&tokens_options(&path, 100), None, 1)?;
    std::fs::OpenOptions::new().write(true).open(&path)?.set_len(1000)?;
    assert_eq!(tokens(&read(&*data.splits.train, &[Pick::Window(3)])?.inputs), [3, 4, 5, 6]);
    let error = read(&*data.splits.train, &[Pick::Window(30_000)]).unwrap_err().to_string();
    for part in ["a.bin", "ends before byte 60010", "the 80000 bytes that it had when it was opened"] {
        assert!(error.contains(part), "{error}");
    }
    // Another file in its place, or none, is nothing to one that is open.
    std::fs::write(&path, little_endian((0..40_000).map(|i| i % 100)))?;
    let data = open(&tokens_options(&path, 100), None, 1)?;
    std::fs::write(&other, [7; 2])?;
    std::fs::rename(&other, &path)?;
    assert_eq!(tokens(&read(&*data.splits.train, &[Pick::Window(30_000)])?.inputs), [0, 1, 2, 3]);
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
    for wrong in [1, 3_000_000_000] {
        refused(
            &tokens_options(&path, wrong),
            &["data.vocabulary", &format!("found {wrong}, expected 2 to 2147483647")],
        );
    }
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
    std::fs::write(&test, "good\tbad\n")?;
    refused(&options, &["train.tsv", "the one class \"good\"", "two or more"]);
    std::fs::write(&train, b"good\tfine\nbad\tna\xefve\n")?;
    refused(&options, &["line 2", "UTF-8"]);
    let classes = vec![("pos".into(), "test.tsv".into()), ("neg".into(), "other".into())];
    let lines = LinesOptions { path: folder.path().into(), classes, ..Default::default() };
    refused(&DataOptions::new(FormatOptions::Lines(lines)), &["other", "not found"]);
    Ok(())
}

#[test]
fn every_third_line_is_the_third_sample_and_blank_lines_are_none() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("train.tsv");
    std::fs::write(&path, "a\tone\n\n\nb\ttwo\n \na\tthree\nb\tfour\n\nb\tfive\na\tsix\na\tseven\n")?;
    let lines = LinesOptions { path: path.clone(), min_count: 1, ..Default::default() };
    let mut options = DataOptions::new(FormatOptions::Lines(lines.clone()));
    options.split = split(None, Some(Part::Every(3)));
    let data = open(&options, None, 1)?;
    assert_eq!(sizes(&data), [5, 0, 2]);
    let held = read(&**data.splits.test.as_ref().ok_or("no test split")?, &[Pick::Sample(0), Pick::Sample(1)])?;
    // Samples three and six, of class a, whose words the training split does not have.
    assert_eq!((tokens(&held.inputs), labels(&held.targets)), (&[1, 1][..], &[0, 0][..]));
    // Errors count lines, blank ones too.
    std::fs::write(folder.path().join("test.tsv"), "\n\na\tx\n\nc\ty\n")?;
    let own = LinesOptions { test: Some(folder.path().join("test.tsv")), ..lines.clone() };
    refused(&DataOptions::new(FormatOptions::Lines(own)), &["test.tsv", "line 5", "\"c\""]);
    for wrong in [0, 65_537, 1_000_000_000_000] {
        let long = LinesOptions { length: Some(wrong), ..lines.clone() };
        refused(&DataOptions::new(FormatOptions::Lines(long)), &["data.length", &format!("found {wrong}"), "65536"]);
    }
    let padded = LinesOptions { length: Some(9), ..lines };
    assert_eq!(open(&DataOptions::new(FormatOptions::Lines(padded)), None, 1)?.input().elements(), 9);
    Ok(())
}

#[test]
fn a_byte_order_mark_is_no_character_of_a_text() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.txt");
    let open_text = |text: &str| -> Result<OpenedData, Box<dyn StdError>> {
        std::fs::write(&path, text)?;
        Ok(open(&text_options(&path, TokenizerKind::Characters, 2), None, 1)?)
    };
    let (with, without) = (open_text("\u{feff}abcabc")?, open_text("abcabc")?);
    assert_eq!(with.preprocess, without.preprocess);
    let first = |data: &OpenedData| read(&*data.splits.train, &[Pick::Window(0)]);
    assert_eq!(first(&with)?, first(&without)?);
    Ok(())
}
