//! `suspend`, `cancel` and `drain`: an order to a run under way, put where its coordinator looks, and the answer waited for.

use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use serde_json::json;
use sgcl_patchset::Store;
use sgcl_runstore::{EventKind, Events, Lease, Order, Orders, Phase};
use tokio::time::Instant;

use crate::cli::OrderArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(300);
/// A coordinator that lives answers within so much.
const ANSWER: Duration = Duration::from_secs(20);

pub(crate) async fn main(args: OrderArgs, order: Order, out: Out) -> Result<Exit> {
    let (run, spec) = super::existing(&args.bucket.bucket, &args.run).await?;
    let name = &spec.run;
    let told = |phase: Phase| -> Result<Exit> {
        if out.json() {
            out.json_line(&json!({ "run": name, "order": &order, "phase": phase }))?;
        } else {
            out.note(format!("run {name}: {}", phase.word()));
        }
        Ok(Exit::Done)
    };
    let phase = Phase::read(&run).await?;
    match (&order, phase) {
        (_, Phase::Running) => {}
        (Order::Suspend, Phase::Suspended) | (Order::Cancel, Phase::Cancelled) => return told(phase),
        // Nobody coordinates it; taking the lease makes sure.
        (Order::Cancel, Phase::Pending | Phase::Suspended | Phase::Failed) => {
            Lease::take(&run, "sgclctl cancel", Timestamp::now()).await?;
            Events::new(&run).append(EventKind::Cancelled, Timestamp::now()).await?;
            return told(Phase::Cancelled);
        }
        _ => {
            let message = format!("run {name} is {}: there is nothing to {order}", phase.word());
            return Err(Failure::new(Exit::Data, message).hint("`sgclctl status` says how a run stands").into());
        }
    }
    let seq = Orders::new(&run).give(order.clone(), Timestamp::now()).await?;
    let spinner = progress::spinner(out, format!("{order}: waiting for the run's coordinator"));
    answered(&run, seq, &spec.run.to_string()).await?;
    let ended = match order {
        Order::Drain { .. } => Phase::Running,
        Order::Suspend | Order::Cancel => {
            spinner.set_message(format!("{order}: waiting for the run to end"));
            ended(&run).await?
        }
    };
    spinner.finish_and_clear();
    told(ended)
}

/// Waits until the coordinator has taken the order.
async fn answered(run: &Store, seq: u64, name: &str) -> Result<()> {
    let until = Instant::now() + ANSWER;
    while Instant::now() < until {
        for event in Events::new(run).read().await? {
            match event.kind {
                EventKind::Ordered { seq: of, refused: Some(why), .. } if of == seq => {
                    return Err(Failure::new(Exit::Data, why).hint("give a node's name, or its slot: a number").into());
                }
                EventKind::Ordered { seq: of, .. } if of == seq => return Ok(()),
                _ => {}
            }
        }
        tokio::time::sleep(EVERY).await;
    }
    Err(Failure::new(Exit::Unavailable, format!("nobody coordinates run {name}: no answer in {} s", ANSWER.as_secs()))
        .hint("the process that trained it is gone; `sgclctl resume` goes on from the newest commit")
        .into())
}

/// Waits until the run is no longer running. A run that suspends finishes its step and commits first.
async fn ended(run: &Store) -> Result<Phase> {
    loop {
        match Phase::read(run).await? {
            Phase::Running | Phase::Pending => tokio::time::sleep(EVERY).await,
            phase => return Ok(phase),
        }
    }
}
