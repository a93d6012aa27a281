//! metrics.jsonl: one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::write_whole;
use super::forensics::NormShare;
use super::step::LossSums;
use crate::error::{Error, Result};

/// Which part of the data a figure is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitName {
    /// Trained on.
    Train,
    /// Looked at during training.
    Validation,
    /// Looked at once, at the end.
    Test,
}

/// One line of metrics.jsonl. A figure that is no finite number is written as null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Updates done.
    pub step: u64,
    /// Passes over the training split done.
    pub epoch: f64,
    /// What the figures are of.
    pub split: SplitName,
    /// Mean loss: of the steps since the last record for training, of the split otherwise.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Share of right predictions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Learning rate of the last step; training only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Gradient norm of the last step, before the norm clip; training only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Steps skipped so far for gradients that were not finite.
    pub skipped: u64,
    /// Share of the steps since the last record that the norm clip changed; training only, where a clip is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clipped: Option<f64>,
    /// Share of the gradients' values since the last record that the value clip changed; training only, where one is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clamped: Option<f64>,
    /// The largest shares of the squared gradient norm at the last step, by layer: after the value clip, before the norm clip;
    /// training only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm_share: Option<NormShare>,
    /// The largest error of the updates since the last record that were replayed by the plain rule ([`super::shadow`]), in units
    /// in the last place; training only, where that is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow_ulp: Option<f64>,
    /// Samples a second, evaluations and checkpoints not counted; training only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples_per_s: Option<f64>,
    /// Tokens a second, where samples are texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<f64>,
    /// Model FLOP utilization: the share of the device's peak arithmetic, by its data sheet, that forward and backward take, what is
    /// computed again to save memory not counted; training only, where the peak is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Seconds of training so far, those before a resume counted.
    pub time_s: f64,
}

/// What steps gave since the last record of the training split, of which the next one is made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Mean losses of the steps, added up.
    #[serde(deserialize_with = "number_or_nan")]
    pub losses: f64,
    /// Of all samples.
    pub sums: LossSums,
    /// Steps.
    pub steps: u64,
    /// Steps that the norm clip changed.
    pub clipped: u64,
    /// Values of gradients that the value clip changed.
    pub clamped: u64,
    /// The largest error of an update that was replayed, in units in the last place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow_ulp: Option<f64>,
    /// Samples.
    pub samples: u64,
    /// Seconds that the steps took.
    pub seconds: f64,
    /// Learning rate of the last step.
    pub rate: f64,
    /// Its gradient norm, before the norm clip; none where it is no finite number.
    pub norm: Option<f64>,
    /// The sum of squares of each tensor of its gradient; empty where one is no finite number.
    pub squares: Vec<f64>,
}

impl Interval {
    /// Whether no step came since the record.
    pub fn is_empty(&self) -> bool {
        self.steps == 0
    }
}

/// A number that was written as null where it was not finite.
pub(super) fn number_or_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Appends records to metrics.jsonl.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
}

impl MetricsWriter {
    /// Starts a new file, over one that is there.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|e| Error::io("create", path, e))?;
        Ok(MetricsWriter { file, path: path.to_owned() })
    }

    /// Goes on with a file after a resume: records that are not to be kept, and a last line cut short, are dropped.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn resume(path: &Path, keep: impl Fn(&Record) -> bool) -> Result<Self> {
        let kept: Vec<Record> =
            if path.exists() { read_lines(path, true)?.into_iter().filter(keep).collect() } else { Vec::new() };
        let mut text = Vec::new();
        for record in &kept {
            text.extend(line(record, path)?);
        }
        write_whole(path, &text)?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(MetricsWriter { file, path: path.to_owned() })
    }

    /// Drops the evaluations of a step, which are made again.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn forget_evaluations_of(&mut self, step: u64) -> Result<()> {
        *self = Self::resume(&self.path, |record| record.split == SplitName::Train || record.step != step)?;
        Ok(())
    }

    /// Appends a record and hands it to the operating system.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let line = line(record, &self.path)?;
        self.file.write_all(&line).map_err(|e| Error::io("append to", &self.path, e))
    }
}

fn line(record: &Record, path: &Path) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(record).map_err(|e| Error::io("write", path, e.into()))?;
    line.push(b'\n');
    Ok(line)
}

/// All records of a metrics.jsonl. A last line that was cut short by a crash is left out.
///
/// # Errors
/// A file that cannot be read, or a line that is no record, with its number.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>> {
    read_lines(path, true)
}

fn read_lines(path: &Path, torn_end: bool) -> Result<Vec<Record>> {
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let mut reader = BufReader::new(file);
    let mut records = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(|e| Error::io("read", path, e))?;
        if read == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match serde_json::from_slice(&line) {
            Ok(record) => records.push(record),
            Err(_) if torn_end && line.last() != Some(&b'\n') => break,
            Err(e) => {
                return Err(Error::data(
                    path,
                    format!("line {number}: expected a metrics record, found otherwise: {e}"),
                ));
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: f64) -> Record {
        Record {
            step,
            epoch: step as f64 / 10.0,
            split: SplitName::Train,
            loss,
            accuracy: Some(0.5),
            lr: Some(0.1),
            grad_norm: None,
            skipped: 0,
            clipped: Some(0.25),
            clamped: None,
            norm_share: Some(NormShare(vec![("b".into(), 0.75), ("a".into(), 0.25)])),
            shadow_ulp: None,
            samples_per_s: Some(3.0),
            tokens_per_s: None,
            mfu: None,
            time_s: 1.5,
        }
    }

    #[test]
    fn records_come_back_as_they_were_and_a_resume_drops_what_came_after() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        for step in 1..=5 {
            writer.append(&record(step, 1.0 / step as f64)).unwrap();
        }
        writer.file.write_all(b"{\"step\": 6, \"ep").unwrap();
        assert_eq!(read_metrics(&path).unwrap().len(), 5);
        let mut writer = MetricsWriter::resume(&path, |record| record.step <= 3).unwrap();
        writer.append(&record(4, f64::NAN)).unwrap();
        let records = read_metrics(&path).unwrap();
        assert_eq!(records[..3], [record(1, 1.0), record(2, 0.5), record(3, 1.0 / 3.0)]);
        assert!(records[3].loss.is_nan());
    }

    #[test]
    fn a_line_that_is_no_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\": 1}\n").unwrap();
        assert!(read_metrics(&path).unwrap_err().to_string().contains("line 1"));
    }
}
