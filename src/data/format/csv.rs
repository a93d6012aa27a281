//! Tables of numbers.

use std::path::Path;

use ::csv::{ByteRecord, ErrorKind, Position, ReaderBuilder, Trim};

use super::super::augment::Subject;
use super::super::dataset::{Places, RealTable, TargetTable, Values};
use super::super::options::{Column, CsvOptions, Normalize, TargetKind};
use super::super::preprocess::Recipe;
use super::super::source::{self, Lookup};
use super::line_numbers::LineNumbers;
use super::{Pool, instead_of, not_empty, numbered};
use crate::error::{Error, Result};

/// The columns that are used, by number.
#[derive(Clone, Debug)]
struct Columns {
    names: Option<Vec<String>>,
    width: usize,
    features: Vec<usize>,
    targets: Vec<usize>,
    /// The first line, where nothing but its cells tells that it does not name the columns.
    guessed: Option<u64>,
}

impl Columns {
    /// The name of a column, where it has one, as errors tell it.
    fn told(&self, column: usize) -> String {
        let name = self.names.as_ref().and_then(|names| names.get(column));
        name.map_or_else(String::new, |name| format!(" ({name:?})"))
    }
}

/// What one file holds.
struct Table {
    columns: Columns,
    /// `[rows, features]`.
    features: Vec<f64>,
    /// `[rows, targets]`.
    targets: Vec<String>,
    lines: Vec<u64>,
}

/// Opens the table, and those of the other splits where they have files of their own.
pub(crate) fn open(options: &CsvOptions, lookup: &Lookup) -> Result<Pool> {
    let path = lookup.file_for("data.path", &options.path)?;
    let delimiter = delimiter(options, &path)?;
    let mut table = read(options, &path, delimiter, None)?;
    if options.target_type != Some(TargetKind::Real) {
        header_taken_for_data(&path, &table)?;
    }
    let features = table.columns.features.len();
    let width = table.columns.targets.len();
    let kind = options.target_type.unwrap_or_else(|| {
        let text = width == 1 && table.targets.iter().any(|cell| cell.parse::<f64>().is_err());
        if text { TargetKind::Class } else { TargetKind::Real }
    });
    if kind == TargetKind::Class && width != 1 {
        return Err(Error::config(
            "data.target",
            format!("found {width} columns, expected one where they are classes"),
        ));
    }
    let train = table.lines.len();
    let known: std::collections::HashSet<String> = match kind {
        TargetKind::Class => table.targets.iter().cloned().collect(),
        TargetKind::Real => Default::default(),
    };
    let mut real = Vec::new();
    if kind == TargetKind::Real {
        real = numbers(&path, &table)?;
    }
    let mut files = vec![(0, path.clone(), table.columns.targets.clone())];
    let mut ends = [train; 2];
    let own = [("data.validation", &options.validation), ("data.test", &options.test)];
    for ((key, file), end) in own.into_iter().zip(&mut ends) {
        if let Some(file) = file {
            let training = Training { path: &path, columns: &table.columns };
            let path = lookup.file_for(key, file)?;
            let more = read(options, &path, delimiter, Some(training))?;
            if more.columns.features.len() != features || more.columns.targets.len() != width {
                return Err(Error::data(
                    path,
                    format!(
                        "has {} feature and {} target columns, expected {features} and {width} as in the training file",
                        more.columns.features.len(),
                        more.columns.targets.len()
                    ),
                ));
            }
            match kind {
                TargetKind::Real => real.extend(numbers(&path, &more)?),
                TargetKind::Class => {
                    if let Some(row) = more.targets.iter().position(|t| !known.contains(t)) {
                        return Err(Error::data(
                            path,
                            format!(
                                "line {}: found the class {:?}, which the training file does not have",
                                more.lines[row], more.targets[row]
                            ),
                        ));
                    }
                }
            }
            files.push((table.lines.len(), path, more.columns.targets));
            table.features.extend(more.features);
            table.targets.extend(more.targets);
            table.lines.extend(more.lines);
        }
        *end = table.lines.len();
    }
    let targets = match kind {
        TargetKind::Real => {
            TargetTable::Real { values: real, width, places: Places::Tables { lines: table.lines, files } }
        }
        TargetKind::Class => {
            let (names, labels) = numbered(table.targets.iter().map(String::as_str));
            TargetTable::Class { labels, names }
        }
    };
    let shape = options.shape.clone().unwrap_or_else(|| vec![features]);
    if shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) != Some(features) {
        return Err(Error::config(
            "data.shape",
            format!("found {shape:?}, expected a shape of {features} values, the feature columns"),
        ));
    }
    let channels = if shape.len() == 3 { shape[0] } else { features };
    let picture = shape.len() == 3;
    let columns = table.columns;
    Ok(Pool {
        place: path,
        table: RealTable { shape, channels, full_scale: 1.0, background: 0.0, values: Values::Doubles(table.features) },
        targets,
        names: None,
        pattern: None,
        own_validation: train..ends[0],
        own_test: ends[0]..ends[1],
        subject: if picture { Subject::Picture } else { Subject::Other },
        normalize: Normalize::None,
        pictures: None,
        recipe: Recipe::Values {
            names: columns.names.map(|n| columns.features.iter().map(|c| n[*c].clone()).collect()),
            numbers: columns.features,
            width: columns.width,
            delimiter,
        },
    })
}

fn delimiter(options: &CsvOptions, path: &Path) -> Result<char> {
    let tab = path.to_string_lossy().trim_end_matches(".gz").ends_with(".tsv");
    let delimiter = options.delimiter.unwrap_or(if tab { '\t' } else { ',' });
    if !delimiter.is_ascii() {
        return Err(Error::config("data.delimiter", format!("found {delimiter:?}, expected one ASCII character")));
    }
    Ok(delimiter)
}

fn numbers(path: &Path, table: &Table) -> Result<Vec<f32>> {
    let width = table.columns.targets.len();
    let place = |i: usize| (table.lines[i / width], table.columns.targets[i % width]);
    table
        .targets
        .iter()
        .enumerate()
        .map(|(i, cell)| {
            let (line, column) = place(i);
            number(path, line, column, &table.columns, cell).map(|value| value as f32)
        })
        .collect()
}

/// A cell's number, where f32 has one that is finite too.
fn finite(cell: &str) -> Option<f64> {
    cell.parse::<f64>().ok().filter(|value| (*value as f32).is_finite())
}

/// What is expected in the place of a cell that has no such number. Digits are a number, be it more than f64 has.
fn instead_of_cell(cell: &str) -> &'static str {
    let digits = cell.bytes().any(|byte| byte.is_ascii_digit());
    instead_of(
        cell.parse::<f64>().map_or(f64::NAN, |value| if digits { value.clamp(f64::MIN, f64::MAX) } else { value }),
    )
}

fn number(path: &Path, line: u64, column: usize, columns: &Columns, cell: &str) -> Result<f64> {
    match finite(cell) {
        Some(value) => Ok(value),
        None => {
            let name = columns.names.as_ref().and_then(|n| n.get(column));
            let advice = if cell.is_empty() {
                "fill the cell or leave the row out".to_string()
            } else if columns.guessed == Some(line) && cell.parse::<f64>().is_err() {
                NAMES_OR_NUMBERS.to_string()
            } else if name.is_some() {
                "correct the cell, or leave the column out by data.features".to_string()
            } else {
                format!("correct the cell, or leave the column out by data.features, where it is number {column}")
            };
            let told = columns.told(column);
            Err(Error::data(
                path,
                format!(
                    "line {line}, column {}{told}: found {cell:?}, expected {}; {advice}",
                    column + 1,
                    instead_of_cell(cell)
                ),
            ))
        }
    }
}

/// What to do about a first line that may be either.
const NAMES_OR_NUMBERS: &str = "set data.header = true where this line names the columns, or correct the cell";

/// A first line of which some cells are numbers counts as data. Where all targets but its own are numbers, it most likely names
/// the columns, and would give a class that no other row has.
fn header_taken_for_data(path: &Path, table: &Table) -> Result<()> {
    let columns = &table.columns;
    let is_number = |cell: &String| cell.parse::<f64>().is_ok();
    if let ([first, rest @ ..], Some(line), [column]) = (&table.targets[..], columns.guessed, &columns.targets[..])
        && !is_number(first)
        && !rest.is_empty()
        && rest.iter().all(is_number)
    {
        return Err(Error::data(
            path,
            format!(
                "line {line}, column {}: found {first:?}, where all other rows have a number; {NAMES_OR_NUMBERS}; \
                 data.header = false takes it for a class",
                column + 1
            ),
        ));
    }
    Ok(())
}

/// The file that is trained on, by which the columns of other files are found.
#[derive(Clone, Copy)]
struct Training<'a> {
    path: &'a Path,
    columns: &'a Columns,
}

impl Training<'_> {
    /// Where another file with a header has the columns of these numbers: by their names. Of columns of the same name, the first
    /// is the first, and so on.
    fn find(&self, numbers: &[usize], names: &[String], header: &[&str], path: &Path) -> Result<Vec<usize>> {
        let find = |number: &usize| {
            let name = &names[*number];
            let before = names[..*number].iter().filter(|n| *n == name).count();
            let mut fitting = (0..header.len()).filter(|i| header[*i] == name);
            fitting.nth(before).ok_or_else(|| {
                Error::data(
                    path,
                    format!(
                        "has no column {name:?}, expected those that are used of {}; it has {}; add the column, or correct \
                         its name",
                        self.path.display(),
                        header.join(", ")
                    ),
                )
            })
        };
        numbers.iter().map(find).collect()
    }
}

fn read(options: &CsvOptions, path: &Path, delimiter: char, training: Option<Training<'_>>) -> Result<Table> {
    let bytes = source::read(path)?;
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let mut reader =
        ReaderBuilder::new().has_headers(false).delimiter(delimiter as u8).trim(Trim::All).from_reader(bytes);
    let mut record = ByteRecord::new();
    let mut columns: Option<Columns> = None;
    let mut table = (Vec::new(), Vec::new(), Vec::new());
    let mut lines = LineNumbers::new(bytes);
    while reader.read_byte_record(&mut record).map_err(|e| told(path, &e, &mut lines))? {
        let line = lines.of_row(record.position().map_or(0, Position::byte));
        let cell = |column: usize| {
            let bytes = record.get(column).unwrap_or_default();
            std::str::from_utf8(bytes).map_err(|_| {
                let text = String::from_utf8_lossy(bytes);
                Error::data(
                    path,
                    format!("line {line}, column {}: {text:?} is not UTF-8; convert the file to UTF-8", column + 1),
                )
            })
        };
        let columns = match &columns {
            Some(columns) => columns,
            None => {
                let cells = (0..record.len()).map(cell).collect::<Result<Vec<_>>>()?;
                let header = options.header.unwrap_or_else(|| cells.iter().all(|c| c.parse::<f64>().is_err()));
                let mut chosen = choose(options, path, header.then_some(&cells[..]), cells.len(), training)?;
                chosen.guessed = (options.header.is_none() && !header).then_some(line);
                let chosen = columns.insert(chosen);
                if header {
                    continue;
                }
                chosen
            }
        };
        for column in &columns.features {
            table.0.push(number(path, line, *column, columns, cell(*column)?)?);
        }
        for column in &columns.targets {
            let text = cell(*column)?;
            if text.is_empty() {
                let problem = format!(
                    "line {line}, column {}{}: found no target, expected a class or a number; fill the cell or leave the row out",
                    column + 1,
                    columns.told(*column)
                );
                return Err(Error::data(path, problem));
            }
            table.1.push(text.to_string());
        }
        table.2.push(line);
    }
    not_empty(path, "row", table.2.len())?;
    let Some(columns) = columns else { return Err(Error::data(path, "is empty")) };
    Ok(Table { columns, features: table.0, targets: table.1, lines: table.2 })
}

fn told(path: &Path, error: &::csv::Error, lines: &mut LineNumbers<'_>) -> Error {
    match error.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => {
            let line = lines.of_row(pos.as_ref().map_or(0, Position::byte));
            Error::data(path, format!("line {line}: found {len} cells, expected {expected_len} as in the first row"))
        }
        _ => Error::data(path, format!("is not a CSV table: {error}")),
    }
}

/// The columns that the options name: of the training file, where another has a header like it.
fn choose(
    options: &CsvOptions,
    path: &Path,
    header: Option<&[&str]>,
    width: usize,
    training: Option<Training<'_>>,
) -> Result<Columns> {
    let names = header.map(|h| h.iter().map(|c| c.to_string()).collect());
    if let (Some(training), Some(header)) = (training, header)
        && let Some(known) = &training.columns.names
    {
        let features = training.find(&training.columns.features, known, header, path)?;
        let targets = training.find(&training.columns.targets, known, header, path)?;
        return Ok(Columns { names, width, features, targets, guessed: None });
    }
    let find = |key: &str, column: &Column| -> Result<usize> {
        match (column, header) {
            (Column::Number(number), _) => {
                let index = if *number < 0 { *number + width as i64 } else { *number };
                usize::try_from(index).ok().filter(|i| *i < width).ok_or_else(|| {
                    Error::config(
                        key,
                        format!(
                            "found column {number}, but {} has {width} columns, 0 to {}",
                            path.display(),
                            width.saturating_sub(1)
                        ),
                    )
                })
            }
            (Column::Name(name), Some(header)) => header.iter().position(|h| h == name).ok_or_else(|| {
                Error::config(
                    key,
                    format!("found {name:?}, but {} has the columns {}", path.display(), header.join(", ")),
                )
            }),
            (Column::Name(name), None) => Err(Error::config(
                key,
                format!(
                    "found {name:?}, but {} has no header line; give numbers, or data.header = true",
                    path.display()
                ),
            )),
        }
    };
    let mut targets = Vec::new();
    for column in &options.target {
        targets.push(find("data.target", column)?);
    }
    if targets.is_empty() {
        targets.push(width.saturating_sub(1));
    }
    let features = match &options.features {
        Some(columns) => columns.iter().map(|c| find("data.features", c)).collect::<Result<Vec<_>>>()?,
        None => (0..width).filter(|c| !targets.contains(c)).collect(),
    };
    if features.is_empty() {
        return Err(Error::data(
            path,
            format!(
                "has {width} column(s), expected at least one feature besides the target; is data.delimiter right?"
            ),
        ));
    }
    if let Some(both) = features.iter().find(|c| targets.contains(c)) {
        return Err(Error::config("data.features", format!("found column {both}, which is a target too")));
    }
    Ok(Columns { names, width, features, targets, guessed: None })
}

/// The columns of the table that a model was trained on.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    pub names: Option<&'a [String]>,
    pub numbers: &'a [usize],
    pub width: usize,
}

impl Known<'_> {
    /// What a row may be, for the error about one of another length.
    fn told(&self) -> String {
        /// Names that an error has room for.
        const MOST: usize = 8;
        let features = self.numbers.len();
        let names = self.names.map_or_else(String::new, |names| {
            let more = if names.len() > MOST { ", .." } else { "" };
            format!(" ({}{more})", names.iter().take(MOST).map(String::as_str).collect::<Vec<_>>().join(", "))
        });
        let what = if features == 1 { "the 1 feature" } else { &format!("the {features} features") };
        let whole = match self.width > features {
            true => format!(", or all {} columns of the training table", self.width),
            false => String::new(),
        };
        format!("{what}{names}{whole}")
    }
}

/// The features of a user's rows, with their lines: by name under a header with all the names; else every cell of a row
/// that has the features alone, or those with their numbers in the training table.
pub(crate) fn user_rows(text: &str, path: &Path, delimiter: char, known: Known<'_>) -> Result<Vec<(u64, Vec<f64>)>> {
    let Known { names, numbers, width } = known;
    let mut reader = ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(u8::try_from(delimiter).unwrap_or(b','))
        .trim(Trim::All)
        .from_reader(text.as_bytes());
    let mut named: Option<Vec<usize>> = None;
    let mut rows = Vec::new();
    let mut lines = LineNumbers::new(text.as_bytes());
    for record in reader.records() {
        let record = record.map_err(|e| told(path, &e, &mut lines))?;
        // Where the row begins: the reader's own count stays behind at other ends than LF, and at empty lines.
        let line = lines.of_row(record.position().map_or(0, Position::byte));
        if named.is_none() && rows.is_empty() {
            let header: Vec<&str> = record.iter().collect();
            named = names.map(|names| by_names(names, &known, &header, path)).transpose()?.flatten();
            if named.is_some() {
                continue;
            }
        }
        let columns: Vec<usize> = match &named {
            Some(named) => named.clone(),
            None if record.len() == numbers.len() => (0..numbers.len()).collect(),
            None if record.len() == width => numbers.to_vec(),
            None => {
                let problem = format!("line {line}: found {} cells, expected {}", record.len(), known.told());
                return Err(Error::data(path, problem));
            }
        };
        let number = |column: &usize| {
            let cell = record.get(*column).unwrap_or_default();
            finite(cell).ok_or_else(|| {
                Error::data(
                    path,
                    format!("line {line}, column {}: found {cell:?}, expected {}", column + 1, instead_of_cell(cell)),
                )
            })
        };
        rows.push((line, columns.iter().map(number).collect::<Result<_>>()?));
    }
    Ok(rows)
}

/// Where a user's header has the features of these names; none where it is no header with all of them. Where it has the columns
/// of the training table, each is where it was there. Of features of the same name, the first is the first otherwise.
///
/// # Errors
/// More columns of a name than features, of which nothing tells which are meant.
fn by_names(names: &[String], known: &Known<'_>, header: &[&str], path: &Path) -> Result<Option<Vec<usize>>> {
    let fits = |(name, number): (&String, &usize)| header.get(*number) == Some(&name.as_str());
    if header.len() == known.width && names.iter().zip(known.numbers).all(fits) {
        return Ok(Some(known.numbers.to_vec()));
    }
    let mut found = Vec::with_capacity(names.len());
    for (i, name) in names.iter().enumerate() {
        let before = names[..i].iter().filter(|n| *n == name).count();
        let Some(place) = (0..header.len()).filter(|place| header[*place] == name).nth(before) else { return Ok(None) };
        found.push(place);
    }
    let count = |name: &str| header.iter().filter(|cell| **cell == name).count();
    for name in names {
        let (has, takes) = (count(name), names.iter().filter(|n| *n == name).count());
        if has > takes {
            return Err(Error::data(
                path,
                format!(
                    "has {has} columns {name:?}, expected {takes}, since the columns are not those of the training table \
                     otherwise; leave out those that the model was not trained on"
                ),
            ));
        }
    }
    Ok(Some(found))
}
