//! Where bytes live: the places in which a path is looked for, whole files (gzip or not), places within files, class folders.

mod bytes;
mod folder;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

pub(crate) use bytes::read_raw;
pub use bytes::{Ahead, PlacedFile, read, read_text};
pub(crate) use folder::{ClassFile, Held, by_class, files_that, files_with};

/// The places in which a relative path is looked for, first to last.
#[derive(Clone, Debug)]
pub struct Lookup {
    places: Vec<PathBuf>,
}

impl Lookup {
    /// Beside the run file (`base`, or the working directory where there is none), then `$WARPSTEP_DATA`, then
    /// `../shared/data`.
    pub fn new(base: Option<&Path>) -> Self {
        let base = base.filter(|b| !b.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut places = vec![base.to_path_buf()];
        if let Some(folder) = std::env::var_os("WARPSTEP_DATA").filter(|f| !f.is_empty()) {
            places.push(folder.into());
        }
        places.push(PathBuf::from("../shared/data"));
        Lookup { places }
    }

    /// The file or folder that `path`, the value of `data.path`, means; `path.gz` counts too where `path` itself is not there.
    ///
    /// # Errors
    /// All the places looked in, where it is in none.
    pub fn find(&self, path: &Path) -> Result<PathBuf> {
        self.find_for("data.path", path)
    }

    /// As [`Lookup::find`], for the value of another key of the run file.
    ///
    /// # Errors
    /// As [`Lookup::find`], with the key.
    pub fn find_for(&self, key: &str, path: &Path) -> Result<PathBuf> {
        if path.as_os_str().is_empty() {
            return Err(Error::config(key, "found no path, expected a file or folder"));
        }
        let mut packed = path.as_os_str().to_owned();
        packed.push(".gz");
        for candidate in self.candidates(path) {
            if candidate.exists() {
                return Ok(candidate);
            }
            let packed = candidate.with_file_name(Path::new(&packed).file_name().unwrap_or_default());
            if packed.is_file() {
                return Ok(packed);
            }
        }
        Err(Error::data(path, format!("not found; looked for {}; {}", self.told(path), advice(key, path))))
    }

    /// As [`Lookup::find_for`], where it must be a file.
    ///
    /// # Errors
    /// As [`Lookup::find_for`]; a folder.
    pub fn file_for(&self, key: &str, path: &Path) -> Result<PathBuf> {
        let found = self.find_for(key, path)?;
        if found.is_dir() {
            return Err(Error::data(found, format!("is a folder, expected a file; let {key} name one")));
        }
        Ok(found)
    }

    /// As [`Lookup::find_for`], where it must be a folder.
    ///
    /// # Errors
    /// As [`Lookup::find_for`]; a file.
    pub fn folder_for(&self, key: &str, path: &Path) -> Result<PathBuf> {
        let found = self.find_for(key, path)?;
        if !found.is_dir() {
            return Err(Error::data(found, format!("is a file, expected a folder; let {key} name one")));
        }
        Ok(found)
    }

    /// The files that `path`, the value of `key`, means, in the order of their names: its last part may hold `*` and `?`.
    ///
    /// # Errors
    /// All the places looked in, where nothing fits.
    pub fn find_all(&self, key: &str, path: &Path) -> Result<Vec<PathBuf>> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if !name.contains(['*', '?']) {
            return Ok(vec![self.find_for(key, path)?]);
        }
        for candidate in self.candidates(path) {
            let folder = candidate.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if !folder.is_dir() {
                continue;
            }
            let named = |file: &Path| file.file_name().is_some_and(|n| fits(&name, &n.to_string_lossy()));
            let found = files_that(folder, named)?;
            if !found.is_empty() {
                return Ok(found);
            }
        }
        Err(Error::data(path, format!("no file fits; looked for {}; {}", self.told(path), advice(key, path))))
    }

    fn candidates<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
        let places = if path.is_absolute() { &self.places[..1] } else { &self.places[..] };
        places.iter().map(move |place| place.join(path))
    }

    fn told(&self, path: &Path) -> String {
        self.candidates(path).map(|c| c.display().to_string()).collect::<Vec<_>>().join(", ")
    }
}

fn advice(key: &str, path: &Path) -> String {
    let other = if path.is_absolute() { "" } else { ", or let WARPSTEP_DATA name the folder that holds it" };
    format!("correct {key}{other}")
}

/// Whether `name` fits `pattern`, in which `*` stands for any characters and `?` for one.
fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            p = at + 1;
            n = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("*.bin", "a.bin", true),
            ("fineweb_train_*.bin", "fineweb_train_000001.bin", true),
            ("fineweb_train_*.bin", "fineweb_val_000001.bin", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("*", "", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_missing_file_is_told_with_every_place_looked_in() {
        let lookup = Lookup { places: vec!["/nowhere/a".into(), "/nowhere/b".into()] };
        let error = lookup.find(Path::new("mnist")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("/nowhere/a/mnist, /nowhere/b/mnist"), "{text}");
        assert!(text.contains("correct data.path, or let WARPSTEP_DATA"), "{text}");
        let text = lookup.find_for("model.weights", Path::new("/none")).unwrap_err().to_string();
        assert!(text.ends_with("correct model.weights"), "{text}");
    }

    #[test]
    fn a_folder_where_a_file_must_be_is_told_with_the_key() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("a"), "")?;
        std::fs::create_dir(folder.path().join("b"))?;
        let lookup = Lookup { places: vec![folder.path().into()] };
        let text = lookup.file_for("data.test", Path::new("b")).unwrap_err().to_string();
        assert!(text.contains("is a folder, expected a file") && text.contains("data.test"), "{text}");
        let text = lookup.folder_for("data.path", Path::new("a")).unwrap_err().to_string();
        assert!(text.contains("is a file, expected a folder") && text.contains("data.path"), "{text}");
        Ok(())
    }

    #[test]
    fn the_first_place_that_has_the_file_wins_and_a_packed_file_counts() -> Result<(), Box<dyn std::error::Error>> {
        let (a, b) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let lookup = Lookup { places: vec![a.path().into(), b.path().into()] };
        std::fs::write(b.path().join("x.txt"), "b")?;
        assert_eq!(lookup.find(Path::new("x.txt"))?, b.path().join("x.txt"));
        std::fs::write(a.path().join("x.txt.gz"), "a")?;
        assert_eq!(lookup.find(Path::new("x.txt"))?, a.path().join("x.txt.gz"));
        Ok(())
    }
}
