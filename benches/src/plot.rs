//! Plots of the ratios, readable on light and dark pages.

use std::fmt::Write as _;

use crate::row::Row;

const LEFT: f64 = 470.0;
const OCTAVE: f64 = 46.0;
/// Ratios beyond this power of two are drawn at the border.
const OCTAVES: f64 = 4.5;
const LINE: usize = 20;
/// Where the bars begin.
const MIDDLE: f64 = LEFT + OCTAVES * OCTAVE;

/// How much better Tidegate is than this row; `None` if it is not compared.
#[must_use]
pub fn advantage(row: &Row) -> Option<f64> {
    let ratio = row.ratio.filter(|ratio| *ratio > 0.0)?;
    Some(if row.less_is_better { 1.0 / ratio } else { ratio })
}

/// Bars of how much better Tidegate is than each peer, on a scale on which twice and half are equally far from 1. Stands have a
/// scale each.
#[must_use]
pub fn svg(title: &str, rows: &[&Row]) -> String {
    let bars: Vec<(&Row, f64)> = rows.iter().filter_map(|row| Some((*row, advantage(row)?))).collect();
    let scenarios = bars.chunk_by(|a, b| a.0.scenario == b.0.scenario).count();
    let stands: Vec<&[(&Row, f64)]> = bars.chunk_by(|a, b| a.0.stand == b.0.stand).collect();
    let height = 56 + LINE * (bars.len() + scenarios + 3 * stands.len());
    let title = escaped(title);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"{height}\" viewBox=\"0 0 960 {height}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>{title}</title>\n\
         <style>.page{{fill:#fff}}text{{fill:#222}}.less{{fill:#c05a2a}}.more{{fill:#2a78b8}}.grid{{stroke:#999;opacity:.4}}\
         .one{{stroke:#888}}@media(prefers-color-scheme:dark){{.page{{fill:#16191d}}text{{fill:#ddd}}.less{{fill:#e8925f}}\
         .more{{fill:#5aa9e6}}}}</style>\n<rect class=\"page\" width=\"960\" height=\"{height}\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{title}</text>\n\
         <text x=\"10\" y=\"38\">Scale: times better, each line twice the one before; bars end at \
         1/22 and 22. To the right (blue) Tidegate is better, to the left the other.</text>\n"
    );
    let mut y = 50;
    for stand in stands {
        let scenarios = stand.chunk_by(|a, b| a.0.scenario == b.0.scenario);
        let end = y + LINE * (2 + stand.len() + scenarios.clone().count());
        scale(&mut out, &stand[0].0.stand, y, end);
        y += 2 * LINE;
        for group in scenarios {
            let name = escaped(&group[0].0.scenario);
            let _ = writeln!(out, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{name}</text>", y + 15);
            y += LINE;
            for (row, advantage) in group {
                bar(&mut out, row, *advantage, y);
                y += LINE;
            }
        }
        y += LINE;
    }
    out.push_str("</svg>\n");
    out
}

/// A stand's name, and the scale that its bars have from `y` to `end`.
fn scale(out: &mut String, stand: &str, y: usize, end: usize) {
    let (label_y, name) = (y + 32, escaped(stand));
    let _ =
        writeln!(out, "<text x=\"10\" y=\"{}\" font-size=\"14\" font-weight=\"bold\">{name}</text>", y + 16);
    for power in -4..=4 {
        let x = MIDDLE + f64::from(power) * OCTAVE;
        let label = if power < 0 { format!("1/{}", 1 << -power) } else { (1 << power).to_string() };
        let class = if power == 0 { "one" } else { "grid" };
        let _ = writeln!(
            out,
            "<line class=\"{class}\" x1=\"{x:.0}\" y1=\"{}\" x2=\"{x:.0}\" y2=\"{end}\"/>\
             <text x=\"{x:.0}\" y=\"{label_y}\" text-anchor=\"middle\">{label}</text>",
            label_y + 4
        );
    }
}

fn bar(out: &mut String, row: &Row, advantage: f64, y: usize) {
    let length = advantage.log2().clamp(-OCTAVES, OCTAVES) * OCTAVE;
    let (x, class) = if length < 0.0 { (MIDDLE + length, "less") } else { (MIDDLE, "more") };
    let end = MIDDLE + OCTAVES * OCTAVE + 12.0;
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
        let rows = rows_of(&notes, "now");
        assert_eq!(advantage(&rows[1]), Some(4.0));
        let picture = svg("t", &rows.iter().collect::<Vec<_>>());
        assert!(picture.contains("x &lt; y") && picture.contains(">4.00<"), "{picture}");
    }
}
