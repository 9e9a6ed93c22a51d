//! Finding `sgcl-worker`, the program that holds torch: `sgclctl` does without.

use std::path::{Path, PathBuf};

use crate::error::Failure;
use crate::exit::Exit;

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
