use std::cell::RefCell;

use candle_core::{Device, Tensor};
use kernels::quantized::linear;
use tempfile::TempDir;

use super::*;

thread_local! {
    static WARNINGS: RefCell<Vec<String>> = const { RefCell::new(vec![]) };
}

const FORMATS: [Quantization; 2] = [Quantization::Q8, Quantization::Q4];
const SHAPES: [[usize; 2]; 3] = [[96, 128], [33, 70], [1, 1]];

fn cache(folder: &TempDir) -> PackCache {
    let warn = |message: &str| WARNINGS.with_borrow_mut(|warnings| warnings.push(message.into()));
    PackCache { folder: folder.path().join("packed"), max_bytes: 1 << 20, min_bytes: 0, warn }
}

fn warnings() -> Vec<String> {
    WARNINGS.take()
}

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Weights that `seed` tells from others.
fn matrix(format: Quantization, shape: [usize; 2], seed: usize) -> QuantizedMatrix {
    let row = |o: usize, values: &mut [f32]| {
        let value = |i: usize| ((i * 31 + o * 17 + seed * 7) % 97) as f32 - 48.0;
        values.iter_mut().enumerate().for_each(|(i, target)| *target = value(i));
    };
    QuantizedMatrix::pack(format, shape, row).expect("finite")
}

fn open(cache: &PackCache, format: Quantization, seed: usize) -> Packs {
    Packs::open(cache, format, 200_000, |visit| visit(&seed.to_le_bytes())).expect("within the bounds")
}

/// As a model is loaded: which of its matrices came from the cache, and all of them.
fn load(cache: &PackCache, format: Quantization, seed: usize) -> (usize, Vec<QuantizedMatrix>) {
    let packs = open(cache, format, seed);
    let mut hits = 0;
    let matrices = SHAPES.iter().enumerate().map(|(index, &shape)| {
        let name = format!("layers.{index}.weight");
        if let Some(matrix) = packs.get(&name, shape) {
            hits += 1;
            return matrix;
        }
        let matrix = matrix(format, shape, seed);
        packs.add(&name, &matrix);
        matrix
    });
    let matrices = matrices.collect();
    packs.finish();
    (hits, matrices)
}

/// How many matrices of a load come from the cache.
fn hits(cache: &PackCache, format: Quantization, seed: usize) -> usize {
    load(cache, format, seed).0
}

fn files(cache: &PackCache) -> Vec<PathBuf> {
    let entries = fs::read_dir(&cache.folder).expect("the folder").map(|entry| entry.expect("a file").path());
    entries.filter(|path| path.extension().is_some_and(|it| it == SUFFIX || it == PART)).collect()
}

fn bits(tensor: Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>()).expect("f32");
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn mapped_weights_are_the_packed_ones_to_the_bit() {
    for format in FORMATS {
        let folder = temporary();
        let cache = cache(&folder);
        let (hits, owned) = load(&cache, format, 1);
        assert_eq!((hits, files(&cache).len()), (0, 1));
        let (hits, mapped) = load(&cache, format, 1);
        assert_eq!((hits, files(&cache).len()), (SHAPES.len(), 1));
        for (owned, mapped) in owned.iter().zip(&mapped) {
            assert_eq!((owned.dims(), owned.as_bytes()), (mapped.dims(), mapped.as_bytes()));
            assert!(mapped.as_bytes().as_ptr().addr().is_multiple_of(64));
            let [outer, inner] = owned.dims();
            for n in [1, 5] {
                let x = Tensor::randn(0f32, 1.0, (n, inner), &Device::Cpu).expect("memory");
                let product = |weight| bits(linear(&x, weight).expect("shapes fit"));
                assert_eq!(product(owned), product(mapped));
            }
            let ids = Tensor::new(&[0, outer as u32 - 1], &Device::Cpu).expect("memory");
            assert_eq!(bits(owned.rows(&ids).expect("rows")), bits(mapped.rows(&ids).expect("rows")));
        }
    }
    assert_eq!(warnings(), [""; 0]);
}

#[test]
fn blocks_that_are_not_there_or_not_aligned_are_refused() {
    let folder = temporary();
    let path = folder.path().join("blocks");
    let matrix = matrix(Quantization::Q8, SHAPES[0], 1);
    fs::write(&path, [&[0; HEADER], matrix.as_bytes()].concat()).expect("writable");
    let file = Arc::new(Mapped::new(File::open(&path).expect("there")).expect("it maps"));
    let map = |start, shape| QuantizedMatrix::map(Quantization::Q8, shape, file.clone(), start);
    assert!(map(HEADER, SHAPES[0]).is_ok_and(|mapped| mapped.as_bytes() == matrix.as_bytes()));
    for (start, shape) in [(HEADER + 8, [32, 32]), (HEADER + 64, SHAPES[0]), (HEADER, [129, 128]), (usize::MAX, [1, 1])]
    {
        assert!(map(start, shape).is_err(), "{start} {shape:?}");
    }
}

#[test]
fn another_source_format_or_choice_of_matrices_is_another_file() {
    let folder = temporary();
    let cache = cache(&folder);
    hits(&cache, Quantization::Q8, 1);
    assert_eq!((hits(&cache, Quantization::Q8, 2), hits(&cache, Quantization::Q4, 1)), (0, 0));
    assert_eq!(files(&cache).len(), 3);

    let packs = open(&cache, Quantization::Q8, 1);
    assert!(packs.get("layers.0.weight", SHAPES[0]).is_some());
    assert!(packs.get("layers.0.weight", SHAPES[1]).is_none());
    packs.finish();
    assert_eq!((files(&cache).len(), hits(&cache, Quantization::Q8, 1)), (2, 0));
    assert_eq!(hits(&cache, Quantization::Q8, 1), 3);
    assert_eq!(warnings(), [""; 0]);
}

#[test]
fn every_damage_is_noticed_and_repaired() {
    let folder = temporary();
    let cache = cache(&folder);
    hits(&cache, Quantization::Q4, 1);
    let path = &files(&cache)[0];
    let whole = fs::read(path).expect("readable");
    let flips = (0..whole.len()).step_by(whole.len() / 97).chain(0..HEADER).chain(whole.len() - 300..whole.len());
    let flipped = flips.map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
    let cuts = [0, 1, HEADER - 1, HEADER, whole.len() / 2, whole.len() - 1].map(|len| whole[..len].to_vec());
    for (case, bytes) in flipped.chain(cuts).enumerate() {
        // A new file, as the old one may be mapped.
        fs::remove_file(path).expect("there");
        fs::write(path, bytes).expect("writable");
        assert_eq!(hits(&cache, Quantization::Q4, 1), 0, "case {case}");
        let said = warnings();
        assert!(said.len() == 1 && said[0].contains("packed again") && !said[0].contains('\n'), "{case}: {said:?}");
        assert_eq!(fs::read(path).expect("replaced"), whole, "case {case}");
    }
    assert_eq!((hits(&cache, Quantization::Q4, 1), warnings().len()), (3, 0));
}

#[test]
fn the_least_recently_used_goes_and_none_in_use() {
    let folder = temporary();
    let cache = PackCache { max_bytes: 420_000, ..cache(&folder) };
    hits(&cache, Quantization::Q8, 1);
    let one = files(&cache)[0].clone();
    let len = one.metadata().expect("there").len();
    // Room for as many files as they are, beside the bound of what comes.
    let fits = (cache.max_bytes - 200_000) / len;
    let touch = |path: &Path, age| {
        let file = File::open(path).expect("there");
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("ours");
    };
    touch(&one, 1000);
    let (_, held) = load(&cache, Quantization::Q8, 1); // used now, and held
    touch(&one, 1000);
    for seed in 2..20 {
        hits(&cache, Quantization::Q8, seed);
    }
    assert!(one.exists(), "in use");
    assert!((2..=fits + 1).contains(&(files(&cache).len() as u64)), "{} files of {len}", files(&cache).len());
    drop(held);
    hits(&cache, Quantization::Q8, 20);
    assert!(!one.exists(), "the oldest, and free");
    assert_eq!((hits(&cache, Quantization::Q8, 20), warnings().len()), (3, 0));

    let other = cache.folder.join("notes.pack");
    fs::write(&other, vec![0; 1 << 20]).expect("writable");
    hits(&cache, Quantization::Q8, 21);
    assert!(other.exists(), "not the cache's");
}

#[test]
fn what_a_killed_process_left_goes_and_what_is_being_written_stays() {
    let folder = temporary();
    let cache = cache(&folder);
    let first = open(&cache, Quantization::Q8, 1);
    assert_eq!(hits(&cache, Quantization::Q8, 1), 0, "the first one writes it");
    assert_eq!(files(&cache).len(), 1);
    SHAPES.iter().enumerate().for_each(|(index, &shape)| {
        first.add(&format!("layers.{index}.weight"), &matrix(Quantization::Q8, shape, 1));
    });
    first.finish();
    assert_eq!(hits(&cache, Quantization::Q8, 1), 3);

    drop(open(&cache, Quantization::Q8, 2));
    assert_eq!(files(&cache).len(), 1, "a load that failed leaves nothing");

    let left = cache.folder.join(format!("{}.99-0.{PART}", "a".repeat(64)));
    fs::write(&left, "half").expect("writable");
    hits(&cache, Quantization::Q8, 3);
    assert!(left.exists(), "its owner may be about to lock it");
    File::open(&left).expect("there").set_modified(SystemTime::now() - Duration::from_secs(100)).expect("ours");
    hits(&cache, Quantization::Q8, 4);
    assert!(!left.exists());
    assert_eq!(warnings(), [""; 0]);
}

#[test]
fn many_at_once_all_get_whole_weights() {
    let folder = temporary();
    let cache = cache(&folder);
    let want = matrix(Quantization::Q4, SHAPES[0], 1);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                (0..20).for_each(|_| {
                    assert_eq!(load(&cache, Quantization::Q4, 1).1[0].as_bytes(), want.as_bytes());
                    assert_eq!(warnings(), [""; 0]);
                })
            });
        }
    });
    assert_eq!((hits(&cache, Quantization::Q4, 1), files(&cache).len()), (3, 1));
}

#[test]
fn a_folder_that_cannot_be_and_a_full_disk_are_one_warning() {
    let folder = temporary();
    fs::write(folder.path().join("packed"), "a file").expect("writable");
    assert_eq!(hits(&cache(&folder), Quantization::Q8, 1), 0);
    let said = warnings();
    assert!(said.len() == 1 && said[0].contains("not kept"), "{said:?}");

    #[cfg(target_os = "linux")]
    {
        let folder = temporary();
        let cache = cache(&folder);
        let packs = open(&cache, Quantization::Q8, 1);
        let part = files(&cache)[0].clone();
        let full = File::options().write(true).open("/dev/full").expect("Linux has it");
        let path = cache.folder.join("path");
        *packs.state() = State::Writing(Writer::new(full, part, path.clone(), "key"));
        packs.add("a", &matrix(Quantization::Q8, SHAPES[0], 1));
        packs.add("b", &matrix(Quantization::Q8, SHAPES[0], 1));
        packs.finish();
        let said = warnings();
        assert!(said.len() == 1 && said[0].contains("not kept"), "{said:?}");
        assert!(!path.exists() && files(&cache).is_empty());
    }
}

#[test]
fn small_weights_and_those_beyond_the_bound_touch_nothing() {
    let folder = temporary();
    for (min_bytes, max_bytes) in [(101, 1000), (0, 99)] {
        let cache = PackCache { min_bytes, max_bytes, ..cache(&folder) };
        assert!(Packs::open(&cache, Quantization::Q8, 100, |_| ()).is_none());
    }
    assert!(!folder.path().join("packed").exists());
}

#[test]
fn the_folder_is_the_variable_or_the_users_caches() {
    let folder = |variables: &[(&str, &str)]| {
        let find = |name: &str| variables.iter().find(|(it, _)| *it == name).map(|(_, value)| OsString::from(value));
        PackCache::from_variables(find, Some("/home/ada".into())).folder
    };
    assert_eq!(folder(&[("TAPER_CACHE", "")]), Path::new("/home/ada/.cache/taper/packed"));
    assert_eq!(folder(&[("XDG_CACHE_HOME", "/xdg")]), Path::new("/xdg/taper/packed"));
    assert_eq!(folder(&[("XDG_CACHE_HOME", "/xdg"), ("TAPER_CACHE", "/fast")]), Path::new("/fast/packed"));
}

#[test]
fn every_change_changes_the_checksum() {
    let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let sum = checksum(&bytes);
    for at in [0, 63, 64, 1 << 20, (3 << 20) - 1] {
        let mut changed = bytes.clone();
        changed[at] ^= 0x80;
        assert_ne!(checksum(&changed), sum, "{at}");
    }
    let (mut cut, mut swapped) = (bytes.clone(), bytes);
    cut.truncate(2 << 20);
    swapped.rotate_left(1 << 20);
    assert!(checksum(&cut) != sum && checksum(&swapped) != sum);
}
