//! `list`: the runs of a bucket, one a line.

use anyhow::Result;
use jiff::Timestamp;
use sgcl_patchset::Store;
use sgcl_runstore::{RunStatus, list_runs};

use super::status::phase;
use crate::cli::ListArgs;
use crate::exit::Exit;
use crate::output::{Out, percent, warn};
use crate::table;

pub(crate) async fn main(args: ListArgs, out: Out) -> Result<Exit> {
    let Some(bucket) = &args.bucket else { return super::cluster::list(&args.cluster, out).await };
    let bucket = Store::open(bucket)?;
    let now = Timestamp::now();
    let mut rows = Vec::new();
    let mut damaged = false;
    for name in list_runs(&bucket).await? {
        match RunStatus::read(&name.store(&bucket)).await {
            Ok(status) if out.json() => out.json_line(&status)?,
            Ok(status) => rows.push([
                status.run.clone(),
                phase(&status, now),
                percent(status.progress),
                format!("{}/{}", status.epoch + 1, status.epochs),
                status.losses.get("loss/total").map_or_else(|| "–".to_owned(), |loss| format!("{loss:.3}")),
                status.created.strftime("%Y-%m-%d %H:%M").to_string(),
            ]),
            Err(e) => {
                damaged = true;
                warn(format!("{name}: {e}"));
            }
        }
    }
    if rows.is_empty() {
        out.note(if out.json() { String::new() } else { format!("no readable run in {bucket}") });
    } else {
        out.data(table::text(&["run", "phase", "done", "epoch", "loss", "created (UTC)"], rows))?;
    }
    Ok(if damaged { Exit::Data } else { Exit::Done })
}
