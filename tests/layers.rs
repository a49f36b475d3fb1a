//! The order of the layers: each uses only those above it in the map of `src/lib.rs`.

use std::path::{Path, PathBuf};

/// The layers from top to bottom, and what each may use besides itself.
const LAYERS: &[(&[&str], &[&str])] = &[
    (&["limits", "settings", "metrics"], &["limits", "settings", "metrics"]),
    (&["wire"], &["limits", "settings", "metrics"]),
    (&["log"], &["limits", "settings", "metrics", "wire"]),
    (&["shard"], &["limits", "settings", "metrics", "wire", "log"]),
    (&["backbone"], &["limits", "settings", "metrics", "wire", "log", "shard"]),
    (&["control"], &["limits", "settings", "metrics", "wire", "log", "shard", "backbone"]),
    // The clients must work against any node: they know the wire and the bounds, and nothing of the node behind them.
    (&["client"], &["wire", "limits"]),
];

/// Files that may use every layer: the map itself, the command line, and what only unit tests use.
const ABOVE_ALL: &[&str] = &["lib", "main", "cli", "planted", "testing"];

/// The standard library's ways to the clock, the environment, randomness and sockets, which the pure layers do without.
const IMPURE: &[&str] =
    &["std::net", "std::env", "std::fs", "std::io::", "Instant::now", "SystemTime", "getrandom", "libc::", "thread::"];

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(directory).expect("list a source directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("read a source file");
                found.push((path, text));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &mut found);
    assert!(found.len() > 10, "the sources are where they are looked for: {}", root.display());
    found.into_iter().map(|(path, text)| (path.strip_prefix(&root).expect("below the root").to_owned(), text)).collect()
}

/// The top-level module a file belongs to.
fn module(path: &Path) -> String {
    let first = path.components().next().expect("a file has a name");
    first.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned()
}

/// A text without its comments. Good enough for these sources: a string with `//` in it only loses its end.
fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Whether the text continues with a path of one of the library's own modules.
fn identifier(text: &str) -> String {
    text.chars().take_while(|&letter| letter.is_alphanumeric() || letter == '_').collect()
}

/// The top-level modules that a file names through `crate::`, in `use` lines, groups and paths.
fn used(text: &str) -> Vec<String> {
    let code = without_comments(text);
    let mut modules = Vec::new();
    for (at, found) in code.match_indices("crate::") {
        // `$crate::` of a macro counts as well; `other_crate::` does not.
        if code[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_') {
            continue;
        }
        let rest = code[at + found.len()..].trim_start();
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = true;
            for (at, letter) in group.char_indices() {
                match letter {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = true,
                    _ if start && !letter.is_whitespace() => {
                        modules.push(identifier(&group[at..]));
                        start = false;
                    }
                    _ => {}
                }
            }
        } else {
            modules.push(identifier(rest));
        }
    }
    modules
}

#[test]
fn each_layer_uses_only_those_above_it() {
    let mut wrong = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for (path, text) in sources() {
        let own = module(&path);
        if ABOVE_ALL.contains(&own.as_str()) {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(names, _)| names.contains(&own.as_str())) else {
            wrong.push(format!("{}: no layer is named {own}; name it in this test", path.display()));
            continue;
        };
        for used in used(&text) {
            // Only names of layers count: `crate::CONSTANT` of a binary or a macro's own path has no layer.
            let is_layer = LAYERS.iter().any(|(names, _)| names.contains(&used.as_str()));
            if is_layer && used != own && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{}: {own} uses {used}", path.display()));
            }
        }
        seen.insert(own);
    }
    assert!(wrong.is_empty(), "layers out of order:\n{}", wrong.join("\n"));
    for (names, _) in LAYERS {
        assert!(names.iter().any(|name| seen.contains(*name)), "no source of {names:?} was looked at");
    }
}

#[test]
fn pure_layers_read_no_clock_environment_or_socket() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if !matches!(module(&path).as_str(), "wire" | "log") {
            continue;
        }
        let code = without_comments(&text);
        for name in IMPURE.iter().filter(|name| code.contains(**name)) {
            wrong.push(format!("{}: {name}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "the pure layers take the clock, seeds and bytes as arguments:\n{}", wrong.join("\n"));
}

#[test]
fn shard_knows_no_redis() {
    for (path, text) in sources() {
        if module(&path) == "shard" {
            assert!(!without_comments(&text).to_lowercase().contains("redis"), "{}", path.display());
        }
    }
}

#[test]
fn paths_are_found_in_every_form() {
    let text = "use crate::wire::sse;\n// crate::control\nuse crate::{limits, log::{frame, position}, shard};\n\
        fn f() { crate::backbone::go(); other_crate::client::x(); $crate::metrics::y() }";
    assert_eq!(used(text), ["wire", "limits", "log", "shard", "backbone", "metrics"]);
}
