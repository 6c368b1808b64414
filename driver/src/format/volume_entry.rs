//! Volume entry: one volume in the superblock's table.
//!
//! ```text
//!   0  [16]  volume UUID (zero: the entry is free)
//!  16  [64]  name, UTF-8, zero-padded
//!  80  u64   size in bytes
//!  88  u16   volume id within the stage, never reused
//!  90  u8    ack level: 0 log, 1 memory
//!  91  u8    on log error: 0 stall, 1 fail
//!  92  u32   logical block size in bytes
//!  96  u64   creation time, ns since the Unix epoch
//! 104  [256] path of the backing when it was last attached, UTF-8, zero-padded (a hint: the label decides)
//! 360  [152] reserved
//! ```
//!
//! Valid if and only if the UUID is not zero, the name is one, the block size is a power of two in 512..=4096, the size is
//! a positive multiple of it, and the codes are known.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{text_from, text_into};
use crate::base::limits::{BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, VOLUME_BYTES_MAX};
use crate::base::{Error, ErrorKind, Result, VolumeId};

/// Longest volume name in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest backing path in bytes.
pub const PATH_BYTES_MAX: usize = 256;

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AckLevel {
    /// When its record is durable on the log device.
    #[default]
    Log,
    /// When its record is in the arena; a FLUSH waits for the log device.
    Memory,
}

impl AckLevel {
    /// The code on disk.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            AckLevel::Log => 0,
            AckLevel::Memory => 1,
        }
    }

    /// The level with this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<AckLevel> {
        [AckLevel::Log, AckLevel::Memory].into_iter().find(|level| level.code() == code)
    }
}

/// What writers get while the log device fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLogError {
    /// They wait until it works again.
    #[default]
    Stall,
    /// They get an I/O error.
    Fail,
}

/// The entry on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VolumeEntry {
    /// UUID, zero for a free entry.
    pub uuid: [u8; 16],
    /// Name.
    pub name: [u8; NAME_BYTES_MAX],
    /// Size in bytes.
    pub size_bytes: U64,
    /// Volume id.
    pub id: U16,
    /// [`AckLevel`] code.
    pub ack: u8,
    /// [`OnLogError`] code.
    pub on_log_error: u8,
    /// Logical block size.
    pub block_bytes: U32,
    /// Creation time.
    pub created_ns: U64,
    /// Backing path.
    pub backing: [u8; PATH_BYTES_MAX],
    /// Zero.
    pub reserved: [u8; 152],
}

/// Size of an entry.
pub const VOLUME_ENTRY_BYTES: usize = 512;
const _: () = assert!(size_of::<VolumeEntry>() == VOLUME_ENTRY_BYTES);

/// A volume as the superblock describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Identity, also on the backing's label.
    pub uuid: Uuid,
    /// Name, unique on the stage.
    pub name: String,
    /// Id within the stage.
    pub id: VolumeId,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
    /// Ack level.
    pub ack: AckLevel,
    /// Policy on log errors.
    pub on_log_error: OnLogError,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// Where the backing was last.
    pub backing: String,
}

/// Checks a volume name: 1 to 64 characters, letters, digits, `.`, `_`, `-`, starting with a letter or digit.
pub fn check_name(name: &str) -> Result<()> {
    let ok = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if ok {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "'{name}' is not a volume name: use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-', starting with a \
             letter or digit"
        ),
    ))
}

impl VolumeInfo {
    /// Checks the rule in the module's header.
    pub fn validate(&self) -> Result<()> {
        check_name(&self.name)?;
        let block = self.block_bytes;
        if !block.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "block size {block} is not a power of two from {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}"
                ),
            ));
        }
        if self.size_bytes == 0 || !self.size_bytes.is_multiple_of(u64::from(block)) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "size {} of volume '{}' is not a positive multiple of its block size {block}; \
                     the nearest below is {}",
                    self.size_bytes,
                    self.name,
                    self.size_bytes / u64::from(block) * u64::from(block),
                ),
            ));
        }
        if self.size_bytes > VOLUME_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("size {} is more than the largest volume, {VOLUME_BYTES_MAX} bytes", self.size_bytes),
            ));
        }
        if self.backing.len() > PATH_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the path of the backing is {} bytes long, {PATH_BYTES_MAX} is the most: use a shorter path or a link",
                    self.backing.len()
                ),
            ));
        }
        Ok(())
    }

    /// Encodes the entry; the info must be valid.
    #[must_use]
    pub fn encode(&self) -> VolumeEntry {
        VolumeEntry {
            uuid: *self.uuid.as_bytes(),
            name: text_into(&self.name).expect("a validated name fits"),
            size_bytes: self.size_bytes.into(),
            id: self.id.0.into(),
            ack: self.ack.code(),
            on_log_error: match self.on_log_error {
                OnLogError::Stall => 0,
                OnLogError::Fail => 1,
            },
            block_bytes: self.block_bytes.into(),
            created_ns: self.created_ns.into(),
            backing: text_into(&self.backing).expect("a validated path fits"),
            reserved: [0; 152],
        }
    }
}

impl VolumeEntry {
    /// Whether the entry is unused.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.uuid == [0; 16]
    }

    /// Decodes a used entry.
    pub fn decode(&self) -> Result<VolumeInfo> {
        let bad = |what: &str, code: u8| {
            Error::new(ErrorKind::Damaged, format!("volume entry {}: unknown {what} {code}", self.id.get()))
        };
        let info = VolumeInfo {
            uuid: Uuid::from_bytes(self.uuid),
            name: text_from(&self.name),
            id: VolumeId(self.id.get()),
            size_bytes: self.size_bytes.get(),
            block_bytes: self.block_bytes.get(),
            ack: AckLevel::from_code(self.ack).ok_or_else(|| bad("ack level", self.ack))?,
            on_log_error: match self.on_log_error {
                0 => OnLogError::Stall,
                1 => OnLogError::Fail,
                code => return Err(bad("log error policy", code)),
            },
            created_ns: self.created_ns.get(),
            backing: text_from(&self.backing),
        };
        info.validate().map_err(|e| Error::new(ErrorKind::Damaged, e.report()).within("volume entry"))?;
        Ok(info)
    }
}
