//! What a machine lacks for some of the tests, by their names.

use std::path::{Path, PathBuf};

use nested_host::{Place, image};
use runtime::doctor::HostKind;

use super::linux;

/// Tests of the nested test host itself: of its kind, and of what its kernel allows.
const OF_NESTED: [&str; 3] = [
    "forks::this_is_a_nested_host",
    "probes::every_part_is_measured_here",
    "probes::every_program_loads_by_itself",
];
/// How the names of tests begin that start the program `runtime`.
const WITH_RUNTIME: &str = "cli::";

/// Why tests cannot run.
pub struct Lacks {
    all: Option<String>,
    python: Option<String>,
    runtime: Option<String>,
    nested: Option<String>,
}

impl Lacks {
    /// Looks for everything that running at `place` takes.
    pub fn at(place: &Place) -> Self {
        let brought = linux::brought();
        let image = || if brought.is_some() { None } else { image::missing() };
        let (all, nested) = match place {
            Place::Emulated { .. } => (nested_host::missing().or_else(image), None),
            Place::Here(HostKind::Nested) => (image(), None),
            Place::Here(kind) => {
                let why = format!("this is a host of kind {}, not a nested one", kind.name());
                (image(), Some(why))
            }
        };
        let python = match &brought {
            Some(folder) => absent(&folder.join("python")),
            None => image::python_root().err().map(|error| error.to_string()),
        };
        Self {
            all,
            python,
            runtime: runtime()
                .is_none()
                .then(|| "the program runtime is not there; ./just build makes it".to_owned()),
            nested,
        }
    }

    /// Why none can run.
    pub fn all(&self) -> Option<&String> {
        self.all.as_ref()
    }

    /// Why this one cannot.
    pub fn of(&self, name: &str) -> Option<String> {
        let some = [
            (name.starts_with(linux::WITH_PYTHON), &self.python),
            (name.starts_with(WITH_RUNTIME), &self.runtime),
            (OF_NESTED.contains(&name), &self.nested),
        ];
        let lacking = some.into_iter().filter_map(|(needs, lack)| lack.as_ref().filter(|_| needs));
        self.all.iter().chain(lacking).next().cloned()
    }

    /// What some cannot run for.
    pub fn print(&self) {
        let some = [
            ("", &self.all),
            (" with Python", &self.python),
            (" of the program runtime", &self.runtime),
            (" of the nested host itself", &self.nested),
        ];
        for (which, lack) in some {
            if let Some(lack) = lack {
                eprintln!("the nested tests{which} are ignored: {lack}");
            }
        }
    }
}

fn absent(path: &Path) -> Option<String> {
    (!path.exists()).then(|| format!("{} is not there", path.display()))
}

/// The program that users run, as it was built last.
pub fn runtime() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let beside = own.ancestors().nth(2).map(|folder| folder.join("runtime"));
    beside.filter(|path| path.is_file()).or_else(|| in_path("runtime"))
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file())
}
