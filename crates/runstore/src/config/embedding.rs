//! Features of patch sets, made with a run's weights once they are exported.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Evaluation, evaluation};

/// Most embeddings of a run.
const MOST: usize = 20;

/// Whose layout features are written in, as `sgclctl embed --layout` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// TRIDENT's `features_<run>/<slide>.h5`.
    #[default]
    Trident,
    /// CLAM's `h5_files/<slide>.h5` and `pt_files/<slide>.pt`.
    Clam,
    /// Both.
    Both,
}

impl Layout {
    /// What `sgclctl embed --layout` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Trident => "trident",
            Self::Clam => "clam",
            Self::Both => "both",
        }
    }
}

/// A patch set whose features are computed when the run's weights are exported; they lie with the run, a file a slide.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Embedding {
    /// What its features are kept under: of a-z, 0-9 and `-`.
    #[schemars(length(min = 1, max = 30))]
    pub name: String,
    /// Path or URL of a patch set.
    pub dataset: String,
    /// Whose layout.
    pub layout: Layout,
}

impl std::str::FromStr for Embedding {
    type Err = ConfigError;

    /// One alone, as JSON, held to what a configuration's are held to.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        // JSON is YAML.
        let embedding = super::load::yaml(text, "embedding")?;
        let wrong = wrong(std::slice::from_ref(&embedding), &[]);
        if wrong.is_empty() { Ok(embedding) } else { Err(ConfigError::Invalid(wrong)) }
    }
}

/// What is wrong with a list of them beside these evaluations, each by its key: what follows a run is told apart by name.
pub(super) fn wrong(embeddings: &[Embedding], evaluations: &[Evaluation]) -> Vec<String> {
    let mut wrong = Vec::new();
    if embeddings.len() > MOST {
        wrong.push(format!("embeddings has {}, more than {MOST}", embeddings.len()));
    }
    for (at, one) in embeddings.iter().enumerate() {
        let mut need = |ok: bool, text: String| {
            if !ok {
                wrong.push(format!("embeddings[{at}].{text}"));
            }
        };
        need(evaluation::is_name(&one.name), evaluation::not_a_name(&one.name));
        let taken = embeddings[..at].iter().any(|other| other.name == one.name)
            || evaluations.iter().any(|other| other.name == one.name);
        need(!taken, format!("name {:?} is that of another; name each once", one.name));
        need(!one.dataset.is_empty(), "dataset is missing: the URL of a patch set".to_owned());
    }
    wrong
}
