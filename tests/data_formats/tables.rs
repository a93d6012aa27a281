//! Tables of numbers: CSV files and rows in the run file.

use super::*;

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
    let large = data.preprocess.text("1,2\n1,1e300\n", Path::new("rows")).err().ok_or("no error")?.to_string();
    assert!(large.contains("line 2, column 2") && large.contains("the range of f32"), "{large}");
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
    with(b"a,b,y\n1,2,3\n4,,6\n", last(), &["line 3", "column 2 (\"b\")", "\"\""])?;
    with(b"a,b,y\n1,2,3\n4,NaN,6\n", last(), &["line 3", "column 2", "NaN"])?;
    with(b"a,b,y\n1,2,3\n4,inf,6\n", last(), &["line 3", "inf"])?;
    for large in ["1e300", "-1e39", "1e400"] {
        let text = format!("a,b,y\n1,2,3\n4,{large},6\n");
        with(text.as_bytes(), last(), &["line 3", "column 2", large, "a number within the range of f32"])?;
    }
    with(b"a,b,y\n1,2,3\n4,5\n", last(), &["line 3", "found 2 cells, expected 3"])?;
    with(b"a,b,y\n1,2,3\n4,\xff,6\n", last(), &["line 3", "UTF-8"])?;
    with(b"a,b,y\n1,2,\n", last(), &["line 2", "column 3"])?;
    with(
        b"a,b,y\n1,2,red\n3,4,\n5,6,blue\n",
        last(),
        &["line 3, column 3 (\"y\"): found no target", "a class or a number"],
    )?;
    with(b"a,b,y\n", last(), &["holds no row"])?;
    with(b"", last(), &["holds no row"])?;
    with(b"a;b;y\n1;2;3\n", last(), &["delimiter"])?;
    with(b"a,b,y\n1,2,3\n", Column::Name("z".into()), &["data.target", "a, b, y"])?;
    with(b"a,b,y\n1,2,3\n", Column::Number(7), &["data.target", "0 to 2"])?;
    with(b"1,2,3\n4,x,6\n", last(), &["line 2, column 2", "data.features, where it is number 1"])?;
    refused(&DataOptions::new(FormatOptions::Csv(csv_options(folder.path().into()))), &["is a folder", "data.path"]);
    Ok(())
}

#[test]
fn csv_errors_tell_the_line_that_an_editor_shows() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    let rows = ["note,a,y", "one,1,2", "", "", "\"two^lines^of text\",3,4", "", "WRONG"];
    for end in ["\n", "\r\n", "\r"] {
        let text = |wrong: &str| (rows.join(end) + end).replace('^', end).replace("WRONG", wrong);
        for (wrong, parts) in [
            ("five,x,6", &["line 9, column 2 (\"a\"): found \"x\""][..]),
            ("five,5,y", &["line 9, column 3 (\"y\"): found \"y\""]),
            ("five,5", &["line 9: found 2 cells, expected 3"]),
        ] {
            std::fs::write(&path, text(wrong))?;
            let features = Some(vec![Column::Name("a".into())]);
            let csv = CsvOptions { features, target_type: Some(TargetKind::Real), ..csv_options(path.clone()) };
            refused(&DataOptions::new(FormatOptions::Csv(csv)), parts);
        }
        // The first row that is wrong stands after a cell of several lines, and a byte order mark is none.
        std::fs::write(&path, format!("\u{feff}{}", text("five,5,6")))?;
        refused(&DataOptions::new(FormatOptions::Csv(csv_options(path.clone()))), &["line 2, column 1 (\"note\")"]);
        // A user's rows.
        std::fs::write(&path, text("five,5,6"))?;
        let features = Some(vec![Column::Name("a".into())]);
        let csv = CsvOptions { features, ..csv_options(path.clone()) };
        let data = open(&DataOptions::new(FormatOptions::Csv(csv)), None, 1)?;
        let error = data.preprocess.text(&text("five,x,6"), Path::new("rows")).err().ok_or("no error")?.to_string();
        assert!(error.contains("line 9, column 2: found \"x\""), "{end:?}: {error}");
    }
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

#[test]
fn columns_are_normalized_by_the_training_split_alone_and_a_constant_one_becomes_zero() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (path, test) = (folder.path().join("a.csv"), folder.path().join("test.csv"));
    std::fs::write(&path, "a,b,y\n1,7,0\n2,7,1\n3,7,0\n6,7,1\n")?;
    std::fs::write(&test, "b,y,a\n8,1,100\n")?;
    let target = vec![Column::Name("y".into())];
    let features = Some(vec![Column::Name("a".into()), Column::Name("b".into())]);
    let csv = CsvOptions { target, features, test: Some(test), ..csv_options(path) };
    let mut options = DataOptions::new(FormatOptions::Csv(csv));
    options.normalize = Some(Normalize::Dataset);
    let data = open(&options, None, 1)?;
    let batch = read(&*data.splits.train, &(0..4).map(Pick::Sample).collect::<Vec<_>>())?;
    let std = 3.5f32.sqrt();
    for (row, expected) in reals(&batch.inputs).chunks(2).zip([1.0, 2.0, 3.0, 6.0]) {
        assert!((row[0] - (expected - 3.0) / std).abs() < 1e-6 && row[1] == 0.0, "{row:?}");
    }
    let unseen = read(&**data.splits.test.as_ref().ok_or("no test split")?, &[Pick::Sample(0)])?;
    let row = reals(&unseen.inputs);
    assert!((row[0] - 97.0 / std).abs() < 1e-4 && row[1] == 1.0, "{row:?}");
    Ok(())
}

#[test]
fn the_columns_of_other_files_are_those_of_the_same_names() -> TestResult {
    let folder = tempfile::tempdir()?;
    let (path, test) = (folder.path().join("train.csv"), folder.path().join("test.csv"));
    let mut csv = CsvOptions { test: Some(test.clone()), ..csv_options(path.clone()) };
    let unseen = |csv: &CsvOptions| -> Result<(Vec<f32>, Targets), Box<dyn StdError>> {
        let data = open(&DataOptions::new(FormatOptions::Csv(csv.clone())), None, 1)?;
        let batch = read(&**data.splits.test.as_ref().ok_or("no test split")?, &[Pick::Sample(0)])?;
        Ok((reals(&batch.inputs).to_vec(), batch.targets))
    };
    std::fs::write(&path, "a,b,y\n1,2,3\n4,5,6\n")?;
    // In another order, with the target not the last, and with a column that is not used.
    for text in ["b,a,y\n20,10,30\n", "y,b,a\n30,20,10\n", "y,note,b,a\n30,none,20,10\n"] {
        std::fs::write(&test, text)?;
        assert_eq!(unseen(&csv)?, (vec![10.0, 20.0], Targets::Real(vec![30.0])), "{text}");
    }
    // Where the other file has no header, columns are told by their places.
    std::fs::write(&test, "10,20,30\n")?;
    assert_eq!(unseen(&csv)?, (vec![10.0, 20.0], Targets::Real(vec![30.0])));
    for text in ["a,c,y\n1,2,3\n", "c,a,y\n1,2,3\n"] {
        std::fs::write(&test, text)?;
        refused(&DataOptions::new(FormatOptions::Csv(csv.clone())), &["test.csv", "no column \"b\"", "train.csv"]);
    }
    std::fs::write(&test, "a,b\n1,2\n")?;
    refused(&DataOptions::new(FormatOptions::Csv(csv.clone())), &["test.csv", "no column \"y\"", "it has a, b"]);
    // Columns that are chosen by number are those of the training file.
    csv.features = Some(vec![Column::Number(1)]);
    csv.target = vec![Column::Number(0)];
    std::fs::write(&test, "b,y,a\n20,30,10\n")?;
    assert_eq!(unseen(&csv)?, (vec![20.0], Targets::Real(vec![10.0])));
    // Two columns of one name keep their order.
    let csv = CsvOptions { test: Some(test.clone()), ..csv_options(path.clone()) };
    std::fs::write(&path, "a,a,y\n1,2,3\n4,5,6\n")?;
    std::fs::write(&test, "y,a,a\n30,10,20\n")?;
    assert_eq!(unseen(&csv)?, (vec![10.0, 20.0], Targets::Real(vec![30.0])));
    Ok(())
}

#[test]
fn a_first_line_that_may_name_the_columns_is_told_of() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    let csv = csv_options(path.clone());
    for (text, column) in
        [("city,2019,2020,y\n1,2,3,4\n5,6,7,8\n", "column 1"), ("2019,2020,y\n2,3,4\n6,7,8\n", "column 3")]
    {
        std::fs::write(&path, text)?;
        refused(&DataOptions::new(FormatOptions::Csv(csv.clone())), &["line 1", column, "data.header = true"]);
        let named = CsvOptions { header: Some(true), ..csv.clone() };
        assert_eq!(sizes(&open(&DataOptions::new(FormatOptions::Csv(named)), None, 1)?), [2, 0, 0]);
    }
    // The same cell in another line is no header, and a class of words is no mistake.
    std::fs::write(&path, "1,2,3\nx,2,3\n")?;
    let Err(error) = open(&DataOptions::new(FormatOptions::Csv(csv.clone())), None, 1) else {
        return Err("read".into());
    };
    assert!(error.to_string().contains("line 2") && !error.to_string().contains("data.header"), "{error}");
    std::fs::write(&path, "1,2,dog\n3,2,cat\n")?;
    assert_eq!(sizes(&open(&DataOptions::new(FormatOptions::Csv(csv)), None, 1)?), [2, 0, 0]);
    Ok(())
}

#[test]
fn one_class_alone_is_refused_whatever_the_format() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    std::fs::write(&path, "1,2,dog\n3,2,dog\n")?;
    refused(&DataOptions::new(FormatOptions::Csv(csv_options(path.clone()))), &["a.csv", "the one class \"dog\""]);
    std::fs::write(&path, "1,2,3\n3,2,3\n")?;
    let csv = CsvOptions { target_type: Some(TargetKind::Class), ..csv_options(path) };
    refused(&DataOptions::new(FormatOptions::Csv(csv)), &["a.csv", "the one class \"3\""]);
    let inline = |classes: [&str; 2]| {
        let targets = InlineTargets::Class(classes.map(str::to_string).to_vec());
        DataOptions::new(FormatOptions::Inline(InlineOptions { inputs: vec![vec![1.0], vec![2.0]], targets }))
    };
    refused(&inline(["up", "up"]), &["the one class \"up\"", "two or more"]);
    // Two classes, of which the split leaves one to train on.
    let mut options = inline(["up", "down"]);
    options.split = split(None, Some(Part::Every(2)));
    refused(&options, &["the one class \"up\"", "data.split"]);
    for (kind, file) in [("images", "a/0.png"), ("audio", "b/0.wav")] {
        let root = folder.path().join(kind);
        let file = root.join(file);
        std::fs::create_dir_all(file.parent().ok_or("no folder")?)?;
        let format = if kind == "images" {
            image::GrayImage::new(3, 3).save(&file)?;
            FormatOptions::Images(ImagesOptions { path: root, ..Default::default() })
        } else {
            media::write_wave(&file, media::MONO, &[1; 100])?;
            FormatOptions::Audio(AudioOptions { path: root, ..Default::default() })
        };
        refused(&DataOptions::new(format), &["the one class", "two or more"]);
    }
    Ok(())
}

#[test]
fn features_of_the_same_name_keep_their_order_in_a_user_s_table() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    std::fs::write(&path, "a,a,b,y\n1,2,3,4\n5,6,7,8\n")?;
    let open_with = |features: Option<Vec<Column>>| {
        open(&DataOptions::new(FormatOptions::Csv(CsvOptions { features, ..csv_options(path.clone()) })), None, 1)
    };
    let data = open_with(None)?;
    for rows in ["a,a,b,y\n1,2,3,0\n", "b,a,a\n3,1,2\n", "1,2,3,0\n", "1,2,3\n"] {
        let user = data.preprocess.text(rows, Path::new("rows"))?;
        assert_eq!(reals(&user[0].input), [1.0, 2.0, 3.0], "{rows}");
    }
    // The second of two columns of one name.
    let data = open_with(Some(vec![Column::Number(1)]))?;
    for rows in ["a,a,b,y\n1,2,3,0\n", "a,b\n2,3\n"] {
        let user = data.preprocess.text(rows, Path::new("rows"))?;
        assert_eq!(reals(&user[0].input), [2.0], "{rows}");
    }
    let error = data.preprocess.text("b,a,a\n3,1,2\n", Path::new("rows")).unwrap_err().to_string();
    assert!(error.contains("has 2 columns \"a\", expected 1"), "{error}");
    Ok(())
}

#[test]
fn a_large_offset_takes_no_digits_of_a_column_in_training_or_prediction() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.csv");
    // Seconds of the clock, whose spacing in f32 is 128; a constant that f64 rounds; a column whose deviation f32 cannot invert.
    let rows: Vec<String> = (0..64).map(|k| format!("{},0.1,{}e-42,{k}", 1_700_000_000 + k, k % 2)).collect();
    std::fs::write(&path, format!("time,same,tiny,y\n{}\n", rows.join("\n")))?;
    let options = |normalize: Normalize| {
        let normalize = Some(normalize);
        DataOptions { normalize, ..DataOptions::new(FormatOptions::Csv(csv_options(path.clone()))) }
    };
    let (mean, std) = (1_700_000_031.5, (4095.0f64 / 12.0).sqrt());
    let given = Normalize::Given { mean: vec![mean, 0.1, 0.0], std: vec![std, 1.0, 1.0] };
    for how in [Normalize::Dataset, given] {
        let data = open(&options(how.clone()), None, 1)?;
        let preprocess = Preprocess::from_json(&data.preprocess.to_json()?)?;
        for k in [0, 1, 40, 63] {
            let batch = read(&*data.splits.train, &[Pick::Sample(k)])?;
            let values = reals(&batch.inputs);
            let expected = (k as f64 - 31.5) / std;
            assert!((f64::from(values[0]) - expected).abs() < 1e-6, "{how:?} {k}: {} {expected}", values[0]);
            assert_eq!(values[1], 0.0, "{how:?}");
            assert!(values[2].abs() < 1e-40, "{how:?}: {}", values[2]);
            assert_eq!(reals(&preprocess.text(&rows[k], Path::new("row"))?[0].input), values, "{how:?}");
        }
    }
    refused(&options(Normalize::Given { mean: vec![0.0], std: vec![1e-42] }), &["data.normalize", "std", "channel 0"]);
    let wide = Normalize::Given { mean: vec![0.0], std: vec![1e-30] };
    refused(&options(wide), &["sample 0", "1700000000", "range of f32"]);
    Ok(())
}
