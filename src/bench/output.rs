//! Where results go. A file is whole at every moment, and keeps what it held until there is something to write: an interrupted
//! benchmark leaves what it had found.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::results::Results;
use crate::error::{Error, Result};
use crate::train::files::{aside, write_whole};

/// What stands among the notes of results that are not all that was asked for.
pub const UNFINISHED: &str = "not all that was asked for: this is what was found before the benchmark was interrupted";

/// Where results go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Nowhere.
    None,
    /// The standard output, at the end.
    Stdout,
    /// What is there and no plain file, such as a pipe: at the end.
    Stream(PathBuf),
    /// A file, from the first figure on.
    File(PathBuf),
}

impl Output {
    /// Of a path as `--json` takes it, where `-` is the standard output.
    ///
    /// # Errors
    /// A file that cannot be written: that is found out before minutes are spent.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        Ok(match path {
            None => Output::None,
            Some(path) if path == Path::new("-") => Output::Stdout,
            Some(path) if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) => {
                Output::Stream(path.to_owned())
            }
            Some(path) => {
                try_beside(path)?;
                // Where a link leads, or the link itself would be replaced.
                Output::File(fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()))
            }
        })
    }

    /// Writes what was found so far to a file, with a note that it is not all.
    ///
    /// # Errors
    /// What the operating system refuses; the file is then as it was.
    pub fn write_so_far(&self, results: &Results) -> Result<()> {
        if !matches!(self, Output::File(_)) {
            return Ok(());
        }
        let mut results = results.clone();
        results.machine.notes.push(UNFINISHED.to_owned());
        self.write(&results)
    }

    /// Writes all that was found.
    ///
    /// # Errors
    /// What the operating system refuses; a file is then as it was.
    pub fn write(&self, results: &Results) -> Result<()> {
        let text = || serde_json::to_string_pretty(results).map(|text| text + "\n").map_err(std::io::Error::from);
        let to = |path: &Path| match text() {
            Ok(text) if matches!(self, Output::File(_)) => write_whole(path, text.as_bytes()),
            text => text.and_then(|text| fs::write(path, text)).map_err(|e| Error::io("write", path, e)),
        };
        match self {
            Output::None => Ok(()),
            Output::Stdout => text()
                .and_then(|text| std::io::stdout().lock().write_all(text.as_bytes()))
                .map_err(|e| Error::io("write to", "the standard output", e)),
            Output::Stream(path) | Output::File(path) => to(path),
        }
    }
}

/// Whether a file can be written whole at `path`, without a change to what lies there.
///
/// # Errors
/// What the operating system refuses.
pub fn try_beside(path: &Path) -> Result<()> {
    let refused = |e| Error::io("write", path, e);
    if path.is_dir() {
        return Err(refused(ErrorKind::IsADirectory.into()));
    }
    let beside = aside(&fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()));
    File::create(&beside).and_then(|_| fs::remove_file(&beside)).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        Results::begin("warpstep bench".to_owned())
    }

    fn notes(path: &Path) -> Vec<String> {
        serde_json::from_str::<Results>(&fs::read_to_string(path).unwrap()).unwrap().machine.notes
    }

    #[test]
    fn a_file_keeps_what_it_held_until_there_is_something_to_write() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("found.json");
        fs::write(&path, "before").unwrap();
        let output = Output::open(Some(&path)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        output.write_so_far(&results()).unwrap();
        assert_eq!(notes(&path), [UNFINISHED]);
        output.write(&results()).unwrap();
        assert_eq!(notes(&path), Vec::<String>::new());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something was left beside it");
    }

    #[test]
    fn what_cannot_be_written_is_found_out_before() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().to_owned(), folder.path().join("no/such/folder.json")] {
            let refused = Output::open(Some(&path)).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("cannot write {}: ", path.display())), "{refused}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_are_left_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let [link, to] = ["link.json", "to.json"].map(|name| folder.path().join(name));
        fs::write(&to, "before").unwrap();
        std::os::unix::fs::symlink(&to, &link).unwrap();
        Output::open(Some(&link)).unwrap().write(&results()).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && notes(&to).is_empty());
        let output = Output::open(Some(Path::new("/dev/null"))).unwrap();
        assert_eq!(output, Output::Stream("/dev/null".into()));
        output.write_so_far(&results()).unwrap();
        output.write(&results()).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
