//! A TOML document as a tree in which every value knows where it stands.

use std::collections::BTreeMap;
use std::ops::Range;

use toml_edit::{Document, Item, Value};

use crate::error::{Error, Result};

/// A value of the document.
#[derive(Clone, Debug)]
pub enum Node {
    /// A table, keys in order.
    Table(BTreeMap<String, Entry>),
    /// An array.
    Array(Vec<Entry>),
    /// A string.
    String(String),
    /// A whole number.
    Integer(i64),
    /// A number with a point or an exponent.
    Float(f64),
    /// True or false.
    Boolean(bool),
    /// A date or a time, which no key takes.
    Datetime(String),
}

/// A value and where it stands: `run.toml:12`, or `--set`.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The value.
    pub node: Node,
    /// Where.
    pub place: String,
}

impl Node {
    /// The value in words, as an error shows it.
    pub fn describe(&self) -> String {
        match self {
            Node::Table(_) => "a table".into(),
            Node::Array(items) => format!("an array of {}", items.len()),
            Node::String(text) => format!("{text:?} (a string)"),
            Node::Integer(value) => format!("{value}"),
            Node::Float(value) => format!("{value:?} (a number with a point)"),
            Node::Boolean(value) => format!("{value}"),
            Node::Datetime(text) => format!("{text} (a date)"),
        }
    }
}

impl Node {
    /// The value as TOML.
    pub fn write(&self) -> Value {
        let of = |entry: &Entry| entry.node.write();
        match self {
            Node::Table(entries) => {
                entries.iter().map(|(key, entry)| (key.as_str(), of(entry))).collect::<toml_edit::InlineTable>().into()
            }
            Node::Array(items) => Value::Array(items.iter().map(of).collect()),
            Node::String(text) | Node::Datetime(text) => text.as_str().into(),
            Node::Integer(value) => (*value).into(),
            Node::Float(value) => (*value).into(),
            Node::Boolean(value) => (*value).into(),
        }
    }
}

/// Parses a document; `name` stands before line numbers.
///
/// # Errors
/// Text that is no TOML: line and what the parser expected.
pub fn parse(text: &str, name: &str) -> Result<Entry> {
    let document = Document::parse(text).map_err(|e| {
        let line = e.span().map_or(1, |span| line_of(text, span.start));
        let what = e.message().lines().collect::<Vec<_>>().join("; ");
        let found = text.lines().nth(line - 1).unwrap_or_default().trim();
        let found = if found.is_empty() { String::new() } else { format!(", in `{}`", shortened(found)) };
        Error::config(format!("{name}:{line}"), format!("not valid TOML: {what}{found}"))
    })?;
    let locate = |span: Option<Range<usize>>, outer: &str| match span {
        Some(span) => format!("{name}:{}", line_of(text, span.start)),
        None => outer.to_owned(),
    };
    Ok(from_item(document.as_item(), &format!("{name}:1"), &locate))
}

/// The beginning of a line that is too long for an error.
fn shortened(line: &str) -> String {
    match line.char_indices().nth(60) {
        Some((end, _)) => format!("{}..", &line[..end]),
        None => line.to_owned(),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|&&b| b == b'\n').count() + 1
}

type Locate<'a> = dyn Fn(Option<Range<usize>>, &str) -> String + 'a;

fn from_item(item: &Item, outer: &str, locate: &Locate<'_>) -> Entry {
    let place = locate(item.span(), outer);
    let node = match item {
        Item::None => Node::Table(BTreeMap::new()),
        Item::Value(value) => return from_value(value, outer, locate),
        Item::Table(table) => Node::Table(
            table
                .iter()
                .map(|(key, item)| {
                    let at = locate(table.key(key).and_then(toml_edit::Key::span), &place);
                    let mut entry = from_item(item, &at, locate);
                    if !matches!(item, Item::Table(_) | Item::ArrayOfTables(_)) {
                        entry.place = at;
                    }
                    (key.to_owned(), entry)
                })
                .collect(),
        ),
        Item::ArrayOfTables(tables) => Node::Array(
            tables
                .iter()
                .map(|table| from_item(&Item::Table(table.clone()), &locate(table.span(), &place), locate))
                .collect(),
        ),
    };
    Entry { node, place }
}

fn from_value(value: &Value, outer: &str, locate: &Locate<'_>) -> Entry {
    let place = locate(value.span(), outer);
    let node = match value {
        Value::String(text) => Node::String(text.value().clone()),
        Value::Integer(value) => Node::Integer(*value.value()),
        Value::Float(value) => Node::Float(*value.value()),
        Value::Boolean(value) => Node::Boolean(*value.value()),
        Value::Datetime(value) => Node::Datetime(value.value().to_string()),
        Value::Array(array) => Node::Array(array.iter().map(|value| from_value(value, &place, locate)).collect()),
        Value::InlineTable(table) => {
            Node::Table(table.iter().map(|(key, value)| (key.to_owned(), from_value(value, &place, locate))).collect())
        }
    };
    Entry { node, place }
}

/// Keys of which one at most may be given.
const EITHER: [[&str; 2]; 3] = [
    ["run.steps", "run.epochs"],
    ["evaluate.every_steps", "evaluate.every_epochs"],
    ["checkpoint.every_steps", "checkpoint.every_epochs"],
];

/// Where `--set` gives one of two keys, what the file says of the other no longer counts.
fn overrule(root: &mut Entry, key: &str) {
    let pair = EITHER.iter().find(|pair| pair.contains(&key));
    let other = pair.and_then(|pair| pair.iter().find(|other| **other != key)).and_then(|other| other.split_once('.'));
    if let (Some((section, other)), Node::Table(sections)) = (other, &mut root.node)
        && let Some(Node::Table(entries)) = sections.get_mut(section).map(|entry| &mut entry.node)
        && entries.get(other).is_some_and(|entry| !entry.place.starts_with("--set"))
    {
        entries.remove(other);
    }
}

/// Applies `--set key.path=value`. The value is TOML; what is no TOML counts as a string. It stands in the place of what the file
/// says, and of the other key where the file gives one of two.
///
/// # Errors
/// No `=`, an empty key, or a path through something that is no table.
pub fn set(root: &mut Entry, assignment: &str) -> Result<()> {
    let place = format!("--set {assignment}");
    let wrong = |problem: String| Error::config(place.clone(), problem);
    let (path, value) = assignment
        .split_once('=')
        .ok_or_else(|| wrong("found no `=`, expected KEY=VALUE, as in optimizer.learning_rate=3e-4".into()))?;
    let value = match value.trim().parse::<Value>() {
        Ok(value) => from_value(&value, &place, &|_, outer| outer.to_owned()).node,
        Err(_) => Node::String(value.trim().to_owned()),
    };
    let keys: Vec<&str> = path.trim().split('.').map(str::trim).collect();
    if keys.iter().any(|key| key.is_empty()) {
        return Err(wrong(format!(
            "found key `{path}`, expected names joined by points, as in optimizer.learning_rate"
        )));
    }
    overrule(root, &keys.join("."));
    let mut node = &mut root.node;
    for (depth, key) in keys.iter().enumerate() {
        let entries = match node {
            Node::Table(entries) => entries,
            other => {
                let path = keys[..depth].join(".");
                return Err(wrong(format!("`{path}` is {}, expected a table", other.describe())));
            }
        };
        let empty = || Entry { node: Node::Table(BTreeMap::new()), place: place.clone() };
        let entry = entries.entry((*key).to_owned()).or_insert_with(empty);
        if depth + 1 == keys.len() {
            *entry = Entry { node: value, place: place.clone() };
            return Ok(());
        }
        node = &mut entry.node;
    }
    Ok(())
}
