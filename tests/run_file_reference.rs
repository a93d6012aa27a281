//! docs/run-file.md tells every key of a run file, with its type, its choices and its default, and no other: the program is asked for
//! them, table by table. The page's examples, and README's, are taken by the program.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::{run, stderr};
use regex::Regex;
use tempfile::TempDir;
use toml_edit::{DocumentMut, Item, Value};
use warpstep::config::RunFile;

const PAGE: &str = "docs/run-file.md";
/// The sections that every run file has.
const BASE: [(&str, &str); 4] = [
    ("run", "steps = 100"),
    ("data", "format = \"digits\""),
    ("model", "preset = \"mlp\""),
    ("optimizer", "learning_rate = 0.1"),
];
/// A key and a name that nothing is near to: the program answers with all that it knows.
const UNKNOWN: &str = "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz";
/// A value that no key takes.
const DATE: &str = "1979-05-27";

/// A key and its value, as TOML.
type Given = (String, String);

/// A table of a run file.
#[derive(Clone, Copy)]
struct Place {
    path: &'static str,
    /// What a run file says besides, so that there is such a table.
    around: Option<&'static str>,
    /// Whether it is one of an array of tables.
    item: bool,
}

/// What the program knows of a key.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Whether it must be given, in some of the tries.
    required: bool,
    /// Whether it was left out in some.
    left_out: bool,
    /// What it then was.
    defaults: BTreeSet<String>,
    /// Its type, as errors tell it, and what a string can be.
    expected: String,
    choices: Vec<String>,
}

type Keys = BTreeMap<String, Known>;

fn table(path: &'static str) -> Place {
    Place { path, around: None, item: false }
}

fn with(given: &[Given], key: &str, value: &str) -> Vec<Given> {
    let others = given.iter().filter(|(known, _)| known != key).cloned();
    others.chain([(key.to_owned(), value.to_owned())]).collect()
}

/// A value of a type that the program asks for.
fn sample(expected: &str) -> &'static str {
    match expected {
        _ if expected.contains("array, each item an array") => "[[1.0]]",
        _ if expected.starts_with("an array") => "[1.0]",
        _ if expected.contains("number") || expected.starts_with("run.steps") => "1",
        _ if expected.starts_with("one of digits") => "\"digits\"",
        _ if expected.contains("linear") => "\"linear\"",
        _ => "\"x\"",
    }
}

/// A value in one form, whoever wrote it.
fn plain(value: &Value) -> String {
    match value {
        Value::Integer(value) => (*value.value() as f64).to_string(),
        Value::Float(value) => value.value().to_string(),
        Value::String(text) => text.value().clone(),
        Value::Array(array) => format!("[{}]", array.iter().map(plain).collect::<Vec<_>>().join(", ")),
        other => other.to_string().trim().to_owned(),
    }
}

impl Place {
    /// The run file in which this table has these keys.
    fn read(self, given: &[Given]) -> Result<RunFile, String> {
        let base: String = BASE.iter().map(|(section, keys)| format!("[{section}]\n{keys}\n")).collect();
        let inner = given.iter().map(|(key, value)| format!("{key} = {value}")).collect::<Vec<_>>().join(", ");
        let set = match self {
            Place { path: "", .. } => inner,
            Place { path, item: false, .. } => format!("{path}={{ {inner} }}"),
            Place { path, .. } => format!("{path}=[{{ {inner} }}]"),
        };
        let set: Vec<String> = self.around.map(str::to_owned).into_iter().chain([set]).collect();
        RunFile::from_text(&base, Path::new("NAME.toml"), &set).map_err(|error| error.to_string())
    }

    /// The keys that the program knows where these are given. What it misses is given too, and is required.
    fn ask(self, given: &[Given]) -> Keys {
        let missing = Regex::new(r": [\w.\[\]]*?(\w+): missing; expected (.+)$").unwrap();
        let (mut filled, mut required) = (given.to_vec(), BTreeSet::new());
        let names: Vec<String> = loop {
            let error = self.read(&with(&filled, UNKNOWN, "1")).expect_err("a key that nobody knows was taken");
            let unknown = error.split_once(&format!("{UNKNOWN}: unknown key"));
            if let Some((_, names)) = unknown.and_then(|(_, told)| told.split_once("; expected one of ")) {
                break names.split(", ").map(str::to_owned).collect();
            }
            let found = missing.captures(&error).unwrap_or_else(|| panic!("{}: {error}", self.path));
            filled = with(&filled, &found[1], sample(&found[2]));
            required.insert(found[1].to_owned());
        };
        let values = if self.path.is_empty() { BTreeMap::new() } else { self.values(&filled) };
        let of = |name: String| {
            let required = required.contains(&name);
            let left_out = !given.iter().any(|(key, _)| *key == name);
            let defaults = values.get(&name).filter(|_| left_out && !required).cloned().into_iter().collect();
            let expected = self.expected(&filled, &name);
            let choices = if expected == "a string" { self.choices(&filled, &name) } else { Vec::new() };
            (name, Known { required, left_out, defaults, expected, choices })
        };
        names.into_iter().map(of).collect()
    }

    /// [`Place::ask`] in several tries, put together.
    fn ask_all(self, chosen: &[Given], tries: Tries) -> Keys {
        let mut all = Keys::new();
        for given in tries {
            let given = given.iter().fold(chosen.to_vec(), |all, (key, value)| with(&all, key, value));
            for (name, found) in self.ask(&given) {
                let known = all.entry(name).or_default();
                known.required |= found.required;
                known.left_out |= found.left_out;
                known.defaults.extend(found.defaults);
                (known.expected, known.choices) = (found.expected, found.choices);
            }
        }
        all
    }

    /// The values of the table once every default is filled in.
    fn values(self, given: &[Given]) -> BTreeMap<String, String> {
        let run = self.read(given).unwrap_or_else(|error| panic!("{}: {error}", self.path));
        let document: DocumentMut = run.resolved.parse().unwrap();
        let mut item = document.as_item().clone();
        for key in self.path.split('.') {
            item = item.get(key).cloned().unwrap_or_default();
        }
        if let Some(first) = item.as_array().and_then(|array| array.get(0)) {
            item = Item::Value(first.clone());
        }
        let entries = item.as_table_like().into_iter().flat_map(|table| table.iter());
        // A table's defaults stand in a table of their own.
        let values = entries
            .filter_map(|(key, item)| Some((key, item.as_value()?)))
            .filter(|(_, value)| !value.is_inline_table());
        values.map(|(key, value)| (key.to_owned(), plain(value))).collect()
    }

    /// What the program says that it expects of a key; nothing where a date leads it elsewhere, as to `preset` for `layers`.
    fn expected(self, given: &[Given], name: &str) -> String {
        let error = self.read(&with(given, name, DATE)).expect_err("a key takes a date");
        let expected =
            error.split_once("(a date), expected ").map_or_else(String::new, |(_, expected)| expected.to_owned());
        if expected.starts_with("one of \"") { "a string".to_owned() } else { expected }
    }

    /// What a string can be; nothing where it can be any.
    fn choices(self, given: &[Given], name: &str) -> Vec<String> {
        let error = self.read(&with(given, name, &format!("{UNKNOWN:?}"))).err().unwrap_or_default();
        let Some((_, names)) = error.rsplit_once(&format!("found {UNKNOWN:?}, expected ")) else { return Vec::new() };
        let names = names.trim_start_matches("one of ").replace(" or ", ", ");
        names.split(", ").map(|name| name.trim_matches('"').to_owned()).collect()
    }
}

/// A row of a table of the page.
#[derive(Debug)]
struct Row {
    line: usize,
    /// Rules, kinds of schedules or layers that the key belongs to.
    of: BTreeSet<String>,
    /// None in a row that says that there is no key.
    key: Option<String>,
    expected: String,
    default: String,
}

/// The page.
struct Page {
    /// Tables of keys by the heading that they stand under.
    tables: BTreeMap<String, Vec<Row>>,
    /// What does not agree.
    problems: BTreeSet<String>,
    /// Every key that the program told of, and the lines of the rows that were compared with it.
    known: BTreeSet<String>,
    compared: BTreeSet<usize>,
}

/// What stands between backquotes.
fn code(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Names in quotes.
fn quoted(text: &str) -> BTreeSet<String> {
    text.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

impl Page {
    fn read() -> Self {
        let text = fs::read_to_string(PAGE).unwrap();
        let mut tables: BTreeMap<String, Vec<Row>> = BTreeMap::new();
        let (mut heading, mut columns, mut within) = (String::new(), Vec::new(), false);
        for (number, line) in text.lines().enumerate() {
            within ^= line.starts_with("```");
            if line.starts_with('#') && !within {
                heading = line.trim_start_matches('#').replace('`', "").trim().to_owned();
                tables.entry(heading.clone()).or_default();
            }
            let Some(row) = line.strip_prefix('|').and_then(|line| line.strip_suffix('|')).filter(|_| !within) else {
                columns.clear();
                continue;
            };
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            if columns.is_empty() {
                columns = cells;
            } else if !cells[0].starts_with("---") {
                let cell = |name: &str| {
                    columns
                        .iter()
                        .position(|column| *column == name)
                        .and_then(|at| cells.get(at))
                        .copied()
                        .unwrap_or("")
                };
                let of = if columns[0] == "key" { "" } else { cells[0] };
                tables.entry(heading.clone()).or_default().push(Row {
                    line: number + 1,
                    of: if of == "all" { BTreeSet::from(["all".to_owned()]) } else { code(of) },
                    key: code(cell("key")).pop_first(),
                    expected: cell("type and allowed values").to_owned(),
                    default: cell("default").to_owned(),
                });
            }
        }
        Page { tables, problems: BTreeSet::new(), known: BTreeSet::new(), compared: BTreeSet::new() }
    }

    fn rows(&self, heading: &str) -> Vec<&Row> {
        self.tables.get(heading).unwrap_or_else(|| panic!("{PAGE} has no heading {heading}")).iter().collect()
    }

    /// The rows of a rule or kind.
    fn rows_of(&self, heading: &str, name: &str) -> Vec<&Row> {
        let rows = self.rows(heading).into_iter();
        rows.filter(|row| row.of.contains(name) || row.of.contains("all")).collect()
    }

    /// The rows of the heading that begins so and has the name in quotes.
    fn rows_named(&self, begins: &str, name: &str) -> Vec<&Row> {
        let mut headings = self.tables.keys().filter(|h| h.starts_with(begins) && quoted(h).contains(name));
        let heading = headings.next().unwrap_or_else(|| panic!("{PAGE} has no heading {begins}\"{name}\"")).clone();
        self.rows(&heading)
    }

    /// Compares rows with what the program knows.
    fn compare(&mut self, what: &str, keys: &Keys, rows: impl Fn(&Self) -> Vec<&Row>) {
        let mut problems = Vec::new();
        let rows = rows(self);
        let on_page = |key: &str| rows.iter().find(|row| row.key.as_deref() == Some(key));
        for (key, known) in keys {
            match on_page(key) {
                Some(row) => {
                    problems.extend(row.wrong(known).map(|why| format!("{PAGE}:{}: `{key}`: {why}", row.line)))
                }
                None => problems.push(format!("{what}: the program knows `{key}`, and {PAGE} has no row of it")),
            }
        }
        for row in &rows {
            if let Some(key) = row.key.as_ref().filter(|key| !keys.contains_key(*key)) {
                problems.push(format!("{PAGE}:{}: {what}: the program does not know `{key}`", row.line));
            }
        }
        let compared: Vec<usize> = rows.iter().map(|row| row.line).collect();
        self.compared.extend(compared);
        self.problems.extend(problems);
        self.known.extend(keys.keys().cloned());
    }

    /// The row of a key that other keys hang on: whether it must be given, or its default.
    fn compare_choice(&mut self, place: Place, heading: &str, key: &str) {
        let known = place.ask(&[]).remove(key).unwrap();
        self.compare(heading, &Keys::from([(key.to_owned(), known)]), |page| {
            page.rows(heading).into_iter().filter(|row| row.key.as_deref() == Some(key)).collect()
        });
    }

    fn same_names(&mut self, what: &str, program: &[String], page: &BTreeSet<String>) {
        let program: BTreeSet<String> = program.iter().cloned().collect();
        let all = program.symmetric_difference(page);
        let told = all.map(|name| format!("{what} {name}: the program and {PAGE} do not both have it"));
        self.problems.extend(told);
    }
}

impl Row {
    /// What the program has otherwise.
    fn wrong<'a>(&'a self, known: &'a Known) -> impl Iterator<Item = String> + 'a {
        let kind = match known.expected.split(" (").next().unwrap_or_default() {
            "a string" if known.choices.is_empty() => "string",
            "a path" => "path",
            "true or false" => "`true`, `false`",
            "a whole number of 0 or more" | "a whole number" => "whole number",
            "a finite number" => "number",
            "a table" => "table",
            "an array of tables" => "array of tables",
            "an array, each item a string" => "array of strings",
            "an array, each item a whole number of 0 or more" => "array of whole numbers",
            "an array, each item a finite number" => "array of numbers",
            "an array, each item an array, each item a finite number" => "array of arrays of numbers",
            "an array of 2, each item a whole number of 0 or more" => "array of 2 whole numbers",
            "an array of 2, each item a finite number" => "array of 2 numbers",
            // Told in the words of that key alone.
            _ => "",
        };
        let spelt = quoted(&self.expected);
        let spelt_out = if spelt.is_empty() {
            known.choices.iter().all(|words| self.expected.contains(words))
        } else {
            spelt == known.choices.iter().cloned().collect()
        };
        let values: BTreeSet<String> = code(&self.default)
            .iter()
            .map(|text| text.parse::<Value>().map_or(text.clone(), |value| plain(&value)))
            .collect();
        // A folder of this machine stands in words.
        let absent: Vec<String> = known
            .defaults
            .iter()
            .filter(|value| !values.contains(*value) && !value.starts_with('/'))
            .cloned()
            .collect();
        let required = self.default.starts_with("required");
        let tests = [
            (!self.expected.starts_with(kind), format!("its type is {:?}", known.expected)),
            (!known.choices.is_empty() && !spelt_out, format!("it can be {}", known.choices.join(", "))),
            (known.required && !required, "it is required".to_owned()),
            (!known.required && known.left_out && required, "it is not required".to_owned()),
            (!absent.is_empty(), format!("its default is {}", absent.join(", "))),
            (
                known.left_out && !known.required && known.defaults.is_empty() && self.default.starts_with('`'),
                "it has no default".to_owned(),
            ),
        ];
        tests.into_iter().filter(|(wrong, _)| *wrong).map(|(_, why)| why)
    }
}

#[test]
fn every_key_is_on_the_page_with_type_choices_and_default_and_no_other_is() {
    let mut page = Page::read();
    compare_sections(&mut page);
    compare_tables(&mut page);
    compare_formats(&mut page);
    compare_models(&mut page);
    compare_rules(&mut page);
    compare_schedules(&mut page);
    let rows = page.tables.values().flatten().filter(|row| row.key.is_some() && !page.compared.contains(&row.line));
    let left: Vec<String> = rows.map(|row| format!("{PAGE}:{}: a key under a heading of no table", row.line)).collect();
    page.problems.extend(left);
    let problems: Vec<String> = page.problems.into_iter().collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    every_key_of_the_sources_was_told(&page.known);
}

/// Keys that are given in each of several tries.
type Tries<'a> = &'a [&'a [(&'a str, &'a str)]];

const NONE_GIVEN: Tries<'static> = &[&[]];

fn chosen(key: &str, name: &str) -> Vec<Given> {
    vec![(key.to_owned(), format!("{name:?}"))]
}

fn compare_sections(page: &mut Page) {
    let error = table("").read(&chosen(UNKNOWN, "x")).unwrap_err();
    let (_, sections) = error.rsplit_once("expected one of ").expect("all sections");
    let sections: Vec<String> = sections.split(", ").map(str::to_owned).collect();
    let headings = page.tables.keys().filter_map(|heading| heading.strip_prefix('[')?.strip_suffix(']'));
    let headings = headings.filter(|heading| !heading.starts_with('[')).map(str::to_owned).collect();
    page.same_names("section", &sections, &headings);
    page.known.extend(sections);
}

/// Tables whose keys hang on no choice.
fn compare_tables(page: &mut Page) {
    let audio = Some("data={ format = \"audio\", path = \"x\" }");
    let clips: Tries = &[&[], &[("adaptive", "0.1")]];
    let parts: Tries = &[&[], &[("every", "2")], &[("pattern", "\"x\"")], &[("values", "[\"x\"]")]];
    for (heading, place, tries) in [
        ("[run]", table("run"), NONE_GIVEN),
        ("data.mel", Place { around: audio, ..table("data.mel") }, NONE_GIVEN),
        ("data.split", table("data.split"), NONE_GIVEN),
        ("A part of data.split", table("data.split.validation"), parts),
        ("data.normalize", table("data.normalize"), NONE_GIVEN),
        ("data.augment", table("data.augment"), NONE_GIVEN),
        ("optimizer.clip", table("optimizer.clip"), clips),
        ("[evaluate]", table("evaluate"), NONE_GIVEN),
        ("[checkpoint]", table("checkpoint"), NONE_GIVEN),
        ("[early_stopping]", table("early_stopping"), NONE_GIVEN),
        ("[parallel]", table("parallel"), NONE_GIVEN),
    ] {
        let keys = place.ask_all(&[], tries);
        page.compare(heading, &keys, |page| page.rows(heading));
    }
}

fn compare_formats(page: &mut Page) {
    let data = table("data");
    page.compare_choice(data, "[data]", "format");
    let formats = data.choices(&[], "format");
    page.same_names("format", &formats, &headed(page, "format = "));
    for name in &formats {
        let tries: Tries = match name.as_str() {
            "audio" => &[&[], &[("features", "\"waveform\""), ("mel", "{}")]],
            "lines" => &[&[], &[("classes", "{}")]],
            _ => NONE_GIVEN,
        };
        let keys = data.ask_all(&chosen("format", name), tries);
        page.compare(name, &keys, |page| [page.rows("[data]"), page.rows_named("format = ", name)].concat());
    }
}

fn compare_models(page: &mut Page) {
    let model = table("model");
    page.compare_choice(model, "[model]", "preset");
    let presets = model.choices(&[], "preset");
    page.same_names("preset", &presets, &headed(page, "preset = "));
    for name in &presets {
        let rotary: Tries = &[&[], &[("positions", "\"rotary\"")]];
        let tries = if name.starts_with("gpt") { rotary } else { NONE_GIVEN };
        let keys = model.ask_all(&chosen("preset", name), tries);
        page.compare(name, &keys, |page| {
            [without("layers", page.rows("[model]")), page.rows_named("preset = ", name)].concat()
        });
    }
    let keys = model.ask(&[("layers".to_owned(), "[{ kind = \"relu\" }]".to_owned())]);
    page.compare("a list of layers", &keys, |page| without("preset", page.rows("[model]")));

    let layers = Place { around: Some("model={}"), item: true, ..table("model.layers") };
    page.compare_choice(layers, "[[model.layers]]", "kind");
    let kinds = layers.choices(&[], "kind");
    page.same_names("layer", &kinds, &named_in(page, "[[model.layers]]"));
    for name in &kinds {
        let window: Tries = &[&[], &[("kernel", "2"), ("stride", "2")]];
        let tries = if name.ends_with("_pool2d") { window } else { NONE_GIVEN };
        let keys = layers.ask_all(&chosen("kind", name), tries);
        page.compare(name, &keys, |page| page.rows_of("[[model.layers]]", name));
    }
}

fn compare_rules(page: &mut Page) {
    let (optimizer, groups) = (table("optimizer"), Place { item: true, ..table("optimizer.groups") });
    page.compare_choice(optimizer, "[optimizer]", "rule");
    let rules = optimizer.choices(&[("learning_rate".to_owned(), "1".to_owned())], "rule");
    page.same_names("rule", &rules, &named_in(page, "rule"));
    for name in &rules {
        let forms: Tries = &[&[], &[("form", "\"polyak\"")]];
        let tries = if name == "momentum" { forms } else { NONE_GIVEN };
        for (place, heading) in [(optimizer, "[optimizer]"), (groups, "[[optimizer.groups]]")] {
            let keys = place.ask_all(&chosen("rule", name), tries);
            page.compare(name, &keys, |page| [page.rows(heading), page.rows_of("rule", name)].concat());
        }
    }
    let keys = groups.ask(&[]);
    page.compare("a group", &keys, |page| without("rule", page.rows("[[optimizer.groups]]")));
}

fn compare_schedules(page: &mut Page) {
    let schedule = table("schedule");
    page.compare_choice(schedule, "[schedule]", "kind");
    let kinds = schedule.choices(&[], "kind");
    page.same_names("schedule", &kinds, &named_in(page, "kind"));
    for name in &kinds {
        let milestones: Tries = &[&[], &[("milestones", "[9]")]];
        let tries = if name == "step" { milestones } else { NONE_GIVEN };
        let keys = schedule.ask_all(&chosen("kind", name), tries);
        page.compare(name, &keys, |page| {
            let common = page.rows("[schedule]");
            // One cycle has its own warm-up and its own end.
            let common = if name == "one_cycle" { without("warmup_steps", without("floor", common)) } else { common };
            [common, page.rows_of("kind", name)].concat()
        });
    }
}

fn without<'a>(key: &str, rows: Vec<&'a Row>) -> Vec<&'a Row> {
    rows.into_iter().filter(|row| row.key.as_deref() != Some(key)).collect()
}

/// The names in quotes of headings that begin so.
fn headed(page: &Page, begins: &str) -> BTreeSet<String> {
    page.tables.keys().filter(|heading| heading.starts_with(begins)).flat_map(|heading| quoted(heading)).collect()
}

/// The rules or kinds that a table has rows of.
fn named_in(page: &Page, heading: &str) -> BTreeSet<String> {
    page.rows(heading).iter().flat_map(|row| row.of.iter().cloned()).filter(|name| name != "all").collect()
}

/// A key that the program reads in a case that nobody asked about stands in its sources all the same.
fn every_key_of_the_sources_was_told(known: &BTreeSet<String>) {
    let read = Regex::new(concat!(
        r"\b(?:optional|or|required|choice|choice_or|section|sections|take|has|node|columns|rows|part|pair|nested)",
        r#"(?:::<[^()]*>)?\(\s*(?:&mut \w+,\s*|section,\s*|table,\s*)?"([a-z_0-9]+)""#
    ))
    .unwrap();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("src/config").unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        found.extend(read.captures_iter(&text).map(|captures| captures[1].to_owned()));
    }
    assert!(found.len() > 100, "{found:?}");
    let untold: Vec<&String> = found.difference(known).collect();
    assert!(untold.is_empty(), "src/config reads keys in cases that this test does not ask about: {untold:?}");
}

#[test]
fn the_examples_of_the_pages_are_taken_by_the_program() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("input.txt"), "to be or not to be\n".repeat(400)).unwrap();
    for page in [PAGE, "README.md"] {
        let text = fs::read_to_string(page).unwrap();
        let mut examples = 0;
        for block in text.split("```toml\n").skip(1) {
            let line = text[..block.as_ptr() as usize - text.as_ptr() as usize].lines().count() + 1;
            let example = block.split_once("```").unwrap().0;
            let has = |section: &str| Regex::new(&format!(r"(?m)^\[+{section}[\].]")).unwrap().is_match(example);
            let rest = |data: &str| -> String {
                let base = BASE.iter().filter(|(section, _)| !has(section));
                base.map(|(section, keys)| format!("[{section}]\n{}\n", if *section == "data" { data } else { keys }))
                    .collect()
            };
            let digits = format!("{example}\n{}", rest(BASE[1].1));
            let run_file = RunFile::from_text(&digits, Path::new(page), &[]);
            let run_file = run_file.unwrap_or_else(|error| panic!("{page}:{line}: {error}\n{digits}"));
            examples += 1;
            if !matches!(run_file.data.format.name(), "digits" | "inline") {
                println!("skipped: {page}:{line}: its data is not here: read, and no model planned for it");
                continue;
            }
            // A network is for pictures, or for text.
            let text = format!("{example}\n{}", rest("format = \"text\"\npath = \"input.txt\""));
            let file = folder.path().join("run.toml");
            let planned: Vec<String> = [digits, text]
                .iter()
                .map(|run_file| {
                    fs::write(&file, run_file).unwrap();
                    let file = file.display().to_string();
                    let output = run(&["train", &file, "--dry-run", "--device", "cpu"]);
                    if output.status.success() { String::new() } else { stderr(&output) }
                })
                .collect();
            assert!(planned.iter().any(String::is_empty), "{page}:{line}: {}\n{example}", planned.join(""));
        }
        assert!(examples > 0, "{page}");
    }
}
