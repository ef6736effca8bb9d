//! How a text's hidden states become one vector, as sentence-transformers' `1_Pooling/config.json` says.

use candle_core::{Result, bail};
use serde_json::Value;

use crate::checkpoint::Checkpoint;

const FILE: &str = "1_Pooling/config.json";

/// Which hidden state stands for the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pooling {
    FirstToken,
    LastToken,
}

impl Pooling {
    fn mode(self) -> &'static str {
        match self {
            Self::FirstToken => "pooling_mode_cls_token",
            Self::LastToken => "pooling_mode_lasttoken",
        }
    }

    /// Refuses a checkpoint that says it pools in another way. One that says nothing passes.
    pub fn check(self, checkpoint: &Checkpoint) -> Result<()> {
        let Some(bytes) = checkpoint.read(FILE)? else { return Ok(()) };
        let path = checkpoint.path(FILE);
        let config: Value = match serde_json::from_slice(&bytes) {
            Ok(config) => config,
            Err(error) => bail!("{}: {error}", path.display()),
        };
        let Some(fields) = config.as_object() else { bail!("{}: expected an object", path.display()) };
        let is_on = |mode: &str| fields.get(mode).and_then(Value::as_bool) == Some(true);
        let other = fields.keys().find(|name| name.starts_with("pooling_mode_") && is_on(name) && *name != self.mode());
        match other {
            Some(other) => bail!("{}: {other} is not supported, expected {}", path.display(), self.mode()),
            None if !is_on(self.mode()) => bail!("{}: expected {}: true", path.display(), self.mode()),
            None => Ok(()),
        }
    }
}
