//! House rules that no compiler checks. Every rule is a test of its own and prints all who break it.
//!
//! Lists of exceptions are ratchets: an entry that is no longer needed fails as well, so they only get shorter.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "tidy/rust.rs"]
mod rust;

use rust::{Token, code_of, functions, tokens, without_tests};

/// Modules of the driver, lowest first; each uses those below it. Equal numbers do not use each other.
const LAYERS: &[(&str, u32)] = &[
    ("base", 0),
    ("format", 1),
    ("io", 2),
    ("stage", 3),
    ("flush", 4),
    ("mirror", 4),
    ("recovery", 5),
    ("volume", 6),
    ("bytes", 7),
];

/// Uses of a higher layer: file and path used.
const UPWARD: &[(&str, &str)] = &[
    // The buffer type that operations carry; it has no behaviour.
    ("driver/src/format/patch.rs", "io::AlignedBuf"),
    // Implements the engine's wake-up for a ring.
    ("driver/src/io/uring/waker.rs", "volume::Wake"),
    // What opening reports is part of the status that clients see.
    ("driver/src/recovery/open.rs", "volume::status::RecoveryReport"),
];

/// Files in which `unsafe` may be written.
const UNSAFE: &[&str] = &[
    "driver/src/base/prefetch.rs",
    "driver/src/bytes/client/connect.rs",
    "driver/src/bytes/client/fork.rs",
    "driver/src/io/file/sys.rs",
    "driver/src/io/peer.rs",
    "driver/src/io/shared_map.rs",
    "driver/src/io/uring.rs",
    "driver/src/io/uring/tests.rs",
    "driver/src/io/uring/waker.rs",
    "driver/src/stage/arena.rs",
    "driver/tests/forks.rs",
    "driver/tests/hostile.rs",
    "driver/tests/support/child.rs",
    "ffi/src/device.rs",
    "ffi/src/log.rs",
    "ffi/src/memory.rs",
    "ffi/src/reaper.rs",
    "ffi/src/transfer.rs",
    "tests/src/sim/memory.rs",
    "ublk/examples/ramdisk.rs",
    "ublk/src/ctrl.rs",
    "ublk/src/memory.rs",
    "ublk/src/process.rs",
    "ublk/src/queue.rs",
];

const MODULE_LINES: usize = 600;
const FUNCTION_LINES: usize = 70;
const COLUMNS: usize = 128;

/// Longer modules: file and its length.
const LONG_MODULES: &[(&str, usize)] = &[];
/// Longer functions: file and name.
const LONG_FUNCTIONS: &[(&str, &str)] = &[
    ("driver/src/recovery/open.rs", "open"),
    ("driver/src/stage/tests.rs", "claim_fill_publish_commit_under_every_schedule"),
];
/// Files with longer lines, and how many.
const LONG_LINES: &[(&str, usize)] = &[
    ("driver/src/flush/epoch.rs", 2),
    ("driver/src/format/checkpoint.rs", 1),
    ("driver/src/format/record.rs", 1),
    ("driver/src/recovery/superblocks.rs", 1),
    ("tools/src/cli.rs", 1),
];

/// What is still left over: file and word.
const LEFT_OVER: &[(&str, &str)] = &[];

/// On-disk structures and the golden file that holds their bytes.
const GOLDEN: &[(&str, &str)] = &[
    ("ArenaImage", "arena"),
    ("CheckpointImage", "checkpoint"),
    ("CompletionImage", "byte_completion"),
    ("EntryImage", "log_entry"),
    ("Footer", "footer"),
    ("GroupHeader", "group"),
    ("HelloImage", "byte_hello"),
    ("LabelImage", "label"),
    ("LogHeaderImage", "log_header"),
    ("PatchEntry", "patch"),
    ("PatchHeader", "patch"),
    ("RecordHeader", "record"),
    ("RegionHeader", "region"),
    ("SubmissionImage", "byte_submission"),
    ("SuperblockImage", "superblock"),
    ("TableEntry", "table_entry"),
    ("VolumeEntry", "superblock"),
    ("VolumeFlushed", "checkpoint"),
    ("WelcomeImage", "byte_welcome"),
];

// ---- the tree

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All text files of the project, by path from the root.
fn files() -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(root().join(&dir)).unwrap().map(Result::unwrap) {
            let path = dir.join(entry.file_name());
            let name = entry.file_name().into_string().unwrap();
            let hidden = name.starts_with('.') && name != ".ci";
            let kind = entry.file_type().unwrap();
            if hidden || name == "target" || name == "proptest-regressions" || kind.is_symlink() {
                continue;
            }
            if kind.is_dir() {
                dirs.push(path);
            } else if let Ok(text) = fs::read_to_string(root().join(&path)) {
                files.insert(path.to_str().unwrap().to_owned(), text);
            }
        }
    }
    assert!(files.contains_key("Cargo.toml") && files.contains_key(&this_file()), "the tree is complete");
    files
}

fn this_file() -> String {
    "tests/tests/tidy.rs".to_owned()
}

fn rust_files() -> BTreeMap<String, String> {
    files().into_iter().filter(|(path, _)| path.ends_with(".rs")).collect()
}

fn report(rule: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{rule}:\n  {}\n", offenders.join("\n  "));
}

// ---- layers

/// A use of another module of the same crate: line and path from the crate's root.
fn uses(path: &str, tokens: &[Token]) -> Vec<(usize, String)> {
    // Modules above the file's own: `super` that many times is the root.
    let inside = path.trim_start_matches("driver/src/").trim_end_matches(".rs").trim_end_matches("/mod");
    let depth = inside.split('/').count();
    let text = |i: usize| tokens.get(i).map_or("", |t| t.1.as_str());
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let start = at;
        let mut supers = 0;
        while text(at) == "super" && text(at + 1) == ":" && text(at + 2) == ":" {
            supers += 1;
            at += 3;
        }
        if supers == depth || (text(start) == "crate" && text(start + 1) == ":" && text(start + 2) == ":") {
            at = if supers == 0 { start + 3 } else { at };
            paths(tokens, &mut at, "", &mut found);
        }
        at = at.max(start + 1);
    }
    found
}

/// Collects the paths of a use tree that starts at `at`, which is moved behind it.
fn paths(tokens: &[Token], at: &mut usize, prefix: &str, found: &mut Vec<(usize, String)>) {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.1.as_str());
    if text(*at) == "{" {
        *at += 1;
        while *at < tokens.len() && text(*at) != "}" {
            if text(*at) == "," {
                *at += 1;
            } else {
                paths(tokens, at, prefix, found);
            }
        }
        *at += 1;
        return;
    }
    let line = tokens.get(*at).map_or(0, |t| t.0);
    let joined = if prefix.is_empty() { text(*at).to_owned() } else { format!("{prefix}::{}", text(*at)) };
    *at += 1;
    if text(*at) == ":" && text(*at + 1) == ":" && text(*at + 2) != "<" {
        *at += 2;
        paths(tokens, at, &joined, found);
        return;
    }
    if text(*at) == "as" {
        *at += 2;
    }
    found.push((line, joined));
}

fn layer(module: &str) -> Option<u32> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

#[test]
fn modules_use_only_lower_layers() {
    let files: BTreeMap<String, String> =
        rust_files().into_iter().filter(|(path, _)| path.starts_with("driver/src/")).collect();
    let mut test_only = Vec::new();
    let mut found = Vec::new();
    let mut unused: Vec<_> = UPWARD.to_vec();
    let stripped: Vec<_> = files.iter().map(|(path, text)| (path, without_tests(&code_of(text)))).collect();
    for (path, (_, modules)) in &stripped {
        let dir = path.trim_end_matches(".rs").trim_end_matches("/mod").trim_end_matches("/lib");
        test_only.extend(modules.iter().map(|module| format!("{dir}/{module}")));
    }
    for (path, (tokens, _)) in &stripped {
        let is_test =
            test_only.iter().any(|t| **path == format!("{t}.rs") || path.starts_with(&format!("{t}/")));
        let own = path.trim_start_matches("driver/src/").trim_end_matches(".rs").split('/').next().unwrap();
        if is_test || own == "lib" {
            continue;
        }
        let Some(own_layer) = layer(own) else {
            found.push(format!("{path}: module '{own}' has no layer"));
            continue;
        };
        for (line, used) in uses(path, tokens) {
            let module = used.split("::").next().unwrap();
            if module == own || layer(module).is_some_and(|l| l < own_layer) {
                continue;
            }
            let listed = |(file, what): &(&str, &str)| file == path && *what == used;
            if !UPWARD.iter().any(listed) {
                found.push(format!("{path}:{line}: uses {used}"));
            }
            unused.retain(|entry| !listed(entry));
        }
    }
    found.extend(
        unused.iter().map(|(file, what)| format!("{file} no longer uses {what}: take it off the list")),
    );
    report("a module uses only modules below it", &found);
}

// ---- unsafe

#[test]
fn unsafe_code_is_where_it_is_listed() {
    let mut found = Vec::new();
    let mut unused = UNSAFE.to_vec();
    for (path, text) in rust_files() {
        let listed = UNSAFE.contains(&path.as_str());
        let lines: Vec<usize> = tokens(&code_of(&text))
            .iter()
            .filter(|(_, token)| token == "unsafe" || token == "unsafe_code")
            .map(|(line, _)| *line)
            .collect();
        if let Some(line) = lines.first().filter(|_| !listed) {
            found.push(format!("{path}:{line}: {} times", lines.len()));
        }
        unused.retain(|file| *file != path || lines.is_empty());
    }
    found.extend(unused.iter().map(|file| format!("{file} has none: take it off the list")));
    report("unsafe code is in few files, and those are listed", &found);
}

// ---- leftovers

#[test]
fn nothing_is_left_over() {
    // In parts, so that this file does not offend.
    let macros = [concat!("to", "do!"), concat!("unimpl", "emented!"), concat!("db", "g!")];
    let words = [
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("TO", "DO"),
        concat!("for", " now"),
        concat!("st", "ub"),
    ];
    let mut found = Vec::new();
    let mut unused = LEFT_OVER.to_vec();
    for (path, text) in files() {
        let checked = [".rs", ".toml", ".md", ".yml", ".sh"].iter().any(|end| path.ends_with(end))
            || text.starts_with("#!")
            || path.ends_with("Makefile");
        if !checked {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let hit = macros
                .iter()
                .find(|m| line.contains(*m))
                .or_else(|| words.iter().find(|w| has_word(line, w)));
            if let Some(hit) = hit {
                let entry = (path.as_str(), *hit);
                if !LEFT_OVER.contains(&entry) {
                    found.push(format!("{path}:{}: {hit}", i + 1));
                }
                unused.retain(|listed| *listed != entry);
            }
        }
    }
    found.extend(unused.iter().map(|(file, word)| format!("{file} has no '{word}': take it off the list")));
    report("work is finished before it is committed", &found);
}

/// Whether `line` holds `word` (or words), not as a part of another; "now and then" is another. Words in capitals
/// count in capitals only.
fn has_word(line: &str, word: &str) -> bool {
    let line = if word.chars().any(char::is_lowercase) { line.to_lowercase() } else { line.to_owned() };
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let apart = ![before, after].into_iter().flatten().any(char::is_alphanumeric);
        apart && !line[at + word.len()..].starts_with(" and then")
    })
}

// ---- sizes

#[test]
fn modules_are_short() {
    let mut found = Vec::new();
    let mut unused = LONG_MODULES.to_vec();
    for (path, text) in rust_files() {
        let lines = text.lines().count();
        let allowed =
            LONG_MODULES.iter().find(|(file, _)| *file == path).map_or(MODULE_LINES, |(_, lines)| *lines);
        if lines > allowed {
            found.push(format!("{path}: {lines} lines"));
        }
        unused.retain(|(file, _)| *file != path || lines <= MODULE_LINES);
    }
    found.extend(unused.iter().map(|(file, _)| format!("{file} is short now: take it off the list")));
    report(&format!("a module has at most {MODULE_LINES} lines"), &found);
}

#[test]
fn functions_are_short() {
    let mut found = Vec::new();
    let mut unused = LONG_FUNCTIONS.to_vec();
    for (path, text) in rust_files() {
        for (name, line, lines) in functions(&code_of(&text)) {
            if lines <= FUNCTION_LINES {
                continue;
            }
            if !LONG_FUNCTIONS.contains(&(path.as_str(), name.as_str())) {
                found.push(format!("{path}:{line}: {name}: {lines} lines"));
            }
            unused.retain(|entry| *entry != (path.as_str(), name.as_str()));
        }
    }
    found.extend(
        unused.iter().map(|(file, name)| format!("{file}: {name} is short or gone: take it off the list")),
    );
    report(&format!("a function has at most {FUNCTION_LINES} lines"), &found);
}

#[test]
fn lines_are_short() {
    let mut found = Vec::new();
    let mut unused = LONG_LINES.to_vec();
    for (path, text) in rust_files() {
        let long: Vec<_> = text
            .lines()
            .enumerate()
            .filter(|(_, line)| line.chars().count() > COLUMNS)
            .map(|(i, _)| i + 1)
            .collect();
        let allowed = LONG_LINES.iter().find(|(file, _)| *file == path).map_or(0, |(_, count)| *count);
        if long.len() > allowed {
            found.push(format!("{path}: {} lines, allowed {allowed}: {long:?}", long.len()));
        }
        unused.retain(|(file, _)| *file != path || long.is_empty());
    }
    found.extend(unused.iter().map(|(file, _)| format!("{file} has none: take it off the list")));
    report(&format!("a line has at most {COLUMNS} columns"), &found);
}

#[test]
fn there_are_no_tabs() {
    let mut found = Vec::new();
    for (path, text) in files() {
        let checked = [".rs", ".toml", ".md", ".yml"].iter().any(|end| path.ends_with(end));
        for (i, _) in text.lines().enumerate().filter(|(_, line)| checked && line.contains('\t')) {
            found.push(format!("{path}:{}", i + 1));
        }
    }
    report("indentation is spaces", &found);
}

// ---- documents

/// Targets of Markdown links, without anchors.
fn links(text: &str) -> Vec<String> {
    let target = |part: &str| part.split([')', '#', ' ']).next().unwrap_or_default().to_owned();
    text.split("](").skip(1).map(target).collect()
}

#[test]
fn documents_can_be_found() {
    let files = files();
    let indexes: Vec<_> = ["README.md", "docs/README.md", "docs/index.md"]
        .into_iter()
        .filter(|path| files.contains_key(*path))
        .collect();
    if indexes.is_empty() {
        println!("SKIPPED: there is no README and no index yet");
        return;
    }
    let mut linked: Vec<String> = Vec::new();
    for index in &indexes {
        let dir = index.rsplit_once('/').map_or(String::new(), |(dir, _)| format!("{dir}/"));
        linked.push((*index).to_owned());
        linked.extend(links(&files[*index]).iter().map(|to| format!("{dir}{}", to.trim_start_matches("./"))));
    }
    let is_document = |path: &&String| {
        path.strip_prefix("docs/").is_some_and(|name| name.ends_with(".md") && !name.contains('/'))
    };
    let missing: Vec<String> =
        files.keys().filter(is_document).filter(|path| !linked.contains(path)).cloned().collect();
    report(&format!("every docs/*.md is linked from one of {indexes:?}"), &missing);
}

// ---- golden files

#[test]
fn every_structure_has_golden_bytes() {
    let files = files();
    let mut found = Vec::new();
    let mut unused = GOLDEN.to_vec();
    for (path, text) in files.iter().filter(|(path, _)| path.starts_with("driver/src/format/")) {
        if !path.ends_with(".rs") {
            continue;
        }
        let tokens = tokens(&code_of(text));
        for (i, window) in tokens.windows(2).enumerate().filter(|(_, w)| w[0].1 == "struct") {
            let before: Vec<&str> = tokens[..i].iter().rev().take(9).map(|t| t.1.as_str()).collect();
            if !before.windows(3).any(|w| w == ["C", "(", "repr"]) {
                continue;
            }
            let name = &window[1].1;
            let Some((_, golden)) = GOLDEN.iter().find(|(structure, _)| structure == name) else {
                found.push(format!("{path}:{}: {name} has no golden file in the list", window[1].0));
                continue;
            };
            unused.retain(|(structure, _)| structure != name);
            let golden = format!("driver/src/format/golden/{golden}.hex");
            if files.get(&golden).is_none_or(|text| !text.starts_with("length ")) {
                found.push(format!("{name}: {golden} is missing"));
            }
        }
    }
    found.extend(unused.iter().map(|(name, _)| format!("{name} is gone: take it off the list")));
    report("the bytes of every structure on disk are pinned", &found);
}

#[test]
fn use_trees_are_followed() {
    let code =
        "use crate::{a::{B, c::D}, e}; let x = crate::f::g::<H>(); use super::super::i::J; use super::k;";
    let found: Vec<String> =
        uses("driver/src/stage/core.rs", &tokens(code)).into_iter().map(|u| u.1).collect();
    assert_eq!(found, ["a::B", "a::c::D", "e", "f::g", "i::J"]);
    let (kept, modules) =
        without_tests("#[cfg(test)] mod tests; #[cfg(test)] mod t { x } y #[cfg(test)] use z; w");
    let kept: Vec<String> = kept.into_iter().map(|t| t.1).collect();
    assert_eq!((kept, modules), (vec!["y".to_owned(), "w".to_owned()], vec!["tests".to_owned()]));
}
