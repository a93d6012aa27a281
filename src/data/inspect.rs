//! What a run would see, as text.

use std::fmt::Write;

use super::preprocess::Recipe;
use super::{Batch, Dataset, InputSpec, Inputs, OpenedData, Pick, TargetSpec, Targets, read_batch};
use crate::error::Result;
use crate::text::grouped;

/// Samples of the training split whose values are measured, where they are small enough.
const MEASURED: usize = 2000;
/// Bytes of values that are measured.
const MEASURED_BYTES: usize = 256 << 20;
/// Samples that are shown.
const SHOWN: usize = 3;
/// Classes that are listed.
const CLASSES: usize = 40;
/// Characters of a text that are shown.
const SNIPPET: usize = 160;

/// A page on splits, shapes, classes, values and the first samples.
///
/// # Errors
/// A sample that cannot be read.
pub fn inspect(data: &OpenedData) -> Result<String> {
    let mut page = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(page, "{name:<12}{text}");
    };
    line("format", data.format.to_string());
    line("source", data.source.clone());
    let splits = [
        ("train", Some(&data.splits.train)),
        ("validation", data.splits.validation.as_ref()),
        ("test", data.splits.test.as_ref()),
    ];
    let sizes: Vec<String> =
        splits.iter().filter_map(|(name, split)| split.map(|s| format!("{name} {}", grouped(s.len())))).collect();
    line("samples", sizes.join(", "));
    match data.input() {
        InputSpec::Real { shape } => line("input", format!("{shape:?} real values")),
        InputSpec::Tokens { context, vocabulary } => {
            line("input", format!("{context} tokens of a vocabulary of {}", grouped(*vocabulary)));
        }
    }
    match data.target() {
        TargetSpec::Class { names } => line("target", format!("one of {} classes", names.len())),
        TargetSpec::Real { width } => line("target", format!("{width} real value(s)")),
        TargetSpec::NextToken => line("target", "the next token".to_string()),
    }
    line("sampling", format!("{:?}", data.sampling).to_lowercase());
    if let Some(pictures) = &data.preprocess.pictures {
        let ([mels, frames], [scale, shift]) = (pictures.transform()?.shape(), pictures.normalization()?);
        line("pictures", format!("[1, {mels}, {frames}] made by the model, x * {scale:.6} + {shift:.6}"));
    }
    let batch = first(&*data.splits.train, measured(data.input().elements()))?;
    line("values", values(&batch));
    if let Some(affine) = &data.preprocess.affine {
        let told = |values: &[f64]| match values {
            [] => String::new(),
            [first, rest @ ..] if rest.iter().all(|v| v == first) => format!("{first:.6}"),
            [a, b, c] => format!("{a:.6} {b:.6} {c:.6}"),
            many => format!("{:.6} .. {:.6}", many[0], many[many.len() - 1]),
        };
        line("normalized", format!("x * {} + {}", told(&affine.scale), told(&affine.shift)));
    }
    if let TargetSpec::Class { names } = data.target() {
        classes(&mut page, names, &splits.map(|(name, split)| (name, split.and_then(|s| s.class_counts()))));
    }
    let _ = writeln!(page);
    samples(&mut page, data, &batch);
    Ok(page)
}

/// How many samples of `elements` values are measured.
fn measured(elements: usize) -> usize {
    (MEASURED_BYTES / elements.saturating_mul(size_of::<f32>()).max(1)).clamp(1, MEASURED)
}

/// The first samples of a split.
fn first(dataset: &dyn Dataset, count: usize) -> Result<Batch> {
    let picks: Vec<Pick> = (0..dataset.len().min(count)).map(Pick::Sample).collect();
    let mut batch = Batch::zeros(&dataset.input(), &dataset.target(), 0);
    read_batch(dataset, &picks, None, &mut batch)?;
    Ok(batch)
}

fn values(batch: &Batch) -> String {
    let of = format!("(first {} training samples)", grouped(batch.samples));
    match &batch.inputs {
        Inputs::Real(values) => {
            let n = values.len().max(1) as f64;
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
            let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
            let low = values.iter().copied().fold(f32::INFINITY, f32::min);
            let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            format!("{low:.4} to {high:.4}, mean {mean:.4}, deviation {:.4} {of}", variance.sqrt())
        }
        Inputs::Tokens(tokens) => {
            let distinct: std::collections::HashSet<&i32> = tokens.iter().collect();
            format!("{} distinct tokens among {} {of}", grouped(distinct.len()), grouped(tokens.len()))
        }
    }
}

fn classes(page: &mut String, names: &[String], splits: &[(&str, Option<Vec<usize>>)]) {
    let width = names.iter().take(CLASSES).map(|n| n.chars().count()).max().unwrap_or(0).max(5);
    let present: Vec<_> = splits.iter().filter_map(|(name, counts)| counts.as_ref().map(|c| (name, c))).collect();
    let _ = write!(page, "\n{:<width$}", "class");
    for (name, _) in &present {
        let _ = write!(page, "  {name:>10}");
    }
    let _ = writeln!(page);
    for (class, name) in names.iter().enumerate().take(CLASSES) {
        let _ = write!(page, "{name:<width$}");
        for (_, counts) in &present {
            let _ = write!(page, "  {:>10}", grouped(counts[class]));
        }
        let _ = writeln!(page);
    }
    if names.len() > CLASSES {
        let _ = writeln!(page, ".. and {} more", names.len() - CLASSES);
    }
}

fn samples(page: &mut String, data: &OpenedData, batch: &Batch) {
    let each = data.input().elements();
    for sample in 0..batch.samples.min(SHOWN) {
        let target = match (&batch.targets, data.target()) {
            (Targets::Index(labels), TargetSpec::Class { names }) => {
                format!("class {}", usize::try_from(labels[sample]).ok().and_then(|l| names.get(l)).map_or("?", |n| n))
            }
            (Targets::Real(values), TargetSpec::Real { width }) => {
                format!("target {}", numbers(&values[sample * width..][..*width]))
            }
            _ => "continued by the next token".to_string(),
        };
        let _ = writeln!(page, "sample {sample}: {target}");
        match (&batch.inputs, data.input()) {
            (Inputs::Real(values), InputSpec::Real { shape }) => {
                let values = &values[sample * each..][..each];
                match shape[..] {
                    [channels, height, width] => {
                        let spectrum = matches!(data.preprocess.recipe, Recipe::Audio { .. });
                        page.push_str(&picture(values, channels, height, width, spectrum));
                    }
                    _ => {
                        let _ = writeln!(page, "  {}", numbers(values));
                    }
                }
            }
            (Inputs::Tokens(tokens), _) => {
                let tokens = &tokens[sample * each..][..each];
                let text = match &data.preprocess.recipe {
                    Recipe::Line { words } => Some(words.decode(tokens)),
                    _ => data.preprocess.tokenizer().map(|t| t.decode(tokens)),
                };
                if let Some(text) = text {
                    let snippet: String = text.chars().take(SNIPPET).collect();
                    let _ = writeln!(page, "  {snippet:?}");
                }
                let head: Vec<String> = tokens.iter().take(12).map(i32::to_string).collect();
                let more = if tokens.len() > 12 { " .." } else { "" };
                let _ = writeln!(page, "  {}{more}", head.join(" "));
            }
            _ => {}
        }
    }
}

fn numbers(values: &[f32]) -> String {
    let head: Vec<String> = values.iter().take(8).map(|v| format!("{v:.4}")).collect();
    format!("{}{}", head.join(" "), if values.len() > 8 { " .." } else { "" })
}

/// A picture of at most 32 rows in letters; a spectrum has its low frequencies below.
fn picture(values: &[f32], channels: usize, height: usize, width: usize, spectrum: bool) -> String {
    const SHADES: &[u8] = b" .:-=+*#%@";
    let shrink = height.div_ceil(32).max(width.div_ceil(if spectrum { 100 } else { 48 })).max(1);
    let (rows, columns) = (height.div_ceil(shrink), width.div_ceil(shrink));
    let mut grey = vec![0f32; rows * columns];
    for channel in 0..channels {
        for y in 0..rows * shrink {
            for x in 0..columns * shrink {
                let (y, x) = (y.min(height - 1), x.min(width - 1));
                grey[(y / shrink) * columns + x / shrink] += values[(channel * height + y) * width + x];
            }
        }
    }
    let low = grey.iter().copied().fold(f32::INFINITY, f32::min);
    let high = grey.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = if high > low { (SHADES.len() as f32 - 0.001) / (high - low) } else { 0.0 };
    let mut text = String::new();
    for row in 0..rows {
        let row = if spectrum { rows - 1 - row } else { row };
        let mut line = String::from("  ");
        for value in &grey[row * columns..][..columns] {
            let shade = char::from(SHADES[(((value - low) * scale) as usize).min(SHADES.len() - 1)]);
            line.push(shade);
            if !spectrum {
                // A letter is about twice as high as it is wide.
                line.push(shade);
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_samples_are_measured_up_to_a_number_of_bytes() {
        assert_eq!(measured(784), MEASURED);
        assert_eq!(measured(3 * 512 * 512), 85);
        assert_eq!(measured(1 << 30), 1);
    }
}
