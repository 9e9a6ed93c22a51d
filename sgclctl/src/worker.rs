//! `sgcl-worker`, the program that holds torch: where it is, and what it says when it fails. `sgclctl` does without torch.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStderr;

use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;

/// Lines of the worker's log that are kept for an error.
const LAST_LINES: usize = 20;

/// `SGCL_WORKER`, else the program beside this one.
///
/// # Errors
/// It is not there; the hint says how to build it.
pub(crate) fn find() -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os("SGCL_WORKER").filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Failure::new(Exit::Config, format!("SGCL_WORKER names {}, which is no file", path.display()))
                .hint("unset it, or let it name the sgcl-worker program"))
        };
    }
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|folder| folder.join("sgcl-worker")));
    match beside {
        Some(path) if path.is_file() => Ok(path),
        other => {
            let place =
                other.as_deref().map_or_else(|| "beside sgclctl".to_owned(), |p: &Path| p.display().to_string());
            Err(Failure::new(Exit::Config, format!("sgcl-worker is not there ({place})"))
                .hint("build it with `make build`, or set SGCL_WORKER to where it is"))
        }
    }
}

/// What the worker, or another program of ours, said last: its `error:` line where there is one.
pub(crate) fn failure(program: &str, code: Option<i32>, words: &[String]) -> Failure {
    let last = words.iter().rposition(|line| line.starts_with("error: ")).map_or(words, |at| &words[at..]);
    let text = last.join("\n");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let exit = code.map_or(Exit::Failed, Exit::of_worker);
    match text.rsplit_once("; ").filter(|_| !text.contains('\n')) {
        Some((what, remedy)) => Failure::new(exit, what).hint(remedy),
        None if text.is_empty() => Failure::new(exit, format!("{program} ended with {code:?} and said nothing"))
            .hint("SGCL_LOG=debug makes it say more"),
        None => Failure::new(exit, text),
    }
}

/// Reads its log to the end: the last lines. What it warns of concerns the user, and is passed on.
pub(crate) async fn last_words(out: Out, stderr: ChildStderr) -> Vec<String> {
    let mut kept = VecDeque::with_capacity(LAST_LINES);
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::info!(target: "worker", "{line}");
        let line = sgcl_telemetry::plain(&line).into_owned();
        if let Some(words) = line.trim_start().strip_prefix("WARN ") {
            let words = words.split_once(": ").map_or(words, |(_, words)| words);
            out.note(format!("warning: {words}"));
        }
        if kept.len() == LAST_LINES {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    kept.into()
}
