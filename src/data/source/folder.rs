//! Folders of files, one folder a class.

use std::collections::HashMap;
use std::fs::{FileType, Metadata};
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

/// What a folder has.
struct Child {
    path: PathBuf,
    /// What the list of the folder tells that it is: nothing has to be looked at one by one, which is a way to the server for each.
    kind: FileType,
}

impl Child {
    /// Whether it is a folder, or a link to one.
    ///
    /// # Errors
    /// A link that leads nowhere.
    fn is_folder(&self) -> Result<bool> {
        if self.kind.is_symlink() { is_folder(&self.path) } else { Ok(self.kind.is_dir()) }
    }

    /// Whether it is a file, or a link to one.
    ///
    /// # Errors
    /// A link that leads nowhere.
    fn is_file(&self) -> Result<bool> {
        if self.kind.is_symlink() { is_file(&self.path) } else { Ok(self.kind.is_file()) }
    }
}

/// What a folder holds, in the order of the names, hidden entries left out.
fn children(folder: &Path) -> Result<Vec<Child>> {
    let refused = |e| Error::io("list", folder, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(refused)? {
        let entry = entry.map_err(refused)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        match entry.file_type() {
            Ok(kind) => found.push(Child { path: entry.path(), kind }),
            // Where the list does not tell, each is looked at, and may be gone by then.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("look at", entry.path(), e)),
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
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
fn is_file(path: &Path) -> Result<bool> {
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
    for child in children(folder)? {
        if fits(&child.path) && child.is_file()? {
            found.push(child.path);
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
    for child in children(folder)? {
        if child.is_folder()? {
            folders.push(child.path);
        } else if ends_with(&child.path, endings) && child.is_file()? {
            found.push(child.path);
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
    let numbers: HashMap<&str, i32> = names.iter().map(String::as_str).zip(0..).collect();
    if numbers.len() < names.len() {
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]).map_or("", |pair| &pair[0]);
        return Err(Error::data(
            &parts[0].0,
            format!("found two class folders that are called {twice:?} once read as UTF-8; rename one of them"),
        ));
    }
    let mut files = Vec::new();
    for (folder, held) in parts {
        for class_folder in folders_of(&folder)? {
            let name = file_name(&class_folder);
            let Some(&class) = numbers.get(&*name) else {
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
                class,
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
    for child in children(folder)? {
        if child.is_folder()? {
            found.push(child.path);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_a_folder_tells_its_files_and_none_is_looked_at() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        for name in ["b.png", "a.png", ".hidden.png"] {
            std::fs::write(folder.path().join(name), "")?;
        }
        std::fs::create_dir(folder.path().join("c"))?;
        std::os::unix::fs::symlink("a.png", folder.path().join("d.png"))?;
        let found = children(folder.path())?;
        // What would be looked at now is not there any more.
        for name in ["a.png", "b.png"] {
            std::fs::remove_file(folder.path().join(name))?;
        }
        std::fs::remove_dir(folder.path().join("c"))?;
        let names: Vec<String> = found.iter().map(|child| file_name(&child.path)).collect();
        assert_eq!(names, ["a.png", "b.png", "c", "d.png"]);
        let kinds = found[..3].iter().map(|child| Ok((child.is_file()?, child.is_folder()?)));
        assert_eq!(kinds.collect::<Result<Vec<_>>>()?, [(true, false), (true, false), (false, true)]);
        assert!(found[3].is_file().is_err(), "a link is followed");
        Ok(())
    }

    #[test]
    fn class_folders_that_differ_in_what_is_no_utf8_alone_are_not_taken_for_one()
    -> Result<(), Box<dyn std::error::Error>> {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir()?;
        for name in [&b"a"[..], b"b\xff", b"b\xfe"] {
            let class = folder.path().join(std::ffi::OsStr::from_bytes(name));
            // A file system may have no such names.
            let made = std::fs::create_dir(&class).and_then(|()| std::fs::write(class.join("1.png"), ""));
            if made.is_err() {
                println!("skipped: a name that is no UTF-8 cannot be given here");
                return Ok(());
            }
        }
        let error = by_class(folder.path(), &["png"]).unwrap_err().to_string();
        assert!(error.contains("two class folders") && error.contains("b\u{fffd}"), "{error}");
        Ok(())
    }
}
