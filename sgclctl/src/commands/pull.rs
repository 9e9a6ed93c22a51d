//! `pull`: an export from the bucket to a folder, checked against its manifest.

use anyhow::Result;
use serde_json::json;
use sgcl_runstore::export;

use crate::cli::PullArgs;
use crate::exit::Exit;
use crate::output::Out;
use crate::progress;
use crate::table;

pub(crate) async fn main(args: PullArgs, out: Out) -> Result<Exit> {
    let (run, _) = super::existing(&args.bucket.bucket, &args.run).await?;
    let bar = progress::bar(out, 0, "{msg} {wide_bar:.cyan/dim} {bytes}/{total_bytes}");
    bar.set_message("weights");
    let pulled = export::pull(&run, args.commit, &args.dir, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })
    .await;
    bar.finish_and_clear();
    let pulled = pulled?;
    if out.json() {
        out.json_line(&json!({ "dir": pulled.dir, "export": pulled.manifest }))?;
        return Ok(Exit::Done);
    }
    let from = &pulled.manifest.from;
    let rows = pulled.manifest.files.iter().map(|file| {
        [
            file.name.clone(),
            indicatif::HumanBytes(file.bytes).to_string(),
            format!("{}…", file.sha256.get(..16).unwrap_or(&file.sha256)),
        ]
    });
    out.data(format!(
        "{}\nweights of run {}, commit {}, {} epochs; checksums match\n{}",
        pulled.dir.display(),
        from.run,
        from.commit,
        from.epochs,
        table::text(&["file", "size", "sha256"], rows.collect())
    ))?;
    Ok(Exit::Done)
}
