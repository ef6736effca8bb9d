//! Redirects, broken connections, resuming, and content that is not what was announced.

use std::{
    fs,
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use taper::hub::{self, HubError, HubOptions};

use super::{
    Cache, Recorder,
    server::{ID, Repo, Request, Response, Server, ranged, weights},
};

const WEIGHTS: &str = "model.safetensors";

/// A Hub whose weights are answered by `script` (for GET, with the number of earlier ones) where it says something.
fn scripted(repo: &Repo, script: impl Fn(&Request, usize) -> Option<Response> + Send + Sync + 'static) -> Server {
    let repo = repo.clone();
    Server::start(move |request, nth| {
        let scripted = request.is("GET", WEIGHTS).then(|| script(request, nth)).flatten();
        scripted.unwrap_or_else(|| repo.answer(request))
    })
}

fn ranges(server: &Server, end_of_path: &str) -> Vec<Option<String>> {
    server.of("GET", end_of_path).iter().map(|it| it.header("range").map(String::from)).collect()
}

#[track_caller]
fn assert_fetched(cache: &Cache, repo: &Repo) {
    let blob = cache.blob(&repo.etag(WEIGHTS));
    assert!(fs::read(blob).unwrap() == repo.content(WEIGHTS), "the content is that of the Hub");
    assert!(!cache.files().iter().any(|it| it.ends_with(".incomplete")), "{:?}", cache.files());
}

/// Neither a blob nor a part nor a link of the weights is left.
#[track_caller]
fn assert_nothing_left(cache: &Cache, repo: &Repo) {
    let is_left = |it: &String| it.contains(&repo.etag(WEIGHTS)) || it.ends_with(WEIGHTS) || it.contains("incomplete");
    assert!(!cache.files().iter().any(is_left), "{:?}", cache.files());
}

#[test]
fn the_token_stays_with_the_endpoint() {
    let repo = Repo::new();
    let stored = repo.clone();
    let storage = Server::start(move |request, _| stored.answer_as_storage(request));
    let repo = repo.stored_at(&storage);
    let hub = repo.clone();
    // As huggingface.co does for small files: a redirect within the host first.
    let server = Server::start(move |request, _| match request.path.strip_prefix("/cached") {
        Some(path) => hub.answer(&Request { path: path.to_string(), ..request.clone() }),
        None if request.path.ends_with("config.json") => {
            Response::new(307, "").header("Location", format!("/cached{}", request.path))
        }
        None => hub.answer(request),
    });
    let cache = Cache::new();
    let options = HubOptions { token: Some("hf_secret".to_string()), ..cache.options(server.url()) };
    hub::resolve(ID, &options, &mut ()).unwrap();

    assert_fetched(&cache, &repo);
    assert!(server.of("GET", "config.json").len() == 2 && storage.requests().len() == 1);
    for request in server.requests() {
        assert_eq!(request.header("authorization"), Some("Bearer hf_secret"), "{request:?}");
    }
    for request in storage.requests() {
        assert_eq!((request.method.as_str(), request.header("authorization")), ("GET", None), "{request:?}");
    }
}

#[test]
fn a_cut_connection_resumes_where_it_stopped() {
    let repo = Repo::new();
    let size = repo.content(WEIGHTS).len();
    let again = repo.clone();
    let server = scripted(&repo, move |request, nth| match nth {
        0 => Some(again.answer(request).cut(70_000)),
        1 => Some(again.answer(request).cut(50_000)),
        _ => None,
    });
    let cache = Cache::new();
    let mut progress = Recorder::default();
    hub::resolve(ID, &cache.options(server.url()), &mut progress).unwrap();

    assert_fetched(&cache, &repo);
    assert_eq!(ranges(&server, WEIGHTS), [None, Some("bytes=70000-".to_string()), Some("bytes=120000-".to_string())]);
    let etag = format!("\"{}\"", repo.etag(WEIGHTS));
    assert_eq!(server.of("GET", WEIGHTS)[1].header("if-range"), Some(etag.as_str()));
    assert_eq!(server.sent(WEIGHTS), size);
    assert_eq!(progress.begun(WEIGHTS), [(size as u64, 0)]);
}

#[test]
fn a_cut_behind_a_redirect_resumes_too() {
    let repo = Repo::new();
    let stored = repo.clone();
    let storage = Server::start(move |request, nth| match nth {
        0 => stored.answer_as_storage(request).cut(70_000),
        _ => stored.answer_as_storage(request),
    });
    let repo = repo.stored_at(&storage);
    let server = repo.clone().start();
    let cache = Cache::new();
    cache.resolve(&server).unwrap();

    assert_fetched(&cache, &repo);
    let requests = storage.requests();
    assert_eq!(requests.len(), 2);
    // The storage's ETag is not the Hub's: with it as If-Range it would send everything again.
    assert_eq!((requests[1].header("range"), requests[1].header("if-range")), (Some("bytes=70000-"), None));
    assert_eq!(requests.iter().map(|it| it.sent).sum::<usize>(), repo.content(WEIGHTS).len());
}

#[test]
fn the_next_run_goes_on_from_what_the_last_one_left() {
    let repo = Repo::new();
    let size = repo.content(WEIGHTS).len();
    let again = repo.clone();
    let broken = scripted(&repo, move |request, nth| {
        Some(if nth == 0 { again.answer(request).cut(70_000) } else { again.answer(request).cut(0) })
    });
    let cache = Cache::new();
    let error = cache.resolve(&broken).unwrap_err();
    assert!(
        matches!(&error, HubError::Interrupted { received: 70_000, expected, .. } if *expected == size as u64),
        "{error}"
    );
    assert!(broken.of("GET", WEIGHTS).len() <= 10, "retries are bounded");
    assert_eq!(fs::metadata(cache.incomplete(&repo.etag(WEIGHTS))).unwrap().len(), 70_000);
    assert!(cache.commit().is_none() && !cache.blob(&repo.etag(WEIGHTS)).exists());

    let server = repo.clone().start();
    let mut progress = Recorder::default();
    hub::resolve(ID, &cache.options(server.url()), &mut progress).unwrap();
    assert_fetched(&cache, &repo);
    assert_eq!(ranges(&server, WEIGHTS), [Some("bytes=70000-".to_string())]);
    assert_eq!(server.sent(WEIGHTS), size - 70_000);
    assert_eq!(progress.begun(WEIGHTS), [(size as u64, 70_000)]);
}

#[test]
fn a_server_that_does_not_do_ranges_starts_over() {
    let repo = Repo::new();
    let size = repo.content(WEIGHTS).len();
    let again = repo.clone();
    let server = scripted(&repo, move |_, nth| {
        let whole = Response::new(200, again.content(WEIGHTS)).header("ETag", format!("\"{}\"", again.etag(WEIGHTS)));
        Some(if nth == 0 { whole.cut(70_000) } else { whole })
    });
    let cache = Cache::new();
    let mut progress = Recorder::default();
    hub::resolve(ID, &cache.options(server.url()), &mut progress).unwrap();
    assert_fetched(&cache, &repo);
    assert_eq!(server.of("GET", WEIGHTS).len(), 2);
    assert_eq!(progress.begun(WEIGHTS), [(size as u64, 0), (size as u64, 0)]);
}

#[test]
fn a_server_that_sends_another_range_is_not_believed() {
    let repo = Repo::new();
    let again = repo.clone();
    let server = scripted(&repo, move |request, nth| match nth {
        0 => Some(again.answer(request).cut(70_000)),
        1 => {
            let headers = [("range".to_string(), "bytes=60000-".to_string())];
            Some(again.answer(&Request { headers: headers.into(), ..request.clone() }))
        }
        _ => None,
    });
    let cache = Cache::new();
    cache.resolve(&server).unwrap();
    assert_fetched(&cache, &repo);
}

/// The file changes at the Hub after the first connection was cut; `server` is told whether it has.
fn changes_between_cut_and_resume(start: impl Fn(Repo, Repo) -> Server) {
    let old = Repo::new();
    let new = Repo::new().with(WEIGHTS, weights(150_000, 7));
    let cache = Cache::new();
    let server = start(old.clone(), new.clone());
    let folder = cache.resolve(&server).unwrap();
    assert!(fs::read(folder.join(WEIGHTS)).unwrap() == new.content(WEIGHTS), "the new content and nothing of the old");
    assert_fetched(&cache, &new);
    assert!(!cache.files().iter().any(|it| it.contains(&old.etag(WEIGHTS))), "{:?}", cache.files());
}

#[test]
fn a_file_that_changes_between_cut_and_resume_restarts() {
    changes_between_cut_and_resume(|old, new| {
        Server::start(move |request, nth| match (request.is("HEAD", WEIGHTS), request.is("GET", WEIGHTS)) {
            (true, _) if nth == 0 => old.answer(request),
            (_, true) if nth == 0 => old.answer(request).cut(70_000),
            _ => new.answer(request),
        })
    });
    // Behind a redirect, where If-Range cannot help.
    changes_between_cut_and_resume(|old, new| {
        let (before, after) = (old.clone(), new.clone());
        let storage = Server::start(move |request, nth| match nth {
            0 => before.answer_as_storage(request).cut(70_000),
            _ => after.answer_as_storage(request),
        });
        let (old, new) = (old.stored_at(&storage), new.stored_at(&storage));
        Server::start(move |request, nth| match request.path.ends_with(WEIGHTS) && nth == 0 {
            true => old.answer(request),
            false => new.answer(request),
        })
    });
}

#[test]
fn a_small_file_that_changes_between_cut_and_resume_restarts() {
    let (old, new) = (vec![b'a'; 5000], vec![b'b'; 4000]);
    let content = new.clone();
    let repo = Repo::new();
    let server = Server::start(move |request, nth| {
        let of = |content: &[u8], etag| ranged(request, content, etag);
        match (request.is("HEAD", "tokenizer.json"), request.is("GET", "tokenizer.json")) {
            (true, _) if nth == 0 => of(&old, "aaaa"),
            (_, true) if nth == 0 => of(&old, "aaaa").cut(3000),
            (true, _) | (_, true) => of(&new, "bbbb"),
            _ => repo.answer(request),
        }
    });
    let cache = Cache::new();
    let folder = cache.resolve(&server).unwrap();
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), content);
    assert_eq!(server.of("GET", "tokenizer.json")[1].header("if-range"), Some("\"aaaa\""));
}

#[test]
fn a_silent_server_is_a_broken_connection() {
    let repo = Repo::new();
    let again = repo.clone();
    let server = scripted(&repo, move |request, nth| (nth == 0).then(|| again.answer(request).stall(70_000)));
    let cache = Cache::new();
    let options = HubOptions { timeout: Duration::from_millis(300), ..cache.options(server.url()) };
    hub::resolve(ID, &options, &mut ()).unwrap();
    assert_fetched(&cache, &repo);
    assert_eq!(ranges(&server, WEIGHTS)[1].as_deref(), Some("bytes=70000-"));
}

#[test]
fn a_wrong_size_is_refused() {
    let repo = Repo::new();
    let size = repo.content(WEIGHTS).len();
    for announced in [size - 1, size + 1] {
        let again = repo.clone();
        let server = Server::start(move |request, _| match request.is("HEAD", WEIGHTS) {
            true => again.answer(request).header("X-Linked-Size", announced),
            false => again.answer(request),
        });
        let cache = Cache::new();
        let error = cache.resolve(&server).unwrap_err();
        let is_told = matches!(&error, HubError::WrongSize { expected, received, .. } if (*expected, *received) == (announced as u64, size as u64));
        assert!(is_told, "{error}");
        assert_nothing_left(&cache, &repo);
        assert_eq!(cache.commit(), None);
    }
}

#[test]
fn a_body_longer_than_announced_is_refused() {
    // Without a Content-Length only the body itself shows it.
    let repo = Repo::new();
    let longer = [repo.content(WEIGHTS), b"more"].concat();
    let body = [format!("{:x}\r\n", longer.len()).as_bytes(), &longer, b"\r\n0\r\n\r\n"].concat();
    let server = scripted(&repo, move |_, _| {
        Some(Response::new(200, body.clone()).header("Transfer-Encoding", "chunked").header("Content-Length", ""))
    });
    let cache = Cache::new();
    let error = cache.resolve(&server).unwrap_err();
    assert!(matches!(error, HubError::WrongSize { .. }), "{error}");
    assert_nothing_left(&cache, &repo);
}

#[test]
fn a_wrong_hash_is_refused() {
    let repo = Repo::new();
    let mut damaged = repo.content(WEIGHTS).to_vec();
    damaged[100_000] ^= 1;
    let etag = repo.etag(WEIGHTS);
    let server = scripted(&repo, move |request, _| Some(ranged(request, &damaged, &etag)));
    let cache = Cache::new();
    let error = cache.resolve(&server).unwrap_err();
    assert!(matches!(&error, HubError::WrongHash { expected, .. } if *expected == repo.etag(WEIGHTS)), "{error}");
    assert_eq!(server.of("GET", WEIGHTS).len(), 1, "the same answer is not asked for twice");
    assert_nothing_left(&cache, &repo);
    assert_eq!(cache.commit(), None);
}

#[test]
fn a_damaged_part_of_an_earlier_run_is_dropped() {
    let repo = Repo::new();
    let size = repo.content(WEIGHTS).len();
    // Too short, as long as the whole, and too long.
    for bytes in [70_000, size, size + 1] {
        let cache = Cache::new();
        fs::create_dir_all(cache.model().join("blobs")).unwrap();
        fs::write(cache.incomplete(&repo.etag(WEIGHTS)), vec![0; bytes]).unwrap();
        let server = repo.clone().start();
        cache.resolve(&server).unwrap();
        assert_fetched(&cache, &repo);
        assert_eq!(server.sent(WEIGHTS), if bytes < size { size - bytes + size } else { size });
    }
}

#[test]
fn a_whole_part_of_an_earlier_run_needs_no_transfer() {
    let repo = Repo::new();
    let cache = Cache::new();
    fs::create_dir_all(cache.model().join("blobs")).unwrap();
    fs::write(cache.incomplete(&repo.etag(WEIGHTS)), repo.content(WEIGHTS)).unwrap();
    let server = repo.clone().start();
    cache.resolve(&server).unwrap();
    assert_fetched(&cache, &repo);
    assert_eq!(server.of("GET", WEIGHTS).len(), 0);
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let repo = Repo::new();
    let again = repo.clone();
    let server = scripted(&repo, move |request, _| Some(again.answer(request).pause(Duration::from_millis(300))));
    let cache = Cache::new();
    let (barrier, options) = (Arc::new(Barrier::new(4)), cache.options(server.url()));
    let run = || {
        let (barrier, options) = (barrier.clone(), options.clone());
        thread::spawn(move || {
            let mut progress = Recorder::default();
            barrier.wait();
            (hub::resolve(ID, &options, &mut progress), progress)
        })
    };
    let threads = [run(), run(), run(), run()];
    let results = threads.map(|thread| thread.join().unwrap());
    let folders: Vec<_> = results.iter().map(|(folder, _)| folder.as_ref().unwrap()).collect();
    assert!(folders.iter().all(|it| *it == folders[0]));
    assert_fetched(&cache, &repo);
    assert_eq!(server.of("GET", WEIGHTS).len(), 1);
    assert_eq!(results.iter().map(|(_, it)| it.begun(WEIGHTS).len()).sum::<usize>(), 1);
    let waited = |it: &Recorder| it.notices.iter().any(|it| it.contains(WEIGHTS));
    assert_eq!(results.iter().filter(|(_, it)| waited(it)).count(), 3);
}
