//! What `taper bench` prints.

use serde_json::{Value, json};

use super::limit::Weights;
use super::measure::Sample;
use super::{Args, Bench, Machine, Setup, Test, name};

pub struct Report<'a> {
    pub args: &'a Args,
    pub setup: &'a Setup,
    /// By format.
    pub weights: &'a [Weights],
    pub bench: &'a Bench,
    /// Whether every sample was taken.
    pub complete: bool,
}

/// What was measured of one test.
struct Row<'a> {
    format: String,
    machine: &'a Machine,
    test: &'a Test,
    samples: &'a [Sample],
    /// Tokens a second.
    rates: Vec<f64>,
    /// Tokens a second that the machine allows.
    limit: Option<f64>,
}

impl Report<'_> {
    /// The tests of which there is a sample, in the order of the arguments.
    fn rows(&self) -> Vec<Row<'_>> {
        let mut rows = vec![];
        for (machine, samples) in self.bench.machines.iter().zip(&self.bench.samples) {
            let formats = self.args.quant.iter().zip(self.weights).zip(&machine.products);
            for (((quant, weights), peak), samples) in formats.zip(samples) {
                for (test, samples) in self.bench.tests.iter().zip(samples).filter(|(_, samples)| !samples.is_empty()) {
                    let rates = samples.iter().map(|sample| sample.tokens as f64 / sample.seconds).collect();
                    let is_cpu = self.setup.device.is_cpu();
                    let limit = is_cpu.then(|| self.setup.limit(weights, test, machine, peak));
                    rows.push(Row { format: name(*quant), machine, test, samples, rates, limit });
                }
            }
        }
        rows
    }

    fn device(&self) -> &'static str {
        match self.setup.device.location() {
            candle_core::DeviceLocation::Cpu => "CPU",
            candle_core::DeviceLocation::Cuda { .. } => "CUDA",
            candle_core::DeviceLocation::Metal { .. } => "Metal",
        }
    }

    pub fn print(&self) {
        let Setup { description, dtype, .. } = self.setup;
        let model = self.args.model.as_deref().unwrap_or("demo");
        println!("{model} ({}) on the {}, activations in {}", description.family, self.device(), dtype.as_str());
        println!(
            "{:<6} {:>7} {:>6} {:>6}  {:<13} {:>10} {:>7} {:>9}",
            "quant", "threads", "batch", "depth", "test", "tok/s", "spread", "of limit"
        );
        let rows = self.rows();
        for row in &rows {
            let (median, Test { kind, tokens, depth, batch }) = (median(&row.rates), row.test);
            let share = row.limit.map_or("-".into(), |limit| format!("{:.0}%", median / limit * 100.0));
            println!(
                "{:<6} {:>7} {batch:>6} {depth:>6}  {:<13} {median:>10.2} {:>6.0}% {share:>9}",
                row.format,
                row.machine.threads,
                format!("{} {tokens}", kind.name()),
                (greatest(&row.rates) - least(&row.rates)) / median * 100.0,
            );
        }
        for machine in self.bench.machines.iter().filter(|machine| !machine.bandwidth.is_empty()) {
            let formats = self.args.quant.iter().zip(&machine.products);
            let products: Vec<_> =
                formats.map(|(quant, peak)| format!("{} {:.0}", name(*quant), median(peak) / 1e9)).collect();
            println!(
                "This machine with {} threads reads {:.1} GB/s and multiplies at {:.0} Gop/s in f32, with weights {}.",
                machine.threads,
                median(&machine.bandwidth) / 1e9,
                median(&machine.flops) / 1e9,
                products.join(", ")
            );
        }
        println!(
            "Medians of {} rounds; spread is the distance of the extremes over them.{}",
            self.args.repetitions,
            match rows.iter().any(|row| row.limit.is_some()) {
                true => " The limit is to read weights and cache, or to multiply, at these speeds.",
                false => "",
            }
        );
        if !self.complete {
            println!("Interrupted: not every round was run.");
        }
    }

    pub fn json(&self) -> Value {
        let machines = self.bench.machines.iter().filter(|machine| !machine.bandwidth.is_empty());
        let machines = machines.map(|machine| {
            let formats = self.args.quant.iter().zip(&machine.products);
            let products = formats.map(|(quant, peak)| (name(*quant), summary(peak)));
            json!({
                "threads": machine.threads,
                "read_bytes_per_second": summary(&machine.bandwidth),
                "multiply_add_flops_per_second": summary(&machine.flops),
                "product_operations_per_second": products.collect::<serde_json::Map<_, _>>(),
            })
        });
        let rows = self.rows();
        let results = rows.iter().map(|row| {
            let Test { kind, tokens, depth, batch } = row.test;
            let samples = row.samples.iter().map(|it| json!({ "tokens": it.tokens, "seconds": it.seconds }));
            json!({
                "test": kind.name(),
                "quant": row.format,
                "threads": row.machine.threads,
                "batch": batch,
                "depth": depth,
                "tokens_per_sequence": tokens,
                "tokens_per_second": summary(&row.rates),
                "limit_tokens_per_second": row.limit,
                "share_of_limit": row.limit.map(|limit| median(&row.rates) / limit),
                "samples": samples.collect::<Vec<_>>(),
            })
        });
        let weights = self.args.quant.iter().zip(self.weights);
        let weights = weights.map(|(quant, weights)| {
            json!({ "quant": name(*quant), "bytes": weights.resident, "bytes_read_per_step": weights.read })
        });
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": self.args.model.as_deref().unwrap_or("demo"),
            "family": self.setup.description.family,
            "device": self.device(),
            "dtype": self.setup.dtype.as_str(),
            "repetitions": self.args.repetitions,
            "complete": self.complete,
            "weights": weights.collect::<Vec<_>>(),
            "machine": machines.collect::<Vec<_>>(),
            "results": results.collect::<Vec<_>>(),
        })
    }
}

fn summary(values: &[f64]) -> Value {
    json!({ "median": median(values), "min": least(values), "max": greatest(values), "samples": values })
}

/// Of an even number the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn greatest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}
