//! Patch sets that a run's configuration names beside its data, for its probe, evaluations and embeddings: found and checked before the run
//! begins.

use sgcl_patchset::split::{self, SplitFileError, TEST_FRACTION};
use sgcl_patchset::{IndexError, Labelled, ManifestError, OpenError, PatchSet, Store, StoreError};

use crate::config::{ConfigError, RunConfig};

const KEY: &str = "probe.dataset";

/// A patch set that a configuration names and that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NamedSetError {
    /// It is missing or unfit.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn unfit(key: &str, url: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError::NamedSet { key: key.to_owned(), url: url.to_owned(), reason: reason.into() }
}

/// The patch set at `url`, which the configuration names under `key`.
async fn named(
    key: &str,
    url: &str,
    open: impl FnOnce(&str) -> Result<Store, StoreError>,
) -> Result<PatchSet, NamedSetError> {
    let wrong = |reason: String| unfit(key, url, reason);
    let storage = |error: StoreError| match error {
        StoreError::BadUrl { .. } | StoreError::NoBucket { .. } => wrong(error.to_string()).into(),
        error => NamedSetError::from(error),
    };
    PatchSet::load(open(url).map_err(storage)?).await.map_err(|error| match error {
        OpenError::Manifest(ManifestError::Store(e)) | OpenError::Index(IndexError::Store(e)) => storage(e),
        OpenError::Store(e) => storage(e),
        error => wrong(error.to_string()).into(),
    })
}

/// The same of one that must have labels.
async fn labelled(
    key: &str,
    url: &str,
    open: impl FnOnce(&str) -> Result<Store, StoreError>,
) -> Result<PatchSet, NamedSetError> {
    let set = named(key, url, open).await?;
    if !set.index().is_labelled() {
        let reason = "no patch has a label; name a set of class folders, or of slides with label maps beside them";
        return Err(unfit(key, url, reason).into());
    }
    Ok(set)
}

/// Finds the patch sets that `config` names, checks each, and puts its full URL in its place; `data` is the content id of the set that is
/// trained on.
///
/// # Errors
/// [`ConfigError::NamedSet`] of the first that cannot be used; storage.
pub async fn find_named_sets(
    config: &mut RunConfig,
    data: &str,
    open: impl Fn(&str) -> Result<Store, StoreError>,
) -> Result<(), NamedSetError> {
    if let Some(probe) = ProbeSet::open(config, data, &open).await? {
        config.probe.dataset = Some(probe.set.store().url().to_owned());
    }
    for (at, evaluation) in config.evaluations.iter_mut().enumerate() {
        let key = format!("evaluations[{at}].dataset");
        evaluation.dataset = labelled(&key, &evaluation.dataset, &open).await?.store().url().to_owned();
    }
    for (at, embedding) in config.embeddings.iter_mut().enumerate() {
        let key = format!("embeddings[{at}].dataset");
        embedding.dataset = named(&key, &embedding.dataset, &open).await?.store().url().to_owned();
    }
    Ok(())
}

/// A probe's patches.
#[derive(Clone, Debug)]
pub struct ProbeSet {
    /// The set that they are of.
    pub set: PatchSet,
    /// Which they are, and their split by slide.
    pub patches: Labelled,
}

impl ProbeSet {
    /// The set that `config` names, if it names one; `data` is the content id of the set that is trained on.
    ///
    /// # Errors
    /// [`ConfigError::NamedSet`] where there is no such set, where it has no labels or too many labelled patches, or where its split leaves
    /// too little to learn from or nothing to test on; storage.
    pub async fn open(
        config: &RunConfig,
        data: &str,
        open: impl FnOnce(&str) -> Result<Store, StoreError>,
    ) -> Result<Option<Self>, NamedSetError> {
        let Some(url) = &config.probe.dataset else { return Ok(None) };
        let set = labelled(KEY, url, open).await?;
        let wrong = |reason: String| ConfigError::NamedSet { key: KEY.to_owned(), url: url.clone(), reason };
        let (manifest, index) = (set.manifest(), set.index());
        let probe = &config.probe;
        let names: Vec<&str> = manifest.slides.iter().map(|slide| slide.name.as_str()).collect();
        // Of another set the slides that `data.slides` names may not be there.
        let held_out =
            config.data.holdout_fraction > 0.0 && (manifest.content_id == data || config.data.slides.is_none());
        let test = if held_out {
            let held_out = config.data.split(&names).map_err(|error| wrong(error.to_string()))?.held_out;
            held_out.into_iter().filter_map(|slide| u32::try_from(slide).ok()).collect()
        } else {
            match split::stored(set.store(), manifest, index).await {
                Ok(Some(split)) => split.test,
                Ok(None) => {
                    let drawn = sgcl_patchset::split(manifest, index, TEST_FRACTION, 0, 0);
                    drawn.map_err(|error| wrong(error.to_string()))?.test
                }
                Err(SplitFileError::Store(error)) => return Err(error.into()),
                Err(error) => return Err(wrong(error.to_string()).into()),
            }
        };
        let patches = Labelled::new(index, &test);
        let (all, train) = (patches.ids.len(), patches.train.len());
        if all > probe.max_patches {
            let reason = format!(
                "{all} patches have labels, and every probe encodes them all; name a smaller set, or raise \
                 probe.max_patches ({})",
                probe.max_patches
            );
            return Err(wrong(reason).into());
        }
        if train < probe.k {
            let reason = format!("{train} labelled patches are left to learn from; set probe.k ({}) to fewer", probe.k);
            return Err(wrong(reason).into());
        }
        if patches.test.is_empty() {
            let reason = "no slide that is tested on has a labelled patch; name a set with labels on more slides";
            return Err(wrong(reason.to_owned()).into());
        }
        Ok(Some(Self { set, patches }))
    }
}
