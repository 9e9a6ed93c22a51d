//! `sgcl-worker segmentation`: encoders as backbones of a segmentation network, on images and masks laid out as BCSS.
//!
//! Prints JSON lines as `eval` does.

mod bcss;
mod mask;
mod pictures;
mod result;
mod tiles;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use rayon::prelude::*;
use serde_json::{Value, json};
use sgcl::backbone::{Arch, Backbone, OutputStride};
use sgcl::probe::rows::trial_seed;
use sgcl::segment::bcss::CLASSES;
use sgcl::segment::train::Wanted;
use sgcl::segment::views::Slot;
use sgcl::segment::{Augment, FcnHead, PixelConfusion, Recipe, Segmenter, train};
use sgcl::weights::{self, LoadReport};
use tch::{Device, Tensor};

use super::protocol::{restore, state};
use crate::encoder::Source;
use pictures::Pictures;
use tiles::Tiles;

/// Data that is not what it should be; the user's to mend.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SegmentationError(String);

/// What is done to tiles while learning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Step {
    /// Scaled by 0.5 to 2 and cut
    Crop,
    /// Mirrored
    Flip,
    /// Brightness, contrast, saturation, hue
    Colour,
    /// Nothing
    None,
}

/// Arguments of `sgcl-worker segmentation`.
#[derive(Args, Debug)]
pub(crate) struct SegmentationArgs {
    /// Folder with images and masks
    #[arg(long)]
    data: PathBuf,
    /// Encoders: a run's name (with --bucket), a weights file (.pth, .safetensors) or `random`
    #[arg(long, required = true, num_args = 1..)]
    weights: Vec<String>,
    /// Bucket that holds the runs named in --weights
    #[arg(long)]
    bucket: Option<String>,
    /// Architecture of weights files and of `random`; a run names its own
    #[arg(long)]
    arch: Option<Arch>,
    /// Institutes whose slides are validated on
    #[arg(long, value_delimiter = ',', required = true)]
    validation: Vec<String>,
    /// Side of a tile, pixels
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(32..=2048))]
    tile_px: u32,
    /// Trainings, each with other draws
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    trials: u64,
    /// Steps of a training
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    steps: u64,
    /// Tiles a step
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Learning rate at first
    #[arg(long, default_value_t = 0.01)]
    lr: f64,
    /// What is done to tiles while learning
    #[arg(long, value_delimiter = ',', default_values = ["crop", "flip", "colour"])]
    augment: Vec<Step>,
    /// Seed of all that is drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder for predicted classes and pictures
    #[arg(long)]
    save: Option<PathBuf>,
    /// Folder for the tiles while this runs [default: the system's]
    #[arg(long)]
    scratch: Option<PathBuf>,
}

impl SegmentationArgs {
    fn recipe(&self) -> Recipe {
        Recipe { lr: self.lr, steps: self.steps, batch: self.batch as usize, ..Recipe::default() }
    }

    fn augment(&self) -> Augment {
        let has = |step| self.augment.contains(&step);
        Augment { crop: has(Step::Crop), flip: has(Step::Flip), colour: has(Step::Colour) }
    }
}

/// Trains and validates every encoder on the same tiles.
///
/// # Errors
/// Whatever cannot be read, named; a folder without images to learn from or to validate on; weights of which no key matched.
pub(crate) fn main(
    runtime: &tokio::runtime::Handle,
    args: &SegmentationArgs,
    mut emit: impl FnMut(Value),
) -> Result<()> {
    let mut sources = Vec::new();
    for name in &args.weights {
        sources.push(runtime.block_on(Source::find(name, args.bucket.as_deref()))?);
    }
    let arch = match (args.arch, sources.iter().find_map(Source::spec)) {
        (Some(arch), _) => arch,
        (None, Some(spec)) => spec.config.backbone.arch.name().parse()?,
        (None, None) => Arch::ResNet18,
    };
    let folder = bcss::Folder::find(&args.data, &args.validation)?;
    let mut read = |half: &str, pairs: &[bcss::Pair]| {
        let told = |done: u64, total: u64| {
            emit(json!({ "progress": { "done": done, "total": total, "what": format!("{half} images") } }));
        };
        Tiles::read(pairs, args.tile_px, args.scratch.as_deref(), told)
    };
    let learnt = read("training", &folder.train)?;
    let tested = read("validation", &folder.validation)?;
    let work = Work { args, learnt: learnt.labelled(), learnt_tiles: &learnt, tested: &tested };
    work.check()?;
    for (at, (name, source)) in args.weights.iter().zip(&sources).enumerate() {
        let (backbone, keys) = runtime.block_on(load(source, arch, args))?;
        let pictures = args.save.as_deref().map(|folder| Pictures::new(folder, at, name)).transpose()?;
        let result = work.evaluate(name, &backbone, keys.as_ref(), pictures.as_ref(), &mut emit)?;
        emit(json!({ "result": result }));
    }
    Ok(())
}

/// The dilated backbone. What a file lacks keeps the weights that `random` has.
async fn load(source: &Source, arch: Arch, args: &SegmentationArgs) -> Result<(Backbone, Option<LoadReport>)> {
    let backbone = Backbone::with_stride(arch, OutputStride::Eight, Device::cuda_if_available());
    backbone.init(args.seed, 0);
    let keys = match source.tensors(args.bucket.as_deref()).await? {
        Some(tensors) => Some(weights::load_backbone_from(&backbone, &tensors).with_context(|| source.to_string())?),
        None => None,
    };
    Ok((backbone, keys))
}

/// What all encoders share.
struct Work<'a> {
    args: &'a SegmentationArgs,
    learnt_tiles: &'a Tiles,
    /// Tiles to learn from, by number: those with a pixel that counts.
    learnt: Vec<usize>,
    tested: &'a Tiles,
}

/// What one training found on the images to validate on.
struct Trial {
    /// By image.
    images: Vec<PixelConfusion>,
}

impl Work<'_> {
    fn check(&self) -> Result<()> {
        let bare = |half: &str| {
            SegmentationError(format!(
                "{}: no pixel of the {half} images has a class, all masks are 0 there; give images with annotated regions",
                self.args.data.display()
            ))
        };
        if self.learnt.is_empty() {
            return Err(bare("training").into());
        }
        if self.tested.labelled().is_empty() {
            return Err(bare("validation").into());
        }
        Ok(())
    }

    /// One encoder over all trials, each from the same weights.
    fn evaluate(
        &self,
        name: &str,
        backbone: &Backbone,
        keys: Option<&LoadReport>,
        pictures: Option<&Pictures>,
        emit: &mut impl FnMut(Value),
    ) -> Result<Value> {
        let before: Vec<Tensor> = state(backbone).iter().map(Tensor::copy).collect();
        let steps = self.args.steps * self.args.trials;
        let (mut trials, mut drawn) = (Vec::new(), Vec::new());
        for trial in 0..self.args.trials {
            restore(backbone, &before);
            let seed = trial_seed(self.args.seed, trial);
            let head = FcnHead::new(backbone.arch().width(), CLASSES.len(), seed, Device::cuda_if_available());
            let segmenter = Segmenter { backbone, head };
            let told = |done: u64, total: u64, what: &str| json!({ "progress": { "done": done, "total": total, "what": what } });
            train::<anyhow::Error>(
                &segmenter,
                &self.args.recipe(),
                seed,
                self.learnt.len(),
                |wanted| self.train_views(wanted, seed),
                |step| emit(told(trial * self.args.steps + step, steps, &format!("segmentation of {name}"))),
            )?;
            let pictures = pictures.map(|pictures| pictures.of_trial(trial)).transpose()?;
            let images = self.tested.images.len() as u64;
            let (found, saved) = self.validate(&segmenter, pictures.as_ref(), |image| {
                emit(told(image, images, &format!("validation of {name}")));
            })?;
            trials.push(found);
            if trial == 0 {
                drawn = saved;
            }
        }
        Ok(result::of(name, backbone, keys, self, &trials, &drawn))
    }

    fn train_views(&self, wanted: &[Wanted], seed: u64) -> Result<(Tensor, Tensor)> {
        let augment = self.args.augment();
        self.views(wanted, |slot, wanted| {
            let number = self.learnt[wanted.tile];
            let tile = self.learnt_tiles.tile(number)?;
            slot.train(&tile, augment, seed, wanted.epoch, number as u64);
            Ok(())
        })
    }

    /// x (B, 3, px, px) and classes (B, px, px) on the device, made on all cores.
    fn views<T: Sync>(
        &self,
        items: &[T],
        make: impl Fn(&mut Slot<'_>, &T) -> Result<()> + Sync,
    ) -> Result<(Tensor, Tensor)> {
        let px = self.args.tile_px;
        let area = (px * px) as usize;
        let (mut values, mut classes) = (vec![0_f32; 3 * area * items.len()], vec![0_i64; area * items.len()]);
        values
            .par_chunks_mut(3 * area)
            .zip(classes.par_chunks_mut(area))
            .zip(items)
            .try_for_each(|((values, classes), item)| make(&mut Slot { values, classes, px }, item))?;
        let (device, side) = (Device::cuda_if_available(), i64::from(px));
        let x = Tensor::from_slice(&values).view([-1, 3, side, side]).to_device(device);
        Ok((x, Tensor::from_slice(&classes).view([-1, side, side]).to_device(device)))
    }

    /// Every image to validate on, whole; where pictures are wanted, the names of those that were drawn.
    fn validate(
        &self,
        segmenter: &Segmenter<'_>,
        pictures: Option<&Pictures>,
        mut told: impl FnMut(u64),
    ) -> Result<(Trial, Vec<Option<PathBuf>>)> {
        let (mut images, mut drawn) = (Vec::new(), Vec::new());
        for (number, image) in self.tested.images.iter().enumerate() {
            let mut canvas = pictures::Canvas::new(image.width, image.height, pictures.is_some());
            for batch in image.tiles().collect::<Vec<_>>().chunks(self.args.batch as usize) {
                let (x, _) = self.views(batch, |slot, &tile| {
                    slot.test(&self.tested.tile(tile)?);
                    Ok(())
                })?;
                let predicted = segmenter.predict(&x)?;
                let px = self.args.tile_px as usize;
                for (&tile, predicted) in batch.iter().zip(predicted.chunks_exact(px * px)) {
                    canvas.put(self.tested.place(tile), &self.tested.tile(tile)?, predicted, px);
                }
            }
            let mut confusion = PixelConfusion::new(CLASSES.len());
            confusion.add(&canvas.truth, &canvas.predicted);
            images.push(confusion);
            drawn.push(pictures.map(|pictures| pictures.save(&image.name, &canvas)).transpose()?);
            told(number as u64 + 1);
        }
        Ok((Trial { images }, drawn))
    }
}
