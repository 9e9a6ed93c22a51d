//! `sgclctl`: the user's command. Local runs embed the coordinator; torch lives in `sgcl-worker` alone.

mod cli;
mod commands;
mod error;
mod exit;
mod output;
mod progress;
mod report;
mod table;
mod worker;

use std::io;
use std::process::ExitCode;

use clap::Parser as _;
use sgcl_telemetry::Program;
use tracing::Instrument as _;

use crate::exit::Exit;
use crate::output::warn;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return show(&anyhow::Error::from(e).context("cannot start the runtime")),
    };
    let program = Program { name: "sgclctl", version: env!("CARGO_PKG_VERSION"), level: "error", json: false };
    let _telemetry = sgcl_telemetry::init(program, runtime.handle(), || LogLine);
    let span = commands::span(&cli.command);
    sgcl_telemetry::begin(&span);
    match runtime.block_on(commands::dispatch(cli).instrument(span)) {
        Ok(exit) => exit.into(),
        Err(e) => show(&e),
    }
}

/// `error:` and `hint:` on standard error.
fn show(error: &anyhow::Error) -> ExitCode {
    // `sgclctl … | head` is no failure.
    if error.chain().any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)) {
        return Exit::Done.into();
    }
    let told = error::tell(error);
    let (label, hint) = (console::style("error:").red().bold(), console::style("hint:").cyan().bold());
    warn(format!("{} {}", label.for_stderr(), told.message));
    if let Some(text) = told.hint {
        warn(format!("{} {text}", hint.for_stderr()));
    }
    told.exit.into()
}

/// Log lines between the bars.
struct LogLine;

impl io::Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        progress::bars().suspend(|| io::stderr().lock().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
