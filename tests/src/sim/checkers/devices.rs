//! P3 and P7 for devices that are damaged, old or not the right ones: what may come of opening a stage with them.

use tidegate_driver::base::{Error, ErrorKind};

/// What may come of it. Every fault may be refused.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// It must be refused.
    pub refusal_only: bool,
    /// These volumes must not be served.
    pub without: Vec<usize>,
    /// The faulty volume may be refused alone although that is not needed.
    pub may_be_without: bool,
    /// The prefix may end as early as here, below what was promised.
    pub floor: Option<u64>,
    /// What was flushed to each backing: a stage that ends below that must not serve the volume. A volume that has grown since
    /// is looked for at its old size, and refused.
    pub flushed: Vec<u64>,
    /// Where the log ended before its last group was damaged.
    pub log_end: u64,
    /// What is read cannot be known.
    pub any_content: bool,
    /// Reads may fail, and the server may find damage later.
    pub damage: bool,
    /// The arena was damaged, not a device.
    pub arena: bool,
}

/// The stage was refused.
pub fn refused(error: &Error, allowed: &Allowed, changed: bool) -> Result<(), String> {
    if changed {
        return Err(format!("P7: refused, but a device was written to before: {}", error.report()));
    }
    let kinds = [
        ErrorKind::Damaged,
        ErrorKind::WrongDevice,
        ErrorKind::NotFound,
        ErrorKind::NewerFormat,
        ErrorKind::Lost,
    ];
    if !kinds.contains(&error.kind()) || error.report().len() < 20 {
        return Err(format!("P7: refused as {:?}: {}", error.kind(), error.report()));
    }
    if allowed.arena {
        return Err(format!("refused although only the arena is damaged: {}", error.report()));
    }
    Ok(())
}

impl Allowed {
    /// The stage was opened: `usable` are its volumes, `end` its newest change, `required` what was promised.
    pub fn opened(&self, usable: &[bool], end: u64, required: u64) -> Result<(), String> {
        if self.refusal_only {
            return Err("P7: the stage was opened".into());
        }
        if let Some(volume) = self.without.iter().find(|&&volume| usable[volume]) {
            return Err(format!("P7: volume {volume} is served from a wrong device"));
        }
        let faulty = self.may_be_without || !self.without.is_empty();
        if !faulty && usable.contains(&false) && !self.any_content {
            return Err(format!("P7: a volume is refused although its backing is right: {usable:?}"));
        }
        let least = self.floor.map_or(required, |floor| floor.min(required));
        if !self.any_content && end < least {
            return Err(format!("P1: the prefix ends at LSN {end}, but LSN {least} was promised"));
        }
        let mut served = self.flushed.iter().zip(usable).filter(|&(_, &usable)| usable);
        if let Some((flushed, _)) = served.find(|&(&flushed, _)| end < flushed) {
            return Err(format!(
                "P7: an old stage that ends at LSN {end} is accepted, but LSN {flushed} was flushed"
            ));
        }
        Ok(())
    }
}
