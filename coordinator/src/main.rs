//! `sgcl-coordinator`: the coordinator on Kubernetes. Several replicas run, one leads.

mod probes;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use kube::{Api, Client};
use sgcl_coordinator::kube::controller::{Leader, Runs};
use sgcl_coordinator::kube::{GRPC_PORT, NAMESPACE, lease, resource};
use sgcl_coordinator::metrics::Measures;
use sgcl_coordinator::trust::Refusals;
use sgcl_telemetry::Program;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

/// Coordinates the runs of a namespace: makes nodes of SgclRun objects, and sees them through.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Namespace of the runs
    #[arg(long, env = "POD_NAMESPACE", default_value = NAMESPACE)]
    namespace: String,
    /// Name of this replica, unique among them
    #[arg(long, env = "POD_NAME", default_value = "sgcl-coordinator")]
    name: String,
    /// Port that workers join at, while this replica leads
    #[arg(long, default_value_t = GRPC_PORT)]
    grpc_port: u16,
    /// Port of /healthz, /readyz and /metrics
    #[arg(long, default_value_t = 8080)]
    http_port: u16,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Print the custom resource's definition
    Crd,
}

#[tokio::main]
async fn main() -> ExitCode {
    let program = Program { name: "sgcl-coordinator", version: env!("CARGO_PKG_VERSION"), level: "info", json: true };
    let _telemetry = sgcl_telemetry::init(program, &Handle::current(), std::io::stderr);
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Arguments) -> Result<()> {
    if let Some(Command::Crd) = args.command {
        use std::io::Write as _;
        return Ok(std::io::stdout().lock().write_all(resource::definition()?.as_bytes())?);
    }
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .ok()
        .context("another TLS provider is installed")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let client = Client::try_default().await.context("no access to a cluster")?;
    let (runs, refusals, measures) = (Runs::default(), Refusals::default(), Measures::default());
    let state = probes::State::default();
    let http = listen(args.http_port).await?;
    tokio::spawn(probes::serve(http, state.clone(), runs.clone(), refusals.clone(), measures.clone()));

    let leases = Api::namespaced(client.clone(), &args.namespace);
    state.ready();
    let mut held = tokio::select! {
        held = lease::acquire(leases, &args.name) => held?,
        _ = terminate.recv() => return Ok(()),
    };
    state.leads(held.epoch());
    // Not before: a worker that meets a replica which does not lead is refused at once, and tries again.
    let listener = listen(args.grpc_port).await?;
    let (namespace, me, lease_epoch) = (args.namespace, args.name, held.epoch());
    let leading = Leader { client, namespace, me, listener, lease_epoch, runs, refusals, measures }.lead();
    // Whoever ends first ends the process: what it coordinated goes on without it until the next leader finds it.
    tokio::select! {
        ended = leading => ended,
        reason = held.keep() => Err(anyhow::anyhow!("this replica leads no more: {reason}")),
        _ = terminate.recv() => {
            held.release().await;
            Ok(())
        }
    }
}

/// On all addresses, of both families where there are two.
async fn listen(port: u16) -> Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .await
            .with_context(|| format!("cannot listen on port {port}")),
    }
}
