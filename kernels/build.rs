//! Compiles every `<op>/*.cu` with nvcc when the `cuda` feature is on, and writes the table of modules that
//! `cuda.rs` includes. Without the feature it does nothing.
//!
//! Each `.cu` becomes one fat binary: machine code for the generations below, so that nothing is compiled when
//! a program starts, and PTX of the oldest, which the driver compiles for any newer GPU. `CUDA_COMPUTE_CAP`
//! (`80`, `89`, `90`; candle's kernels read it too) restricts it to one generation. `NVCC` names the compiler.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

/// Machine code for 8.0 runs on every 8.x, 8.9 included.
const GENERATIONS: &[&str] = &["80", "90"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        message.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn compile() -> Result<(), String> {
    for variable in ["NVCC", "NVCC_CCBIN", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    // A new folder shows in `lib.rs`, a new kernel in its folder.
    println!("cargo::rerun-if-changed=lib.rs");
    let nvcc = find_nvcc();
    let version = run(Command::new(&nvcc).arg("--version")).map_err(|error| {
        format!("cuda: {error}\nthe `cuda` feature needs the CUDA toolkit: put nvcc on PATH or set NVCC")
    })?;
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let sources = sources().map_err(|error| format!("cuda: cannot list the kernels: {error}"))?;
    let arguments = arguments();
    let headers = headers().map_err(|error| format!("cuda: cannot read the headers: {error}"))?;

    let hopper = caps().contains(&"90".to_string());
    let mut table = format!(
        "/// Whether the modules hold code for compute capability 9.0.\npub(crate) const HOPPER: bool = {hopper};\n"
    );
    let mut stale = Vec::new();
    for source in &sources {
        let stem = source.file_stem().and_then(|stem| stem.to_str()).ok_or("cuda: a kernel's name is not UTF-8")?;
        let (image, key_file) = (out.join(format!("{stem}.fatbin")), out.join(format!("{stem}.key")));
        let name = stem.to_uppercase();
        // Cargo runs this script when any file of an op changes; nvcc takes seconds a kernel.
        let text = fs::read_to_string(source).map_err(|error| format!("cuda: {}: {error}", source.display()))?;
        let key = format!("{version}\n{arguments:?}\n{headers}\n{text}");
        if !image.exists() || fs::read_to_string(&key_file).ok().as_ref() != Some(&key) {
            stale.push((source, image.clone(), key_file, key));
        }
        writeln!(table, "pub(crate) static {name}: Module = Module::new(include_bytes!({image:?}));")
            .expect("writing to a string");
    }

    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    for stale in stale.chunks(jobs) {
        let compilers: Vec<_> = stale
            .iter()
            .map(|(source, image, ..)| Command::new(&nvcc).args(&arguments).arg("-o").arg(image).arg(source).spawn())
            .collect();
        for (compiler, (source, _, key_file, key)) in compilers.into_iter().zip(stale) {
            match compiler.and_then(|mut compiler| compiler.wait()) {
                Ok(status) if status.success() => fs::write(key_file, key).map_err(|error| format!("cuda: {error}"))?,
                Ok(status) => return Err(format!("cuda: nvcc failed on {}: {status}", source.display())),
                Err(error) => return Err(format!("cuda: cannot run {}: {error}", nvcc.display())),
            }
        }
    }
    fs::write(out.join("modules.rs"), table).map_err(|error| format!("cuda: {error}"))
}

/// What several ops include.
const HEADERS: [&str; 3] = ["cuda.cuh", "mma.cuh", "wgmma.cuh"];

/// `<op>/*.cu`, sorted. Their folders are watched, and the headers.
fn sources() -> io::Result<Vec<PathBuf>> {
    HEADERS.iter().for_each(|header| println!("cargo::rerun-if-changed={header}"));
    files("cu")
}

/// The text of all headers, those of ops too.
fn headers() -> io::Result<String> {
    let mut text = String::new();
    for header in HEADERS.iter().map(PathBuf::from).chain(files("cuh")?) {
        text += &fs::read_to_string(header)?;
    }
    Ok(text)
}

/// The files with this extension in the folders of ops, sorted.
fn files(extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in fs::read_dir(".")? {
        let folder = folder?.path();
        if !folder.join("mod.rs").is_file() {
            continue;
        }
        println!("cargo::rerun-if-changed={}", folder.display());
        for file in fs::read_dir(folder)? {
            let file = file?.path();
            if file.extension().is_some_and(|other| other == extension) {
                found.push(file);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// What machine code is for.
fn caps() -> Vec<String> {
    match env::var("CUDA_COMPUTE_CAP") {
        Ok(cap) => vec![cap.replace(['.', 'a'], "")],
        Err(_) => GENERATIONS.iter().map(|cap| cap.to_string()).collect(),
    }
}

fn arguments() -> Vec<String> {
    let caps = caps();
    let mut arguments: Vec<String> = ["-fatbin", "-O3", "-std=c++17", "-I."].map(String::from).into();
    for cap in &caps {
        // Hopper's matrix and copy instructions exist in its `a` target alone.
        let a = if *cap == "90" { "a" } else { "" };
        arguments.push(format!("-gencode=arch=compute_{cap}{a},code=sm_{cap}{a}"));
    }
    arguments.push(format!("-gencode=arch=compute_{0},code=compute_{0}", caps[0]));
    arguments
}

fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| Path::new(&home).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists())
        .unwrap_or("nvcc".into())
}

fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(format!("{name} failed: {}", output.status)),
        Err(error) => Err(format!("cannot run {name}: {error}")),
    }
}
