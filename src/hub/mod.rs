//! Model id or path to local folder.
//!
//! An id such as `Qwen/Qwen3-0.6B` is fetched into the cache that all Hugging Face tools share, so a model fetched by one
//! of them is found here and the other way round. Only the files that a model needs are fetched; a broken download
//! resumes where it stopped; nothing gets its final name before its size and hash are checked.
//!
//! ```no_run
//! use taper::hub::{self, HubOptions};
//!
//! let options = HubOptions { offline: true, ..HubOptions::from_env() };
//! let folder = hub::resolve("Qwen/Qwen3-0.6B", &options, &mut ())?;
//! # Ok::<(), taper::Error>(())
//! ```
//!
//! Layout of the cache: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>

mod cache;
mod client;
mod download;
mod error;
mod files;
mod options;

use std::path::{Path, PathBuf};

pub use error::HubError;
pub use files::WeightsFile;
pub use options::HubOptions;

use cache::ModelCache;
use client::{Client, Listing};

/// Told what a download does. `()` ignores it.
pub trait Progress {
    /// `file` of `total_bytes` (0: not known) starts to arrive, the first `resumed_at` bytes being there already.
    /// Called again for the same file when it has to start over.
    fn begin(&mut self, file: &str, total_bytes: u64, resumed_at: u64);
    /// `bytes` more have arrived.
    fn advance(&mut self, bytes: u64);
    /// The file is complete and checked. Not called when it fails.
    fn finish(&mut self);
    /// Something a person would want to know: a wait, or the use of a cached copy because the network is down.
    fn notice(&mut self, _message: &str) {}
}

impl Progress for () {
    fn begin(&mut self, _file: &str, _total_bytes: u64, _resumed_at: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self) {}
}

/// What is known of a model before its weights are fetched.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Metadata {
    /// Folder with at least the configuration, the tokenizer and, for sharded weights, the index.
    pub folder: PathBuf,
    /// The files that hold the weights. Offline, those that are cached.
    pub weights: Vec<WeightsFile>,
}

/// The folder of a model: `model` itself if it is a folder, else the snapshot of the model of that id, fetched as needed.
///
/// Online this asks the Hub once which commit the revision is, then fetches what the cache lacks. When the Hub cannot be
/// reached, a complete cached copy is used and [`Progress::notice`] says so.
///
/// # Errors
/// See [`HubError`].
pub fn resolve(model: &str, options: &HubOptions, progress: &mut dyn Progress) -> Result<PathBuf, HubError> {
    match Source::of(model)? {
        Source::Folder(folder) => Ok(folder),
        Source::Id(id) => Ok(snapshot(id, options, Extent::Everything, progress)?.folder),
    }
}

/// What can be known of a model without fetching its weights: its small files, and the headers of its weights.
///
/// # Errors
/// See [`HubError`].
pub fn fetch_metadata(model: &str, options: &HubOptions, progress: &mut dyn Progress) -> Result<Metadata, HubError> {
    match Source::of(model)? {
        Source::Folder(folder) => Ok(Metadata { weights: files::local_weights(&folder)?, folder }),
        Source::Id(id) => snapshot(id, options, Extent::Metadata, progress),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Extent {
    Metadata,
    Everything,
}

fn snapshot(id: &str, options: &HubOptions, extent: Extent, progress: &mut dyn Progress) -> Result<Metadata, HubError> {
    let cache = ModelCache::new(id, options)?;
    let cached = || {
        let folder = cache.snapshot_of_revision(extent)?;
        let weights = if extent == Extent::Metadata { files::local_weights(&folder)? } else { Vec::new() };
        Ok(Metadata { folder, weights })
    };
    if options.offline {
        return cached();
    }
    let client = Client::new(id, options)?;
    let listing = match client.listing() {
        Ok(listing) => listing,
        Err(error @ (HubError::NoNetwork { .. } | HubError::Server { .. } | HubError::RateLimited { .. })) => {
            let Ok(found) = cached() else { return Err(error) };
            progress.notice(&format!("{error}; now using the copy in {}", found.folder.display()));
            return Ok(found);
        }
        Err(error) => return Err(error),
    };
    fetch(&client, &cache, &listing, extent, progress)
}

fn fetch(
    client: &Client,
    cache: &ModelCache,
    listing: &Listing,
    extent: Extent,
    progress: &mut dyn Progress,
) -> Result<Metadata, HubError> {
    let folder = cache.snapshot(&listing.commit);
    let has = |file: &str| listing.files.contains_key(file);
    let mut get = |file: &str| download::fetch(client, cache, listing, file, progress);
    for file in files::metadata(has, |file| client.absent(file))? {
        get(file)?;
    }
    let names = files::weights(&folder, has)?;
    if names.is_empty() {
        return Err(client.absent(files::WEIGHTS));
    }
    let mut weights = Vec::new();
    match extent {
        Extent::Everything => names.iter().try_for_each(|file| get(file))?,
        Extent::Metadata => {
            for file in names {
                weights.push(if folder.join(&file).exists() {
                    WeightsFile::local(&folder, file)?
                } else {
                    WeightsFile::remote(client, listing, file)?
                });
            }
        }
    }
    // Last, so that an interrupted update leaves the revision at the snapshot that is complete.
    if extent == Extent::Everything || cache.commit().is_none() {
        cache.set_commit(&listing.commit)?;
    }
    Ok(Metadata { folder, weights })
}

/// What the name of a model stands for.
#[derive(Debug)]
enum Source<'a> {
    Folder(PathBuf),
    Id(&'a str),
}

impl<'a> Source<'a> {
    fn of(model: &'a str) -> Result<Self, HubError> {
        let path = Path::new(model);
        if path.is_dir() {
            Ok(Self::Folder(path.to_path_buf()))
        } else if path.is_file() {
            Err(HubError::NotAFolder { path: model.to_string() })
        } else if is_model_id(model) {
            Ok(Self::Id(model))
        } else if looks_like_path(model) {
            Err(HubError::NoSuchFolder { path: model.to_string() })
        } else {
            Err(HubError::NotAModel { model: model.to_string() })
        }
    }
}

/// `organisation/name` as the Hub allows it.
///
/// Source: huggingface_hub, `utils/_validators.py`, `validate_repo_id`.
fn is_model_id(model: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && part.chars().all(|it| it.is_ascii_alphanumeric() || "._-".contains(it))
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && !part.contains("--")
            && !part.contains("..")
    };
    model.len() <= 96
        && !model.ends_with(".git")
        && model.split_once('/').is_some_and(|(organisation, name)| is_part(organisation) && is_part(name))
}

fn looks_like_path(model: &str) -> bool {
    model.starts_with(['.', '/', '~'])
        || model.ends_with('/')
        || model.contains('\\')
        || model.matches('/').count() > 1
        || model.as_bytes().get(1) == Some(&b':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_paths_and_neither() {
        for id in ["Qwen/Qwen3-0.6B", "google/gemma-4-E2B-it", "BAAI/bge-m3", "a/b", "models/qwen_3"] {
            assert!(matches!(Source::of(id), Ok(Source::Id(it)) if it == id), "{id}");
        }
        for path in ["./gone", "../gone", "/gone", "~/gone", "gone/", "a/b/c", "a\\b", "C:\\gone", "C:gone", ".gone/b"]
        {
            assert!(matches!(Source::of(path), Err(HubError::NoSuchFolder { .. })), "{path}");
        }
        let long = format!("a/{}", "b".repeat(95));
        for neither in ["", "gpt2", "a b/c", "-a/b", "a/b-", "a--b/c", "a/b..c", "a/b.git", "https:", "a/\u{e9}", &long]
        {
            assert!(matches!(Source::of(neither), Err(HubError::NotAModel { .. })), "{neither}");
        }
    }

    #[test]
    fn a_folder_wins_over_an_id_and_a_file_is_refused() {
        assert!(matches!(Source::of("src/hub"), Ok(Source::Folder(it)) if it == Path::new("src/hub")));
        assert!(matches!(Source::of("src/lib.rs"), Err(HubError::NotAFolder { .. })));
    }
}
