use super::*;

const NAMES: &str = "quiet quiet-announced quiet-open dirty-10 dirty-100 dirty-1000 dirty-10000 \
    hot-1000 busy memory-128m memory-1g memory-4g memory-8g vcpus-2 vcpus-4 backing-4k \
    backing-thp backing-hugetlb depth-64 repeat-1000 children-100 children-1000 fanout-10 \
    fanout-100 tax-1m tax-16m tax-128m upkeep probes linux-fork linux-boot linux-vsock";

fn parse(fields: &str) -> Result<Catalogue, ScenarioError> {
    let text = format!("[[scenario]]\nname = \"x\"\nabout = \"\"\nforks = 10\n{fields}");
    Catalogue::parse("test", &text)
}

#[test]
fn every_promised_name_is_there() {
    let catalogue = Catalogue::standard().unwrap();
    for name in NAMES.split_whitespace() {
        assert_eq!(catalogue.get(name).unwrap().name, name);
    }
}

#[test]
fn names_say_what_the_fields_say() {
    let catalogue = Catalogue::standard().unwrap();
    for scenario in catalogue.all() {
        let (stem, last) = scenario.name.rsplit_once('-').unwrap_or((&scenario.name, ""));
        let number = last.trim_end_matches(['m', 'g']).parse::<u32>().ok();
        let mib = number.map(|n| if last.ends_with('g') { n * 1024 } else { n });
        let field = match stem {
            "dirty" | "hot" => Some(scenario.dirty_pages()),
            "memory" => Some(scenario.memory_mib),
            "vcpus" => Some(scenario.vcpus),
            "depth" => Some(scenario.depth),
            "repeat" => Some(scenario.forks),
            "children" => Some(scenario.keep_children),
            "fanout" => Some(scenario.children_per_fork),
            "tax" => Some(scenario.work_mib),
            _ => None,
        };
        if let Some(field) = field {
            assert_eq!(Some(field), mib, "{}", scenario.name);
        }
    }
}

#[test]
fn select_goes_by_name_or_by_set() {
    let catalogue = Catalogue::standard().unwrap();
    let named = catalogue.select(Set::Default, &["busy".into(), "quiet".into()]).unwrap();
    assert_eq!(named.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["busy", "quiet"]);
    let default = catalogue.select(Set::Default, &[]).unwrap();
    let all = catalogue.select(Set::All, &[]).unwrap();
    assert!(default.len() > 5 && default.len() < all.len());
    let linux = catalogue.select(Set::Linux, &[]).unwrap();
    assert_eq!(linux.len(), 3);
    assert!(linux.iter().all(|scenario| scenario.kind.is_linux() && !all.contains(scenario)));
    let error = catalogue.select(Set::All, &["quit".into()]).unwrap_err().to_string();
    assert!(error.contains("quit") && error.contains("dirty-100"), "{error}");
}

#[test]
fn defaults_are_the_documented_ones() {
    let catalogue = parse("").unwrap();
    let scenario = catalogue.get("x").unwrap();
    assert_eq!((scenario.memory_mib, scenario.vcpus, scenario.warmup), (512, 1, 20));
    assert!(scenario.sync && !scenario.in_default_set && !scenario.is_open_loop());
    assert_eq!((scenario.kind, scenario.backing), (Kind::Fork, Backing::Default));
}

#[test]
fn a_wrong_definition_names_the_field() {
    for (fields, expected) in [
        ("memory_mb = 4", "memory_mb"),
        ("backing = \"2m\"", "backing"),
        ("memory_mib = 4", "memory_mib is 4, must be 16 to 65536"),
        ("vcpus = 0", "vcpus is 0"),
        ("dirty = { pages = 0, mode = \"same\" }", "dirty has 0 pages"),
        ("dirty = { pages = 70000, mode = \"same\" }", "needs 70000 pages, half of the memory is"),
        ("depth = 3", "depth is only for kind depth, this is fork"),
        ("kind = \"depth\"", "depth must be 2 or more for kind depth"),
        ("kind = \"tax\"", "work_mib must be 1 or more"),
        ("kind = \"tax\"\nwork_mib = 300", "work_mib needs 76800 pages"),
        ("kind = \"upkeep\"\ninterval_us = 5", "interval_us is only for kind fork"),
        ("cycles = 2", "cycles is only for kind children"),
        ("reference_mib = 8", "reference_mib is 8, must be 16 to 65536"),
        ("reference_mib = 32\nrate_pages_per_second = 5", "reference_mib is only for kind fork"),
        ("reference_forks = 3", "reference_forks is only with reference_mib"),
        ("reference_mib = 32\nreference_forks = 9000", "reference_forks is 9000, of "),
        ("backing = \"hugetlb\"\nmemory_mib = 17", "must be even"),
        ("kind = \"linux-boot\"\nvcpus = 2", "vcpus is not for Linux guests"),
    ] {
        let error = parse(fields).unwrap_err();
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text = format!("{text}: {source}");
        }
        assert!(text.contains(expected), "{fields:?} gave {text:?}");
    }
}

#[test]
fn names_that_could_be_paths_are_refused() {
    for name in ["", "../x", "a b", "-n", "A", &"x".repeat(41)] {
        let text = format!("[[scenario]]\nname = \"{name}\"\nabout = \"\"\nforks = 1");
        assert!(Catalogue::parse("test", &text).is_err(), "{name:?}");
    }
}

#[test]
fn a_name_twice_is_refused() {
    let one = "[[scenario]]\nname = \"x\"\nabout = \"\"\nforks = 1\n";
    let error = Catalogue::parse("test", &one.repeat(2)).unwrap_err();
    assert!(matches!(error, ScenarioError::Duplicate { name } if name == "x"));
}
