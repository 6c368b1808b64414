//! Notes of measurements, as the programs print them: one JSON object a line.

use std::io::Write as _;

use serde_json::{Value, json};

/// What was measured of one way to do something, once or several times.
#[derive(Clone, Debug, PartialEq)]
pub struct Note {
    /// Group of scenarios that were measured together.
    pub stand: String,
    /// What was done.
    pub scenario: String,
    /// By whom.
    pub who: String,
    /// Tidegate's name in this scenario.
    pub ours: String,
    /// What of it was measured.
    pub measure: String,
    /// In what.
    pub unit: String,
    /// Whether less is better.
    pub less_is_better: bool,
    /// What came out, run by run.
    pub values: Vec<f64>,
}

impl Note {
    /// A note on a scenario of Tidegate alone.
    #[must_use]
    pub fn alone(stand: &str, scenario: &str, measure: &str, unit: &str, values: Vec<f64>) -> Note {
        Note::of(stand, scenario, "tidegate", measure, unit, values)
    }

    /// A note on a scenario in which others take part.
    #[must_use]
    pub fn of(stand: &str, scenario: &str, who: &str, measure: &str, unit: &str, values: Vec<f64>) -> Note {
        Note {
            stand: stand.into(),
            scenario: scenario.into(),
            who: who.into(),
            ours: "tidegate".into(),
            measure: measure.into(),
            unit: unit.into(),
            less_is_better: measure != "rate" && measure != "throughput",
            values,
        }
    }

    /// Prints it.
    pub fn print(&self) {
        let better = if self.less_is_better { "less" } else { "more" };
        println!(
            "{}",
            json!({
                "stand": self.stand, "scenario": self.scenario, "who": self.who, "ours": self.ours,
                "measure": self.measure, "unit": self.unit, "better": better, "values": self.values,
            })
        );
        let _ = std::io::stdout().flush();
    }

    /// The note in a line; `None` if there is none.
    #[must_use]
    pub fn parse(line: &str) -> Option<Note> {
        let value: Value = serde_json::from_str(line).ok()?;
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let values = match value["value"].as_f64() {
            Some(one) => vec![one],
            None => value["values"].as_array()?.iter().filter_map(Value::as_f64).collect(),
        };
        Some(Note {
            stand: text("stand")?,
            scenario: text("scenario")?,
            who: text("who")?,
            ours: text("ours")?,
            measure: text("measure")?,
            unit: text("unit")?,
            less_is_better: value["better"] == "less",
            values,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_of_the_test_machine_is_a_note() {
        let line = r#"{"stand": "fast", "scenario": "4K", "who": "rublk null", "ours": "tidegate", "measure": "p99",
            "unit": "us", "better": "less", "round": 2, "value": 7.5}"#;
        let note = Note::parse(&line.replace('\n', " ")).unwrap();
        assert_eq!((note.values, note.less_is_better), (vec![7.5], true));
        assert_eq!(Note::parse("building"), None);
    }
}
