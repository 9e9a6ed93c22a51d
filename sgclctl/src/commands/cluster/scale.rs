//! `scale`: another number of nodes.

use anyhow::Result;
use serde_json::json;

use super::access::Cluster;
use super::wishes::patch;
use crate::cli::cluster::ScaleArgs;
use crate::exit::Exit;
use crate::output::Out;

pub(crate) async fn scale(args: ScaleArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(&args.cluster).await?;
    let mut spec = json!({ "nodes": args.nodes });
    if let Some(min_nodes) = args.min_nodes {
        spec["minNodes"] = json!(min_nodes);
    }
    patch(&cluster, &args.run, &spec).await?;
    out.note(format!("run {} goes on with {} node(s) after its next commit", args.run, args.nodes));
    Ok(Exit::Done)
}
