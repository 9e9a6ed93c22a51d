//! A run's place in the bucket: made the first time, found again afterwards.

use std::path::Path;

use anyhow::Result;
use jiff::Timestamp;
use sgcl_patchset::{PatchSet, Store, StoreError};
use sgcl_runstore::{ConfigError, NamedSetError, RunConfig, RunStoreError, Spec, find_named_sets};

use super::plan::Plan;

/// Where the Secret with the bucket's keys is mounted, a file a key.
const KEYS: &str = "/var/run/sgcl/bucket";

/// What keeps a run from being prepared.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The user's to mend: trying again would fail again.
    #[error("{0}")]
    Mend(String),
    /// May pass, or be mended elsewhere.
    #[error("{0}")]
    Later(String),
}

/// A run that can be coordinated.
pub struct Prepared {
    /// What to train.
    pub spec: Spec,
    /// The run's part of the bucket.
    pub store: Store,
    /// What the object asks for that the run, once begun, cannot do.
    pub ignored: Option<String>,
}

/// Finds the run's spec, or makes it. `uid` is the object's: a run of that name that another object made is not touched.
///
/// # Errors
/// [`Refusal`].
pub async fn prepare(plan: &Plan, uid: &str) -> Result<Prepared, Refusal> {
    let (store, found) = look(plan).await?;
    let stored = match found {
        Some(stored) => stored,
        None => create(plan, uid, &store).await?,
    };
    compared(plan, uid, stored, store)
}

/// Finds the spec of a run that has been trained.
///
/// # Errors
/// [`Refusal`]: it is not in the bucket any more, among others.
pub async fn find(plan: &Plan, uid: &str) -> Result<Prepared, Refusal> {
    let (store, found) = look(plan).await?;
    let gone = || Refusal::Mend(format!("{} has no run named {} any more", plan.bucket, plan.run));
    compared(plan, uid, found.ok_or_else(gone)?, store)
}

/// The run's part of the bucket, and its spec if it has one.
async fn look(plan: &Plan) -> Result<(Store, Option<Spec>), Refusal> {
    let bucket = open(plan, &plan.bucket).map_err(|e| refused("bucket", e))?;
    let store = plan.run.store(&bucket);
    let found = Spec::find(&store).await.map_err(|e| Refusal::Later(format!("bucket: {e}")))?;
    Ok((store, found))
}

/// What is wanted of a run that is there, as far as it can be had.
fn compared(plan: &Plan, uid: &str, stored: Spec, store: Store) -> Result<Prepared, Refusal> {
    if stored.write_id != uid {
        return Err(Refusal::Mend(format!(
            "{} has a run named {} already, which another SgclRun or a local run made; submit under another name",
            plan.bucket, plan.run
        )));
    }
    let wanted = Spec {
        nodes: plan.nodes,
        min_nodes: plan.min_nodes,
        ranks_per_node: plan.ranks_per_node,
        config: plan.config.clone(),
        ..stored.clone()
    };
    match stored.check_resume(&wanted, &store) {
        Ok(()) => Ok(Prepared { spec: wanted, store, ignored: None }),
        Err(RunStoreError::SpecDiffers { differences, .. }) => {
            let ignored = format!("the run goes on as it began, without these changes: {}", differences.join("; "));
            Ok(Prepared { spec: Spec { config: stored.config, ..wanted }, store, ignored: Some(ignored) })
        }
        Err(error) => Err(Refusal::Mend(error.to_string())),
    }
}

/// A URL that cannot be is the user's to mend; keys that are not there yet may come.
fn refused(what: &str, error: StoreError) -> Refusal {
    let message = format!("{what}: {error}");
    if matches!(error, StoreError::BadUrl { .. }) { Refusal::Mend(message) } else { Refusal::Later(message) }
}

/// Opens a URL as it is now: endpoint and region as the defaults say, keys as they are mounted, all else as this process has it.
fn open(plan: &Plan, url: &str) -> Result<Store, StoreError> {
    Store::open_with_env(url, &|name| {
        let told = match name {
            "AWS_ENDPOINT_URL" => plan.pods.s3_endpoint.clone(),
            "AWS_REGION" => plan.pods.s3_region.clone(),
            "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" | "AWS_SESSION_TOKEN" => {
                std::fs::read_to_string(Path::new(KEYS).join(name)).ok().map(|key| key.trim().to_owned())
            }
            _ => None,
        };
        told.or_else(|| std::env::var(name).ok())
    })
}

async fn create(plan: &Plan, uid: &str, store: &Store) -> Result<Spec, Refusal> {
    let later = |e: anyhow::Error| Refusal::Later(format!("dataset {}: {e:#}", plan.dataset));
    let at = open(plan, &plan.dataset).map_err(|e| refused("dataset", e))?;
    let set = PatchSet::load(at).await.map_err(|e| later(e.into()))?;
    let patches = trained_patches(&plan.config, &set).map_err(|e| Refusal::Mend(e.to_string()))?;
    plan.config.check_against(patches as u64, plan.world()).map_err(|e| Refusal::Mend(e.to_string()))?;
    let id = set.manifest().content_id.clone();
    let (nodes, ranks, least) = (plan.nodes, plan.ranks_per_node, plan.min_nodes);
    let mut config = plan.config.clone();
    match find_named_sets(&mut config, &id, |url| open(plan, url)).await {
        Ok(()) => {}
        Err(NamedSetError::Store(error)) => return Err(refused("a named patch set", error)),
        Err(error) => return Err(Refusal::Mend(error.to_string())),
    }
    let mut spec = Spec::new(plan.run.clone(), set.store().url(), id, nodes, ranks, least, config, Timestamp::now());
    uid.clone_into(&mut spec.write_id);
    match spec.create(store).await {
        Ok(()) => Ok(spec),
        // Another coordinator of this object was faster, or another object has the name: the caller compares.
        Err(RunStoreError::SpecDiffers { .. }) => {
            Spec::read(store).await.map_err(|e| Refusal::Later(format!("bucket: {e}")))
        }
        Err(error) => Err(Refusal::Later(format!("bucket: {error}"))),
    }
}

/// Patches that `config` trains on.
///
/// # Errors
/// Its choice of slides does not fit the set.
pub fn trained_patches(config: &RunConfig, set: &PatchSet) -> Result<usize, ConfigError> {
    let slides = &set.manifest().slides;
    let names: Vec<&str> = slides.iter().map(|slide| slide.name.as_str()).collect();
    let split = config.data.split(&names)?;
    Ok(split.train.iter().map(|&slide| slides[slide].patches as usize).sum())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kube::defaults::Defaults;
    use crate::kube::resource::SgclRunSpec;

    fn plan(bucket: &std::path::Path, epochs: u32) -> Plan {
        let config = serde_json::json!({ "epochs": epochs }).as_object().cloned();
        let spec = SgclRunSpec { nodes: 2, config, ..SgclRunSpec::default() };
        let url = |name: &str| Some(bucket.join(name).display().to_string());
        let image = Some("i".into());
        let defaults = Defaults { bucket: url("runs"), dataset: url("patches"), image, ..Defaults::default() };
        Plan::of("first", &spec, &defaults).unwrap()
    }

    async fn begun(plan: &Plan, uid: &str) {
        let store = plan.run.store(&Store::open(&plan.bucket).unwrap());
        let mut spec = Spec::new(plan.run.clone(), "d", "id", 2, 1, 1, plan.config.clone(), Timestamp::now());
        uid.clone_into(&mut spec.write_id);
        spec.create(&store).await.unwrap();
    }

    #[tokio::test]
    async fn a_run_that_another_object_made_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path(), 3);
        begun(&plan, "theirs").await;
        assert!(matches!(prepare(&plan, "ours").await, Err(Refusal::Mend(text)) if text.contains("another name")));
    }

    #[tokio::test]
    async fn what_a_begun_run_computes_cannot_change_and_that_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let asked = plan(folder.path(), 3);
        begun(&asked, "ours").await;
        let same = prepare(&Plan { nodes: 5, ..asked }, "ours").await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((same.spec.nodes, same.ignored), (5, None));
        let other = prepare(&plan(folder.path(), 9), "ours").await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(other.spec.config.epochs, 3);
        assert!(other.ignored.unwrap().contains("epochs"));
    }

    #[tokio::test]
    async fn a_trained_run_is_found_and_never_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path(), 3);
        assert!(matches!(find(&plan, "ours").await, Err(Refusal::Mend(text)) if text.contains("any more")));
        begun(&plan, "ours").await;
        assert_eq!(find(&plan, "ours").await.unwrap_or_else(|e| panic!("{e}")).spec.config.epochs, 3);
    }

    #[tokio::test]
    async fn a_patch_set_that_is_not_there_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let refused = prepare(&plan(folder.path(), 3), "ours").await;
        assert!(matches!(refused, Err(Refusal::Later(text)) if text.contains("dataset")));
    }
}
