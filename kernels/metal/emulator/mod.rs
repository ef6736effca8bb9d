//! Runs launches of Metal kernels on the CPU, so that every op's tests run them on Linux: the same table of cases,
//! through the same public function, over the same launch description as on a Mac.
//!
//! A `.metal` source is translated to C++ (`translate.rs`), compiled by clang 19 with sanitizers against a stand-in for
//! Metal's standard library (`msl.h`), and linked with a runtime (`runtime.cpp`) that runs the threads of a threadgroup
//! as fibers. Every module is a process of its own that takes launches on stdin: a kernel that breaks takes no test
//! with it. What the emulator refuses and Metal may not: a part of a simdgroup at a simdgroup operation, an
//! argument that is not bound as the kernel declares it, a read of threadgroup memory before a write.
//!
//! What it cannot show: Apple's compiler, registers and occupancy, fast math, caches, speed, and whether a barrier names
//! the memory that it orders, because here it orders all.

#[cfg(test)]
mod planted;
mod translate;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use candle_core::{CpuStorage, DType, Error, Result, Storage, bail};
use half::{bf16, f16};
#[cfg(test)]
pub(crate) use planted::{assert_mutants_fail, assert_wrong_launches_fail, assert_wrong_launches_fail_but, suspended};

use super::{Argument, Backend, Launch, Source};

const CLANG: &str = "clang++-19";
/// Orders of threads that the runtime knows; the last two are random.
const SCHEDULES: u32 = 6;
/// That a launch may take; the longest takes a few on a machine that has nothing else to do.
const LAUNCH_SECONDS: u32 = 600;

/// Runs `test` with every op that has a Metal kernel on the emulator, in what runs on this thread. Says so and does
/// nothing where clang 19 is not installed. Schedules take turns. With `TAPER_EMULATOR=thorough` in the environment
/// every launch runs in all of them, whose results must agree to the bit, and `test` runs again under TSan, which
/// judges by what orders two accesses, not by which came first: there they take turns.
pub fn emulated(test: impl Fn() -> Result<()>) -> Result<()> {
    if !is_available() {
        return Ok(());
    }
    Session { in_all_schedules: is_thorough(), ..Default::default() }.run(&test)?;
    if is_thorough() {
        Session { sanitizer: Sanitizer::Thread, ..Default::default() }.run(&test)?;
    }
    Ok(())
}

/// Names of the functions that the test which [`emulated`] runs has launched since the last call.
#[cfg(feature = "emulator")]
pub fn launched() -> BTreeSet<String> {
    SESSION.with_borrow_mut(|session| {
        session.as_mut().map(|session| std::mem::take(&mut session.launched)).unwrap_or_default()
    })
}

/// What runs launches while [`emulated`] runs its test on this thread.
pub(crate) fn emulator() -> Option<Emulator> {
    SESSION.with_borrow(|session| session.as_ref().map(|_| Emulator))
}

/// The emulator as a device whose storage is the CPU's.
pub(crate) struct Emulator;

impl Backend for Emulator {
    type Storage = CpuStorage;

    fn storage(storage: &Storage) -> Result<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("operand is not on the cpu"),
        }
    }

    fn wrap(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<CpuStorage> {
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(vec![f32::NAN; elements]),
            DType::F16 => CpuStorage::F16(vec![f16::NAN; elements]),
            DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; elements]),
            DType::U32 => CpuStorage::U32(vec![u32::MAX; elements]),
            other => bail!("an output of {other:?}"),
        })
    }

    fn launch(&self, launch: Launch<CpuStorage>) -> Result<()> {
        SESSION.with_borrow_mut(|session| session.as_mut().expect("emulated is running").launch(launch))
    }
}

thread_local! {
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Session {
    processes: HashMap<&'static str, Process>,
    launches: u32,
    launched: BTreeSet<String>,
    sanitizer: Sanitizer,
    in_all_schedules: bool,
    /// Name of a source and the text that stands in for it.
    mutant: Option<(&'static str, String)>,
    /// What is made wrong in the launches of a function.
    wrong: Option<(String, Wrong)>,
    /// Instead of [`LAUNCH_SECONDS`].
    launch_seconds: Option<u32>,
    /// What could be made wrong in the launches so far.
    applicable: Vec<(String, Wrong)>,
}

#[derive(Clone, Copy, Debug, Default, Hash)]
enum Sanitizer {
    #[default]
    Address,
    Thread,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    /// One threadgroup fewer along an axis.
    Fewer(usize),
    /// An argument without its offset.
    FromStart(usize),
    /// Two arguments that are both read or both written; of different kinds the runtime refuses them.
    Exchanged(usize, usize),
}

impl Session {
    fn run(self, test: impl Fn() -> Result<()>) -> Result<()> {
        SESSION.set(Some(self));
        let result = test();
        SESSION.set(None);
        result
    }

    fn launch(&mut self, launch: Launch<CpuStorage>) -> Result<()> {
        let kernel = launch.function();
        let Launch { source, constants, threadgroups, threads, arguments, .. } = launch;
        let mut outputs = Vec::new();
        let mut request = Request { kernel: &kernel, constants, threadgroups, threads, arguments: Vec::new() };
        for argument in arguments {
            request.arguments.push(match argument {
                Argument::Read(storage, start) => Bound { access: 0, start, bytes: bytes(storage)? },
                Argument::Write(storage, start) => {
                    let bytes = bytes(storage)?;
                    outputs.push(storage);
                    Bound { access: 1, start, bytes }
                }
                Argument::Words(words) => {
                    Bound { access: 2, start: 0, bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() }
                }
                Argument::Absent => Bound { access: 3, start: 0, bytes: vec![] },
            });
        }
        for wrong in request.applicable() {
            let of_kernel = (kernel.clone(), wrong);
            if self.wrong.as_ref() == Some(&of_kernel) {
                request.spoil(wrong);
                if let Wrong::Exchanged(i, j) = wrong
                    && request.arguments[i].access == 1
                {
                    outputs.swap(request.outputs_before(i), request.outputs_before(j));
                }
            }
            if !self.applicable.contains(&of_kernel) {
                self.applicable.push(of_kernel);
            }
        }
        self.launches += 1;
        self.launched.insert(kernel.clone());
        let turn = self.launches % SCHEDULES;
        let schedules = if self.in_all_schedules { 0..SCHEDULES } else { turn..turn + 1 };
        let mut results: Option<Vec<Vec<u8>>> = None;
        for schedule in schedules {
            let got = self.process(source)?.run(&request, schedule);
            let got = got.map_err(|error| Error::Msg(format!("{kernel}, schedule {schedule}: {error}")).bt())?;
            if results.as_ref().is_some_and(|results| *results != got) {
                bail!("{kernel}: schedule {schedule} gives another result than the one before")
            }
            results = Some(got);
        }
        for (storage, bytes) in outputs.into_iter().zip(results.unwrap_or_default()) {
            set_bytes(storage, &bytes)?;
        }
        Ok(())
    }

    fn process(&mut self, source: &'static Source) -> Result<&mut Process> {
        if !self.processes.contains_key(source.name) {
            let (text, origin) = match &self.mutant {
                Some((name, text)) if *name == source.name => (text.as_str(), Origin::Planted),
                _ => (source.text, Origin::Written),
            };
            let program = build(source.name, text, self.sanitizer, origin).map_err(|error| Error::Msg(error).bt())?;
            self.processes
                .insert(source.name, Process::start(&program, self.launch_seconds.unwrap_or(LAUNCH_SECONDS))?);
        }
        Ok(self.processes.get_mut(source.name).expect("just inserted"))
    }
}

struct Request<'a> {
    kernel: &'a str,
    constants: Vec<bool>,
    threadgroups: [usize; 3],
    threads: [usize; 3],
    arguments: Vec<Bound>,
}

struct Bound {
    access: u32,
    start: usize,
    bytes: Vec<u8>,
}

impl Request<'_> {
    fn applicable(&self) -> Vec<Wrong> {
        let fewer = (0..3).filter(|&axis| self.threadgroups[axis] > 1).map(Wrong::Fewer);
        let starts = self.arguments.iter().enumerate().filter(|(_, argument)| argument.start > 0);
        let access = |i: usize| self.arguments[i].access;
        let alike = |i: usize, j: usize| access(i) == access(j) && access(i) != 3;
        let exchanges = (0..self.arguments.len())
            .flat_map(|j| (0..j).map(move |i| (i, j)))
            .filter(|&(i, j)| alike(i, j))
            .map(|(i, j)| Wrong::Exchanged(i, j));
        fewer.chain(starts.map(|(index, _)| Wrong::FromStart(index))).chain(exchanges).collect()
    }

    fn spoil(&mut self, wrong: Wrong) {
        match wrong {
            Wrong::Fewer(axis) => self.threadgroups[axis] -= 1,
            Wrong::FromStart(index) => self.arguments[index].start = 0,
            Wrong::Exchanged(i, j) => self.arguments.swap(i, j),
        }
    }

    fn outputs_before(&self, index: usize) -> usize {
        self.arguments[..index].iter().filter(|argument| argument.access == 1).count()
    }

    fn encode(&self, schedule: u32) -> Vec<u8> {
        let mut encoded = Vec::new();
        let words = |encoded: &mut Vec<u8>, words: &[usize]| {
            encoded.extend(words.iter().flat_map(|word| (*word as u32).to_le_bytes()));
        };
        words(&mut encoded, &[self.kernel.len()]);
        encoded.extend(self.kernel.as_bytes());
        words(&mut encoded, &[self.constants.len()]);
        self.constants.iter().for_each(|constant| words(&mut encoded, &[usize::from(*constant)]));
        words(&mut encoded, &self.threadgroups);
        words(&mut encoded, &self.threads);
        words(&mut encoded, &[schedule as usize, self.arguments.len()]);
        for Bound { access, start, bytes } in &self.arguments {
            words(&mut encoded, &[*access as usize, *start, bytes.len()]);
            encoded.extend(bytes);
        }
        encoded
    }
}

/// A module that waits for launches.
struct Process {
    child: Child,
    requests: BufWriter<ChildStdin>,
    replies: BufReader<ChildStdout>,
    /// Reads stderr to its end: a pipe holds little, and who writes to a full one waits.
    report: Option<JoinHandle<Vec<u8>>>,
    launch_seconds: u32,
}

impl Process {
    fn start(program: &Path, launch_seconds: u32) -> Result<Self> {
        let mut child = Command::new(program)
            .arg(launch_seconds.to_string())
            // Fibers bring their own stacks.
            .env("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0")
            .env("TSAN_OPTIONS", "halt_on_error=1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let requests = BufWriter::new(child.stdin.take().expect("piped"));
        let replies = BufReader::new(child.stdout.take().expect("piped"));
        let mut stderr = child.stderr.take().expect("piped");
        let report = Some(thread::spawn(move || {
            let mut report = Vec::new();
            let _ = stderr.read_to_end(&mut report);
            report
        }));
        Ok(Self { child, requests, replies, report, launch_seconds })
    }

    /// The contents of all written buffers after the launch.
    fn run(&mut self, request: &Request, schedule: u32) -> std::result::Result<Vec<Vec<u8>>, String> {
        let start = Instant::now();
        self.exchange(request, schedule).unwrap_or_else(|_| {
            let end = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            let report = self.report.take().and_then(|report| report.join().ok()).unwrap_or_default();
            let (seconds, limit) = (start.elapsed().as_secs(), self.launch_seconds);
            Err(format!("{end} after {seconds} s of {limit}\n{}", String::from_utf8_lossy(&report)))
        })
    }

    fn exchange(
        &mut self,
        request: &Request,
        schedule: u32,
    ) -> std::io::Result<std::result::Result<Vec<Vec<u8>>, String>> {
        self.requests.write_all(&request.encode(schedule))?;
        self.requests.flush()?;
        let mut length = [0; 4];
        self.replies.read_exact(&mut length)?;
        let mut error = vec![0; u32::from_le_bytes(length) as usize];
        self.replies.read_exact(&mut error)?;
        if !error.is_empty() {
            return Ok(Err(String::from_utf8_lossy(&error).into_owned()));
        }
        let mut outputs = Vec::new();
        for written in request.arguments.iter().filter(|argument| argument.access == 1) {
            let mut bytes = vec![0; written.bytes.len()];
            self.replies.read_exact(&mut bytes)?;
            outputs.push(bytes);
        }
        Ok(Ok(outputs))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn bytes(storage: &CpuStorage) -> Result<Vec<u8>> {
    Ok(match storage {
        CpuStorage::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        CpuStorage::F16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        CpuStorage::BF16(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        CpuStorage::U32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => bail!("operand is not f32, f16, bf16 or u32"),
    })
}

fn set_bytes(storage: &mut CpuStorage, bytes: &[u8]) -> Result<()> {
    fn set<T, const N: usize>(values: &mut [T], bytes: &[u8], of: fn([u8; N]) -> T) {
        let (chunks, _) = bytes.as_chunks::<N>();
        values.iter_mut().zip(chunks).for_each(|(value, bytes)| *value = of(*bytes));
    }
    match storage {
        CpuStorage::F32(values) => set(values, bytes, f32::from_le_bytes),
        CpuStorage::F16(values) => set(values, bytes, f16::from_le_bytes),
        CpuStorage::BF16(values) => set(values, bytes, bf16::from_le_bytes),
        CpuStorage::U32(values) => set(values, bytes, u32::from_le_bytes),
        _ => bail!("output is not f32, f16, bf16 or u32"),
    }
    Ok(())
}

/// Whether there is time.
pub fn is_thorough() -> bool {
    std::env::var("TAPER_EMULATOR").is_ok_and(|value| value == "thorough")
}

fn is_available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let can_run = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let can_run = false;
    let has_clang = || Command::new(CLANG).arg("--version").output().is_ok_and(|output| output.status.success());
    let is_available = can_run && has_clang();
    if !is_available {
        eprintln!("metal: no kernel was emulated: that takes {CLANG} on x86-64 Linux, and AVX2");
    }
    is_available
}

/// Where the text of a source is from.
#[derive(Clone, Copy, PartialEq)]
enum Origin {
    Written,
    /// Is a mutant of one that was written, whose casts have been seen.
    Planted,
}

/// A folder for what is built from `parts`, and the lock that whoever builds there must hold.
fn folder(name: &str, parts: impl Hash) -> (PathBuf, Arc<Mutex<()>>) {
    static BUILDING: Mutex<Option<HashMap<PathBuf, Arc<Mutex<()>>>>> = Mutex::new(None);
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    let folder = PathBuf::from(env!("OUT_DIR")).join(format!("emulator/{name}-{:016x}", hasher.finish()));
    let mut building = BUILDING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let lock = building.get_or_insert_default().entry(folder.clone()).or_default().clone();
    (folder, lock)
}

/// Fused products and conversions of half floats are instructions; nothing is fused that kernels do not fuse.
const COMMON: [&str; 5] = ["-g1", "-march=x86-64-v3", "-ffp-contract=off", "-Wno-unknown-attributes", "-Wno-psabi"];

/// The object file of what runs kernels; built once.
fn build_runtime(sanitizer: Sanitizer) -> std::result::Result<PathBuf, String> {
    let (folder, lock) = folder("runtime", (FILES, sanitizer));
    let _building = lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let object = folder.join("runtime.o");
    if object.exists() {
        return Ok(object);
    }
    write_files(&folder)?;
    let flags: &[&str] = match sanitizer {
        Sanitizer::Address => &[],
        Sanitizer::Thread => &["-DEMULATOR_TSAN"],
    };
    output(clang(&folder).args(COMMON).args(flags).args(["-O2", "-std=c++17", "-c", "runtime.cpp", "-o", "compiled"]))?;
    std::fs::rename(folder.join("compiled"), &object).map_err(|error| error.to_string())?;
    Ok(object)
}

fn write_files(folder: &Path) -> std::result::Result<(), String> {
    std::fs::create_dir_all(folder)
        .and_then(|()| FILES.iter().try_for_each(|(name, text)| std::fs::write(folder.join(name), text)))
        .map_err(|error| format!("{}: {error}", folder.display()))
}

/// The program of a source; built once for a text.
fn build(name: &str, text: &str, sanitizer: Sanitizer, origin: Origin) -> std::result::Result<PathBuf, String> {
    let (folder, lock) = folder(name, (text, sanitizer, FILES, include_str!("translate.rs")));
    let _building = lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let program = folder.join("program");
    if program.exists() {
        return Ok(program);
    }
    let io = |error: std::io::Error| format!("{}: {error}", folder.display());
    write_files(&folder)?;
    // Metal's headers are clang's builtin files; msl.h stands in for them.
    let text = text.lines().map(|line| if line.starts_with("#include <metal") { "" } else { line });
    let text = format!("#line 1 \"metal.h\"\n{}\n", text.collect::<Vec<_>>().join("\n"));
    std::fs::write(folder.join("kernels.metal"), text).map_err(io)?;

    let mut preprocess = clang(&folder);
    preprocess.args(["-E", "-x", "c++", "-D__METAL_VERSION__=310", "-D__HAVE_BFLOAT__", "-DEMULATOR", "kernels.metal"]);
    let preprocessed = output(&mut preprocess)?;
    std::fs::write(folder.join("kernels.cpp"), translate::translate(&preprocessed)?).map_err(io)?;

    let kernels = [
        "-x",
        "c++",
        "-std=c++14",
        "-Werror=c++17-extensions",
        "-Xclang",
        "-cl-single-precision-constant",
        "-include",
        "msl.h",
    ];
    if origin == Origin::Written {
        let mut spaces = clang(&folder);
        spaces.args(kernels).args(["-fsyntax-only", "-Xclang", "-ast-dump", "-fno-color-diagnostics", "kernels.cpp"]);
        if output(&mut spaces)?.contains("AddressSpaceConversion") {
            return Err(format!("{name}: a cast between address spaces"));
        }
    }
    let sanitize = match sanitizer {
        Sanitizer::Address => "-fsanitize=address,undefined",
        Sanitizer::Thread => "-fsanitize=thread",
    };
    let runtime = build_runtime(sanitizer)?;
    let mut kernels_object = clang(&folder);
    kernels_object.args(kernels).args(COMMON).args(["-O1", "-DEMULATOR_FLAT", sanitize, "-fno-sanitize-recover=all"]);
    output(kernels_object.args(["-c", "kernels.cpp"]))?;
    output(clang(&folder).args([sanitize, "kernels.o", "-o", "linked"]).arg(runtime))?;
    std::fs::rename(folder.join("linked"), &program).map_err(io)?;
    Ok(program)
}

const FILES: [(&str, &str); 3] = [
    ("msl.h", include_str!("msl.h")),
    ("runtime.h", include_str!("runtime.h")),
    ("runtime.cpp", include_str!("runtime.cpp")),
];

fn clang(folder: &Path) -> Command {
    let mut command = Command::new(CLANG);
    command.current_dir(folder);
    command
}

fn output(command: &mut Command) -> std::result::Result<String, String> {
    let output = command.output().map_err(|error| format!("cannot run {CLANG}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// The emulator itself: what a product on matrix units does, and what is refused.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, values};
    use candle_core::{Device, Tensor};

    static MATRIX: Source =
        Source { name: "matrix", text: concat!(include_str!("../../metal.h"), include_str!("matrix.metal")) };

    fn launch(kernel: &'static str, variant: &'static str, arguments: Vec<Argument<CpuStorage>>) -> Result<()> {
        Emulator.launch(Launch {
            source: &MATRIX,
            kernel,
            variant,
            constants: vec![],
            threadgroups: [1, 1, 1],
            threads: [32, 1, 1],
            arguments,
        })
    }

    #[test]
    fn matrices_load_multiply_and_store() -> Result<()> {
        emulated(|| {
            for (dtype, variant) in [(DType::F32, "f32"), (DType::F16, "f16"), (DType::BF16, "bf16")] {
                let mut random = Random::new(1);
                let mut matrix = || random.tensor(&[8, 8], 1.0, dtype, &Device::Cpu);
                let (a, b) = (matrix()?, matrix()?);
                let mut outputs = [Emulator.allocate(64, DType::F32)?, Emulator.allocate(128, DType::F32)?];
                let [y, places] = &mut outputs;
                let operands = [&a, &b].map(crate::cpu::Operand::new);
                let [a_read, b_read] = operands.each_ref().map(|operand| operand.metal::<Emulator>());
                launch("matrix", variant, vec![Argument::Write(y, 0), Argument::Write(places, 0), a_read?, b_read?])?;
                let [y, places] = outputs;
                let y = values(&crate::cpu::tensor(Storage::Cpu(y), 64))?;
                let places = values(&crate::cpu::tensor(Storage::Cpu(places), 128))?;
                let f32 = |x: &Tensor| x.to_dtype(DType::F32);
                let want = values(&(f32(&a)?.matmul(&f32(&b)?.t()?)? + 1.0)?)?;
                assert_close(variant, &y, &want, 1e-6);
                // By lanes, as kernels take matrices apart, and by rows it is the same.
                assert_eq!(places, [values(&a)?, y].concat(), "{variant}");
            }
            Ok(())
        })
    }

    /// What every thread reads that one writes: with a barrier between, and without.
    #[test]
    fn races_are_noticed() -> Result<()> {
        let run = |kernel| {
            let session = Session { sanitizer: Sanitizer::Thread, ..Default::default() };
            session.run(|| launch(kernel, "", vec![Argument::Write(&mut Emulator.allocate(32, DType::F32)?, 0)]))
        };
        if is_available() {
            run("shared")?;
            let error = run("racing").expect_err("a race").to_string();
            assert!(error.contains("data race"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_launch_without_end_is_ended() {
        if is_available() {
            let session = Session { launch_seconds: Some(1), ..Default::default() };
            let run = || launch("endless", "", vec![Argument::Write(&mut Emulator.allocate(32, DType::F32)?, 0)]);
            let error = session.run(run).expect_err("no end").to_string();
            assert!(error.contains("endless, schedule 1: ") && error.contains("s of 1"), "{error}");
        }
    }

    #[test]
    fn what_metal_does_not_grant_is_refused() -> Result<()> {
        emulated(|| {
            for (kernel, expected) in [("divergent", "a part of a simdgroup"), ("too_large", "32 KiB")] {
                let mut y = Emulator.allocate(32, DType::F32)?;
                let error = launch(kernel, "", vec![Argument::Write(&mut y, 0)]).expect_err(kernel).to_string();
                assert!(error.contains(expected), "{kernel}: {error}");
                // The program ends with an error; the next launch starts another.
                SESSION.with_borrow_mut(|session| session.as_mut().expect("running").processes.clear());
            }
            Ok(())
        })
    }
}
