//! Walking the bytes of a region: a whole region with edits under valid checksums.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tidegate_driver::format::region::RegionStart;
use tidegate_driver::recovery::sample_stage::SampleStage;
use tidegate_driver::recovery::scan::{rules_of, walk_region};
use tidegate_driver::stage::walk::{Expected, Rules, arena_groups, later_group, visit_headers};
use tidegate_fuzz::{Structure, edit, salt_of};

struct Sample {
    image: Vec<u8>,
    start: RegionStart,
    rules: Rules,
    /// Structures in it, and the salt of those with a checksum.
    structures: Vec<Structure>,
}

static SAMPLE: LazyLock<Sample> = LazyLock::new(|| {
    let stage = SampleStage::filled();
    let geometry = stage.superblock.geometry;
    let start = stage.regions[1].start;
    let from = geometry.region_offset(start.seq) as usize;
    let image = stage.disk.bytes()[from..from + geometry.region_bytes as usize].to_vec();
    let salt = stage.superblock.salt;
    let inside = |r: &&std::ops::Range<u64>| (from as u64..(from + image.len()) as u64).contains(&r.start);
    let structures = stage
        .live
        .iter()
        .filter(inside)
        .map(|r| r.start as usize - from..r.end as usize - from)
        .map(|r| (r.clone(), salt_of(&image[r], salt)))
        .collect();
    Sample { start, rules: rules_of(&stage.superblock), structures, image }
});

fuzz_target!(|data: &[u8]| {
    let sample = &*SAMPLE;
    let mut image = sample.image.clone();
    edit(&mut image, &sample.structures, data);
    let walked = walk_region(&image, sample.start, &sample.rules);
    assert!(walked.data_end as usize <= image.len());
    assert!(walked.records.windows(2).all(|pair| pair[0].1.lsn < pair[1].1.lsn && pair[0].0 < pair[1].0));
    let from = sample.rules.block_bytes;
    let _ = later_group(&image, from, sample.start.seq, 0, &sample.rules);
    let mut records = Vec::new();
    arena_groups(&image, from, sample.start.seq, sample.start.first_lsn, &sample.rules, &mut records);
    let expected = Expected {
        region: sample.start.seq,
        group_seq: sample.start.first_group_seq,
        first_lsn: sample.start.first_lsn,
    };
    let mut seen = 0;
    let whole = visit_headers(&image[..walked.data_end as usize], expected, &sample.rules, |_, _| seen += 1);
    assert!(whole && seen == walked.records.len(), "the flusher sees what recovery saw");
});
