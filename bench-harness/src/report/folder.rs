//! Files and folders of a run.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::pictures::pictures;
use super::readme::readme;
use super::{ReportError, Revision, RunSummary, summarize};
use crate::record::hgrm;
use crate::session::{Outcome, ScenarioRun, Session};

/// Writes a session to `results/<run>/` and returns the folder and what its `summary.json` says.
///
/// `<run>` is the time of the start in UTC and the short hash of the revision. A folder that is
/// there already is not touched.
///
/// # Errors
///
/// [`ReportError`]; what was written until then stays.
pub fn write(
    session: &Session,
    revision: Revision,
    results: &Path,
) -> Result<(PathBuf, RunSummary), ReportError> {
    let summary = summarize(session, revision);
    let name = format!("{}-{}", utc(summary.started_unix_s), summary.revision.short());
    make_folder(results)?;
    let folder = results.join(&name);
    fs::create_dir(&folder).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => ReportError::Exists { path: folder.clone() },
        _ => ReportError::File { action: "made", path: folder.clone(), source },
    })?;
    for part in ["raw", "hgrm", "plots"] {
        make_folder(&folder.join(part))?;
    }
    for (scenario, outcome) in &session.outcomes {
        if let Outcome::Done(run) = outcome {
            write_scenario(&folder, &scenario.name, run)?;
        }
    }
    let recorder = |wanted: &str| {
        session.outcomes.iter().find_map(|(scenario, outcome)| match outcome {
            Outcome::Done(run) if scenario.name == wanted => Some(run.recorder.clone()),
            _ => None,
        })
    };
    let pictures = pictures(&summary, &recorder);
    for (picture, text) in &pictures {
        write_text(&folder.join("plots").join(format!("{picture}.svg")), text)?;
    }
    let names: Vec<String> = pictures.into_iter().map(|(picture, _)| picture).collect();
    write_text(&folder.join("README.md"), &readme(&name, &summary, &names))?;
    // Last, so that a folder with a summary is a complete one.
    let json = serde_json::to_string_pretty(&summary).map_err(ReportError::Json)?;
    write_text(&folder.join("summary.json"), &(json + "\n"))?;
    Ok((folder, summary))
}

fn write_scenario(folder: &Path, name: &str, run: &ScenarioRun) -> Result<(), ReportError> {
    let raw = folder.join("raw");
    let recorder = &run.recorder;
    write_file(&raw.join(format!("{name}.csv")), |out| recorder.write_csv(out))?;
    if recorder.has_apart() {
        write_file(&raw.join(format!("{name}.apart.csv")), |out| recorder.write_apart_csv(out))?;
    }
    if !run.baselines_us.is_empty() {
        write_file(&raw.join(format!("{name}.baselines.csv")), |out| {
            writeln!(out, "metric,index,value")?;
            for (metric, samples) in &run.baselines_us {
                for (index, sample) in samples.iter().enumerate() {
                    writeln!(out, "{metric},{index},{sample:.3}")?;
                }
            }
            Ok(())
        })?;
    }
    let times = recorder.metrics().filter(|metric| metric.ends_with("_us"));
    for metric in times {
        let histogram = hgrm::histogram(&recorder.samples(metric))?;
        let path = folder.join("hgrm").join(format!("{name}.{metric}.hgrm"));
        write_file(&path, |out| hgrm::write(&histogram, out))?;
    }
    Ok(())
}

fn make_folder(path: &Path) -> Result<(), ReportError> {
    fs::create_dir_all(path).map_err(|source| ReportError::File {
        action: "made",
        path: path.to_owned(),
        source,
    })
}

fn write_text(path: &Path, text: &str) -> Result<(), ReportError> {
    write_file(path, |out| out.write_all(text.as_bytes()))
}

/// Writes a file that must not be there yet.
fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), ReportError> {
    let written = File::create_new(path).and_then(|file| {
        let mut out = BufWriter::new(file);
        fill(&mut out)?;
        out.flush()
    });
    written.map_err(|source| ReportError::File { action: "written", path: path.to_owned(), source })
}

/// `2026-01-31T12-00-00Z`: ISO 8601 without the colons that some file systems refuse.
fn utc(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400, unix_s % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{:02}Z", second % 60)
}

/// Date of a day counted from 1970-01-01 (H. Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`, for days that are not negative).
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        assert_eq!(utc(0), "1970-01-01T00-00-00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00-00-00Z");
        assert_eq!(utc(1_767_225_599), "2025-12-31T23-59-59Z");
    }
}
