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
