//! What can go wrong, in one type.

use std::path::PathBuf;

use crate::hub::HubError;

/// Everything that can go wrong in Taper. Messages say what, where and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model folder or one of its files is not what it should be.
    #[error("{}: {message}", path.display())]
    Model { path: PathBuf, message: String },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// A model could not be had from the Hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The model's chat template does not render these messages.
    #[error("chat template: {0}")]
    Template(String),
    /// A file is not a saved conversation, or not all of one.
    #[error("{}: {message}", path.display())]
    Session { path: PathBuf, message: String },
    /// A service has as many requests as it takes.
    #[error("{waiting} requests wait already, the service takes no more")]
    Busy { waiting: usize },
    /// A request that cannot be served: an empty prompt, one beyond the context, a sampling parameter out of range.
    #[error("{0}")]
    Request(String),
    /// The computation itself failed.
    #[error("{}", one_line(.0))]
    Compute(#[from] candle_core::Error),
}

/// A candle error without the backtrace that it prints after its message.
pub(crate) fn one_line(error: &candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => one_line(inner),
        other => other.to_string(),
    }
}

/// The result of everything public.
pub type Result<T, E = Error> = std::result::Result<T, E>;
