//! Threads whose end must be the process's.

/// Ends the process when dropped while its thread panics: others wait for what that thread has begun. Release builds abort on
/// any panic anyway; this makes debug builds and tests behave alike.
#[derive(Debug)]
pub struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}
