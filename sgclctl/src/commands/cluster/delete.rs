//! `delete`: the object goes once its nodes have committed; the bucket keeps what the run has.

use anyhow::Result;
use kube::api::DeleteParams;

use super::access::Cluster;
use crate::cli::cluster::DeleteArgs;
use crate::exit::Exit;
use crate::output::Out;

pub(crate) async fn delete(args: DeleteArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(&args.cluster).await?;
    for run in &args.runs {
        let deleted = cluster.runs().delete(run, &DeleteParams::background()).await;
        deleted.map_err(|error| cluster.told(error, Some(run)))?;
        out.note(format!("run {run} is deleted once its nodes have committed; its bucket stays"));
    }
    Ok(Exit::Done)
}
