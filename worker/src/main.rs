//! `sgcl-worker`: what runs on a node. `node` supervises and calls no torch, `rank` trains, `eval`, `evaluation` and `segmentation` evaluate
//! encoders, `embed` and `embedding` write features of slides.

mod dial;
mod embed;
mod encoder;
mod eval;
mod measures;
mod metrics;
mod rank;
mod session;
mod supervisor;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use sgcl_proto::exit;
use sgcl_telemetry::Program;
use tokio::runtime::Runtime;

/// Node supervisor, rank process and feature probes of sgcl. Started by `sgclctl` and the coordinator.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Supervise the ranks of a node
    Node(supervisor::NodeArgs),
    /// Train as one rank
    Rank(rank::RankArgs),
    /// Evaluate encoders on a labelled patch set; JSON lines on standard output
    Eval(eval::EvalArgs),
    /// Make an evaluation that a run's configuration names and keep it with the run; JSON lines on standard output
    Evaluation(eval::named::EvaluationArgs),
    /// Train segmentation on encoders and validate it; JSON lines on standard output
    Segmentation(eval::segmentation::SegmentationArgs),
    /// Write features of slides in TRIDENT's and CLAM's layouts; JSON lines on standard output
    Embed(embed::EmbedArgs),
    /// Make an embedding that a run's configuration names and keep it with the run; JSON lines on standard output
    Embedding(embed::named::EmbeddingArgs),
    /// Train as one rank of a world without coordinator, metrics and commits; seconds of each step's end on standard output
    #[command(hide = true)]
    Bare(rank::bare::BareArgs),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: cannot start the runtime: {error}");
            return ExitCode::from(exit::INTERNAL);
        }
    };
    let program = Program { name: "sgcl-worker", version: env!("CARGO_PKG_VERSION"), level: "info", json: false };
    let _telemetry = sgcl_telemetry::init(program, runtime.handle(), std::io::stderr);
    match run(&runtime, arguments.command) {
        Ok(code) => code,
        Err(error) => {
            // Standard error is gone: nobody is left to tell.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            let known = embed::exit_code(&error).or_else(|| eval::exit_code(&error));
            ExitCode::from(known.unwrap_or_else(|| rank::exit_code(&error)))
        }
    }
}

fn run(runtime: &Runtime, command: Command) -> Result<ExitCode> {
    match command {
        Command::Node(args) => runtime.block_on(supervisor::main(&args)),
        Command::Rank(args) => Ok(rank::main(runtime.handle(), &args)),
        Command::Eval(args) => {
            eval::main(runtime.handle(), &args, printed())?;
            Ok(ExitCode::from(exit::DONE))
        }
        Command::Evaluation(args) => {
            eval::named::main(runtime.handle(), &args, printed())?;
            Ok(ExitCode::from(exit::DONE))
        }
        Command::Segmentation(args) => {
            eval::segmentation::main(runtime.handle(), &args, printed())?;
            Ok(ExitCode::from(exit::DONE))
        }
        Command::Embed(args) => {
            embed::main(runtime.handle(), &args, printed())?;
            Ok(ExitCode::from(exit::DONE))
        }
        Command::Embedding(args) => {
            embed::named::main(runtime.handle(), &args, printed())?;
            Ok(ExitCode::from(exit::DONE))
        }
        Command::Bare(args) => {
            rank::bare::main(runtime.handle(), &args, &mut std::io::stdout().lock())?;
            Ok(ExitCode::from(exit::DONE))
        }
    }
}

/// Prints an object a line.
fn printed() -> impl FnMut(serde_json::Value) {
    let mut out = std::io::stdout().lock();
    move |line| {
        // The reader is gone: the work is for nobody, but harmless.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
