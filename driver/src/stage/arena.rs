//! The arena: the regions in memory, in a named shared-memory file that outlives the process (P4).
//!
//! Who may touch which bytes:
//! - the bytes of a claimed place belong to the holder of its [`Slot`] until it is published; the ring hands out disjoint
//!   slots and each slot is a value that exists once;
//! - the headers and padding of a closed group belong to whoever holds the group for writing (one at a time: the
//!   committer), until the group is durable;
//! - table and footer of a full region belong to the sealer while the region's table state says `Writing`;
//! - a region that is not resident belongs to the loader;
//! - every other byte of a live region is immutable: published records are only read. A slot is handed to a new region
//!   only after its old one was reclaimed, which waits until no reader has it pinned.
//!
//! The methods below are the only access and are `pub(crate)`: the rules above are what makes them sound.
#![expect(unsafe_code, reason = "maps shared memory and hands out disjoint parts of it")]

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use super::ring::{ClosedGroup, Slot};
use crate::base::{Error, ErrorKind, RegionSeq, Result};
use crate::format::arena::{ARENA_HEADER_BYTES, ArenaIdentity};
use crate::format::record::record_bytes;
use crate::io::op::SharedMemory;
use zerocopy::IntoBytes;

/// Size of a page.
const PAGE_BYTES: usize = 4096;

/// Size of a large page.
const HUGE_BYTES: usize = 2 << 20;

/// Memory that is made at once as large pages. Each time the kernel waits until every processor has come by, which takes up to
/// a tick where one is busy.
const AHEAD_BYTES: u32 = 16 << 20;

/// A mapped arena.
pub struct Arena {
    base: *mut u8,
    len: usize,
    region_bytes: u32,
    region_count: u32,
    /// Readers that use bytes of a slot, per slot: such a slot is not given to a new region.
    pins: Vec<AtomicU32>,
    /// Whether a slot's memory exists, per slot. Locked while it is made, so that it is made once.
    made: Vec<Mutex<bool>>,
    /// The file and its path; none for an anonymous arena.
    file: Option<(File, PathBuf)>,
    is_new: bool,
    /// Not known to be refused by the kernel: it may be too old for that, or told not to.
    collapses: AtomicBool,
}

// SAFETY: `base` points to a mapping that lives as long as the value; who may touch which part from which thread is
// ruled by the module's header, not by the pointer.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} regions of {} bytes)", self.region_count, self.region_bytes)
    }
}

impl SharedMemory for Arena {
    fn base(&self) -> *mut u8 {
        self.base
    }

    fn len_bytes(&self) -> usize {
        self.len
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this address and length, and nothing borrows it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Refuses a folder for arenas that somebody else could put files into, or take them out of: the usual one lies in
/// `/dev/shm`, where everybody may make folders, and what is in an arena is believed.
fn refuse_open_folder(dir: &Path) -> Result<()> {
    let metadata = std::fs::symlink_metadata(dir)
        .map_err(|e| Error::io(format!("cannot look at the arena folder {}", dir.display()), e))?;
    let problem = if !metadata.is_dir() {
        "is a link or a file, not a folder".to_owned()
    } else if metadata.uid() != nix::unistd::geteuid().as_raw() {
        format!("belongs to user {}", metadata.uid())
    } else if metadata.mode() & 0o022 != 0 {
        format!("can be written to by others (mode {:o})", metadata.mode() & 0o7777)
    } else {
        return Ok(());
    };
    let what = format!(
        "the arena folder {} {problem}: find out who made it and remove it, or name a folder of your own with \
         TIDEGATE_ARENA_DIR",
        dir.display()
    );
    Err(Error::new(ErrorKind::Permission, what))
}

/// Addresses for a mapping of `len` bytes, at a multiple of [`HUGE_BYTES`], which large pages need. Null, which leaves the
/// choice to the kernel, if there are none.
fn reserve_aligned(len: usize) -> *mut libc::c_void {
    let reserved = len + HUGE_BYTES;
    // SAFETY: new addresses of the kernel's choice, without memory.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            reserved,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    let before = base.align_offset(HUGE_BYTES);
    let used = len.next_multiple_of(PAGE_BYTES);
    // SAFETY: what lies before and behind the aligned part, which nobody uses; the part itself is mapped over next.
    unsafe {
        if before > 0 {
            libc::munmap(base, before);
        }
        libc::munmap(base.add(before + used), reserved - before - used);
        base.add(before)
    }
}

impl Arena {
    /// Name of the arena file of a stage's arena id below `dir`.
    #[must_use]
    pub fn path_in(dir: &Path, identity: &ArenaIdentity) -> PathBuf {
        dir.join(format!("{}-{:016x}.arena", identity.stage_uuid, identity.arena_id))
    }

    /// Creates the file for `identity` below `dir` and maps it. The file appears under its name only when it is whole.
    pub fn create(dir: &Path, identity: &ArenaIdentity, salt: u64) -> Result<Arena> {
        let path = Arena::path_in(dir, identity);
        let context = |what: &str| format!("cannot {what} arena file {}", path.display());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| Error::io(context("create the folder of"), e))?;
        refuse_open_folder(dir)?;
        let temporary = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary)
            .map_err(|e| Error::io(context("create"), e))?;
        let built = Arena::fill_new(file, identity, salt, &path).and_then(|arena| {
            match std::fs::rename(&temporary, &path) {
                Ok(()) => Ok(arena),
                Err(e) => Err(Error::io(context("rename"), e)),
            }
        });
        if built.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        built
    }

    fn fill_new(file: File, identity: &ArenaIdentity, salt: u64, path: &Path) -> Result<Arena> {
        let len = Arena::file_bytes(identity) as u64;
        let room =
            nix::sys::statvfs::fstatvfs(&file).map(|fs| fs.blocks_available() * fs.fragment_size()).map_err(
                |e| Error::io(format!("cannot look at the file system of {}", path.display()), e.into()),
            )?;
        if room < len {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "arena {} needs {len} bytes of shared memory, {room} are free: free memory, enlarge the tmpfs or use a \
                     smaller stage",
                    path.display()
                ),
            ));
        }
        file.set_len(len).map_err(|e| Error::io(format!("cannot size arena {}", path.display()), e))?;
        let arena = Arena::map(file, identity, Some(path.to_path_buf()), true)?;
        arena.allocate_bytes(0, ARENA_HEADER_BYTES as u64)?;
        let image = identity.encode(salt);
        // SAFETY: nobody else knows the new mapping; the header fits it.
        unsafe { std::ptr::copy_nonoverlapping(image.as_bytes().as_ptr(), arena.base, ARENA_HEADER_BYTES) };
        Ok(arena)
    }

    /// Makes sure that the pages of the slot of region `seq` exist: a store into a page that tmpfs cannot provide would
    /// kill the process. To be called before anything is stored there; takes time in proportion to the region. The pages
    /// are mapped, too, so that whoever stores there does not fault on each. What exists already takes no time, so somebody
    /// else may do it before it is needed.
    pub fn allocate(&self, seq: RegionSeq) -> Result<()> {
        self.make(seq, &mut self.made(seq).lock())
    }

    fn made(&self, seq: RegionSeq) -> &Mutex<bool> {
        &self.made[seq.slot(self.region_count) as usize]
    }

    /// Makes the memory of a slot unless `is_made`, which it is then.
    fn make(&self, seq: RegionSeq, is_made: &mut bool) -> Result<()> {
        if *is_made {
            return Ok(());
        }
        let at = self.position(seq, 0);
        self.allocate_bytes(at as u64, u64::from(self.region_bytes))?;
        // A kernel that does not know it has faults instead.
        // SAFETY: the slot lies within the mapping (checked by `position`); populating changes no byte.
        unsafe {
            libc::madvise(self.base.add(at).cast(), self.region_bytes as usize, libc::MADV_POPULATE_WRITE)
        };
        *is_made = true;
        Ok(())
    }

    /// Does the same for `seqs`, and has the kernel make their memory as large pages, as far as it can and will. Records lie
    /// on as many pages as they are blocks, and finding a page takes as long as copying a block; making one large page takes
    /// a tenth of making as many small ones. For memory that nobody waits for: where a processor is busy this takes some
    /// milliseconds, and where small pages are there already they are copied.
    ///
    /// Returns how many of `seqs`, from the first on, have their memory now, and what is the matter with the next one.
    pub(crate) fn allocate_ahead(&self, seqs: &[RegionSeq]) -> (usize, Result<()>) {
        let are_neighbours =
            |a: &RegionSeq, b: &RegionSeq| a.slot(self.region_count) + 1 == b.slot(self.region_count);
        let mut made = 0;
        for run in seqs.chunk_by(are_neighbours) {
            // Locked in the order of the slots, so that two of these never wait for each other. Who needs one of them meanwhile
            // waits: small pages made beside would have to be copied into the large ones.
            let slots: Vec<_> = run.iter().map(|seq| (*seq, self.made(*seq).lock())).collect();
            let mut missing = slots.iter().filter(|(_, is_made)| !**is_made);
            if let Some((first, _)) = missing.next() {
                let last = missing.next_back().map_or(first, |(last, _)| last);
                self.make_large_pages(self.position(*first, 0), self.position(*last, self.region_bytes));
            }
            for (seq, mut is_made) in slots {
                if let Err(error) = self.make(seq, &mut is_made) {
                    return (made, Err(error));
                }
                made += 1;
            }
        }
        (made, Ok(()))
    }

    /// As many regions as [`Arena::allocate_ahead`] should take together: one where there are no large pages to be had.
    pub(crate) fn regions_ahead(&self) -> usize {
        if self.has_large_pages() { (AHEAD_BYTES / self.region_bytes).max(1) as usize } else { 1 }
    }

    fn has_large_pages(&self) -> bool {
        self.region_bytes >= HUGE_BYTES as u32 && self.collapses.load(Ordering::Relaxed)
    }

    /// Makes the large pages that have bytes from `from` to `to`. One comes into being as small ones are put together, of which
    /// one has to exist; for those that do not it gets zeroes. What users of these slots and of those beside store meanwhile is
    /// kept. Where it does not work nothing is lost but a small page.
    fn make_large_pages(&self, from: usize, to: usize) {
        let from = from & !(HUGE_BYTES - 1);
        let to = to.next_multiple_of(HUGE_BYTES).min(self.len & !(HUGE_BYTES - 1));
        if from >= to || !self.has_large_pages() {
            return;
        }
        // SAFETY: within the mapping; the kernel moves what others store there meanwhile, too, and changes no byte.
        let collapsed = unsafe {
            for at in (from..to).step_by(HUGE_BYTES) {
                libc::madvise(self.base.add(at).cast(), PAGE_BYTES, libc::MADV_POPULATE_WRITE);
            }
            libc::madvise(self.base.add(from).cast(), to - from, libc::MADV_COLLAPSE)
        };
        // Other errors pass: there was no large page to be had, or somebody used a small one.
        if collapsed == -1 && nix::errno::Errno::last() == nix::errno::Errno::EINVAL {
            self.collapses.store(false, Ordering::Relaxed);
        }
    }

    /// Whether its memory was made for this value, and not for one before it.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }

    fn allocate_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let Some((file, path)) = &self.file else { return Ok(()) };
        nix::fcntl::posix_fallocate(file, offset as i64, len as i64).map_err(|e| {
            Error::io(
                format!(
                    "cannot reserve {len} bytes of shared memory for arena {}: free memory or enlarge the tmpfs",
                    path.display()
                ),
                e.into(),
            )
        })
    }

    /// Maps the existing file of `identity` below `dir`; `None` if there is none, an error if it is not that arena.
    pub fn open(dir: &Path, identity: &ArenaIdentity, salt: u64) -> Result<Option<Arena>> {
        let path = Arena::path_in(dir, identity);
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(format!("cannot open arena file {}", path.display()), e)),
        };
        refuse_open_folder(dir)?;
        let bytes =
            file.metadata().map_err(|e| Error::io(format!("cannot stat arena {}", path.display()), e))?.len();
        let wrong =
            || Error::new(ErrorKind::Damaged, format!("arena file {} is not this stage's", path.display()));
        if bytes != Arena::file_bytes(identity) as u64 {
            return Err(wrong());
        }
        let arena = Arena::map(file, identity, Some(path.clone()), false)?;
        // SAFETY: the header is within the mapping and nobody writes to it once the file has its name.
        let header = unsafe { std::slice::from_raw_parts(arena.base, ARENA_HEADER_BYTES) };
        if ArenaIdentity::decode(header, salt) != Some(*identity) {
            return Err(wrong());
        }
        Ok(Some(arena))
    }

    /// Arena without a file, for measurements: it lives as long as the value.
    pub fn anonymous(identity: &ArenaIdentity) -> Result<Arena> {
        Arena::map(Arena::anonymous_memory(identity)?, identity, None, true)
    }

    /// Memory for [`Arena::map_anonymous`]: it lives as long as the value or a mapping.
    pub fn anonymous_memory(identity: &ArenaIdentity) -> Result<File> {
        let name = c"tidegate-arena";
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .map_err(|e| Error::io("cannot create anonymous shared memory", e.into()))?;
        let file = File::from(fd);
        file.set_len(Arena::file_bytes(identity) as u64)
            .map_err(|e| Error::io("cannot size anonymous shared memory", e))?;
        Ok(file)
    }

    /// Arena in `memory`, which a simulation keeps when its server dies and maps again for the next one.
    pub fn map_anonymous(memory: &File, identity: &ArenaIdentity) -> Result<Arena> {
        let bytes = memory.metadata().map_err(|e| Error::io("cannot stat anonymous shared memory", e))?.len();
        if bytes != Arena::file_bytes(identity) as u64 {
            return Err(Error::new(ErrorKind::Invalid, "the memory is not that of this arena"));
        }
        let memory = memory.try_clone().map_err(|e| Error::io("cannot keep anonymous shared memory", e))?;
        Arena::map(memory, identity, None, false)
    }

    fn file_bytes(identity: &ArenaIdentity) -> usize {
        ARENA_HEADER_BYTES + identity.region_bytes as usize * identity.region_count as usize
    }

    fn map(file: File, identity: &ArenaIdentity, path: Option<PathBuf>, is_new: bool) -> Result<Arena> {
        use std::os::fd::AsRawFd;
        let len = Arena::file_bytes(identity);
        let map = |at: *mut libc::c_void, how: i32| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a shared mapping at an address of the kernel's choice, or in the place that was reserved for it; the
            // descriptor is open.
            unsafe { libc::mmap(at, len, protection, libc::MAP_SHARED | how, file.as_raw_fd(), 0) }
        };
        let reserved = reserve_aligned(len);
        let mut base = libc::MAP_FAILED;
        if !reserved.is_null() {
            base = map(reserved, libc::MAP_FIXED);
            if base == libc::MAP_FAILED {
                // SAFETY: what was reserved and is not used.
                unsafe { libc::munmap(reserved, len) };
            }
        }
        if base == libc::MAP_FAILED {
            // It does without large pages.
            base = map(std::ptr::null_mut(), 0);
        }
        if base == libc::MAP_FAILED {
            return Err(Error::io(
                format!("cannot map {len} bytes of arena"),
                std::io::Error::last_os_error(),
            ));
        }
        Ok(Arena {
            base: base.cast(),
            len,
            region_bytes: identity.region_bytes,
            region_count: identity.region_count,
            pins: (0..identity.region_count).map(|_| AtomicU32::new(0)).collect(),
            made: (0..identity.region_count).map(|_| Mutex::new(false)).collect(),
            file: path.map(|path| (file, path)),
            is_new,
            collapses: AtomicBool::new(true),
        })
    }

    /// Removes the arena's file; the mapping stays usable.
    pub fn unlink(&self) -> Result<()> {
        match &self.file {
            Some((_, path)) => std::fs::remove_file(path)
                .map_err(|e| Error::io(format!("cannot remove arena file {}", path.display()), e)),
            None => Ok(()),
        }
    }

    /// Offset of byte `offset` of region `seq` within the mapping.
    #[must_use]
    pub fn position(&self, seq: RegionSeq, offset: u32) -> usize {
        assert!(offset <= self.region_bytes);
        ARENA_HEADER_BYTES
            + seq.slot(self.region_count) as usize * self.region_bytes as usize
            + offset as usize
    }

    /// Size of a region in bytes.
    #[must_use]
    pub fn region_bytes(&self) -> u32 {
        self.region_bytes
    }

    /// Keeps the slot of region `seq` from being given away while it is read; undone by [`Arena::unpin`]. Call while the region
    /// is known to be live (under the core's lock).
    pub(crate) fn pin_raw(&self, seq: RegionSeq) {
        self.pins[seq.slot(self.region_count) as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Undoes one [`Arena::pin_raw`].
    pub(crate) fn unpin(&self, seq: RegionSeq) {
        let before = self.pins[seq.slot(self.region_count) as usize].fetch_sub(1, Ordering::Release);
        assert!(before > 0, "unpinned more often than pinned");
    }

    /// Whether somebody reads from the slot of region `seq`.
    pub(crate) fn is_pinned(&self, seq: RegionSeq) -> bool {
        self.pins[seq.slot(self.region_count) as usize].load(Ordering::Acquire) > 0
    }

    /// The bytes of a claimed place: header, payload and padding.
    pub(crate) fn slot_bytes<'a>(&'a self, slot: &'a mut Slot) -> &'a mut [u8] {
        let len = record_bytes(slot.payload_bytes());
        assert!(slot.offset() + len <= self.region_bytes);
        // SAFETY: in bounds by the assertion; exclusive because slots are disjoint and this one is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.add(self.position(slot.region(), slot.offset())),
                len as usize,
            )
        }
    }

    /// Puts the headers of a group that is about to be written in place and zeroes its padding.
    pub(crate) fn write_group_headers(
        &self,
        group: &ClosedGroup,
        region_header: Option<&[u8]>,
        header: &[u8],
    ) {
        assert!(group.records_end <= group.end && group.end <= self.region_bytes);
        let put = |offset: u32, bytes: &[u8]| {
            assert!(offset as usize + bytes.len() <= group.end as usize);
            // SAFETY: in bounds; these bytes belong to the committer, who holds the group.
            unsafe {
                let target = self.base.add(self.position(group.region, offset));
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
            }
        };
        if let Some(bytes) = region_header {
            self.zero(group.region, 0, group.header_offset);
            put(0, bytes);
        }
        put(group.header_offset, header);
        self.zero(group.region, group.records_end, group.end);
    }

    /// Zeroes `from..to` of region `seq`, which the caller owns by the rules in the module's header.
    pub(crate) fn zero(&self, seq: RegionSeq, from: u32, to: u32) {
        assert!(from <= to && to <= self.region_bytes);
        // SAFETY: in bounds by the assertion; ownership is the caller's.
        unsafe { std::ptr::write_bytes(self.base.add(self.position(seq, from)), 0, (to - from) as usize) };
    }

    /// Copies `bytes` to `offset` of region `seq`, which the caller owns by the rules in the module's header.
    pub(crate) fn put(&self, seq: RegionSeq, offset: u32, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= self.region_bytes as usize);
        // SAFETY: in bounds by the assertion; ownership is the caller's.
        unsafe {
            let target = self.base.add(self.position(seq, offset));
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }

    /// Bytes `from..to` of region `seq`: published records and what surrounds them, immutable while the region is live.
    pub(crate) fn bytes(&self, seq: RegionSeq, from: u32, to: u32) -> &[u8] {
        assert!(from <= to && to <= self.region_bytes);
        // SAFETY: in bounds by the assertion; immutable by the rules in the module's header.
        unsafe { std::slice::from_raw_parts(self.base.add(self.position(seq, from)), (to - from) as usize) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use uuid::Uuid;

    #[test]
    fn folders_that_others_can_write_to_are_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("arenas");
        fs::create_dir(&dir).unwrap();
        for (mode, refused) in [(0o700, false), (0o755, false), (0o770, true), (0o1777, true)] {
            fs::set_permissions(&dir, Permissions::from_mode(mode)).unwrap();
            assert_eq!(refuse_open_folder(&dir).is_err(), refused, "{mode:o}");
        }
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        let link = temporary.path().join("link");
        symlink(&dir, &link).unwrap();
        let error = refuse_open_folder(&link).unwrap_err();
        assert!(error.kind() == ErrorKind::Permission && error.report().contains("is a link"), "{error}");
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&dir, Some(65534), None).unwrap();
            assert!(refuse_open_folder(&dir).unwrap_err().report().contains("user 65534"));
        }
    }

    #[test]
    fn memory_made_ahead_is_zero_and_leaves_what_lies_beside_it() {
        let (region_bytes, region_count) = (4 << 20, 8);
        let identity =
            ArenaIdentity { stage_uuid: Uuid::from_u128(1), arena_id: 1, region_bytes, region_count };
        let arena = Arena::anonymous(&identity).unwrap();
        let (before, behind) = (RegionSeq(2), RegionSeq(6));
        for seq in [before, behind] {
            arena.allocate(seq).unwrap();
            arena.put(seq, 0, &[7; 4 << 20]);
        }
        let made: Vec<RegionSeq> = (3..6).map(RegionSeq).collect();
        assert!(matches!(arena.allocate_ahead(&made), (3, Ok(()))));
        for seq in made {
            assert!(arena.bytes(seq, 0, 4 << 20).iter().all(|byte| *byte == 0), "{seq}");
        }
        for seq in [before, behind] {
            assert!(arena.bytes(seq, 0, 4 << 20).iter().all(|byte| *byte == 7), "{seq}");
        }
    }
}
