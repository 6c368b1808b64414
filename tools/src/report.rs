//! What people and scripts see on standard output.

use std::io::{IsTerminal, Write};

use serde::Serialize;
use tidegate_driver::base::{Error, Result};

/// Writes text. A reader that went away (`| head`) is not an error; whether there still is one.
pub fn print(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::io("cannot write the output", e)),
    }
}

/// Writes a line.
pub fn line(text: impl AsRef<str>) -> Result<bool> {
    print(&format!("{}\n", text.as_ref()))
}

/// Writes a value as JSON.
pub fn json(value: &impl Serialize) -> Result<bool> {
    let text =
        serde_json::to_string_pretty(value).map_err(|e| Error::io("cannot encode the output", e.into()))?;
    line(text)
}

/// Tells people, not scripts, what is going on: on standard error, if that is a terminal.
pub fn note(text: impl AsRef<str>) {
    if std::io::stderr().is_terminal() {
        let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
    }
}

/// One line on standard error that is written over again and again; silent unless that is a terminal.
#[derive(Debug)]
pub struct Progress {
    shown: bool,
    terminal: bool,
}

impl Progress {
    /// Nothing shown yet.
    pub fn new() -> Progress {
        Progress { shown: false, terminal: std::io::stderr().is_terminal() }
    }

    /// Whether anybody would see it.
    pub fn is_visible(&self) -> bool {
        self.terminal
    }

    /// Replaces what is shown.
    pub fn show(&mut self, text: &str) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
            self.shown = true;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// Rows in columns, the first row being the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut out = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = [
            vec!["NAME".into(), "SIZE".into()],
            vec!["a".into(), "1 GiB".into()],
            vec!["longer".into(), "2".into()],
        ];
        assert_eq!(table(&rows), "NAME    SIZE\na       1 GiB\nlonger  2\n");
        assert_eq!(table(&[]), "");
    }
}
