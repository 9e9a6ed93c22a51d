//! A run's configuration: what `configs/*.yaml` hold and `--set` overrides. Defaults are the published setting (METHOD's table).
//!
//! Order: defaults, then the file, then each `--set`. [`RunConfig::load`] validates once; what it returns holds together.
//! `configs/schema.json` is [`RunConfig::json_schema`]; a test compares them.

mod auto;
mod check;
mod embedding;
mod evaluation;
mod load;
mod method;
mod probe;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use auto::AutoOr;
pub use check::Split;
pub use embedding::{Embedding, Layout as FeatureLayout};
pub use evaluation::{Baseline, Evaluation, Protocol as EvalProtocol, Recipe as EvalRecipe};
pub use load::{ConfigError, nearest};
pub use method::Method;
pub use probe::Probe;

/// Which form of the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// The loss as meant.
    #[default]
    Exact,
    /// The published code, quirks included.
    Released,
}

/// Backbone network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// ResNet-18, features of width 512.
    #[default]
    Resnet18,
    /// ResNet-34, features of width 512.
    Resnet34,
    /// ResNet-50, features of width 2,048.
    Resnet50,
}

impl Arch {
    /// torchvision's and timm's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Resnet18 => "resnet18",
            Self::Resnet34 => "resnet34",
            Self::Resnet50 => "resnet50",
        }
    }

    /// Width of the pooled features.
    #[must_use]
    pub fn feature_dim(self) -> usize {
        match self {
            Self::Resnet18 | Self::Resnet34 => 512,
            Self::Resnet50 => 2048,
        }
    }
}

impl std::str::FromStr for Arch {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Self::Resnet18, Self::Resnet34, Self::Resnet50]
            .into_iter()
            .find(|a| a.name() == s)
            .ok_or_else(|| format!("unknown backbone {s:?}; there are resnet18, resnet34 and resnet50"))
    }
}

/// Number format of bank rows in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BankDtype {
    /// 32-bit floats.
    #[default]
    #[serde(alias = "float32")]
    Fp32,
    /// bfloat16: 8 bits of mantissa, half the memory.
    #[serde(alias = "bfloat16")]
    Bf16,
    /// IEEE half: 11 bits of mantissa, half the memory. Rows are unit vectors, so its range is enough.
    #[serde(alias = "float16")]
    Fp16,
}

/// Where a rank computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// GPUs where the machine and this libtorch have them, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// One GPU a rank; an error where there is none.
    Cuda,
}

/// Everything that decides what a run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// The method.
    pub method: Method,
    /// Which form of the loss.
    pub variant: Variant,
    /// Seed of every draw.
    pub seed: u64,
    /// Epochs to train.
    #[schemars(range(min = 1))]
    pub epochs: u32,
    /// The network that is trained.
    pub backbone: Backbone,
    /// The head that the loss sees.
    pub projector: Projector,
    /// Views of a patch.
    pub views: Views,
    /// Batch of a step.
    pub batch: Batch,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// Objective.
    pub objective: Objective,
    /// Feature memory.
    pub bank: Bank,
    /// Clustering of the bank before every epoch.
    pub kmeans: Kmeans,
    /// When to checkpoint and what to keep.
    pub checkpoint: Checkpoint,
    /// Reading patches.
    pub loader: Loader,
    /// Where to compute.
    pub device: Device,
    /// What the backbone is computed in.
    pub precision: Precision,
    /// Seconds without a finished step after which a rank counts as hung.
    #[schemars(range(min = 1))]
    pub step_timeout_s: u64,
    /// Seconds to wait for enough nodes.
    #[schemars(range(min = 1))]
    pub startup_timeout_s: u64,
    /// Failures after which the run fails; preemptions do not count.
    pub max_restarts: u32,
    /// Which part of the patch set is trained on.
    pub data: Data,
    /// Scores of the encoder while it is trained.
    pub probe: Probe,
    /// What the weights are evaluated on once they are exported.
    pub evaluations: Vec<Evaluation>,
    /// Patch sets whose features are computed with the weights once they are exported.
    pub embeddings: Vec<Embedding>,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            method: Method::Sgcl,
            variant: Variant::Exact,
            seed: 0,
            epochs: 100,
            backbone: Backbone::default(),
            projector: Projector::default(),
            views: Views::default(),
            batch: Batch::default(),
            optimizer: Optimizer::default(),
            objective: Objective::default(),
            bank: Bank::default(),
            kmeans: Kmeans::default(),
            checkpoint: Checkpoint::default(),
            loader: Loader::default(),
            device: Device::Auto,
            precision: Precision::default(),
            step_timeout_s: 300,
            startup_timeout_s: 600,
            max_restarts: 3,
            data: Data::default(),
            probe: Probe::default(),
            evaluations: Vec::new(),
            embeddings: Vec::new(),
        }
    }
}

/// The network that is trained and exported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Backbone {
    /// Architecture.
    pub arch: Arch,
    /// Weights to start from: path or URL of a torchvision-layout `.pth` or `.safetensors`; none means random weights.
    pub pretrained: Option<String>,
    /// BatchNorm takes its statistics over the batches of all ranks, not each rank's own: for small batches. They then depend on how many
    /// lanes a rank has, so a step does not equal the same step of another world.
    pub sync_norm: bool,
}

/// What convolutions and activations of the backbone are computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32 bits, as published.
    #[default]
    Fp32,
    /// bfloat16, for GPUs. Weights, gradients, BatchNorm's statistics, heads, losses and optimiser stay in 32 bits.
    Bf16,
}

/// Head on the pooled features: what training alone uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Projector {
    /// Width of the unit vectors that the loss compares.
    #[schemars(range(min = 1, max = 4096))]
    pub dim: usize,
    /// Linear layers: 2 have a ReLU between them and the backbone's width inside, 1 is linear.
    #[schemars(range(min = 1, max = 2))]
    pub layers: usize,
}

impl Default for Projector {
    fn default() -> Self {
        Self { dim: 128, layers: 2 }
    }
}

/// One global view and four local ones, each local from one quadrant of the patch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Views {
    /// Side of the global view in pixels.
    #[schemars(range(min = 32, max = 1024))]
    pub global_px: u32,
    /// Side of a local view in pixels.
    #[schemars(range(min = 32, max = 1024))]
    pub local_px: u32,
    /// Share of the patch's area a global crop takes, smallest and largest.
    pub global_scale: [f64; 2],
    /// Share of the quadrant's area a local crop takes, smallest and largest.
    pub local_scale: [f64; 2],
}

impl Default for Views {
    fn default() -> Self {
        Self { global_px: 224, local_px: 96, global_scale: [0.2, 1.0], local_scale: [0.2, 0.56] }
    }
}

/// A step is `ranks × accumulate` micro-batches of `per_rank` patches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Batch {
    /// Patches of a micro-batch.
    #[schemars(range(min = 2))]
    pub per_rank: usize,
    /// Micro-batches a rank does before the optimiser steps.
    #[schemars(range(min = 1))]
    pub accumulate: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { per_rank: 32, accumulate: 1 }
    }
}

/// SGD with a cosine schedule per epoch, down to 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Learning rate for `lr_batch` patches a step; scaled linearly to the real batch.
    pub lr: f64,
    /// Patches a step that `lr` is meant for.
    #[schemars(range(min = 1))]
    pub lr_batch: usize,
    /// Momentum.
    pub momentum: f64,
    /// Weight decay, on all parameters.
    pub weight_decay: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { lr: 0.015, lr_batch: 128, momentum: 0.9, weight_decay: 1e-4 }
    }
}

/// The loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Objective {
    /// Random negatives of a query (K), or the queue's length; a multiple of 4.
    #[schemars(range(min = 4))]
    pub negatives: usize,
    /// Hard negatives of a query (H); at most `top_fraction` of the patches.
    #[schemars(range(min = 1))]
    pub hard: usize,
    /// Nearest bank rows searched for semantic positives, or local aggregation's background; fewer than the patches.
    #[schemars(range(min = 1))]
    pub nearest: usize,
    /// Temperature of the intra and inner losses.
    pub t_instance: f64,
    /// Share of the key encoder that a step keeps, of methods that have one.
    pub key_momentum: f64,
    /// Weight λ of DenseCL's dense loss; MoCo's has 1 − λ.
    pub dense_share: f64,
    /// Temperature of the losses that neighbours make.
    pub t_spatial: f64,
    /// Spatial positives lie nearer than this, in grid units.
    pub radius: f64,
    /// Most similar spatial neighbours whose neighbours count too.
    pub aux: usize,
    /// Hard negatives come from this top share of the similarity ranking.
    pub top_fraction: f64,
    /// Beta distribution of the hard negatives' ranks.
    pub hard_beta: [f64; 2],
    /// Rows that positives and hard negatives are looked for among.
    pub candidates: Candidates,
    /// Similarities and sums in 64 bits: runs that share a step between other numbers of ranks then compute the same. Slower.
    pub double: bool,
    /// Rows of a step's sample, where `candidates` samples.
    #[schemars(range(min = 1024))]
    pub candidate_rows: usize,
}

impl RunConfig {
    /// Floats of a patch in the bank.
    #[must_use]
    pub fn bank_row(&self) -> usize {
        let views = if self.method.has_local_views() { 5 } else { 1 };
        let backbone = match self.method {
            method if method.has_hard() => self.backbone.arch.feature_dim(),
            method if method.has_dense() => self.projector.dim,
            _ => 0,
        };
        views * self.projector.dim + backbone
    }
}

impl Objective {
    /// Rows of a step's sample for `patches` patches on `ranks` ranks; none where every row is looked through.
    #[must_use]
    pub fn sample(&self, patches: u64, ranks: usize) -> Option<usize> {
        let sampled = match self.candidates {
            Candidates::Exact => false,
            Candidates::Sampled => true,
            Candidates::Auto => patches / ranks.max(1) as u64 > EXACT_ROWS,
        };
        (sampled && (self.candidate_rows as u64) < patches).then_some(self.candidate_rows)
    }
}

/// Bank rows of a rank up to which `candidates: auto` looks through all.
pub const EXACT_ROWS: u64 = 2_000_000;

/// Which bank rows a step looks through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Candidates {
    /// All, up to 2,000,000 rows a rank; beyond that a sample.
    #[default]
    Auto,
    /// All rows.
    Exact,
    /// A fresh random sample each step: cost does not depend on the number of patches.
    Sampled,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            negatives: 65_536,
            hard: 4096,
            nearest: 4096,
            t_instance: 0.2,
            key_momentum: 0.999,
            dense_share: 0.5,
            t_spatial: 0.07,
            radius: 3.0,
            aux: 1,
            top_fraction: 0.2,
            hard_beta: [5.0, 15.0],
            candidates: Candidates::Auto,
            double: false,
            candidate_rows: 65_536,
        }
    }
}

/// What bank rows are before their patch is first trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BankStart {
    /// Random unit rows, as published.
    #[default]
    Random,
    /// Features of the model as it begins: one pass over all patches, without gradients, before the first step. Losses fall from the
    /// first epoch on, where random rows take some epochs to be forgotten.
    Features,
}

/// Feature memory: one row a patch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Bank {
    /// What rows are before their patch is first trained on.
    pub start: BankStart,
    /// Share of the old row that an update keeps.
    pub momentum: f64,
    /// Number format in memory.
    pub dtype: BankDtype,
    /// Further copies of a shard, on other nodes where there are any.
    #[schemars(range(max = 1))]
    pub replicas: u32,
}

impl Default for Bank {
    fn default() -> Self {
        Self { start: BankStart::Random, momentum: 0.5, dtype: BankDtype::Fp32, replicas: 1 }
    }
}

/// k-means over the global bank, the same labels on every rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Kmeans {
    /// Independent clusterings that must agree.
    #[schemars(range(min = 1))]
    pub runs: usize,
    /// Clusters of each.
    #[schemars(range(min = 1))]
    pub clusters: usize,
    /// Lloyd iterations.
    #[schemars(range(min = 1))]
    pub iterations: usize,
}

impl Default for Kmeans {
    fn default() -> Self {
        Self { runs: 3, clusters: 1000, iterations: 20 }
    }
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Epochs between commits.
    #[schemars(range(min = 1))]
    pub every_epochs: u32,
    /// Steps between commits besides; 0 makes none.
    pub every_steps: u64,
    /// Seconds between commits besides; 0 makes none.
    pub every_seconds: u64,
    /// Newest commits that are kept.
    #[schemars(range(min = 1))]
    pub keep_last: u32,
    /// Besides, every so many epochs one is kept for good; 0 keeps none.
    pub keep_every: u32,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every_epochs: 1, every_steps: 0, every_seconds: 600, keep_last: 3, keep_every: 0 }
    }
}

/// Reading and decoding patches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Loader {
    /// Decoding threads of a rank, or `auto`: the node's cores shared out.
    pub threads: AutoOr,
    /// Shards that a lane's shuffle window holds open.
    #[schemars(range(min = 1))]
    pub window_shards: usize,
    /// Disk that a node may use to cache shards, in bytes; 0 caches none.
    pub cache_bytes: u64,
}

impl Default for Loader {
    fn default() -> Self {
        Self { threads: AutoOr::Auto, window_shards: 4, cache_bytes: 16 << 30 }
    }
}

/// Which slides are trained on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Names of the slides to use; none means all.
    pub slides: Option<Vec<String>>,
    /// Share of those slides that is never trained on, for probes.
    pub holdout_fraction: f64,
    /// Seed of the choice.
    pub holdout_seed: u64,
}

impl RunConfig {
    /// Patches of one step on `world` ranks.
    #[must_use]
    pub fn global_batch(&self, world: usize) -> usize {
        self.batch.per_rank.saturating_mul(self.batch.accumulate).saturating_mul(world)
    }

    /// Learning rate of the first epoch on `world` ranks: `lr × global batch / lr_batch`.
    #[must_use]
    pub fn base_lr(&self, world: usize) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let ratio = self.global_batch(world) as f64 / self.optimizer.lr_batch as f64;
        self.optimizer.lr * ratio
    }

    /// The JSON schema of a configuration file.
    #[must_use]
    pub fn json_schema() -> serde_json::Value {
        let mut schema = schemars::schema_for!(RunConfig);
        schema.insert("title".into(), "sgcl run configuration".into());
        schema.to_value()
    }
}
