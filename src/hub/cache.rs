//! One model's folder in the cache that all Hugging Face tools share: `blobs`, `refs`, `snapshots`, and its locks.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::{Extent, HubError, HubOptions, files};
use crate::atomic;

pub(super) struct ModelCache {
    id: String,
    revision: String,
    cache: CacheRepo,
    /// `models--org--name`
    folder: PathBuf,
    locks: PathBuf,
}

impl ModelCache {
    pub(super) fn new(id: &str, options: &HubOptions) -> Result<Self, HubError> {
        let revision = options.revision();
        if !revision.split('/').all(is_plain_name) {
            return Err(HubError::NotARevision { revision: revision.to_string() });
        }
        let repo = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        Ok(Self {
            id: id.to_string(),
            revision: revision.to_string(),
            folder: options.cache_dir.join(repo.folder_name()),
            locks: options.cache_dir.join(".locks").join(repo.folder_name()),
            cache: Cache::new(options.cache_dir.clone()).repo(repo),
        })
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.pointer_path(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.cache.blob_path(etag)
    }

    /// The commit that the revision was when last fetched; the revision itself if it is a commit with a snapshot.
    pub(super) fn commit(&self) -> Option<String> {
        let stored = fs::read_to_string(self.reference()).map(|commit| commit.trim().to_string());
        stored
            .ok()
            .filter(|commit| is_plain_name(commit))
            .or_else(|| self.snapshot(&self.revision).is_dir().then(|| self.revision.clone()))
    }

    pub(super) fn set_commit(&self, commit: &str) -> Result<(), HubError> {
        if commit == self.revision {
            return Ok(());
        }
        let reference = self.reference();
        replace(&reference, |path| fs::write(path, commit)).map_err(HubError::io(reference))
    }

    /// The snapshot of the revision if it holds everything that `extent` needs.
    pub(super) fn snapshot_of_revision(&self, extent: Extent) -> Result<PathBuf, HubError> {
        // Without a commit nothing is there; a name that no snapshot has makes everything missing.
        let folder = self.snapshot(self.commit().as_deref().unwrap_or("none"));
        let missing = files::missing(&folder, extent)?;
        if missing.is_empty() {
            return Ok(folder);
        }
        Err(HubError::NotCached {
            repo: self.id.clone(),
            revision: self.revision.clone(),
            missing,
            cache: self.folder.clone(),
        })
    }

    /// Exclusive right, among processes and threads, to write the blob named `etag`. Same lock as huggingface_hub's.
    pub(super) fn lock(&self, etag: &str, on_wait: impl FnOnce()) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        let lock = || {
            fs::create_dir_all(&self.locks)?;
            let file = File::options().write(true).create(true).truncate(false).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    on_wait();
                    file.lock()?;
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            Ok(file)
        };
        lock().map_err(HubError::io(&path))
    }

    /// Makes the blob named `etag` appear as `file` in the snapshot of `commit`.
    pub(super) fn link(&self, etag: &str, commit: &str, file: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        let blob = self.blob(etag);
        // From `snapshots/<commit>/<file>`: one level up for each folder in `file`, and two for the first two.
        let target = format!("{}blobs/{etag}", "../".repeat(2 + file.matches('/').count()));
        // A file system without links: the snapshot gets the file itself, as with other tools.
        replace(&pointer, |path| symlink(Path::new(&target), path).or_else(|_| fs::rename(&blob, path)))
            .map_err(HubError::io(pointer))
    }

    fn reference(&self) -> PathBuf {
        self.folder.join("refs").join(&self.revision)
    }
}

/// A name that can be a file in the cache without reaching out of its folder: a commit, an ETag, a part of a revision.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name.chars().all(|it| it.is_ascii_alphanumeric() || "._-+@".contains(it))
}

/// Whether `path` is a file, and of that size if it is known.
pub(super) fn is_whole(path: &Path, bytes: Option<u64>) -> bool {
    fs::metadata(path).is_ok_and(|it| it.is_file() && bytes.is_none_or(|bytes| it.len() == bytes))
}

/// As [`atomic::replace`], in a folder that is made if need be.
fn replace(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    fs::create_dir_all(path.parent().expect("paths in the cache have a parent"))?;
    atomic::replace(path, write)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &Path, _link: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
