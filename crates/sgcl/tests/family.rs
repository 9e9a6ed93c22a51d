//! Methods of the family against their definitions, stated densely over (anchors, rows) with autograd, on one to four ranks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::seed;
use sgcl::bank::{BankRows, Banks, ShardPlan, Widths, unit};
use sgcl::collective::{Collective, Threads};
use sgcl::draws::{HardRanks, candidates};
use sgcl::kmeans::joint_labels;
use sgcl::objective::{HardBy, HardKey, Inter, Local, Negatives, Params, ParamsError, Pool, StepInputs, Variant, step};
use tch::{Device, Kind, Tensor};

const N: i64 = 360;
const DIM: i64 = 16;
const ANCHORS: i64 = 6;
const CLUSTERS: i64 = 6;
/// Weight of what neighbours add.
const WEIGHT: f64 = 0.7;

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn values(t: &Tensor) -> Vec<f64> {
    t.to_kind(Kind::Double).contiguous().view([-1]).try_into().unwrap()
}

fn rows_of(rows: &[i64]) -> Tensor {
    Tensor::from_slice(rows)
}

fn sum(t: &Tensor) -> Tensor {
    t.sum_dim_intlist([1_i64].as_slice(), false, Kind::Double)
}

fn agree(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = expected.iter().fold(1e-3_f64, |m, v| m.max(v.abs()));
    let far = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / most;
    assert!(far < 1e-5, "{what}: off by {far}, SGCL_SEED={}", seed());
}

/// What a step is given, the same wherever it is made.
struct Case {
    params: Params,
    rows: BankRows,
    /// (2, N): two k-means runs.
    labels: Tensor,
    ids: Vec<i64>,
    spatial: Vec<Vec<i64>>,
    /// (B, D) and (B, Db).
    q: Tensor,
    x: Tensor,
    /// Rows of the sample looked through; none where all are.
    sample: Option<i64>,
    /// (B, D) and rows of the queue, of a method with keys.
    keys: Option<Tensor>,
    queue: Vec<i64>,
    /// Queries at P positions and their keys, each (P, B, D), of a method with those.
    dense: Option<[Tensor; 2]>,
}

impl Case {
    fn new(params: Params, sample: Option<i64>) -> Self {
        // Pooled dense keys are as wide as keys.
        let widths = Widths { dim: DIM, backbone: if params.dense() { DIM } else { 24 }, local: 0 };
        let whole = Banks::random(seed(), N, widths, ShardPlan::new(&[0], false), 0, CPU);
        let rows = whole.rows(&(0..N).collect::<Vec<_>>()).unwrap();
        // Rows around some directions, which the first k-means run has found.
        let centres = rows.global.narrow(0, 0, CLUSTERS).repeat([N / CLUSTERS, 1]);
        let rows = BankRows { global: unit(&(&rows.global + centres)), ..rows };
        let ids: Vec<i64> = (0..ANCHORS).map(|anchor| anchor * 53 + 5).collect();
        let near = |bank: &Tensor| {
            let noise = bank.index_select(0, &(rows_of(&ids) + 1));
            unit(&(bank.index_select(0, &rows_of(&ids)) + noise * 0.7))
        };
        let (q, x) = (near(&rows.global), near(&rows.backbone));
        let patches = Tensor::arange(N, (Kind::Int64, Device::Cpu));
        let second = patches.divide_scalar_mode(7, "floor").remainder(2);
        let labels = Tensor::stack(&[patches.remainder(CLUSTERS), second], 0);
        // The last two have the anchor's labels: they may be semantic positives too.
        let spatial = ids.iter().map(|id| (id + 1..id + 3 + id % 4).chain([id + 42, id + 84]).collect()).collect();
        Self { params, rows, labels, ids, spatial, q, x, sample, keys: None, queue: Vec::new(), dense: None }
    }

    fn double(&self) -> (Tensor, Tensor) {
        (self.q.to_kind(Kind::Double).set_requires_grad(true), self.rows.global.to_kind(Kind::Double))
    }

    /// (B, N) bool: rows that share the labels of `rows` (B) in both runs.
    fn alike(&self, rows: &Tensor) -> Tensor {
        let own = self.labels.index_select(1, rows);
        own.unsqueeze(2).eq_tensor(&self.labels.unsqueeze(1)).all_dim(0, false)
    }

    /// (N) bool: rows that are looked through.
    fn looked_through(&self) -> Tensor {
        let none = Tensor::zeros([N], (Kind::Bool, Device::Cpu));
        match self.sample {
            None => none.logical_not(),
            Some(count) => none.index_fill(0, &rows_of(&candidates(seed(), 1, 2, count as usize, N)), 1),
        }
    }

    /// (B, N) bool: rows named in lists by anchor.
    fn mask(&self, rows: &Tensor) -> Tensor {
        Tensor::zeros([ANCHORS, N], CPU).scatter_value(1, rows, 1.0).gt(0.0)
    }

    /// (B, N) bool: the best `nearest` of those that are looked through, or their share of a sample.
    fn nearest(&self, scores: &Tensor) -> Tensor {
        let seen = self.looked_through();
        let count = self.params.nearest * seen.sum(Kind::Int64).int64_value(&[]);
        let scores = scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
        self.mask(&scores.topk((count + N - 1) / N, 1, true, true).1)
    }

    fn hard_ranks(&self) -> Vec<i64> {
        let top = self.params.top(self.sample.unwrap_or(N));
        HardRanks::new(top as usize, self.params.hard as usize, [5.0, 15.0]).draw(seed(), 1, 2, 0)
    }
}

/// Losses as means over all anchors, in the order intra, inter, spatial, semantic, total; and gradients for the queries (B, D).
struct Outcome {
    losses: Vec<f64>,
    gradient: Vec<f64>,
}

/// One step among `world` ranks. Where there are more than one every anchor must have positives: all means are over anchors then.
fn outcome(world: usize, make: impl Fn() -> Case + Send + Clone + 'static) -> Outcome {
    let threads: Vec<_> = Threads::world(world)
        .into_iter()
        .map(|ring| {
            let make = make.clone();
            std::thread::spawn(move || rank(&ring, &make()))
        })
        .collect();
    let ranks: Vec<Outcome> = threads.into_iter().map(|rank| rank.join().unwrap()).collect();
    Outcome {
        losses: (0..5).map(|at| ranks.iter().map(|rank| rank.losses[at]).sum()).collect(),
        gradient: ranks.into_iter().flat_map(|rank| rank.gradient).collect(),
    }
}

fn rank(ring: &Threads, case: &Case) -> Outcome {
    let (rank, world) = (ring.rank() as i64, ring.world() as i64);
    let plan = ShardPlan::new(&(0..ring.world()).collect::<Vec<_>>(), true);
    let banks = Banks::from_rows(&case.rows, plan, ring.rank());
    let part = |r: i64| (ANCHORS * r / world) as usize..(ANCHORS * (r + 1) / world) as usize;
    let ids: Vec<Vec<i64>> = (0..world).map(|r| case.ids[part(r)].to_vec()).collect();
    let (from, count) = (part(rank).start as i64, part(rank).len() as i64);
    let q = case.q.narrow(0, from, count).copy().set_requires_grad(true);
    let labels = joint_labels(&case.labels, CLUSTERS).index_select(0, banks.slot_rows());
    let keys = case.keys.as_ref().map(|keys| keys.narrow(0, from, count));
    // Position-major, of this rank's anchors alone.
    let side = |all: &Tensor| all.narrow(1, from, count).reshape([-1, DIM]);
    let ql = match &case.dense {
        None => Tensor::zeros([4 * count, 0], CPU),
        Some([queries, _]) => side(queries),
    };
    let ql = ql.set_requires_grad(true);
    let dense_keys = case.dense.as_ref().map(|[_, keys]| side(keys));
    let pool = match case.sample {
        None => Pool::exact(&banks),
        Some(count) => Pool::sampled(&banks, count, seed(), 1, 2),
    };
    let out = step(
        &StepInputs {
            q: &q,
            x: &case.x.narrow(0, from, count),
            ql: &ql,
            dense_keys: dense_keys.as_ref(),
            keys: keys.as_ref(),
            ids: &ids,
            spatial: &case.spatial,
            clusters: &labels,
            pool: &pool,
            hard_ranks: &rows_of(&case.hard_ranks()),
            negatives: &Negatives::Shared(case.queue.clone()),
            key: HardKey::default(),
            inter_weight: WEIGHT,
        },
        &banks,
        &case.params,
        ring,
    )
    .unwrap();
    let share = count as f64 / ANCHORS as f64;
    (&out.total * share).backward();
    // What the bank is to take, of all ranks' anchors.
    let written = case.keys.as_ref().unwrap_or(&case.q);
    assert!(out.features.global.allclose(written, 0.0, 0.0, false), "rank {rank} would write other rows");
    let losses = [&out.intra, &out.inter, &out.spatial, &out.semantic, &out.total];
    let mut gradient = values(&q.grad());
    if case.dense.is_some() {
        gradient.extend(values(&ql.grad().view([-1, count, DIM]).transpose(0, 1)));
    }
    Outcome { losses: losses.map(|l| l.double_value(&[]) * share).to_vec(), gradient }
}

fn aggregated() -> Params {
    Params {
        intra: false,
        local: Local::None,
        inter: Inter::Aggregated,
        nearest: 60,
        clusters: CLUSTERS,
        t_spatial: 0.07,
        ..Params::default()
    }
}

/// −log Σ_{C∩B} e^{s/T} / Σ_B e^{s/T}, a mean over anchors whose C∩B is not empty; and C∩B and B, (B, N) bool.
fn local_aggregation(case: &Case, q: &Tensor, rows: &Tensor) -> (Tensor, Tensor, Tensor) {
    let s = q.matmul(&rows.tr());
    let background = case.nearest(&s);
    let close = background.logical_and(&case.alike(&rows_of(&case.ids)));
    let e = (&s / case.params.t_spatial).exp();
    let ratio = sum(&(&e * &close)) / sum(&(&e * &background));
    let loss = ratio.masked_select(&close.any_dim(1, false)).log().mean(Kind::Double).neg();
    (loss, close, background)
}

#[test]
fn local_aggregation_is_its_definition_on_any_number_of_ranks() {
    for sample in [None, Some(240)] {
        let case = Case::new(aggregated(), sample);
        let (q, rows) = case.double();
        let (loss, close, background) = local_aggregation(&case, &q, &rows);
        (&loss * WEIGHT).backward();
        assert!(bool::try_from(close.any_dim(1, false).all()).unwrap(), "every anchor has close neighbours");
        let own = background.gather(1, &rows_of(&case.ids).unsqueeze(1), false);
        assert!(sample.is_some() || bool::try_from(own.any()).unwrap(), "an own row is a row like any other");
        let loss = loss.double_value(&[]);
        assert!(loss > 0.1, "{loss} tells nothing");
        for world in 1..=4 {
            let found = outcome(world, move || Case::new(aggregated(), sample));
            let what = format!("sample {sample:?} on {world} ranks");
            agree(&what, &found.losses, &[0.0, loss, 0.0, 0.0, WEIGHT * loss]);
            agree(&what, &found.gradient, &values(&q.grad()));
        }
    }
}

#[test]
fn an_anchor_without_close_neighbours_counts_for_nothing() {
    let make = || {
        let mut case = Case::new(aggregated(), None);
        // The first anchor's labels are its own row's alone, and it looks away from that.
        let _ = case.q.narrow(0, 0, 1).neg_();
        case.labels = case.labels.index_fill(1, &rows_of(&case.ids[..1]), CLUSTERS - 1);
        case
    };
    let case = make();
    let (q, rows) = case.double();
    let (loss, close, _) = local_aggregation(&case, &q, &rows);
    let has: Vec<bool> = close.any_dim(1, false).try_into().unwrap();
    assert!(!has[0] && has[1..].iter().all(|&has| has), "{has:?}");
    (&loss * WEIGHT).backward();
    let found = outcome(1, make);
    agree("loss", &found.losses[1..2], &[loss.double_value(&[])]);
    agree("gradient", &found.gradient, &values(&q.grad()));
    assert!(found.gradient[..DIM as usize].iter().all(|&g| g == 0.0));
}

fn apart() -> Params {
    Params {
        local: Local::None,
        inter: Inter::Apart,
        nearest: 40,
        hard: 20,
        hard_by: HardBy::Rank,
        clusters: CLUSTERS,
        // As published they are one; that each term has its own is to be seen.
        t_instance: 0.1,
        t_spatial: 0.07,
        ..Params::default()
    }
}

/// Positives of SSLP and its hard negatives, (B, N) bool.
struct Sets {
    spatial: Tensor,
    semantic: Tensor,
    hard: Tensor,
}

fn sets(case: &Case, q: &Tensor, rows: &Tensor) -> Sets {
    let own = case.mask(&rows_of(&case.ids).unsqueeze(1));
    let no = f64::NEG_INFINITY;
    let spatial: Vec<Tensor> = case
        .spatial
        .iter()
        .map(|near| Tensor::zeros([N], (Kind::Bool, Device::Cpu)).index_fill(0, &rows_of(near), 1))
        .collect();
    let spatial = Tensor::stack(&spatial, 0);
    let s = q.matmul(&rows.tr());
    // The anchor, and the most similar of its spatial neighbours where it has any.
    let auxiliary = s.masked_fill(&spatial.logical_not(), no).argmax(1, false);
    let usable = spatial.any_dim(1, true);
    let of_anchor = case.nearest(&s.masked_fill(&own, no)).logical_and(&case.alike(&rows_of(&case.ids)));
    let itself = case.mask(&auxiliary.unsqueeze(1));
    let s = rows.index_select(0, &auxiliary).matmul(&rows.tr()).masked_fill(&itself, no);
    let of_auxiliary = case.nearest(&s).logical_and(&case.alike(&auxiliary)).logical_and(&usable);
    let semantic = of_anchor.logical_or(&of_auxiliary).logical_and(&own.logical_not());
    let out = spatial.logical_or(&semantic).logical_or(&own).logical_or(&case.looked_through().logical_not());
    let ranking = case.x.matmul(&case.rows.backbone.tr()).masked_fill(&out, no).argsort(1, true);
    let hard = case.mask(&ranking.index_select(1, &rows_of(&case.hard_ranks())));
    Sets { spatial, semantic, hard }
}

/// intra, spatial, semantic, each a mean over the anchors that have what it is about.
fn sslp(case: &Case, q: &Tensor, rows: &Tensor, sets: &Sets) -> [Tensor; 3] {
    let s = q.matmul(&rows.tr());
    let mean = |t: Tensor, has: &Tensor| t.masked_select(has).log().mean(Kind::Double).neg();
    let everyone = Tensor::ones([ANCHORS], (Kind::Bool, Device::Cpu));

    let e = (&s / case.params.t_instance).exp();
    let own = e.gather(1, &rows_of(&case.ids).unsqueeze(1), false).squeeze_dim(1);
    let intra = mean(&own / (&own + sum(&(&e * &sets.hard))), &everyone);

    let e = (&s / case.params.t_spatial).exp();
    let hard = sum(&(&e * &sets.hard));
    let near = sum(&(&e * &sets.spatial));
    let spatial = mean(&near / (&near + &hard), &sets.spatial.any_dim(1, false));

    let each = N as f64 / case.sample.unwrap_or(N) as f64;
    let share = &e / (&e + hard.unsqueeze(1)) * &sets.semantic * each;
    let semantic = mean(sum(&share), &sets.semantic.any_dim(1, false));
    [intra, spatial, semantic]
}

#[test]
fn sslp_is_its_definition_on_any_number_of_ranks() {
    for sample in [None, Some(240)] {
        let case = Case::new(apart(), sample);
        let (q, rows) = case.double();
        let sets = sets(&case, &q.detach(), &rows);
        for (name, positives) in [("spatial", &sets.spatial), ("semantic", &sets.semantic)] {
            assert!(bool::try_from(positives.any_dim(1, false).all()).unwrap(), "every anchor has {name} positives");
        }
        let both = sets.spatial.logical_and(&sets.semantic);
        assert!(sample.is_some() || bool::try_from(both.any()).unwrap(), "some rows are positives of both kinds");
        let terms = sslp(&case, &q, &rows, &sets);
        let [intra, spatial, semantic] = &terms;
        let total = intra + (spatial + semantic) * WEIGHT;
        total.backward();
        let [intra, spatial, semantic, total] = [intra, spatial, semantic, &total].map(|t| t.double_value(&[]));
        for world in 1..=4 {
            let found = outcome(world, move || Case::new(apart(), sample));
            let what = format!("sample {sample:?} on {world} ranks");
            agree(&what, &found.losses, &[intra, 0.0, spatial, semantic, total]);
            agree(&what, &found.gradient, &values(&q.grad()));
        }
    }
}

#[test]
fn an_anchor_without_neighbours_has_an_intra_term_alone() {
    let make = || {
        let mut case = Case::new(apart(), None);
        case.spatial[0].clear();
        case.labels = case.labels.index_fill(1, &rows_of(&case.ids[..1]), CLUSTERS - 1);
        case
    };
    let case = make();
    let (q, rows) = case.double();
    let sets = sets(&case, &q.detach(), &rows);
    let has: Vec<bool> = sets.semantic.any_dim(1, false).try_into().unwrap();
    assert!(!has[0] && has[1..].iter().all(|&has| has), "{has:?}");
    let [intra, spatial, semantic] = sslp(&case, &q, &rows, &sets);
    let total = &intra + (&spatial + &semantic) * WEIGHT;
    total.backward();
    let found = outcome(1, make);
    let expected = [intra, Tensor::from(0.0), spatial, semantic, total].map(|t| t.double_value(&[]));
    agree("losses", &found.losses, &expected);
    agree("gradient", &found.gradient, &values(&q.grad()));
}

#[test]
fn moco_tells_this_steps_keys_from_the_queue_on_any_number_of_ranks() {
    let make = || {
        let params = Params { local: Local::None, inter: Inter::None, negatives: 40, ..Params::default() };
        let mut case = Case::new(params, None);
        case.keys = Some(unit(&(&case.q + case.rows.global.narrow(0, 100, ANCHORS) * 0.5)));
        // An own row among them, and one that stands there twice.
        case.queue = (200..238).chain([case.ids[0], 200]).collect();
        case
    };
    let case = make();
    let (q, rows) = case.double();
    let keys = case.keys.as_ref().unwrap().to_kind(Kind::Double);
    let queue = rows_of(&case.queue);
    let own = rows_of(&case.ids).unsqueeze(1).eq_tensor(&queue.unsqueeze(0));
    let e = |s: Tensor| (s / case.params.t_instance).exp();
    let positive = e(sum(&(&q * &keys)));
    let negatives = e(q.matmul(&rows.index_select(0, &queue).tr())) * own.logical_not();
    let loss = (&positive / (&positive + sum(&negatives))).log().mean(Kind::Double).neg();
    loss.backward();
    let loss = loss.double_value(&[]);
    for world in 1..=4 {
        let found = outcome(world, make);
        let what = format!("{world} ranks");
        agree(&what, &found.losses, &[loss, 0.0, 0.0, 0.0, loss]);
        agree(&what, &found.gradient, &values(&q.grad()));
    }
}

#[test]
fn densecl_is_its_definition_on_any_number_of_ranks() {
    const POSITIONS: i64 = 4;
    let make = || {
        let local = Local::Dense { positions: POSITIONS, share: 0.3 };
        let params = Params { local, inter: Inter::None, negatives: 40, ..Params::default() };
        let mut case = Case::new(params, None);
        case.keys = Some(unit(&(&case.q + case.rows.global.narrow(0, 100, ANCHORS) * 0.5)));
        case.queue = (200..238).chain([case.ids[0], 200]).collect();
        let rows = |from| case.rows.backbone.narrow(0, from, POSITIONS * ANCHORS).view([POSITIONS, ANCHORS, DIM]);
        let keys = rows(50).copy();
        let noise = unit(&(rows(120) + &keys)).view([POSITIONS, ANCHORS, DIM]);
        case.dense = Some([noise, keys]);
        case
    };
    let case = make();
    let (q, rows) = case.double();
    let queue = rows_of(&case.queue);
    let own = rows_of(&case.ids).unsqueeze(1).eq_tensor(&queue.unsqueeze(0));
    let e = |s: Tensor| (s / case.params.t_instance).exp();
    // Contrast of queries (B, D) with their keys against rows of the queue.
    let contrast = |q: &Tensor, keys: &Tensor, rows: &Tensor| {
        let positive = e(sum(&(q * keys)));
        let negatives = e(q.matmul(&rows.index_select(0, &queue).tr())) * own.logical_not();
        (&positive / (&positive + sum(&negatives))).log().mean(Kind::Double).neg()
    };
    let intra = contrast(&q, &case.keys.as_ref().unwrap().to_kind(Kind::Double), &rows);
    let [dense, keys] = case.dense.as_ref().unwrap();
    let dense = dense.to_kind(Kind::Double).set_requires_grad(true);
    let (keys, pooled) = (keys.to_kind(Kind::Double), case.rows.backbone.to_kind(Kind::Double));
    let by_position: Vec<Tensor> = (0..POSITIONS).map(|p| contrast(&dense.get(p), &keys.get(p), &pooled)).collect();
    let inner = Tensor::stack(&by_position, 0).mean(Kind::Double);
    let total = &intra * 0.7 + &inner * 0.3;
    total.backward();
    for world in 1..=4 {
        let found = outcome(world, make);
        let what = format!("{world} ranks");
        agree(
            &what,
            &found.losses,
            &[&intra, &(&intra * 0.0), &(&intra * 0.0), &(&intra * 0.0), &total].map(|l| l.double_value(&[])),
        );
        // By rank: its anchors' own, then those of its positions.
        let part = |r: i64| (ANCHORS * r / world as i64, ANCHORS * (r + 1) / world as i64);
        let expected: Vec<f64> = (0..world as i64)
            .flat_map(|r| {
                let (from, to) = part(r);
                let side = dense.grad().narrow(1, from, to - from).transpose(0, 1);
                [values(&q.grad().narrow(0, from, to - from)), values(&side)].concat()
            })
            .collect();
        agree(&what, &found.gradient, &expected);
    }
}

#[test]
fn what_a_method_has_no_use_for_need_not_fit() {
    for (params, inter) in [(aggregated(), Inter::Aggregated), (apart(), Inter::Apart)] {
        let released = Params { variant: Variant::Released, ..params.clone() };
        assert_eq!(released.check(N), Err(ParamsError::Released(inter)));
        assert_eq!(Params { negatives: 3, ..params.clone() }.check(N), Ok(()));
        assert!(matches!(Params { nearest: N, ..params }.check(N), Err(ParamsError::Nearest { .. })));
    }
    assert_eq!(Params { hard: 10 * N, ..aggregated() }.check(N), Ok(()));
    assert!(matches!(Params { hard: 10 * N, ..apart() }.check(N), Err(ParamsError::Hard { .. })));
}
