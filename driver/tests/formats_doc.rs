//! `docs/formats.md` is made of the headers of `src/format/*.rs`, so that the byte tables exist once.
//!
//! `TIDEGATE_UPDATE_DOCS=1 cargo test -p tidegate-driver --test formats_doc` writes it again.

use std::fs;
use std::path::{Path, PathBuf};

const INTRO: &str = "\
<!-- Made of the headers of driver/src/format/*.rs by driver/tests/formats_doc.rs. Change it there, then run
     TIDEGATE_UPDATE_DOCS=1 cargo test -p tidegate-driver --test formats_doc -->
";

fn format_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/format")
}

/// The lines of the `//!` header of a file.
fn header(file: &str) -> Vec<String> {
    let path = format_dir().join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
    lines.map(|line| plain(line.strip_prefix(' ').unwrap_or(line))).collect()
}

/// A line without links into the code: [`crate::a::b`] becomes `a::b`.
fn plain(line: &str) -> String {
    line.replace("[`crate::", "`").replace("[`", "`").replace("`]", "`")
}

/// Files in the order of the table in `mod.rs`; the map of the device, which it names below the table, comes first.
fn files() -> Vec<String> {
    let mut files = vec!["geometry.rs".to_owned()];
    for row in header("mod.rs").iter().filter(|line| line.starts_with("| ")) {
        let cell = row.split('|').nth(2).unwrap_or_default().trim();
        if let Some(file) = cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`')) {
            files.push(file.to_owned());
        }
    }
    files
}

/// What a header's first line names, up to its colon or full stop.
fn title(first: &str) -> &str {
    let end = first.find(": ").unwrap_or(first.len());
    first[..end].trim_end_matches('.')
}

fn document() -> String {
    let mut text = format!("# Formats\n\n{INTRO}");
    let mut section = |lines: &[String]| {
        text.push('\n');
        for line in lines {
            text.push_str(line.trim_end());
            text.push('\n');
        }
    };
    section(&fenced(header("mod.rs")));
    for file in files() {
        let lines = header(&file);
        section(&[
            format!("## {}", title(&lines[0])),
            String::new(),
            format!("Source: `driver/src/format/{file}`"),
        ]);
        section(&fenced(lines));
    }
    text
}

/// Fences stand alone, between blank lines.
fn fenced(lines: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut inside = false;
    for line in lines {
        let fence = line.starts_with("```");
        if fence && !inside && out.last().is_some_and(|last| !last.is_empty()) {
            out.push(String::new());
        }
        if !fence && !inside && !line.is_empty() && out.last().is_some_and(|last| last == "```") {
            out.push(String::new());
        }
        inside ^= fence;
        out.push(line);
    }
    assert!(!inside, "a fence is not closed");
    out
}

#[test]
fn every_file_of_the_format_is_in_the_table() {
    let named = files();
    let mut missing = Vec::new();
    for entry in fs::read_dir(format_dir()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_code = name.ends_with(".rs") && name != "mod.rs" && name != "tests.rs";
        if is_code && !named.contains(&name) {
            missing.push(name);
        }
    }
    assert!(missing.is_empty(), "not in the table of format/mod.rs: {missing:?}");
}

#[test]
fn the_document_is_what_the_headers_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats.md");
    let expected = document();
    if std::env::var_os("TIDEGATE_UPDATE_DOCS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let line = found.lines().zip(expected.lines()).position(|(a, b)| a != b);
    assert!(
        found == expected,
        "docs/formats.md differs from the headers of driver/src/format (first in line {:?}); run \
         TIDEGATE_UPDATE_DOCS=1 cargo test -p tidegate-driver --test formats_doc",
        line.map(|line| line + 1)
    );
}
