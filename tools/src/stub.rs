//! Stands in for `tidegate_driver::recovery::{check, inspect}` until they are merged: same names and shapes, little
//! behind them. `engine.rs` is the only user; the day it imports the real ones this file goes.

use std::collections::BTreeMap;

use serde::Serialize;
use tidegate_driver::base::{Result, VolumeId};
use tidegate_driver::io::Disk;
use tidegate_driver::recovery::superblocks;

#[derive(Debug, Serialize)]
pub struct Problem {
    pub what: String,
    pub device: String,
    pub offset: Option<u64>,
    pub advice: String,
}

#[derive(Debug, Serialize)]
pub struct CheckReport {
    pub problems: Vec<Problem>,
    pub notes: Vec<String>,
    pub problems_not_listed: u64,
}

pub fn check(stage: &dyn Disk, _backings: &BTreeMap<VolumeId, &dyn Disk>) -> Result<CheckReport> {
    let read = superblocks::read(stage)?;
    let problems = read.bad_copies.iter().map(|copy| Problem {
        what: format!("superblock copy {copy} is damaged"),
        device: stage.name(),
        offset: Some(read.superblock.geometry.superblock_offset(*copy)),
        advice: "the next attach writes it again".into(),
    });
    Ok(CheckReport { problems: problems.collect(), notes: Vec::new(), problems_not_listed: 0 })
}

#[derive(Debug, Serialize)]
pub struct Structure {
    pub offset: u64,
    pub name: String,
    pub valid: bool,
    pub fields: Vec<(String, String)>,
}

pub fn inspect(disk: &dyn Disk, _limit: usize) -> Result<Vec<Structure>> {
    let read = superblocks::read(disk)?;
    let copies = (0..4).map(|copy| Structure {
        offset: read.superblock.geometry.superblock_offset(copy),
        name: format!("superblock copy {copy}"),
        valid: !read.bad_copies.contains(&copy),
        fields: vec![("stage_uuid".into(), read.superblock.stage_uuid.to_string())],
    });
    Ok(copies.collect())
}
