//! `taper bench`: how fast a model runs here, beside what the machine allows.

mod limit;
mod measure;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use kernels::probe::{self, Operands};
use models::{Checkpoint, Config, Description, cache, weights};
use rayon::{ThreadPool, ThreadPoolBuilder};

use signal_hook::consts::SIGINT;

use self::limit::Weights;
use self::measure::{Sample, Subject};
use super::info::bytes_of;
use super::model::{DeviceArgs, PackCacheArgs, Quant, SourceArgs};
use super::{Error, Result};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Hub id or folder, of a language model or an encoder, whose dense head is measured [default: the built-in demo]
    model: Option<String>,
    /// Tokens of a prompt, or of a text for an encoder; 0 for no such test [default: 512, or half the context]
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',')]
    prompt: Vec<usize>,
    /// Tokens that each sequence generates; 0 for no such test
    #[arg(short = 'n', long, value_name = "TOKENS", default_value_t = 32)]
    decode: usize,
    /// Tokens that each sequence holds before the test
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Sequences at once
    #[arg(short, long, value_name = "COUNT", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// How weights are packed
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none")]
    quant: Vec<Quant>,
    /// Threads [default: one for each processor]
    #[arg(short, long, value_name = "COUNT", value_delimiter = ',')]
    threads: Vec<usize>,
    /// How often each test is measured, after one that does not count
    #[arg(short, long, value_name = "COUNT", default_value_t = 3)]
    repetitions: usize,
    /// Print one JSON document with every sample
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    pack_cache: PackCacheArgs,
}

const EXAMPLES: &str = "\
Every list is separated by commas, and each combination is a test: --quant q8,q4 --depth 0,2048 --batch 1,8";

pub fn run(args: &Args) -> Result<ExitCode> {
    args.check()?;
    let checkpoint = match &args.model {
        Some(model) => Checkpoint::Folder(args.source.resolve(model)?),
        None => demo()?,
    };
    let config = Config::read(&checkpoint)?;
    let device = args.device.choice().open()?;
    let dtype = args.device.dtype().unwrap_or_else(|| taper::default_dtype(&device));
    let description = config.describe();
    // Sentence-transformers' list of modules: the model gives vectors.
    let is_encoder = matches!(config, Config::BgeM3(_)) || checkpoint.has("modules.json");
    let prompts = match args.prompt.is_empty() {
        true => vec![512.min(description.max_positions / 2)],
        false => args.prompt.clone(),
    };
    let tests = tests(args, &prompts, is_encoder);
    let Some(longest) = tests.iter().map(Test::context).max() else {
        return Err(Error::Usage("no test is left: --prompt and --decode are 0".into()));
    };
    if longest > description.max_positions {
        let limit = description.max_positions;
        return Err(Error::Usage(format!("a test takes a context of {longest} tokens, the model's is {limit}")));
    }
    let setup = Setup { checkpoint, config, description, device, dtype, is_encoder };
    let tensors = weights::tensor_sizes(&setup.checkpoint)?;
    let weights: Vec<_> = args.quant.iter().map(|quant| setup.weights(&tensors, quant.quantization())).collect();
    let needed = setup.memory(args, longest) * args.quant.len() + weights.iter().map(|it| it.resident).sum::<usize>();
    let free = taper::available_memory(&setup.device);
    if needed > free {
        let [needed, free] = [needed, free].map(|bytes| bytes_of(bytes as u64));
        return Err(Error::Usage(format!(
            "these tests need {needed} of memory and {free} are free: ask for fewer at once"
        )));
    }
    let mut subjects = args
        .quant
        .iter()
        .map(|quant| Subject::load(&setup, args, quant.quantization(), longest))
        .collect::<Result<Vec<_>>>()?;
    let mut bench = Bench::new(args, tests)?;
    let complete = bench.run(args, &setup, &weights, &mut subjects)?;
    let report = report::Report { args, setup: &setup, weights: &weights, bench: &bench, complete };
    match args.json {
        true => println!("{:#}", report.json()),
        false => report.print(),
    }
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) })
}

/// As shells report a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

impl Args {
    fn check(&self) -> Result<()> {
        let counts =
            [("--batch", &self.batch[..]), ("--threads", &self.threads), ("--repetitions", &[self.repetitions])];
        for (name, values) in counts {
            if values.contains(&0) {
                return Err(Error::Usage(format!("{name} is 0, expected 1 or more")));
            }
        }
        match self.batch.iter().find(|&&batch| batch > measure::MAX_BATCH) {
            Some(batch) => Err(Error::Usage(format!("--batch is {batch}, expected {} at most", measure::MAX_BATCH))),
            None => Ok(()),
        }
    }

    fn max_batch(&self) -> usize {
        self.batch.iter().copied().max().unwrap_or(1)
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Test {
    kind: Kind,
    /// Tokens of each sequence.
    tokens: usize,
    depth: usize,
    batch: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Prompt,
    Decode,
    Encode,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Decode => "decode",
            Self::Encode => "encode",
        }
    }
}

impl Test {
    /// Positions that a sequence takes.
    fn context(&self) -> usize {
        match self.kind {
            Kind::Encode => self.tokens,
            // The token that a prompt ends with, or a decode begins with.
            _ => self.depth.saturating_add(self.tokens).saturating_add(2),
        }
    }
}

fn tests(args: &Args, prompts: &[usize], is_encoder: bool) -> Vec<Test> {
    let mut tests = vec![];
    let kind = if is_encoder { Kind::Encode } else { Kind::Prompt };
    let mut kinds: Vec<(Kind, usize)> = prompts.iter().map(|&tokens| (kind, tokens)).collect();
    if !is_encoder {
        kinds.push((Kind::Decode, args.decode));
    }
    kinds.retain(|(_, tokens)| *tokens > 0);
    for &depth in if is_encoder { &[0][..] } else { &args.depth } {
        for &batch in &args.batch {
            tests.extend(kinds.iter().map(|&(kind, tokens)| Test { kind, tokens, depth, batch }));
        }
    }
    tests
}

#[cfg(feature = "demo")]
fn demo() -> Result<Checkpoint> {
    eprintln!("This is the built-in demo. For a real model: taper bench Qwen/Qwen3-0.6B");
    Ok(Checkpoint::Memory("demo", taper_demo::CHAT))
}

#[cfg(not(feature = "demo"))]
fn demo() -> Result<Checkpoint> {
    Err(Error::Usage("no model: this build has no demo, so name one, such as Qwen/Qwen3-0.6B".into()))
}

/// A model and how it runs.
struct Setup {
    checkpoint: Checkpoint,
    config: Config,
    description: Description,
    device: Device,
    dtype: DType,
    is_encoder: bool,
}

impl Setup {
    /// Bytes for keys, values and states that hold every test.
    fn memory(&self, args: &Args, longest: usize) -> usize {
        let specs = &self.description.cache_specs;
        let batch = args.max_batch();
        let sequences = batch + measure::checkpoints(args);
        let blocks = |tokens: usize| tokens.div_ceil(measure::BLOCK) + 3;
        let window = cache::window(specs).map_or(0, |window| {
            let blocks = sequences * blocks(window) + taper::default_step(&self.device) / measure::BLOCK + batch;
            blocks * cache::bytes_per_window_block(specs, measure::BLOCK, self.dtype)
        });
        // An engine gives at most half of its memory to states, and half of the rest to windows.
        2 * sequences * cache::bytes_per_slot(specs)
            + 2 * window
            + batch * blocks(longest) * cache::bytes_per_block(specs, measure::BLOCK, self.dtype)
    }
}

/// Every sample, by what it was taken of.
struct Bench {
    tests: Vec<Test>,
    machines: Vec<Machine>,
    /// `[threads, formats, tests]`
    samples: Vec<Vec<Vec<Vec<Sample>>>>,
}

/// The machine with a number of threads, measured again in every round.
struct Machine {
    threads: usize,
    /// `None`: the pool that everything else runs on.
    pool: Option<ThreadPool>,
    /// Bytes a second.
    bandwidth: Vec<f64>,
    /// Operations a second in f32.
    flops: Vec<f64>,
    /// The same of products with the weights of each format.
    products: Vec<Vec<f64>>,
}

impl Machine {
    fn new(threads: Option<usize>, formats: usize) -> Result<Self> {
        let pool = threads.map(|threads| ThreadPoolBuilder::new().num_threads(threads).build());
        let pool = pool.transpose().map_err(|error| Error::Usage(format!("--threads: {error}")))?;
        let threads = threads.unwrap_or_else(rayon::current_num_threads);
        Ok(Self { threads, pool, bandwidth: vec![], flops: vec![], products: vec![vec![]; formats] })
    }

    /// A disturbance makes a machine look slow, never fast: the best of a few counts.
    fn measure(&mut self, memory: &probe::Memory, weights: &[Weights]) {
        const TIMES: usize = 4;
        let best = |of: &(dyn Fn() -> f64 + Sync)| self.install(|| (0..TIMES).map(|_| of()).fold(0.0, f64::max));
        let bandwidth = best(&|| memory.read_bandwidth());
        let flops = best(&|| probe::peak(Operands::F32));
        let products: Vec<f64> = weights
            .iter()
            .map(|weights| match weights.operands {
                Operands::F32 => flops,
                operands => best(&|| probe::peak(operands)),
            })
            .collect();
        self.bandwidth.push(bandwidth);
        self.flops.push(flops);
        self.products.iter_mut().zip(products).for_each(|(all, peak)| all.push(peak));
    }

    fn install<R: Send>(&self, run: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }
}

impl Bench {
    fn new(args: &Args, tests: Vec<Test>) -> Result<Self> {
        let machines = match args.threads.is_empty() {
            true => vec![Machine::new(None, args.quant.len())?],
            false => {
                let new = |&threads| Machine::new(Some(threads), args.quant.len());
                args.threads.iter().map(new).collect::<Result<_>>()?
            }
        };
        let samples = vec![vec![vec![vec![]; tests.len()]; args.quant.len()]; machines.len()];
        Ok(Self { tests, machines, samples })
    }

    /// Measures everything once in each round, so that a disturbance hits all alike. `false` if Ctrl-C ended it.
    fn run(&mut self, args: &Args, setup: &Setup, weights: &[Weights], subjects: &mut [Subject]) -> Result<bool> {
        let stop = Arc::new(AtomicBool::new(false));
        // The second Ctrl-C does not wait for the end of a step.
        signal_hook::flag::register_conditional_shutdown(SIGINT, INTERRUPTED.into(), stop.clone())?;
        signal_hook::flag::register(SIGINT, stop.clone())?;
        let memory = probe::Memory::new();
        let style = ProgressStyle::with_template("{msg} {bar:24} {pos} of {len}, {eta} left");
        let bar = ProgressBar::new((self.machines.len() * subjects.len() * self.tests.len() * args.repetitions) as u64);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        for round in 0..=args.repetitions {
            for (machine, samples) in self.machines.iter_mut().zip(&mut self.samples) {
                if round > 0 {
                    machine.measure(&memory, weights);
                }
                for ((subject, quant), samples) in subjects.iter_mut().zip(&args.quant).zip(samples) {
                    for (test, samples) in self.tests.iter().zip(samples) {
                        bar.set_message(format!("{} {}", name(*quant), test.kind.name()));
                        let test = if round == 0 { test.warm_up(&setup.device) } else { *test };
                        match machine.install(|| subject.measure(&test, &stop))? {
                            Some(sample) if round > 0 => samples.push(sample),
                            _ => {}
                        }
                        if stop.load(Ordering::Relaxed) {
                            bar.finish_and_clear();
                            return Ok(false);
                        }
                        bar.inc(u64::from(round > 0));
                    }
                }
            }
        }
        bar.finish_and_clear();
        Ok(true)
    }
}

impl Test {
    /// Enough to bring weights and code to where they will be. A GPU loads kernels by the shapes of what they do.
    fn warm_up(&self, device: &Device) -> Self {
        const TOKENS: usize = 8;
        if device.is_cpu() { Self { tokens: self.tokens.min(TOKENS), ..*self } } else { *self }
    }
}

fn name(quant: Quant) -> String {
    quant.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}
