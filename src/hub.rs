//! Model id or path to local folder.

/// Why a model could not be had from the Hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {}
