//! What the Hub refuses, what it answers wrongly, and what a person is told.

use std::{
    fs,
    time::{Duration, Instant},
};

use taper::hub::{self, HubError, HubOptions};

use super::{
    Cache,
    server::{ID, Repo, Request, Response, Server, nobody},
};

/// Checks that the message is one line of one sentence and says `words`.
#[track_caller]
fn assert_says(error: &HubError, words: &[&str]) {
    let message = error.to_string();
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

fn with_token(cache: &Cache, server: &Server) -> HubOptions {
    HubOptions { token: Some("hf_token".to_string()), ..cache.options(server.url()) }
}

/// A Hub that answers everything with one status and error code.
fn refusing(status: u16, code: &'static str) -> Server {
    Server::start(move |_, _| {
        let response = Response::new(status, "no");
        if code.is_empty() { response } else { response.header("X-Error-Code", code) }
    })
}

#[test]
fn a_model_that_is_not_there() {
    for server in [refusing(404, "RepoNotFound"), refusing(404, ""), refusing(401, "RepoNotFound"), refusing(401, "")] {
        let cache = Cache::new();
        let error = cache.resolve(&server).unwrap_err();
        assert!(matches!(error, HubError::RepoNotFound { .. }), "{error}");
        assert_says(&error, &[ID, &server.url(), "check the name", "HF_TOKEN"]);
        assert_eq!((server.requests().len(), cache.files().len()), (1, 0));
    }
}

#[test]
fn a_revision_that_is_not_there() {
    let server = Repo::new().start();
    let options = HubOptions { revision: Some("v9".to_string()), ..Cache::new().options(server.url()) };
    let error = hub::resolve(ID, &options, &mut ()).unwrap_err();
    assert!(matches!(error, HubError::RevisionNotFound { .. }), "{error}");
    assert_says(&error, &[ID, "`v9`"]);
}

#[test]
fn a_file_that_is_not_there() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let server = Repo::new().without(file).start();
        let error = Cache::new().resolve(&server).unwrap_err();
        assert!(matches!(&error, HubError::FileNotFound { file: it, .. } if it == file), "{error}");
        assert_says(&error, &[ID, "main", file]);
    }
    // In the listing, but not to be had.
    let repo = Repo::new();
    let server = Server::start(move |request, _| match request.path.ends_with("tokenizer.json") {
        true => Response::new(404, "").header("X-Error-Code", "EntryNotFound"),
        false => repo.answer(request),
    });
    let error = Cache::new().resolve(&server).unwrap_err();
    assert!(matches!(&error, HubError::FileNotFound { file, .. } if file == "tokenizer.json"), "{error}");
}

#[test]
fn a_gated_model() {
    // The Hub lists gated models to everyone and refuses their files.
    for (status, code) in [(403, "GatedRepo"), (401, "GatedRepo"), (403, "")] {
        let repo = Repo::new();
        let refusal = move |request: &Request| match request.path.starts_with("/api") {
            true => repo.answer(request),
            false => Response::new(status, "").header("X-Error-Code", code),
        };
        let server = Server::start(move |request, _| refusal(request));
        let error = Cache::new().resolve(&server).unwrap_err();
        assert!(matches!(error, HubError::Gated { .. }), "{error}");
        assert_says(&error, &["licence", &format!("{}/{ID}", server.url()), "HF_TOKEN"]);
    }
}

#[test]
fn a_token_that_is_not_valid() {
    let server = refusing(401, "");
    let error = hub::resolve(ID, &with_token(&Cache::new(), &server), &mut ()).unwrap_err();
    assert!(matches!(error, HubError::Unauthorised { .. }), "{error}");
    assert_says(&error, &[ID, "HF_TOKEN"]);
    assert!(!error.to_string().contains("hf_token"), "{error}");

    let options = HubOptions { token: Some("hf\nX: y".to_string()), ..with_token(&Cache::new(), &server) };
    assert!(matches!(hub::resolve(ID, &options, &mut ()), Err(HubError::NotAToken)));
}

#[test]
fn too_many_requests() {
    for (name, value, seconds) in [("Retry-After", "3600", 3600), ("RateLimit", "\"api\";r=0;t=55", 55)] {
        let server = Server::start(move |_, _| Response::new(429, "").header(name, value));
        let start = Instant::now();
        let error = Cache::new().resolve(&server).unwrap_err();
        assert!(matches!(error, HubError::RateLimited { wait: Some(it), .. } if it == seconds), "{error}");
        assert_says(&error, &[&server.url(), &format!("in {seconds} s"), "HF_TOKEN"]);
        assert!(server.requests().len() == 1 && start.elapsed() < Duration::from_secs(3));
    }
    let server = Server::start(|_, _| Response::new(429, ""));
    let error = Cache::new().resolve(&server).unwrap_err();
    assert!(matches!(error, HubError::RateLimited { wait: None, .. }), "{error}");
    assert_says(&error, &["later"]);

    // A short wait is kept to, and then all is well.
    let repo = Repo::new();
    let server = Server::start(move |request, nth| match request.path.starts_with("/api") && nth == 0 {
        true => Response::new(429, "").header("Retry-After", 1),
        false => repo.answer(request),
    });
    let start = Instant::now();
    Cache::new().resolve(&server).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_failing_server() {
    let repo = Repo::new();
    let recovers = Server::start(move |request, nth| match nth {
        0 => Response::new(502, ""),
        _ => repo.answer(request),
    });
    Cache::new().resolve(&recovers).unwrap();

    let server = refusing(500, "");
    let error = Cache::new().resolve(&server).unwrap_err();
    assert!(matches!(error, HubError::Server { status: 500, .. }), "{error}");
    assert_says(&error, &["500", "try again later"]);
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn a_storage_that_refuses_says_nothing_about_the_licence() {
    let storage = refusing(403, "");
    let server = Repo::new().stored_at(&storage).start();
    let error = Cache::new().resolve(&server).unwrap_err();
    assert_says(&error, &[&storage.url(), "403"]);
    assert!(!error.to_string().contains("secret"), "a signed address: {error}");
    assert!(!error.to_string().contains("licence"), "{error}");
}

#[test]
fn nobody_answers() {
    let (cache, endpoint) = (Cache::new(), nobody());
    let start = Instant::now();
    let error = hub::resolve(ID, &cache.options(endpoint.clone()), &mut ()).unwrap_err();
    assert!(matches!(error, HubError::NoNetwork { .. }), "{error}");
    assert_says(&error, &[&endpoint, "HF_ENDPOINT", "--offline", "local folder"]);
    assert!(start.elapsed() < Duration::from_secs(3));
    assert_eq!(cache.files().len(), 0);
}

#[test]
fn the_connection_breaks_before_an_answer() {
    // Half a listing counts as none.
    let repo = Repo::new();
    let recovers = Server::start(move |request, nth| match nth {
        0 if request.method == "GET" => repo.answer(request).cut(1),
        _ => repo.answer(request),
    });
    Cache::new().resolve(&recovers).unwrap();

    let repo = Repo::new();
    let server = Server::start(move |request, _| repo.answer(request).cut(1));
    let error = Cache::new().resolve(&server).unwrap_err();
    assert!(matches!(error, HubError::NoNetwork { .. }), "{error}");
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn not_a_hub() {
    let page = Server::start(|_, _| Response::new(200, "<html>Please log in to this network</html>"));
    let error = Cache::new().resolve(&page).unwrap_err();
    assert!(matches!(error, HubError::Malformed { .. }), "{error}");
    assert_says(&error, &["HF_ENDPOINT", &page.url()]);

    let circle = Server::start(|request, _| Response::new(302, "").header("Location", &request.path));
    assert_says(&Cache::new().resolve(&circle).unwrap_err(), &["circle"]);

    for endpoint in ["", "huggingface.co", "ftp://huggingface.co", "https://", "not an address"] {
        let error = hub::resolve(ID, &Cache::new().options(endpoint), &mut ()).unwrap_err();
        assert!(matches!(error, HubError::NotAnEndpoint { .. }), "{endpoint}: {error}");
    }
}

#[test]
fn names_from_the_server_stay_in_the_cache() {
    let mut escaping = Repo::new();
    escaping.commit = "../../../escaped".to_string();
    let index = |shard: &str| format!("{{\"weight_map\": {{\"w\": \"{shard}\"}}}}");
    let sharded =
        |shard: &str| Repo::new().without("model.safetensors").with("model.safetensors.index.json", index(shard));
    let repo = Repo::new();
    let etag = Server::start(move |request, _| match request.path.ends_with("config.json") {
        true => repo.answer(request).header("ETag", "\"../../../escaped\""),
        false => repo.answer(request),
    });
    let servers = [
        escaping.start(),
        etag,
        sharded("../../../escaped.safetensors").start(),
        sharded("/escaped.safetensors").start(),
        sharded("run.sh").start(),
        Repo::new().without("model.safetensors").with("model.safetensors.index.json", "{}").start(),
        Repo::new().without("model.safetensors").with("model.safetensors.index.json", "{\"weight_map\": {}}").start(),
    ];
    for server in servers {
        let cache = Cache::new();
        let error = cache.resolve(&server).unwrap_err();
        assert!(matches!(error, HubError::Malformed { .. }), "{error}");
        let outside = fs::read_dir(cache.0.path()).unwrap().map(|it| it.unwrap().file_name());
        assert!(outside.into_iter().all(|it| it == "models--org--model" || it == ".locks"));
        assert!(!cache.files().iter().any(|it| it.contains("escaped")), "{:?}", cache.files());
    }
}

#[test]
fn a_cache_that_cannot_be_written() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let server = Repo::new().start();
    let options = HubOptions { cache_dir: file.path().join("hub"), ..Cache::new().options(server.url()) };
    let error = hub::resolve(ID, &options, &mut ()).unwrap_err();
    assert!(matches!(error, HubError::Io { .. }), "{error}");
    assert_says(&error, &[file.path().to_str().unwrap(), "HF_HUB_CACHE"]);
}
