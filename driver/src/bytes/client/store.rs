//! A session as the store of an append log: a write that failed is never passed, whoever else was told of it.

use std::time::Duration;

use super::{Device, failure_of};
use crate::bytes::{ByteStore, Result, Ticket};

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
        self.collect();
        match self.reaper.lock().first_failed {
            Some(failed) if failed.ticket <= durable => Ticket(failed.ticket.0 - 1),
            _ => durable,
        }
    }

    fn persist(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<()> {
        Device::persist(self, ticket, timeout)?;
        self.collect();
        match self.reaper.lock().first_failed {
            Some(failed) if failed.ticket <= ticket => Err(failure_of(
                failed.result,
                &format!("the write with ticket {:#x} failed", failed.ticket.0),
            )),
            _ => Ok(()),
        }
    }
}
