//! Proof, from the bucket alone, that a run lost nothing: every epoch used each patch exactly once, its commits form one chain, and
//! every part is there and intact.
//!
//! An epoch plan is a pure function of the patch set, the seed, the epoch, what is unused, lanes and window. A commit keeps, for every
//! epoch, which plans were followed and for how many steps, so the patches of each step can be found again: a step read what its
//! plan says, ranks compare each batch with it. Here all of that is done over, and must come to what the ledgers say.

use roaring::RoaringBitmap;
use serde::Serialize;
use sgcl_patchset::{EpochPlan, PatchSet};

use crate::checkpoint::verify_part;
use crate::commit::{Commit, Commits, Segment};
use crate::export::list_exports;
use crate::{RunStoreError, Spec};

/// What was looked at and what was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Proof {
    /// Commits in the bucket, by number.
    pub commits: Vec<u64>,
    /// Parts read.
    pub parts: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Epochs, as the newest commit tells of them.
    pub epochs: Vec<Epoch>,
    /// Steps of the newest commit.
    pub steps: u64,
    /// Everything that is not as it must be, each with the object that shows it.
    pub problems: Vec<String>,
}

/// An epoch found again from its plans.
#[derive(Clone, Debug, Serialize)]
pub struct Epoch {
    /// Number, from 0.
    pub epoch: u32,
    /// Patches used.
    pub patches: u64,
    /// Patches of the run.
    pub of: u64,
    /// Plans, one more than there were changes of lanes.
    pub plans: usize,
    /// Steps.
    pub steps: u64,
}

impl Proof {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Everything that decides a plan but what is unused.
struct Plans<'a> {
    set: &'a PatchSet,
    all: RoaringBitmap,
    seed: u64,
    batch: usize,
}

impl Plans<'_> {
    /// Patches used by these plans, one after the other, in an epoch of which `used` is used already.
    fn follow(&self, epoch: u32, segments: &[Segment], used: &mut RoaringBitmap) -> Result<(), String> {
        for segment in segments {
            let unused = &self.all - &*used;
            let (lanes, window) = (segment.lanes as usize, segment.window as usize);
            let plan =
                EpochPlan::new(self.set.index(), self.seed, u64::from(epoch), &unused, lanes, self.batch, window)
                    .map_err(|error| error.to_string())?;
            let steps = usize::try_from(segment.steps).map_err(|error| error.to_string())?;
            if steps > plan.steps() {
                return Err(format!("{steps} steps of a plan that has {}", plan.steps()));
            }
            let read = plan.used_before(steps);
            let twice = read.intersection_len(used);
            if twice > 0 {
                return Err(format!("{twice} patches were used twice"));
            }
            *used |= read;
        }
        Ok(())
    }
}

/// Looks at all of a run; `seen` is told the parts read so far and how many there are.
///
/// # Errors
/// The storage, or the patch set is not this run's. What is wrong with the run is no error but in [`Proof::problems`].
pub async fn verify(
    commits: &Commits,
    spec: &Spec,
    set: &PatchSet,
    seen: impl Fn(usize, usize),
) -> Result<Proof, RunStoreError> {
    spec.check_version()?;
    let mut proof = Proof { commits: commits.list().await?, ..Proof::default() };
    let mut read = Vec::new();
    for &seq in &proof.commits {
        match commits.read(seq).await {
            Ok(commit) => read.push(commit),
            Err(error) if error.is_damage() => proof.problems.push(format!("commit {seq}: {error}")),
            Err(error) => return Err(error),
        }
    }
    if let Err(error) = commits.check_chain(&read) {
        proof.problems.push(error.to_string());
    }
    order(&read, &mut proof);
    let total = read.iter().map(|commit| commit.all_parts().count()).sum();
    for commit in &read {
        for part in commit.all_parts() {
            match verify_part(commits.run(), part).await {
                Ok(()) => proof.bytes += part.bytes,
                Err(error) if error.is_damage() => proof.problems.push(format!("commit {}: {error}", commit.seq)),
                Err(error) => return Err(error),
            }
            proof.parts += 1;
            seen(proof.parts, total);
        }
    }
    if set.manifest().content_id != spec.data_id {
        proof.problems.push(format!("{}: not the patch set that the run was made with", spec.data));
        return Ok(proof);
    }
    let names: Vec<&str> = set.manifest().slides.iter().map(|slide| slide.name.as_str()).collect();
    let train = spec.config.data.split(&names).map_err(|error| RunStoreError::damaged("spec.json", error))?.train;
    let slides: Vec<u32> = train.into_iter().filter_map(|slide| u32::try_from(slide).ok()).collect();
    let subset = set.subset(&slides).map_err(|error| RunStoreError::damaged(&spec.data, error))?;
    let plans = Plans { set, all: subset.unused(), seed: spec.config.seed, batch: spec.config.batch.per_rank };
    for commit in &read {
        ledger(commits, commit, &plans, &mut proof).await?;
    }
    if let Some(newest) = read.last() {
        epochs(newest, &plans, spec, &mut proof);
        for seq in list_exports(commits.run()).await? {
            if seq > newest.seq {
                proof.problems.push(format!("export {seq}: of a commit that is not there"));
            }
        }
    }
    Ok(proof)
}

/// Later commits come later: in generation, step and what they know of the past.
fn order(commits: &[Commit], proof: &mut Proof) {
    for pair in commits.windows(2) {
        let [a, b] = pair else { continue };
        let (before, after) = (&a.progress, &b.progress);
        if after.generation < before.generation || after.step < before.step {
            proof.problems.push(format!(
                "commit {}: generation {}, step {} after commit {}'s generation {}, step {}",
                b.seq, after.generation, after.step, a.seq, before.generation, before.step
            ));
        }
        if !after.history.starts_with(&before.history) {
            proof.problems.push(format!("commit {}: another past than commit {}'s", b.seq, a.seq));
        }
    }
}

/// A commit's epoch, found again from its plans, is what its ledger says.
async fn ledger(commits: &Commits, commit: &Commit, plans: &Plans<'_>, proof: &mut Proof) -> Result<(), RunStoreError> {
    let p = &commit.progress;
    let (stored, base) = match (commits.ledger(&p.ledger).await, &p.plan_base) {
        (Ok(stored), Some(part)) => match commits.ledger(part).await {
            Ok(base) => (stored, base),
            // Parts that are not as they must be are told of already.
            Err(error) if error.is_damage() => return Ok(()),
            Err(error) => return Err(error),
        },
        (Ok(stored), None) => (stored, crate::Ledger::new()),
        (Err(error), _) if error.is_damage() => return Ok(()),
        (Err(error), _) => return Err(error),
    };
    let mut wrong = |what: String| proof.problems.push(format!("commit {}: epoch {}: {what}", commit.seq, p.epoch));
    let mut used = RoaringBitmap::new();
    if let Err(why) = plans.follow(p.epoch, &p.segments, &mut used) {
        wrong(why);
    }
    if used != *base.bitmap() {
        let (has, should) = (base.len(), used.len());
        wrong(format!("its last plan began with {has} patches used, its earlier plans used {should} or others"));
    }
    if p.cursor > 0 {
        let last = Segment { lanes: p.lanes, window: p.window, steps: p.cursor };
        if let Err(why) = plans.follow(p.epoch, &[last], &mut used) {
            wrong(why);
        }
    }
    if used != *stored.bitmap() {
        wrong(format!("its ledger has {} patches, its plans used {} or others", stored.len(), used.len()));
    }
    let steps: u64 = p.segments.iter().map(|segment| segment.steps).sum::<u64>() + p.cursor;
    if steps != p.epoch_step {
        wrong(format!("{} steps of the epoch, its plans were followed for {steps}", p.epoch_step));
    }
    let all: u64 = p.history.iter().flatten().map(|segment| segment.steps).sum::<u64>() + steps;
    if all != p.step {
        wrong(format!("{} steps in all, its plans were followed for {all}", p.step));
    }
    if p.history.len() != p.epoch as usize {
        wrong(format!("{} epochs before it are told of", p.history.len()));
    }
    Ok(())
}

/// Every finished epoch used each patch once.
fn epochs(newest: &Commit, plans: &Plans<'_>, spec: &Spec, proof: &mut Proof) {
    let p = &newest.progress;
    let mut current = p.segments.clone();
    if p.cursor > 0 {
        current.push(Segment { lanes: p.lanes, window: p.window, steps: p.cursor });
    }
    let of = plans.all.len();
    for (epoch, segments) in (0..).zip(p.history.iter().chain([&current])) {
        let mut used = RoaringBitmap::new();
        if let Err(why) = plans.follow(epoch, segments, &mut used) {
            proof.problems.push(format!("epoch {epoch}: {why}"));
        }
        let over = epoch < p.epoch || p.done;
        if over && used != plans.all {
            let missed = (&plans.all - &used).len();
            proof.problems.push(format!("epoch {epoch}: {missed} of {of} patches were never used"));
        }
        let steps = segments.iter().map(|segment| segment.steps).sum();
        proof.epochs.push(Epoch { epoch, patches: used.len(), of, plans: segments.len(), steps });
    }
    if p.done && p.epoch + 1 != spec.config.epochs {
        proof.problems.push(format!(
            "commit {}: done after epoch {}, the run has {}",
            newest.seq,
            p.epoch + 1,
            spec.config.epochs
        ));
    }
    proof.steps = p.step;
}
