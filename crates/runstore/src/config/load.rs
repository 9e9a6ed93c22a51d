//! From YAML text and `--set` words to a validated [`RunConfig`].

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::RunConfig;

/// Longest configuration file read.
const MAX_BYTES: u64 = 1 << 20;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Far too long for a configuration.
    #[error("{}: {bytes} bytes, more than a configuration can have ({MAX_BYTES}); is it the right file?", file.display())]
    TooLong {
        /// The file.
        file: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Not YAML, or not a configuration; the message shows the line.
    #[error("{file}: {message}")]
    Yaml {
        /// The file.
        file: String,
        /// What, where, with a caret; and the nearest key when one is misspelt.
        message: String,
    },
    /// An override that cannot be applied.
    #[error("--set {word}: {reason}")]
    Set {
        /// The override as given.
        word: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Values that do not hold together.
    #[error("the configuration does not hold together:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
    /// The configuration asks more of the patch set than it has.
    #[error("the configuration does not fit {patches} patches on {ranks} rank(s):\n  {}", problems.join("\n  "))]
    DoesNotFit {
        /// Patches to train on.
        patches: u64,
        /// Ranks.
        ranks: usize,
        /// What does not fit, with the numbers and the key to change.
        problems: Vec<String>,
    },
    /// The split leaves nothing to train on or to hold out.
    #[error("data: {0}")]
    Data(String),
    /// A patch set that the configuration names beside its data cannot be used.
    #[error("{key} {url}: {reason}")]
    NamedSet {
        /// Where the configuration names it.
        key: String,
        /// Where it should be.
        url: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

impl RunConfig {
    /// Defaults, then `file`, then each of `sets` (`a.b=c`); validated.
    ///
    /// # Errors
    /// An unreadable or wrong file, an override that names no key or has the wrong type, values that do not hold together.
    pub fn load(file: Option<&Path>, sets: &[String]) -> Result<Self, ConfigError> {
        let Some(path) = file else { return Self::from_yaml("", "(defaults)", sets) };
        let read = |source| ConfigError::Read { file: path.to_owned(), source };
        let bytes = std::fs::metadata(path).map_err(read)?.len();
        if bytes > MAX_BYTES {
            return Err(ConfigError::TooLong { file: path.to_owned(), bytes });
        }
        Self::from_yaml(&std::fs::read_to_string(path).map_err(read)?, &path.display().to_string(), sets)
    }

    /// [`RunConfig::load`] from text; `name` is what errors call it.
    ///
    /// # Errors
    /// As [`RunConfig::load`].
    pub fn from_yaml(text: &str, name: &str, sets: &[String]) -> Result<Self, ConfigError> {
        let mut config = if is_blank(text) { Self::default() } else { yaml(text, name)? };
        for word in sets {
            config = config.with(word)?;
        }
        config.validate()?;
        Ok(config)
    }

    /// One override applied.
    fn with(&self, word: &str) -> Result<Self, ConfigError> {
        let fail = |reason: String| ConfigError::Set { word: word.to_owned(), reason };
        let (key, text) = word.split_once('=').ok_or_else(|| fail("write it as key=value".to_owned()))?;
        let mut tree = serde_json::to_value(self).map_err(|e| fail(e.to_string()))?;
        let value: Value = yaml(text, "value").map_err(|e| fail(e.to_string()))?;
        let Some(slot) = key.split('.').try_fold(&mut tree, |node, part| node.as_object_mut()?.get_mut(part)) else {
            let known = keys(&serde_json::to_value(Self::default()).unwrap_or_default());
            return Err(fail(format!("there is no key {key:?}{}", suggest(key, known.iter().map(String::as_str)))));
        };
        merge(slot, value);
        serde_json::from_value(tree).map_err(|e| fail(e.to_string()))
    }
}

/// YAML to a value: the only place that knows which parser we use. Errors carry line, column, the line itself and a caret.
///
/// # Errors
/// [`ConfigError::Yaml`].
pub(crate) fn yaml<T: DeserializeOwned>(text: &str, name: &str) -> Result<T, ConfigError> {
    serde_saphyr::from_str(text).map_err(|e| {
        let hint = match e.without_snippet() {
            serde_saphyr::Error::SerdeUnknownField { field, expected, .. } => suggest(field, expected.iter().copied()),
            serde_saphyr::Error::SerdeUnknownVariant { variant, expected, .. } => {
                suggest(variant, expected.iter().copied())
            }
            _ => String::new(),
        };
        let hint = hint.strip_prefix("; ").map(|h| format!("\nhint: {h}")).unwrap_or_default();
        ConfigError::Yaml { file: name.to_owned(), message: format!("{e}{hint}") }
    })
}

/// A file of comments alone is all defaults.
fn is_blank(text: &str) -> bool {
    text.lines().all(|l| l.trim().is_empty() || l.trim_start().starts_with('#') || l.trim() == "---")
}

/// Objects key by key, so that a section given as one value keeps its other keys.
fn merge(slot: &mut Value, value: Value) {
    match (slot, value) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in new {
                merge(old.entry(key).or_insert(Value::Null), value);
            }
        }
        (slot, value) => *slot = value,
    }
}

/// Dotted names of all leaves.
fn keys(tree: &Value) -> Vec<String> {
    let Value::Object(fields) = tree else { return Vec::new() };
    let mut all = Vec::new();
    for (name, value) in fields {
        let below = keys(value);
        if below.is_empty() {
            all.push(name.clone());
        }
        all.extend(below.into_iter().map(|k| format!("{name}.{k}")));
    }
    all
}

/// The one of `known` that `word` was probably meant to be: few edits away, or the same last part of a dotted name.
#[must_use]
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let last = |s: &'a str| s.rsplit('.').next().unwrap_or(s);
    let score = |k: &'a str| {
        let whole = strsim::normalized_damerau_levenshtein(word, k);
        let part = if word.contains('.') { 0.0 } else { 0.95 * strsim::normalized_damerau_levenshtein(word, last(k)) };
        whole.max(part)
    };
    known
        .into_iter()
        .map(|k| (score(k), k))
        .filter(|(s, _)| *s >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

fn suggest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    nearest(word, known).map(|k| format!("; did you mean {k:?}?")).unwrap_or_default()
}
