//! `sgcl_transfer`, the Python package behind evaluations whose parts live in torchvision: where it lies and what runs it.
//!
//! The package travels in this program and is laid out in the cache folder; the environment is made there by the package's own
//! `environment.py`, from its lock.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{ChildStderr, Command};

use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;
use crate::{progress, worker};

/// The package's files, by their place below the folder that Python looks in.
const FILES: [(&str, &str); 9] = [
    ("requirements.lock", include_str!("../../../../transfer/requirements.lock")),
    ("sgcl_transfer/__init__.py", include_str!("../../../../transfer/sgcl_transfer/__init__.py")),
    ("sgcl_transfer/detection.py", include_str!("../../../../transfer/sgcl_transfer/detection.py")),
    ("sgcl_transfer/environment.py", include_str!("../../../../transfer/sgcl_transfer/environment.py")),
    ("sgcl_transfer/model.py", include_str!("../../../../transfer/sgcl_transfer/model.py")),
    ("sgcl_transfer/nucls.py", include_str!("../../../../transfer/sgcl_transfer/nucls.py")),
    ("sgcl_transfer/score.py", include_str!("../../../../transfer/sgcl_transfer/score.py")),
    ("sgcl_transfer/train.py", include_str!("../../../../transfer/sgcl_transfer/train.py")),
    ("sgcl_transfer/weights.py", include_str!("../../../../transfer/sgcl_transfer/weights.py")),
];

/// Python that has what the package needs; the first call on a machine makes the environment.
///
/// # Errors
/// No Python, no package index, no place to write.
pub(super) async fn python(out: Out) -> Result<Command> {
    let cache = cache_folder()?;
    let package = lay_out(&cache).with_context(|| format!("cannot write the package to {}", cache.display()))?;
    let interpreter = match variable("SGCL_TRANSFER_PYTHON") {
        Some(named) if named.is_file() => named,
        Some(named) => {
            return Err(Failure::new(
                Exit::Config,
                format!("SGCL_TRANSFER_PYTHON names {}, which is no file", named.display()),
            )
            .hint("unset it, or let it name a Python with torch, torchvision and pycocotools")
            .into());
        }
        None => environment(&cache, &package, out).await?,
    };
    let mut command = Command::new(interpreter);
    // What lies in the working folder is not to be taken for ours.
    command.env("PYTHONPATH", package).env("PYTHONSAFEPATH", "1");
    Ok(command)
}

/// The interpreter of the environment, which is made where it is not there yet.
async fn environment(cache: &Path, package: &Path, out: Out) -> Result<PathBuf> {
    let lender = variable("SGCL_PYTHON");
    let starter = lender.clone().unwrap_or_else(|| "python3".into());
    let mut command = Command::new(&starter);
    command.arg(package.join("sgcl_transfer/environment.py")).arg("--cache").arg(cache);
    if let Some(lender) = &lender {
        command.arg("--torch-from").arg(lender);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| {
        Failure::new(Exit::Config, format!("cannot start {}: {error}", starter.display()))
            .hint("install Python 3.10 or newer, or let SGCL_TRANSFER_PYTHON name one with torch, torchvision and pycocotools")
    })?;
    let words = child.stderr.take().map(|stderr| tokio::spawn(words(out, stderr)));
    let spinner = progress::spinner(out, "the environment for transfer evaluations".to_owned());
    let answer = child.wait_with_output().await?;
    spinner.finish_and_clear();
    let words = match words {
        Some(words) => words.await.unwrap_or_default(),
        None => Vec::new(),
    };
    if !answer.status.success() {
        return Err(worker::failure("environment.py", answer.status.code(), &words).into());
    }
    let told = String::from_utf8(answer.stdout).context("environment.py named no interpreter")?;
    Ok(PathBuf::from(told.trim()))
}

/// Passes on what the set-up says it does, and returns all it printed.
async fn words(out: Out, stderr: ChildStderr) -> Vec<String> {
    let mut kept = Vec::new();
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(text) = line.strip_prefix("setup: ") {
            out.note(text);
        }
        kept.push(line);
    }
    kept
}

/// Writes the package to a folder named by its content; returns the folder.
fn lay_out(cache: &Path) -> std::io::Result<PathBuf> {
    let folder = cache.join(format!("transfer-package-{:08x}", content()));
    if FILES.iter().all(|(name, text)| fs::read(folder.join(name)).is_ok_and(|found| found == text.as_bytes())) {
        return Ok(folder);
    }
    for (name, text) in FILES {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        // Two calls may write at once: each file appears whole, and both write the same.
        let draft = path.with_extension(format!("{}.draft", std::process::id()));
        fs::write(&draft, text)?;
        fs::rename(&draft, &path)?;
    }
    Ok(folder)
}

fn content() -> u64 {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    FILES.hash(&mut hasher);
    hasher.finish()
}

/// `$SGCL_CACHE`, `$XDG_CACHE_HOME/sgcl` or `~/.cache/sgcl`.
fn cache_folder() -> Result<PathBuf> {
    let folder = variable("SGCL_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("sgcl")))
        .or_else(|| variable("HOME").map(|folder| folder.join(".cache/sgcl")))
        .ok_or_else(|| Failure::new(Exit::Config, "there is no cache folder").hint("let SGCL_CACHE name one"))?;
    Ok(std::path::absolute(folder)?)
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_package_is_laid_out_whole_and_again_where_a_file_was_changed() {
        let cache = tempfile::tempdir().unwrap();
        let folder = lay_out(cache.path()).unwrap();
        fs::write(folder.join("sgcl_transfer/score.py"), "import this").unwrap();
        assert_eq!(lay_out(cache.path()).unwrap(), folder);
        for (name, text) in FILES {
            assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), text);
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../transfer/sgcl_transfer");
        let python = fs::read_dir(source).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        for name in python.filter(|name| name.ends_with(".py")) {
            assert!(FILES.iter().any(|(file, _)| *file == format!("sgcl_transfer/{name}")), "{name} is not carried");
        }
    }
}
