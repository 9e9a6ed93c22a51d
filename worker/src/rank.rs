//! A rank, from assignment to export.

pub(crate) mod bare;
mod checkpoint;
mod fill;
mod loader;
mod metrics;
mod probe;
mod reunite;
mod ring;
mod setup;
mod step;
mod tensors;
mod train;
mod wait;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use nix::sys::signal::Signal;
use sgcl::collective::CollectiveError;
use sgcl::kmeans::KMeansError;
use sgcl::objective::StepError;
use sgcl_patchset::{ReadError, StoreError};
use sgcl_proto::{exit, v1};
use sgcl_runstore::RunStoreError;
use sgcl_telemetry::fact;
use tokio::runtime::Handle;

use crate::measures;
use crate::session::{BrokenOff, Session};
use train::End;

/// Arguments of `sgcl-worker rank`.
#[derive(Args, Debug)]
pub(crate) struct RankArgs {
    /// URL of the coordinator
    #[arg(long)]
    coordinator: String,
    /// Name of the run
    #[arg(long)]
    run: String,
    /// Name of the node that this rank is on
    #[arg(long)]
    node: String,
    /// Number on the node, from 0
    #[arg(long)]
    local_rank: u32,
    /// Count of the processes started in this place before
    #[arg(long)]
    attempt: u32,
    /// Address at which other nodes' ranks reach this one
    #[arg(long)]
    address: String,
    /// Report measures on standard output, a line a second
    #[arg(long, hide = true)]
    measures: bool,
}

/// Trains until the run is over, stopped or lost, and tells the coordinator which.
pub(crate) fn main(runtime: &Handle, args: &RankArgs) -> ExitCode {
    fact("run", args.run.clone());
    fact("node", args.node.clone());
    let span = tracing::info_span!("rank", run = args.run, node = args.node, local_rank = args.local_rank);
    sgcl_telemetry::begin(&span);
    let _under_way = span.entered();
    if args.measures {
        measures::report(runtime);
    }
    // A rank without its supervisor would hold a device for nobody.
    if let Err(error) = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL) {
        tracing::warn!(%error, "this rank will outlive its supervisor");
    }
    let hello = v1::RankHello {
        run: args.run.clone(),
        node: args.node.clone(),
        local_rank: args.local_rank,
        attempt: args.attempt,
        member: None,
    };
    let (mut session, welcome) = match Session::open(runtime, &args.coordinator, hello) {
        Ok(open) => open,
        Err(error) => {
            tracing::error!("{error:#}");
            return ExitCode::from(exit::INTERNAL);
        }
    };
    match work(runtime, args, &mut session, &welcome) {
        Ok(stopped) => {
            session.finished(stopped);
            ExitCode::from(exit::DONE)
        }
        Err(error) => {
            let code = exit_code(&error);
            tracing::error!("{error:#}");
            session.failed(format!("{error:#}"), code);
            ExitCode::from(code)
        }
    }
}

/// Generation after generation, with what this rank holds. True where the run was stopped before its end.
fn work(runtime: &Handle, args: &RankArgs, session: &mut Session, welcome: &v1::Welcome) -> Result<bool> {
    let mut trainer = setup::prepare(runtime, args.local_rank, &args.address, welcome)?;
    let mut broken = None;
    loop {
        let assignment = session.assignment(trainer.step(), broken.take())?;
        let end = trainer.join(session, &assignment).and_then(|()| trainer.train(session));
        match end {
            Ok(End::Finished) => return Ok(false),
            Ok(End::Stopped) => return Ok(true),
            Ok(End::Paused) => {}
            Err(error) if is_broken(&error) => {
                tracing::warn!(generation = assignment.generation, "{error:#}");
                broken = Some(format!("{error:#}"));
            }
            Err(error) => return Err(error),
        }
        trainer.leave();
    }
}

/// Whether the ring is what failed: another generation may do better, and this rank's state is as it was.
fn is_broken(error: &anyhow::Error) -> bool {
    let ring = |error: &CollectiveError| matches!(error, CollectiveError::Backend { .. });
    error.chain().any(|cause| {
        cause.is::<BrokenOff>()
            || cause.downcast_ref().is_some_and(ring)
            || cause.downcast_ref().is_some_and(sgcl_c10d::Error::regroup_may_help)
            || matches!(cause.downcast_ref(), Some(StepError::Ring(error)) if ring(error))
            || matches!(cause.downcast_ref(), Some(KMeansError::Collective(error)) if ring(error))
    })
}

/// What a failure means to whoever restarts ranks: the user's to mend, or worth another try.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        let store = match (cause.downcast_ref::<RunStoreError>(), cause.downcast_ref::<ReadError>()) {
            (Some(RunStoreError::Store(store)), _) | (_, Some(ReadError::Store(store))) => Some(store),
            _ => cause.downcast_ref::<StoreError>(),
        };
        match store {
            Some(StoreError::NoSpace { .. }) => return exit::CANNOT_CREATE,
            Some(StoreError::NoBucket { .. } | StoreError::NoCredentials { .. }) => return exit::UNAVAILABLE,
            Some(store) if !store.is_permanent() => return exit::INTERNAL,
            _ => {}
        }
        if cause.is::<sgcl_runstore::ConfigError>() || cause.is::<sgcl::objective::ParamsError>() {
            return exit::CONFIG;
        }
        if cause.is::<sgcl_patchset::ManifestError>()
            || cause.is::<sgcl_patchset::IndexError>()
            || cause.is::<ReadError>()
            || cause.is::<sgcl::weights::WeightsError>()
            || cause.is::<sgcl::probe::ProbeError>()
        {
            return exit::DATA;
        }
    }
    exit::INTERNAL
}
