//! Output in parts, so that a run that was cut short goes on where it stopped.
//!
//! Beside `output` lies the folder `output.parts` with closed parts and `manifest.json`, which names them and how much
//! input they took. A part counts once the manifest names it; the manifest is replaced in one step, after the part is
//! on the disk. What stands in the joined file does not depend on where parts begin, so a run in pieces writes the bytes
//! of a whole one.

use std::fs::{self, File};
use std::io::Write;
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
}

impl Parts {
    /// Begins `output`, or goes on with it where the same command stopped.
    pub fn open(output: &Path, format: OutputFormat, shape: Shape, command: Value, overwrite: bool) -> Result<Self> {
        let folder = with_suffix(output, ".parts");
        let path = folder.join(MANIFEST);
        if overwrite && folder.exists() {
            fs::remove_dir_all(&folder).map_err(at(&folder))?;
        }
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
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if output.exists() && !overwrite {
                    return Err(Error::Usage(format!("{} exists: --overwrite replaces it", output.display())));
                }
                // Not with its parents: a folder that is not there is a slip of the pen.
                if !folder.exists() {
                    fs::create_dir(&folder).map_err(at(&folder))?;
                }
                Manifest { command, progress: Progress::default(), parts: vec![] }
            }
            Err(error) => return Err(at(&path)(error)),
        };
        Ok(Self { output: output.into(), folder, format, shape, manifest, open: None })
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
        fs::remove_dir_all(&self.folder).map_err(at(&self.folder))
    }

    fn next_name(&self) -> String {
        format!("{:06}", self.manifest.parts.len())
    }
}

const MANIFEST: &str = "manifest.json";
