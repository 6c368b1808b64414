//! The tables of `docs/benchmarks.md`.

use std::fmt::Write as _;

use crate::row::Row;

const BEGIN: &str = "<!-- measured: begin -->";
const END: &str = "<!-- measured: end -->";
/// The stand whose table has a line for each scenario. It is in no plot either.
pub const MATRIX: &str = "wide";
/// Measures that share a column.
const LATENCIES: [&str; 3] = ["p50", "p99", "p99.9"];

/// A number as short as its size allows.
#[must_use]
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The page with new tables between its markers; an error if they are missing.
pub fn with_tables(page: &str, rows: &[Row]) -> Result<String, String> {
    let (Some(begin), Some(end)) = (page.find(BEGIN), page.find(END)) else {
        return Err(format!("the page has no markers '{BEGIN}' and '{END}'"));
    };
    let mut stands: Vec<&str> = Vec::new();
    for row in rows {
        if !stands.contains(&row.stand.as_str()) {
            stands.push(&row.stand);
        }
    }
    let mut tables = String::new();
    for stand in stands {
        if stand == MATRIX { matrix(&mut tables, stand, rows) } else { table(&mut tables, stand, rows) }
    }
    Ok(format!("{}{BEGIN}\n\n{tables}{END}{}", &page[..begin], &page[end + END.len()..]))
}

/// When a stand was measured, of which version and how; scenarios that were measured again are named.
fn measured(rows: &[&Row]) -> String {
    let mut known: Vec<(&str, Vec<&str>)> = Vec::new();
    for row in rows {
        let at = known.iter().position(|(measured, _)| *measured == row.measured);
        let at = at.unwrap_or_else(|| {
            known.push((&row.measured, Vec::new()));
            known.len() - 1
        });
        if !known[at].1.contains(&row.scenario.as_str()) {
            known[at].1.push(&row.scenario);
        }
    }
    let said = |(at, (measured, scenarios)): (usize, &(&str, Vec<&str>))| match at {
        0 => (*measured).to_owned(),
        _ => format!("{measured}: {}", scenarios.join("; ")),
    };
    format!("Measured {}.", known.iter().enumerate().map(said).collect::<Vec<_>>().join(". Measured "))
}

/// A stand of very many scenarios: a line for each, medians only, with what Tidegate is compared with and the ratio behind it.
fn matrix(out: &mut String, stand: &str, rows: &[Row]) {
    let of_stand: Vec<&Row> = rows.iter().filter(|row| row.stand == stand).collect();
    let mut names: Vec<&str> = Vec::new();
    for row in &of_stand {
        if !names.contains(&row.who.as_str()) {
            names.push(&row.who);
        }
    }
    let runs = of_stand.first().map_or(0, |row| row.runs);
    let _ = writeln!(
        out,
        "### {stand}\n\n{} Medians of {runs} runs; behind each peer Tidegate ÷ it.\n\n| what | {} | unit |",
        measured(&of_stand),
        names.join(" | ")
    );
    let _ = writeln!(out, "|---|{}---|", "--:|".repeat(names.len()));
    for same in of_stand.chunk_by(|a, b| a.scenario == b.scenario) {
        let _ = write!(out, "| {} |", same[0].scenario);
        for name in &names {
            let _ = match same.iter().find(|row| row.who == *name) {
                Some(Row { values, ratio: Some(ratio), .. }) => {
                    write!(out, " {} ({ratio:.2}) |", number(values[0]))
                }
                Some(row) => write!(out, " {} |", number(row.values[0])),
                None => write!(out, " |"),
            };
        }
        let _ = writeln!(out, " {} |", same[0].unit);
    }
    out.push('\n');
}

fn table(out: &mut String, stand: &str, rows: &[Row]) {
    let of_stand: Vec<&Row> = rows.iter().filter(|row| row.stand == stand).collect();
    let has_latencies = of_stand.iter().any(|row| LATENCIES.contains(&row.measure.as_str()));
    let (head, rule) = if has_latencies { (" p50 / p99 / p99.9 µs |", "--:|") } else { ("", "") };
    let _ = writeln!(
        out,
        "### {stand}\n\n{}\n\n| what | who | median | lowest … highest | runs | unit |{head} Tidegate ÷ it |\n\
         |---|---|--:|--:|--:|---|{rule}--:|",
        measured(&of_stand)
    );
    let mut before = "";
    for row in of_stand.iter().filter(|row| !LATENCIES.contains(&row.measure.as_str())) {
        let what = if row.scenario == before { "" } else { &row.scenario };
        before = &row.scenario;
        let measure = if ["rate", "throughput"].contains(&row.measure.as_str()) {
            String::new()
        } else {
            format!(", {}", row.measure)
        };
        let [median, lowest, highest] = row.values.map(number);
        let latencies =
            if has_latencies { format!(" {} |", latencies(row, &of_stand)) } else { String::new() };
        let ratio = row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let _ = writeln!(
            out,
            "| {what} | {}{measure} | {median} | {lowest} … {highest} | {} | {} |{latencies} {ratio} |",
            row.who, row.runs, row.unit
        );
    }
    out.push('\n');
}

/// The latencies that belong to a rate.
fn latencies(row: &Row, all: &[&Row]) -> String {
    if row.measure != "rate" && row.measure != "throughput" {
        return String::new();
    }
    let of = |measure: &&str| {
        let same = |other: &&&Row| {
            (&other.scenario, &other.who) == (&row.scenario, &row.who) && other.measure == **measure
        };
        all.iter().find(same).map(|found| number(found.values[0]))
    };
    LATENCIES.iter().filter_map(of).collect::<Vec<_>>().join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::note::Note;
    use crate::row::rows_of;

    #[test]
    fn the_wide_stand_has_a_line_for_each_scenario() {
        let notes = [
            Note::of("wide", "4K read qd1", "tidegate", "rate", "IOPS", vec![100.0]),
            Note::of("wide", "4K read qd1", "null", "rate", "IOPS", vec![50.0]),
            Note::of("wide", "1M read qd1", "tidegate", "throughput", "MB/s", vec![5.0]),
        ];
        let new = with_tables(&format!("{BEGIN}\n{END}"), &rows_of(&notes, "now")).unwrap();
        assert!(new.contains("| what | tidegate | null | unit |\n|---|--:|--:|---|\n"), "{new}");
        assert!(
            new.contains("| 4K read qd1 | 100 | 50.0 (2.00) | IOPS |\n| 1M read qd1 | 5.00 | | MB/s |\n"),
            "{new}"
        );
    }

    #[test]
    fn tables_go_between_the_markers() {
        let notes = [
            Note::of("slow", "fsync", "tidegate", "rate", "IOPS", vec![1000.0]),
            Note::of("slow", "fsync", "tidegate", "p99", "us", vec![12.34]),
            Note::of("slow", "fsync", "bcache", "rate", "IOPS", vec![500.0]),
        ];
        let page = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        let mut rows = rows_of(&notes, "now, of 1 s");
        let again = Note::of("slow", "flush", "tidegate", "rate", "IOPS", vec![1.0]);
        rows.extend(rows_of(&[again], "later"));
        let new = with_tables(&page, &rows).unwrap();
        assert!(new.contains("### slow\n\nMeasured now, of 1 s. Measured later: flush.\n\n| what"), "{new}");
        assert!(new.starts_with("before\n") && new.ends_with("\nafter\n") && !new.contains("old"), "{new}");
        assert!(new.contains("| fsync | tidegate | 1000 | 1000 … 1000 | 1 | IOPS | 12.3 |  |"), "{new}");
        assert!(new.contains("|  | bcache | 500 | 500 … 500 | 1 | IOPS |  | 2.00 |"), "{new}");
        assert_eq!(with_tables(&new, &rows).unwrap(), new, "and again the same");
        assert!(with_tables("nothing", &[]).is_err());
    }
}
