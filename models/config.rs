//! How families read `config.json`: a value that they do not support is an error that names its field.

use candle_core::{Result, bail};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::checkpoint::Checkpoint;

/// Parses `config`, naming the field that does not fit.
pub(crate) fn parse<T: DeserializeOwned>(checkpoint: &Checkpoint, config: &Value) -> Result<T> {
    match serde_path_to_error::deserialize(config) {
        Ok(config) => Ok(config),
        Err(error) => {
            let path = checkpoint.path("config.json");
            match error.path().to_string().as_str() {
                "." => bail!("{}: {}", path.display(), error.inner()),
                field => bail!("{}: {field}: {}", path.display(), error.inner()),
            }
        }
    }
}

/// A size or count: at least 1, and small enough that products of a few of them cannot overflow.
pub(crate) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    const LIMIT: usize = 1 << 24;
    match usize::deserialize(deserializer)? {
        value @ 1..=LIMIT => Ok(value),
        value => Err(D::Error::custom(format!("{value}, expected 1 to {LIMIT}"))),
    }
}

/// As [`size`], where the field may be absent or null.
pub(crate) fn optional_size<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<usize>, D::Error> {
    #[derive(Deserialize)]
    struct Size(#[serde(deserialize_with = "size")] usize);
    Ok(Option::<Size>::deserialize(deserializer)?.map(|size| size.0))
}

/// A flag that only `false` is implemented for.
pub(crate) fn only_false<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<(), D::Error> {
    match Option::<bool>::deserialize(deserializer)? {
        Some(true) => Err(D::Error::custom("true is not supported")),
        _ => Ok(()),
    }
}

/// A positive, finite number.
pub(crate) fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    match f64::deserialize(deserializer)? {
        value if value.is_finite() && value > 0.0 => Ok(value),
        value => Err(D::Error::custom(format!("{value}, expected a positive number"))),
    }
}

/// End tokens: absent, null, one id or a list.
pub(crate) fn token_ids<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Option::<Ids>::deserialize(deserializer)? {
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
        None => vec![],
    })
}

/// What an MLP applies to its gate.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HiddenAct {
    #[default]
    Silu,
}

/// A field that may be absent or null, nothing else.
pub(crate) fn only_null<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<(), D::Error> {
    match Option::<serde::de::IgnoredAny>::deserialize(deserializer)? {
        Some(_) => Err(D::Error::custom("not supported")),
        None => Ok(()),
    }
}

/// How rotary frequencies are scaled for contexts beyond training. YaRN and its kin change every logit, so they
/// are refused rather than ignored.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RopeType {
    #[default]
    Default,
}

/// `rope_parameters` of newer checkpoints, `rope_scaling` of older ones.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct RopeParameters {
    #[serde(default, alias = "type", rename = "rope_type")]
    _rope_type: RopeType,
    pub rope_theta: Option<f64>,
    pub partial_rotary_factor: Option<f64>,
}

pub(crate) fn default_eps() -> f64 {
    1e-6
}
