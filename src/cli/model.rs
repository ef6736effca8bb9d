//! The options that name a model and say how to run it.

use std::path::PathBuf;

use candle_core::DType;
use clap::ValueEnum;
use taper::hub::{self, HubOptions};
use taper::{DeviceChoice, EngineOptions, Llm, Options, PackCache, Quantization};

use super::Result;
use super::progress::Bars;

/// Where a model comes from.
#[derive(Debug, clap::Args)]
pub struct SourceArgs {
    /// Branch, tag or commit of a Hub model
    #[arg(long, value_name = "REV", help_heading = "Model")]
    pub revision: Option<String>,
    /// Use only what was downloaded before; make no request
    #[arg(long, help_heading = "Model")]
    pub offline: bool,
}

impl SourceArgs {
    pub fn hub(&self) -> HubOptions {
        let options = HubOptions::from_env();
        HubOptions { revision: self.revision.clone(), offline: self.offline || options.offline, ..options }
    }

    /// The local folder of a model, downloading what is missing.
    pub fn resolve(&self, model: &str) -> Result<PathBuf> {
        Ok(hub::resolve(model, &self.hub(), &mut Bars::default())?)
    }
}

/// How a model runs.
#[derive(Debug, clap::Args)]
pub struct DeviceArgs {
    /// Where to run
    #[arg(long, value_enum, default_value = "auto", help_heading = "Model")]
    pub device: Device,
    /// Precision of activations and cache [default: f32 on the CPU, bf16 elsewhere]
    #[arg(long, value_enum, help_heading = "Model")]
    pub dtype: Option<Dtype>,
}

/// The values of `--device`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
    Metal,
}

/// The values of `--dtype`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

/// The values of `--quant`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Quant {
    /// As they are stored
    None,
    /// 8 bits a weight
    Q8,
    /// 4 bits a weight
    Q4,
}

impl Quant {
    pub fn quantization(self) -> Option<Quantization> {
        match self {
            Self::None => None,
            Self::Q8 => Some(Quantization::Q8),
            Self::Q4 => Some(Quantization::Q4),
        }
    }
}

/// Whether packed weights are kept.
#[derive(Debug, clap::Args)]
pub struct PackCacheArgs {
    /// Pack the weights at every start, instead of keeping packed ones in the folder of TAPER_CACHE [default:
    /// ~/.cache/taper]
    #[arg(long, help_heading = "Model")]
    no_pack_cache: bool,
}

impl PackCacheArgs {
    pub fn cache(&self) -> Option<PackCache> {
        let warn = |message: &str| eprintln!("taper: {message}");
        (!self.no_pack_cache).then(|| PackCache { warn, ..PackCache::from_env() })
    }
}

impl DeviceArgs {
    pub fn choice(&self) -> DeviceChoice {
        match self.device {
            Device::Auto => DeviceChoice::Auto,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Cuda => DeviceChoice::Cuda,
            Device::Metal => DeviceChoice::Metal,
        }
    }

    /// Says so if this build has an accelerator's kernels, none was asked for by name, and the model came to the CPU.
    pub fn note(&self, device: &candle_core::Device) {
        let could = cfg!(any(feature = "cuda", feature = "metal"));
        if could && device.is_cpu() && matches!(self.device, Device::Auto) {
            eprintln!("taper: no GPU that this build can use was found, so the model runs on the CPU");
        }
    }

    pub fn dtype(&self) -> Option<DType> {
        self.dtype.map(|dtype| match dtype {
            Dtype::F32 => DType::F32,
            Dtype::Bf16 => DType::BF16,
            Dtype::F16 => DType::F16,
        })
    }
}

/// A model to load and how.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Hub id such as Qwen/Qwen3-0.6B, or a folder [default: the built-in demo]
    #[arg(short, long, value_name = "MODEL", help_heading = "Model")]
    pub model: Option<String>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Pack the weights while loading: less memory and faster replies, a little less exact
    #[arg(long, value_enum, default_value = "none", help_heading = "Model")]
    quant: Quant,
    #[command(flatten)]
    pack_cache: PackCacheArgs,
    /// Memory for keys, values and states, such as 2GiB [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Model")]
    memory: Option<usize>,
    /// Longest conversation in tokens, if less than the model allows
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    max_context: Option<usize>,
}

impl ModelArgs {
    /// Loads the model; without one, the demo, with a line that says so.
    pub fn load(&self) -> Result<Llm> {
        let engine = EngineOptions { memory: self.memory, max_context: self.max_context, ..EngineOptions::default() };
        let quantization = self.quant.quantization();
        let (device, dtype, hub) = (self.device.choice(), self.device.dtype(), self.source.hub());
        let options = Options { device, dtype, quantization, pack_cache: self.pack_cache.cache(), engine, hub };
        let llm = match &self.model {
            Some(model) => Llm::load_with(model, &options, &mut Bars::default())?,
            None => demo(&options)?,
        };
        self.device.note(llm.engine().device());
        Ok(llm)
    }
}

#[cfg(feature = "demo")]
fn demo(options: &Options) -> Result<Llm> {
    eprintln!("This is the built-in demo, 4 M parameters that know a few facts. For a real model: -m Qwen/Qwen3-0.6B");
    Ok(Llm::demo(options)?)
}

#[cfg(not(feature = "demo"))]
fn demo(_: &Options) -> Result<Llm> {
    Err(super::Error::Usage("no model: this build has no demo, so name one, such as -m Qwen/Qwen3-0.6B".into()))
}

/// Bytes from text such as `800MB`, `2GiB` or `123456`.
fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unit {unit:?}, expected KB, MB, GB, KiB, MiB or GiB")),
    };
    let number: f64 = number.parse().map_err(|_| "expected a number and a unit, such as 2GiB".to_string())?;
    Ok((number * factor) as usize)
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("123"), Ok(123));
        assert_eq!(parse_size("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_size("800 mb"), Ok(800_000_000));
        assert!(parse_size("two").is_err() && parse_size("2 parsecs").is_err() && parse_size("").is_err());
    }
}
