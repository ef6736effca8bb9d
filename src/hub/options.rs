//! Where models come from and where they are kept.

use std::{env, ffi::OsString, fmt, fs, path::PathBuf, time::Duration};

/// Where models come from and where they are kept.
///
/// [`HubOptions::from_env`] reads the variables that other Hugging Face tools read; set fields afterwards to override them.
#[derive(Clone)]
pub struct HubOptions {
    /// Branch, tag or commit; `main` if none.
    pub revision: Option<String>,
    /// Use what is cached and make no request at all.
    pub offline: bool,
    /// Address of the Hub, `https://huggingface.co` unless `HF_ENDPOINT` says otherwise.
    pub endpoint: String,
    /// Access token, sent to the endpoint and to no other host.
    pub token: Option<String>,
    /// The folder of `models--org--name` folders.
    pub cache_dir: PathBuf,
    /// A server silent for this long counts as a broken connection.
    pub timeout: Duration,
    /// Pause before the first retry; it doubles with each one.
    pub retry_delay: Duration,
}

impl HubOptions {
    /// Options from the environment:
    ///
    /// - `HF_HUB_CACHE`, else `HF_HOME/hub`, else `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`;
    /// - `HF_TOKEN`, else the file at `HF_TOKEN_PATH`, else the file `token` in `HF_HOME`;
    /// - `HF_ENDPOINT`; `HF_HUB_OFFLINE` (`1`, `true`, `yes`, `on`); `HF_HUB_DOWNLOAD_TIMEOUT` (seconds).
    ///
    /// Source: <https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var_os(name), env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>, user: Option<PathBuf>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| Some(variable(name)?.to_string_lossy().trim().to_string()).filter(|it| !it.is_empty());
        let user = user.unwrap_or_else(env::temp_dir);
        let path = |name: &str| {
            let path = PathBuf::from(variable(name)?);
            Some(path.strip_prefix("~").map(|rest| user.join(rest)).unwrap_or(path))
        };
        let home = path("HF_HOME")
            .unwrap_or_else(|| path("XDG_CACHE_HOME").unwrap_or_else(|| user.join(".cache")).join("huggingface"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let stored_token = || Some(fs::read_to_string(token_file).ok()?.trim().to_string()).filter(|it| !it.is_empty());
        Self {
            revision: None,
            offline: text("HF_HUB_OFFLINE")
                .is_some_and(|it| ["1", "true", "yes", "on"].contains(&it.to_lowercase().as_str())),
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
            token: text("HF_TOKEN").or_else(stored_token),
            cache_dir: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            timeout: Duration::from_secs(
                text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|it| it.parse().ok()).filter(|&it| it > 0).unwrap_or(30),
            ),
            retry_delay: Duration::from_millis(500),
        }
    }

    /// The revision asked for.
    pub(super) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The endpoint without a trailing slash.
    pub(super) fn endpoint(&self) -> &str {
        self.endpoint.trim_end_matches('/')
    }
}

/// Without the token, so that it never reaches a log.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("offline", &self.offline)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("cache_dir", &self.cache_dir)
            .field("timeout", &self.timeout)
            .field("retry_delay", &self.retry_delay)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn options(variables: &[(&str, &str)]) -> HubOptions {
        let find = |name: &str| variables.iter().find(|(it, _)| *it == name).map(|(_, value)| OsString::from(value));
        HubOptions::from_variables(find, Some("/home/ada".into()))
    }

    #[test]
    fn the_cache_is_where_other_tools_look() {
        let cache = |variables: &[(&str, &str)]| options(variables).cache_dir;
        assert_eq!(cache(&[]), Path::new("/home/ada/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/xdg")]), Path::new("/xdg/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/xdg"), ("HF_HOME", "/hf")]), Path::new("/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "~/hf")]), Path::new("/home/ada/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/models")]), Path::new("/models"));
        assert_eq!(cache(&[("HF_HOME", "")]), Path::new("/home/ada/.cache/huggingface/hub"));
    }

    #[test]
    fn the_token_is_the_variable_or_the_file() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        assert_eq!(options(&[("HF_HOME", path)]).token, None);
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(options(&[("HF_HOME", path)]).token.as_deref(), Some("hf_file"));
        assert_eq!(options(&[("HF_HOME", path), ("HF_TOKEN", " hf_variable ")]).token.as_deref(), Some("hf_variable"));
        assert!(!format!("{:?}", options(&[("HF_TOKEN", "hf_secret")])).contains("secret"));
    }

    #[test]
    fn offline_and_endpoint() {
        for (value, offline) in
            [("1", true), ("TRUE", true), ("yes", true), ("0", false), ("false", false), ("", false)]
        {
            assert_eq!(options(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
        assert_eq!(options(&[]).endpoint(), "https://huggingface.co");
        assert_eq!(options(&[("HF_ENDPOINT", "http://mirror:8080/hf/")]).endpoint(), "http://mirror:8080/hf");
    }
}
