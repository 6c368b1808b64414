//! P1: after a crash the volumes hold the effect of one prefix of the accepted changes, and all that was promised is in it.
//! There is one list for all volumes of a stage, so order between them is part of it.

use super::super::model::{Model, after};

impl Model {
    /// A server came back with the prefix up to `end`, where at least `required` was promised. From now on that is what
    /// clients see.
    pub fn recovered(&mut self, end: u64, required: u64) -> Result<(), String> {
        if end < required {
            return Err(format!("P1: the prefix ends at LSN {end}, but LSN {required} was promised"));
        }
        assert!(self.base <= required, "only what was promised for ever is folded in");
        self.changes.split_off(&(end + 1));
        let known = self.base + self.changes.len() as u64;
        if known != end {
            return Err(format!("P1: the prefix ends at LSN {end}, but LSN {} was never filled", known + 1));
        }
        // What the next power cut may take back stays a list.
        let rest = self.changes.split_off(&(self.durable + 1));
        for change in std::mem::replace(&mut self.changes, rest).into_values() {
            let volume = &mut self.volumes[change.volume];
            for at in change.range.clone() {
                let before = volume.content[at as usize];
                volume.content[at as usize] = after(&change, volume.discards, at, before);
            }
        }
        self.base = self.base.max(self.durable);
        self.acknowledged = end;
        Ok(())
    }
}
