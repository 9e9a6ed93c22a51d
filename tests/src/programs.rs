//! The programs under test, as a user calls them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where `sgclctl` and `sgcl-worker` were built, and the environment they are called with.
pub struct Programs {
    folder: PathBuf,
    environment: Vec<(String, String)>,
}

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Run {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// The run itself when it succeeded.
    ///
    /// # Panics
    /// With everything it printed when it did not.
    #[must_use]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

impl Programs {
    /// Finds the programs beside the running test.
    ///
    /// # Errors
    /// When they are not built.
    pub fn find() -> Result<Self> {
        let test = std::env::current_exe()?;
        let folder =
            test.parent().and_then(Path::parent).context("the test runs outside a target folder")?.to_path_buf();
        for name in ["sgclctl", "sgcl-worker"] {
            ensure!(
                folder.join(name).is_file(),
                "{} is not built; run: cargo build --release -p sgclctl -p sgcl-worker",
                folder.join(name).display()
            );
        }
        Ok(Self { folder, environment: Vec::new() })
    }

    /// Adds variables to the environment of every call.
    #[must_use]
    pub fn with(mut self, environment: Vec<(&'static str, String)>) -> Self {
        self.environment.extend(environment.into_iter().map(|(k, v)| (k.to_owned(), v)));
        self
    }

    /// A command that calls `sgclctl`, not yet started.
    #[must_use]
    pub fn sgclctl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.folder.join("sgclctl"));
        command.args(arguments).envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Calls `sgclctl` and waits for its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn call(&self, arguments: &[&str]) -> Result<Run> {
        let output = self.sgclctl(arguments).output().context("cannot start sgclctl")?;
        Ok(Run {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}
