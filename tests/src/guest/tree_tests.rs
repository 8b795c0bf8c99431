use super::*;

/// What host and guests say, in order; an instance is the number of its path.
#[derive(Clone)]
enum Said {
    Event(Event),
    Line(Uuid, String),
}

fn id(path: &str) -> Uuid {
    Uuid::from_u128(0x1000 + path.parse::<u128>().unwrap_or(0))
}

fn children(path: &str) -> Vec<&'static str> {
    let is_child = |child: &&&str| child.len() == path.len() + 1 && child.starts_with(path);
    PATHS.iter().filter(is_child).copied().collect()
}

/// A run in which everything fits.
fn whole() -> Vec<Said> {
    let mut all = Vec::new();
    for path in PATHS {
        let parent = (!path.is_empty()).then(|| id(&path[..path.len() - 1]));
        all.push(Said::Event(Event::Started { instance: id(path), parent }));
        if path.is_empty() {
            all.push(Said::Line(id(path), "@demo up".to_owned()));
        } else {
            all.push(Said::Line(id(path), format!("@demo born {path} {}", Uuid::nil())));
        }
        for child in children(path) {
            all.push(Said::Line(id(path), format!("@demo forked {child} {}", id(child))));
        }
        let names: Vec<String> = children(path).iter().map(|child| id(child).to_string()).collect();
        all.push(Said::Line(id(path), format!("@demo vm {}", names.join(" "))));
        for child in children(path) {
            all.push(Said::Line(id(path), format!("@demo status {} Running", id(child))));
            all.push(Said::Line(id(path), format!("@demo ended {} {child}", id(child))));
        }
        let code = path.parse().unwrap_or(0);
        all.push(Said::Event(Event::Exited { instance: id(path), code, reason: None }));
    }
    all
}

fn tree(said: &[Said]) -> Tree {
    let (mut tree, now) = (Tree::default(), Instant::now());
    for said in said {
        match said {
            Said::Event(event) => tree.event(event, now),
            Said::Line(instance, line) => assert!(tree.line(*instance, line, now), "{line}"),
        }
    }
    tree
}

/// The same run, with one line changed.
fn changed(from: &str, to: &str) -> Vec<String> {
    let mut all = whole();
    let mut found = 0;
    for said in &mut all {
        if let Said::Line(_, line) = said
            && line.contains(from)
        {
            *line = line.replace(from, to);
            found += 1;
        }
    }
    assert_eq!(found, 1, "{from}");
    tree(&all).complaints()
}

#[test]
fn a_run_that_fits_is_drawn() {
    let tree = tree(&whole());
    assert_eq!(tree.complaints(), [""; 0]);
    let drawn = tree.drawn();
    let marks: Vec<&str> =
        drawn.lines().filter_map(|line| Some(line.split_once("00000000")?.0)).collect();
    assert_eq!(marks, ["", "├── ", "│   ├── ", "│   └── ", "└── ", "    └── ", "        └── "]);
}

#[test]
fn what_does_not_fit_is_told() {
    let zero = Uuid::nil();
    let first = |from: &str, to: &str| changed(from, to).first().cloned().unwrap_or_default();
    let text = first(&format!("born 12 {zero}"), &format!("born 12 {}", id("12")));
    assert!(text.contains("is a child and read"), "{text}");
    let text = first(&format!("born 211 {zero}"), &format!("born 211 {zero} {}", id("2")));
    assert!(text.contains("was born with children"), "{text}");
    let text = first(&format!("forked 21 {}", id("21")), &format!("forked 21 {}", id("12")));
    assert!(text.contains("in fork, but its children are"), "{text}");
    let text = first(&format!("vm {}", id("211")), "vm");
    assert!(text.contains("in vm/, but its children are"), "{text}");
    let text = first(&format!("ended {} 12", id("12")), &format!("ended {} 11", id("12")));
    assert!(text.contains("in wait of"), "{text}");
    let text = first(&format!("status {} Running", id("2")), &format!("status {}", id("2")));
    assert!(text.contains("in status of"), "{text}");
}

#[test]
fn an_instance_that_is_missing_or_says_nothing_is_told() {
    let gone = id("211");
    let mut all = whole();
    all.retain(|said| match said {
        Said::Event(Event::Started { instance, .. } | Event::Exited { instance, .. })
        | Said::Line(instance, _) => *instance != gone,
        Said::Event(_) => true,
    });
    assert!(tree(&all).complaints().iter().any(|text| text.contains("the instances are")));
    let mut all = whole();
    all.retain(|said| !matches!(said, Said::Line(instance, _) if *instance == gone));
    assert!(tree(&all).complaints().iter().any(|text| text.contains("did not say that it is a")));
    assert!(!Tree::default().complaints().is_empty());
}

#[test]
fn a_code_that_the_host_did_not_see_is_told() {
    let mut all = whole();
    all.retain(|said| !matches!(said, Said::Event(Event::Exited { code: 2, .. })));
    assert!(tree(&all).complaints().iter().any(|text| text.contains("in wait of")));
}

#[test]
fn other_lines_are_left_alone() {
    let mut tree = Tree::default();
    for line in ["up", "@demo", "@demo ", "@demo what", "@demo forked 1", "@demo born"] {
        assert!(!tree.line(id("1"), line, Instant::now()), "{line}");
    }
}
