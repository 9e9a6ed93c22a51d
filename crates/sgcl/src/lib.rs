//! The method: backbones, views, sharded bank, neighbours, objectives, k-means, probes.

pub mod augment;
pub mod backbone;
pub mod bank;
pub mod collective;
mod dense;
pub mod draws;
pub mod image;
mod init;
pub mod kmeans;
pub mod model;
pub mod momentum;
pub mod neighbours;
pub mod objective;
pub mod optim;
pub mod probe;
pub mod projector;
pub mod schedule;
pub mod segment;
pub mod weights;
