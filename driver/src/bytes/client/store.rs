//! A session as a byte store, and what a failed completion says.

use std::time::Duration;

use super::super::{ByteStore, Completion, Failure, Result, Ticket};
use super::Device;

pub(super) fn failure_of(result: i32, what: &str) -> Failure {
    let errno = result.checked_neg().filter(|errno| (1..4096).contains(errno)).unwrap_or(libc::EIO);
    let why = match errno {
        libc::ERANGE => "the range is not within the volume".to_owned(),
        libc::ECANCELED => "a request that it names never came".to_owned(),
        errno => std::io::Error::from_raw_os_error(errno).to_string(),
    };
    Failure::new(errno, format!("{what}: {why}"))
}

pub(super) fn check(completion: &Completion, what: impl Fn() -> String) -> Result<()> {
    if completion.result == 0 { Ok(()) } else { Err(failure_of(completion.result, &what())) }
}

impl ByteStore for &Device {
    fn volume_bytes(&self) -> u64 {
        self.info().volume_bytes
    }

    fn write_bytes_max(&self) -> u32 {
        self.info.write_bytes_max
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        Device::read(self, offset, into)
    }

    fn write(&self, offset: u64, parts: &[&[u8]]) -> Result<Ticket> {
        self.write_async(offset, parts, 0)
    }

    fn durable(&self) -> Ticket {
        // Completions tell of a failure before the word does that passes it; so the word is looked at first.
        let durable = Device::durable(self);
        if self.owner.check().is_err() {
            return durable;
        }
        match self.collect_and(|reaper| reaper.failed) {
            Some(failed) if failed.ticket <= durable => Ticket(failed.ticket.0 - 1),
            _ => durable,
        }
    }

    fn persist(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<()> {
        Device::persist(self, ticket, timeout)
    }
}
