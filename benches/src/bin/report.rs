//! Turns measurements into `docs/benchmarks.md` and its plots.
//!
//! Reads lines `group,name,unit,round,value` from standard input (lines of `native`, which are JSON, are put into a table
//! of their own), writes everything between the markers of the file named on the command line, and an SVG beside it.
//! In a group the first name is Tidegate, the second the peer it is compared with.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

const BEGIN: &str = "<!-- measured: begin -->";
const END: &str = "<!-- measured: end -->";

struct Series {
    group: String,
    name: String,
    unit: String,
    values: Vec<f64>,
}

impl Series {
    fn median(&self) -> f64 {
        self.values[self.values.len() / 2]
    }
}

fn main() {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: report FILE.md < measurements");
        std::process::exit(2);
    };
    let mut text = String::new();
    if let Err(error) = std::io::stdin().read_to_string(&mut text) {
        fail(&format!("cannot read standard input: {error}"));
    }
    let series = parse(&text);
    let page = std::fs::read_to_string(&path).unwrap_or_else(|e| fail(&format!("cannot read {path}: {e}")));
    let (Some(begin), Some(end)) = (page.find(BEGIN), page.find(END)) else {
        fail(&format!("{path} has no markers '{BEGIN}' and '{END}'"));
    };
    let measured =
        format!("{BEGIN}\n\n{}\n{}\n{}\n", table(&series), native_table(&text), durable_table(&text));
    let page = format!("{}{measured}{}", &page[..begin], &page[end..]);
    let plot = Path::new(&path).with_file_name("benchmarks.svg");
    let written = std::fs::write(&path, page).and_then(|()| std::fs::write(&plot, svg(&series)));
    if let Err(error) = written {
        fail(&format!("cannot write {path} or {}: {error}", plot.display()));
    }
}

fn fail(message: &str) -> ! {
    eprintln!("report: {message}");
    std::process::exit(1);
}

fn parse(text: &str) -> Vec<Series> {
    let mut order: Vec<(String, String, String)> = Vec::new();
    let mut values: BTreeMap<(String, String, String), Vec<f64>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('{')) {
        // Groups and names may hold commas; the last three fields do not.
        let fields: Vec<&str> = line.rsplitn(4, ',').collect();
        let [value, _round, unit, rest] = fields[..] else { continue };
        let Some(split) = rest.find(",tidegate").or_else(|| rest.rfind(',')) else { continue };
        let (group, name) = (&rest[..split], &rest[split + 1..]);
        let Ok(value) = value.parse() else { continue };
        let key = (group.to_owned(), name.to_owned(), unit.to_owned());
        if !order.contains(&key) {
            order.push(key.clone());
        }
        values.entry(key).or_default().push(value);
    }
    order
        .into_iter()
        .map(|key| {
            let mut values = values.remove(&key).unwrap_or_default();
            values.sort_by(f64::total_cmp);
            Series { group: key.0, name: key.1, unit: key.2, values }
        })
        .collect()
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn table(series: &[Series]) -> String {
    let mut out = String::from(
        "| what | who | median | lowest | highest | runs | unit | ratio to the peer |\n|---|---|--:|--:|--:|--:|---|--:|\n",
    );
    for one in series {
        let peer = series.iter().find(|s| s.group == one.group && s.name != one.name);
        let ratio = match peer {
            Some(peer) if one.name.starts_with("tidegate") => format!("{:.2}", one.median() / peer.median()),
            _ => String::new(),
        };
        let (low, high) = (one.values[0], one.values[one.values.len() - 1]);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {ratio} |",
            one.group,
            one.name,
            number(one.median()),
            number(low),
            number(high),
            one.values.len(),
            one.unit
        );
    }
    out
}

fn native_table(text: &str) -> String {
    let mut out = String::from(
        "| native, engine alone | median | lowest | highest | runs | unit |\n|---|--:|--:|--:|--:|---|\n",
    );
    for value in native(text).iter().filter(|value| durable_of(value).is_none()) {
        let field = |name: &str| number(value[name].as_f64().unwrap_or(f64::NAN));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} |",
            value["name"].as_str().unwrap_or("?"),
            field("median"),
            field("lowest"),
            field("highest"),
            value["runs"],
            value["unit"].as_str().unwrap_or("?")
        );
    }
    out
}

/// Measurements of `native` and `bytes`.
fn native(text: &str) -> Vec<serde_json::Value> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Of a measurement of durable appends: what was appended, by what, and which part of the latencies it is (none: the rate).
fn durable_of(value: &serde_json::Value) -> Option<(String, String, Option<String>)> {
    let name = value["name"].as_str()?.strip_prefix("durable ")?;
    let mut parts = name.split(", ");
    let case = format!("{}, {}", parts.next()?, parts.next()?);
    Some((case, parts.next()?.to_owned(), parts.next().map(str::to_owned)))
}

/// Appends through the byte door against what programs do without it.
fn durable_table(text: &str) -> String {
    let mut out = String::from(
        "| durable appends, native, one disk | by | records/s | lowest | highest | p50 µs | p99 µs | p99.9 µs | Tidegate is |\n\
         |---|---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let values = native(text);
    let all: Vec<_> = values.iter().filter_map(|value| Some((durable_of(value)?, value))).collect();
    let median = |case: &str, by: &str, part: Option<&str>| {
        let found = all.iter().find(|((c, b, p), _)| c == case && b == by && p.as_deref() == part)?;
        found.1["median"].as_f64()
    };
    for ((case, by, _), value) in all.iter().filter(|((_, _, part), _)| part.is_none()) {
        let field = |name: &str| number(value[name].as_f64().unwrap_or(f64::NAN));
        let latency = |part| median(case, by, Some(part)).map_or_else(String::new, number);
        let ours = median(case, "tidegate", None).unwrap_or(f64::NAN);
        let theirs = value["median"].as_f64().unwrap_or(f64::NAN);
        let ratio = if by == "tidegate" { String::new() } else { format!("{:.2} ×", ours / theirs) };
        let _ = writeln!(
            out,
            "| {case} | {by} | {} | {} | {} | {} | {} | {} | {ratio} |",
            field("median"),
            field("lowest"),
            field("highest"),
            latency("p50"),
            latency("p99"),
            latency("p99.9")
        );
    }
    out
}

/// Bars of the ratios to the peer; readable on light and dark pages.
fn svg(series: &[Series]) -> String {
    let bars: Vec<(String, f64)> = series
        .iter()
        .filter(|s| s.name.starts_with("tidegate"))
        .filter_map(|s| {
            let peer = series.iter().find(|p| p.group == s.group && p.name != s.name)?;
            Some((format!("{} ÷ {}", s.group, peer.name), s.median() / peer.median()))
        })
        .collect();
    let most = bars.iter().map(|bar| bar.1).fold(1.0, f64::max);
    let scale = 300.0 / most;
    let height = 40 + 34 * bars.len();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<style>text{{fill:#222}}.bar{{fill:#2a78b8}}.one{{stroke:#888}}\
         @media(prefers-color-scheme:dark){{text{{fill:#ddd}}.bar{{fill:#5aa9e6}}}}</style>\n\
         <text x=\"10\" y=\"20\" font-weight=\"bold\">Tidegate ÷ peer, medians of one boot (1 = equal)</text>\n"
    );
    for (i, (name, ratio)) in bars.iter().enumerate() {
        let y = 36 + 34 * i;
        let width = ratio * scale;
        let _ = writeln!(
            out,
            "<text x=\"10\" y=\"{}\">{name}</text><rect class=\"bar\" x=\"400\" y=\"{y}\" width=\"{width:.0}\" height=\"20\"/>\
             <text x=\"{:.0}\" y=\"{}\">{ratio:.2}</text>",
            y + 15,
            406.0 + width,
            y + 15
        );
    }
    let one = 400.0 + scale;
    let _ = writeln!(
        out,
        "<line class=\"one\" x1=\"{one:.0}\" y1=\"30\" x2=\"{one:.0}\" y2=\"{height}\"/>\n</svg>"
    );
    out
}
