//! What the flusher knows of a backing.

use crate::base::Lsn;
use crate::format::label::Label;

/// What is known of a backing, kept from epoch to epoch.
#[derive(Clone, Debug)]
pub struct FlushTarget {
    /// The label as last written with success.
    pub label: Label,
    /// The highest LSN that a label written here has named, with success or not: labels never go back.
    pub attempted: Lsn,
    /// Smallest unit of its device.
    pub block_bytes: u32,
    /// Whether it can zero without data.
    pub zeroes: bool,
    /// Whether it can discard.
    pub discards: bool,
}

impl FlushTarget {
    /// The label with which the volume gets another size. An epoch that has failed may have written more than the last label
    /// says, so it names what was attempted.
    #[must_use]
    pub fn resized(&self, volume_bytes: u64) -> Label {
        Label { volume_bytes, flushed_lsn: self.attempted, ..self.label.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_does_not_go_back_when_a_volume_grows_between_two_attempts_at_an_epoch() {
        let label = Label {
            sequence: 4,
            stage_uuid: uuid::Uuid::from_u128(1),
            volume_uuid: uuid::Uuid::from_u128(2),
            volume_bytes: 1 << 19,
            flushed_lsn: Lsn(50),
            name: "v".into(),
        };
        let target = FlushTarget {
            label: label.clone(),
            attempted: Lsn(100),
            block_bytes: 512,
            zeroes: true,
            discards: true,
        };
        assert_eq!(target.resized(1 << 20), Label { volume_bytes: 1 << 20, flushed_lsn: Lsn(100), ..label });
    }
}
