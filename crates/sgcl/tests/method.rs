//! Neighbours, draws, banks, k-means, the optimiser and the schedule against independent statements of the same thing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;
use sgcl::bank::{Bank, BankRows, Banks, ShardPlan, Widths, rows_of_shard, shard_of};
use sgcl::collective::Solo;
use sgcl::draws::{HardRanks, negatives};
use sgcl::kmeans::{KMeans, cluster, joint_labels};
use sgcl::neighbours::Lattice;
use sgcl::objective::{HardKey, Inter, Local, Negatives, Params, ParamsError, Pool, StepInputs, step};
use sgcl::optim::Sgd;
use sgcl::schedule::{cosine, rampup};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

fn seed() -> u64 {
    std::env::var("SGCL_SEED").ok().and_then(|v| v.parse().ok()).unwrap_or(7)
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_kind(Kind::Double).contiguous().view([-1]).try_into().unwrap()
}

proptest! {
    #[test]
    fn neighbours_are_those_of_a_search_through_all_patches(
        patches in prop::collection::vec((0_u32..3, -6_i32..6, -6_i32..6), 1..120),
        radius in 0.5_f64..6.0,
    ) {
        let column = |f: fn(&(u32, i32, i32)) -> i32| patches.iter().map(f).collect::<Vec<_>>();
        let slides: Vec<u32> = patches.iter().map(|p| p.0).collect();
        let lattice = Lattice::new(&slides, &column(|p| p.1), &column(|p| p.2)).unwrap();
        for (id, a) in patches.iter().enumerate() {
            let want: Vec<i64> = patches.iter().enumerate().filter(|(_, b)| {
                let d2 = f64::from((a.1 - b.1).pow(2) + (a.2 - b.2).pow(2));
                a.0 == b.0 && d2 > 0.0 && d2 < radius * radius
            }).map(|(row, _)| row as i64).collect();
            prop_assert_eq!(lattice.neighbours(id as i64, radius).unwrap(), want);
        }
    }
}

#[test]
fn a_patch_inside_a_full_lattice_has_24_neighbours_and_an_isolated_one_none() {
    let x: Vec<i32> = (0..49).map(|i| i % 7).chain([i32::MAX]).collect();
    let y: Vec<i32> = (0..49).map(|i| i / 7).chain([i32::MIN]).collect();
    let lattice = Lattice::new(&[0; 50], &x, &y).unwrap();
    assert_eq!(lattice.neighbours(24, 3.0).unwrap().len(), 24);
    assert!(lattice.neighbours(49, 3.0).unwrap().is_empty());
    assert!(lattice.neighbours(50, 3.0).is_none() && lattice.neighbours(-1, 3.0).is_none());
}

#[test]
fn hard_ranks_are_distinct_and_single_ones_follow_beta_5_15() {
    let (top, seed) = (200, seed());
    let many = HardRanks::new(top, 150, [5.0, 15.0]).draw(seed, 0, 0, 0);
    assert_eq!(many.iter().collect::<BTreeSet<_>>().len(), 150);
    assert!(many.iter().all(|&r| (0..200).contains(&r)));
    let single = HardRanks::new(top, 1, [5.0, 15.0]);
    let draws = 20_000;
    let mut seen = [0_f64; 10];
    for s in 0..draws {
        seen[single.draw(seed, 1, s, 0)[0] as usize / 20] += 1.0;
    }
    let pdf = |r: usize| {
        let p = (r as f64 + 0.5) / top as f64;
        p.powi(4) * (1.0 - p).powi(14)
    };
    let total: f64 = (0..top).map(pdf).sum();
    let expected: Vec<f64> =
        (0..10).map(|d| (d * 20..d * 20 + 20).map(pdf).sum::<f64>() / total * draws as f64).collect();
    let chi2: f64 = seen.iter().zip(&expected).filter(|(_, e)| **e > 5.0).map(|(s, e)| (s - e).powi(2) / e).sum();
    assert!(chi2 < 35.0, "chi-square {chi2} of {seen:?} against {expected:?}, SGCL_SEED={seed}");
}

#[test]
fn negatives_are_uniform_and_a_function_of_seed_epoch_step_and_lane() {
    let seed = seed();
    let draw = negatives(seed, 1, 2, 3, 50_000, 50);
    let mut seen = [0_f64; 50];
    draw.iter().for_each(|&r| seen[r as usize] += 1.0);
    let chi2: f64 = seen.iter().map(|s| (s - 1000.0).powi(2) / 1000.0).sum();
    assert!(chi2 < 100.0, "chi-square {chi2} with 49 degrees, SGCL_SEED={seed}");
    assert_eq!(draw, negatives(seed, 1, 2, 3, 50_000, 50));
    for other in [(1, 2, 4), (1, 3, 3), (2, 2, 3)] {
        assert_ne!(draw, negatives(seed, other.0, other.1, other.2, 50_000, 50));
    }
}

fn banks(seed: u64, n: i64, [dim, backbone]: [i64; 2]) -> Banks {
    let widths = Widths { dim, backbone, local: dim };
    Banks::random(seed, n, widths, ShardPlan::new(&[0], false), 0, (Kind::Float, Device::Cpu))
}

/// All rows of a world of one, in order.
fn all(banks: &Banks) -> BankRows {
    banks.rows(&(0..banks.len()).collect::<Vec<_>>()).unwrap()
}

fn rows_for(banks: &Banks, n: i64) -> BankRows {
    let Widths { dim, backbone: wide, .. } = banks.widths();
    let ones = |width| Tensor::ones([n, width], (Kind::Float, Device::Cpu));
    BankRows { global: ones(dim), backbone: ones(wide), corners: [(); 4].map(|()| ones(dim)) }
}

#[test]
fn initial_rows_are_unit_and_depend_on_seed_and_patch_alone() {
    let (small, large) = (all(&banks(1, 10, [8, 16])), all(&banks(1, 30, [8, 16])));
    assert_eq!(small.global, large.global.narrow(0, 0, 10));
    assert_eq!(small.backbone, large.backbone.narrow(0, 0, 10));
    assert_ne!(small.global, small.corners[0]);
    assert!(
        values(&large.backbone.square().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float))
            .iter()
            .all(|l| (l - 1.0).abs() < 1e-5)
    );
}

#[test]
fn the_last_feature_of_a_repeated_patch_counts() {
    let (mut twice, mut once) = (banks(1, 10, [8, 16]), banks(1, 10, [8, 16]));
    let features = rows_for(&twice, 2);
    let _ = features.global.get(0).neg_();
    twice.apply(&[4, 4], &features, 0.5).unwrap();
    once.apply(&[4], &rows_for(&once, 1), 0.5).unwrap();
    assert_eq!(twice.bank(Bank::Global), once.bank(Bank::Global));
    assert!(twice.apply(&[10], &rows_for(&once, 1), 0.5).unwrap_err().to_string().contains("10"));
}

#[test]
fn exported_shards_put_back_make_the_same_bank() {
    let from = banks(1, 3000, [4, 8]);
    let mut to = banks(2, 3000, [4, 8]);
    for shard in 0..1024 {
        let ids: Vec<i64> = rows_of_shard(shard, 3000).collect();
        assert!(ids.iter().all(|&id| shard_of(id) == shard));
        to.put(&ids, &from.rows(&ids).unwrap()).unwrap();
    }
    for bank in [Bank::Global, Bank::Backbone, Bank::Corner(0), Bank::Corner(3)] {
        assert_eq!(from.bank(bank), to.bank(bank));
    }
}

#[test]
fn k_means_repeats_itself_and_leaves_no_cluster_empty() {
    let centres = Tensor::eye(6, (Kind::Float, Device::Cpu));
    let mut banks = banks(seed(), 600, [6, 6]);
    let noise = all(&banks);
    let rows = BankRows { global: centres.repeat([100, 1]) + &noise.global * 0.05, ..noise };
    banks.put(&(0..600).collect::<Vec<_>>(), &rows).unwrap();
    let size = KMeans { runs: 2, clusters: 6, iterations: 20 };
    let labels = cluster(&banks, size, seed(), 0, &Solo).unwrap();
    assert_eq!(labels, cluster(&banks, size, seed(), 0, &Solo).unwrap());
    assert_eq!(labels.size(), [2, 600]);
    for run in 0..2 {
        let labels: Vec<i64> = labels.get(run).try_into().unwrap();
        assert_eq!(labels.iter().collect::<BTreeSet<_>>().len(), 6, "SGCL_SEED={}", seed());
    }
    assert!(cluster(&banks, KMeans { clusters: 601, ..size }, 1, 0, &Solo).is_err());
    assert!(cluster(&banks, KMeans { clusters: 600, runs: 7, ..size }, 1, 0, &Solo).is_err(), "600^7 is beyond 2^62");
}

#[test]
fn joint_labels_agree_exactly_where_every_run_agrees() {
    let labels = Tensor::from_slice(&[0_i64, 0, 1, 1, 0, 2, 2, 2, 0, 2, 5, 5, 5, 5, 5]).view([3, 5]);
    let joint: Vec<i64> = joint_labels(&labels, 6).try_into().unwrap();
    for a in 0..5 {
        for b in 0..5 {
            let agree = (0..3).all(|m| labels.int64_value(&[m, a]) == labels.int64_value(&[m, b]));
            assert_eq!(joint[a as usize] == joint[b as usize], agree);
        }
    }
}

#[test]
fn sgd_follows_the_formula_and_resumes_from_its_state() {
    let p = Tensor::from_slice(&[1.0_f32, -2.0]).set_requires_grad(true);
    let mut sgd = Sgd::new([("p".to_owned(), p.shallow_clone())], 0.9, 1e-4);
    let (mut want, mut m) = ([1.0_f64, -2.0], [0.0_f64; 2]);
    for step in 0..5 {
        sgd.zero_grad();
        (&p * &p).sum(Kind::Float).backward();
        sgd.step(0.1).unwrap();
        for i in 0..2 {
            m[i] = 0.9 * m[i] + 2.0 * want[i] + 1e-4 * want[i];
            want[i] -= 0.1 * m[i];
        }
        assert!(values(&p).iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "step {step}");
        let state = sgd.state();
        sgd = Sgd::new([("p".to_owned(), p.shallow_clone())], 0.9, 1e-4);
        sgd.load_state(state).unwrap();
    }
    assert!(sgd.load_state([("q".to_owned(), p.copy())]).is_err());
}

#[test]
fn schedules_start_and_end_where_published() {
    assert!((cosine(0.015, 0, 100) - 0.015).abs() < 1e-12);
    assert!((cosine(0.03, 50, 100) - 0.015).abs() < 1e-12);
    assert!(cosine(0.015, 100, 100).abs() < 1e-12);
    assert!((rampup(0.0) - (-5.0_f64).exp()).abs() < 1e-12 && (rampup(10.0) - 1.0).abs() < 1e-12);
}

#[test]
fn a_configuration_that_does_not_fit_is_refused_with_the_numbers() {
    let p = Params::default();
    assert!(p.check(20_480).is_ok());
    let refused = p.check(20_479).unwrap_err();
    assert_eq!(refused, ParamsError::Hard { hard: 4096, top_fraction: 0.2, n: 20_479, top: 4095 });
    assert!(refused.to_string().contains("4096") && refused.to_string().contains("20479"));
    assert!(matches!(Params { nearest: 30_000, ..p.clone() }.check(30_000), Err(ParamsError::Nearest { .. })));
    assert!(matches!(Params { clusters: 30_001, ..p }.check(30_000), Err(ParamsError::Clusters { .. })));
}

#[test]
fn shared_negatives_give_the_loss_of_the_same_rows_per_anchor_and_isolated_anchors_no_nan() {
    let banks = banks(seed(), 200, [8, 16]);
    let all = all(&banks);
    let p = Params { nearest: 1, hard: 10, negatives: 16, clusters: 2, ..Params::default() };
    // Two anchors without neighbours; every patch its own cluster, so no semantic positives either.
    let run = |negatives: Negatives| {
        let q = all.corners[0].narrow(0, 50, 2).copy().set_requires_grad(true);
        let ql = all.corners[1].narrow(0, 60, 8).copy().set_requires_grad(true);
        let out = step(
            &StepInputs {
                q: &q,
                x: &all.backbone.narrow(0, 5, 2),
                ql: &ql,
                dense_keys: None,
                keys: None,
                ids: &[vec![3, 4]],
                spatial: &[vec![], vec![]],
                clusters: &Tensor::arange(200, (Kind::Int64, Device::Cpu)),
                pool: &Pool::exact(&banks),
                hard_ranks: &Tensor::arange(10, (Kind::Int64, Device::Cpu)),
                negatives: &negatives,
                key: HardKey::default(),
                inter_weight: 1.0,
            },
            &banks,
            &p,
            &Solo,
        )
        .unwrap();
        out.total.backward();
        assert_eq!(out.inter.double_value(&[]), 0.0);
        [values(&out.intra), values(&out.inner), values(&q.grad()), values(&ql.grad())].concat()
    };
    let rows = vec![3_i64, 9, 17, 4, 50, 61, 72, 83, 94, 105, 116, 127, 138, 149, 150, 3];
    let shared = run(Negatives::Shared(rows.clone()));
    let intra_alike = run(Negatives::PerAnchor(rows.repeat(2)));
    let inner_alike = run(Negatives::PerAnchor(rows[..4].repeat(8)));
    assert!(shared.iter().all(|v| v.is_finite()));
    assert!((shared[0] - intra_alike[0]).abs() < 1e-5 && (shared[1] - inner_alike[1]).abs() < 1e-5);
}

#[rstest::rstest]
#[case::npid(false)]
#[case::npid_mcrop(true)]
fn methods_without_an_inter_term_are_instance_discrimination_and_nothing_else(#[case] inner: bool) {
    let (n, d, b, k) = (120, 8, 3, 12);
    let widths = Widths { dim: d, backbone: 0, local: if inner { d } else { 0 } };
    let banks = Banks::random(seed(), n, widths, ShardPlan::new(&[0], false), 0, (Kind::Float, Device::Cpu));
    let all = all(&banks);
    let ids = [7_i64, 40, 99];
    let rows = negatives(seed(), 0, 0, 0, k, n);
    let other = Banks::random(
        seed() + 1,
        n,
        Widths { local: d, ..widths },
        ShardPlan::new(&[0], false),
        0,
        (Kind::Float, Device::Cpu),
    );
    let leaf = |t: Tensor| t.copy().set_requires_grad(true);
    let q = leaf(self::all(&other).global.narrow(0, 0, b));
    let ql = leaf(self::all(&other).corners[0].narrow(0, 0, 4 * b).narrow(1, 0, widths.local));
    // The definition, with autograd: the own row against the drawn ones, the own row never a negative.
    let cross_entropy = |q: &Tensor, own: &Tensor, negatives: &Tensor, hit: &Tensor| {
        let positive = (q * own).sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
        let logits = Tensor::cat(&[positive, q.matmul(&negatives.tr()).masked_fill(hit, f64::NEG_INFINITY)], 1) / 0.2;
        logits.cross_entropy_for_logits(&Tensor::zeros([q.size()[0]], (Kind::Int64, Device::Cpu)))
    };
    let at = |bank: &Tensor, rows: &[i64]| bank.index_select(0, &Tensor::from_slice(rows));
    let hit = |rows: &[i64]| Tensor::from_slice(&ids).unsqueeze(1).eq_tensor(&Tensor::from_slice(rows).unsqueeze(0));
    let mut want = cross_entropy(&q, &at(&all.global, &ids), &at(&all.global, &rows), &hit(&rows));
    if inner {
        let quarter = &rows[..k / 4];
        let negatives: Vec<Tensor> = all.corners.iter().map(|corner| at(corner, quarter)).collect();
        let own: Vec<Tensor> = all.corners.iter().map(|corner| at(corner, &ids)).collect();
        let hits = hit(quarter).repeat([4, 4]);
        want += cross_entropy(&ql, &Tensor::cat(&own, 0), &Tensor::cat(&negatives, 0), &hits);
    }
    want.backward();
    let gradients = |leaf: &Tensor| if leaf.grad().defined() { values(&leaf.grad()) } else { Vec::new() };
    let expected = [vec![want.double_value(&[])], gradients(&q), gradients(&ql)].concat();
    for leaf in [&q, &ql] {
        if leaf.grad().defined() {
            let _ = leaf.grad().zero_();
        }
    }
    let out = step(
        &StepInputs {
            q: &q,
            x: &Tensor::zeros([b, 0], (Kind::Float, Device::Cpu)),
            ql: &ql,
            dense_keys: None,
            keys: None,
            ids: &[ids.to_vec()],
            spatial: &[vec![], vec![], vec![]],
            clusters: &Tensor::zeros([n], (Kind::Int64, Device::Cpu)),
            pool: &Pool::exact(&banks),
            hard_ranks: &Tensor::zeros([0], (Kind::Int64, Device::Cpu)),
            negatives: &Negatives::Shared(rows.clone()),
            key: HardKey::default(),
            inter_weight: 1.0,
        },
        &banks,
        &Params {
            inter: Inter::None,
            local: if inner { Local::Corners } else { Local::None },
            negatives: k as i64,
            ..Params::default()
        },
        &Solo,
    )
    .unwrap();
    out.total.backward();
    let found =
        [vec![out.total.double_value(&[])], gradients(&q), if inner { gradients(&ql) } else { Vec::new() }].concat();
    assert_eq!(found.len(), expected.len());
    assert!(
        found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5),
        "{found:?} {expected:?}, SGCL_SEED={}",
        seed()
    );
    assert_eq!(out.inter.double_value(&[]), 0.0);
}
