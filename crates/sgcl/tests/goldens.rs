//! A step against the golden cases of the reference: those beside this file, and those in the folder `SGCL_GOLDENS` names. On the CPU, or
//! on the GPU with `SGCL_DEVICE=cuda`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use sgcl::bank::{BankRows, Banks, CORNERS, ShardPlan, unit};
use sgcl::collective::{Collective, Threads};
use sgcl::kmeans::joint_labels;
use sgcl::neighbours::Lattice;
use sgcl::objective::{HardBy, HardKey, Negatives, Params, Pool, RowLists, StepInputs, Variant, step};
use sgcl::schedule::rampup;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

struct Case {
    name: String,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    fn read(path: &Path) -> Self {
        let name = path.display().to_string();
        let tensors =
            Tensor::read_safetensors(path).unwrap_or_else(|e| panic!("golden case {name} is unreadable: {e}"));
        let device = device();
        Self { name, tensors: tensors.into_iter().map(|(name, tensor)| (name, tensor.to_device(device))).collect() }
    }
    /// The same tensors, for another thread.
    fn copy(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Self { name: self.name.clone(), tensors }
    }
    fn get(&self, key: &str) -> &Tensor {
        self.tensors.get(key).unwrap_or_else(|| panic!("golden case {} has no tensor {key}", self.name))
    }
    fn ids(&self, key: &str) -> Vec<i64> {
        self.get(key).to_kind(Kind::Int64).view([-1]).try_into().unwrap()
    }
    fn banks(&self) -> BankRows {
        let bank = |name: &str| self.get(&format!("in.bank.{name}")).copy();
        BankRows { global: bank("global"), backbone: bank("backbone"), corners: CORNERS.map(bank) }
    }
}

fn device() -> Device {
    match std::env::var("SGCL_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => Device::Cuda(0),
        Ok(other) => panic!("SGCL_DEVICE={other}: there are cpu and cuda"),
    }
}

fn cases_of(folder: &Path) -> Vec<PathBuf> {
    let entries =
        std::fs::read_dir(folder).unwrap_or_else(|e| panic!("golden folder {} cannot be read: {e}", folder.display()));
    let mut paths: Vec<_> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
    paths.sort();
    assert!(!paths.is_empty(), "golden folder {} holds no *.safetensors", folder.display());
    paths
}

fn cases() -> Vec<Case> {
    let mut paths = cases_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"));
    if let Some(folder) = std::env::var_os("SGCL_GOLDENS") {
        paths.extend(cases_of(Path::new(&folder)));
    }
    paths
        .iter()
        .map(|path| {
            println!("golden case {}", path.display());
            Case::read(path)
        })
        .collect()
}

fn close(case: &Case, what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.size(), want.size(), "{}: shape of {what}", case.name);
    let scale = want.abs().max().double_value(&[]);
    let error = (got - want).abs().max().double_value(&[]);
    assert!(error <= 1e-5 * scale, "{}: {what} is off by {error:e} of {scale:e}", case.name);
    println!("{}: {what} relative error {:.1e}", case.name, error / scale);
}

fn mask(lists: &RowLists, n: i64) -> Tensor {
    let b = lists.rows.size()[0];
    let mut mask = Tensor::zeros([b, n + 1], (Kind::Uint8, lists.rows.device()));
    let _ = mask.scatter_value_(1, &lists.rows.masked_fill(&lists.valid.logical_not(), n), 1);
    mask.narrow(1, 0, n)
}

/// What a rank gives to a case.
struct Part {
    losses: [Tensor; 3],
    dq: Tensor,
    dql: Tensor,
    spatial: Tensor,
    semantic: Tensor,
    union: Tensor,
    /// Positives counted once each.
    counted: i64,
    hard: Tensor,
}

/// A case on `world` ranks that own rows and anchors between them, compared with what the reference computed on one.
fn check_step(case: &Case, variant: Variant, prefix: &str, world: usize) {
    let ids = case.ids("in.idx");
    let (b, n) = (ids.len(), case.get("in.bag").size()[0]);
    let want = |key: &str| case.get(&format!("{prefix}.{key}"));
    let positives = want("spatial").maximum(want("semantic"));
    let has: Vec<bool> = (&positives.any_dim(1, false)).try_into().unwrap();
    let count = |range: std::ops::Range<usize>| has[range].iter().filter(|&&h| h).count() as f64;
    let counts_all = variant == Variant::Released;
    let anchors_of = |range: std::ops::Range<usize>| if counts_all { range.len() as f64 } else { count(range) };

    let ranges: Vec<_> = (0..world).map(|r| b * r / world..b * (r + 1) / world).collect();
    let rampup = rampup(case.get("in.epoch").double_value(&[]));
    // A rank's loss is a mean over its own anchors, the case's over all.
    let weight = |range: &std::ops::Range<usize>| {
        rampup * b as f64 * anchors_of(range.clone()) / (range.len() as f64 * anchors_of(0..b)).max(1e-9)
    };
    let threads: Vec<_> = Threads::world(world)
        .into_iter()
        .zip(&ranges)
        .map(|(ring, range)| {
            let (case, ranges, weight) = (case.copy(), ranges.clone(), weight(range));
            std::thread::spawn(move || rank(&case, variant, &ring, &ranges, weight))
        })
        .collect();
    let parts: Vec<Part> = threads.into_iter().map(|rank| rank.join().unwrap()).collect();

    let what = |name: &str| format!("{} on {world} ranks: {prefix} {name}", case.name);
    let all = |of: fn(&Part) -> &Tensor| parts.iter().map(of).fold(positives.zeros_like(), |all, one| all + one);
    assert_eq!(all(|p| &p.spatial), *want("spatial"), "{}", what("spatial positives"));
    assert_eq!(all(|p| &p.semantic), *want("semantic"), "{}", what("semantic positives"));
    assert_eq!(all(|p| &p.union), positives, "{}", what("union"));
    let counted: i64 = parts.iter().map(|part| part.counted).sum();
    assert_eq!(counted, positives.sum(Kind::Int64).int64_value(&[]), "{}", what("positives count once"));
    let wanted = Tensor::zeros([b as i64, n], (Kind::Uint8, device())).scatter_value(1, want("hard"), 1);
    assert_eq!(all(|p| &p.hard), wanted, "{}", what("hard negatives"));

    let mean = |at: usize, share: &dyn Fn(std::ops::Range<usize>) -> f64| -> Tensor {
        parts.iter().zip(&ranges).map(|(part, range)| &part.losses[at] * (share(range.clone()) / share(0..b))).sum()
    };
    let len = |range: std::ops::Range<usize>| range.len() as f64;
    let (intra, inter, inner) = (mean(0, &len), mean(1, &anchors_of), mean(2, &len));
    let total = &intra + &inter * rampup + &inner;
    for (name, got) in [("intra", &intra), ("inter", &inter), ("inner", &inner), ("total", &total)] {
        close(case, &format!("{prefix}.{name} on {world}"), got, want(name));
    }
    let scaled = |of: fn(&Part) -> &Tensor| {
        parts.iter().zip(&ranges).map(|(part, range)| of(part) * (len(range.clone()) / b as f64)).collect::<Vec<_>>()
    };
    close(case, &format!("{prefix}.grad.q on {world}"), &Tensor::cat(&scaled(|p| &p.dq), 0), want("grad.q_raw"));
    // Corner-major within a rank, and in the case.
    let dql: Vec<Tensor> = scaled(|p| &p.dql).iter().map(|t| t.view([4, -1, t.size()[1]])).collect();
    let dql = Tensor::cat(&dql, 1).view_as(want("grad.ql_raw"));
    close(case, &format!("{prefix}.grad.ql on {world}"), &dql, want("grad.ql_raw"));
}

/// One rank's anchors, `ranges[rank]` of the case's.
fn rank(case: &Case, variant: Variant, ring: &Threads, ranges: &[std::ops::Range<usize>], inter_weight: f64) -> Part {
    let nodes: Vec<usize> = (0..ring.world()).collect();
    let banks = Banks::from_rows(&case.banks(), ShardPlan::new(&nodes, true), ring.rank());
    let n = banks.len();
    let ids = case.ids("in.idx");
    let slide: Vec<u32> = case.ids("in.bag").iter().map(|&v| v as u32).collect();
    let (x, y): (Vec<i32>, Vec<i32>) = case.ids("in.xy").chunks(2).map(|p| (p[0] as i32, p[1] as i32)).unzip();
    let lattice = Lattice::new(&slide, &x, &y).unwrap();
    let negatives = case.ids("in.neg_idx");
    let params = Params {
        variant,
        nearest: case.get("in.k_near").int64_value(&[]),
        hard: case.get("in.hard_ranks").size()[0],
        negatives: negatives.len() as i64 / ids.len() as i64,
        clusters: 4,
        hard_by: HardBy::Rank,
        ..Params::default()
    };
    let spatial: Vec<_> = ids.iter().map(|&id| lattice.neighbours(id, params.radius).unwrap()).collect();
    let range = ranges[ring.rank()].clone();
    let mine = |t: &Tensor, dim: i64| t.narrow(dim, range.start as i64, range.len() as i64);
    let leaf = |t: Tensor| t.copy().set_requires_grad(true);
    let q = leaf(mine(case.get("in.q_raw"), 0));
    let width = q.size()[1];
    let ql = leaf(mine(&case.get("in.ql_raw").view([4, -1, width]), 1).reshape([-1, width]));
    let clusters = joint_labels(case.get("in.clusters"), 1 << 20).take(banks.slot_rows());
    let out = step(
        &StepInputs {
            q: &unit(&q),
            x: &mine(case.get("in.x"), 0),
            ql: &unit(&ql),
            dense_keys: None,
            keys: None,
            ids: &ranges.iter().map(|range| ids[range.clone()].to_vec()).collect::<Vec<_>>(),
            spatial: &spatial,
            clusters: &clusters,
            pool: &Pool::exact(&banks),
            hard_ranks: case.get("in.hard_ranks"),
            negatives: &Negatives::PerAnchor(negatives),
            key: HardKey::default(),
            inter_weight,
        },
        &banks,
        &params,
        ring,
    )
    .unwrap();
    let (dq, dql) = if range.is_empty() {
        (q.zeros_like(), ql.zeros_like())
    } else {
        out.total.backward();
        (q.grad(), ql.grad())
    };
    let found = &out.found;
    Part {
        losses: [out.intra, out.inter, out.inner],
        dq,
        dql,
        spatial: mask(&found.positives.spatial, n),
        semantic: mask(&found.positives.semantic, n),
        union: mask(&found.positives.union, n),
        counted: found.positives.union.valid.sum(Kind::Int64).int64_value(&[]),
        hard: mask(&found.hard, n),
    }
}

const WORLDS: [usize; 4] = [1, 2, 3, 4];

#[test]
fn goldens_of_the_exact_variant_are_reproduced() {
    for world in WORLDS {
        cases().iter().for_each(|case| check_step(case, Variant::Exact, "exact", world));
    }
}

#[test]
fn goldens_of_the_released_variant_are_reproduced() {
    let mut checked = 0;
    for case in cases() {
        if case.tensors.contains_key("released.total") {
            WORLDS.iter().for_each(|&world| check_step(&case, Variant::Released, "released", world));
            checked += 1;
        } else {
            println!("{}: no released result, an anchor is isolated", case.name);
        }
    }
    assert!(checked > 0, "no golden case has a released result");
}

#[test]
fn goldens_of_the_updated_banks_are_reproduced() {
    for case in cases() {
        let (mut banks, ids) = (Banks::from_rows(&case.banks(), ShardPlan::new(&[0], false), 0), case.ids("in.idx"));
        let corners: [Tensor; 4] = unit(case.get("in.ql_raw")).chunk(4, 0).try_into().unwrap();
        let features = BankRows { global: unit(case.get("in.q_raw")), backbone: case.get("in.x").copy(), corners };
        banks.apply(&ids, &features, Params::default().bank_momentum).unwrap();
        let rows = banks.rows(&ids).unwrap();
        close(&case, "updated.global", &rows.global, case.get("updated.global"));
        close(&case, "updated.backbone", &rows.backbone, case.get("updated.backbone"));
        for (name, got) in CORNERS.iter().zip(&rows.corners) {
            close(&case, name, got, case.get(&format!("updated.{name}")));
        }
    }
}

#[test]
#[should_panic(expected = "cannot be read")]
fn goldens_in_a_missing_folder_fail() {
    cases_of(Path::new("no-such-folder"));
}

#[test]
#[should_panic(expected = "broken.safetensors is unreadable")]
fn goldens_that_are_unreadable_fail_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.safetensors");
    std::fs::write(&path, b"not a case").unwrap();
    Case::read(&path);
}
