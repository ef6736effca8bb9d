//! What the unit tests share: where their data lies, and how random cases are drawn.

use std::io::Write;
use std::path::{Path, PathBuf};

use models::Checkpoint;
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use serde_json::Value;

/// A folder of the repository.
pub(crate) fn folder(name: &str) -> Checkpoint {
    Checkpoint::Folder(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))
}

/// The demo checkpoint.
pub(crate) fn demo() -> Checkpoint {
    folder("examples/demo/chat")
}

/// The committed fixtures whose names begin with `family` and a dash, each with its `reference.json`.
pub(crate) fn fixtures(family: &str) -> Vec<(Checkpoint, Value)> {
    references(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), family)
}

/// What `make_reference.py` left in the folder that `TAPER_REFERENCE` names, in the same form; `None`, said aloud, if
/// it names none. With third-party templates in it, this cannot be committed.
pub(crate) fn generated_references(test: &str, family: &str) -> Option<Vec<(Checkpoint, Value)>> {
    let Some(root) = std::env::var_os("TAPER_REFERENCE") else {
        // Past libtest, which keeps the output of tests that pass to itself.
        let reason = "TAPER_REFERENCE names no folder that make_reference.py wrote";
        writeln!(std::io::stderr(), "{test}: skipped for {family}: {reason}").unwrap();
        return None;
    };
    let found = references(Path::new(&root), family);
    assert!(!found.is_empty(), "{}: no reference for {family}", Path::new(&root).display());
    Some(found)
}

fn references(root: &Path, family: &str) -> Vec<(Checkpoint, Value)> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut folders: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.file_name().unwrap().to_string_lossy().starts_with(&format!("{family}-")));
    folders.sort();
    let read = |path: PathBuf| {
        let json = std::fs::read_to_string(path.join("reference.json")).unwrap();
        (Checkpoint::Folder(path.join("f32")), serde_json::from_str(&json).unwrap())
    };
    folders.into_iter().map(read).collect()
}

/// The same cases in every run.
pub(crate) fn proptest_config() -> ProptestConfig {
    ProptestConfig { rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() }
}
