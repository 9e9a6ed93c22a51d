//! What an encoder is worth: k nearest neighbours, linear classifiers and fine-tuning, tested on slides kept apart.

pub mod bootstrap;
pub mod eva;
pub mod head;
pub mod knn;
pub mod linear;
pub mod roc;
pub mod rows;
pub mod score;
pub mod supervised;
pub mod views;

pub use eva::{EvaParams, EvaProbe, eva};
pub use knn::knn;
pub use linear::{LinearParams, LinearProbe, linear};
pub use score::{ClassScore, Figures, Prediction, Scores};

/// Rows to learn from and rows to test on: no slide may be on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Rows to learn from.
    pub train: Vec<usize>,
    /// Rows to test on.
    pub test: Vec<usize>,
}

/// Why a probe cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProbeError {
    /// Columns of different length.
    #[error("features have {features} rows, but there are {other} {what}")]
    Length {
        /// Rows of the feature matrix.
        features: usize,
        /// Length of the other column.
        other: usize,
        /// Which column.
        what: &'static str,
    },
    /// A half without labelled patches.
    #[error("the {half} half of the split holds no labelled patch")]
    Empty {
        /// `train` or `test`.
        half: &'static str,
    },
    /// A label beyond the classes.
    #[error("label {label} of patch {row} is not below the number of classes, {classes}")]
    Label {
        /// The row.
        row: usize,
        /// Its label.
        label: i64,
        /// Classes there are.
        classes: usize,
    },
    /// A setting or feature that makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl From<crate::optim::OptimError> for ProbeError {
    fn from(error: crate::optim::OptimError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// Checks columns and drops unlabelled rows from both halves.
fn labelled(features: &tch::Tensor, labels: &[i64], classes: usize, split: &Split) -> Result<Split, ProbeError> {
    let size = features.size();
    let [rows, _] = size.as_slice() else {
        return Err(ProbeError::Invalid(format!("features are a matrix (patches, width), not {size:?}")));
    };
    let rows = *rows as usize;
    if rows != labels.len() {
        return Err(ProbeError::Length { features: rows, other: labels.len(), what: "labels" });
    }
    if let Some((row, &label)) = labels.iter().enumerate().find(|&(_, &label)| label >= classes as i64) {
        return Err(ProbeError::Label { row, label, classes });
    }
    if let Some(row) = split.train.iter().chain(&split.test).find(|&&row| row >= rows) {
        return Err(ProbeError::Invalid(format!("the split names row {row}, there are {rows}")));
    }
    if !bool::try_from(features.isfinite().all()).unwrap_or(false) {
        return Err(ProbeError::Invalid("features hold NaN or infinite values".to_owned()));
    }
    let keep = |half: &[usize], name| {
        let kept: Vec<usize> = half.iter().copied().filter(|&row| labels[row] >= 0).collect();
        if kept.is_empty() { Err(ProbeError::Empty { half: name }) } else { Ok(kept) }
    };
    Ok(Split { train: keep(&split.train, "train")?, test: keep(&split.test, "test")? })
}

fn take(features: &tch::Tensor, rows: &[usize]) -> tch::Tensor {
    let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    features.index_select(0, &tch::Tensor::from_slice(&index).to_device(features.device()))
}

fn pick(labels: &[i64], rows: &[usize]) -> Vec<i64> {
    rows.iter().map(|&row| labels[row]).collect()
}

/// A tensor's values, row-major.
fn numbers(tensor: &tch::Tensor) -> Result<Vec<f64>, ProbeError> {
    let flat = tensor.to_device(tch::Device::Cpu).to_kind(tch::Kind::Double).flatten(0, -1);
    Vec::<f64>::try_from(flat).map_err(|error: tch::TchError| ProbeError::Invalid(error.to_string()))
}

/// The prediction of test rows, all labelled.
fn predict(rows: Vec<usize>, labels: &[i64], probabilities: Vec<f64>, classes: usize) -> Prediction {
    let truth = rows.iter().map(|&row| labels[row] as usize).collect();
    Prediction::new(rows, truth, probabilities, classes)
}
