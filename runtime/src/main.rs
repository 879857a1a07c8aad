//! `dsv4-run`: see `dsv4-run --help`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match dsv4_run::verbs::run(dsv4_run::cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            dsv4_run::terminal::tell(&format!("error: {error}\n"));
            ExitCode::from(error.exit_code())
        }
    }
}
