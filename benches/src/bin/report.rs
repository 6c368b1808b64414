//! Turns notes of measurements into `docs/benchmarks.csv`, the tables of `docs/benchmarks.md` and plots beside them.
//!
//! Usage: report MEASURED KEPT.csv PAGE.md < notes      what was measured now replaces its scenarios in KEPT.csv; MEASURED
//! says when that was, of which version, and how

use std::io::Read as _;
use std::path::Path;

use tidegate_benches::note::Note;
use tidegate_benches::page::{MATRIX, with_tables};
use tidegate_benches::plot::svg;
use tidegate_benches::row::{Row, from_csv, merged, rows_of, to_csv};

/// Stands that need no kernel device; the others are those of the test machine.
const NATIVE: [&str; 5] = ["engine", "durable appends", "nbd", "counts", "flat cost"];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [measured, kept, page] = &args[..] else {
        eprintln!("usage: report MEASURED KEPT.csv PAGE.md < notes");
        std::process::exit(2);
    };
    if let Err(error) = report(measured, kept, page) {
        eprintln!("report: {error}");
        std::process::exit(1);
    }
}

fn report(measured: &str, kept: &str, page: &str) -> Result<(), String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|e| format!("cannot read standard input: {e}"))?;
    let notes: Vec<Note> = text.lines().filter_map(Note::parse).collect();
    let old = match std::fs::read_to_string(kept) {
        Ok(text) => from_csv(&text).map_err(|e| format!("{kept}: {e}"))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(format!("cannot read {kept}: {e}")),
    };
    let rows = merged(old, &rows_of(&notes, measured));
    let before = std::fs::read_to_string(page).map_err(|e| format!("cannot read {page}: {e}"))?;
    let after = with_tables(&before, &rows).map_err(|e| format!("{page}: {e}"))?;
    let native = |row: &&Row| NATIVE.contains(&row.stand.as_str());
    let here: Vec<&Row> = rows.iter().filter(native).collect();
    let there: Vec<&Row> = rows.iter().filter(|row| !native(row) && row.stand != MATRIX).collect();
    let beside = |name: &str| Path::new(page).with_file_name(name);
    let title = |where_: &str| {
        format!("How many times better Tidegate is than each other way, {where_} (medians; 1: equal)")
    };
    let files = [
        (Path::new(kept).to_owned(), to_csv(&rows)),
        (Path::new(page).to_owned(), after),
        (beside("benchmarks.svg"), svg(&title("test machine"), &there)),
        (beside("benchmarks-native.svg"), svg(&title("natively"), &here)),
    ];
    for (path, content) in files {
        std::fs::write(&path, content).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    }
    Ok(())
}
