//! The peers' scripts, carried within the program and written to a folder of their own for as long as they run.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, Result};

const FILES: [(&str, &str); 4] = [
    ("common.py", include_str!("../../../benches/peers/common.py")),
    ("pytorch.py", include_str!("../../../benches/peers/pytorch.py")),
    ("jax_optax.py", include_str!("../../../benches/peers/jax_optax.py")),
    ("llm_c.py", include_str!("../../../benches/peers/llm_c.py")),
];

/// A folder with the scripts; it is removed when this is dropped.
#[derive(Debug)]
pub struct Scripts {
    folder: PathBuf,
}

impl Scripts {
    /// Writes them under the system's folder for temporary files.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn write() -> Result<Self> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("warpstep-peers-{}-{number}", std::process::id()));
        // Never into a folder that is there already: what Python is to run must be ours alone.
        std::fs::create_dir(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let scripts = Scripts { folder };
        for (name, text) in FILES {
            let path = scripts.path(name);
            std::fs::write(&path, text).map_err(|e| Error::io("write", &path, e))?;
        }
        Ok(scripts)
    }

    /// Where the script of this name lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Scripts {
    fn drop(&mut self) {
        // A folder that stays behind is a nuisance, no failure.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
