//! The byte tables of `format` once more, for showing: they apply to any bytes, valid or not.

use uuid::Uuid;

use crate::format::text_from;

/// How a field is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Show {
    /// Little-endian number.
    Number,
    /// The same in hex.
    Hex,
    /// UUID.
    Uuid,
    /// Zero-padded text.
    Text,
    /// Not shown: who knows it can forge structures.
    Secret,
    /// Shown only if it is not zero, as it has to be.
    Zero,
    /// Belongs to other structures.
    Nested,
}

/// A field: name, offset, length, how it is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field(pub &'static str, pub usize, pub usize, pub Show);

use Show::{Hex, Nested, Number, Secret, Text, Uuid as Id, Zero};

/// A structure's name and fields.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub kind: &'static str,
    pub bytes: usize,
    pub fields: &'static [Field],
}

impl Layout {
    /// The fields of the structure at the start of `bytes`; those that are cut off are left out.
    pub fn show(&self, bytes: &[u8]) -> Vec<(String, String)> {
        let show = |field: &Field| {
            let text = value(bytes.get(field.1..field.1 + field.2)?, field.3)?;
            Some((field.0.to_owned(), text))
        };
        self.fields.iter().filter_map(show).collect()
    }
}

/// Little-endian number of up to eight bytes.
pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The number at `offset`, 0 if it is cut off.
pub(super) fn number_at(bytes: &[u8], offset: usize, len: usize) -> u64 {
    bytes.get(offset..offset + len).map_or(0, number)
}

fn value(bytes: &[u8], show: Show) -> Option<String> {
    match show {
        Number => Some(number(bytes).to_string()),
        Hex => Some(format!("{:#x}", number(bytes))),
        Id => Some(Uuid::from_slice(bytes).ok()?.to_string()),
        Text => Some(text_from(bytes).escape_debug().to_string()),
        Secret => Some("(secret)".to_owned()),
        Zero => bytes.iter().any(|&b| b != 0).then(|| "not zero".to_owned()),
        Nested => None,
    }
}

pub(super) const SUPERBLOCK: Layout = Layout {
    kind: "superblock",
    bytes: 69632,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 8, Text),
        Field("version", 16, 4, Number),
        Field("incompatible", 20, 4, Hex),
        Field("compatible", 24, 4, Hex),
        Field("copy", 28, 4, Number),
        Field("sequence", 32, 8, Number),
        Field("stage_uuid", 40, 16, Id),
        Field("salt", 56, 8, Secret),
        Field("device_bytes", 64, 8, Number),
        Field("block_bytes", 72, 4, Number),
        Field("region_bytes", 76, 4, Number),
        Field("region_count", 80, 4, Number),
        Field("patch_bytes", 84, 4, Number),
        Field("incarnation", 88, 8, Number),
        Field("incarnation_group_seq", 96, 8, Number),
        Field("arena_id", 104, 8, Hex),
        Field("boot_id", 112, 16, Id),
        Field("state", 128, 4, Number),
        Field("next_volume_id", 132, 2, Number),
        Field("reserved", 134, 2, Zero),
        Field("created_ns", 136, 8, Number),
        Field("closed_lsn", 144, 8, Number),
        Field("incarnation_lsn", 152, 8, Number),
        Field("reserved", 160, 3936, Zero),
        Field("volumes", 4096, 65536, Nested),
    ],
};

pub(super) const VOLUME: Layout = Layout {
    kind: "volume entry",
    bytes: 512,
    fields: &[
        Field("uuid", 0, 16, Id),
        Field("name", 16, 64, Text),
        Field("size_bytes", 80, 8, Number),
        Field("id", 88, 2, Number),
        Field("ack", 90, 1, Number),
        Field("on_log_error", 91, 1, Number),
        Field("block_bytes", 92, 4, Number),
        Field("created_ns", 96, 8, Number),
        Field("backing", 104, 256, Text),
        Field("reserved", 360, 152, Zero),
    ],
};

pub(super) const CHECKPOINT: Layout = Layout {
    kind: "checkpoint",
    bytes: 4096,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 8, Text),
        Field("version", 16, 4, Number),
        Field("slot", 20, 4, Number),
        Field("sequence", 24, 8, Number),
        Field("lsn", 32, 8, Number),
        Field("head_region", 40, 8, Number),
        Field("head_first_lsn", 48, 8, Number),
        Field("head_first_group", 56, 8, Number),
        Field("time_ns", 64, 8, Number),
        Field("reserved", 72, 24, Zero),
        Field("volumes", 96, 2048, Nested),
        Field("reserved", 2144, 1952, Zero),
    ],
};

pub(super) const PATCH: Layout = Layout {
    kind: "patch header",
    bytes: 64,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 4, Text),
        Field("version", 12, 4, Number),
        Field("images", 16, 4, Number),
        Field("reserved", 20, 4, Zero),
        Field("epoch_end", 24, 8, Number),
        Field("reserved", 32, 32, Zero),
    ],
};

pub(super) const PATCH_ENTRY: Layout = Layout {
    kind: "patch entry",
    bytes: 32,
    fields: &[
        Field("backing_offset", 0, 8, Number),
        Field("image_checksum", 8, 8, Hex),
        Field("image_bytes", 16, 4, Number),
        Field("volume", 20, 2, Number),
        Field("reserved", 22, 2, Zero),
        Field("reserved", 24, 8, Zero),
    ],
};

pub(super) const REGION: Layout = Layout {
    kind: "region header",
    bytes: 64,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 4, Text),
        Field("version", 12, 4, Number),
        Field("region", 16, 8, Number),
        Field("first_lsn", 24, 8, Number),
        Field("first_group", 32, 8, Number),
        Field("slot", 40, 4, Number),
        Field("reserved", 44, 20, Zero),
    ],
};

pub(super) const FOOTER: Layout = Layout {
    kind: "region footer",
    bytes: 64,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("table_checksum", 8, 8, Hex),
        Field("magic", 16, 4, Text),
        Field("entries", 20, 4, Number),
        Field("region", 24, 8, Number),
        Field("first_lsn", 32, 8, Number),
        Field("first_group", 40, 8, Number),
        Field("data_end", 48, 4, Number),
        Field("groups", 52, 4, Number),
        Field("reserved", 56, 8, Zero),
    ],
};

pub(super) const GROUP: Layout = Layout {
    kind: "group",
    bytes: 64,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 4, Text),
        Field("records", 12, 4, Number),
        Field("group", 16, 8, Number),
        Field("region", 24, 8, Number),
        Field("first_lsn", 32, 8, Number),
        Field("group_bytes", 40, 4, Number),
        Field("records_digest", 44, 4, Number),
        Field("incarnation_low", 48, 4, Number),
        Field("undurable_before", 52, 4, Number),
        Field("checkpoint_lsn", 56, 8, Number),
    ],
};

pub(super) const RECORD: Layout = Layout {
    kind: "record",
    bytes: 64,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("payload_checksum", 8, 8, Hex),
        Field("lsn", 16, 8, Number),
        Field("volume_offset", 24, 8, Number),
        Field("length", 32, 8, Number),
        Field("timestamp_ns", 40, 8, Number),
        Field("payload_bytes", 48, 4, Number),
        Field("volume", 52, 2, Number),
        Field("stream", 54, 2, Number),
        Field("kind", 56, 1, Number),
        Field("flags", 57, 1, Hex),
        Field("incarnation_low", 58, 2, Number),
        Field("region_low", 60, 4, Number),
    ],
};

pub(super) const LABEL: Layout = Layout {
    kind: "label",
    bytes: 4096,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 8, Text),
        Field("version", 16, 4, Number),
        Field("slot", 20, 4, Number),
        Field("sequence", 24, 8, Number),
        Field("stage_uuid", 32, 16, Id),
        Field("volume_uuid", 48, 16, Id),
        Field("volume_bytes", 64, 8, Number),
        Field("flushed_lsn", 72, 8, Number),
        Field("name", 80, 64, Text),
        Field("reserved", 144, 3952, Zero),
    ],
};

pub(super) const ARENA: Layout = Layout {
    kind: "arena header",
    bytes: 4096,
    fields: &[
        Field("checksum", 0, 8, Hex),
        Field("magic", 8, 8, Text),
        Field("version", 16, 4, Number),
        Field("reserved", 20, 4, Zero),
        Field("stage_uuid", 24, 16, Id),
        Field("arena_id", 40, 8, Hex),
        Field("region_bytes", 48, 4, Number),
        Field("region_count", 52, 4, Number),
        Field("reserved", 56, 4040, Zero),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_cover_their_structures_without_gap_or_overlap() {
        let all =
            [SUPERBLOCK, VOLUME, CHECKPOINT, PATCH, PATCH_ENTRY, REGION, FOOTER, GROUP, RECORD, LABEL, ARENA];
        for layout in all {
            let mut end = 0;
            for Field(name, offset, len, _) in layout.fields {
                assert_eq!(*offset, end, "{}: {name}", layout.kind);
                end += len;
            }
            assert_eq!(end, layout.bytes, "{}", layout.kind);
        }
    }
}
