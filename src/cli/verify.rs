//! `taper verify`: compare a model with reference outputs from transformers.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use models::Checkpoint;
use taper::verify::{Report, verify};

use super::model::{DeviceArgs, SourceArgs};
use super::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hub id or folder
    model: String,
    /// File made by tests/fixtures/make_reference.py
    reference: PathBuf,
    /// Write every computed array to this safetensors file
    #[arg(long, value_name = "FILE")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let checkpoint = Checkpoint::Folder(args.source.resolve(&args.model)?);
    let device = args.device.choice().open()?;
    let dtype = args.device.dtype().unwrap_or(DType::F32);
    let report = verify(&checkpoint, &args.reference, dtype, &device)?;
    println!("{:<28} {:>10} {:>10}  limit", "array", "rms", "largest");
    for entry in &report.entries {
        let mark = if entry.passed { "" } else { "  FAILED" };
        println!("{:<28} {:>10.2e} {:>10.2e}  {}{mark}", entry.name, entry.rms, entry.largest, entry.limit);
    }
    if let Some(path) = &args.dump {
        dump(&report, path)?;
    }
    let failed = report.entries.iter().filter(|entry| !entry.passed).count();
    println!("{} arrays compared, {failed} beyond their limit", report.entries.len());
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes the arrays whole or not at all.
fn dump(report: &Report, path: &Path) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = candle_core::safetensors::save(&report.computed, &partial)
        .map_err(Error::from)
        .and_then(|()| Ok(std::fs::rename(&partial, path)?));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial); // the first error is the one to report
    }
    written
}
