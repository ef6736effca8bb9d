//! Requests to the Hub: what they send, where redirects may lead, which failures are tried again, what an answer means.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    thread,
    time::Duration,
};

use hf_hub::{Repo, RepoType};
use ureq::{
    Agent, Body, Timeout,
    http::{HeaderMap, HeaderValue, Request, Response, Uri, header},
};

use super::{HubError, HubOptions, cache::is_plain_name};

/// How often a request is sent before its failure is reported.
const ATTEMPTS: u32 = 3;
/// Reaching a server takes no longer than this, or it is not there.
const MAX_CONNECT: Duration = Duration::from_secs(10);
/// A server that asks to wait longer than this many seconds is not waited for.
const MAX_WAIT: u64 = 10;
const MAX_REDIRECTS: usize = 10;

/// The Hub, as far as one model goes.
pub(super) struct Client<'a> {
    id: &'a str,
    options: &'a HubOptions,
    agent: Agent,
    origin: Origin,
    authorization: Option<HeaderValue>,
}

/// What a revision holds.
pub(super) struct Listing {
    pub commit: String,
    /// Each file's size in bytes, where the Hub tells it.
    pub files: BTreeMap<String, Option<u64>>,
}

/// What the Hub says about a file.
pub(super) struct Head {
    /// Names the content: the SHA-256 of a large file, else the git hash.
    pub etag: String,
    pub size: Option<u64>,
    /// For `If-Range`, where the endpoint itself serves the file.
    validator: Option<String>,
    /// Whether `etag` came as `X-Linked-Etag`.
    linked: bool,
}

/// A successful answer, or 416 to a request with a range.
pub(super) struct Answer {
    pub status: u16,
    /// Offset of the body in the file.
    pub start: u64,
    /// Size of the file according to the server that sends the body.
    pub total: Option<u64>,
    pub body: Body,
    etag: Option<String>,
    linked_etag: Option<String>,
    linked_size: Option<u64>,
    at_endpoint: bool,
}

struct Ask<'a> {
    method: &'static str,
    url: String,
    /// None: the listing.
    file: Option<&'a str>,
    range: Option<String>,
    if_range: Option<&'a str>,
}

impl<'a> Client<'a> {
    pub(super) fn new(id: &'a str, options: &'a HubOptions) -> Result<Self, HubError> {
        let not_an_endpoint = || HubError::NotAnEndpoint { endpoint: options.endpoint.clone() };
        let endpoint: Uri = options.endpoint().parse().map_err(|_| not_an_endpoint())?;
        let origin = Origin::of(&endpoint).ok_or_else(not_an_endpoint)?;
        let bearer = |token: &String| HeaderValue::from_str(&format!("Bearer {token}"));
        let authorization = options.token.as_ref().map(bearer).transpose().map_err(|_| HubError::NotAToken)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("taper/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges are those of the file only if it is sent as it is.
            .accept_encoding("identity")
            .timeout_resolve(Some(options.timeout.min(MAX_CONNECT)))
            .timeout_connect(Some(options.timeout.min(MAX_CONNECT)))
            .timeout_recv_response(Some(options.timeout))
            .timeout_per_read(Some(options.timeout));
        if origin.is_loopback() {
            // This machine means another one to a proxy.
            config = config.proxy(None);
        }
        Ok(Self { id, options, agent: config.build().into(), origin, authorization })
    }

    /// The commit that the revision is now, and its files: one request.
    pub(super) fn listing(&self) -> Result<Listing, HubError> {
        #[derive(serde::Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
        }
        const MAX_BYTES: u64 = 64 << 20;

        let repo = Repo::with_revision(self.id.to_string(), RepoType::Model, self.options.revision().to_string());
        let url = format!("{}/api/{}?blobs=true", self.options.endpoint(), repo.api_url());
        let ask = || Ask { method: "GET", url: url.clone(), file: None, range: None, if_range: None };
        let text = self.read(ask, |answer| read_at_most(answer.body, MAX_BYTES))?;
        let malformed = |message: String| HubError::Malformed { what: url.clone(), message };
        let info: Info = serde_json::from_slice(&text)
            .map_err(|error| malformed(format!("not an answer of a Hugging Face Hub ({error}); check HF_ENDPOINT")))?;
        if !is_plain_name(&info.sha) {
            return Err(malformed(format!("sha is `{}`, expected a commit hash", info.sha)));
        }
        let files = info.siblings.into_iter().map(|it| (it.rfilename, it.size)).collect();
        Ok(Listing { commit: info.sha, files })
    }

    pub(super) fn head(&self, commit: &str, file: &str) -> Result<Head, HubError> {
        let answer = self.send(&self.ask("HEAD", commit, file))?;
        let linked = answer.linked_etag.is_some();
        let raw = answer.linked_etag.as_deref().or(answer.etag.as_deref()).unwrap_or_default();
        let etag = raw.trim_start_matches("W/").trim_matches('"').to_string();
        if !is_plain_name(&etag) {
            let message = format!("ETag is `{raw}`, expected a name for the content");
            return Err(HubError::Malformed { what: file.to_string(), message });
        }
        let validator = answer.etag.filter(|etag| answer.at_endpoint && etag.starts_with('"'));
        Ok(Head { etag, size: answer.linked_size.or(answer.total), validator, linked })
    }

    /// The file from the byte `from` on, or from its start if the server does not do ranges or the file has changed.
    pub(super) fn get(&self, commit: &str, file: &str, head: &Head, from: u64) -> Result<Answer, HubError> {
        let mut ask = self.ask("GET", commit, file);
        if from > 0 {
            ask.range = Some(format!("bytes={from}-"));
            ask.if_range = head.validator.as_deref();
        }
        self.send(&ask)
    }

    /// Up to `bytes` bytes of the file from `from` on, and the size of the whole file.
    pub(super) fn range(&self, commit: &str, file: &str, from: u64, bytes: u64) -> Result<(Vec<u8>, u64), HubError> {
        let range = format!("bytes={from}-{}", from + bytes - 1);
        let ask = || Ask { range: Some(range.clone()), ..self.ask("GET", commit, file) };
        self.read(ask, |answer| {
            if answer.status == 416 {
                return Ok((Vec::new(), answer.linked_size.unwrap_or_default()));
            }
            let total = answer.linked_size.or(answer.total).unwrap_or_default();
            let mut body = answer.body.into_reader();
            io::copy(&mut (&mut body).take(from.saturating_sub(answer.start)), &mut io::sink())?;
            let mut buffer = Vec::new();
            body.take(bytes).read_to_end(&mut buffer)?;
            Ok((buffer, total))
        })
    }

    pub(super) fn endpoint(&self) -> &str {
        self.options.endpoint()
    }

    /// The error for a file that the repository lacks.
    pub(super) fn absent(&self, file: &str) -> HubError {
        HubError::FileNotFound {
            repo: self.id.to_string(),
            revision: self.options.revision().to_string(),
            file: file.to_string(),
        }
    }

    /// The pause before the retry after `attempt` failures.
    pub(super) fn pause(&self, attempt: u32) -> Duration {
        self.options.retry_delay * 2u32.pow(attempt)
    }

    fn ask<'b>(&self, method: &'static str, commit: &str, file: &'b str) -> Ask<'b> {
        let url = format!("{}/{}/resolve/{commit}/{file}", self.options.endpoint(), self.id);
        Ask { method, url, file: Some(file), range: None, if_range: None }
    }

    /// Sends and reads the whole body; a body that breaks off is asked for again.
    fn read<'b, T>(&self, ask: impl Fn() -> Ask<'b>, read: impl Fn(Answer) -> io::Result<T>) -> Result<T, HubError> {
        let mut attempt = 0;
        loop {
            match read(self.send(&ask())?) {
                Ok(read) => return Ok(read),
                Err(error) if attempt + 1 == ATTEMPTS => return Err(self.no_network(error)),
                Err(_) => thread::sleep(self.pause(attempt)),
            }
            attempt += 1;
        }
    }

    /// Sends until there is an answer, or a failure that sending again would not mend.
    fn send(&self, ask: &Ask) -> Result<Answer, HubError> {
        let mut attempt = 0;
        loop {
            match self.send_once(ask) {
                Ok(answer) => return Ok(answer),
                Err(Failure { error, may_pass }) if !may_pass || attempt + 1 == ATTEMPTS => return Err(error),
                Err(Failure { error: HubError::RateLimited { wait: Some(seconds), .. }, .. }) => {
                    thread::sleep(Duration::from_secs(seconds));
                }
                Err(_) => thread::sleep(self.pause(attempt)),
            }
            attempt += 1;
        }
    }

    /// Sends and follows redirects.
    fn send_once(&self, ask: &Ask) -> Result<Answer, Failure> {
        let malformed = |message: &str| HubError::Malformed { what: ask.url.clone(), message: message.to_string() };
        let mut uri: Uri = ask.url.parse().map_err(|_| malformed("not an address"))?;
        let (mut linked_etag, mut linked_size) = (None, None);
        for _ in 0..=MAX_REDIRECTS {
            let at_endpoint = Origin::of(&uri).as_ref() == Some(&self.origin);
            let response = self.send_to(&uri, at_endpoint, ask)?;
            let (status, headers) = (response.status(), response.headers());
            linked_etag = linked_etag.or_else(|| text(headers, "x-linked-etag").map(String::from));
            linked_size = linked_size.or_else(|| text(headers, "x-linked-size")?.parse().ok());
            if let Some(location) = text(headers, "location").filter(|_| status.is_redirection()) {
                let next = follow(&uri, location).ok_or_else(|| malformed("redirects to no address"))?;
                // The Hub has told what it knows, and the storage behind it knows no more.
                let is_told = ask.method == "HEAD" && linked_etag.is_some() && linked_size.is_some();
                if !is_told || Origin::of(&next) == Origin::of(&uri) {
                    uri = next;
                    continue;
                }
            } else if !(status.is_success() || status == 416 && ask.range.is_some()) {
                return Err(self.refusal(ask, &uri, at_endpoint, &response));
            }
            let (start, total) = extent(headers, status.as_u16());
            let etag = text(headers, "etag").map(String::from);
            let (status, body) = (status.as_u16(), response.into_body());
            return Ok(Answer { status, start, total, body, etag, linked_etag, linked_size, at_endpoint });
        }
        Err(malformed("redirects in a circle").into())
    }

    fn send_to(&self, uri: &Uri, at_endpoint: bool, ask: &Ask) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(ask.method).uri(uri);
        if let Some(range) = &ask.range {
            request = request.header(header::RANGE, range);
        }
        // Neither the token nor the endpoint's ETag means anything to another host.
        if at_endpoint {
            if let Some(authorization) = &self.authorization {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            if let Some(etag) = ask.if_range {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        let request = request.body(()).expect("method, address and headers are valid");
        self.agent.run(request).map_err(|error| Failure {
            may_pass: match &error {
                ureq::Error::Io(error) => error.kind() != io::ErrorKind::ConnectionRefused,
                ureq::Error::Timeout(phase) => !matches!(phase, Timeout::Resolve | Timeout::Connect),
                ureq::Error::Protocol(_) => true,
                _ => false,
            },
            error: self.no_network(error),
        })
    }

    fn no_network(&self, error: impl ToString) -> HubError {
        HubError::NoNetwork { endpoint: self.options.endpoint().to_string(), reason: error.to_string() }
    }

    /// What an answer other than success means.
    ///
    /// Source: huggingface_hub, `utils/_http.py`, `hf_raise_for_status`.
    fn refusal(&self, ask: &Ask, uri: &Uri, at_endpoint: bool, response: &Response<Body>) -> Failure {
        let (repo, endpoint) = (self.id.to_string(), self.options.endpoint().to_string());
        let revision = self.options.revision().to_string();
        let status = response.status().as_u16();
        let code = text(response.headers(), "x-error-code");
        let error = match (status, code.unwrap_or_default()) {
            (429, _) => {
                let wait = wait(response.headers());
                let may_pass = wait.is_none_or(|seconds| seconds <= MAX_WAIT);
                return Failure { error: HubError::RateLimited { endpoint, wait }, may_pass };
            }
            // The storage behind the Hub knows nothing of accounts and licences.
            (status, _) if status >= 500 || (code.is_none() && !at_endpoint) => {
                let url = without_query(uri);
                return Failure { error: HubError::Server { url, status }, may_pass: status >= 500 };
            }
            (_, "GatedRepo") | (403, _) => HubError::Gated { page: format!("{endpoint}/{repo}"), repo },
            (_, "RevisionNotFound") => HubError::RevisionNotFound { repo, revision, endpoint },
            // Without a token, 401 is also how the Hub says that there is no such model.
            (401, code) if self.authorization.is_some() && code != "RepoNotFound" => {
                HubError::Unauthorised { repo, endpoint }
            }
            (_, "RepoNotFound") | (401, _) => HubError::RepoNotFound { repo, endpoint },
            (404, _) => match ask.file {
                Some(file) => self.absent(file),
                None => HubError::RepoNotFound { repo, endpoint },
            },
            (status, _) => HubError::Server { url: without_query(uri), status },
        };
        error.into()
    }
}

/// Why a request failed, and whether the same request may succeed a little later.
struct Failure {
    error: HubError,
    may_pass: bool,
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self { error, may_pass: false }
    }
}

impl Answer {
    /// Whether this is another content than `head` spoke of.
    pub(super) fn differs(&self, head: &Head) -> bool {
        let etag = if head.linked { &self.linked_etag } else { &self.etag };
        etag.as_ref().is_some_and(|etag| etag.trim_start_matches("W/").trim_matches('"') != head.etag)
    }
}

/// Scheme, host and port: what a token is for.
#[derive(PartialEq)]
struct Origin(String, String, u16);

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let default = match scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        Some(Self(scheme, uri.host()?.to_ascii_lowercase(), uri.port_u16().unwrap_or(default)))
    }

    fn is_loopback(&self) -> bool {
        self.1 == "localhost" || self.1 == "[::1]" || self.1.starts_with("127.")
    }
}

/// Where a redirect from `base` leads.
fn follow(base: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let next: Uri = if location.starts_with("//") {
        format!("{scheme}:{location}").parse().ok()?
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}").parse().ok()?
    } else if location.contains("://") {
        location.parse().ok()?
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}").parse().ok()?
    };
    Origin::of(&next).map(|_| next)
}

/// Where the body starts in the file, beyond any file if the server does not tell, and how long the file is.
fn extent(headers: &HeaderMap, status: u16) -> (u64, Option<u64>) {
    if status == 206 {
        // bytes 100-199/1000
        let range = text(headers, "content-range").and_then(|it| it.strip_prefix("bytes ")).unwrap_or_default();
        let start = range.split('-').next().and_then(|it| it.parse().ok()).unwrap_or(u64::MAX);
        (start, range.rsplit('/').next().and_then(|it| it.parse().ok()))
    } else {
        (0, text(headers, "content-length").and_then(|it| it.parse().ok()))
    }
}

/// The seconds to wait: `Retry-After: 30`, or the `t` of `RateLimit: "api";r=0;t=30`.
fn wait(headers: &HeaderMap) -> Option<u64> {
    let limit = || text(headers, "ratelimit")?.split(';').find_map(|it| it.trim().strip_prefix("t="));
    text(headers, "retry-after").or_else(limit)?.trim().parse().ok()
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Signed addresses carry secrets in the query.
fn without_query(uri: &Uri) -> String {
    uri.to_string().split('?').next().unwrap_or_default().to_string()
}

fn read_at_most(body: Body, bytes: u64) -> io::Result<Vec<u8>> {
    let mut buffer = Vec::new();
    body.into_reader().take(bytes).read_to_end(&mut buffer)?;
    Ok(buffer)
}
