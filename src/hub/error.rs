//! Why a model could not be had, each reason a sentence that says what to do.

use std::{io, path::PathBuf};

/// Why a model could not be had from the Hub or from a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Neither a folder nor the shape of a model id.
    #[error("`{model}` is neither a folder nor a model id such as Qwen/Qwen3-0.6B")]
    NotAModel { model: String },
    /// Looks like a path, and nothing is there.
    #[error("{path}: no such folder; a model is a folder with a config.json, or an id such as Qwen/Qwen3-0.6B")]
    NoSuchFolder { path: String },
    /// A file where a folder is expected.
    #[error("{path} is a file; give the folder that holds it")]
    NotAFolder { path: String },
    /// A revision that no branch, tag or commit can be named.
    #[error("`{revision}` cannot be a revision; expected a branch, a tag or a commit hash")]
    NotARevision { revision: String },
    /// The endpoint is not the address of a server.
    #[error("HF_ENDPOINT is `{endpoint}`, expected an address such as https://huggingface.co")]
    NotAnEndpoint { endpoint: String },
    /// The token cannot be part of a request.
    #[error("HF_TOKEN or the stored token holds a character that no token has; copy it again")]
    NotAToken,
    /// The Hub does not know the model, or does not show it to this user: anonymous requests cannot tell which.
    #[error(
        "{repo} is neither a folder here nor a public model at {endpoint}; check the name, or set HF_TOKEN if the model \
         is private"
    )]
    RepoNotFound { repo: String, endpoint: String },
    /// The model has no such branch, tag or commit.
    #[error("{repo} has no revision `{revision}`; {endpoint}/{repo} lists its branches and tags")]
    RevisionNotFound { repo: String, revision: String, endpoint: String },
    /// The model lacks a file without which it cannot run.
    #[error("{repo} at {revision} has no {file}, which is needed to run it; choose another model or revision")]
    FileNotFound { repo: String, revision: String, file: String },
    /// The licence has to be accepted first, or the token may not read gated models.
    #[error("{repo} is gated; accept its licence at {page} and set HF_TOKEN to a token of that account")]
    Gated { repo: String, page: String },
    /// The token is not valid.
    #[error("{endpoint} refused the token for {repo}; set HF_TOKEN to a valid one from {endpoint}/settings/tokens")]
    Unauthorised { repo: String, endpoint: String },
    /// Too many requests; `wait` in seconds where the server told.
    #[error("{endpoint} takes no more requests for now; try again {}, or set HF_TOKEN for a higher limit", after(.wait))]
    RateLimited { endpoint: String, wait: Option<u64> },
    /// The server cannot be reached.
    #[error(
        "cannot reach {endpoint} ({reason}); check the connection and HF_ENDPOINT, or use --offline with a model \
         fetched before, or a local folder"
    )]
    NoNetwork { endpoint: String, reason: String },
    /// The server keeps answering with an error.
    #[error("{url} answered {status}; try again later")]
    Server { url: String, status: u16 },
    /// The connection broke too often. What has arrived stays.
    #[error("{file} stopped at {received} of {expected} bytes ({reason}); run the same command again to resume")]
    Interrupted { file: String, received: u64, expected: u64, reason: String },
    /// Offline, and the cache does not hold what is needed.
    #[error(
        "offline, and {} of {repo} at {revision} is not in {}; run once without --offline and HF_HUB_OFFLINE to fetch it",
        missing.join(", "), cache.display()
    )]
    NotCached { repo: String, revision: String, missing: Vec<String>, cache: PathBuf },
    /// A download of another length than announced. Nothing of it is kept.
    #[error(
        "{file} has {received} bytes, the Hub announced {expected}; try again, and if it stays report it to {endpoint}"
    )]
    WrongSize { file: String, expected: u64, received: u64, endpoint: String },
    /// A download with other content than announced. Nothing of it is kept.
    #[error(
        "{file} has SHA-256 {received}, the Hub announced {expected}; try again, and if it stays report it to {endpoint}"
    )]
    WrongHash { file: String, expected: String, received: String, endpoint: String },
    /// An answer or a fetched file that does not make sense.
    #[error("{what}: {message}")]
    Malformed { what: String, message: String },
    /// No space left. What has arrived stays.
    #[error("{}: the disk is full; free some space or set HF_HUB_CACHE to another disk, then run again to resume", path.display())]
    DiskFull { path: PathBuf },
    /// The cache cannot be read or written.
    #[error("{}: {source}; check the folder's permissions or set HF_HUB_CACHE to another one", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl HubError {
    /// For `map_err` on an operation on `path`.
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> HubError {
        let path = path.into();
        |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HubError::DiskFull { path },
            _ => HubError::Io { path, source },
        }
    }
}

fn after(wait: &Option<u64>) -> String {
    wait.map_or("later".to_string(), |seconds| format!("in {seconds} s"))
}
