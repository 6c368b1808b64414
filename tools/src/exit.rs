//! Exit codes: one table, which `--help` prints, scripts rely on, and the control protocol uses for its error names.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use tidegate_driver::base::{Error, ErrorKind};

/// Success.
pub const OK: u8 = 0;
/// `check`: damage was found.
pub const CHECK_DAMAGE: u8 = 1;
/// `check`: it could not be checked.
pub const CHECK_FAILED: u8 = 2;
/// Ended by a signal before anything was changed, as shells report it.
pub const INTERRUPTED: u8 = 130;

struct Row {
    kind: ErrorKind,
    /// Name on the control socket and in JSON.
    name: &'static str,
    code: u8,
    meaning: &'static str,
}

const fn row(kind: ErrorKind, name: &'static str, code: u8, meaning: &'static str) -> Row {
    Row { kind, name, code, meaning }
}

/// The table. Codes are stable: never renumber.
const TABLE: &[Row] = &[
    row(ErrorKind::Io, "io", 1, "a device or the system failed a request"),
    row(ErrorKind::Invalid, "invalid", 2, "bad arguments: size, path, name, option"),
    row(ErrorKind::NotFound, "not-found", 3, "no such volume, stage, file or device"),
    row(ErrorKind::Exists, "exists", 4, "the name or the place is taken"),
    row(ErrorKind::Busy, "busy", 5, "in use: mounted, open, attached, locked by another server"),
    row(ErrorKind::Permission, "permission", 6, "not permitted: run as root"),
    row(ErrorKind::Foreign, "foreign", 7, "holds other data; --force overrides"),
    row(
        ErrorKind::WrongDevice,
        "wrong-device",
        8,
        "not the device that belongs here: swapped, rolled back, shrunk",
    ),
    row(ErrorKind::NewerFormat, "newer-format", 9, "written by a newer version"),
    row(ErrorKind::Damaged, "damaged", 10, "damage that no crash explains"),
    row(ErrorKind::NoSpace, "no-space", 11, "no room"),
    row(
        ErrorKind::Unsupported,
        "unsupported",
        12,
        "the kernel or the machine lacks something (ublk module, io_uring)",
    ),
    row(ErrorKind::Lost, "lost", 13, "writes acknowledged from memory are gone (arena lost)"),
];

fn row_of(kind: ErrorKind) -> &'static Row {
    TABLE.iter().find(|row| row.kind == kind).unwrap_or(&TABLE[0])
}

/// Exit code of an error.
pub fn code_of(error: &Error) -> u8 {
    row_of(error.kind()).code
}

/// Name of an error's kind on the control socket.
pub fn name_of(kind: ErrorKind) -> &'static str {
    row_of(kind).name
}

/// Kind with this name; unknown names (of a newer server) are plain failures.
pub fn kind_named(name: &str) -> ErrorKind {
    TABLE.iter().find(|row| row.name == name).map_or(ErrorKind::Io, |row| row.kind)
}

/// Prints an error as people and scripts want it, and gives its exit code.
pub fn report(error: &Error) -> ExitCode {
    let interrupted = crate::signals::was_interrupted();
    let _ = writeln!(std::io::stderr(), "tidegate: {}", error.report());
    ExitCode::from(if interrupted { INTERRUPTED } else { code_of(error) })
}

/// The table for `--help`.
pub fn help() -> String {
    let mut text = String::from("Exit codes:\n    0  success\n");
    for row in TABLE {
        let _ = writeln!(text, "  {:>3}  {} ({})", row.code, row.meaning, row.name);
    }
    text.push_str(
        "  130  interrupted\n  `check` uses 0 for clean, 1 for damage found, 2 for could not check.",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_unique_and_round_trip() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(kind_named(row.name), row.kind);
            assert_eq!(code_of(&Error::new(row.kind, "x")), row.code);
            assert!(row.code != 0 && row.code < 126, "shells use the rest");
            assert!(
                TABLE[..i].iter().all(|r| r.code != row.code && r.name != row.name && r.kind != row.kind)
            );
        }
        assert_eq!(kind_named("from the future"), ErrorKind::Io);
    }

    #[test]
    fn help_lists_every_code() {
        let help = help();
        assert!(TABLE.iter().all(|row| help.contains(row.meaning)));
    }
}
