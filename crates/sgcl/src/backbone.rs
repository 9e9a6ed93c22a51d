//! ResNet-18, 34 and 50 in torchvision's layout (v1.5: a bottleneck strides in its 3×3 convolution), without the classifier.
//!
//! Plain tensors rather than a `VarStore`: parameters come out in one fixed order, torchvision's, which c10d's reducer, the
//! optimiser and the checkpoints share.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sgcl_c10d::ProcessGroup;
use sgcl_c10d::norm::{Norm, sync_batch_norm};
use tch::{Device, Kind, Tensor};

use crate::init::kaiming_normal_;

const BN_MOMENTUM: f64 = 0.1;
const BN_EPS: f64 = 1e-5;

/// Which residual network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Basic blocks 2, 2, 2, 2; width 512.
    ResNet18,
    /// Basic blocks 3, 4, 6, 3; width 512.
    ResNet34,
    /// Bottlenecks 3, 4, 6, 3; width 2,048.
    ResNet50,
}

impl Arch {
    /// Every architecture there is.
    pub const ALL: [Arch; 3] = [Arch::ResNet18, Arch::ResNet34, Arch::ResNet50];

    /// Width Db of the pooled feature.
    #[must_use]
    pub fn width(self) -> i64 {
        512 * self.expansion()
    }

    /// torchvision's and timm's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Arch::ResNet18 => "resnet18",
            Arch::ResNet34 => "resnet34",
            Arch::ResNet50 => "resnet50",
        }
    }

    fn blocks(self) -> [usize; 4] {
        match self {
            Arch::ResNet18 => [2, 2, 2, 2],
            Arch::ResNet34 | Arch::ResNet50 => [3, 4, 6, 3],
        }
    }

    fn expansion(self) -> i64 {
        if self == Arch::ResNet50 { 4 } else { 1 }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An architecture's name that is none of ours.
#[derive(Debug, thiserror::Error)]
#[error("unknown backbone `{0}`: use resnet18, resnet34 or resnet50")]
pub struct UnknownArch(String);

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(name: &str) -> Result<Self, UnknownArch> {
        Arch::ALL.into_iter().find(|arch| arch.name() == name).ok_or_else(|| UnknownArch(name.to_owned()))
    }
}

/// How BatchNorm takes a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pass<'a> {
    /// By the running statistics.
    Evaluate,
    /// By the batch's own, which the running ones follow.
    Train,
    /// By those of all ranks' batches.
    TrainTogether(&'a Together),
}

impl Pass<'_> {
    /// Of one rank's own batches.
    pub(crate) fn alone(train: bool) -> Self {
        if train { Self::Train } else { Self::Evaluate }
    }
}

/// The ranks whose batches are normalised together. A lost peer leaves its error here, and maps that nobody may use: layers return no
/// results, and nothing else of a forward pass can fail.
#[derive(Debug)]
pub(crate) struct Together {
    group: Arc<ProcessGroup>,
    failed: RefCell<Option<sgcl_c10d::Error>>,
}

/// Pixels of the input for one of the map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputStride {
    /// The last two stages are dilated.
    Eight,
    /// The last stage is dilated.
    Sixteen,
    /// As it is pretrained.
    #[default]
    ThirtyTwo,
}

impl OutputStride {
    /// As a number.
    #[must_use]
    pub fn pixels(self) -> i64 {
        match self {
            OutputStride::Eight => 8,
            OutputStride::Sixteen => 16,
            OutputStride::ThirtyTwo => 32,
        }
    }
}

/// A convolution without bias and the BatchNorm behind it.
#[derive(Debug)]
pub(crate) struct Unit {
    conv: String,
    norm: String,
    weight: Tensor,
    stride: i64,
    dilation: i64,
    padding: i64,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
}

impl Unit {
    /// Of `shape` (out, in, k, k); zeros until it is drawn or loaded.
    pub(crate) fn new(conv: String, norm: String, shape: [i64; 4], stride: i64, dilation: i64, device: Device) -> Self {
        let [out, _, kernel, _] = shape;
        let float = (Kind::Float, device);
        Unit {
            conv,
            norm,
            weight: Tensor::zeros(shape, float).set_requires_grad(true),
            stride,
            dilation,
            padding: dilation * (kernel / 2),
            scale: Tensor::ones([out], float).set_requires_grad(true),
            shift: Tensor::zeros([out], float).set_requires_grad(true),
            mean: Tensor::zeros([out], float),
            var: Tensor::ones([out], float),
        }
    }

    /// x (B, in, H, W) → (B, out, H/stride, W/stride), not yet rectified, in the kind of x; statistics, scale and shift are of 32 bits
    /// whatever that is.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let (stride, padding, dilation) = ([self.stride; 2], [self.padding; 2], [self.dilation; 2]);
        let x = x.conv2d(&self.weight.to_kind(x.kind()), None::<&Tensor>, stride, padding, dilation, 1);
        let Self { scale, shift, mean, var, .. } = self;
        let Pass::TrainTogether(ranks) = pass else {
            let train = matches!(pass, Pass::Train);
            return x.batch_norm(Some(scale), Some(shift), Some(mean), Some(var), train, BN_MOMENTUM, BN_EPS, true);
        };
        let norm = Norm { scale, shift, running_mean: mean, running_var: var, momentum: BN_MOMENTUM, eps: BN_EPS };
        // After a failure the ring is gone: the layers behind it do not ask again.
        let failed = ranks.failed.borrow().is_some();
        match (!failed).then(|| sync_batch_norm(&x, norm, &ranks.group)) {
            Some(Ok(y)) => y,
            Some(Err(error)) => {
                ranks.failed.replace(Some(error));
                x
            }
            None => x,
        }
    }

    /// Trainable tensors by name; they share storage with the unit.
    pub(crate) fn parameters(&self) -> [(String, Tensor); 3] {
        [
            (format!("{}.weight", self.conv), self.weight.shallow_clone()),
            (format!("{}.weight", self.norm), self.scale.shallow_clone()),
            (format!("{}.bias", self.norm), self.shift.shallow_clone()),
        ]
    }

    /// Running mean and variance by name; they share storage with the unit.
    pub(crate) fn buffers(&self) -> [(String, Tensor); 2] {
        [
            (format!("{}.running_mean", self.norm), self.mean.shallow_clone()),
            (format!("{}.running_var", self.norm), self.var.shallow_clone()),
        ]
    }
}

/// How far apart the samples of a block's 3×3 convolutions are, and its stride.
#[derive(Clone, Copy, Debug)]
struct Reach {
    stride: i64,
    /// Of the convolution that has the stride.
    first: i64,
    /// Of the others.
    rest: i64,
}

/// A residual block, basic or bottleneck: units in a row, ReLU between them, the shortcut added before the last ReLU.
#[derive(Debug)]
struct Block {
    units: Vec<Unit>,
    downsample: Option<Unit>,
}

impl Block {
    fn new(arch: Arch, name: &str, input: i64, planes: i64, reach: Reach, device: Device) -> Self {
        let output = planes * arch.expansion();
        let Reach { stride, first, rest } = reach;
        // (width in, width out, kernel, stride, dilation) of each convolution.
        let shapes: Vec<[i64; 5]> = match arch {
            Arch::ResNet18 | Arch::ResNet34 => vec![[input, planes, 3, stride, first], [planes, planes, 3, 1, rest]],
            Arch::ResNet50 => {
                vec![[input, planes, 1, 1, 1], [planes, planes, 3, stride, first], [planes, output, 1, 1, 1]]
            }
        };
        let units = shapes
            .iter()
            .zip(1..)
            .map(|(&[i, o, k, s, d], n)| {
                Unit::new(format!("{name}.conv{n}"), format!("{name}.bn{n}"), [o, i, k, k], s, d, device)
            })
            .collect();
        let downsample = (stride != 1 || input != output).then(|| {
            let (conv, norm) = (format!("{name}.downsample.0"), format!("{name}.downsample.1"));
            Unit::new(conv, norm, [output, input, 1, 1], stride, 1, device)
        });
        Block { units, downsample }
    }

    fn forward(&self, x: &Tensor, pass: Pass<'_>) -> Tensor {
        let mut y = x.shallow_clone();
        for (i, unit) in self.units.iter().enumerate() {
            if i > 0 {
                let _ = y.relu_();
            }
            y = unit.forward(&y, pass);
        }
        let mut sum = match &self.downsample {
            Some(unit) => y + unit.forward(x, pass),
            None => y + x,
        };
        sum.relu_()
    }
}

/// Averages of a map over its positions: (B, C, H, W) → (B, C).
pub fn pool(map: &Tensor) -> Tensor {
    map.adaptive_avg_pool2d([1, 1]).flatten(1, -1)
}

/// A residual network up to its pooled feature.
#[derive(Debug)]
pub struct Backbone {
    arch: Arch,
    stem: Unit,
    blocks: Vec<Block>,
    /// What convolutions are computed in, where that is not the input's kind.
    compute: Option<Kind>,
    /// With whom batches are normalised in training.
    together: Option<Together>,
    /// Training passes so far: torchvision's `num_batches_tracked`, the same in every layer.
    batches: Cell<i64>,
}

impl Backbone {
    /// A network with all convolutions zero: call [`Backbone::init`] or load weights before use.
    #[must_use]
    pub fn new(arch: Arch, device: Device) -> Self {
        Self::with_stride(arch, OutputStride::ThirtyTwo, device)
    }

    /// The same network, weights and names with a finer map: a stage beyond the wanted stride keeps its size, and its 3×3
    /// convolutions reach twice as far instead. The convolution that gave up its stride keeps the reach of the stage before; this is
    /// torchvision's `replace_stride_with_dilation`, and for basic blocks, which torchvision refuses to dilate, timm's
    /// `output_stride` (mmsegmentation leaves the second convolution of a basic block undilated).
    #[must_use]
    pub fn with_stride(arch: Arch, output: OutputStride, device: Device) -> Self {
        let stem = Unit::new("conv1".into(), "bn1".into(), [64, 3, 7, 7], 2, 1, device);
        let mut blocks = Vec::new();
        let (mut input, mut reached, mut dilation) = (64, 4, 1);
        for (stage, count) in arch.blocks().into_iter().enumerate() {
            let planes = 64_i64 << stage;
            for block in 0..count {
                let mut reach = Reach { stride: 1, first: dilation, rest: dilation };
                if stage > 0 && block == 0 {
                    if reached < output.pixels() {
                        reach.stride = 2;
                        reached *= 2;
                    } else {
                        dilation *= 2;
                        reach.rest = dilation;
                    }
                }
                let name = format!("layer{}.{block}", stage + 1);
                blocks.push(Block::new(arch, &name, input, planes, reach, device));
                input = planes * arch.expansion();
            }
        }
        Backbone { arch, stem, blocks, compute: None, together: None, batches: Cell::new(0) }
    }

    /// Computes activations in `kind`, `Float` or `BFloat16`, from weights that stay in 32 bits.
    pub fn compute_in(&mut self, kind: Kind) {
        self.compute = (kind != Kind::Float).then_some(kind);
    }

    /// Normalises training batches together with those of `group`'s ranks, or alone again. Ranks pass the same number of batches in the same
    /// order, a batch of none among them, and go backward through all; after a pass each asks [`Backbone::check_ranks`].
    pub fn normalise_with(&mut self, group: Option<Arc<ProcessGroup>>) {
        self.together = group.map(|group| Together { group, failed: RefCell::new(None) });
    }

    /// Whether [`Backbone::normalise_with`] named a group.
    #[must_use]
    pub fn normalises_together(&self) -> bool {
        self.together.is_some()
    }

    /// Whether the passes since the last call were normalised as they should be.
    ///
    /// # Errors
    /// A peer was lost on the way: what came out means nothing.
    pub fn check_ranks(&self) -> Result<(), sgcl_c10d::Error> {
        self.together.as_ref().and_then(|ranks| ranks.failed.take()).map_or(Ok(()), Err)
    }

    /// Convolutions Kaiming normal with fan-in and gain √2, BatchNorm 1 and 0, running statistics 0 and 1.
    /// Tensor i of [`Backbone::parameters`] is drawn from stream `first + i`.
    pub fn init(&self, seed: u64, first: u64) {
        for (item, (name, parameter)) in (first..).zip(self.parameters()) {
            let mut parameter = parameter.detach();
            match parameter.dim() {
                4 => kaiming_normal_(&parameter, seed, item),
                _ if name.ends_with(".weight") => drop(parameter.fill_(1.0)),
                _ => drop(parameter.zero_()),
            }
        }
        for unit in self.units() {
            let (mut mean, mut var) = (unit.mean.shallow_clone(), unit.var.shallow_clone());
            let _ = (mean.zero_(), var.fill_(1.0));
        }
        self.batches.set(0);
    }

    /// The architecture.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The map before pooling: x (B, 3, H, W) → (B, Db, ⌈H/32⌉, ⌈W/32⌉), or of the finer stride it was made with; in the kind of x.
    pub fn feature_map(&self, x: &Tensor, train: bool) -> Tensor {
        if train {
            self.batches.set(self.batches.get() + 1);
        }
        // Channels-last spares oneDNN and cuDNN a reordering round every convolution.
        let kind = x.kind();
        let x = x.to_kind(self.compute.unwrap_or(kind)).permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        let pass = match &self.together {
            Some(ranks) if train => Pass::TrainTogether(ranks),
            _ => Pass::alone(train),
        };
        let mut stem = self.stem.forward(&x, pass);
        let stem = stem.relu_().max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false);
        self.blocks.iter().fold(stem, |y, block| block.forward(&y, pass)).to_kind(kind)
    }

    /// Average-pooled features, not normalised: x (B, 3, H, W) → (B, Db).
    pub fn features(&self, x: &Tensor, train: bool) -> Tensor {
        pool(&self.feature_map(x, train))
    }

    /// Trainable tensors under torchvision's names, in torchvision's order. The tensors share storage with the network.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.units().flat_map(Unit::parameters).collect()
    }

    /// Running means and variances under torchvision's names. The tensors share storage with the network.
    #[must_use]
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.units().flat_map(Unit::buffers).collect()
    }

    /// All that torchvision's `state_dict()` holds but `fc`, in its order, `num_batches_tracked` (int64 scalars) included.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut parameters = self.parameters().into_iter();
        let mut buffers = self.buffers().into_iter();
        let mut state = Vec::new();
        for unit in self.units() {
            state.extend(parameters.by_ref().take(3));
            state.extend(buffers.by_ref().take(2));
            state.push((format!("{}.num_batches_tracked", unit.norm), Tensor::from(self.batches.get())));
        }
        state
    }

    /// Sets `num_batches_tracked` of every layer.
    pub fn set_batches_tracked(&self, batches: i64) {
        self.batches.set(batches);
    }

    /// A copy of all running statistics as one vector: every layer's means, then its variances, layer by layer. Averaging
    /// these vectors over lanes and ranks gives every rank the same statistics.
    pub fn bn_stats(&self) -> Tensor {
        Tensor::cat(&self.buffers().into_iter().map(|(_, tensor)| tensor).collect::<Vec<_>>(), 0)
    }

    /// Writes back a vector made by [`Backbone::bn_stats`].
    ///
    /// # Panics
    /// If `stats` has another length: a bug of the caller.
    pub fn set_bn_stats(&self, stats: &Tensor) {
        let buffers = self.buffers();
        let sizes: Vec<i64> = buffers.iter().map(|(_, tensor)| tensor.size()[0]).collect();
        for ((_, mut buffer), part) in buffers.into_iter().zip(stats.split_with_sizes(sizes, 0)) {
            buffer.copy_(&part);
        }
    }

    fn units(&self) -> impl Iterator<Item = &Unit> {
        std::iter::once(&self.stem)
            .chain(self.blocks.iter().flat_map(|block| block.units.iter().chain(block.downsample.as_ref())))
    }
}
