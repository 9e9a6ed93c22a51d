//! `config`: what a run would be given, before there is a run.

use anyhow::Result;
use serde_json::json;
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::{RunConfig, find_named_sets};

pub(crate) use sgcl_coordinator::kube::prepare::trained_patches;

use crate::cli::{ConfigArgs, ConfigCommand};
use crate::exit::Exit;
use crate::output::{Out, count};

pub(crate) async fn main(args: ConfigArgs, out: Out) -> Result<Exit> {
    match args.command {
        ConfigCommand::Show(source) => {
            let config = RunConfig::load(source.file.as_deref(), &source.set)?;
            if out.json() {
                out.json_line(&config)?;
            } else {
                out.data(yaml(&config)?.trim_end())?;
            }
        }
        ConfigCommand::Check { source, data, ranks } => {
            let config = RunConfig::load(source.file.as_deref(), &source.set)?;
            let mut patches = None;
            if let Some(url) = data {
                let set = PatchSet::open(&url).await?;
                let trained = trained_patches(&config, &set)?;
                config.check_against(trained as u64, ranks as usize)?;
                find_named_sets(&mut config.clone(), &set.manifest().content_id, Store::open).await?;
                patches = Some(trained);
            }
            if out.json() {
                out.json_line(&json!({ "ok": true, "patches": patches, "ranks": ranks }))?;
            } else {
                let fits = patches.map(|n| format!("; it fits {} patches on {ranks} rank(s)", count(n)));
                out.data(format!("the configuration holds together{}", fits.unwrap_or_default()))?;
            }
        }
        ConfigCommand::Schema => out.data(serde_json::to_string_pretty(&RunConfig::json_schema())?)?,
    }
    Ok(Exit::Done)
}

/// The configuration as a file would have it.
pub(crate) fn yaml(config: &RunConfig) -> Result<String> {
    Ok(serde_saphyr::to_string(config)?)
}
