use super::*;

fn figure(p50_us: f64) -> Figure {
    Figure { n: 1, p50_us, p99_us: p50_us }
}

fn floor(copy_bytes: u64) -> Floor {
    Floor {
        memory_mib: 512,
        copy_bytes,
        exit_and_entry: figure(12.0),
        wake: figure(50.0),
        wake_spinning: figure(10.0),
        first_run: figure(40.0),
        capture: figure(0.5),
        apply: figure(2.0),
        apply_hot: figure(0.25),
        notes: Vec::new(),
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-6
}

#[test]
fn the_floor_is_the_sum_of_its_terms() {
    let floor = floor(4096);
    let none = DirtyPages::default();
    assert!(close(floor.sum_us(none, Standby::Parked), 102.0));
    assert!(close(floor.sum_us(none, Standby::Spinning), 62.0));
    let pages = DirtyPages { dirty: 100, hot: 60 };
    assert!(close(floor.sum_us(pages, Standby::Parked), 102.0 + 50.0 + 80.0 + 15.0));
    let terms = floor.terms_us(pages, Standby::Parked);
    assert!(close(terms.values().sum(), floor.sum_us(pages, Standby::Parked)));
    assert!(close(terms["capture_us"], 50.0) && close(terms["apply_us"], 95.0));
}

#[test]
fn no_more_pages_are_hot_than_dirty() {
    let floor = floor(4096);
    let odd = DirtyPages { dirty: 10, hot: 20 };
    let all = DirtyPages { dirty: 10, hot: 10 };
    assert!(close(floor.sum_us(odd, Standby::Parked), floor.sum_us(all, Standby::Parked)));
}

#[test]
fn a_huge_page_is_copied_once_for_all_its_dirty_pages() {
    let floor = floor(2 << 20);
    assert!(close(floor.copies(1.0), 1.0));
    // 256 huge pages; of 100,000 random pages every one is hit.
    assert!(close(floor.copies(100_000.0), 256.0));
    let some = floor.copies(256.0);
    assert!(some > 150.0 && some < 170.0, "{some}");
}

#[test]
fn every_primitive_takes_time_and_no_process_is_left() {
    let before = children();
    let clock = std::time::Instant::now();
    let config = FloorConfig { memory_mib: 64, ..FloorConfig::default() };
    let floor = Floor::measure(&config).unwrap();
    let seconds = clock.elapsed().as_secs_f64();
    for (name, figure) in floor.primitives() {
        assert!(figure.n >= 5, "{name}: {figure:?}");
        assert!(figure.p50_us > 0.0 && figure.p50_us <= figure.p99_us, "{name}: {figure:?}");
        assert!(figure.p50_us < 50_000.0, "{name}: {figure:?}");
    }
    assert!(floor.apply_hot.p50_us < floor.apply.p50_us, "{floor:?}");
    assert!(floor.sum_us(DirtyPages::default(), Standby::Parked) > 0.0);
    assert!(seconds < 5.0, "took {seconds} s");
    assert_eq!(children(), before, "a process is left");
}

#[test]
fn every_backing_is_measured_or_says_what_it_lacks() {
    for backing in [BackingKind::Thp, BackingKind::Hugetlb] {
        let config = FloorConfig { memory_mib: 64, backing, ..FloorConfig::default() };
        match Floor::measure(&config) {
            Ok(floor) => assert!(floor.apply.p50_us > 0.0),
            Err(BaselineError::Memory(error)) => {
                let text = error.to_string();
                assert!(text.contains("huge page") || text.contains("mmap"), "{text}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Processes that this thread started and that are not gone.
fn children() -> String {
    std::fs::read_to_string("/proc/thread-self/children").unwrap()
}
