//! Learning to segment: SGD by steps, the rate falling as a power of what is left.

use rand::Rng as _;
use rand::seq::SliceRandom as _;
use sgcl_draw::{Purpose, rng};
use tch::{Kind, Reduction, Tensor};

use super::{FcnHead, IGNORED};
use crate::backbone::Backbone;
use crate::optim::Sgd;
use crate::probe::ProbeError;

/// Steps between two looks at whether the loss is still a number.
const LOOK_EVERY: u64 = 20;

/// How a segmenter is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Learning rate at first.
    pub lr: f64,
    /// Learning rate at last.
    pub min_lr: f64,
    /// Power of the rate's fall.
    pub power: f64,
    /// Momentum.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Steps.
    pub steps: u64,
    /// Tiles a step.
    pub batch: usize,
    /// Share of channels that are left out before the last layer.
    pub dropout: f64,
}

impl Default for Recipe {
    /// mmsegmentation's 20,000-step schedule and the batch of 16 that its configurations make on 4 GPUs.
    fn default() -> Self {
        Recipe {
            lr: 0.01,
            min_lr: 1e-4,
            power: 0.9,
            momentum: 0.9,
            weight_decay: 5e-4,
            steps: 20_000,
            batch: 16,
            dropout: 0.1,
        }
    }
}

impl Recipe {
    /// The learning rate of a step, from 0.
    #[must_use]
    pub fn lr_at(&self, step: u64) -> f64 {
        let left = 1.0 - step as f64 / self.steps.max(1) as f64;
        self.min_lr + (self.lr - self.min_lr) * left.max(0.0).powf(self.power)
    }
}

/// A backbone with a segmentation head.
#[derive(Debug)]
pub struct Segmenter<'a> {
    /// The backbone, best of output stride 8.
    pub backbone: &'a Backbone,
    /// What makes classes of its map.
    pub head: FcnHead,
}

impl Segmenter<'_> {
    /// Logits (B, classes, H, W) of x (B, 3, H, W): the coarse ones, brought to the input's size bilinearly.
    pub fn logits(&self, x: &Tensor, train: bool, kept: Option<&Tensor>) -> Tensor {
        let coarse = self.head.logits(&self.backbone.feature_map(x, train), train, kept);
        let size = x.size();
        coarse.upsample_bilinear2d([size[2], size[3]], false, None, None)
    }

    /// The most probable class of each pixel, (B, H, W) row-major.
    ///
    /// # Errors
    /// [`ProbeError::Invalid`] where the network answers what is not a number.
    pub fn predict(&self, x: &Tensor) -> Result<Vec<u8>, ProbeError> {
        let logits = tch::no_grad(|| self.logits(x, false, None));
        if !logits.sum(Kind::Double).double_value(&[]).is_finite() {
            return Err(diverged());
        }
        let classes = logits.argmax(1, false).to_kind(Kind::Uint8).to_device(tch::Device::Cpu).flatten(0, -1);
        Vec::<u8>::try_from(classes).map_err(|error: tch::TchError| ProbeError::Invalid(error.to_string()))
    }

    /// Everything that is trained.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        self.backbone.parameters().into_iter().chain(self.head.parameters()).collect()
    }
}

/// Mean cross-entropy over the pixels of `classes` (B, H, W) that are not ignored; 0 where all are.
pub fn loss(logits: &Tensor, classes: &Tensor) -> Tensor {
    let counted = classes.not_equal(i64::from(IGNORED)).sum(Kind::Int64).clamp_min(1);
    let sum = logits.cross_entropy_loss(classes, None::<&Tensor>, Reduction::Sum, i64::from(IGNORED), 0.0);
    sum / counted
}

/// A tile to learn from, and the epoch whose view is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// From 0.
    pub tile: usize,
    /// From 0.
    pub epoch: u64,
}

/// Tiles in random order, epoch after epoch without end; batches run across epochs.
#[derive(Debug)]
struct Order {
    tiles: usize,
    seed: u64,
    epoch: Option<u64>,
    shuffled: Vec<usize>,
}

impl Order {
    fn batch(&mut self, step: u64, batch: usize) -> Vec<Wanted> {
        let (tiles, first) = (self.tiles as u64, step * batch as u64);
        (first..first + batch as u64)
            .map(|at| {
                let epoch = at / tiles;
                if self.epoch != Some(epoch) {
                    self.shuffled = (0..self.tiles).collect();
                    self.shuffled.shuffle(&mut rng(self.seed, Purpose::Evaluate, epoch, 0));
                    self.epoch = Some(epoch);
                }
                Wanted { tile: self.shuffled[(at % tiles) as usize], epoch }
            })
            .collect()
    }
}

/// Trains backbone and head on `tiles` tiles. `inputs` gives the views that are wanted: x (B, 3, H, W) and classes (B, H, W), int64.
/// `told` hears the steps that are done.
///
/// # Errors
/// [`ProbeError`] where there is no tile or the training diverges; whatever `inputs` meets.
pub fn train<E: From<ProbeError>>(
    segmenter: &Segmenter<'_>,
    recipe: &Recipe,
    seed: u64,
    tiles: usize,
    mut inputs: impl FnMut(&[Wanted]) -> Result<(Tensor, Tensor), E>,
    mut told: impl FnMut(u64),
) -> Result<(), E> {
    if tiles == 0 {
        return Err(ProbeError::Empty { half: "train" }.into());
    }
    let mut order = Order { tiles, seed, epoch: None, shuffled: Vec::new() };
    let mut sgd = Sgd::new(segmenter.parameters(), recipe.momentum, recipe.weight_decay);
    for step in 0..recipe.steps {
        let (x, classes) = inputs(&order.batch(step, recipe.batch.max(1)))?;
        let kept = (recipe.dropout > 0.0)
            .then(|| kept(recipe.dropout, [x.size()[0], segmenter.head.channels()], seed, step).to_device(x.device()));
        let loss = loss(&segmenter.logits(&x, true, kept.as_ref()), &classes);
        if (step % LOOK_EVERY == 0 || step + 1 == recipe.steps) && !loss.double_value(&[]).is_finite() {
            return Err(diverged().into());
        }
        sgd.zero_grad();
        loss.backward();
        sgd.step(recipe.lr_at(step)).map_err(ProbeError::from)?;
        told(step + 1);
    }
    Ok(())
}

/// Which channels of which tile stay, (B, C, 1, 1): 0, or what makes up for those that go.
fn kept(dropout: f64, [batch, channels]: [i64; 2], seed: u64, step: u64) -> Tensor {
    let mut draws = rng(seed, Purpose::Evaluate, step, 6);
    let stays = (1.0 / (1.0 - dropout)) as f32;
    let values: Vec<f32> =
        (0..batch * channels).map(|_| if draws.random::<f64>() < dropout { 0.0 } else { stays }).collect();
    Tensor::from_slice(&values).view([batch, channels, 1, 1])
}

fn diverged() -> ProbeError {
    ProbeError::Invalid("the segmenter's training diverged: its answers are not finite; lower --lr".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_every_tile_once_whatever_the_batch() {
        let mut order = Order { tiles: 7, seed: 3, epoch: None, shuffled: Vec::new() };
        let seen: Vec<Wanted> = (0..14).flat_map(|step| order.batch(step, 3)).collect();
        for (epoch, part) in (0..).zip(seen.chunks(7)) {
            let mut tiles: Vec<usize> = part.iter().map(|wanted| wanted.tile).collect();
            tiles.sort_unstable();
            assert_eq!(tiles, (0..7).collect::<Vec<_>>());
            assert!(part.iter().all(|wanted| wanted.epoch == epoch));
        }
        assert_ne!(
            seen[..7].iter().map(|w| w.tile).collect::<Vec<_>>(),
            seen[7..14].iter().map(|w| w.tile).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_rate_falls_as_mmsegmentations_poly() {
        let recipe = Recipe::default();
        assert_eq!(recipe.lr_at(0), 0.01);
        assert!((recipe.lr_at(10_000) - (0.0099 * 0.5_f64.powf(0.9) + 1e-4)).abs() < 1e-15);
        assert!(recipe.lr_at(19_999) > 1e-4 && recipe.lr_at(20_000) == 1e-4);
    }

    #[test]
    fn dropout_keeps_its_share_and_makes_up_for_the_rest() {
        let mask = kept(0.1, [16, 512], 1, 2);
        assert!((mask.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.02);
        let left_out = mask.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((left_out - 0.1).abs() < 0.02, "{left_out}");
    }
}
