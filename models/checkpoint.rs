//! Where a checkpoint's files are.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use candle_core::{Result, bail};

/// A checkpoint in Hugging Face layout: a folder, or files built into the program.
#[derive(Clone, Debug)]
pub enum Checkpoint {
    Folder(PathBuf),
    /// A name for messages, and the files by name.
    Memory(&'static str, &'static [(&'static str, &'static [u8])]),
}

impl Checkpoint {
    /// What a file is called in messages.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(name),
            Self::Memory(label, _) => Path::new(label).join(name),
        }
    }

    /// The content of a small file, `None` if there is no such file.
    ///
    /// # Errors
    ///
    /// The file is there and cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Folder(folder) => match std::fs::read(folder.join(name)) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => bail!("{}: {error}", folder.join(name).display()),
            },
            Self::Memory(..) => Ok(self.in_memory(name).map(Cow::Borrowed)),
        }
    }

    /// Whether there is such a file.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).is_file(),
            Self::Memory(..) => self.in_memory(name).is_some(),
        }
    }

    pub(crate) fn in_memory(&self, name: &str) -> Option<&'static [u8]> {
        match self {
            Self::Folder(_) => None,
            Self::Memory(_, files) => files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| *bytes),
        }
    }
}
