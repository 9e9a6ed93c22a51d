//! The key encoder and its queue.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};

use sgcl::backbone::Arch;
use sgcl::model::{Model, Views};
use tch::{Device, Kind, Tensor};

fn model(seed: u64) -> Model {
    let model = Model::with_keys(Arch::ResNet18, 16, 8, Device::Cpu);
    model.init(seed);
    model.key.as_ref().unwrap().begin(&model.parameters(), seed, 100);
    model
}

fn views() -> Views {
    let ramp = |from: i64| Tensor::arange_start(from, from + 4 * 3 * 32 * 32, (Kind::Float, Device::Cpu)).sin();
    Views { global: ramp(0).view([4, 3, 32, 32]), local: None, key: Some(ramp(7).view([4, 3, 32, 32])) }
}

fn copies(model: &Model) -> BTreeMap<String, Tensor> {
    model.state().into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect()
}

#[test]
fn a_key_is_what_the_encoder_it_began_as_makes_of_the_second_view() {
    let model = model(1);
    let out = model.forward(&views(), true);
    let keys = out.keys.unwrap();
    assert!(!keys.requires_grad());
    let swapped = Views { global: views().key.unwrap(), ..views() };
    assert!(keys.allclose(&model.forward(&swapped, true).q, 1e-5, 1e-6, false));
    assert!(!keys.allclose(&out.q, 1e-2, 1e-3, false));
    let trained: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();
    assert!(trained.iter().all(|name| !name.starts_with("key.")), "nobody trains keys");
}

#[test]
fn dense_queries_meet_the_keys_of_the_positions_they_resemble() {
    let model = Model::with_dense_keys(Arch::ResNet18, 16, 8, Device::Cpu);
    model.init(1);
    model.key.as_ref().unwrap().begin(&model.parameters(), 1, 100);
    // Of 64 px: a map of two by two positions. The second view is the first one turned by half a circle.
    let global = Tensor::arange(4 * 3 * 64 * 64, (Kind::Float, Device::Cpu)).sqrt().sin().view([4, 3, 64, 64]);
    let key = global.flip([2, 3]);
    let out =
        model.forward(&Views { global: global.shallow_clone(), local: None, key: Some(key.shallow_clone()) }, true);
    let (queries, keys) = (out.ql.unwrap(), out.dense_keys.unwrap());
    assert_eq!((queries.size(), keys.size(), out.x.size()), (vec![16, 16], vec![16, 16], vec![4, 16]));
    assert!(queries.requires_grad() && !keys.requires_grad() && !out.x.requires_grad());

    // Written out position by position.
    let maps = |views: &Tensor| tch::no_grad(|| model.backbone.feature_map(views, true));
    let dense = model.dense.as_ref().unwrap();
    let (here, there) = (maps(&global), maps(&key));
    let cosine = |a: &Tensor, b: &Tensor| a.dot(b).double_value(&[]) / (a.norm() * b.norm()).double_value(&[]);
    let at = |map: &Tensor, patch: i64, position: i64| map.get(patch).select(1, position / 2).select(1, position % 2);
    for patch in 0..4 {
        let mut pooled = Tensor::zeros([16], (Kind::Float, Device::Cpu));
        for position in 0..4 {
            let query = at(&here, patch, position);
            let best = (0..4)
                .max_by(|&a, &b| {
                    cosine(&query, &at(&there, patch, a)).total_cmp(&cosine(&query, &at(&there, patch, b)))
                })
                .unwrap();
            let close = |found: &Tensor, map: &Tensor| {
                let expected = tch::no_grad(|| dense.forward(map));
                assert!(found.allclose(&expected, 1e-4, 1e-5, false), "patch {patch}, position {position}");
            };
            close(&queries.get(position * 4 + patch), &query);
            close(&keys.get(position * 4 + patch), &at(&there, patch, best));
            pooled += tch::no_grad(|| dense.project(&at(&there, patch, position)));
        }
        let pooled = &pooled / pooled.norm();
        assert!(out.x.get(patch).allclose(&pooled, 1e-4, 1e-5, false), "patch {patch}");
    }
}

#[test]
fn the_key_encoder_follows_by_its_momentum() {
    let model = model(1);
    let before = copies(&model);
    tch::no_grad(|| model.parameters().into_iter().for_each(|(_, mut p)| drop(p.g_add_scalar_(0.5))));
    let key = model.key.as_ref().unwrap();
    key.follow(&model.parameters(), 0.9);
    key.follow(&model.parameters(), 0.9);
    let after = copies(&model);
    for (name, _) in model.parameters() {
        // Two steps of a tenth of what is left of one half.
        let expected = &before[&format!("key.{name}")] + 0.5 * (1.0 - 0.9 * 0.9);
        assert!(after[&format!("key.{name}")].allclose(&expected, 1e-5, 1e-6, false), "{name}");
    }
}

#[test]
fn the_queue_holds_the_rows_written_last_and_begins_with_distinct_ones() {
    let model = model(1);
    let key = model.key.as_ref().unwrap();
    let first = key.queue();
    assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 8);
    assert!(first.iter().all(|row| (0..100).contains(row)));
    key.enqueue(&[3, 4, 5]);
    assert_eq!(key.queue(), [&[3, 4, 5], &first[..5]].concat());
    key.enqueue(&(10..22).collect::<Vec<_>>());
    assert_eq!(key.queue(), (10..18).collect::<Vec<_>>());
}

#[test]
fn keys_and_queue_are_part_of_the_state() {
    let (one, other) = (model(1), model(2));
    one.key.as_ref().unwrap().follow(&other.parameters(), 0.3);
    one.key.as_ref().unwrap().enqueue(&[9, 9]);
    other.load_state(&copies(&one), true).unwrap();
    assert_eq!(copies(&one), copies(&other));
    assert_eq!(one.forward(&views(), true).keys.unwrap(), other.forward(&views(), true).keys.unwrap());
    let mut without = copies(&one);
    drop(without.remove("key.queue").unwrap());
    assert!(other.load_state(&without, true).unwrap_err().to_string().contains("key.queue"));
}
