//! One error type: a small matchable kind, a message that says what, where and what to do, and the source.

use std::io;

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// What callers match on for control flow; exit codes and errno values derive from it in one place each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that cannot be (bad size, misaligned, unknown option).
    Invalid,
    /// What was named does not exist.
    NotFound,
    /// A name or a place is taken.
    Exists,
    /// In use by somebody else: locked, mounted, attached.
    Busy,
    /// Not permitted.
    Permission,
    /// Holds something of value that is not ours; `--force` overrides.
    Foreign,
    /// Not the device that belongs here: swapped, rolled back, shrunk.
    WrongDevice,
    /// Written by a newer version of the format.
    NewerFormat,
    /// Damage that cannot be explained by a crash.
    Damaged,
    /// A device failed a request.
    Io,
    /// No room.
    NoSpace,
    /// The kernel or the machine lacks something.
    Unsupported,
    /// Writes acknowledged in memory are gone (arena lost).
    Lost,
}

/// Error with kind, context and source.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<io::Error>,
}

impl Error {
    /// Error without a source.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    /// Error caused by an operating-system error; the kind follows from the errno.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.raw_os_error() {
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorKind::Permission,
            Some(libc::EBUSY) => ErrorKind::Busy,
            Some(libc::EEXIST) => ErrorKind::Exists,
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(source) }
    }

    /// The kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Same error with `prefix: ` put before its context.
    #[must_use]
    pub fn within(mut self, prefix: impl AsRef<str>) -> Error {
        self.context = format!("{}: {}", prefix.as_ref(), self.context);
        self
    }

    /// Context and source on one line, for people.
    #[must_use]
    pub fn report(&self) -> String {
        match &self.source {
            Some(source) => format!("{}: {source}", self.context),
            None => self.context.clone(),
        }
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Error {
        Error::new(kind, format!("{kind:?}"))
    }
}
