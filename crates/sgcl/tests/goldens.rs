//! A step against the golden cases of the reference: those beside this file, and those in the folder `SGCL_GOLDENS` names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use sgcl::bank::{BankRows, Banks, CORNERS, unit};
use sgcl::neighbours::Lattice;
use sgcl::objective::{Negatives, Params, RowLists, StepInputs, Variant, joint_labels, step};
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
        Self { name, tensors: tensors.into_iter().collect() }
    }
    fn get(&self, key: &str) -> &Tensor {
        self.tensors.get(key).unwrap_or_else(|| panic!("golden case {} has no tensor {key}", self.name))
    }
    fn ids(&self, key: &str) -> Vec<i64> {
        self.get(key).to_kind(Kind::Int64).view([-1]).try_into().unwrap()
    }
    fn banks(&self) -> Banks {
        let bank = |name: &str| self.get(&format!("in.bank.{name}")).copy();
        Banks { global: bank("global"), backbone: bank("backbone"), corners: CORNERS.map(bank) }
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
    let mut mask = Tensor::zeros([b, n + 1], (Kind::Uint8, Device::Cpu));
    let _ = mask.scatter_value_(1, &lists.rows.masked_fill(&lists.valid.logical_not(), n), 1);
    mask.narrow(1, 0, n)
}

fn check_step(case: &Case, variant: Variant, prefix: &str) {
    let banks = case.banks();
    let n = banks.len();
    let ids = case.ids("in.idx");
    let b = ids.len() as i64;
    let slide: Vec<u32> = case.ids("in.bag").iter().map(|&v| v as u32).collect();
    let (x, y): (Vec<i32>, Vec<i32>) = case.ids("in.xy").chunks(2).map(|p| (p[0] as i32, p[1] as i32)).unzip();
    let lattice = Lattice::new(&slide, &x, &y).unwrap();
    let negatives = case.get("in.neg_idx").copy();
    let params = Params {
        variant,
        nearest: case.get("in.k_near").int64_value(&[]),
        hard: case.get("in.hard_ranks").size()[0],
        negatives: negatives.size()[0] / b,
        clusters: 4,
        ..Params::default()
    };
    let spatial: Vec<_> = ids.iter().map(|&id| lattice.neighbours(id, params.radius).unwrap()).collect();
    let leaf = |key: &str| case.get(key).copy().set_requires_grad(true);
    let (q, ql) = (leaf("in.q_raw"), leaf("in.ql_raw"));
    let out = step(
        &StepInputs {
            q: &unit(&q),
            x: case.get("in.x"),
            ql: &unit(&ql),
            ids: &ids,
            spatial: &spatial,
            clusters: &joint_labels(case.get("in.clusters")),
            hard_ranks: case.get("in.hard_ranks"),
            negatives: &Negatives::PerAnchor(negatives),
            inter_weight: rampup(case.get("in.epoch").double_value(&[])),
        },
        &banks,
        &params,
    )
    .unwrap();
    out.total.backward();
    let want = |key: &str| case.get(&format!("{prefix}.{key}"));
    assert_eq!(mask(&out.positives.spatial, n), *want("spatial"), "{}: {prefix} spatial positives", case.name);
    assert_eq!(mask(&out.positives.semantic, n), *want("semantic"), "{}: {prefix} semantic positives", case.name);
    assert_eq!(mask(&out.positives.union, n), want("spatial").maximum(want("semantic")), "{}: union", case.name);
    let counted = out.positives.union.valid.sum(Kind::Int64).int64_value(&[]);
    assert_eq!(
        counted,
        mask(&out.positives.union, n).sum(Kind::Int64).int64_value(&[]),
        "{}: a positive counts once",
        case.name
    );
    assert_eq!(out.hard, *want("hard"), "{}: {prefix} hard negatives", case.name);
    for (name, got) in [("intra", &out.intra), ("inter", &out.inter), ("inner", &out.inner), ("total", &out.total)] {
        close(case, &format!("{prefix}.{name}"), &got.detach(), want(name));
    }
    close(case, &format!("{prefix}.grad.q"), &q.grad(), want("grad.q_raw"));
    close(case, &format!("{prefix}.grad.ql"), &ql.grad(), want("grad.ql_raw"));
}

#[test]
fn goldens_of_the_exact_variant_are_reproduced() {
    cases().iter().for_each(|case| check_step(case, Variant::Exact, "exact"));
}

#[test]
fn goldens_of_the_released_variant_are_reproduced() {
    let mut checked = 0;
    for case in cases() {
        if case.tensors.contains_key("released.total") {
            check_step(&case, Variant::Released, "released");
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
        let (mut banks, ids) = (case.banks(), case.ids("in.idx"));
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
