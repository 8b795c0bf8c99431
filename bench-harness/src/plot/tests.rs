use super::*;
use crate::stats::rng::Rng;

fn forks(n: usize, median: f64, seed: u64) -> Vec<f64> {
    let mut rng = Rng::new(seed);
    let mut fork = || {
        let tail = if rng.uniform() < 0.03 { 60.0 * rng.uniform().powf(-0.8) } else { 0.0 };
        median * (0.1 * rng.normal()).exp() + tail
    };
    (0..n).map(|_| fork()).collect()
}

fn rows() -> Vec<StageRow> {
    let stages = |scale: f64| {
        ["exit", "quiesce", "capture", "handover", "apply", "state", "enter"]
            .iter()
            .zip([8.0, 1.0, 6.0 * scale, 12.0, 9.0 * scale, 11.0, 24.0])
            .map(|(name, us)| ((*name).to_owned(), us))
            .collect::<Vec<_>>()
    };
    let row = |label: &str, scale: f64, branch_us| StageRow {
        label: label.to_owned(),
        bars: vec![stages(scale)],
        branch_us: Some(branch_us),
    };
    vec![
        row("quiet", 1.0, 76.0),
        row("quiet-announced", 0.9, 66.0),
        row("dirty-10", 2.0, 84.5),
        row("backing-hugetlb", 6.0, 152.0),
    ]
}

fn all() -> Vec<(&'static str, String)> {
    let (a, b) = (forks(1000, 70.0, 1), forks(1000, 81.0, 2));
    let mut failed = forks(60, 90.0, 3);
    failed.push(f64::INFINITY);
    let sizes: [(f64, f64, f64); 5] = [
        (0.0, 71.0, 160.0),
        (10.0, 80.0, 171.0),
        (100.0, 230.0, 420.0),
        (1000.0, 1650.0, 2900.0),
        (10000.0, 15800.0, f64::INFINITY),
    ];
    let dirty: Vec<_> = sizes
        .iter()
        .map(|(x, p50_us, p99_us)| TrendPoint { x: *x, p50_us: *p50_us, p99_us: *p99_us })
        .collect();
    let memory: Vec<_> = [128.0, 512.0, 1024.0, 4096.0, 8192.0]
        .iter()
        .map(|x| TrendPoint { x: *x, p50_us: 70.0 + x / 2000.0, p99_us: 150.0 + x / 400.0 })
        .collect();
    let host = "512 MiB, 1 vCPU, 4 KiB pages, direct host, load 0.4";
    vec![
        (
            "one",
            percentile_curves(
                "quiet: branch",
                host,
                "branch (µs)",
                &[Curve { label: "branch_us", samples_us: &failed }],
            ),
        ),
        (
            "ab",
            percentile_curves(
                "quiet: A against B",
                host,
                "branch (µs)",
                &[
                    Curve { label: "A 1a2b3c4", samples_us: &a },
                    Curve { label: "B 5d6e7f8", samples_us: &b },
                ],
            ),
        ),
        (
            "stages",
            stage_stack(
                "Where the time of a fork goes",
                "p50 of each stage; the mark is the p50 of branch",
                &rows(),
            ),
        ),
        (
            "dirty",
            trend(
                "branch against dirty pages",
                host,
                ("pages dirtied just before the fork", "branch (µs)"),
                &dirty,
            ),
        ),
        (
            "memory",
            trend(
                "branch against memory size",
                host,
                ("guest memory (MiB)", "branch (µs)"),
                &memory,
            ),
        ),
    ]
}

#[test]
fn every_plot_is_one_well_formed_file() {
    for (name, text) in all() {
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{name}");
        assert!(!text.contains("NaN") && !text.contains("inf\""), "{name}: {text}");
        let opened = text.matches("<text").count();
        assert_eq!(opened, text.matches("</text>").count(), "{name}");
        // To look at them: PLOTS=/some/folder cargo test -p bench-harness plot
        if let Some(folder) = std::env::var_os("PLOTS") {
            let folder = std::path::PathBuf::from(folder);
            std::fs::write(folder.join(format!("{name}.svg")), text).unwrap();
        }
    }
}

#[test]
fn failed_forks_are_in_the_legend() {
    let curve = Curve { label: "branch_us", samples_us: &[1.0, f64::INFINITY] };
    let text = percentile_curves("t", "", "µs", &[curve]);
    assert!(text.contains("branch_us (n = 2, 1 failed)"));
}

#[test]
fn labels_are_escaped() {
    let text = percentile_curves("a < b & \"c\"", "", "µs", &[]);
    assert!(text.contains("a &lt; b &amp; &quot;c&quot;"));
}

#[test]
fn nothing_to_draw_is_an_empty_frame() {
    for text in [trend("t", "", ("x", "y"), &[]), stage_stack("t", "", &[])] {
        assert!(text.ends_with("</svg>\n") && !text.contains("NaN"), "{text}");
    }
}
