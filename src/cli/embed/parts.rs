//! Output in parts, so that a run that was cut short goes on where it stopped.
//!
//! Beside `output` lies the folder `output.parts` with closed parts and `manifest.json`, which names them and how much
//! input they took. A part counts once the manifest names it; the manifest is replaced in one step, after the part is
//! on the disk, and is the first to go once the output is whole: whatever lies there without one is left over. What
//! stands in the joined file does not depend on where parts begin, so a run in pieces writes the bytes of a whole one.
//! The folder is locked while a run uses it; the lock goes with the process, however that ends.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::{Error, Result};
use super::read::at;
use super::write::{OutputFormat, Part, Record, Shape, partial, with_suffix};

/// Where an output stands.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct Progress {
    /// Rows of input taken, bad ones included.
    pub read: u64,
    /// Rows written.
    pub written: u64,
    pub skipped: u64,
    pub truncated: u64,
    pub tokens: u64,
    /// The place of the first truncated text.
    pub first_truncated: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Manifest {
    /// What made the parts; parts of another command do not fit.
    command: Value,
    progress: Progress,
    parts: Vec<String>,
}

/// An output that is being made.
pub struct Parts {
    output: PathBuf,
    folder: PathBuf,
    format: OutputFormat,
    shape: Shape,
    manifest: Manifest,
    open: Option<Box<dyn Part>>,
    /// Held for as long as this lives.
    _lock: File,
}

impl Parts {
    /// Begins `output`, or goes on with it where the same command stopped.
    pub fn open(output: &Path, format: OutputFormat, shape: Shape, command: Value, overwrite: bool) -> Result<Self> {
        if output.is_dir() {
            return Err(Error::Usage(format!("{} is a folder, expected a file to write", output.display())));
        }
        let folder = with_suffix(output, ".parts");
        let exists = || Error::Usage(format!("{} exists: --overwrite replaces it", output.display()));
        let may_begin = overwrite || !output.exists();
        if !folder.exists() {
            if !may_begin {
                return Err(exists());
            }
            // Not with its parents: a folder that is not there is a slip of the pen.
            fs::create_dir(&folder).map_err(at(&folder))?;
        }
        let lock = lock(&folder)?;
        if overwrite {
            forget(&folder).map_err(at(&folder))?;
        }
        let path = folder.join(MANIFEST);
        let manifest = match fs::read(&path) {
            Ok(bytes) => {
                let manifest: Manifest = serde_json::from_slice(&bytes)
                    .map_err(|error| Error::Usage(format!("{}: {error}", path.display())))?;
                if manifest.command != command {
                    return Err(Error::Usage(format!(
                        "{} has parts of another command: finish that one, or begin anew with --overwrite",
                        folder.display()
                    )));
                }
                manifest
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(at(&path)(error)),
            Err(_) if may_begin => Manifest { command, progress: Progress::default(), parts: vec![] },
            Err(_) => {
                remove(&folder).map_err(at(&folder))?;
                return Err(exists());
            }
        };
        Ok(Self { output: output.into(), folder, format, shape, manifest, open: None, _lock: lock })
    }

    /// What the closed parts hold.
    pub fn progress(&self) -> &Progress {
        &self.manifest.progress
    }

    /// Writes to the open part.
    pub fn write(&mut self, records: &[Record]) -> Result<()> {
        if self.open.is_none() {
            self.open = Some(self.format.part(&self.folder.join(self.next_name()), self.shape)?);
        }
        self.open.as_mut().map_or(Ok(()), |part| part.write(records))
    }

    /// Closes the open part, with which the output stands at `progress`.
    pub fn close_part(&mut self, progress: &Progress) -> Result<()> {
        if let Some(part) = self.open.take() {
            part.close()?;
            self.manifest.parts.push(self.next_name());
        }
        self.manifest.progress = progress.clone();
        let path = self.folder.join(MANIFEST);
        let partial = partial(&path);
        let bytes = serde_json::to_vec_pretty(&self.manifest).map_err(|error| at(&path)(error.into()))?;
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.map_err(at(&partial))?;
        fs::rename(&partial, &path).map_err(at(&path))
    }

    /// Puts the parts together and removes them.
    pub fn finish(self) -> Result<()> {
        let parts: Vec<PathBuf> = self.manifest.parts.iter().map(|name| self.folder.join(name)).collect();
        self.format.join(&parts, self.manifest.progress.written, self.shape, &self.output)?;
        remove(&self.folder).map_err(at(&self.folder))
    }

    fn next_name(&self) -> String {
        format!("{:06}", self.manifest.parts.len())
    }
}

impl Drop for Parts {
    /// A run that fails before its first part leaves nothing behind.
    fn drop(&mut self) {
        if self.manifest.parts.is_empty() && self.folder.exists() {
            let _ = remove(&self.folder); // the failure itself is what to report
        }
    }
}

const MANIFEST: &str = "manifest.json";
const LOCK: &str = "lock";

/// Locks `folder` against other runs.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(at(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::Usage(format!("{} is in use: another run writes this output", folder.display())))
        }
        Err(TryLockError::Error(error)) => Err(at(&path)(error)),
    }
}

/// Removes the manifest, without which no part counts.
fn forget(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(MANIFEST)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the parts, the manifest first. What else lies in the folder stays, and the folder with it.
fn remove(folder: &Path) -> io::Result<()> {
    forget(folder)?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_str().is_some_and(is_ours) {
            fs::remove_file(entry.path())?;
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != ErrorKind::DirectoryNotEmpty => Err(error),
        _ => Ok(()),
    }
}

/// Whether a run gives this name to a file among its parts.
fn is_ours(name: &str) -> bool {
    let (stem, _) = name.split_once('.').unwrap_or((name, ""));
    name == LOCK || stem == "manifest" || (stem.len() >= 6 && stem.bytes().all(|byte| byte.is_ascii_digit()))
}
