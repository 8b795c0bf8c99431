//! The base of the comparison: a revision, and an executable that was built from it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::count::kept;

/// File that names the base, from the top of the repository.
pub const FILE: &str = "results/BASE";

/// What [`FILE`] says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Base {
    /// Compare with this revision, a full hash.
    Revision(String),
    /// Do not compare, for this reason.
    None(String),
}

impl Base {
    /// Reads the first line that is neither empty nor a comment: a full hash, or `none: reason`.
    ///
    /// # Errors
    ///
    /// If there is no such line.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines().map(str::trim);
        let line = lines
            .find(|line| !line.is_empty() && !line.starts_with('#'))
            .with_context(|| format!("{FILE} names no revision"))?;
        if let Some(reason) = line.strip_prefix("none:") {
            ensure!(!reason.trim().is_empty(), "{FILE} says none, but not why");
            return Ok(Self::None(reason.trim().to_owned()));
        }
        let is_hash = line.len() == 40 && line.chars().all(|c| c.is_ascii_hexdigit());
        ensure!(is_hash, "{FILE}: {line:?} is neither a full hash nor \"none: reason\"");
        Ok(Self::Revision(line.to_owned()))
    }
}

/// A clone of the repository of the bench.
#[derive(Clone, Debug)]
pub struct Repository(PathBuf);

impl Repository {
    /// The one that the working directory lies in.
    ///
    /// # Errors
    ///
    /// If it lies in none.
    pub fn here() -> Result<Self> {
        let top = git(Path::new("."), &["rev-parse", "--show-toplevel"])?;
        Ok(Self(PathBuf::from(top)))
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// The full hash of a revision.
    ///
    /// # Errors
    ///
    /// If there is no such commit, also because the clone is shallow.
    pub fn resolve(&self, revision: &str) -> Result<String> {
        let commit = format!("{revision}^{{commit}}");
        git(&self.0, &["rev-parse", "--verify", "--quiet", "--end-of-options", &commit])
            .with_context(|| format!("there is no revision {revision} in this clone"))
    }

    /// Whether a tracked file differs from HEAD.
    ///
    /// # Errors
    ///
    /// What git says.
    pub fn is_changed(&self) -> Result<bool> {
        Ok(!git(&self.0, &["status", "--porcelain", "--untracked-files=no"])?.is_empty())
    }

    /// The executable of the bench as of a revision (full hash). It is built in a worktree of its
    /// own, which is removed again, and kept.
    ///
    /// # Errors
    ///
    /// If it does not build.
    pub fn build(&self, hash: &str) -> Result<PathBuf> {
        let folder = kept()?;
        let kept = folder.join(format!("bench-harness-{hash}"));
        if kept.is_file() {
            return Ok(kept);
        }
        let worktree = Worktree::new(self.clone(), &folder.join(hash), hash)?;
        let target = worktree.path.join("target");
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--release", "--locked", "-p", "bench-harness"]);
        cargo.arg("--target-dir").arg(&target).current_dir(&worktree.path);
        let status = cargo.status().context("cargo cannot be started")?;
        ensure!(status.success(), "revision {hash} does not build ({status})");
        // In two steps: a copy that was interrupted is not taken for an executable.
        let part = folder.join(format!("{hash}.part"));
        std::fs::copy(target.join("release/bench-harness"), &part)
            .and_then(|_| std::fs::rename(&part, &kept))
            .with_context(|| format!("{} cannot be written", kept.display()))?;
        Ok(kept)
    }
}

/// A worktree, removed when dropped.
struct Worktree {
    repository: Repository,
    path: PathBuf,
}

impl Worktree {
    fn new(repository: Repository, path: &Path, hash: &str) -> Result<Self> {
        // From here on it is removed, also if only half of it comes to be.
        let made = Self { repository, path: path.to_owned() };
        // One that was killed may have left its own.
        made.remove();
        let text = path.to_str().context("the path of the build is not UTF-8")?;
        git(&made.repository.0, &["worktree", "add", "--detach", "--quiet", text, hash])?;
        Ok(made)
    }

    fn remove(&self) {
        if self.path.exists() {
            // What stays is found and removed the next time.
            std::fs::remove_dir_all(&self.path).unwrap_or(());
        }
        // The same holds for what git notes of it.
        drop(git(&self.repository.0, &["worktree", "prune"]));
    }
}

impl Drop for Worktree {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Runs git and gives its output without the end of the line.
fn git(folder: &Path, args: &[&str]) -> Result<String> {
    let mut command = Command::new("git");
    let output = command.arg("-C").arg(folder).args(args).output().context("git cannot be run")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("git {}: {} ({})", args.join(" "), text.trim(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_a_full_hash_or_a_reason() {
        let hash = "0123456789abcdef0123456789abcdef01234567";
        let text = format!("{hash}\n# because\n");
        assert_eq!(Base::parse(&text).unwrap(), Base::Revision(hash.into()));
        let none = Base::parse("# first\nnone: not yet\n").unwrap();
        assert_eq!(none, Base::None("not yet".into()));
        for text in ["", "# only\n", "main\n", "none:\n", "0123456\n"] {
            assert!(Base::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_revision_that_is_not_there_is_named() {
        let repository = Repository::here().unwrap();
        let error = repository.resolve("no-such-revision").unwrap_err();
        assert_eq!(error.to_string(), "there is no revision no-such-revision in this clone");
    }
}
