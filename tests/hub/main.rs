//! The Hub client against a server on this machine: what it fetches, where it puts it, and what can go wrong on the way.

mod cached;
mod info;
mod refused;
mod server;
#[path = "../support/mod.rs"]
mod support;
mod transfer;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use taper::hub::{self, HubError, HubOptions, Progress};
use tempfile::TempDir;

use server::{ID, Server};

/// A cache of its own for one test.
struct Cache(TempDir);

impl Cache {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn options(&self, endpoint: impl Into<String>) -> HubOptions {
        HubOptions {
            revision: None,
            offline: false,
            endpoint: endpoint.into(),
            token: None,
            cache_dir: self.0.path().to_path_buf(),
            timeout: Duration::from_secs(5),
            retry_delay: Duration::from_millis(1),
        }
    }

    fn offline(&self, server: &Server) -> HubOptions {
        HubOptions { offline: true, ..self.options(server.url()) }
    }

    fn resolve(&self, server: &Server) -> Result<PathBuf, HubError> {
        hub::resolve(ID, &self.options(server.url()), &mut ())
    }

    fn model(&self) -> PathBuf {
        self.0.path().join("models--org--model")
    }

    fn blob(&self, etag: &str) -> PathBuf {
        self.model().join("blobs").join(etag)
    }

    fn incomplete(&self, etag: &str) -> PathBuf {
        self.blob(&format!("{etag}.incomplete"))
    }

    fn commit(&self) -> Option<String> {
        fs::read_to_string(self.model().join("refs/main")).ok()
    }

    /// Every file of the model's folder, relative to it; links are files.
    fn files(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() { walk(&entry.path(), found) } else { found.push(entry.path()) }
            }
        }
        let mut found = Vec::new();
        walk(&self.model(), &mut found);
        let relative = |path: PathBuf| path.strip_prefix(self.model()).unwrap().to_str().unwrap().to_string();
        let mut found: Vec<String> = found.into_iter().map(relative).collect();
        found.sort();
        found
    }
}

/// The content of a snapshot.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            found.extend(content(&entry.path()).into_iter().map(|(it, bytes)| (format!("{name}/{it}"), bytes)));
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// Writes down what it is told.
#[derive(Default)]
struct Recorder {
    begun: Vec<(String, u64, u64)>,
    advanced: u64,
    finished: usize,
    notices: Vec<String>,
}

impl Recorder {
    fn begun(&self, file: &str) -> Vec<(u64, u64)> {
        self.begun.iter().filter(|it| it.0 == file).map(|it| (it.1, it.2)).collect()
    }
}

impl Progress for Recorder {
    fn begin(&mut self, file: &str, total_bytes: u64, resumed_at: u64) {
        self.begun.push((file.to_string(), total_bytes, resumed_at));
    }

    fn advance(&mut self, bytes: u64) {
        self.advanced += bytes;
    }

    fn finish(&mut self) {
        self.finished += 1;
    }

    fn notice(&mut self, message: &str) {
        self.notices.push(message.to_string());
    }
}
