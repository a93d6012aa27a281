//! Folders of files, one folder a class.

use std::path::{Path, PathBuf};

use super::super::natural_order;
use crate::error::{Error, Result};

/// Whether the files themselves hold a sample out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Held {
    No,
    Validation,
    Test,
}

/// A file of a class.
#[derive(Clone, Debug)]
pub(crate) struct ClassFile {
    pub path: PathBuf,
    /// Path below the root, for split patterns.
    pub name: String,
    pub class: i32,
    pub held: Held,
}

/// What a folder holds, in the order of the names, hidden entries left out.
pub(crate) fn children(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))? {
        let path = entry.map_err(|e| Error::io("list", folder, e))?.path();
        if !path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The files of a folder that have one of these endings, in the order of their names.
pub(crate) fn files_with(folder: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let fits = |p: &PathBuf| {
        p.extension().is_some_and(|e| endings.iter().any(|ending| e.eq_ignore_ascii_case(ending))) && p.is_file()
    };
    Ok(children(folder)?.into_iter().filter(fits).collect())
}

/// The files with one of `endings` in the class folders of `root`, or of its `train`, `validation` and `test` folders:
/// those trained on first, then validation, then test. Also gives the class names.
pub(crate) fn by_class(root: &Path, endings: &[&str]) -> Result<(Vec<String>, Vec<ClassFile>)> {
    let sub = |names: &[&str]| names.iter().map(|n| root.join(n)).find(|p| p.is_dir());
    let mut parts = Vec::new();
    match sub(&["train"]) {
        Some(train) => {
            parts.push((train, Held::No));
            parts.extend(sub(&["validation", "val", "valid"]).map(|p| (p, Held::Validation)));
            parts.extend(sub(&["test"]).map(|p| (p, Held::Test)));
        }
        None => parts.push((root.to_path_buf(), Held::No)),
    }
    let names = class_names(&parts[0].0, endings)?;
    let mut files = Vec::new();
    for (folder, held) in parts {
        for class_folder in children(&folder)?.into_iter().filter(|p| p.is_dir()) {
            let name = file_name(&class_folder);
            let Some(class) = names.iter().position(|n| *n == name) else {
                return Err(Error::data(
                    class_folder,
                    format!("found the class {name:?}, which the training split does not have"),
                ));
            };
            let found = files_with(&class_folder, endings)?;
            if found.is_empty() {
                return Err(Error::data(
                    class_folder,
                    format!(
                        "the class folder is empty: expected files that end in {}; add some, or remove the folder",
                        told(endings)
                    ),
                ));
            }
            files.extend(found.into_iter().map(|path| ClassFile {
                name: path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned(),
                path,
                class: class as i32,
                held,
            }));
        }
    }
    Ok((names, files))
}

fn class_names(folder: &Path, endings: &[&str]) -> Result<Vec<String>> {
    let mut names: Vec<String> = children(folder)?.iter().filter(|p| p.is_dir()).map(|p| file_name(p)).collect();
    if names.is_empty() {
        return Err(Error::data(
            folder,
            format!("found no class folder: expected one folder a class, with files that end in {}", told(endings)),
        ));
    }
    natural_order(&mut names);
    Ok(names)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn told(endings: &[&str]) -> String {
    endings.iter().map(|e| format!(".{e}")).collect::<Vec<_>>().join(", ")
}
