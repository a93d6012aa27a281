//! Event files that TensorBoard opens: TFRecord frames around `tensorflow.Event` messages with scalar summaries.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::metrics::{Record, SplitName};
use super::run::{Event, Observer};
use crate::error::{Error, Result};

/// Writes a run's figures into `tensorboard/` of its folder.
#[derive(Debug, Default)]
pub struct TensorBoard {
    file: Option<(File, PathBuf)>,
}

impl TensorBoard {
    /// Writes once the run has told its folder.
    pub fn new() -> Self {
        Self::default()
    }

    fn start(&mut self, run: &Path, first_step: u64) -> Result<()> {
        let folder = run.join("tensorboard");
        fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let path = folder.join(format!("events.out.tfevents.{:.0}.warpstep.{}", now() * 1e3, std::process::id()));
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        self.file = Some((file, path));
        self.write(&event(0, &field_bytes(3, b"brain.Event:2")))?;
        // A session's start makes TensorBoard forget what an earlier, killed session wrote at this step and beyond: what was
        // written at the checkpoint's own step stays.
        self.write(&event(first_step + 1, &field_bytes(7, &field_varint(1, 1))))
    }

    fn write(&mut self, message: &[u8]) -> Result<()> {
        match &mut self.file {
            Some((file, path)) => file.write_all(&frame(message)).map_err(|e| Error::io("write", &*path, e)),
            None => Ok(()),
        }
    }

    fn record(&mut self, record: &Record) -> Result<()> {
        let split = match record.split {
            SplitName::Train => "train",
            SplitName::Validation => "validation",
            SplitName::Test => "test",
        };
        let figures = [
            (format!("loss/{split}"), Some(record.loss)),
            (format!("accuracy/{split}"), record.accuracy),
            ("optimizer/learning_rate".to_owned(), record.lr),
            ("optimizer/grad_norm".to_owned(), record.grad_norm),
            ("optimizer/clipped".to_owned(), record.clipped),
            ("optimizer/clamped".to_owned(), record.clamped),
            ("optimizer/shadow_ulp".to_owned(), record.shadow_ulp),
            ("speed/samples_per_s".to_owned(), record.samples_per_s),
            ("speed/tokens_per_s".to_owned(), record.tokens_per_s),
            ("speed/mfu".to_owned(), record.mfu),
        ];
        let shares = record.norm_share.iter().flat_map(|share| &share.0);
        let shares = shares.map(|(layer, share)| (format!("norm_share/{layer}"), Some(*share)));
        let mut summary = Vec::new();
        for (tag, value) in figures.into_iter().chain(shares) {
            if let Some(value) = value {
                let mut scalar = field_bytes(1, tag.as_bytes());
                scalar.push(2 << 3 | 5);
                scalar.extend((value as f32).to_le_bytes());
                summary.extend(field_bytes(1, &scalar));
            }
        }
        self.write(&event(record.step, &field_bytes(5, &summary)))
    }
}

impl Observer for TensorBoard {
    fn event(&mut self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::Started(started) => self.start(started.folder, started.first_step),
            Event::Record(record) => self.record(record),
            Event::Checkpoint(_) | Event::Note(_) | Event::Finished(_) => Ok(()),
        }
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A `tensorflow.Event`: wall time, step, and one further field.
fn event(step: u64, what: &[u8]) -> Vec<u8> {
    let mut message = vec![1 << 3 | 1];
    message.extend(now().to_le_bytes());
    message.extend(field_varint(2, step));
    message.extend(what);
    message
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn field_varint(field: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![field << 3];
    bytes.extend(varint(value));
    bytes
}

fn field_bytes(field: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![field << 3 | 2];
    bytes.extend(varint(value.len() as u64));
    bytes.extend(value);
    bytes
}

/// A TFRecord frame: length, masked crc of the length, data, masked crc of the data.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut bytes = length.to_vec();
    bytes.extend(masked_crc(&length).to_le_bytes());
    bytes.extend(data);
    bytes.extend(masked_crc(data).to_le_bytes());
    bytes
}

/// TFRecord's masking of crc32c: turned right by 15 bits, plus a constant.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_carry_the_published_checksums() {
        // RFC 3720, B.4: crc32c of 32 zeros is 8a9136aa.
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
        let bytes = frame(b"abc");
        assert_eq!(bytes.len(), 8 + 4 + 3 + 4);
        assert_eq!(bytes[..8], 3u64.to_le_bytes());
        assert_eq!(bytes[12..15], *b"abc");
    }

    #[test]
    fn whole_numbers_are_written_in_sevens_of_bits() {
        assert_eq!(varint(0), [0]);
        assert_eq!(varint(300), [0xac, 2]);
        assert_eq!(field_bytes(1, b"x"), [0x0a, 1, b'x']);
    }
}
