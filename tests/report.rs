//! What a run leaves behind to be looked at: metrics, summary, TensorBoard files, the report page.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use warpstep::train::forensics::NormShare;
use warpstep::train::metrics::{MetricsWriter, Record, SplitName};
use warpstep::train::run::{Event, Observer, Started};
use warpstep::train::summary::{Scores, SplitScores, Summary, peak_memory_bytes};
use warpstep::train::tensorboard::TensorBoard;
use warpstep::train::{plot, report};

fn record(step: u64, split: SplitName, loss: f64) -> Record {
    let training = split == SplitName::Train;
    Record {
        step,
        epoch: step as f64 / 100.0,
        split,
        loss,
        accuracy: Some(0.5),
        lr: training.then_some(1e-3),
        grad_norm: training.then_some(2.0),
        skipped: 0,
        clipped: None,
        clamped: None,
        norm_share: None,
        shadow_ulp: None,
        samples_per_s: training.then_some(1000.0),
        tokens_per_s: None,
        mfu: training.then_some(0.4),
        time_s: step as f64,
    }
}

fn summary() -> Summary {
    let scores = Some(Scores { loss: Some(0.25), accuracy: Some(0.975) });
    let last = SplitScores { step: 10, train: scores, validation: scores, test: None };
    Summary {
        last,
        best: last,
        steps: 10,
        seconds: 1.0,
        steps_per_s: 10.0,
        device: "CPU <2 threads>".into(),
        parameters: 12_345,
        skipped_steps: 0,
        not_finite_from: None,
        peak_memory_bytes: peak_memory_bytes(),
        version: "0".into(),
    }
}

/// The keys that the tables of a section of docs/run-folder.md have in their first column.
fn told_keys(section: &str) -> BTreeSet<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/run-folder.md");
    let page = std::fs::read_to_string(page).unwrap();
    let part = page.split("\n## ").find(|part| part.starts_with(section)).unwrap();
    let rows = part.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split_once('`')).map(|(key, _)| key.to_owned()).collect()
}

#[test]
fn the_page_of_the_run_folder_has_every_key_of_its_files() {
    let keys = |value: serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let whole = Record {
        clipped: Some(0.5),
        clamped: Some(0.5),
        norm_share: Some(NormShare(vec![("a".into(), 1.0)])),
        shadow_ulp: Some(1.0),
        tokens_per_s: Some(1.0),
        ..record(1, SplitName::Train, 1.0)
    };
    assert_eq!(told_keys("metrics.jsonl"), keys(serde_json::to_value(&whole).unwrap()));
    let whole = Summary { not_finite_from: Some(1), ..summary() };
    assert_eq!(told_keys("summary.json"), keys(serde_json::to_value(&whole).unwrap()));
}

/// A run folder with these records, and a config that tries to break out of the page.
fn run_folder(records: &[Record]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = MetricsWriter::create(&folder.path().join("metrics.jsonl")).unwrap();
    for record in records {
        writer.append(record).unwrap();
    }
    summary().write(&folder.path().join("summary.json")).unwrap();
    std::fs::write(folder.path().join("config.toml"), "name = \"</pre><script>alert(1)</script>\"").unwrap();
    folder
}

fn page(folder: &Path) -> String {
    report::write(folder, Some(1.0)).unwrap();
    std::fs::read_to_string(folder.join("report.html")).unwrap()
}

#[test]
fn summary_json_has_the_keys_that_the_design_gives() {
    let folder = run_folder(&[]);
    let text = std::fs::read_to_string(folder.path().join("summary.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    for key in ["/final/train/loss", "/final/validation/accuracy", "/best/validation/loss", "/steps_per_s"] {
        assert!(value.pointer(key).is_some_and(serde_json::Value::is_number), "{key} in {text}");
    }
    let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = [
        "final",
        "best",
        "steps",
        "seconds",
        "steps_per_s",
        "device",
        "parameters",
        "skipped_steps",
        "peak_memory_bytes",
        "version",
    ];
    expected.sort_unstable();
    let mut found = keys.clone();
    found.sort_unstable();
    assert_eq!(found, expected);
    if cfg!(target_os = "linux") {
        assert!(value["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    }
}

#[test]
fn the_report_asks_for_nothing_from_elsewhere_and_runs_nothing() {
    let mut records: Vec<Record> = (1..50).map(|i| record(i * 10, SplitName::Train, 1.0 / i as f64)).collect();
    records[20].loss = f64::NAN;
    records.push(record(500, SplitName::Validation, 0.1));
    let folder = run_folder(&records);
    let text = page(folder.path());
    assert!(text.contains("<svg") && text.contains("97.50 %") && text.contains("12,345"));
    assert!(!text.contains("<script") && text.contains("&lt;script&gt;") && text.contains("CPU &lt;2 threads&gt;"));
    let text = text.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http:", "https:", "src=", "href=", "@import", "url(", "<link", "onload"] {
        assert!(!text.contains(outside), "{outside}");
    }
}

#[test]
fn the_report_of_a_long_run_stays_small() {
    let records: Vec<Record> =
        (1..=100_000).map(|i| record(i, SplitName::Train, 1.0 + f64::from((i * 7919 % 1000) as u32) / 1e3)).collect();
    let text = page(run_folder(&records).path());
    assert!(text.len() < 2 << 20, "{} bytes", text.len());
}

#[test]
fn names_of_runs_are_escaped_in_pictures() {
    let records = [record(1, SplitName::Train, 1.0), record(2, SplitName::Train, 0.5)];
    let runs: [plot::NamedRun<'_>; 2] = [("<script>&\u{0}", &records), ("other", &records)];
    let text = plot::svg(&plot::charts(&runs, None), false).unwrap();
    assert!(text.contains("&lt;script&gt;&amp; ") && !text.contains("<script") && !text.contains('\0'));
}

/// The records of a TFRecord file, with their checksums checked by a table-less crc32c of its own.
fn tf_records(bytes: &[u8]) -> Vec<&[u8]> {
    let crc = |data: &[u8]| {
        let mut crc = !0u32;
        for &byte in data {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
            }
        }
        let crc = !crc;
        crc.rotate_right(15).wrapping_add(0xa282_ead8)
    };
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut records = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(word(at + 8), crc(&bytes[at..at + 8]));
        let data = &bytes[at + 12..at + 12 + length];
        assert_eq!(word(at + 12 + length), crc(data));
        records.push(data);
        at += 16 + length;
    }
    records
}

/// A protobuf message as its fields: number, and the value's bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                all.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        all.push((key >> 3, bytes[..length].to_vec()));
        bytes = &bytes[length..];
    }
    all
}

#[test]
fn tensorboard_files_hold_every_figure_under_its_tag_and_step() {
    let folder = tempfile::tempdir().unwrap();
    let mut board = TensorBoard::new();
    let started = Started {
        folder: folder.path(),
        device: "",
        parameters: 1,
        samples: 1,
        first_step: 300,
        steps: 1000,
        steps_per_epoch: 10.0,
    };
    board.event(&Event::Started(started)).unwrap();
    board.event(&Event::Record(&record(310, SplitName::Train, 0.75))).unwrap();
    board.event(&Event::Record(&record(400, SplitName::Validation, 0.5))).unwrap();
    let file = std::fs::read_dir(folder.path().join("tensorboard")).unwrap().next().unwrap().unwrap();
    assert!(file.file_name().to_string_lossy().starts_with("events.out.tfevents."));
    let bytes = std::fs::read(file.path()).unwrap();
    let events: Vec<_> = tf_records(&bytes).into_iter().map(fields).collect();
    let get = |event: &[(u64, Vec<u8>)], number: u64| event.iter().find(|f| f.0 == number).map(|f| f.1.clone());
    assert_eq!(get(&events[0], 3).unwrap(), b"brain.Event:2");
    // A resumed run keeps what was written up to the checkpoint's step, and takes back what came after.
    assert_eq!(get(&events[1], 2).unwrap(), 301u64.to_le_bytes());
    assert_eq!(get(&events[1], 7).unwrap(), [8, 1]);
    let mut figures = BTreeMap::new();
    for event in &events[2..] {
        let step = u64::from_le_bytes(get(event, 2).unwrap().try_into().unwrap());
        for (_, value) in fields(&get(event, 5).unwrap()) {
            let value = fields(&value);
            let tag = String::from_utf8(get(&value, 1).unwrap()).unwrap();
            figures.insert((tag, step), f32::from_le_bytes(get(&value, 2).unwrap().try_into().unwrap()));
        }
    }
    let expected = [
        ("accuracy/train", 310, 0.5),
        ("accuracy/validation", 400, 0.5),
        ("loss/train", 310, 0.75),
        ("loss/validation", 400, 0.5),
        ("optimizer/grad_norm", 310, 2.0),
        ("optimizer/learning_rate", 310, 1e-3),
        ("speed/samples_per_s", 310, 1000.0),
        ("speed/mfu", 310, 0.4),
    ];
    assert_eq!(figures, expected.into_iter().map(|(tag, step, v)| ((tag.to_owned(), step), v)).collect());
}
