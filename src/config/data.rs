//! `[data]`.

use super::section::Section;
use super::tree::Node;
use crate::data::augment::AugmentOptions;
use crate::data::options::{
    AudioFeatures, AudioOptions, Color, Column, CsvOptions, IdxOptions, ImagesOptions, InlineOptions, InlineTargets,
    LinesOptions, Normalize, Part, Resident, Sampling, SplitOptions, TargetKind, TextOptions, TokensOptions,
};
use crate::data::{Cleaning, DataOptions, FormatOptions, LogMelOptions, MelScale, TokenizerKind};
use crate::error::Result;

const FORMATS: [(&str, &str); 9] = [
    ("digits", "digits"),
    ("idx", "idx"),
    ("csv", "csv"),
    ("images", "images"),
    ("audio", "audio"),
    ("text", "text"),
    ("tokens", "tokens"),
    ("lines", "lines"),
    ("inline", "inline"),
];

/// Reads `[data]`, apart from `batch_size`.
///
/// # Errors
/// A key that is unknown, of another type, or missing.
pub fn data(section: &mut Section) -> Result<DataOptions> {
    let Some(name) = section.choice("format", &FORMATS)? else {
        let names: Vec<&str> = FORMATS.iter().map(|(name, _)| *name).collect();
        return Err(section.missing("format", &format!("one of {}", names.join(", "))));
    };
    section.decides("format", name);
    let format = match name {
        "digits" => FormatOptions::Digits,
        "idx" => FormatOptions::Idx(IdxOptions {
            path: section.optional("path")?,
            images: section.optional("images")?,
            labels: section.optional("labels")?,
            test_images: section.optional("test_images")?,
            test_labels: section.optional("test_labels")?,
            classes: section.optional("classes")?,
        }),
        "csv" => FormatOptions::Csv(csv(section)?),
        "images" => FormatOptions::Images(ImagesOptions {
            path: section.required("path")?,
            resize: section.optional("resize")?,
            color: section.choice("color", &[("grey", Color::Grey), ("rgb", Color::Rgb)])?,
            cache: section.optional("cache")?,
        }),
        "audio" => FormatOptions::Audio(audio(section)?),
        "text" => {
            let d = TextOptions::default();
            FormatOptions::Text(TextOptions {
                path: section.required("path")?,
                validation: section.optional("validation")?,
                test: section.optional("test")?,
                tokenizer: section.choice_or(
                    "tokenizer",
                    &[
                        ("characters", TokenizerKind::Characters),
                        ("bytes", TokenizerKind::Bytes),
                        ("gpt2", TokenizerKind::Gpt2),
                    ],
                    "characters",
                )?,
                context: section.or("context", d.context)?,
            })
        }
        "tokens" => {
            let d = TokensOptions::default();
            FormatOptions::Tokens(TokensOptions {
                path: section.required("path")?,
                validation: section.optional("validation")?,
                test: section.optional("test")?,
                vocabulary: section.or("vocabulary", d.vocabulary)?,
                context: section.or("context", d.context)?,
            })
        }
        "lines" => FormatOptions::Lines(lines(section)?),
        _ => FormatOptions::Inline(InlineOptions { inputs: rows(section, "inputs")?, targets: targets(section)? }),
    };
    let defaults = DataOptions::new(format.clone());
    let split = split(section)?;
    let normalize = normalize(section)?;
    let augment = augment(section)?;
    let sampling = section.choice(
        "sampling",
        &[("shuffle", Sampling::Shuffle), ("random", Sampling::Random), ("sequential", Sampling::Sequential)],
    )?;
    Ok(DataOptions {
        split,
        normalize,
        augment,
        sampling,
        drop_last: section.optional("drop_last")?,
        prefetch: section.or("prefetch", defaults.prefetch)?,
        threads: section.or("threads", defaults.threads)?,
        resident: resident(section)?,
        ..defaults
    })
}

/// `"auto"`, `true` or `false`.
fn resident(section: &mut Section) -> Result<Resident> {
    match section.node("resident") {
        None => section.choice_or("resident", &[("auto", Resident::Auto)], "auto"),
        Some(Node::Boolean(_)) => {
            let always: bool = section.required("resident")?;
            Ok(if always { Resident::Always } else { Resident::Never })
        }
        Some(Node::String(text)) if text == "auto" => {
            section.choice_or("resident", &[("auto", Resident::Auto)], "auto")
        }
        Some(other) => {
            let found = match other {
                Node::String(text) => format!("{text:?}"),
                other => other.describe(),
            };
            Err(section.error("resident", format!("found {found}, expected \"auto\", true or false")))
        }
    }
}

fn csv(section: &mut Section) -> Result<CsvOptions> {
    let delimiter = match section.optional::<String>("delimiter")? {
        None => None,
        Some(text) => {
            let mut characters = text.chars();
            match (characters.next(), characters.next()) {
                (Some(character), None) => Some(character),
                _ => return Err(section.error("delimiter", format!("found {text:?}, expected one character"))),
            }
        }
    };
    Ok(CsvOptions {
        path: section.required("path")?,
        validation: section.optional("validation")?,
        test: section.optional("test")?,
        header: section.optional("header")?,
        delimiter,
        target: columns(section, "target")?.unwrap_or_default(),
        target_type: section.choice("target_type", &[("class", TargetKind::Class), ("real", TargetKind::Real)])?,
        features: columns(section, "features")?,
        shape: section.optional("shape")?,
    })
}

/// `key = "name"`, `key = 3`, or an array of these.
fn columns(section: &mut Section, key: &str) -> Result<Option<Vec<Column>>> {
    let column = |node: &Node| match node {
        Node::String(name) => Some(Column::Name(name.clone())),
        Node::Integer(number) => Some(Column::Number(*number)),
        _ => None,
    };
    let Some(node) = section.take(key) else { return Ok(None) };
    let found: Option<Vec<Column>> = match &node {
        Node::Array(items) => items.iter().map(|item| column(&item.node)).collect(),
        single => column(single).map(|c| vec![c]),
    };
    let Some(columns) = found else {
        let problem = format!("found {}, expected names or numbers of columns", node.describe());
        return Err(section.error(key, problem));
    };
    Ok(Some(columns))
}

fn audio(section: &mut Section) -> Result<AudioOptions> {
    let d = AudioOptions::default();
    let options = AudioOptions {
        path: section.required("path")?,
        pattern: section.optional("pattern")?,
        seconds: section.or("seconds", d.seconds)?,
        samples: section.optional("samples")?,
        features: AudioFeatures::Waveform(None),
    };
    let pictures = section.choice_or("features", &[("waveform", false), ("log_mel", true)], "log_mel")?;
    if !pictures && !section.has("mel") {
        return Ok(options);
    }
    let d = LogMelOptions::default();
    let mut mel = section.section_such_as("mel", "mels = 40")?;
    let log_mel = LogMelOptions {
        n_fft: mel.optional("n_fft")?,
        hop: mel.optional("hop")?,
        mels: mel.or("mels", d.mels)?,
        scale: mel.choice_or("scale", &[("htk", MelScale::Htk), ("slaney", MelScale::Slaney)], "htk")?,
        min_hz: mel.or("min_hz", d.min_hz)?,
        max_hz: mel.optional("max_hz")?,
    };
    section.close("mel", mel, true)?;
    let features = if pictures { AudioFeatures::LogMel(log_mel) } else { AudioFeatures::Waveform(Some(log_mel)) };
    Ok(AudioOptions { features, ..options })
}

fn lines(section: &mut Section) -> Result<LinesOptions> {
    let d = LinesOptions::default();
    let mut classes = Vec::new();
    if section.has("classes") {
        let mut table = section.section("classes")?;
        for name in table.keys() {
            classes.push((name.clone(), table.required(&name)?));
        }
        section.close("classes", table, true)?;
    }
    Ok(LinesOptions {
        path: section.required("path")?,
        validation: section.optional("validation")?,
        test: section.optional("test")?,
        classes,
        words: section.choice_or(
            "words",
            &[("clean", Cleaning::Clean), ("whitespace", Cleaning::Whitespace)],
            "clean",
        )?,
        lowercase: section.or("lowercase", d.lowercase)?,
        min_count: section.or("min_count", d.min_count)?,
        length: section.optional("length")?,
    })
}

/// `key = [[1, 2], [3, 4]]`, or `[1, 2]` for rows of one.
fn rows(section: &mut Section, key: &str) -> Result<Vec<Vec<f32>>> {
    let flat = matches!(section.node(key), Some(Node::Array(items)) if items.iter().all(|i| !matches!(i.node, Node::Array(_))));
    if flat {
        return Ok(section.required::<Vec<f32>>(key)?.into_iter().map(|value| vec![value]).collect());
    }
    section.required(key)
}

fn targets(section: &mut Section) -> Result<InlineTargets> {
    let names = matches!(section.node("targets"), Some(Node::Array(items)) if items.iter().any(|i| matches!(i.node, Node::String(_))));
    if names {
        return section.required("targets").map(InlineTargets::Class);
    }
    rows(section, "targets").map(InlineTargets::Real)
}

fn normalize(section: &mut Section) -> Result<Option<Normalize>> {
    if matches!(section.node("normalize"), Some(Node::Table(_))) {
        let mut table = section.section("normalize")?;
        let (mean, std) = (table.required("mean")?, table.required("std")?);
        section.close("normalize", table, true)?;
        return Ok(Some(Normalize::Given { mean, std }));
    }
    section
        .choice("normalize", &[("none", Normalize::None), ("unit", Normalize::Unit), ("dataset", Normalize::Dataset)])
}

fn augment(section: &mut Section) -> Result<AugmentOptions> {
    let d = AugmentOptions::default();
    let mut table = section.section_such_as("augment", "flip = true")?;
    let options = AugmentOptions {
        crop: table.or("crop", d.crop)?,
        flip: table.or("flip", d.flip)?,
        rotate: table.or("rotate", d.rotate)?,
        time_shift: table.or("time_shift", d.time_shift)?,
        time_mask: table.or("time_mask", d.time_mask)?,
        frequency_mask: table.or("frequency_mask", d.frequency_mask)?,
        masks: table.or("masks", d.masks)?,
    };
    section.close("augment", table, true)?;
    Ok(options)
}

fn split(section: &mut Section) -> Result<SplitOptions> {
    let mut table = section.section_such_as("split", "validation = 0.1")?;
    let options = SplitOptions {
        validation: part(&mut table, "validation")?,
        test: part(&mut table, "test")?,
        stratify: table.optional("stratify")?,
        seed: table.optional("seed")?,
    };
    section.close("split", table, true)?;
    Ok(options)
}

/// `0.1`, `5000`, `{ every = 10 }`, `{ pattern = ".." }`, `{ field = "..", values = [..] }` or `{ field, from, to }`.
fn part(section: &mut Section, key: &str) -> Result<Option<Part>> {
    match section.node(key) {
        None => {
            section.optional::<f64>(key)?;
            Ok(None)
        }
        Some(Node::Integer(_)) => section.required(key).map(|count| Some(Part::Count(count))),
        Some(Node::Table(_)) => {
            let mut table = section.section(key)?;
            let part = if table.has("every") {
                Part::Every(table.required("every")?)
            } else if table.has("pattern") {
                Part::Pattern(table.required("pattern")?)
            } else if table.has("values") {
                Part::Values { field: table.required("field")?, values: table.required("values")? }
            } else {
                Part::Range {
                    field: table.required("field")?,
                    from: table.required("from")?,
                    to: table.required("to")?,
                }
            };
            section.close(key, table, true)?;
            Ok(Some(part))
        }
        Some(Node::Float(_)) => section.required(key).map(|share| Some(Part::Fraction(share))),
        Some(other) => {
            let problem = format!(
                "found {}, expected a share (0.1), a count (5000), or a table ({{ every = 10 }}, {{ pattern = \"..\" }}, \
                 {{ field = \"..\", values = [..] }}, {{ field = \"..\", from = 0, to = 4 }})",
                other.describe()
            );
            Err(section.error(key, problem))
        }
    }
}
