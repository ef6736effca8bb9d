//! The `taper` command: parse, run one subcommand, exit code.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    kernels::memory::keep_freed();
    match cli::run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("taper: {error}");
            ExitCode::FAILURE
        }
    }
}
