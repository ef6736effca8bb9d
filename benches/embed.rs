//! Texts and tokens per second of an encoder at equal and at mixed lengths, beside torch's.
//!
//! `cargo bench --bench embed -- FOLDER [PYTHON [ROUNDS]]` with a bge-m3 folder, such as `make_fullsize.py bge-m3`
//! writes, and a Python that has torch and transformers. Both contenders embed random ids into dense vectors in f32; rounds alternate
//! between them and the median counts. Seconds are those on the clock and those of the process on all its cores, which
//! a busy machine changes less.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use kernels::testing::Random;
use models::Checkpoint;
use taper::{Embedder, EmbedderOptions, Heads};

type AnyError = Box<dyn std::error::Error>;

/// Wall and CPU seconds.
type Times = (f64, f64);

fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let Some(folder) = args.next() else {
        println!("no folder given: cargo bench --bench embed -- FOLDER [PYTHON [ROUNDS]]");
        return Ok(());
    };
    let options = EmbedderOptions { heads: Some(Heads::DENSE), ..EmbedderOptions::default() };
    let embedder = Embedder::open(&Checkpoint::Folder(folder.clone().into()), &options)?;
    let mut torch = args.next().map(|python| Torch::start(&python, &folder)).transpose()?;
    let rounds = args.next().map_or(Ok(3), |rounds| rounds.parse::<usize>())?.max(1);
    let mut random = Random::new(1);
    let mixed: Vec<usize> = (0..32).map(|_| 8 + random.below(505)).collect();
    let cases = [("32 x 128", vec![128; 32]), ("mixed 8..512", mixed), ("32 x 512", vec![512; 32])];
    println!("{:<14} {:<6} {:>8} {:>10} {:>16}", "tokens", "", "texts/s", "tok/s", "tok/CPU second");
    for (name, lengths) in cases {
        let (mut ours, mut theirs) = (vec![], vec![]);
        for _ in 0..rounds {
            ours.push(taper(&embedder, &lengths, &mut random)?);
            if let Some(torch) = &mut torch {
                theirs.push(torch.run(&lengths)?);
            }
        }
        for (contender, times) in
            [("taper", ours), ("torch", theirs)].into_iter().filter(|(_, times)| !times.is_empty())
        {
            let (wall, cpu) = (median(times.iter().map(|times| times.0)), median(times.iter().map(|times| times.1)));
            let tokens = lengths.iter().sum::<usize>() as f64;
            let (texts, tokens, each) = (lengths.len() as f64 / wall, tokens / wall, tokens / cpu);
            println!("{name:<14} {contender:<6} {texts:>8.2} {tokens:>10.0} {each:>16.0}");
        }
    }
    Ok(())
}

fn taper(embedder: &Embedder, lengths: &[usize], random: &mut Random) -> Result<Times, AnyError> {
    let mut text = |len: usize| (0..len).map(|_| 5 + random.below(249_995) as u32).collect();
    let texts = lengths.iter().map(|&len| text(len)).collect();
    let (wall, cpu) = (Instant::now(), cpu_seconds());
    embedder.embed_tokens(texts)?;
    Ok((wall.elapsed().as_secs_f64(), cpu_seconds() - cpu))
}

/// Of this process, from Linux; NaN elsewhere.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
    if ticks.len() == 2 { (ticks[0] + ticks[1]) / TICKS_PER_SECOND } else { f64::NAN }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Torch {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Torch {
    fn start(python: &str, folder: &str) -> Result<Self, AnyError> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/embed_torch.py");
        let mut command = Command::new(python);
        let mut child = command.args([script, folder]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("no pipes".into());
        };
        let mut torch = Self { child, input, output: BufReader::new(output) };
        println!("torch: {}", torch.line()?.trim());
        Ok(torch)
    }

    fn line(&mut self) -> Result<String, AnyError> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err("torch has ended".into());
        }
        Ok(line)
    }

    fn run(&mut self, lengths: &[usize]) -> Result<Times, AnyError> {
        let lengths: Vec<String> = lengths.iter().map(usize::to_string).collect();
        writeln!(self.input, "{}", lengths.join(" "))?;
        let line = self.line()?;
        let times: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        Ok((times[0], times[1]))
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}
