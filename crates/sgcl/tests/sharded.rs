//! A bank dealt over ranks: the same step in every world, shards that move, draws within strata, samples of the bank.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::seed;
use sgcl::bank::{Bank, BankRows, Banks, Held, Layout, ShardPlan, Widths, lost, unit};
use sgcl::collective::{Collective, Solo, Threads};
use sgcl::draws::{HardRanks, candidates, negatives};
use sgcl::kmeans::{KMeans, cluster, inertia};
use sgcl::objective::{Found, HardBy, HardKey, Negatives, Params, Pool, RowLists, StepInputs, step};
use std::collections::BTreeSet;
use tch::{Device, Kind, Tensor};

const N: i64 = 6000;
const WIDTHS: Widths = Widths { dim: 16, backbone: 24, local: 16 };
const ANCHORS: i64 = 12;

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn values(t: &Tensor) -> Vec<f64> {
    t.to_kind(Kind::Double).contiguous().view([-1]).try_into().unwrap()
}

fn plan(world: usize, replicas: bool) -> ShardPlan {
    ShardPlan::new(&(0..world).collect::<Vec<_>>(), replicas)
}

/// Rows around some directions, so that similarities have structure.
fn banks(plan: ShardPlan, rank: usize, dtype: Kind) -> Banks {
    let whole = Banks::random(seed(), N, WIDTHS, ShardPlan::new(&[0], false), 0, CPU);
    let ids: Vec<i64> = (0..N).collect();
    let rows = whole.rows(&ids).unwrap();
    let towards = |t: &Tensor, weight: f64| {
        let centre = t.narrow(0, 0, 8).repeat([N / 8, 1]);
        unit(&(t * (1.0 - weight) + centre * weight))
    };
    let rows = BankRows {
        global: towards(&rows.global, 0.4),
        backbone: towards(&rows.backbone, 0.5),
        corners: rows.corners.map(|corner| towards(&corner, 0.3)),
    };
    let mut banks = Banks::random(seed(), N, WIDTHS, plan, rank, (dtype, Device::Cpu));
    banks.put(&ids, &rows).unwrap();
    banks
}

fn params(hard_by: HardBy) -> Params {
    Params { nearest: 200, negatives: 400, hard: 150, clusters: 8, t_spatial: 0.2, hard_by, ..Params::default() }
}

/// Results of one step: losses, gradients and what was found, as sets of rows by anchor.
struct Outcome {
    numbers: Vec<f64>,
    positives: Vec<BTreeSet<i64>>,
    hard: Vec<BTreeSet<i64>>,
}

fn sets(lists: &RowLists) -> Vec<BTreeSet<i64>> {
    let (rows, valid) = (values(&lists.rows), values(&lists.valid));
    let width = lists.rows.size()[1] as usize;
    let anchors = lists.rows.size()[0] as usize;
    let counted = |anchor: usize| (anchor * width..(anchor + 1) * width).filter(|&at| valid[at] > 0.0);
    (0..anchors).map(|anchor| counted(anchor).map(|at| rows[at] as i64).collect()).collect()
}

/// One step of `ANCHORS` anchors among `world` ranks. Losses are means over all anchors, gradients those of their sum.
fn outcome(world: usize, params: &Params, draw: u64, sample: Option<i64>, dtype: Kind) -> Outcome {
    let threads: Vec<_> = Threads::world(world)
        .into_iter()
        .map(|ring| {
            let params = params.clone();
            std::thread::spawn(move || rank(&ring, &params, draw, sample, dtype))
        })
        .collect();
    let ranks: Vec<(Vec<f64>, Found)> = threads.into_iter().map(|rank| rank.join().unwrap()).collect();
    let mut numbers = vec![0.0; 3];
    for (losses, _) in &ranks {
        (0..3).for_each(|at| numbers[at] += losses[at]);
    }
    numbers.extend(ranks.iter().flat_map(|(losses, _)| losses[3..].iter().copied()));
    let merge = |of: fn(&Found) -> &RowLists| {
        let mut all = vec![BTreeSet::new(); ANCHORS as usize];
        for (_, found) in &ranks {
            sets(of(found)).into_iter().zip(&mut all).for_each(|(one, all)| all.extend(one));
        }
        all
    };
    Outcome { numbers, positives: merge(|f| &f.positives.union), hard: merge(|f| &f.hard) }
}

fn rank(ring: &Threads, params: &Params, draw: u64, sample: Option<i64>, dtype: Kind) -> (Vec<f64>, Found) {
    let (rank, world) = (ring.rank() as i64, ring.world() as i64);
    let banks = banks(plan(ring.world(), true), ring.rank(), dtype);
    let from_bank = |ids: &[i64]| {
        let one = self::banks(ShardPlan::new(&[0], false), 0, Kind::Float);
        one.rows(ids).unwrap()
    };
    let ids: Vec<Vec<i64>> = (0..world)
        .map(|r| (ANCHORS * r / world..ANCHORS * (r + 1) / world).map(|anchor| anchor * 401 + 3).collect())
        .collect();
    let mine = &ids[rank as usize];
    let (count, noise) = (mine.len() as i64, from_bank(&mine.iter().map(|id| id + 1).collect::<Vec<_>>()));
    let own = from_bank(mine);
    let leaf = |t: Tensor| t.detach().copy().set_requires_grad(true);
    let q = leaf(unit(&(&own.global * 0.4 + &noise.global)));
    let ql = leaf(Tensor::cat(&own.corners, 0));
    let spatial: Vec<Vec<i64>> = ids.iter().flatten().map(|id| (id + 1..id + 2 + id % 9).collect()).collect();
    let clusters = banks.slot_rows().remainder(8);
    let pool = match sample {
        None => Pool::exact(&banks),
        Some(count) => Pool::sampled(&banks, count, seed(), 0, draw),
    };
    let hard = HardRanks::new(params.top(pool.total()) as usize, params.hard as usize, [5.0, 15.0]);
    let out = step(
        &StepInputs {
            q: &q,
            x: &unit(&(&own.backbone + &noise.backbone * 0.3)),
            ql: &ql,
            dense_keys: None,
            keys: None,
            ids: &ids,
            spatial: &spatial,
            clusters: &clusters,
            pool: &pool,
            hard_ranks: &Tensor::from_slice(&hard.draw(seed(), 0, draw, 0)),
            negatives: &Negatives::Shared(negatives(seed(), 0, draw, 0, params.negatives as usize, N)),
            key: HardKey::new(seed(), 0, draw),
            inter_weight: 1.0,
        },
        &banks,
        params,
        ring,
    )
    .unwrap();
    // Every anchor has positives, so all terms are means over anchors.
    let share = count as f64 / ANCHORS as f64;
    let mut numbers: Vec<f64> = [&out.intra, &out.inter, &out.inner].map(|l| l.double_value(&[]) * share).to_vec();
    if count > 0 {
        (out.total * share).backward();
        let corners = ql.grad().view([4, count, -1]).transpose(0, 1).reshape([count, -1]);
        numbers.extend(values(&Tensor::cat(&[q.grad(), corners], 1)));
    }
    (numbers, out.found)
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let most = a.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / most
}

/// Rows that one of the two has and the other has not.
fn swapped(a: &[BTreeSet<i64>], b: &[BTreeSet<i64>]) -> usize {
    a.iter().zip(b).map(|(a, b)| a.symmetric_difference(b).count()).sum()
}

#[test]
fn every_world_computes_the_same_step() {
    for (hard_by, sample) in
        [(HardBy::Rank, None), (HardBy::Strata, None), (HardBy::Rank, Some(2500)), (HardBy::Strata, Some(2500))]
    {
        let params = params(hard_by);
        let (mut same, mut all) = (0, 0);
        for draw in 0..4 {
            let one = outcome(1, &params, draw, sample, Kind::Float);
            assert!(one.hard.iter().all(|rows| rows.len() == 150), "{hard_by:?} {sample:?}: 150 hard negatives each");
            for world in [2, 3, 5] {
                let other = outcome(world, &params, draw, sample, Kind::Float);
                let what = format!("{hard_by:?} {sample:?} on {world} ranks, SGCL_SEED={}", seed());
                all += 1;
                // Rows whose scores differ in the last bit only may change places with the shape of a matrix product.
                let moved = swapped(&one.positives, &other.positives) + swapped(&one.hard, &other.hard);
                assert!(moved <= 8, "{what}: {moved} of 3,600 rows are others");
                if moved == 0 {
                    same += 1;
                    let far = far(&one.numbers, &other.numbers);
                    assert!(far < 1e-5, "{what}: off by {far}");
                }
            }
        }
        assert!(2 * same >= all, "{hard_by:?} {sample:?}: the same rows in {same} of {all}, SGCL_SEED={}", seed());
    }
}

#[test]
fn banks_of_fewer_bits_cost_little() {
    let params = params(HardBy::Rank);
    let exact = outcome(2, &params, 5, None, Kind::Float);
    for (dtype, bound) in [(Kind::BFloat16, 0.06), (Kind::Half, 0.02)] {
        let rough = outcome(2, &params, 5, None, dtype);
        for (at, name) in ["intra", "inter", "inner"].iter().enumerate() {
            let error = (exact.numbers[at] - rough.numbers[at]).abs() / exact.numbers[at];
            assert!(error < bound, "{dtype:?}: {name} is off by {error}");
        }
    }
}

/// Backbone similarity of the anchors to all rows, without positives and themselves: (B, N).
fn ranking(positives: &[BTreeSet<i64>]) -> Tensor {
    let whole = banks(ShardPlan::new(&[0], false), 0, Kind::Float);
    let rows = |ids: Vec<i64>| whole.rows(&ids).unwrap();
    let ids: Vec<i64> = (0..ANCHORS).map(|anchor| anchor * 401 + 3).collect();
    let (own, noise) = (rows(ids.clone()), rows(ids.iter().map(|id| id + 1).collect()));
    let x = unit(&(&own.backbone + &noise.backbone * 0.3));
    let mut scores = x.matmul(&rows((0..N).collect()).backbone.tr());
    for (anchor, (id, positives)) in (0_i64..).zip(ids.iter().zip(positives)) {
        let out: Vec<i64> = positives.iter().chain([id]).copied().collect();
        let _ = scores.get(anchor).index_fill_(0, &Tensor::from_slice(&out), f64::NEG_INFINITY);
    }
    scores = scores.argsort(1, true);
    scores
}

#[test]
fn hard_negatives_by_strata_have_the_law_of_drawn_ranks() {
    // Mean rank, and mean and variance of Σ e^{s/T}, over draws; the reference takes the rows at the drawn ranks of a full sort.
    let whole = banks(ShardPlan::new(&[0], false), 0, Kind::Float);
    let all = whole.rows(&(0..N).collect::<Vec<_>>()).unwrap();
    let draws = 150;
    let mut sums = [Vec::new(), Vec::new()];
    let mut means = [Vec::new(), Vec::new()];
    for draw in 0..draws {
        for (at, hard_by) in [HardBy::Rank, HardBy::Strata].into_iter().enumerate() {
            // Draws of their own, so that the two samples are independent.
            let out = outcome(1, &params(hard_by), 1000 * at as u64 + draw, None, Kind::Float);
            let order = ranking(&out.positives);
            let ids: Vec<i64> = (0..ANCHORS).map(|anchor| anchor * 401 + 3).collect();
            let s = all.global.index_select(0, &Tensor::from_slice(&ids)).matmul(&all.global.tr());
            let place = order.argsort(1, false);
            for (anchor, rows) in (0_i64..).zip(&out.hard) {
                let rows = Tensor::from_slice(&rows.iter().copied().collect::<Vec<_>>());
                means[at].push(place.get(anchor).index_select(0, &rows).mean(Kind::Double).double_value(&[]));
                let e = (s.get(anchor).index_select(0, &rows) / 0.2).exp().sum(Kind::Double);
                sums[at].push((anchor, e.double_value(&[])));
            }
        }
    }
    let moments = |v: &[f64]| {
        let n = v.len() as f64;
        let mean = v.iter().sum::<f64>() / n;
        (mean, v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0), n)
    };
    let agree = |what: &str, a: &[f64], b: &[f64]| {
        let ((ma, va, na), (mb, vb, nb)) = (moments(a), moments(b));
        let z = (ma - mb).abs() / (va / na + vb / nb).sqrt();
        assert!(
            z < 4.5,
            "{what}: mean {ma} by rank, {mb} by strata, {z:.1} standard errors apart, SGCL_SEED={}",
            seed()
        );
        (va, vb, na)
    };
    agree("rank", &means[0], &means[1]);
    for anchor in 0..ANCHORS {
        let of = |at: usize| sums[at].iter().filter(|(a, _)| *a == anchor).map(|(_, e)| *e).collect::<Vec<_>>();
        let (va, vb, n) = agree("Σ e^{s/T}", &of(0), &of(1));
        // The log of a ratio of variances has a standard error of about 2/√n, more where tails are heavy.
        let apart = (va / vb).ln().abs() / (2.0 / n.sqrt());
        assert!(apart < 6.0, "variance of Σ e^(s/T): {va} by rank, {vb} by strata, SGCL_SEED={}", seed());
    }
}

#[test]
fn a_sample_of_the_bank_estimates_the_exact_inter_loss() {
    let params = params(HardBy::Rank);
    let exact: f64 = (0..20).map(|draw| outcome(1, &params, draw, None, Kind::Float).numbers[1]).sum::<f64>() / 20.0;
    let sampled: Vec<f64> = (0..60).map(|draw| outcome(1, &params, draw, Some(3000), Kind::Float).numbers[1]).collect();
    let mean = sampled.iter().sum::<f64>() / 60.0;
    let error = (mean - exact).abs() / exact;
    assert!(error < 0.03, "exact {exact}, mean of samples {mean}, SGCL_SEED={}", seed());
}

#[test]
fn samples_are_distinct_uniform_and_the_same_for_a_step() {
    let drawn = candidates(seed(), 1, 2, 500, 1000);
    assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 500);
    assert_eq!(drawn, candidates(seed(), 1, 2, 500, 1000));
    assert_ne!(drawn, candidates(seed(), 1, 3, 500, 1000));
    let low = drawn.iter().filter(|&&row| row < 500).count() as f64;
    assert!((low - 250.0).abs() < 5.0 * 7.9, "{low} of 500 in the lower half, SGCL_SEED={}", seed());
}

/// Runs `rank` on every rank of a world.
fn everywhere<T: Send + 'static>(world: usize, rank: impl Fn(Threads) -> T + Send + Clone + 'static) -> Vec<T> {
    let threads: Vec<_> = Threads::world(world)
        .into_iter()
        .map(|ring| {
            let rank = rank.clone();
            std::thread::spawn(move || rank(ring))
        })
        .collect();
    threads.into_iter().map(|rank| rank.join().unwrap()).collect()
}

#[test]
fn k_means_gives_the_same_labels_in_every_world() {
    let size = KMeans { runs: 2, clusters: 40, iterations: 8 };
    let labels = |world: usize| {
        let ranks = everywhere(world, move |ring| {
            let banks = banks(plan(ring.world(), true), ring.rank(), Kind::Float);
            let labels = cluster(&banks, size, seed(), 3, &ring).unwrap();
            let inertia = inertia(&banks, &labels.get(0), size.clusters, &ring).unwrap();
            (banks.slot_rows().copy(), labels, inertia)
        });
        let all = Tensor::full([2, N], -1, (Kind::Int64, Device::Cpu));
        for (rows, labels, _) in &ranks {
            let before = all.index_select(1, rows);
            assert!(
                bool::try_from(before.eq(-1).logical_or(&before.eq_tensor(labels)).all()).unwrap(),
                "a copy has its owner's label"
            );
            let _ = all.shallow_clone().index_copy_(1, rows, labels);
        }
        (all, ranks[0].2)
    };
    let (one, inertia) = labels(1);
    for world in [2, 3] {
        let (other, same) = labels(world);
        assert_eq!(one, other, "world {world}, SGCL_SEED={}", seed());
        assert!((same / inertia - 1.0).abs() < 1e-6);
    }
    for run in 0..2 {
        assert_eq!(one.get(run).internal_unique(true, false).0.size(), [40], "no cluster is empty");
    }
}

#[test]
fn moving_shards_leaves_every_row_as_it_was() {
    let whole = banks(ShardPlan::new(&[0], false), 0, Kind::Float).rows(&(0..N).collect::<Vec<_>>()).unwrap();
    let whole = std::sync::Arc::new(std::sync::Mutex::new(whole));
    // (ranks before, where each goes, nodes after, shards that nobody has left)
    let cases: [(usize, Vec<Option<usize>>, usize, bool); 4] = [
        (2, vec![Some(0), Some(1)], 4, true),
        (4, vec![Some(1), Some(0), Some(2), Some(3)], 4, true),
        (4, vec![Some(0), None, Some(1), Some(2)], 3, true),
        (3, vec![Some(0), None, Some(1)], 2, false),
    ];
    for (before, kept, after, replicas) in cases {
        let old = plan(before, replicas);
        let (kept, whole) = (kept.clone(), std::sync::Arc::clone(&whole));
        let lost = everywhere(after, move |ring| {
            let was = kept.iter().position(|&now| now == Some(ring.rank()));
            let label = |banks: &Banks| Tensor::stack(&[banks.slot_rows() * 3, banks.slot_rows() + 1], 0);
            let mine = was.map(|was| banks(old.clone(), was, Kind::Float));
            let mine = mine.map(|banks| Held { labels: label(&banks), banks });
            let mine: Vec<&Held> = mine.iter().collect();
            let layout = Layout { n: N, widths: WIDTHS, runs: 2, dtype: Kind::Float, device: Device::Cpu };
            let holders = Held::holders(&mine, layout, &ring).unwrap();
            let new = ShardPlan::settled(&holders, &(0..after).map(Some).collect::<Vec<_>>(), replicas);
            let moved = Held::moved(&mine, &holders, &new, layout, &ring).unwrap();
            let lost: BTreeSet<i64> = lost(&holders).into_iter().collect();
            let rows: Vec<i64> = values(moved.banks.slot_rows()).iter().map(|&row| row as i64).collect();
            let kept: Vec<i64> = rows.iter().copied().filter(|row| !lost.contains(&(row % 1024))).collect();
            let found = moved.banks.rows(&kept).unwrap();
            let whole = whole.lock().unwrap();
            let same = |all: &Tensor, found: &Tensor| all.index_select(0, &Tensor::from_slice(&kept)) == *found;
            assert!(same(&whole.global, &found.global) && same(&whole.backbone, &found.backbone));
            assert!(whole.corners.iter().zip(&found.corners).all(|(all, found)| same(all, found)));
            if lost.is_empty() {
                assert_eq!(moved.labels, label(&moved.banks), "labels travel with their rows");
            }
            assert_eq!(moved.banks.owned(), moved.banks.owned_rows().len() as i64);
            lost.len()
        });
        let expected = if replicas { 0 } else { 341 };
        assert!(lost.iter().all(|&lost| lost == expected), "{lost:?} shards lost from {before} to {after}");
    }
}

#[test]
fn spread_tells_an_even_bank_from_a_collapsed_one_in_any_world() {
    let spread = |world: usize, pull: f64| {
        everywhere(world, move |ring| {
            let mut banks = Banks::random(seed(), N, WIDTHS, plan(ring.world(), false), ring.rank(), CPU);
            let mine = banks.owned_rows();
            let rows = banks.rows(&mine).unwrap();
            let towards = Tensor::eye(WIDTHS.dim, CPU).get(0).unsqueeze(0);
            let global = unit(&(&rows.global * (1.0 - pull) + towards * pull));
            banks.put(&mine, &BankRows { global, ..rows }).unwrap();
            banks.spread(&ring).unwrap()
        })
    };
    let even = spread(1, 0.0)[0];
    assert!((even.deviation - 1.0).abs() < 0.01 && even.effective_rank > 15.9 && !even.collapsed(), "{even:?}");
    let one = spread(1, 0.97)[0];
    assert!(one.collapsed(), "{one:?}");
    for other in spread(3, 0.97) {
        assert!(
            (other.deviation - one.deviation).abs() < 1e-9 && (other.effective_rank - one.effective_rank).abs() < 1e-6
        );
    }
}

#[test]
fn memory_of_a_rank_shrinks_with_the_world() {
    let bytes = |world: usize, replicas: bool| banks(plan(world, replicas), 0, Kind::Float).bytes() as f64;
    let one = bytes(1, true);
    assert!(bytes(4, false) <= 0.3 * one && bytes(4, true) <= 0.55 * one);
    assert!(banks(plan(1, true), 0, Kind::Half).bytes() as f64 <= 0.5 * one);
    assert_eq!(Solo.world(), 1);
    assert_eq!(banks(plan(4, true), 0, Kind::Float).bank(Bank::Backbone).size()[1], WIDTHS.backbone);
}
