//! Folders of files, one folder a class.

use std::fs::Metadata;
use std::io::ErrorKind;
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
fn children(folder: &Path) -> Result<Vec<PathBuf>> {
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

/// What stands at `path`, links followed; none where nothing does.
///
/// # Errors
/// A link that leads nowhere, which would be missed in silence; what the operating system refuses.
fn followed(path: &Path) -> Result<Option<Metadata>> {
    let error = match path.metadata() {
        Ok(found) => return Ok(Some(found)),
        Err(error) => error,
    };
    match path.read_link() {
        Ok(target) => {
            let target = target.display();
            Err(Error::data(
                path,
                format!("is a link to {target}, which cannot be followed ({error}); mend or remove it"),
            ))
        }
        Err(_) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(_) => Err(Error::io("look at", path, error)),
    }
}

/// Whether a folder stands at `path`.
///
/// # Errors
/// A link that leads nowhere.
fn is_folder(path: &Path) -> Result<bool> {
    Ok(followed(path)?.is_some_and(|found| found.is_dir()))
}

/// Whether a file stands at `path`.
///
/// # Errors
/// A link that leads nowhere.
pub(crate) fn is_file(path: &Path) -> Result<bool> {
    Ok(followed(path)?.is_some_and(|found| found.is_file()))
}

fn ends_with(path: &Path, endings: &[&str]) -> bool {
    path.extension().is_some_and(|e| endings.iter().any(|ending| e.eq_ignore_ascii_case(ending)))
}

/// The files of a folder whose path `fits`, in the order of their names.
///
/// # Errors
/// A link that fits and leads nowhere.
pub(crate) fn files_that(folder: &Path, fits: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in children(folder)? {
        if fits(&path) && is_file(&path)? {
            found.push(path);
        }
    }
    Ok(found)
}

/// The files of a folder that have one of these endings, in the order of their names.
///
/// # Errors
/// As [`files_that`].
pub(crate) fn files_with(folder: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    files_that(folder, |path| ends_with(path, endings))
}

/// Appends the files with one of these endings of a folder, in the order of their names, then those of each folder within it, however
/// deep. `around` has the folders that it lies in.
///
/// # Errors
/// A link that leads nowhere, whatever its name: it may stand for a folder; one that leads back.
fn files_within(folder: &Path, endings: &[&str], around: &mut Vec<PathBuf>, found: &mut Vec<PathBuf>) -> Result<()> {
    let place = folder.canonicalize().map_err(|e| Error::io("find", folder, e))?;
    if around.contains(&place) {
        return Err(Error::data(folder, "is a link to a folder that it lies in; remove the link"));
    }
    around.push(place);
    let mut folders = Vec::new();
    for path in children(folder)? {
        if is_folder(&path)? {
            folders.push(path);
        } else if ends_with(&path, endings) && is_file(&path)? {
            found.push(path);
        }
    }
    folders.iter().try_for_each(|inner| files_within(inner, endings, around, found))?;
    around.pop();
    Ok(())
}

/// What people call folders of splits, which classes are hardly called.
const SPLITS: [&str; 7] = ["train", "training", "validation", "val", "valid", "test", "testing"];

/// Fails where a class folder beside no `train` is most likely a split's: its name is one, and its files lie in folders within it.
fn split_taken_for_class(class_folder: &Path, files: &[PathBuf]) -> Result<()> {
    let name = file_name(class_folder);
    let deeper = files.iter().all(|file| file.parent() != Some(class_folder));
    if deeper && SPLITS.iter().any(|split| name.eq_ignore_ascii_case(split)) {
        return Err(Error::data(
            class_folder,
            "found class folders in it, as in that of a split, but no folder beside it that is called train; rename those of splits \
             to train, validation and test, or let data.path name the folder that holds one folder a class",
        ));
    }
    Ok(())
}

/// The files with one of `endings` in the class folders of `root`, however deep, or of its `train`, `validation` and `test` folders:
/// those trained on first, then validation, then test. Also gives the class names.
pub(crate) fn by_class(root: &Path, endings: &[&str]) -> Result<(Vec<String>, Vec<ClassFile>)> {
    let sub = |names: &[&str]| -> Result<Option<PathBuf>> {
        for path in names.iter().map(|name| root.join(name)) {
            if is_folder(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    };
    let train = sub(&["train"])?;
    let has_splits = train.is_some();
    let mut parts = vec![(train.unwrap_or_else(|| root.to_path_buf()), Held::No)];
    if has_splits {
        parts.extend(sub(&["validation", "val", "valid"])?.map(|p| (p, Held::Validation)));
        parts.extend(sub(&["test"])?.map(|p| (p, Held::Test)));
    }
    let names = class_names(&parts[0].0, endings)?;
    let mut files = Vec::new();
    for (folder, held) in parts {
        for class_folder in folders_of(&folder)? {
            let name = file_name(&class_folder);
            let Some(class) = names.iter().position(|n| *n == name) else {
                return Err(Error::data(
                    class_folder,
                    format!(
                        "found the class {name:?}, which the training split does not have; give it samples there, or remove the folder"
                    ),
                ));
            };
            let mut found = Vec::new();
            files_within(&class_folder, endings, &mut Vec::new(), &mut found)?;
            if found.is_empty() {
                return Err(Error::data(
                    class_folder,
                    format!(
                        "the class folder is empty: expected files that end in {}; add some, or remove the folder",
                        told(endings)
                    ),
                ));
            }
            if !has_splits {
                split_taken_for_class(&class_folder, &found)?;
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

/// The folders of a folder, in the order of their names.
///
/// # Errors
/// A link that leads nowhere: it may stand for one.
fn folders_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in children(folder)? {
        if is_folder(&path)? {
            found.push(path);
        }
    }
    Ok(found)
}

fn class_names(folder: &Path, endings: &[&str]) -> Result<Vec<String>> {
    let mut names: Vec<String> = folders_of(folder)?.iter().map(|p| file_name(p)).collect();
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
