//! Plots of the ratios, readable on light and dark pages.

use std::fmt::Write as _;

use crate::row::Row;

const LEFT: f64 = 470.0;
const OCTAVE: f64 = 46.0;
/// Ratios beyond this power of two are drawn at the border.
const OCTAVES: f64 = 4.5;
const LINE: usize = 20;

/// How much better Tidegate is than this row; `None` if it is not compared.
#[must_use]
pub fn advantage(row: &Row) -> Option<f64> {
    let ratio = row.ratio.filter(|ratio| *ratio > 0.0)?;
    Some(if row.less_is_better { 1.0 / ratio } else { ratio })
}

/// Bars of how much better Tidegate is than each peer, on a scale on which twice and half are equally far from 1.
#[must_use]
pub fn svg(title: &str, rows: &[&Row]) -> String {
    let bars: Vec<(&Row, f64)> = rows.iter().filter_map(|row| Some((*row, advantage(row)?))).collect();
    let middle = LEFT + OCTAVES * OCTAVE;
    let headings = bars.chunk_by(|a, b| a.0.scenario == b.0.scenario).count();
    let height = 60 + LINE * (bars.len() + headings);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<style>text{{fill:#222}}.less{{fill:#c05a2a}}.more{{fill:#2a78b8}}.grid{{stroke:#999;opacity:.4}}\
         .one{{stroke:#888}}@media(prefers-color-scheme:dark){{text{{fill:#ddd}}.less{{fill:#e8925f}}.more{{fill:#5aa9e6}}}}\
         </style>\n<text x=\"10\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    );
    for power in -4..=4 {
        let x = middle + f64::from(power) * OCTAVE;
        let label = if power < 0 { format!("1/{}", 1 << -power) } else { (1 << power).to_string() };
        let class = if power == 0 { "one" } else { "grid" };
        let _ = writeln!(
            out,
            "<line class=\"{class}\" x1=\"{x:.0}\" y1=\"48\" x2=\"{x:.0}\" y2=\"{height}\"/>\
             <text x=\"{x:.0}\" y=\"42\" text-anchor=\"middle\">{label}</text>"
        );
    }
    let mut y = 50;
    for group in bars.chunk_by(|a, b| a.0.scenario == b.0.scenario) {
        let _ = writeln!(
            out,
            "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{}</text>",
            y + 15,
            escaped(&group[0].0.scenario)
        );
        y += LINE;
        for (row, advantage) in group {
            bar(&mut out, row, *advantage, middle, y);
            y += LINE;
        }
    }
    out.push_str("</svg>\n");
    out
}

fn bar(out: &mut String, row: &Row, advantage: f64, middle: f64, y: usize) {
    let length = advantage.log2().clamp(-OCTAVES, OCTAVES) * OCTAVE;
    let (x, class) = if length < 0.0 { (middle + length, "less") } else { (middle, "more") };
    let end = middle + OCTAVES * OCTAVE + 12.0;
    let what = if ["rate", "throughput"].contains(&row.measure.as_str()) { "" } else { row.measure.as_str() };
    let name = if what.is_empty() { row.who.clone() } else { format!("{}, {what}", row.who) };
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
         <rect class=\"{class}\" x=\"{x:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>\
         <text x=\"{end:.0}\" y=\"{}\">{advantage:.2}</text>",
        LEFT - 12.0,
        y + 14,
        escaped(&name),
        y + 3,
        length.abs().max(1.0),
        LINE - 6,
        y + 14
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::note::Note;
    use crate::row::rows_of;

    #[test]
    fn less_time_is_an_advantage() {
        let notes = [
            Note::of("s", "a", "tidegate", "p99", "us", vec![5.0]),
            Note::of("s", "a", "x < y", "p99", "us", vec![20.0]),
        ];
        let rows = rows_of(&notes);
        assert_eq!(advantage(&rows[1]), Some(4.0));
        let picture = svg("t", &rows.iter().collect::<Vec<_>>());
        assert!(picture.contains("x &lt; y") && picture.contains(">4.00<"), "{picture}");
    }
}
