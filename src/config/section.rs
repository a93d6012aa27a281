//! Reading a table key by key: types, ranges, defaults, unknown keys, and a record of every value used.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml_edit::{Array, InlineTable, Item, Table, Value};

use super::tree::{Entry, Node};
use crate::error::{Error, Result};

/// A type that a key can have.
pub trait Read: Sized {
    /// What it is, for errors: `a whole number of 0 or more`.
    fn expected() -> String;
    /// The value, where the node has it.
    fn read(node: &Node) -> Option<Self>;
    /// The value as TOML.
    fn write(&self) -> Value;
    /// What is wrong with a node that [`Read::read`] does not take.
    fn refusal(node: &Node) -> String {
        format!("found {}, expected {}", node.describe(), Self::expected())
    }
}

impl Read for String {
    fn expected() -> String {
        "a string".into()
    }
    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::String(text) => Some(text.clone()),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        self.as_str().into()
    }
}

impl Read for PathBuf {
    fn expected() -> String {
        "a path (a string that is not empty)".into()
    }
    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::String(text) if !text.is_empty() => Some(text.into()),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        self.to_string_lossy().into_owned().into()
    }
}

impl Read for bool {
    fn expected() -> String {
        "true or false".into()
    }
    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Boolean(value) => Some(*value),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        (*self).into()
    }
}

impl Read for i64 {
    fn expected() -> String {
        "a whole number".into()
    }
    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Integer(value) => Some(*value),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        (*self).into()
    }
}

macro_rules! read_count {
    ($($ty:ty: $expected:literal),*) => {$(
        impl Read for $ty {
            fn expected() -> String {
                $expected.into()
            }
            fn read(node: &Node) -> Option<Self> {
                match node {
                    Node::Integer(value) => <$ty>::try_from(*value).ok(),
                    _ => None,
                }
            }
            fn write(&self) -> Value {
                i64::try_from(*self).unwrap_or(i64::MAX).into()
            }
        }
    )*};
}
read_count!(
    u32: "a whole number from 0 to 4294967295",
    u64: "a whole number of 0 or more",
    usize: "a whole number of 0 or more"
);

impl Read for f64 {
    fn expected() -> String {
        "a finite number".into()
    }
    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Float(value) if value.is_finite() => Some(*value),
            Node::Integer(value) => Some(*value as f64),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        (*self).into()
    }
}

impl Read for f32 {
    fn expected() -> String {
        "a finite number within the range of f32, up to 3.4e38 either way".into()
    }
    fn read(node: &Node) -> Option<Self> {
        f64::read(node).map(|value| value as f32).filter(|value| value.is_finite())
    }
    fn write(&self) -> Value {
        // The shortest decimal that gives this f32 again.
        self.to_string().parse::<f64>().unwrap_or(f64::from(*self)).into()
    }
}

impl<T: Read> Read for Vec<T> {
    fn expected() -> String {
        format!("an array, each item {}", T::expected())
    }
    fn read(node: &Node) -> Option<Self> {
        match node {
            Node::Array(items) => items.iter().map(|item| T::read(&item.node)).collect(),
            _ => None,
        }
    }
    fn write(&self) -> Value {
        Value::Array(self.iter().map(Read::write).collect::<Array>())
    }
    fn refusal(node: &Node) -> String {
        let mut items = match node {
            Node::Array(items) => items.iter().enumerate(),
            // One item alone: all that is missing are the brackets.
            single => {
                return match T::read(single) {
                    Some(item) => format!("found {}, expected an array, as in [{}]", single.describe(), item.write()),
                    None => format!("found {}, expected {}", single.describe(), Self::expected()),
                };
            }
        };
        match items.find(|(_, item)| T::read(&item.node).is_none()) {
            Some((i, item)) => format!("item {i}: {}", T::refusal(&item.node)),
            None => format!("found {}, expected {}", node.describe(), Self::expected()),
        }
    }
}

impl<T: Read, const N: usize> Read for [T; N] {
    fn expected() -> String {
        format!("an array of {N}, each item {}", T::expected())
    }
    fn read(node: &Node) -> Option<Self> {
        Vec::<T>::read(node)?.try_into().ok()
    }
    fn write(&self) -> Value {
        Value::Array(self.iter().map(Read::write).collect::<Array>())
    }
    fn refusal(node: &Node) -> String {
        match node {
            Node::Array(items) if items.len() == N => Vec::<T>::refusal(node),
            other => format!("found {}, expected {}", other.describe(), Self::expected()),
        }
    }
}

/// A table that is read key by key.
pub struct Section {
    path: String,
    place: String,
    entries: BTreeMap<String, Entry>,
    asked: Vec<String>,
    resolved: Vec<(String, Item)>,
    /// What decides which keys there are, where something does: `preset = "mlp"`.
    chosen: Option<String>,
}

impl Section {
    /// The table at the root of a document.
    ///
    /// # Errors
    /// The root is no table.
    pub fn root(entry: Entry) -> Result<Self> {
        Section::new(String::new(), entry, "..")
    }

    /// `example`: keys and values of such a table, for the error about something else.
    fn new(path: String, entry: Entry, example: &str) -> Result<Self> {
        let Entry { node, place } = entry;
        match node {
            Node::Table(entries) => {
                Ok(Section { path, place, entries, asked: Vec::new(), resolved: Vec::new(), chosen: None })
            }
            other => Err(Error::config(
                format!("{place}: {path}"),
                format!("found {}, expected a table ([{path}], or {path} = {{ {example} }})", other.describe()),
            )),
        }
    }

    fn dotted(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// An error about `key`, placed where it stands.
    pub fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        let place = self.entries.get(key).map_or(&self.place, |entry| &entry.place);
        Error::config(format!("{place}: {}", self.dotted(key)), problem)
    }

    /// Whether the document gives `key`.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Checks that every key is one of `known`, before any is read.
    ///
    /// # Errors
    /// Another key: the nearest is suggested.
    pub fn only(&self, known: &[&str]) -> Result<()> {
        match self.entries.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let hint = suggestion(key, known.iter().copied());
                let hint = if hint.is_empty() { format!("; expected one of {}", known.join(", ")) } else { hint };
                Err(self.error(key, format!("unknown key{hint}")))
            }
        }
    }

    /// Checks that none of these keys is given, which belong to other choices than those that were made; `why` says so of them.
    ///
    /// # Errors
    /// One that is given, and that nothing asked for: those of them that the choice has are named.
    pub fn reject(&self, keys: &[&str], why: &str) -> Result<()> {
        let Some(key) = keys.iter().find(|key| self.has(key) && !self.knows(key)) else { return Ok(()) };
        let known: Vec<&str> = keys.iter().copied().filter(|key| self.knows(key)).collect();
        let known = if known.is_empty() { String::new() } else { format!(", which takes {}", known.join(", ")) };
        Err(self.error(key, format!("{why}{known}")))
    }

    /// Says that the value of `key`, `name`, decides which other keys there are: errors about unknown ones tell it.
    pub fn decides(&mut self, key: &str, name: &str) {
        self.chosen = Some(format!("{key} = \"{name}\""));
    }

    /// The names of all keys that the document gives.
    pub fn keys(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    /// The node of `key`, read and recorded as it stands.
    pub fn take(&mut self, key: &str) -> Option<Node> {
        self.ask(key);
        let node = self.entries.get(key)?.node.clone();
        self.record(key, node.write());
        Some(node)
    }

    fn ask(&mut self, key: &str) {
        if !self.knows(key) {
            self.asked.push(key.to_owned());
        }
    }

    /// Records the value that `key` has in the end.
    pub fn record(&mut self, key: &str, value: impl Into<Value>) {
        self.resolved.retain(|(known, _)| known != key);
        self.resolved.push((key.to_owned(), Item::Value(value.into())));
    }

    /// The node of `key` as it stands, for keys that can have several forms. It does not count as asked for.
    pub fn node(&self, key: &str) -> Option<&Node> {
        self.entries.get(key).map(|entry| &entry.node)
    }

    /// The value of `key`; none where it is not given.
    ///
    /// # Errors
    /// A value of another type.
    pub fn optional<T: Read>(&mut self, key: &str) -> Result<Option<T>> {
        self.ask(key);
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        let value = T::read(&entry.node).ok_or_else(|| self.error(key, T::refusal(&entry.node)))?;
        let written = value.write();
        self.record(key, written);
        Ok(Some(value))
    }

    /// The value of `key`, or `default`.
    ///
    /// # Errors
    /// A value of another type.
    pub fn or<T: Read>(&mut self, key: &str, default: T) -> Result<T> {
        match self.optional(key)? {
            Some(value) => Ok(value),
            None => {
                self.record(key, default.write());
                Ok(default)
            }
        }
    }

    /// An error about `key`, which is not given, or about the misspelt key that stands in its place.
    pub fn missing(&self, key: &str, expected: &str) -> Error {
        let others = self.entries.keys().filter(|k| !self.asked.contains(k));
        match others.map(|k| (k, suggestion(k, std::iter::once(key)))).find(|(_, hint)| !hint.is_empty()) {
            Some((misspelt, hint)) => self.error(misspelt, format!("unknown key{hint}")),
            None => self.error(key, format!("missing; expected {expected}")),
        }
    }

    /// As [`Section::missing`], where all keys of the section have been asked for: what else stands there is told as well.
    pub fn missing_of_all(&self, key: &str, expected: &str) -> Error {
        let unknown: Vec<&str> = self.entries.keys().map(String::as_str).filter(|k| !self.knows(k)).collect();
        match unknown.as_slice() {
            [] => self.missing(key, expected),
            [one] => self.missing(key, &format!("{expected}; found the unknown key {one}")),
            several => self.missing(key, &format!("{expected}; found the unknown keys {}", several.join(", "))),
        }
    }

    fn knows(&self, key: &str) -> bool {
        self.asked.iter().any(|asked| asked == key)
    }

    /// The value of `key`, which must be given.
    ///
    /// # Errors
    /// The key is missing, or has a value of another type.
    pub fn required<T: Read>(&mut self, key: &str) -> Result<T> {
        self.optional(key)?.ok_or_else(|| self.missing(key, &T::expected()))
    }

    /// The value of `key` by its name in `names`.
    ///
    /// # Errors
    /// Another name: the nearest is suggested. What is no name.
    pub fn choice<T: Clone>(&mut self, key: &str, names: &[(&str, T)]) -> Result<Option<T>> {
        let all = || names.iter().map(|(name, _)| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        if let Some(node) = self.node(key).filter(|node| !matches!(node, Node::String(_))) {
            return Err(self.error(key, format!("found {}, expected one of {}", node.describe(), all())));
        }
        let Some(found) = self.optional::<String>(key)? else { return Ok(None) };
        match names.iter().find(|(name, _)| *name == found) {
            Some((_, value)) => Ok(Some(value.clone())),
            None => {
                let hint = suggestion(&found, names.iter().map(|(name, _)| *name));
                Err(self.error(key, format!("found {found:?}, expected one of {}{hint}", all())))
            }
        }
    }

    /// As [`Section::choice`], with a default by its name.
    ///
    /// # Errors
    /// As [`Section::choice`].
    pub fn choice_or<T: Clone>(&mut self, key: &str, names: &[(&str, T)], default: &str) -> Result<T> {
        if let Some(value) = self.choice(key, names)? {
            return Ok(value);
        }
        self.record(key, default);
        match names.iter().find(|(name, _)| *name == default) {
            Some((_, value)) => Ok(value.clone()),
            None => Err(self.error(key, "missing")),
        }
    }

    /// The table of `key`; an empty one where it is not given. Its values are recorded by [`Section::close`].
    ///
    /// # Errors
    /// The key is no table.
    pub fn section(&mut self, key: &str) -> Result<Section> {
        self.section_such_as(key, "..")
    }

    /// As [`Section::section`], where the error shows what could stand in the table.
    ///
    /// # Errors
    /// As [`Section::section`].
    pub fn section_such_as(&mut self, key: &str, example: &str) -> Result<Section> {
        self.ask(key);
        let place = self.place.clone();
        let entry =
            self.entries.get(key).cloned().unwrap_or_else(|| Entry { node: Node::Table(BTreeMap::new()), place });
        Section::new(self.dotted(key), entry, example)
    }

    /// The tables of an array of tables; none where the key is not given.
    ///
    /// # Errors
    /// The key is no array, or an item is no table.
    pub fn sections(&mut self, key: &str) -> Result<Option<Vec<Section>>> {
        self.ask(key);
        let Some(entry) = self.entries.get(key).cloned() else { return Ok(None) };
        match entry.node {
            Node::Array(items) => items
                .into_iter()
                .enumerate()
                .map(|(i, item)| Section::new(format!("{}[{i}]", self.dotted(key)), item, ".."))
                .collect::<Result<Vec<_>>>()
                .map(Some),
            other => {
                let path = self.dotted(key);
                let expected = format!("an array of tables ([[{path}]], or {path} = [{{ .. }}])");
                Err(self.error(key, format!("found {}, expected {expected}", other.describe())))
            }
        }
    }

    /// Checks that every key of a section that was read is known, and records its values here as a table.
    ///
    /// # Errors
    /// A key that nothing asked for: the nearest known one is suggested.
    pub fn close(&mut self, key: &str, section: Section, inline: bool) -> Result<()> {
        let resolved = section.finish()?;
        if resolved.is_empty() && !self.has(key) {
            return Ok(());
        }
        let item =
            if inline { Item::Value(Value::InlineTable(inline_table(resolved))) } else { Item::Table(table(resolved)) };
        self.resolved.retain(|(known, _)| known != key);
        self.resolved.push((key.to_owned(), item));
        Ok(())
    }

    /// As [`Section::close`], for an array of tables.
    ///
    /// # Errors
    /// As [`Section::close`].
    pub fn close_all(&mut self, key: &str, sections: Vec<Section>) -> Result<()> {
        let tables = sections
            .into_iter()
            .map(|section| Ok(Value::InlineTable(inline_table(section.finish()?))))
            .collect::<Result<Vec<Value>>>()?;
        let mut array: Array = tables.into_iter().collect();
        array.iter_mut().for_each(|value| value.decor_mut().set_prefix("\n    "));
        array.set_trailing("\n");
        array.set_trailing_comma(true);
        self.resolved.push((key.to_owned(), Item::Value(Value::Array(array))));
        Ok(())
    }

    /// Checks that every key is known; returns the values used, defaults included.
    ///
    /// # Errors
    /// A key that nothing asked for.
    pub fn finish(self) -> Result<Vec<(String, Item)>> {
        if let Some(key) = self.entries.keys().find(|key| !self.asked.contains(key)) {
            let hint = suggestion(key, self.asked.iter().map(String::as_str));
            let hint = if hint.is_empty() {
                let mut known: Vec<&str> = self.asked.iter().map(String::as_str).collect();
                known.sort_unstable();
                format!("; expected one of {}", known.join(", "))
            } else {
                hint
            };
            let with = self.chosen.as_ref().map_or_else(String::new, |chosen| format!(" with {chosen}"));
            return Err(self.error(key, format!("unknown key{with}{hint}")));
        }
        Ok(self.resolved)
    }
}

/// `; did you mean NAME?`, where a name is near.
pub fn suggestion<'a>(found: &str, names: impl Iterator<Item = &'a str>) -> String {
    names
        .map(|name| (strsim::damerau_levenshtein(found, name), name))
        .filter(|(distance, name)| *distance <= name.len().max(3) / 3 + 1)
        .min()
        .map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"))
}

/// Values as a table: plain values before tables.
pub fn table(resolved: Vec<(String, Item)>) -> Table {
    let mut table = Table::new();
    let (tables, values): (Vec<_>, Vec<_>) = resolved.into_iter().partition(|(_, item)| item.is_table());
    for (key, item) in values.into_iter().chain(tables) {
        table.insert(&key, item);
    }
    table
}

fn inline_table(resolved: Vec<(String, Item)>) -> InlineTable {
    let mut table = InlineTable::new();
    for (key, item) in resolved {
        match item {
            Item::Value(value) => {
                table.insert(&key, value);
            }
            Item::Table(inner) => {
                table.insert(&key, Value::InlineTable(inner.into_inline_table()));
            }
            Item::None | Item::ArrayOfTables(_) => {}
        }
    }
    table
}
