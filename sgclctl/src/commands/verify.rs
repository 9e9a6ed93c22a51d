//! `verify`: proof from the bucket alone that a run lost nothing and repeated nothing.

use anyhow::Result;
use sgcl_patchset::PatchSet;
use sgcl_runstore::Commits;
use sgcl_runstore::verify::{Proof, verify};

use crate::cli::VerifyArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, count};
use crate::progress;
use crate::table;

pub(crate) async fn main(args: VerifyArgs, out: Out) -> Result<Exit> {
    let (run, spec) = super::existing(&args.bucket.bucket, &args.run).await?;
    let set = PatchSet::open(args.data.as_deref().unwrap_or(&spec.data)).await?;
    let bar = progress::bar(out, 0, "{msg} {wide_bar:.cyan/dim} {pos}/{len}");
    bar.set_message("parts");
    let proof = verify(&Commits::new(&run), &spec, &set, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })
    .await;
    bar.finish_and_clear();
    let proof = proof?;
    if out.json() {
        out.json_line(&proof)?;
    } else {
        out.data(text(&proof))?;
    }
    if proof.holds() {
        return Ok(Exit::Done);
    }
    let problems = proof.problems.len();
    Err(Failure::new(Exit::Data, format!("run {} is not whole: {problems} problem(s), listed above", args.run))
        .hint("`run --resume` goes on from the newest commit that is whole, and puts damaged ones away")
        .into())
}

fn text(proof: &Proof) -> String {
    let rows = proof.epochs.iter().map(|epoch| {
        [
            epoch.epoch.to_string(),
            format!("{} of {}", count(epoch.patches as usize), count(epoch.of as usize)),
            count(epoch.steps as usize),
            epoch.plans.to_string(),
        ]
    });
    let mut text = table::text(&["epoch", "patches used, each once", "steps", "plans"], rows.collect());
    text.push_str(&format!(
        "\n{} commits in one chain, {} parts ({}) read and intact, {} steps",
        proof.commits.len(),
        count(proof.parts),
        indicatif::HumanBytes(proof.bytes),
        proof.steps
    ));
    if proof.holds() {
        return text;
    }
    let problems: Vec<String> = proof.problems.iter().map(|problem| format!("  {problem}")).collect();
    format!("{text}\nproblems:\n{}", problems.join("\n"))
}
