//! Results: what all runs of one measurement came to. Kept in a CSV file, where a later run replaces the scenarios it measured.

use crate::note::Note;

/// First line of the file.
pub const HEADER: &str =
    "stand,scenario,who,measure,unit,better,median,lowest,highest,runs,peer,ratio,measured";

/// One line of the file. `ratio` is that of Tidegate's median to this one's; `peer` is Tidegate's name in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Group of scenarios that were measured together.
    pub stand: String,
    /// What was done.
    pub scenario: String,
    /// By whom.
    pub who: String,
    /// What of it was measured.
    pub measure: String,
    /// In what.
    pub unit: String,
    /// Whether less is better.
    pub less_is_better: bool,
    /// Median, lowest and highest value.
    pub values: [f64; 3],
    /// Number of values.
    pub runs: usize,
    /// With whom of Tidegate it is compared; empty for that one itself.
    pub peer: String,
    /// Tidegate's median divided by this one.
    pub ratio: Option<f64>,
    /// When, of which version, and how.
    pub measured: String,
}

impl Row {
    fn key(&self) -> (&str, &str) {
        (&self.stand, &self.scenario)
    }

    fn to_line(&self) -> String {
        let [median, lowest, highest] = self.values.map(|value| format!("{value:.3}"));
        let fields = [
            self.stand.clone(),
            self.scenario.clone(),
            self.who.clone(),
            self.measure.clone(),
            self.unit.clone(),
            if self.less_is_better { "less" } else { "more" }.to_owned(),
            median,
            lowest,
            highest,
            self.runs.to_string(),
            self.peer.clone(),
            self.ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
            self.measured.clone(),
        ];
        fields.map(|field| quoted(&field)).join(",")
    }

    fn parse(line: &str) -> Option<Row> {
        let mut fields = split(line);
        // Older files do not say when.
        fields.resize(fields.len().max(13), String::new());
        let fields: [String; 13] = fields.try_into().ok()?;
        let [
            stand,
            scenario,
            who,
            measure,
            unit,
            better,
            median,
            lowest,
            highest,
            runs,
            peer,
            ratio,
            measured,
        ] = fields;
        Some(Row {
            stand,
            scenario,
            who,
            measure,
            unit,
            less_is_better: better == "less",
            values: [median.parse().ok()?, lowest.parse().ok()?, highest.parse().ok()?],
            runs: runs.parse().ok()?,
            peer,
            ratio: ratio.parse().ok(),
            measured,
        })
    }
}

fn quoted(field: &str) -> String {
    if field.contains([',', '"']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_owned() }
}

fn split(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut inside = false;
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        let field = fields.last_mut().expect("there is one always");
        match letter {
            '"' if inside && letters.peek() == Some(&'"') => field.extend(letters.next()),
            '"' => inside = !inside,
            ',' if !inside => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

/// Rows of notes, in the order in which they first appear. `measured` says when, of which version, and how.
#[must_use]
pub fn rows_of(notes: &[Note], measured: &str) -> Vec<Row> {
    let mut merged: Vec<Note> = Vec::new();
    for note in notes {
        let same = |other: &&mut Note| {
            let key = |n: &Note| (n.stand.clone(), n.scenario.clone(), n.who.clone(), n.measure.clone());
            key(other) == key(note)
        };
        match merged.iter_mut().find(same) {
            Some(known) => known.values.extend(&note.values),
            None => merged.push(note.clone()),
        }
    }
    merged.retain(|note| !note.values.is_empty());
    let median = |note: &Note| {
        let mut sorted = note.values.clone();
        sorted.sort_by(f64::total_cmp);
        let (last, middle) = (sorted.len() - 1, sorted.len() / 2);
        [f64::midpoint(sorted[last / 2], sorted[middle]), sorted[0], sorted[last]]
    };
    let row = |note: &Note| {
        let ours = merged.iter().find(|other| {
            other.who == note.ours
                && (&other.stand, &other.scenario, &other.measure)
                    == (&note.stand, &note.scenario, &note.measure)
        });
        let values = median(note);
        let ours = ours.filter(|ours| ours.who != note.who && values[0] > 0.0);
        Row {
            stand: note.stand.clone(),
            scenario: note.scenario.clone(),
            who: note.who.clone(),
            measure: note.measure.clone(),
            unit: note.unit.clone(),
            less_is_better: note.less_is_better,
            values,
            runs: note.values.len(),
            peer: ours.map_or_else(String::new, |ours| ours.who.clone()),
            ratio: ours.map(|ours| median(ours)[0] / values[0]),
            measured: measured.to_owned(),
        }
    };
    merged.iter().map(row).collect()
}

/// `old` with the scenarios of `new` replaced where they were, and what was not there at the end of its stand.
#[must_use]
pub fn merged(old: Vec<Row>, new: &[Row]) -> Vec<Row> {
    let mut all: Vec<Row> = Vec::new();
    let mut placed: Vec<(&str, &str)> = Vec::new();
    for row in old {
        let Some(first) = new.iter().find(|n| n.key() == row.key()) else {
            all.push(row);
            continue;
        };
        if !placed.contains(&first.key()) {
            placed.push(first.key());
            all.extend(new.iter().filter(|n| n.key() == first.key()).cloned());
        }
    }
    for row in new.iter().filter(|row| !placed.contains(&row.key())) {
        let after = all.iter().rposition(|other| other.stand == row.stand).map_or(all.len(), |at| at + 1);
        all.insert(after, row.clone());
    }
    all
}

/// The file's content.
#[must_use]
pub fn to_csv(rows: &[Row]) -> String {
    let mut out = format!("{HEADER}\n");
    for row in rows {
        out.push_str(&row.to_line());
        out.push('\n');
    }
    out
}

/// The rows in a file; lines that are none are an error, with their number.
pub fn from_csv(text: &str) -> Result<Vec<Row>, String> {
    let lines = text.lines().enumerate().skip(1).filter(|(_, line)| !line.is_empty());
    lines.map(|(at, line)| Row::parse(line).ok_or_else(|| format!("line {} is no result", at + 1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(scenario: &str, who: &str, values: &[f64]) -> Note {
        Note::of("fast", scenario, who, "rate", "IOPS", values.to_vec())
    }

    #[test]
    fn rounds_come_together_and_are_compared() {
        let notes = [
            note("a, \"b\"", "tidegate", &[3.0]),
            note("a, \"b\"", "loop", &[2.0, 4.0]),
            note("a, \"b\"", "tidegate", &[1.0, 2.0]),
        ];
        let rows = rows_of(&notes, "now, 1 s");
        assert_eq!(rows[0].values, [2.0, 1.0, 3.0]);
        assert_eq!((rows[0].ratio, rows[1].ratio), (None, Some(2.0 / 3.0)));
        assert_eq!(to_csv(&from_csv(&to_csv(&rows)).unwrap()), to_csv(&rows));
        assert!(from_csv("header\nrubbish").is_err());
    }

    #[test]
    fn a_partial_run_replaces_its_scenarios_only() {
        let old = [note("a", "tidegate", &[1.0]), note("a", "gone", &[1.0]), note("b", "tidegate", &[2.0])];
        let old = rows_of(&old, "before");
        let new = rows_of(&[note("c", "tidegate", &[9.0]), note("a", "tidegate", &[5.0])], "now");
        let all = merged(old, &new);
        let short: Vec<_> = all.iter().map(|row| (row.scenario.as_str(), row.values[0])).collect();
        assert_eq!(short, [("a", 5.0), ("b", 2.0), ("c", 9.0)]);
    }
}
