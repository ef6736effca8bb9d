//! What is fetched, the layout of the cache, and what needs no request.

use std::{fs, path::Path};

use taper::hub::{self, HubError, HubOptions};

use super::{
    Cache, Recorder, content,
    server::{COMMIT, ID, Repo, Request, Response, Server, nobody, weights},
};

const OLD_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

fn index(shards: &[&str]) -> String {
    let map: serde_json::Map<_, _> =
        shards.iter().enumerate().map(|(layer, shard)| (format!("layers.{layer}"), (*shard).into())).collect();
    serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map }).to_string()
}

/// A cache as another tool leaves it.
fn write_cache(cache: &Cache, commit: &str, files: &[&str]) {
    let snapshot = cache.model().join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(cache.model().join("blobs")).unwrap();
    fs::create_dir_all(cache.model().join("refs")).unwrap();
    fs::write(cache.model().join("refs/main"), commit).unwrap();
    let repo = Repo::new();
    for file in files {
        fs::write(cache.blob(&repo.etag(file)), repo.content(file)).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(format!("../../blobs/{}", repo.etag(file)), snapshot.join(file)).unwrap();
        #[cfg(not(unix))]
        fs::copy(cache.blob(&repo.etag(file)), snapshot.join(file)).unwrap();
    }
}

const WHOLE: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

#[test]
fn a_folder_is_its_own_answer() {
    let folder = tempfile::tempdir().unwrap();
    let options = Cache::new().options(nobody());
    assert_eq!(hub::resolve(folder.path().to_str().unwrap(), &options, &mut ()).unwrap(), folder.path());
}

#[test]
fn fetches_what_a_model_needs_and_no_more() {
    let repo = Repo::new()
        .with("generation_config.json", "{\"g\":1}")
        .with("tokenizer_config.json", "{\"t\":1}")
        .with("chat_template.jinja", "{{ messages }}")
        .with("1_Pooling/config.json", "{\"p\":1}");
    let server = repo
        .clone()
        .with("README.md", "read me")
        .with("onnx/model.onnx", vec![0; 1000])
        .with("pytorch_model.bin", vec![0; 1000])
        .with("model.safetensors.index.json", index(&["other.safetensors"]))
        .with("other.safetensors", weights(10, 2))
        .start();
    let cache = Cache::new();
    let mut progress = Recorder::default();
    let folder = hub::resolve(ID, &cache.options(server.url()), &mut progress).unwrap();

    assert_eq!(folder, cache.model().join("snapshots").join(COMMIT));
    let names = [
        "1_Pooling/config.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let expected = names.map(|name| (name.to_string(), repo.content(name).to_vec()));
    assert_eq!(content(&folder), expected.clone().into());
    assert_eq!(progress.finished, names.len());
    assert_eq!(progress.advanced, expected.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
    assert_eq!(progress.begun("model.safetensors"), [(repo.content("model.safetensors").len() as u64, 0)]);

    // Nothing but blobs, the reference and the links: no part, no file under a passing name.
    let mut files: Vec<String> = names.iter().map(|name| format!("blobs/{}", repo.etag(name))).collect();
    files.push("refs/main".to_string());
    files.extend(names.iter().map(|name| format!("snapshots/{COMMIT}/{name}")));
    files.sort();
    assert_eq!(cache.files(), files);
    assert_eq!(cache.commit().as_deref(), Some(COMMIT));
    #[cfg(unix)]
    for (name, up) in [("config.json", "../../"), ("1_Pooling/config.json", "../../../")] {
        let target = fs::read_link(folder.join(name)).unwrap();
        assert_eq!(target, Path::new(&format!("{up}blobs/{}", repo.etag(name))));
    }
    for name in names {
        let found = hf_hub::Cache::new(cache.0.path().to_path_buf()).model(ID.to_string()).get(name);
        assert_eq!(found, Some(folder.join(name)), "another tool looks for {name}");
    }
}

#[test]
fn shards_are_those_of_the_index() {
    let server = Repo::new()
        .without("model.safetensors")
        .with("model.safetensors.index.json", index(&["a-1.safetensors", "a-2.safetensors", "a-1.safetensors"]))
        .with("a-1.safetensors", weights(1000, 1))
        .with("a-2.safetensors", weights(2000, 2))
        .with("a-3.safetensors", weights(3000, 3))
        .start();
    let cache = Cache::new();
    let names: Vec<String> = content(&cache.resolve(&server).unwrap()).into_keys().collect();
    let expected =
        ["a-1.safetensors", "a-2.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names, expected);

    fs::remove_file(cache.model().join("snapshots").join(COMMIT).join("a-2.safetensors")).unwrap();
    let error = hub::resolve(ID, &cache.offline(&server), &mut ()).unwrap_err();
    assert!(matches!(&error, HubError::NotCached { missing, .. } if missing == &["a-2.safetensors"]), "{error}");
}

#[test]
fn an_encoder_without_safetensors_comes_with_its_heads() {
    let server = Repo::new()
        .without("model.safetensors")
        .with("pytorch_model.bin", vec![1; 1000])
        .with("sparse_linear.pt", vec![2; 100])
        .with("colbert_linear.pt", vec![3; 100])
        .with("modules.json", "[]")
        .with("sentence_bert_config.json", "{}")
        .start();
    let cache = Cache::new();
    let folder = cache.resolve(&server).unwrap();
    for name in ["pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt", "modules.json"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    assert!(hub::resolve(ID, &cache.offline(&server), &mut ()).is_ok());
}

#[test]
fn what_another_tool_fetched_is_found() {
    let cache = Cache::new();
    write_cache(&cache, COMMIT, &WHOLE);
    let before = cache.files();
    let server = Repo::new().start();
    let folder = hub::resolve(ID, &cache.offline(&server), &mut ()).unwrap();
    assert_eq!(folder, cache.model().join("snapshots").join(COMMIT));
    assert_eq!(server.requests().len(), 0);

    assert_eq!(cache.resolve(&server).unwrap(), folder);
    let paths: Vec<String> = server.requests().into_iter().map(|it| it.path).collect();
    assert_eq!(paths, ["/api/models/org/model/revision/main?blobs=true"]);
    assert_eq!(cache.files(), before);
}

#[test]
fn offline_makes_no_request_and_names_what_is_missing() {
    let server = Repo::new().start();
    let cache = Cache::new();
    let mut missing = WHOLE.to_vec();
    for present in [&WHOLE[..0], &WHOLE[..1], &WHOLE[..2]] {
        write_cache(&cache, COMMIT, &present[present.len().saturating_sub(1)..]);
        missing.retain(|it| !present.contains(it));
        let error = hub::resolve(ID, &cache.offline(&server), &mut ()).unwrap_err();
        assert!(matches!(&error, HubError::NotCached { missing: it, .. } if *it == missing), "{error}");
        assert!(missing.iter().all(|it| error.to_string().contains(it)), "{error}");
    }
    let error = hub::fetch_metadata("org/other", &cache.offline(&server), &mut ()).unwrap_err();
    assert!(matches!(error, HubError::NotCached { .. }), "{error}");
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn a_cached_copy_serves_while_the_network_is_down() {
    let cache = Cache::new();
    write_cache(&cache, COMMIT, &WHOLE);
    let down = Server::start(|_, _| Response::new(503, ""));
    for endpoint in [nobody(), down.url()] {
        let mut progress = Recorder::default();
        let folder = hub::resolve(ID, &cache.options(endpoint.clone()), &mut progress).unwrap();
        assert_eq!(folder, cache.model().join("snapshots").join(COMMIT));
        assert!(matches!(&progress.notices[..], [it] if it.contains(&endpoint) && it.contains(COMMIT)));
    }
}

#[test]
fn a_revision_is_a_branch_a_tag_or_a_commit() {
    let server = Repo::new().start();
    let cache = Cache::new();
    for revision in ["refs/pr/1", COMMIT] {
        let options = HubOptions { revision: Some(revision.to_string()), ..cache.options(server.url()) };
        let folder = hub::resolve(ID, &options, &mut ()).unwrap();
        assert_eq!(hub::resolve(ID, &HubOptions { offline: true, ..options }, &mut ()).unwrap(), folder);
    }
    assert_eq!(fs::read_to_string(cache.model().join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert_eq!(cache.commit(), None);
    assert!(!cache.model().join("refs").join(COMMIT).exists());
    for revision in ["", "../main", "a//b", "a/../b", ".hidden", "a b", "/a"] {
        let options = HubOptions { revision: Some(revision.to_string()), ..cache.options(server.url()) };
        let error = hub::resolve(ID, &options, &mut ()).unwrap_err();
        assert!(matches!(error, HubError::NotARevision { .. }), "{revision}: {error}");
    }
}

#[test]
fn an_update_that_fails_leaves_the_complete_snapshot() {
    let cache = Cache::new();
    write_cache(&cache, OLD_COMMIT, &WHOLE);
    let repo = Repo::new();
    let broken = Server::start(move |request: &Request, _| match request.is("GET", "model.safetensors") {
        true => repo.answer(request).cut(0),
        false => repo.answer(request),
    });
    // Blobs are shared between snapshots; without its blob the file is fetched again.
    fs::remove_file(cache.blob(&Repo::new().etag("model.safetensors"))).unwrap();
    assert!(matches!(cache.resolve(&broken), Err(HubError::Interrupted { .. })));
    assert_eq!(cache.commit().as_deref(), Some(OLD_COMMIT));

    let server = Repo::new().start();
    cache.resolve(&server).unwrap();
    assert_eq!(cache.commit().as_deref(), Some(COMMIT));
    assert_eq!(server.of("HEAD", "model.safetensors").len(), 1);
}

#[test]
fn a_damaged_cache_is_mended() {
    let server = Repo::new().start();
    let cache = Cache::new();
    let folder = cache.resolve(&server).unwrap();
    let blob = cache.blob(&Repo::new().etag("model.safetensors"));
    fs::remove_file(&blob).unwrap();
    cache.resolve(&server).unwrap();
    assert!(folder.join("model.safetensors").is_file());
    fs::File::options().write(true).open(&blob).unwrap().set_len(1000).unwrap();
    cache.resolve(&server).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), Repo::new().content("model.safetensors"));
    assert_eq!(server.of("GET", "model.safetensors").len(), 3);
}

#[test]
fn metadata_comes_without_the_weights() {
    let big = weights(4_000_000, 1);
    let server = Repo::new().with("model.safetensors", big.clone()).start();
    let cache = Cache::new();
    let metadata = hub::fetch_metadata(ID, &cache.options(server.url()), &mut ()).unwrap();
    assert!(metadata.folder.join("config.json").is_file() && !metadata.folder.join("model.safetensors").exists());
    let [file] = &metadata.weights[..] else { panic!("one file of weights") };
    assert_eq!((file.name.as_str(), file.bytes), ("model.safetensors", big.len() as u64));
    let header: serde_json::Value = serde_json::from_str(file.header.as_ref().unwrap()).unwrap();
    assert_eq!(header["w"]["shape"][0], 4_000_000);
    assert!(server.sent("model.safetensors") <= 256 << 10);

    let offline = hub::fetch_metadata(ID, &cache.offline(&server), &mut ()).unwrap();
    assert!(offline.folder == metadata.folder && offline.weights.is_empty());
    assert!(matches!(hub::resolve(ID, &cache.offline(&server), &mut ()), Err(HubError::NotCached { .. })));

    let folder = cache.resolve(&server).unwrap();
    let requests = server.requests().len();
    for options in [cache.offline(&server), cache.options(server.url())] {
        let cached = hub::fetch_metadata(ID, &options, &mut ()).unwrap();
        assert_eq!((&cached.weights[0].header, cached.weights[0].bytes), (&file.header, file.bytes));
    }
    assert_eq!(server.requests().len(), requests + 1);
    let local = hub::fetch_metadata(folder.to_str().unwrap(), &cache.offline(&server), &mut ()).unwrap();
    assert_eq!(local.weights[0].header, file.header);
}

#[test]
fn metadata_does_not_replace_a_complete_snapshot() {
    let cache = Cache::new();
    write_cache(&cache, OLD_COMMIT, &WHOLE);
    let server = Repo::new().start();
    hub::fetch_metadata(ID, &cache.options(server.url()), &mut ()).unwrap();
    assert_eq!(cache.commit().as_deref(), Some(OLD_COMMIT));
}

#[test]
fn headers_of_every_shard_however_long() {
    let long = format!("{{\"__metadata__\":{{\"note\":\"{}\"}}}}", "x".repeat(600 << 10));
    let mut file = (long.len() as u64).to_le_bytes().to_vec();
    file.extend(long.bytes());
    let repo = Repo::new()
        .without("model.safetensors")
        .with("model.safetensors.index.json", index(&["a-1.safetensors", "a-2.safetensors"]))
        .with("a-1.safetensors", file.clone())
        .with("a-2.safetensors", weights(2000, 2));
    let no_ranges = {
        let repo = repo.clone();
        Server::start(move |request: &Request, _| {
            let mut request = request.clone();
            request.headers.remove("range");
            repo.answer(&request)
        })
    };
    for server in [repo.start(), no_ranges] {
        let metadata = hub::fetch_metadata(ID, &Cache::new().options(server.url()), &mut ()).unwrap();
        let [first, second] = &metadata.weights[..] else { panic!("two files of weights") };
        assert_eq!((first.bytes, first.header.as_ref()), (file.len() as u64, Some(&long)));
        assert!(second.header.as_ref().unwrap().contains("2000"));
    }
}

#[test]
fn headers_that_cannot_be() {
    let huge = [u64::MAX.to_le_bytes().to_vec(), b"{}".to_vec()].concat();
    let longer = [100u64.to_le_bytes().to_vec(), b"{}".to_vec()].concat();
    let not_text = [2u64.to_le_bytes().to_vec(), vec![0xff, 0xfe]].concat();
    for content in [b"short".to_vec(), Vec::new(), huge, longer, not_text] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("model.safetensors"), &content).unwrap();
        let local = hub::fetch_metadata(folder.path().to_str().unwrap(), &Cache::new().options(nobody()), &mut ());
        assert!(matches!(local, Err(HubError::Malformed { .. })), "{content:?}: {local:?}");
        if !content.is_empty() {
            let server = Repo::new().with("model.safetensors", content.clone()).start();
            let remote = hub::fetch_metadata(ID, &Cache::new().options(server.url()), &mut ());
            assert!(matches!(remote, Err(HubError::Malformed { .. })), "{content:?}: {remote:?}");
        }
    }
}
