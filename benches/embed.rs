//! Tokens per second of an encoder at equal and at mixed lengths, as stored and in q8, beside torch's.
//!
//! `cargo bench --bench embed -- FOLDER [PYTHON [ROUNDS [TEXTS]]]` with a bge-m3 folder, such as
//! `make_fullsize.py bge-m3` writes, and a Python that has torch and transformers, or - for none. All embed random ids
//! into dense vectors with f32 activations. Every round runs every case with every contender, so that what else the
//! machine does meets all of them; medians count, with the distance between the quartiles. Seconds are those on the
//! clock and those of the process on all its cores, which a busy machine changes less.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use kernels::testing::Random;
use models::Checkpoint;
use support::{cpu_seconds, median};
use taper::{Embedder, EmbedderOptions, Heads, Quantization};

type AnyError = Box<dyn std::error::Error>;

/// Wall and CPU seconds.
type Times = (f64, f64);

fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let Some(folder) = args.next() else {
        println!("no folder given: cargo bench --bench embed -- FOLDER [PYTHON [ROUNDS [TEXTS]]]");
        return Ok(());
    };
    let open = |quantization| {
        let options = EmbedderOptions { heads: Some(Heads::DENSE), quantization, ..EmbedderOptions::default() };
        Embedder::open(&Checkpoint::Folder(folder.clone().into()), &options)
    };
    let mut contenders = vec![
        ("taper", Contender::Taper(Box::new(open(None)?))),
        ("taper q8", Contender::Taper(Box::new(open(Some(Quantization::Q8))?))),
    ];
    if let Some(python) = args.next().filter(|python| python != "-") {
        contenders.push(("torch", Contender::Torch(Torch::start(&python, &folder)?)));
    }
    let rounds = args.next().map_or(Ok(5), |rounds| rounds.parse::<usize>())?.max(1);
    let texts = args.next().map_or(Ok(32), |texts| texts.parse::<usize>())?.max(1);
    let mut random = Random::new(1);
    let mixed: Vec<usize> = (0..texts).map(|_| 8 + random.below(505)).collect();
    let mean = mixed.iter().sum::<usize>() / texts;
    let cases = [
        (format!("{texts} x 128"), vec![128; texts]),
        (format!("{texts} x 512"), vec![512; texts]),
        (format!("{texts} of 8 to 512"), mixed),
        (format!("{texts} x {mean}, their mean"), vec![mean; texts]),
    ];
    let mut times: Vec<Vec<Vec<Times>>> = vec![vec![vec![]; contenders.len()]; cases.len()];
    for _ in 0..rounds {
        for ((_, lengths), times) in cases.iter().zip(&mut times) {
            for ((_, contender), times) in contenders.iter_mut().zip(times) {
                times.push(contender.run(lengths, &mut random)?);
            }
        }
    }
    println!("{:<24} {:<9} {:>8} {:>8} {:>12} {:>8}", "tokens", "", "texts/s", "tok/s", "tok/CPU s", "spread");
    for ((name, lengths), times) in cases.iter().zip(&times) {
        for ((contender, _), times) in contenders.iter().zip(times) {
            let tokens = lengths.iter().sum::<usize>() as f64;
            let (wall, _) = median(times.iter().map(|times| times.0));
            let (cpu, spread) = median(times.iter().map(|times| times.1));
            let (texts, spread) = (texts as f64 / wall, 100.0 * spread);
            let (tokens, each) = (tokens / wall, tokens / cpu);
            println!("{name:<24} {contender:<9} {texts:>8.2} {tokens:>8.0} {each:>12.0} {spread:>6.0} %");
        }
    }
    Ok(())
}

enum Contender {
    Taper(Box<Embedder>),
    Torch(Torch),
}

impl Contender {
    fn run(&mut self, lengths: &[usize], random: &mut Random) -> Result<Times, AnyError> {
        match self {
            Self::Taper(embedder) => taper(embedder, lengths, random),
            Self::Torch(torch) => torch.run(lengths),
        }
    }
}

fn taper(embedder: &Embedder, lengths: &[usize], random: &mut Random) -> Result<Times, AnyError> {
    let mut text = |len: usize| (0..len).map(|_| 5 + random.below(249_995) as u32).collect();
    let texts = lengths.iter().map(|&len| text(len)).collect();
    let (wall, cpu) = (Instant::now(), cpu_seconds());
    embedder.embed_tokens(texts)?;
    Ok((wall.elapsed().as_secs_f64(), cpu_seconds() - cpu))
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
