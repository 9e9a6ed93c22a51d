//! `watch`: the runs of a namespace as they go, drawn anew with every change.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use kube::ResourceExt;
use kube::runtime::{WatchStreamExt, watcher};
use sgcl_coordinator::kube::resource::SgclRun;

use super::access::Cluster;
use super::list;
use crate::cli::cluster::WatchArgs;
use crate::exit::Exit;
use crate::output::Out;

pub(crate) async fn watch(args: WatchArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(&args.cluster).await?;
    for name in &args.runs {
        cluster.run(name).await?;
    }
    let mut runs = BTreeMap::<String, SgclRun>::new();
    let wanted = |run: &SgclRun| args.runs.is_empty() || args.runs.contains(&run.name_any());
    let over = |runs: &BTreeMap<String, SgclRun>| {
        !args.runs.is_empty()
            && runs.values().all(|run| run.status.as_ref().is_some_and(|status| status.phase.is_over()))
    };
    let terminal = console::Term::stdout();
    let mut drawn = 0;
    let mut complete = false;
    let mut changes = watcher(cluster.runs(), watcher::Config::default()).default_backoff().boxed();
    while let Some(change) = changes.try_next().await.transpose() {
        let changed = match change {
            Ok(watcher::Event::Init) => {
                runs.clear();
                complete = false;
                None
            }
            Ok(watcher::Event::InitDone) => {
                complete = true;
                None
            }
            Ok(watcher::Event::InitApply(run) | watcher::Event::Apply(run)) if wanted(&run) => {
                runs.insert(run.name_any(), run.clone());
                Some(run)
            }
            Ok(watcher::Event::Delete(run)) => {
                runs.remove(&run.name_any());
                None
            }
            Ok(_) => continue,
            Err(error) => {
                out.note(format!("the cluster does not answer just now: {error}"));
                continue;
            }
        };
        if let (true, Some(run)) = (out.json_progress(), &changed) {
            out.json_line(&list::record(run))?;
        }
        if !out.json_progress() && complete {
            let text = if runs.is_empty() {
                format!("no run in namespace {}", cluster.namespace)
            } else {
                list::table_of(runs.values())
            };
            terminal.clear_last_lines(drawn)?;
            terminal.write_line(&text)?;
            drawn = text.lines().count();
        }
        if complete && over(&runs) {
            break;
        }
    }
    Ok(Exit::Done)
}
